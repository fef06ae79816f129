"""The trainer against naive computations over whole logits, and against itself under other batchings."""

from __future__ import annotations

import copy
import json
import random
import warnings

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from minitron_hf.distillation import saving
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.correction import correct_teacher
from minitron_hf.distillation.rows import some_rows
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import DataError, MismatchError, OutputError, PlanError, UnsupportedModelError
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.sizes.request import PrunerConfig
from pocket import float64_throughout, pocket_model, pocket_tokenizer, pocket_tokens

pytestmark = pytest.mark.filterwarnings(
    "error::FutureWarning", "error::UserWarning", "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)


@pytest.fixture
def float64():
    """The stock models compute norms and softmax in float32 otherwise, whatever their dtype."""
    with float64_throughout():
        yield


LENGTHS = (5, 17, 9, 30, 3, 12, 21, 8)


def token_dataset(lengths=LENGTHS, *, labels=False, seed=0):
    rows = [pocket_tokens(length, seed=seed + index).tolist() for index, length in enumerate(lengths)]
    columns = {"input_ids": rows}
    if labels:  # every third token does not count
        columns["labels"] = [[-100 if i % 3 == 0 else t for i, t in enumerate(row)] for row in rows]
    return Dataset.from_dict(columns)


def text_dataset(count=40, seed=0):
    rng = random.Random(seed)
    return Dataset.from_dict(
        {"text": ["".join(rng.choice("abcdefgh .") for _ in range(rng.randrange(6, 40))) for _ in range(count)]}
    )


def models(name="llama", dtype=torch.float64, **changes):
    """A student of two layers, and its teacher, whose large embeddings it has, so that they agree on some tokens."""
    if name == "gpt2":
        changes |= {"n_layer": 2, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    else:
        changes |= {"num_hidden_layers": 2}
    student, teacher = pocket_model(name, dtype=dtype, seed=1, **changes), pocket_model(name, dtype=dtype)
    if "vocab_size" not in changes:
        with torch.no_grad():
            teacher.get_input_embeddings().weight.mul_(1 if name == "gpt2" else 8)
        student.get_input_embeddings().load_state_dict(teacher.get_input_embeddings().state_dict())
        student.get_output_embeddings().load_state_dict(teacher.get_output_embeddings().state_dict())
    return student, teacher


def make_trainer(
    folder, student, teacher, train_dataset, eval_dataset=None, *, callbacks=(), peft_config=None, **args
):
    defaults = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "max_length": 64}
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(str(folder), **{**defaults, **args}),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=pocket_tokenizer(),
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


def naive_sums(student, teacher, dataset, *, temperature=1.0):
    """Sums over the counted tokens, row by row without padding: KL, CE, agreements, tokens."""
    kl = ce = agreements = count = 0
    for row in dataset:
        tokens = torch.tensor(row["input_ids"])[None]
        labels = torch.tensor(row.get("labels", row["input_ids"]))[1:]
        z_s = student(tokens, use_cache=False).logits[0, :-1].double()
        with torch.no_grad():
            z_t = teacher(tokens, use_cache=False).logits[0, :-1].double()
        p = torch.softmax(z_t / temperature, -1)
        difference = torch.log_softmax(z_t / temperature, -1) - torch.log_softmax(z_s / temperature, -1)
        counts = labels != -100
        kl = kl + (p * difference).sum(-1)[counts].sum()
        ce = ce - torch.log_softmax(z_s, -1)[counts].gather(1, labels[counts, None]).sum()
        agreements = agreements + (z_s.argmax(-1) == z_t.argmax(-1))[counts].sum()
        count += int(counts.sum())
    return kl, ce, agreements, count


class Gradients(TrainerCallback):
    """Keeps a copy of the gradients of the first optimiser step."""

    def __init__(self):
        self.values = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.values is None:
            self.values = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.ranges
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_gradient_is_the_naive_one_however_the_batch_is_split(tmp_path, name, batch, accumulation):
    student, teacher = models(name)
    data = token_dataset(labels=True)
    kl, ce, _, count = naive_sums(student, teacher, data, temperature=2.0)
    loss = (0.7 * 4 * kl + 0.3 * ce) / count
    parameters = dict(student.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    gradients = Gradients()
    trainer = make_trainer(
        *(tmp_path, student, teacher, data),
        callbacks=[gradients],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0,
        temperature=2.0,
        kd_weight=0.7,
        ce_weight=0.3,
    )
    trainer.train()
    assert gradients.values.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(gradients.values[key], value, rtol=1e-9, atol=1e-11)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)  # the Trainer sums it in float32
    assert log["kl"] == pytest.approx(kl.item() / count, rel=1e-11)
    assert log["ce"] == pytest.approx(ce.item() / count, rel=1e-11)


def narrow_student(dtype=torch.float64):
    """A student of 24 channels, pruned from its teacher of 36, and fewer layers."""
    teacher = pocket_model("llama", dtype=dtype)
    plan = PrunerConfig(hidden_size=24, num_hidden_layers=4, multiple_of=1)
    return prune_model(teacher, plan, metric="random"), teacher


def naive_states(student, teacher, dataset, projection):
    """Σ of cosine distances of the third last layers and of mean squared differences of embeddings, by hooks."""
    sums = {"hidden": 0, "embedding": 0}
    for row in dataset:
        counts = torch.tensor(row.get("labels", row["input_ids"]))[1:] != -100
        seen = []
        for model in (student, teacher):
            caught = {}
            places = {"embedding": model.model.embed_tokens, "hidden": model.model.layers[-3]}
            hooks = [
                module.register_forward_hook(lambda m, a, out, name=name, caught=caught: caught.update({name: out}))
                for name, module in places.items()
            ]
            model(torch.tensor(row["input_ids"])[None], use_cache=False)
            for hook in hooks:
                hook.remove()
            seen.append({name: value[0, :-1][counts] for name, value in caught.items()})
        mine, theirs = ({name: x.double() for name, x in values.items()} for values in seen)
        mine = {name: x @ projection.T for name, x in mine.items()}
        s, t = mine["hidden"], theirs["hidden"].detach()
        sums["hidden"] += (1 - (s * t).sum(-1) / ((s * s).sum(-1) * (t * t).sum(-1)).sqrt()).sum()
        sums["embedding"] += ((mine["embedding"] - theirs["embedding"].detach()) ** 2).mean(-1).sum()
    return sums["hidden"], sums["embedding"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weight", ["dynamic", 0.4])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
@pytest.mark.parametrize("lora", [False, True])
def test_intermediate_losses_have_the_naive_gradient_however_the_batch_is_split(
    tmp_path, weight, batch, accumulation, lora
):
    student, teacher = narrow_student()
    data = token_dataset(labels=True)
    projection = torch.zeros(36, 24, dtype=torch.float64)
    projection[torch.from_numpy(student.pruning_plan.kept["hidden"]), torch.arange(24)] = 1
    projection.requires_grad_()
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False) if lora else None
    gradients = Gradients()
    trainer = make_trainer(
        *(tmp_path, student, teacher, data),
        callbacks=[gradients],
        peft_config=config,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0,
        hidden_loss="cosine",
        embedding_loss="mse",
        intermediate_weight=weight,
        activation_checkpointing=batch == 2,
    )
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    kl, _, _, count = naive_sums(trainer.model, teacher, data)
    base = trainer.model.get_base_model() if lora else trainer.model
    hidden, embedding = naive_states(base, teacher, data, projection)
    alpha = (kl / (hidden + embedding)).item() if weight == "dynamic" else weight
    loss = (kl + alpha * (hidden + embedding)) / count
    expected = dict(
        zip([*parameters, "P"], torch.autograd.grad(loss, [*parameters.values(), projection]), strict=True)
    )
    trainer.train()
    prefix = "base_model.model." if lora else ""
    found = {**gradients.values, "P": gradients.values[f"{prefix}teacher_projection.weight"]}
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value.double(), rtol=1e-5 if lora else 1e-8, atol=1e-9)
    log = trainer.state.log_history[0]
    assert log["alpha"] == pytest.approx(alpha, rel=1e-9)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert (log["hidden"], log["embedding"]) == pytest.approx((hidden.item() / count, embedding.item() / count))


