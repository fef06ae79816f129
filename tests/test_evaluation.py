"""Measurements against naive float64 loops and algebraic laws."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minitron_hf.data import token_rows
from minitron_hf.errors import (
    DataError,
    HubError,
    MismatchError,
    OutputError,
    UnsupportedModelError,
)
from minitron_hf.evaluation.evaluate import evaluate_models
from minitron_hf.evaluation.limits import Limits
from minitron_hf.evaluation.samples import generate_samples
from minitron_hf.models import load_model
from pocket import POCKETS, VOCAB, float64_throughout, pocket_model, pocket_tokenizer

TEXTS = [
    "Once upon a time there was a small model.",
    "It read books.",
    "One day it met a teacher, who was large and slow but knew every word there is.",
    "a",
    "The end!",
]
QUIET = {"speed": False, "show_progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return pocket_tokenizer()


@pytest.fixture(scope="module")
def models():
    """A teacher and two students, float64, so that a naive loop agrees to the last digits."""
    return {"student": pocket_model("llama", seed=1), "teacher": pocket_model("llama"), "other": pocket_model("qwen2")}


@torch.no_grad()
def naive_evaluation(models: dict, documents: list[list[int]], num_bytes: int | None) -> dict:
    """One document at a time, no padding, full logits, plain sums, written from the definitions."""
    sums: dict = {name: [] for name in models}
    for document in documents:
        logits = {name: model(torch.tensor([document])).logits[0].double() for name, model in models.items()}
        reference = torch.softmax(logits["teacher"], -1)
        for name in models:
            model = torch.softmax(logits[name], -1)
            nll = kl = agreed = 0.0
            for position, token in enumerate(document[1:]):
                nll -= math.log(model[position, token])
                for p, q in zip(reference[position].tolist(), model[position].tolist()):
                    kl += p * math.log(p / q)
                agreed += int(model[position].argmax() == reference[position].argmax())
            sums[name].append((nll, kl, agreed, len(document) - 1))
    found = {}
    for name, documents_of_model in sums.items():
        nlls, kls, agreed, counts = zip(*documents_of_model)
        total = sum(counts)
        found[name] = {
            "loss": sum(nlls) / total,
            "perplexity": math.exp(sum(nlls) / total),
            "bits_per_byte": sum(nlls) / math.log(2) / num_bytes if num_bytes else None,
            "kl_divergence": sum(kls) / total,
            "top1_agreement": sum(agreed) / total,
        }
    return found


def values(result: dict) -> dict:
    return {
        name: {key: metric and metric["value"] for key, metric in entry["metrics"].items()}
        for name, entry in result["models"].items()
    }


def test_metrics_agree_with_a_naive_loop(models, tokenizer):
    result = evaluate_models(models, TEXTS, processing_class=tokenizer, batch_size=2, max_length=64, **QUIET)
    documents = [[1, *tokenizer(text)["input_ids"]] for text in TEXTS]
    assert max(map(len, documents)) > 64  # so the longest one is split
    rows = [list(row) for row in token_rows(TEXTS, tokenizer, max_length=64, packing=False, overlap=1).rows]
    expected = naive_evaluation(models, rows, num_bytes=len("".join(TEXTS).encode()))
    assert result["reference"] == "teacher"
    assert list(result["models"]) == list(models)
    found = values(result)
    assert found["teacher"].pop("kl_divergence") is found["teacher"].pop("top1_agreement") is None
    del expected["teacher"]["kl_divergence"], expected["teacher"]["top1_agreement"]
    for name, metrics in found.items():
        assert metrics == pytest.approx(expected[name], rel=1e-6), name
    assert result["data"]["num_tokens"] == sum(len(document) - 1 for document in documents)
    assert result["data"]["num_bytes"] == len("".join(TEXTS).encode())
    assert result["data"]["num_rows"] == len(rows) == len(TEXTS) + 1


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("name", "batch_size"),
    [*((name, 3) for name in POCKETS), *itertools.product(("llama", "gpt2", "mistral", "mamba2"), (1, 100))],
)
def test_neither_padding_nor_batch_size_counts(name: str, batch_size: int, tokenizer):
    """Every family, absolute positions and sliding windows included, against one document at a time."""
    models = {"teacher": pocket_model(name), "student": pocket_model(name, seed=1)}
    if batch_size > 1 and getattr(models["teacher"].config, "index_topk", None) is not None:
        pytest.skip("an indexer of few heads scores many tokens 0, and which of them topk takes depends on the length")
    rows = token_rows(TEXTS, tokenizer, max_length=40, packing=False, overlap=1)
    with torch.no_grad(), float64_throughout():  # rounding would decide what sparse attention sees
        result = evaluate_models(
            models, TEXTS, processing_class=tokenizer, batch_size=batch_size, max_length=40, **QUIET
        )
        for model_name, model in models.items():
            nll = 0.0
            for row in rows.rows:
                log_p = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), -1)
                nll -= log_p[torch.arange(len(row) - 1), torch.tensor(row[1:])].sum().item()
            expected = nll / sum(len(row) - 1 for row in rows.rows)
            assert result["models"][model_name]["metrics"]["loss"]["value"] == pytest.approx(expected, rel=1e-6)


def test_a_copy_of_the_reference_agrees_with_it_exactly(tokenizer):
    models = {"teacher": pocket_model("llama").float(), "copy": pocket_model("llama").float()}
    result = evaluate_models(models, TEXTS, processing_class=tokenizer, max_length=64, **QUIET)
    metrics = result["models"]["copy"]["metrics"]
    assert metrics["kl_divergence"] == {"value": 0.0, "stderr": 0.0}
    assert metrics["top1_agreement"] == {"value": 1.0, "stderr": 0.0}
    assert metrics["loss"] == result["models"]["teacher"]["metrics"]["loss"]


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(tokenizer):
    model = pocket_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = evaluate_models({"uniform": model}, TEXTS, processing_class=tokenizer, max_length=64, **QUIET)
    metrics, data = result["models"]["uniform"]["metrics"], result["data"]
    assert metrics["loss"]["value"] == pytest.approx(math.log(VOCAB), rel=1e-12)
    assert metrics["perplexity"]["value"] == pytest.approx(VOCAB, rel=1e-12)
    bits = math.log2(VOCAB) * data["num_tokens"] / data["num_bytes"]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-12)
    assert metrics["loss"]["stderr"] == pytest.approx(0, abs=1e-12)
    assert result["reference"] is None
    assert metrics["kl_divergence"] is metrics["top1_agreement"] is None


def test_a_single_row_has_no_error(tokenizer):
    result = evaluate_models(
        {"model": pocket_model("llama")}, ["Hello there."], processing_class=tokenizer, max_length=64, **QUIET
    )
    assert result["models"]["model"]["metrics"]["loss"]["stderr"] is None
    json.dumps(result, allow_nan=False)


def test_errors_of_derived_metrics_follow_the_loss(models, tokenizer):
    metrics = evaluate_models(models, TEXTS, processing_class=tokenizer, max_length=64, **QUIET)["models"]["student"][
        "metrics"
    ]
    relative = metrics["loss"]["stderr"] / metrics["loss"]["value"]
    assert metrics["bits_per_byte"]["stderr"] / metrics["bits_per_byte"]["value"] == pytest.approx(relative)
    assert metrics["perplexity"]["stderr"] / metrics["perplexity"]["value"] == pytest.approx(metrics["loss"]["stderr"])


def test_default_lengths_fit_the_context():
    limits = {context: Limits({}, {"m": context} if context else {}) for context in (64, 4096, None)}
    assert limits[64].timed_lengths(None, None) == (48, 16)
    assert limits[4096].timed_lengths(None, None) == (512, 64)
    assert limits[None].timed_lengths(None, None) == (512, 64)
    assert limits[64].timed_lengths(60, None) == (60, 4)
    with pytest.raises(MismatchError, match="context of the model 'm', 64 tokens"):
        limits[64].timed_lengths(60, 5)
    with pytest.raises(DataError, match="at least 1"):
        limits[64].timed_lengths(0, 5)


def test_evaluation_json(tmp_path: Path, tokenizer):
    teacher, student = pocket_model("llama", dtype=torch.float32), pocket_model("llama", num_hidden_layers=2)
    teacher.save_pretrained(tmp_path / "teacher")
    student.half().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    result = evaluate_models(
        {"teacher": tmp_path / "teacher", "student": str(tmp_path / "student")},
        [{"story": text} for text in TEXTS],
        processing_class=tmp_path / "tokenizer",
        text_field="story",
        dataset_name="stories",
        dtype=torch.float32,
        prefill_length=8,
        decode_tokens=2,
        rounds=2,
        output_path=tmp_path / "run",
        show_progress=False,
    )
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8")) == result
    assert list(result) == ["format", "versions", "device", "dtype", "data", "settings", "reference", "models"]
    assert result["format"] == 1
    assert result["dtype"] == "float32"
    assert result["device"]["type"] == "cpu"
    assert result["device"]["name"]
    assert result["device"]["threads"] == torch.get_num_threads()
    assert result["data"]["name"] == "stories"
    assert result["data"]["max_length"] == 64  # the context of the models
    entry = result["models"]["student"]
    assert entry["name_or_path"] == "student"  # not the path on this machine
    assert set(entry["metrics"]) == {"loss", "perplexity", "bits_per_byte", "kl_divergence", "top1_agreement"}
    assert entry["num_parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert entry["num_parameters"] - entry["num_parameters_without_embeddings"] == 2 * VOCAB * 36
    assert entry["checkpoint_bytes"] == (tmp_path / "student" / "model.safetensors").stat().st_size
    assert entry["kv_cache_bytes_per_token"] == 2 * 2 * 3 * 10 * 4  # computed in float32
    assert len(entry["prefill_tokens_per_second"]["rounds"]) == 2
    assert entry["decode_tokens_per_second"]["median"] > 0


def test_checkpoints_name_where_loaded_models_come_from(tmp_path: Path, models):
    models["student"].save_pretrained(tmp_path)
    result = evaluate_models(models, [[5, 6, 7]], max_length=16, checkpoints={"student": tmp_path}, **QUIET)
    assert result["models"]["student"]["name_or_path"] == tmp_path.name
    size = (tmp_path / "model.safetensors").stat().st_size
    assert result["models"]["student"]["checkpoint_bytes"] == size
    assert result["models"]["teacher"]["checkpoint_bytes"] < size  # parameters alone, without the file's header
    with pytest.raises(DataError, match="checkpoints names nobody"):
        evaluate_models(models, [[5, 6, 7]], max_length=16, checkpoints={"nobody": tmp_path}, **QUIET)


def test_a_model_with_a_checkpoint_is_measured_as_that_checkpoint_is(tmp_path: Path, monkeypatch):
    """As the teacher of a recipe with a revision: its quality is that in float32, and the object stays as it is."""
    monkeypatch.setattr("minitron_hf.hardware._cpu_has_bf16", lambda: True)  # otherwise the checkpoint is in float32
    rows, folders = [[5, 6, 7, 8, 9, 3]], {name: tmp_path / name for name in ("teacher", "student")}
    for seed, folder in enumerate(folders.values()):
        pocket_model("llama", seed=seed, dtype=torch.bfloat16).save_pretrained(folder)
    by_path = evaluate_models(folders, rows, max_length=16, **QUIET)
    teacher = load_model(folders["teacher"], dtype=torch.bfloat16)
    given = {"checkpoints": {"teacher": folders["teacher"]}, **QUIET}
    loaded = evaluate_models({**folders, "teacher": teacher}, rows, max_length=16, **given)
    assert loaded == by_path
    assert teacher.dtype == torch.bfloat16
    alone = evaluate_models({**folders, "teacher": teacher}, rows, max_length=16, **QUIET)
    assert alone["dtype"] == "mixed"


def test_output_path_may_be_the_file_itself(tmp_path: Path, models):
    evaluate_models(models, [[5, 6, 7]], max_length=16, output_path=tmp_path / "teacher.json", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.json"]


def test_models_are_left_as_they_were(tokenizer):
    model = pocket_model("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    config, modes = model.config.to_dict(), [module.training for module in model.modules()]
    results = [
        evaluate_models({"model": model}, TEXTS, processing_class=tokenizer, max_length=64, **QUIET) for _ in range(2)
    ]
    assert results[0]["models"]["model"]["metrics"] == results[1]["models"]["model"]["metrics"]  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_reference_may_be_any_model(models, tokenizer):
    settings = {"processing_class": tokenizer, "max_length": 64, **QUIET}
    first = evaluate_models({"a": models["student"], "b": models["teacher"]}, TEXTS, **settings)
    chosen = evaluate_models(
        {"b": models["teacher"], "a": models["student"], "teacher": models["other"]}, TEXTS, reference="a", **settings
    )
    assert first["reference"] == chosen["reference"] == "a"
    assert first["models"]["b"]["metrics"] == chosen["models"]["b"]["metrics"]
    with pytest.raises(DataError, match="'c' is not among the models a, b"):
        evaluate_models({"a": models["student"], "b": models["teacher"]}, TEXTS, reference="c", **settings)


def test_refusals(models, tokenizer, tmp_path: Path):
    settings = {"processing_class": tokenizer, "max_length": 64, **QUIET}
    with pytest.raises(DataError, match="no models"):
        evaluate_models({}, TEXTS, **settings)
    with pytest.raises(DataError, match="no documents"):
        evaluate_models(models, [], **settings)
    with pytest.raises(DataError, match="batch_size=0"):
        evaluate_models(models, TEXTS, batch_size=0, **settings)
    with pytest.raises(MismatchError, match="context of the model 'student', 64 tokens"):
        evaluate_models(models, TEXTS, **{**settings, "max_length": 65})
    with pytest.raises(MismatchError, match=r"'student' knows tokens below 97"):
        evaluate_models(models, [[5, 97]], **settings)
    with pytest.raises(HubError, match="does not exist"):
        evaluate_models({"model": tmp_path / "gone"}, TEXTS, **settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        evaluate_models(models, TEXTS, output_path=tmp_path / "file", **settings)


def test_different_vocabularies_are_refused_before_any_weights_are_read(tmp_path: Path, models):
    LlamaConfig(vocab_size=101, hidden_size=32, num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"'student' has a vocabulary of 101 tokens .* 97"):
        evaluate_models({"teacher": models["teacher"], "student": tmp_path}, [[5, 6]], **QUIET)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path):
    model = pocket_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UnsupportedModelError, match="not finite"):
        evaluate_models({"model": model}, [[5, 6, 7]], output_path=tmp_path, max_length=16, **QUIET)
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_stories_260k_reads_stories_as_well_as_documented(data_folder: Path):
    """1.07 bits per byte over the whole file; a part of it is a little off."""
    from minitron_hf import load_text_dataset

    path = data_folder / "models" / "stories260K"
    dataset = load_text_dataset(str(data_folder / "text" / "tinystories_valid.jsonl"))
    result = evaluate_models({"model": path}, dataset, processing_class=path, num_rows=60, **QUIET)
    entry = result["models"]["model"]
    assert 1.0 < entry["metrics"]["bits_per_byte"]["value"] < 1.15
    assert entry["num_parameters"] == 260_032
    assert entry["kv_cache_bytes_per_token"] == 2 * 5 * 4 * 8 * 4
    sample = generate_samples({"model": path}, path, ["Once upon a time"], max_new_tokens=12)[0]
    assert "there was a" in sample["completions"]["model"]


def test_a_damaged_student_is_measured_as_worse(data_folder: Path):
    """Half of the MLP neurons of one layer removed: further from the teacher, worse on the text."""
    path = data_folder / "models" / "stories260K"
    damaged = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        damaged.model.layers[2].mlp.down_proj.weight[:, ::2] = 0
    texts = [json.loads(line) for line in (data_folder / "text" / "tinystories_valid.jsonl").open()][:20]
    result = evaluate_models({"teacher": path, "student": damaged}, texts, processing_class=path, **QUIET)
    teacher, student = (result["models"][name]["metrics"] for name in ("teacher", "student"))
    assert student["loss"]["value"] > teacher["loss"]["value"]
    assert student["kl_divergence"]["value"] > 5 * student["kl_divergence"]["stderr"] > 0
    assert 0.3 < student["top1_agreement"]["value"] < 1


@pytest.mark.slow
def test_the_models_that_are_not_timed_have_every_other_number(tokenizer):
    """Quality and bytes of all; speeds and drafts of the named ones alone."""
    models = {name: pocket_model("llama", dtype=torch.float32, seed=seed) for seed, name in enumerate("abc")}
    given = {
        "processing_class": tokenizer,
        "show_progress": False,
        "rounds": 1,
        "prefill_length": 8,
        "decode_tokens": 2,
    }
    given |= {"speed_batch_sizes": [2], "draft_prompts": 1, "max_length": 64}
    whole = evaluate_models(models, TEXTS, **given)["models"]
    found = evaluate_models(models, TEXTS, speed_models=["a", "c"], **given)["models"]
    for name in models:
        assert found[name]["metrics"] == whole[name]["metrics"]
        assert found[name]["kv_cache_bytes_per_token"] == whole[name]["kv_cache_bytes_per_token"] > 0
    timed = {name for name, one in found.items() if one["decode_tokens_per_second"] and "speeds" in one}
    assert timed == {"a", "c"}
    assert {name for name, one in found.items() if "draft" in one} == {"c"}
    assert {name for name, one in whole.items() if "draft" in one} == {"b", "c"}
    for wrong, words in ((["d"], "names d, expected some of the models a, b, c"), ("ab", "expected a list of names")):
        with pytest.raises(DataError, match=f"speed_models.*{words}"):
            evaluate_models(models, TEXTS, speed_models=wrong, **given)
