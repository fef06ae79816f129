"""Tasks, samples, drafts and chat where a student has fewer tokens than its teacher: each has its own tokenizer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import decoders

from hub_server import hub_server_fixture, make_blob  # noqa: F401 (a fixture)
from minitron_hf import (
    PrunerConfig,
    apply_plan,
    count_tokens,
    estimate_importance,
    evaluate_models,
    generate_samples,
    make_plan,
    measure_benchmarks,
    measure_draft,
    prune_tokenizer,
    quantize_checkpoint,
    save_model,
)
from minitron_hf.errors import MismatchError
from minitron_hf.evaluation import benchmarks
from minitron_hf.evaluation.task_results import TaskScores
from minitron_hf.evaluation.token_spaces import own_tokenizers
from minitron_hf.vocabulary.stored import StoredCut, stored_cut
from test_hub import client, finish
from test_vocabulary_pruning import SIZE, teacher_of, texts
from test_vocabulary_tokenizers import KINDS, corpus, cut_to

#: What is known of a student by its name on the Hub.
BY_ID = """
import json, sys
from minitron_hf import evaluate_models, quantize_checkpoint
from minitron_hf.models import load_model
from minitron_hf.vocabulary.stored import stored_cut
folder, texts = sys.argv[1], json.loads(sys.argv[2])
models = {"teacher": f"{folder}/teacher", "student": "lab/cut"}
found = evaluate_models(models, texts, processing_class=models["teacher"], speed=False, show_progress=False)
copies = [quantize_checkpoint("lab/cut", f"{sys.argv[3]}/{at}", revision=at, device="cpu") for at in ("main", "bare")]
print(json.dumps({
    "metrics": found["models"]["student"]["metrics"],
    "loaded": [stored_cut(load_model("lab/cut", revision=at)) is not None for at in ("main", "bare")],
    "unknown": [stored_cut(name) is None for name in ("lab/nobody", "/gone", "a b")],
    "copied": [sorted(path.name for path in copy.glob("pruning_plan.*")) for copy in copies],
}))
"""

TEMPLATE = "{{ bos_token }}{% for one in messages %}{{ one['content'] }}_{% endfor %}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A teacher and its student in folders, and both tokenizers; text decodes to itself."""
    teacher, tokenizer = teacher_of(dtype=torch.float32)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template = TEMPLATE
    counts, scores = count_tokens(texts(), tokenizer), estimate_importance(teacher, metric="random")
    plan = make_plan(teacher, PrunerConfig(vocab_size=SIZE, intermediate_size=0.67), scores, token_counts=counts)
    student, cut = apply_plan(teacher, plan), prune_tokenizer(tokenizer, plan)
    folder = tmp_path_factory.mktemp("pair")
    save_model(teacher, folder / "teacher", tokenizer)
    save_model(student, folder / "student", cut)
    return SimpleNamespace(
        models={"teacher": teacher, "student": student},
        folders={name: folder / name for name in ("teacher", "student")},
        whole=tokenizer,
        cut=cut,
        kept=torch.from_numpy(plan.kept["vocab"]),
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "smollm2"])
def test_dropped_tokens_are_spelt_by_kept_ones(kind):
    """The text stays, and kept tokens stay themselves."""
    whole = KINDS[kind]()
    cut, kept = cut_to(whole, 0.6)
    stored, dropped = StoredCut(kept, {}), 0
    for line in corpus()[:80]:
        ids = whole(line)["input_ids"]
        found = stored.respelled(ids, whole, cut)
        assert cut.decode(found) == whole.decode(ids)
        dropped += len(found) - len(ids)
    assert dropped > 0
    assert stored.respelled(kept.tolist(), whole, cut) == list(range(len(kept)))


def test_every_model_has_its_own_tokenizer(pair):
    """From either tokenizer, by path or in memory; without the teacher's, the message says which to pass."""
    expected = {"teacher": pair.whole.get_vocab(), "student": pair.cut.get_vocab()}
    for models, given in ((pair.models, pair.whole), (pair.folders, pair.whole), (pair.folders, pair.cut)):
        found = own_tokenizers(models, given)
        assert {name: one.get_vocab() for name, one in found.items()} == expected
    with pytest.raises(MismatchError, match="'teacher' has more tokens than the tokenizer that is given"):
        own_tokenizers(pair.models, pair.cut)


def test_samples_are_those_of_each_model_alone(pair):
    prompts = ["abcd", "_adeg_ab"]
    found = generate_samples(pair.folders, pair.whole, prompts, max_new_tokens=8)
    for name, tokenizer in (("teacher", pair.whole), ("student", pair.cut)):
        for prompt, sample in zip(prompts, found):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            model = pair.models[name]
            output = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            assert sample["completions"][name] == text