def test_the_weight_follows_the_step_before(tmp_path):
    student, teacher = narrow_student(torch.float32)
    options = {"max_steps": 4, "learning_rate": 1e-2, "hidden_loss": "cosine"}
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), **options)
    trainer.train()
    first, *others = trainer.state.log_history[:4]
    for before, after in zip([first, *others], [first, first, *others[:-1]], strict=True):
        assert before["alpha"] == pytest.approx(after["kl"] / after["hidden"], rel=1e-5)
    assert others[-1]["hidden"] < first["hidden"]


def test_the_map_is_trained_and_saved_in_checkpoints_alone(tmp_path):
    student, teacher = narrow_student(torch.float32)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), token_dataset(), hidden_loss="mse", **options)
    start = trainer._intermediate.projection.weight.detach().clone()
    assert torch.equal(start.sum(0), torch.ones(24))
    assert trainer.evaluate()["eval_hidden"] > 0
    trainer.train()
    assert not torch.equal(trainer._intermediate.projection.weight, start)
    assert not any("projection" in name for name, _ in student.named_parameters())
    saved = load_file(tmp_path / "checkpoint-2" / "intermediate_losses.safetensors")
    assert torch.equal(saved["projection"], trainer._intermediate.projection.weight)
    trainer.save_student(tmp_path / "student")
    for folder in ("checkpoint-2", "student"):
        names = load_file(tmp_path / folder / "model.safetensors").keys()
        assert names == student.state_dict().keys()
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


