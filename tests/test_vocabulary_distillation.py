"""Distillation of a student with fewer tokens than its teacher, against explicit probabilities in float64."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    MeasurementCallback,
    PrunerConfig,
    apply_plan,
    cache_teacher_logits,
    count_tokens,
    estimate_capacity,
    estimate_importance,
    evaluate_models,
    load_teacher_cache,
    make_plan,
    prune_tokenizer,
    save_model,
    student_config,
)
from minitron_hf.distillation.capacity import loss_bytes
from minitron_hf.distillation.fake_runs import Setup
from minitron_hf.errors import DataError, MismatchError, PlanError
from minitron_hf.losses.fused import distillation_loss
from minitron_hf.losses.heads import OutputHead
from minitron_hf.losses.signals import DenseSignal, SampledSignal, sampled_signal, top_k_signal
from pocket import pocket_tokenizer
from test_cli import minitron
from test_vocabulary_pruning import SIZE, teacher_of, texts

N, V_T, H, H_T = 13, 31, 7, 11
#: Teacher's ids of the student's tokens.
KEPT = torch.tensor([0, 2, 3, 4, 7, 8, 11, 12, 13, 14, 17, 20, 21, 22, 23, 24, 28, 30])


def problem(*, bias=False, scale=1.0, softcap=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    hidden, weight_t = normal(N, H), normal(V_T, H_T) / 2
    hidden_t = torch.cat([hidden, normal(N, H_T - H)], 1)
    bias_t = normal(V_T) if bias else None
    head = OutputHead(
        weight_t[KEPT, :H].clone().requires_grad_(),
        bias_t[KEPT].clone().requires_grad_() if bias else None,
        0.8 * scale,
        softcap,
    )
    labels = torch.randint(len(KEPT), (N,), generator=generator)
    return (
        hidden.requires_grad_(),
        head,
        DenseSignal(hidden_t.detach(), OutputHead(weight_t, bias_t, scale, softcap), KEPT),
        labels,
    )


def logits(states, head):
    z = states.double() @ head.weight.double().T
    z = (z if head.bias is None else z + head.bias.double()) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def naive(hidden, head, teacher, labels, *, divergence, temperature, kd_weight, ce_weight):
    """From the whole distribution of the teacher: m·D(p / m, q) with m, the probability of the kept tokens."""
    z_s, z_t = logits(hidden, head), logits(teacher.hidden, teacher.head)
    p_all = torch.exp(z_t / temperature) / torch.exp(z_t / temperature).sum(1, keepdim=True)
    m = p_all[:, KEPT].sum(1)
    p = p_all[:, KEPT] / m[:, None]
    q = torch.exp(z_s / temperature) / torch.exp(z_s / temperature).sum(1, keepdim=True)

    def kl_of(a, b):
        return (a * torch.log(a / b)).sum(1)

    mixed = (p + q) / 2
    value = (
        m
        * {
            "forward_kl": kl_of(p, q),
            "reverse_kl": kl_of(q, p),
            "jsd": (kl_of(p, mixed) + kl_of(q, mixed)) / 2,
            "tv": (p - q).abs().sum(1) / 2,
            "mse": (z_t[:, KEPT] - z_s).square().mean(1),
        }[divergence]
    )
    ce = -torch.log_softmax(z_s, 1).gather(1, labels[:, None])[:, 0]
    total = (kd_weight * temperature**2 * value + ce_weight * ce).sum()
    return total, value, m * kl_of(p, q), ce, z_t.argmax(1) == KEPT[z_s.argmax(1)], p_all, q, m


@pytest.mark.parametrize("case", [{}, {"bias": True, "scale": 0.3}, {"softcap": 5.0, "bias": True}], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tv", "mse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
def test_values_and_gradients_equal_the_naive_reference(case, divergence, temperature, ce_weight):
    if divergence == "mse" and temperature != 1:
        pytest.skip("logits have no temperature")
    hidden, head, teacher, labels = problem(**case)
    options = {"divergence": divergence, "temperature": temperature, "kd_weight": 0.7, "ce_weight": ce_weight}
    inputs = [tensor for tensor in (hidden, head.weight, head.bias) if tensor is not None]
    total, value, kl, ce, agreement, p_all, q, m = naive(hidden, head, teacher, labels, **options)
    found = distillation_loss(hidden, head, teacher, labels, chunk_size=5, **options)
    for one, other in ((found.total, total), (found.divergence, value), (found.kl, kl), (found.ce, ce)):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert torch.equal(found.agreement, agreement)
    assert agreement.any()
    assert not agreement.all()
    for one, other in zip(torch.autograd.grad(0.37 * found.total, inputs), torch.autograd.grad(0.37 * total, inputs)):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    if divergence == "forward_kl":  # the other tokens are one more outcome, whose part the student cannot change
        p = p_all[:, KEPT]
        outcomes = (p * (p.log() - q.log())).sum(1) - m * m.log()
        torch.testing.assert_close(found.kl, outcomes, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tv"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_kept_tokens_of_a_cache_are_the_whole_distribution(divergence, temperature):
    """The k most likely of the kept tokens, with the share of them all: at k = V the naive reference."""
    hidden, head, teacher, labels = problem(bias=True)
    options = {"divergence": divergence, "temperature": temperature, "kd_weight": 0.7, "ce_weight": 0.4}
    total, value, kl, _, agreement, *_, m = naive(hidden, head, teacher, labels, **options)
    signal = top_k_signal(teacher, len(KEPT), temperature=temperature, chunk_size=5)
    torch.testing.assert_close(signal.kept_share.abs(), m, rtol=1e-12, atol=1e-13)
    found = distillation_loss(hidden, head, signal, labels, chunk_size=5, **options)
    for one, other in ((found.total, total), (found.divergence, value), (found.kl, kl)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert torch.equal(found.agreement, agreement)
    inputs = (hidden, head.weight, head.bias)
    for one, other in zip(torch.autograd.grad(found.total, inputs), torch.autograd.grad(total, inputs)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_fewer_kept_tokens_are_k_plus_one_outcomes():
    """K of the kept tokens and "another kept token", weighted by the share of all kept ones."""
    hidden, head, teacher, labels = problem()
    p_all = logits(teacher.hidden, teacher.head).softmax(1)
    p, q = p_all[:, KEPT], logits(hidden, head).softmax(1)
    m = p.sum(1, keepdim=True)
    best = (p / m).topk(4).indices
    outcomes = [torch.cat([x.gather(1, best), 1 - x.gather(1, best).sum(1, keepdim=True)], 1) for x in (p / m, q)]
    expected = m[:, 0] * (outcomes[0] * (outcomes[0] / outcomes[1]).log()).sum(1)
    found = distillation_loss(hidden, head, top_k_signal(teacher, 4), labels)
    torch.testing.assert_close(found.kl, expected, rtol=1e-10, atol=1e-12)


def test_drawn_kept_tokens_are_right_on_average():
    """Over all offsets of the draws, the mean of value and gradient is that of the whole distribution."""
    hidden, head, teacher, labels = problem()
    exact = distillation_loss(hidden, head, teacher, labels)
    signals = [sampled_signal(teacher, 4, torch.full((N,), (j + 0.5) / 400, dtype=torch.float64)) for j in range(400)]
    drawn = torch.stack([torch.zeros(N, len(KEPT)).double().scatter_add_(1, s.tokens, s.weights) for s in signals])
    p = logits(teacher.hidden, teacher.head).softmax(1)[:, KEPT]
    torch.testing.assert_close(drawn.mean(0), p / p.sum(1, keepdim=True), rtol=0, atol=2e-3)
    assert isinstance(signals[0], SampledSignal)
    losses = [distillation_loss(hidden, head, signal, labels) for signal in signals]
    mean = torch.stack([loss.kl for loss in losses]).mean(0)
    torch.testing.assert_close(mean, exact.kl.detach(), rtol=0.02, atol=5e-3)
    found = torch.autograd.grad(torch.stack([loss.total for loss in losses]).mean(), hidden)[0]
    torch.testing.assert_close(found, torch.autograd.grad(exact.total, hidden)[0], rtol=0.02, atol=2e-2)
    assert torch.equal(losses[0].agreement, exact.agreement)


def test_a_student_that_lacks_no_token_learns_as_before():
    """All tokens, in another order."""
    hidden, _, teacher, _ = problem(bias=True)
    order = torch.randperm(V_T, generator=torch.Generator().manual_seed(3))
    weight, bias = (teacher.head.weight[order, :H].clone().requires_grad_(), teacher.head.bias[order].clone())
    whole, labels = OutputHead(weight, bias), torch.zeros(N, dtype=torch.long)
    signal = DenseSignal(teacher.hidden, OutputHead(teacher.head.weight[order], teacher.head.bias[order]))
    plain = distillation_loss(hidden, whole, signal, labels)
    mapped = distillation_loss(hidden, whole, DenseSignal(teacher.hidden, teacher.head, order), labels)
    torch.testing.assert_close(mapped.kl, plain.kl, rtol=1e-12, atol=1e-13)
    assert torch.equal(mapped.agreement, plain.agreement)
    ours, theirs = (torch.autograd.grad(one.total, weight)[0] for one in (mapped, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_half_precision_is_near():
    hidden, head, teacher, labels = problem()
    expected = distillation_loss(hidden, head, teacher, labels)
    half = [OutputHead(one.weight.detach().bfloat16(), None, one.scale) for one in (head, teacher.head)]
    signal = DenseSignal(teacher.hidden.bfloat16(), half[1], KEPT)
    found = distillation_loss(hidden.detach().bfloat16(), half[0], signal, labels)
    assert (found.kl.double() - expected.kl).abs().mean() < 0.05 * expected.kl.mean()


# The trainer


@pytest.fixture(scope="module")
def pair():
    """A teacher, its student with two thirds of the tokens and neurons, and both tokenizers."""
    teacher, tokenizer = teacher_of(dtype=torch.float32)
    counts, scores = count_tokens(texts(), tokenizer), estimate_importance(teacher, metric="random")
    plan = make_plan(teacher, PrunerConfig(vocab_size=SIZE, intermediate_size=0.67), scores, token_counts=counts)
    return teacher, apply_plan(teacher, plan), tokenizer, prune_tokenizer(tokenizer, plan)


def trainer_of(student, teacher, folder, tokenizer, **changes):
    values = {
        "max_length": 16, "per_device_train_batch_size": 4, "max_steps": 30, "learning_rate": 3e-3, "bf16": False,
        "use_cpu": True, "report_to": "none", "logging_steps": 30, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    rows = Dataset.from_dict({"text": texts()})
    return DistillationTrainer(
        student,
        teacher,
        args=DistillationConfig(str(folder), **{**values, **changes}),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_the_trainer_compares_the_kept_tokens(pair, tmp_path, whose):
    """Evaluation equals the naive loss: the student reads its own tokens, the teacher the same ones."""
    teacher, student, tokenizer, cut = pair
    given = tokenizer if whose == "teacher" else cut
    trainer = trainer_of(student, teacher, tmp_path, given, per_device_eval_batch_size=3)
    found = trainer.evaluate()
    kept = torch.from_numpy(student.pruning_plan.kept["vocab"])
    sums, count, agree = 0.0, 0, 0
    for row in trainer.eval_dataset["input_ids"]:
        ids = torch.tensor([row])
        assert ids.max() < SIZE
        with torch.no_grad():
            z_s, z_t = student(ids).logits[0, :-1].double(), teacher(kept[ids]).logits[0, :-1].double()
        p_all = z_t.softmax(-1)
        m = p_all[:, kept].sum(-1)
        p, q = p_all[:, kept] / m[:, None], z_s.softmax(-1)
        sums += float((m * (p * (p / q).log()).sum(-1)).sum())
        agree += int((z_t.argmax(-1) == kept[z_s.argmax(-1)]).sum())
        count += len(m)
    assert found["eval_kl"] == pytest.approx(sums / count, rel=1e-4)
    assert found["eval_agreement"] == pytest.approx(agree / count)


@pytest.mark.parametrize("options", [{}, {"hidden_loss": "mse", "embedding_loss": "mse", "packing": True}], ids=str)
def test_a_student_with_fewer_tokens_is_distilled(pair, tmp_path, options):
    teacher, student, tokenizer, cut = pair
    trainer = trainer_of(copy.deepcopy(student), teacher, tmp_path, tokenizer, **options)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.8 * before
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.get_vocab() == cut.get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == SIZE
    # From the folder, which holds the plan and the student's tokenizer.
    again = trainer_of(str(tmp_path), teacher, tmp_path / "again", None)
    assert again.evaluate()["eval_kl"] == pytest.approx(trainer.evaluate()["eval_kl"], rel=1e-3)


def test_teacher_correction_learns_the_teachers_ids(pair, tmp_path):
    """Concurrent correction: the teacher's own loss is that of the same tokens under its ids."""
    teacher, student, tokenizer, _ = pair
    own = copy.deepcopy(teacher)
    correction = {"teacher_correction": "concurrent", "teacher_original_learning_rate": 1e-2}
    trainer = trainer_of(copy.deepcopy(student), own, tmp_path, tokenizer, max_steps=40, **correction)

    def loss() -> float:
        rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts()[:8]]
        with torch.no_grad():
            return sum(float(own(ids, labels=ids).loss) for ids in rows)

    before = loss()
    trainer.train()
    assert loss() < before