def test_tasks_are_read_with_each_models_own_tokenizer(pair, monkeypatch):
    seen = {}

    def run_task(model, tokenizer, task, settings, shots):
        seen[model.config.vocab_size] = tokenizer
        return TaskScores({"t": {"acc": {"value": 1.0}}}, {"t": {"acc": [1.0, 0.0]}}, {}, {}, {})

    task = SimpleNamespace(name="t", identity=lambda shots: "one")
    source = SimpleNamespace(load=lambda name: task)

    class Opened:
        def __enter__(self):
            return source

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(benchmarks, "run_task", run_task)
    monkeypatch.setattr(benchmarks, "harness_version", lambda: "1")
    monkeypatch.setattr(benchmarks.TaskSource, "opened", lambda *args, **kwargs: Opened())
    found = measure_benchmarks(pair.folders, ["t"], processing_class=pair.whole, show_progress=False)
    sizes = {name: model.config.vocab_size for name, model in pair.models.items()}
    assert seen[sizes["teacher"]].get_vocab() == pair.whole.get_vocab()
    assert seen[sizes["student"]].get_vocab() == pair.cut.get_vocab()
    assert found["models"]["student"]["t"]["acc"]["difference"]["value"] == 0


def test_a_draft_with_fewer_tokens_changes_no_output(pair):
    """The text is the teacher's, whatever is proposed."""
    settings = {"num_prompts": 3, "prompt_tokens": 8, "new_tokens": 12, "show_progress": False}
    found = measure_draft(*pair.models.values(), texts(), processing_class=pair.whole, **settings)
    assert found["identical_outputs"]["value"] == 1
    assert 1 <= found["tokens_per_call"]["value"] <= 6
    assert 0 <= found["acceptance"]["value"] <= 1


def greedy(model, ids: list[int], ends: set[int], number: int) -> list[int]:
    found: list[int] = []
    while len(found) < number and not (found and found[-1] in ends):
        with torch.no_grad():
            found.append(int(model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax()))
    return found


def test_chat_is_measured_on_the_teachers_answers_in_the_students_tokens(pair):
    """Against answers one token at a time, and explicit probabilities over the kept tokens."""
    asked = [{"messages": [{"role": "user", "content": text}]} for text in ("abcd", "_adeg", "cdgg_ab")]
    settings = {"speed": False, "show_progress": False, "max_length": 40}
    found = evaluate_models(
        pair.folders, texts()[:4], processing_class=pair.whole, chat_prompts=asked, chat_max_new_tokens=6, **settings
    )
    teacher, student, kept = *pair.models.values(), pair.kept
    old = {int(one): new for new, one in enumerate(kept)}
    total, count, lengths = 0.0, 0, {"teacher": 0, "student": 0}
    for one in asked:
        text = pair.cut.apply_chat_template(one["messages"], tokenize=False, add_generation_prompt=True)
        ids = pair.cut(text, add_special_tokens=False)["input_ids"]
        ends = {*teacher.generation_config.eos_token_id}
        answer = greedy(teacher, kept[ids].tolist(), ends, 6)
        lengths["teacher"] += len(answer)
        lengths["student"] += len(greedy(student, ids, {old[end] for end in ends if end in old}, 6))
        new = []
        for token in answer:
            word = pair.whole.convert_ids_to_tokens(token) or ""  # nothing for a row beyond the tokenizer
            new += [old[token]] if token in old else pair.cut(word, add_special_tokens=False)["input_ids"]
        row = torch.tensor([[*ids, *new]])
        with torch.no_grad():
            log_q = student(row).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
            p = teacher(kept[row]).logits[0, len(ids) - 1 : -1].double().softmax(-1)[:, kept]
        total += float((p * ((p / p.sum(-1, keepdim=True)).log() - log_q)).sum())
        count += len(new)
    chat = {name: found["models"][name]["chat"] for name in pair.models}
    assert chat["student"]["kl_divergence"]["value"] == pytest.approx(total / count, rel=1e-4)
    for name, length in lengths.items():
        assert chat[name]["answer_tokens"]["value"] == pytest.approx(length / len(asked))


def test_a_quantised_copy_knows_its_tokens(pair, tmp_path):
    pytest.importorskip("torchao")
    copy = quantize_checkpoint(pair.folders["student"], tmp_path / "copy", "int8", device="cpu")
    assert stored_cut(copy).kept.tolist() == pair.kept.tolist()
    models = {**pair.folders, "copy": copy}
    found = evaluate_models(models, texts()[:4], processing_class=pair.whole, speed=False, show_progress=False)
    whole = found["models"]["student"]["metrics"]["kl_divergence"]["value"]
    assert found["models"]["copy"]["metrics"]["kl_divergence"]["value"] == pytest.approx(whole, rel=0.2)


def test_a_student_is_known_by_its_name_on_the_hub(pair, hub_server, tmp_path):
    pytest.importorskip("torchao")
    files = {path.name: make_blob(path.read_bytes()) for path in pair.folders["student"].iterdir()}
    bare = {name: blob for name, blob in files.items() if not name.startswith("pruning_plan")}
    repo = hub_server.create("lab/cut", private=False)
    start = repo.branches["main"]
    for branch, content in (("main", files), ("bare", bare)):
        hub_server.commit(repo, start, branch, content, branch)
    held_out, options = texts()[:8], {"speed": False, "show_progress": False}
    expected = evaluate_models(pair.folders, held_out, processing_class=pair.whole, **options)
    arguments = (pair.folders["teacher"].parent, json.dumps(held_out), tmp_path)
    found = finish(client(BY_ID, *arguments, server=hub_server, home=tmp_path / "home"))
    assert found["metrics"] == json.loads(json.dumps(expected["models"]["student"]["metrics"]))
    assert found["loaded"] == [True, False]
    assert found["unknown"] == [True] * 3
    assert found["copied"] == [["pruning_plan.json", "pruning_plan.safetensors"], []]