def test_equal_widths_are_compared_without_a_map(tmp_path):
    student, teacher = models(dtype=torch.float32)
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), hidden_loss="cosine", max_steps=1)
    assert trainer._intermediate.projection is None
    trainer.train()
    assert trainer.state.log_history[0]["hidden"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl': expected one of forward_kl"),
        ({"divergence": "mse", "temperature": 2.0}, "compares logits, which have no temperature"),
        ({"jsd_beta": 1.0}, "jsd_beta=1.0: expected a number between 0 and 1"),
        ({"hidden_loss": "l1"}, "hidden_loss='l1': expected cosine or mse"),
        ({"hidden_layers": [[-3, -3]]}, "no effect without hidden_loss"),
        ({"hidden_loss": "mse", "hidden_layers": [[1]]}, "expected a list of pairs"),
        ({"intermediate_weight": "much"}, "expected 'dynamic' or a number"),
        (
            {"hidden_loss": "mse", "kd_weight": 0.0, "ce_weight": 1.0},
            "is relative to the divergence, whose weight is 0",
        ),
    ],
)
def test_losses_that_do_not_exist_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(str(tmp_path), **arguments)


def test_layers_that_do_not_exist_are_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    with pytest.raises(PlanError, match=r"the student has no layer 4. Expected -2 to 1"):
        make_trainer(tmp_path, student, teacher, token_dataset(), hidden_loss="cosine", hidden_layers=[[4, 4]])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("packing", [False, "bfd", "padding_free"])
@pytest.mark.parametrize("labels", [False, True])
def test_evaluation_is_the_mean_over_tokens(tmp_path, packing, labels):
    """Packed documents do not see each other, and batches of unequal token counts weigh what they should."""
    student, teacher = models()
    data = token_dataset(labels=labels)
    options = {"packing": True, "packing_strategy": "bfd"} if packing == "bfd" else {}
    if packing == "padding_free":
        options = {"padding_free": True, "max_length": None}
    trainer = make_trainer(tmp_path, student, teacher, data, data, per_device_eval_batch_size=3, **options)
    if packing == "bfd":
        assert len(trainer.eval_dataset) < len(data)
    kl, ce, agreements, count = naive_sums(student, teacher, data)
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] == pytest.approx(kl.item() / count, rel=1e-11)
    assert metrics["eval_loss"] == metrics["eval_kl"]
    assert metrics["eval_ce"] == pytest.approx(ce.item() / count, rel=1e-11)
    assert metrics["eval_agreement"] == agreements.item() / count
    assert labels or 0 < metrics["eval_agreement"] < 1


def test_evaluation_of_a_student_that_is_not_sharded_yet_is_refused(tmp_path, monkeypatch):
    student, teacher = models(dtype=torch.float32)
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), token_dataset())
    monkeypatch.setattr("accelerate.Accelerator.is_fsdp2", True)
    with pytest.raises(UnsupportedModelError, match=r"FSDP2 shards .* Call evaluate\(\) after train\(\)"):
        trainer.evaluate()