def test_pairs_that_do_not_fit_are_refused(pair, tmp_path):
    teacher, student, tokenizer, _ = pair
    with pytest.raises(MismatchError, match="chosen with another tokenizer"):
        trainer_of(student, teacher, tmp_path, pocket_tokenizer())
    with pytest.raises(DataError, match="processing_class is None"):
        trainer_of(student, teacher, tmp_path, None)
    bare = copy.deepcopy(student)
    del bare.pruning_plan  # which tokens it has is not known
    with pytest.raises(MismatchError, match="vocabulary has 17 tokens"):
        trainer_of(bare, teacher, tmp_path, tokenizer)
    cache = cache_teacher_logits(
        *(teacher, Dataset.from_dict({"text": texts()[:4]}), tmp_path / "cache"),
        top_k=4,
        args=DistillationConfig(str(tmp_path), max_length=16, bf16=False, use_cpu=True, report_to="none"),
        processing_class=tokenizer,
    )
    for given in (teacher, None):
        with pytest.raises(MismatchError, match="teacher cache holds distributions over all tokens of the teacher"):
            DistillationTrainer(student, given, train_dataset=load_teacher_cache(cache), processing_class=tokenizer)


def cached(pair, folder, **options):
    """The rows of the trainer in a cache of the student's tokens."""
    teacher, student, tokenizer, _ = pair
    args = DistillationConfig(str(folder), max_length=16, bf16=False, use_cpu=True, report_to="none")
    rows = Dataset.from_dict({"text": texts()})
    given = {"args": args, "processing_class": tokenizer, "pruning_plan": student.pruning_plan}
    return load_teacher_cache(cache_teacher_logits(teacher, rows, folder / "cache", **given, **options))