@pytest.mark.usefixtures("float64")
def test_training_evaluates_some_rows_at_equal_distances(tmp_path):
    student, teacher = models()
    data = token_dataset()
    assert len(data) == 8
    trainer = make_trainer(tmp_path, student, teacher, data, {"a": data, "b": data.select([1])}, max_eval_rows=3)
    metrics = trainer.evaluate()
    for name, rows in (("a", [0, 2, 5]), ("b", [1])):
        kl, _, _, count = naive_sums(student, teacher, data.select(rows))
        assert metrics[f"eval_{name}_kl"] == pytest.approx(kl.item() / count, rel=1e-11)
    assert [row["input_ids"] for row in some_rows(data.to_iterable_dataset(), 2)] == data[:2]["input_ids"]
    assert some_rows(data, None) is some_rows(data, 8) is data
    with pytest.raises(ValueError, match="max_eval_rows=0"):
        DistillationConfig(str(tmp_path), max_eval_rows=0)


@pytest.mark.usefixtures("float64")
def test_packed_gradient_is_that_of_the_documents_apart(tmp_path):
    student, teacher = models()
    data = token_dataset()
    kl, _, _, count = naive_sums(student, teacher, data)
    parameters = dict(student.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(kl / count, list(parameters.values())), strict=True))
    gradients = Gradients()
    options = {"packing": True, "max_steps": 1, "max_grad_norm": 0, "activation_checkpointing": True}
    make_trainer(tmp_path, student, teacher, data, callbacks=[gradients], **options).train()
    for key, value in expected.items():
        torch.testing.assert_close(gradients.values[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("float64")
def test_completion_only_counts_the_completion(tmp_path):
    student, teacher = models()
    tokenizer = pocket_tokenizer()
    pairs = [("abc", "defg"), ("a", "bcdefghi"), ("hello there", "you")]
    data = Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})
    rows = []
    for prompt, completion in pairs:
        ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    kl, ce, _, count = naive_sums(student, teacher, rows)
    assert count == 4 + 8 + 3 + 3  # the completions and their ends
    metrics = make_trainer(tmp_path, student, teacher, data, data).evaluate()
    assert metrics["eval_kl"] == pytest.approx(kl.item() / count, rel=1e-11)
    assert metrics["eval_ce"] == pytest.approx(ce.item() / count, rel=1e-11)


@pytest.mark.usefixtures("float64")
def test_assistant_only_counts_the_assistant(tmp_path):
    student, teacher = models()
    tokenizer = pocket_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": "xyz"}]
    data = Dataset.from_dict({"messages": [messages]})
    ids = tokenizer("U:abcdA:xyz")["input_ids"] + [tokenizer.eos_token_id]
    rows = [{"input_ids": ids, "labels": [-100] * 8 + ids[8:]}]
    kl, _, _, count = naive_sums(student, teacher, rows)
    assert count == 4
    args = DistillationConfig(str(tmp_path), report_to="none", disable_tqdm=True, assistant_only_loss=True)
    trainer = DistillationTrainer(
        student, teacher, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kl.item() / count, rel=1e-11)


@pytest.mark.usefixtures("float64")
def test_a_batch_without_counted_tokens_changes_nothing(tmp_path):
    student, teacher = models()
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[5, -100, -100], [-100, 6, 7]]})
    kl, _, _, count = naive_sums(student, teacher, data)
    assert count == 2  # the first row has one label, on its first token, which nothing predicts
    gradients = Gradients()
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make_trainer(tmp_path, student, teacher, data, callbacks=[gradients], **options)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(kl.item() / count, rel=1e-11)
    assert all(torch.isfinite(value).all() for value in gradients.values.values())


def test_training_approaches_the_teacher_and_leaves_it_alone(tmp_path):
    student, teacher = models(dtype=torch.float32)
    before = copy.deepcopy(teacher.state_dict())
    data = text_dataset()
    trainer = make_trainer(tmp_path, student, teacher, data, data, learning_rate=5e-3, max_steps=30)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_kl"] < 0.5 * first["eval_kl"]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(module is teacher for module in student.modules())
    assert "forward" not in teacher.__dict__


def test_mixed_precision_runs_teacher_and_student_alike(tmp_path):
    """Equal models give KL 0 only if both run in the same precision; and it is not float32."""
    student, teacher = models(dtype=torch.float32)
    twin = copy.deepcopy(student)
    data = token_dataset()
    trainer = make_trainer(tmp_path, student, twin, data, data, bf16=True, max_steps=1, ce_weight=1.0)
    exact = naive_sums(student, teacher, data)
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] == 0
    assert metrics["eval_agreement"] == 1
    assert metrics["eval_ce"] != pytest.approx(exact[1].item() / exact[3], rel=1e-7)
    assert metrics["eval_ce"] == pytest.approx(exact[1].item() / exact[3], rel=1e-2)
    trainer.train()
    assert trainer.state.log_history[-2]["kl"] == 0
    assert student.lm_head.weight.dtype == torch.float32