def cached_trainer(student, cache, folder, tokenizer, **changes):
    values = {
        "max_length": 16, "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 3e-3, "bf16": False,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_eval_rows": None,
    }  # fmt: skip
    args = DistillationConfig(str(folder), **{**values, **changes})
    return DistillationTrainer(
        copy.deepcopy(student), None, args, train_dataset=cache, eval_dataset=cache, processing_class=tokenizer
    )


def test_a_cache_of_all_kept_tokens_trains_as_the_teacher(pair, tmp_path):
    """Evaluation and the weights after three steps equal those of online distillation."""
    teacher, student, tokenizer, _ = pair
    cache = cached(pair, tmp_path, top_k=SIZE, dtype="float32")
    assert cache.vocab_size == SIZE
    online = trainer_of(copy.deepcopy(student), teacher, tmp_path / "online", tokenizer, max_steps=3)
    online.eval_dataset = online.train_dataset
    offline = cached_trainer(student, cache, tmp_path / "offline", tokenizer)
    one, other = offline.evaluate(), online.evaluate()
    for name in ("eval_kl", "eval_ce", "eval_agreement"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)
    assert one["eval_agreement"] < 1
    online.train()
    offline.train()
    for one, other in zip(offline.model.parameters(), online.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"top_k": 6}, {"top_k": 6, "dtype": "fixed12"}, {"num_draws": 40}], ids=str)