def test_half_precision_student_is_trained_in_float32(tmp_path):
    student, teacher = models(dtype=torch.float16)
    make_trainer(tmp_path, student, teacher, token_dataset())
    assert student.dtype == torch.float32
    assert teacher.dtype == torch.float32  # this machine is slow in float16


RESUMED = {
    "logits": {},
    "states": {"hidden_loss": "cosine", "embedding_loss": "mse", "width": 24},
    "fixed weight": {"hidden_loss": "cosine", "intermediate_weight": 0.3},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, case):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 2}
    options |= RESUMED[case]  # what was counted since the last log goes on, too
    width = options.pop("width", None)
    results = []
    for name in ("whole", "resumed"):
        student, teacher = models(dtype=torch.float32) if width is None else narrow_student(dtype=torch.float32)
        if name == "resumed":
            interrupted = copy.deepcopy(student)
            make_trainer(tmp_path / name, interrupted, teacher, text_dataset(), callbacks=[Stop()], **options).train()
        trainer = make_trainer(tmp_path / name, student, teacher, text_dataset(), **options)
        trainer.train(resume_from_checkpoint=name == "resumed")
        speed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second")
        history = [{k: v for k, v in entry.items() if k not in speed} for entry in trainer.state.log_history]
        assert all(entry["num_tokens"] == entry["num_input_tokens_seen"] for entry in history if "loss" in entry)
        results.append((student.state_dict(), history, trainer.state.num_input_tokens_seen))
    assert results[0][1] == results[1][1]
    assert results[0][2] == results[1][2] > 0
    for key, value in results[0][0].items():
        assert torch.equal(value, results[1][0][key]), key


def test_checkpoint_is_the_stock_student_with_its_plan(tmp_path):
    teacher = pocket_model("llama", dtype=torch.float32)
    student = prune_model(teacher, PrunerConfig(layers_to_drop=[1, 2]))
    assert student.config.use_cache
    data = text_dataset()
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "activation_checkpointing": True}
    trainer = make_trainer(tmp_path, student, teacher, data, **options, bf16=False)
    trainer.train()
    trainer.save_model()
    tokens = pocket_tokens(2, 9)
    expected = student.eval()(tokens).logits
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert type(loaded) is type(student)
        assert torch.equal(loaded(tokens).logits, expected)
        assert loaded.config.use_cache
        assert PruningPlan.from_pretrained(folder).to_dict() == student.pruning_plan.to_dict()
    assert not student.config.use_cache  # training goes on undisturbed
    generated = loaded.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(copy.deepcopy(student).generate(tokens, max_new_tokens=5, do_sample=False), generated)


def test_record(tmp_path):
    student, teacher = models(dtype=torch.float32)
    teacher.config._name_or_path = "owner/teacher"
    data, held_out = text_dataset(), text_dataset(7, seed=1)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, student, teacher, data, held_out, **options, temperature=2.0)
    trainer.train()
    trainer.save_model()
    halfway = json.loads((tmp_path / "checkpoint-2" / "distillation.json").read_text())
    record = json.loads((tmp_path / "distillation.json").read_text())
    assert halfway["global_step"] == 2
    assert record["global_step"] == 4
    assert record["format"] == 1
    assert record["teacher"] == {"name_or_path": "owner/teacher", "revision": None}
    assert record["arguments"]["temperature"] == 2.0
    assert record["arguments"]["lr_scheduler_type"] == "cosine"
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    facts = {"name": None, "num_rows": 40, "fingerprint": data._fingerprint, "longest_row": longest}
    assert record["data"]["train"] == facts
    assert record["data"]["eval"]["num_rows"] == 7
    assert record["peft"] is None
    assert record["train_runtime"] > 0
    assert 0 < halfway["num_input_tokens_seen"] < record["num_input_tokens_seen"]
    steps = [(entry["step"], "eval_kl" in entry) for entry in record["log_history"]]
    assert steps == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (4, False)]
    assert {"loss", "kl", "ce", "agreement", "grad_norm", "learning_rate"} <= record["log_history"][0].keys()