def test_smaller_caches_of_kept_tokens_are_near(pair, tmp_path, options):
    _, student, tokenizer, _ = pair
    caches = cached(pair, tmp_path / "whole", top_k=SIZE), cached(pair, tmp_path, **options)
    exact, found = (cached_trainer(student, one, tmp_path / "run", tokenizer).evaluate()["eval_kl"] for one in caches)
    assert found <= exact * 1.05
    assert found > 0.5 * exact


def test_the_command_line_caches_for_a_cut_vocabulary(pair, tmp_path):
    """`cache --plan` writes what the function does, and `distill` trains the student from it."""
    teacher, student, tokenizer, cut = pair
    save_model(teacher, tmp_path / "teacher", tokenizer)
    student.pruning_plan.save_pretrained(tmp_path / "plan")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    settings = ("max_length=16", "packing=false", "bf16=false", "use_cpu=true", "report_to=none")
    common = [f"--set={one}" for one in settings]
    rows = (
        "--data",
        tmp_path / "text.jsonl",
        "--plan",
        tmp_path / "plan" / "pruning_plan.safetensors",
        "--top-k",
        "6",
    )
    done = minitron("cache", tmp_path / "teacher", *rows, "-o", tmp_path / "cache", *common)
    assert done.returncode == 0, done.stderr
    expected = cached(pair, tmp_path / "called", top_k=6)
    found = load_teacher_cache(tmp_path / "cache")
    pairs = [cache.dataset.with_format(None)[:] for cache in (found, expected)]
    assert pairs[0].keys() == pairs[1].keys()
    for name, column in pairs[0].items():
        if "log" in name:  # another process may round otherwise
            for one, other in zip(column, pairs[1][name], strict=True):
                torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=2e-3, rtol=2e-3)
        else:
            assert column == pairs[1][name], name
    save_model(student, tmp_path / "student", cut)
    given = ("--train-data", tmp_path / "cache", "-o", tmp_path / "out", *common, "--set", "max_steps=2")
    done = minitron("distill", tmp_path / "student", *given, "--set", "save_strategy=no")
    assert done.returncode == 0, done.stderr