def test_models_by_path_bring_their_origin_along(tmp_path):
    student, teacher = models(dtype=torch.float32)
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "student" / "pruning_plan.json").write_text('{"format": 1}')
    args = {"max_steps": 1, "model_init_kwargs": {"device_map": None}}
    args["teacher_model_init_kwargs"] = {"dtype": "float32"}
    trainer = make_trainer(
        tmp_path / "out", tmp_path / "student", str(tmp_path / "teacher"), token_dataset(), None, **args
    )
    trainer.train()
    trainer.save_student(dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.use_cache
    assert (tmp_path / "out" / "pruning_plan.json").read_text() == '{"format": 1}'
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    # A published record does not tell where things lay on this machine.
    assert record["teacher"]["name_or_path"] == "teacher"
    assert record["student"]["name_or_path"] == "student"


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_saved_student_in_another_dtype_is_the_rounded_student(tmp_path, name):
    student, teacher = models(name, dtype=torch.float32)
    trainer = make_trainer(tmp_path / "run", student, teacher, token_dataset())
    trainer.save_student(tmp_path / "student", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert loaded.dtype == torch.bfloat16
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, student.state_dict()[key].to(torch.bfloat16))
    stored = load_file(tmp_path / "student" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (name == "llama")
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == name.endswith("tied")
    assert student.dtype == torch.float32


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_lora_gradient_is_the_naive_one_and_its_merge_is_stock(tmp_path, checkpointing, modules_to_save):
    student, teacher = models(dtype=torch.float64)
    data = token_dataset()
    config = LoraConfig(
        r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, modules_to_save=modules_to_save
    )
    gradients = Gradients()
    options = {"max_steps": 1, "max_grad_norm": 0, "activation_checkpointing": checkpointing, "learning_rate": 1e-2}
    trainer = make_trainer(
        tmp_path / "run", student, teacher, data, callbacks=[gradients], peft_config=config, **options
    )
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    kl, _, _, count = naive_sums(trainer.model, teacher, data)
    expected = dict(zip(trained, torch.autograd.grad(kl / count, list(trained.values())), strict=True))
    trainer.train()
    assert len(gradients.values) == 2 * 2 * 2 + bool(modules_to_save)
    for key, value in expected.items():
        torch.testing.assert_close(gradients.values[key].double(), value.double(), rtol=1e-5, atol=1e-8)

    trainer.save_student(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokens = pocket_tokens(2, 9)
    trainer.model.eval()
    torch.testing.assert_close(loaded(tokens).logits, trainer.model(tokens).logits, rtol=1e-9, atol=1e-9)
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert any("lora" in name for name, _ in trainer.model.named_parameters())  # training can go on
    record = json.loads((tmp_path / "student" / "distillation.json").read_text())
    assert record["peft"]["r"] == 3


def test_lora_checkpoint_resumes_and_merges_by_peft(tmp_path):
    student, teacher = models(dtype=torch.float32)
    student.save_pretrained(tmp_path / "base")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "bf16": False}
    config = LoraConfig(r=2, target_modules=["v_proj"])
    trainer = make_trainer(tmp_path / "run", student, teacher, token_dataset(), peft_config=config, **options)
    trainer.train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other = make_trainer(tmp_path / "run", again, teacher, token_dataset(), peft_config=config, **options)
    other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for (key, one), (_, two) in zip(trainer.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(one, two), key
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2").merge_and_unload()
    tokens = pocket_tokens(2, 9)
    torch.testing.assert_close(merged.eval()(tokens).logits, trainer.model.eval()(tokens).logits)


def adapted_student(tmp_path, **options):
    """A student that was pruned in memory from a stored teacher, and trains an adapter."""
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    student = prune_model(teacher, PrunerConfig(layers_to_drop=[1]))
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return make_trainer(tmp_path / "run", student, teacher, token_dataset(), peft_config=config, **options)


def test_adapter_of_a_student_in_memory_names_the_pruned_base(tmp_path):
    trainer = adapted_student(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, bf16=False)
    trainer.train()
    trainer.save_model()
    tokens = pocket_tokens(2, 9)
    expected = trainer.model.eval()(input_ids=tokens).logits
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
            loaded = loader.from_pretrained(folder, attn_implementation="eager")
            torch.testing.assert_close(loaded.eval()(input_ids=tokens).logits, expected)
    assert not (tmp_path / "run" / "README.md").exists()  # PEFT's card names paths
    record = trainer.distillation_record()
    assert record["student"]["name_or_path"] is record["peft"]["base_model_name_or_path"] is None


def test_a_folder_holds_the_adapter_or_the_merged_student(tmp_path):
    trainer = adapted_student(tmp_path)
    tokens = pocket_tokens(2, 9)
    expected = trainer.model.eval()(input_ids=tokens).logits
    for save in (trainer.save_student, trainer.save_model, trainer.save_student):
        save()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run", attn_implementation="eager")
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)


def test_the_folder_of_another_model_is_left_alone(tmp_path):
    trainer = adapted_student(tmp_path)
    pocket_model("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "other")
    before = {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    with pytest.raises(OutputError, match="of another model"):
        trainer.save_model(tmp_path / "other")
    for save in (trainer.save_model, trainer.save_student):
        with pytest.raises(OutputError, match="is the teacher's own"):
            save(tmp_path / "teacher")
    assert {path: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before


def test_an_adapter_on_a_model_that_is_stored_nowhere_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    adapted = get_peft_model(student, LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(UnsupportedModelError, match="exists in memory only"):
        make_trainer(tmp_path, adapted, teacher, token_dataset())


def test_the_tokenizer_of_a_student_in_memory_is_the_teachers(tmp_path):
    _, teacher = models(dtype=torch.float32)
    for part in (teacher, pocket_tokenizer()):
        part.save_pretrained(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    student = prune_model(teacher, PrunerConfig(layers_to_drop=[1]))
    args = DistillationConfig(str(tmp_path / "run"), report_to="none")
    trainer = DistillationTrainer(student, teacher, args, train_dataset=token_dataset())
    assert trainer.processing_class.get_vocab() == pocket_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_adapters_that_part_tied_weights_are_refused(tmp_path, options):
    student, teacher = models("qwen2-tied", dtype=torch.float32)
    warnings.simplefilter("ignore")  # PEFT warns of it, too; pytest restores the filters
    names = [name for name, _ in student.named_modules()]
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings"):
        make_trainer(tmp_path / "run", student, teacher, token_dataset(), peft_config=LoraConfig(**options))
    assert [name for name, _ in student.named_modules()] == names  # refused before it was changed
    assert not (tmp_path / "run" / "base_model").exists()
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings"):
        make_trainer(
            tmp_path / "run", str(tmp_path / "student"), teacher, token_dataset(), peft_config=LoraConfig(**options)
        )


def test_tied_weights_trained_as_one_merge(tmp_path):
    student, teacher = models("qwen2-tied", dtype=torch.float32)
    config = LoraConfig(target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    options = {"max_steps": 2, "learning_rate": 0.1, "peft_config": config, "bf16": False}
    trainer = make_trainer(tmp_path / "run", student, teacher, token_dataset(), **options)
    trainer.train()
    trainer.save_student(tmp_path / "student")
    tokens = pocket_tokens(2, 9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


def test_logits_are_returned_only_where_metrics_need_them(tmp_path):
    student, teacher = models()
    data = token_dataset((6, 6, 6))
    trainer = make_trainer(tmp_path, student, teacher, data, data)
    batch = next(iter(trainer.get_eval_dataloader()))
    loss, logits, labels = trainer.prediction_step(student, batch, prediction_loss_only=True)
    assert logits is None
    assert labels is None
    assert loss > 0
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {"rows": 3.0}
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 3.0
    expected = student(torch.tensor(data["input_ids"])).logits.detach()
    torch.testing.assert_close(torch.tensor(seen[0]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_evaluation_of_several_datasets(tmp_path):
    student, teacher = models()
    sets = {"short": token_dataset((4, 5)), "long": token_dataset((30, 31), seed=9)}
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), sets)
    metrics = trainer.evaluate()
    for name, data in sets.items():
        kl, _, _, count = naive_sums(student, teacher, data)
        assert metrics[f"eval_{name}_kl"] == pytest.approx(kl.item() / count, rel=1e-11)
    assert trainer.distillation_record()["data"]["eval"]["num_rows"] == 4


# ---- Card and Hub ----


def test_card_and_push_use_the_student_and_are_private(tmp_path, monkeypatch):
    student, teacher = models(dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher")
    calls = []
    monkeypatch.setattr(
        saving, "push_student_to_hub", lambda folder, repo_id, **options: calls.append((repo_id, options))
    )
    trainer = make_trainer(tmp_path / "run", student, str(tmp_path / "teacher"), token_dataset(), max_steps=1)
    trainer.train()
    trainer.push_to_hub(commit_message="Done", token="hf_secret")
    assert calls == [("run", {"private": True, "token": "hf_secret", "commit_message": "Done", "revision": None})]
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "teacher.json").is_file()
    assert not (tmp_path / "run" / "README.md").exists()  # the push itself makes the card, once
    trainer.create_model_card()
    assert "knowledge-distillation" in (tmp_path / "run" / "README.md").read_text()
    trainer.args.hub_private_repo = False
    trainer.push_to_hub()
    assert calls[1][1]["private"] is False


# ---- Refusals ----


def test_unequal_vocabularies_are_refused_naming_both_sizes(tmp_path):
    student, teacher = models(dtype=torch.float32, vocab_size=93)[0], models(dtype=torch.float32)[1]
    with pytest.raises(MismatchError, match=r"93 tokens, the teacher's 97"):
        make_trainer(tmp_path / "run", student, teacher, token_dataset())
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(MismatchError, match=r"93 tokens, the teacher's 97"):
        make_trainer(tmp_path / "run", student, tmp_path / "teacher", token_dataset())
    assert not (tmp_path / "run").exists()


def test_teacher_that_is_the_student_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    with pytest.raises(MismatchError, match="shares weights"):
        make_trainer(tmp_path, student, student, token_dataset())
    teacher.model.embed_tokens = student.model.embed_tokens
    with pytest.raises(MismatchError, match="shares weights"):
        make_trainer(tmp_path, student, teacher, token_dataset())


@pytest.mark.parametrize("target", [["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
def test_adapter_on_the_head_is_refused(tmp_path, target):
    student, teacher = models(dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        make_trainer(tmp_path, student, teacher, token_dataset(), peft_config=LoraConfig(target_modules=target))


def test_prompt_learning_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING"):
        make_trainer(tmp_path, student, teacher, token_dataset(), peft_config=config)


def test_data_parallel_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    args = DistillationConfig(str(tmp_path), report_to="none", use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        DistillationTrainer(student, teacher, args, train_dataset=token_dataset(), processing_class=pocket_tokenizer())


def test_teachers_are_corrected_in_one_process_on_one_of_several_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    teacher, folder = pocket_model("llama", dtype=torch.float32), tmp_path / "teacher"
    settings = {"original_learning_rate": 1e-2, "num_tokens": 16, "max_length": 16, "per_device_train_batch_size": 1}
    on_gpus = {"use_cpu": False, "bf16": False, "disable_tqdm": True}
    correct_teacher(teacher, text_dataset(), folder, processing_class=pocket_tokenizer(), **settings, **on_gpus)
    assert (folder / "teacher_correction.json").is_file()


def test_unknown_logit_processing_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    stock = type(teacher).forward

    class Odd(type(teacher)):
        def forward(self, *args, **kwargs):
            output = stock(self, *args, **kwargs)
            output.logits = output.logits / 3
            return output

    teacher.__class__ = Odd
    with pytest.raises(UnsupportedModelError, match="teacher"):
        make_trainer(tmp_path, student, teacher, token_dataset())


def test_split_model_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    teacher.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(UnsupportedModelError, match="The teacher is split"):
        make_trainer(tmp_path, student, teacher, token_dataset())


def test_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    student, teacher = models(dtype=torch.float32)
    trainer = make_trainer(tmp_path, student, teacher, token_dataset())

    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", no_space)
    for save in (trainer.save_model, trainer.save_student):
        with pytest.raises(OutputError, match="No space left on device"):
            save(tmp_path / "student")
    assert student.config.use_cache is False  # and the student is as it was


def test_unwritable_output_folder_is_refused_first(tmp_path):
    student, teacher = models(dtype=torch.float32)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        make_trainer(tmp_path / "file" / "run", student, teacher, token_dataset())


def test_batches_without_labels_are_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    args = DistillationConfig(str(tmp_path), report_to="none", disable_tqdm=True, max_steps=1)
    trainer = DistillationTrainer(
        *(student, teacher, args, lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}),
        train_dataset=token_dataset((4, 4)),
        processing_class=pocket_tokenizer(),
    )
    with pytest.raises(DataError, match="labels"):
        trainer.train()