def test_a_cache_of_other_kept_tokens_is_refused(pair, tmp_path):
    teacher, _, tokenizer, _ = pair
    cache = cached(pair, tmp_path, top_k=4)
    counts, scores = count_tokens(texts(), tokenizer), estimate_importance(teacher, metric="random")
    other = make_plan(teacher, PrunerConfig(vocab_size=SIZE - 1), scores, token_counts=counts)
    with pytest.raises(MismatchError, match="written for a student with other tokens"):
        cached_trainer(apply_plan(teacher, other), cache, tmp_path / "a", tokenizer)
    whole = make_plan(teacher, PrunerConfig(intermediate_size=0.5), scores)
    with pytest.raises(MismatchError, match="written for a student with other tokens"):
        cached_trainer(apply_plan(teacher, whole), cache, tmp_path / "b", tokenizer)
    with pytest.raises(DataError, match=f"to the {SIZE} tokens"):
        cached(pair, tmp_path / "c", top_k=SIZE + 1)


# Evaluation


def test_models_are_measured_on_the_students_tokens(pair, tmp_path):
    """Against explicit probabilities: the teacher's loss under its own ids, and the weighted divergence."""
    teacher, student, tokenizer, cut = pair
    save_model(student, tmp_path / "student", cut)
    student.pruning_plan.save_pretrained(tmp_path / "student")
    save_model(teacher, tmp_path / "teacher", tokenizer)
    kept = torch.from_numpy(student.pruning_plan.kept["vocab"])
    rows = [cut(text)["input_ids"] for text in texts()[:6]]
    count, kl, agree, losses = 0, 0.0, 0, {"teacher": 0.0, "student": 0.0}
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            z_s, z_t = student(ids).logits[0, :-1].double(), teacher(kept[ids]).logits[0, :-1].double()
        targets = ids[0, 1:, None]
        losses["student"] -= float(z_s.log_softmax(-1).gather(1, targets).sum())
        losses["teacher"] -= float(z_t.log_softmax(-1).gather(1, kept[targets]).sum())
        p = z_t.softmax(-1)[:, kept]
        m = p.sum(-1, keepdim=True)
        kl += float((p * ((p / m).log() - z_s.log_softmax(-1))).sum())
        agree += int((z_t.argmax(-1) == kept[z_s.argmax(-1)]).sum())
        count += len(targets)
    settings = {"speed": False, "show_progress": False, "batch_size": 4}
    by_path = {name: tmp_path / name for name in ("teacher", "student")}
    for models, given in ((pair[:2], tokenizer), (by_path.values(), cut)):
        named = dict(zip(("teacher", "student"), models, strict=True))
        found = evaluate_models(named, texts()[:6], processing_class=given, **settings)["models"]
        for name, loss in losses.items():
            assert found[name]["metrics"]["loss"]["value"] == pytest.approx(loss / count, rel=1e-5)
        metrics = found["student"]["metrics"]
        assert metrics["kl_divergence"]["value"] == pytest.approx(kl / count, rel=1e-4)
        assert metrics["top1_agreement"]["value"] == pytest.approx(agree / count)
    assert found["teacher"]["metrics"]["bits_per_byte"]["value"] > 0
    callback = MeasurementCallback(
        trainer_of(copy.deepcopy(student), teacher, tmp_path / "out", cut), reference=teacher, dataset=texts()[:6]
    )
    assert callback.measure()["eval_kl_divergence"] == pytest.approx(kl / count, rel=1e-4)


def test_the_estimate_of_memory_counts_both_vocabularies():
    """Less than with the teacher's vocabulary twice."""
    teacher = teacher_of(dtype=torch.float32)[0].config
    small, setup = student_config(teacher, PrunerConfig(vocab_size=SIZE)), Setup()
    assert loss_bytes(teacher, small, setup, 1 << 20) < loss_bytes(teacher, teacher, setup, 1 << 20)
    found = estimate_capacity(teacher, small, Setup(max_length=32), cuts_vocabulary=True)
    assert found.parts["loss chunks"] >= 0
    with pytest.raises(PlanError, match="expected the same vocabulary"):
        estimate_capacity(small, teacher, cuts_vocabulary=True)
