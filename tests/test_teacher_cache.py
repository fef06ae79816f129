"""Training from a cache of the teacher against training with the teacher, and what does not fit refused by name."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk

from minitron_hf.distillation import batches
from minitron_hf.distillation import cache_writer as cache_module
from minitron_hf.distillation.cache_coding import LOG_PROBS
from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.errors import MismatchError, OutputError
from minitron_hf.losses import signals
from minitron_hf.losses.heads import OutputHead, head_logits
from minitron_hf.losses.signals import DenseSignal, top_k_signal
from pocket import VOCAB, pocket_model, pocket_tokenizer
from test_trainer import (  # noqa: F401
    Gradients,
    float64,
    make_trainer,
    models,
    narrow_student,
    text_dataset,
    token_dataset,
)

OPTIONS = {"report_to": "none", "disable_tqdm": True, "max_length": 64}
LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 32},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
}


def write_cache(folder, teacher, data, *, top_k=VOCAB, num_draws=None, dtype="float32", rows_per_file=2, **args):
    return cache_teacher_logits(
        *(teacher, data, folder),
        top_k=top_k,
        num_draws=num_draws,
        args=DistillationConfig(str(folder), **{**OPTIONS, **args}),
        processing_class=pocket_tokenizer(),
        dtype=dtype,
        rows_per_file=rows_per_file,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 4, 29])
@pytest.mark.parametrize("head", [{}, {"scale": 0.7, "softcap": 3.0}])
def test_the_signal_is_the_sorted_softmax(temperature, top_k, head):
    hidden = torch.randn(13, 7, dtype=torch.float64)
    dense = DenseSignal(hidden, OutputHead(3 * torch.randn(29, 7, dtype=torch.float64), **head))
    found = top_k_signal(dense, top_k, temperature=temperature, chunk_size=5)
    p, order = torch.softmax(head_logits(hidden, dense.head) / temperature, -1).sort(descending=True)
    assert torch.equal(found.tokens, order[:, :top_k])
    torch.testing.assert_close(found.log_probs.exp(), p[:, :top_k], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.log_tail.exp(), p[:, top_k:].sum(-1), rtol=1e-9, atol=0)
    assert found.vocab_size == 29


class Moved(torch.Tensor):
    """Stands for tensors on another device: what is computed from them is there too, and indexes nothing else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            assert isinstance(args[0], Moved), "a tensor on the CPU is indexed by one on another device"
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [{"top_k": 4}, {"top_k": None, "num_draws": 4}])
@pytest.mark.parametrize("layout", ["padded", "padding-free"])
def test_all_of_a_batch_is_used_on_the_device(tmp_path, monkeypatch, kind, layout):
    """A GPU refuses an index on another device; see also the test on a GPU."""
    teacher, _ = models()
    write_cache(tmp_path / "plain", teacher, token_dataset(), **kind, **LAYOUTS[layout])

    def on_device(trainer, batch):
        return {name: v.as_subclass(Moved) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}

    def row_of_positions(batch):  # it is made on the device of the labels
        row, num_rows = batches.row_of_positions(batch)
        return row.as_subclass(type(batch["labels"])), num_rows

    monkeypatch.setattr(cache_module, "on_device", on_device)
    monkeypatch.setattr(cache_module, "row_of_positions", row_of_positions)
    write_cache(tmp_path / "moved", teacher, token_dataset(), **kind, **LAYOUTS[layout])
    plain, moved = ((tmp_path / name / "data-00000.arrow").read_bytes() for name in ("plain", "moved"))
    assert plain == moved


def test_caches_are_written_in_one_process_on_one_of_several_gpus(tmp_path, monkeypatch):
    teacher, _ = models()
    cache = write_cache(tmp_path / "one", teacher, token_dataset(), bf16=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    other = write_cache(tmp_path / "two", teacher, token_dataset(), bf16=False)
    assert list(load_teacher_cache(cache).dataset[0]) == list(load_teacher_cache(other).dataset[0])


def trained(folder, student, teacher, data, **args):
    """Gradients of the first step, and everything that was logged."""
    gradients = Gradients()
    options = {"max_steps": 2, "max_grad_norm": 0, "per_device_train_batch_size": 3, **args}
    trainer = make_trainer(folder, student, teacher, data, data, callbacks=[gradients], **options)
    metrics = trainer.evaluate()
    trainer.train()
    logs = {key: value for key, value in trainer.state.log_history[0].items() if "eval" not in key}
    timing = ("time", "per_second")
    return gradients.values, {k: v for k, v in {**metrics, **logs}.items() if not k.endswith(timing)}, trainer


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_from_the_whole_distribution_is_training_with_the_teacher(tmp_path, layout, labels):
    student, teacher = models()
    data = token_dataset(labels=labels)
    args = {**LAYOUTS[layout], "temperature": 2.0, "ce_weight": 0.3}
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, data, **args))
    assert cache.manifest["num_rows"] == len(cache.dataset)
    assert len(cache.manifest["files"]) > 1
    expected = trained(tmp_path / "online", copy.deepcopy(student), teacher, data, **args)
    found = trained(tmp_path / "cached", student, None, cache, **args)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-6), name  # log-probabilities are kept in float32
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("float64")
def test_fewer_tokens_and_half_precision_come_close_from_below(tmp_path):
    student, teacher = models()
    data = token_dataset()
    exact = make_trainer(tmp_path / "0", copy.deepcopy(student), teacher, data, data).evaluate()["eval_kl"]
    found = []
    for top_k in (2, 16, VOCAB):
        cache = load_teacher_cache(write_cache(tmp_path / f"c{top_k}", teacher, data, top_k=top_k, dtype="float16"))
        trainer = make_trainer(tmp_path / f"{top_k}", copy.deepcopy(student), None, cache, cache)
        found.append(trainer.evaluate()["eval_kl"])
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(exact, rel=2e-3)
    assert found[2] != pytest.approx(exact, rel=1e-9)


def test_tokens_of_the_k_keep_a_probability_in_half_precision(tmp_path):
    """Float16 ends at -65,504; a log-probability beyond is not minus infinity, which would make the KL NaN."""
    student, teacher = models()
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(1e6)
    data = token_dataset()
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, data, top_k=8, dtype="float16"))
    log_probs = np.concatenate([np.asarray(row, dtype=np.float64).ravel() for row in cache.dataset[LOG_PROBS]])
    assert np.isfinite(log_probs).all()
    assert log_probs.min() == np.finfo(np.float16).min
    assert np.isfinite(make_trainer(tmp_path / "run", student, None, cache, cache).evaluate()["eval_kl"])


@pytest.mark.usefixtures("float64")
def test_hidden_states_are_cached_where_they_are_asked_for(tmp_path):
    student, teacher = narrow_student()
    data = token_dataset(labels=True)
    args = {"hidden_loss": "cosine", "embedding_loss": "mse"}
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, data, **args))
    expected = trained(tmp_path / "online", copy.deepcopy(student), teacher, data, **args)
    found = trained(tmp_path / "cached", student, None, cache, **args)
    assert {"hidden", "embedding", "alpha"} <= found[1].keys()
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5), name
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6)


def test_no_teacher_is_in_memory_and_none_is_changed(tmp_path):
    student, teacher = models(dtype=torch.float32)
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    attributes = set(teacher.__dict__)
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, text_dataset(), top_k=8))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.to_dict() == config
    assert set(teacher.__dict__) == attributes
    alive = weakref.ref(teacher)
    del teacher
    gc.collect()
    assert alive() is None
    trainer = make_trainer(tmp_path / "run", student, None, cache, cache, max_steps=3, learning_rate=1e-2)
    first = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate(cache)["eval_kl"] < first
    assert trainer.teacher_model is None
    trainer.save_student()
    record = json.loads((tmp_path / "run" / "distillation.json").read_text())
    assert record["teacher_cache"][0]["top_k"] == 8
    assert record["data"]["train"]["num_rows"] == 40


def test_the_folder_is_a_dataset_and_the_manifest_counts_it(tmp_path):
    _, teacher = models(dtype=torch.float32)
    folder = write_cache(tmp_path, teacher, token_dataset(labels=True), top_k=4)
    rows, manifest = load_from_disk(folder), json.loads((folder / "teacher_cache.json").read_text())
    assert set(rows.column_names) == {"input_ids", "labels", "teacher_tokens", "teacher_log_probs", "teacher_log_tail"}
    counted = sum(label != -100 for row in rows for label in row["labels"][1:])
    assert manifest["num_tokens"] == counted == sum(len(row["teacher_log_tail"]) for row in rows)
    assert all(len(row["teacher_tokens"]) == 4 * len(row["teacher_log_tail"]) for row in rows)
    assert manifest["num_bytes"] == sum(path.stat().st_size for path in folder.glob("*.arrow"))


def test_an_interrupted_run_goes_on_with_the_same_bytes(tmp_path, monkeypatch):
    _, teacher = models(dtype=torch.float32)
    data = token_dataset()
    written = cache_module.write_rows

    def failing(path, *args):
        if path.name == "data-00001.arrow":
            raise KeyboardInterrupt
        written(path, *args)

    monkeypatch.setattr(cache_module, "write_rows", failing)
    options = {"top_k": 8, "packing": True, "max_length": 32, "rows_per_file": 1}
    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "parts", teacher, data, **options)
    with pytest.raises(OutputError, match=r"no teacher_cache.json, 1 file"):
        load_teacher_cache(tmp_path / "parts")
    monkeypatch.setattr(cache_module, "write_rows", written)
    first = (tmp_path / "parts" / "data-00000.arrow").stat().st_mtime_ns
    write_cache(tmp_path / "parts", teacher, data, **options)
    assert (tmp_path / "parts" / "data-00000.arrow").stat().st_mtime_ns == first
    write_cache(tmp_path / "uninterrupted", teacher, data, **options)
    assert len(list((tmp_path / "uninterrupted").glob("*.arrow"))) >= 3
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "uninterrupted").iterdir())
    for name in names:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes(), name

    # A finished cache is recognised, and one that was begun with anything else refused.
    write_cache(tmp_path / "parts", teacher, data, **options)
    others = [
        ({"top_k": 9}, "top_k=8, this run has 9"),
        ({"temperature": 2.0}, r"temperature=1.0, this run has 2.0"),
        ({"dtype": "float16"}, "dtype='float32', this run has 'float16'"),
        ({"max_length": 31}, "max_length=32, this run has 31"),
        ({"teacher": pocket_model("llama", seed=5, dtype=torch.float32)}, "another teacher, or other weights"),
        ({"data": token_dataset(seed=9)}, "other rows of the corpus"),
        ({"data": data.select(range(3))}, "other rows of the corpus|for which the dataset has no rows"),
    ]
    for change, message in others:
        changed = {"teacher": teacher, "data": data, **options, **change}
        with pytest.raises(MismatchError, match=message):
            write_cache(tmp_path / "parts", **changed)


def test_the_rows_of_a_stream_are_those_of_the_dataset(tmp_path):
    _, teacher = models(dtype=torch.float32)
    data = token_dataset()
    write_cache(tmp_path / "whole", teacher, data, top_k=4)
    write_cache(tmp_path / "stream", teacher, data.to_iterable_dataset(), top_k=4)
    for path in (tmp_path / "whole").glob("*.arrow"):
        assert path.read_bytes() == (tmp_path / "stream" / path.name).read_bytes()


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    student, teacher = models(dtype=torch.float32)
    data = token_dataset()
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, data, top_k=8))

    def refused(message, train=cache, teacher=None, evaluation=None, **args):
        with pytest.raises(MismatchError, match=message):
            make_trainer(tmp_path / "run", copy.deepcopy(student), teacher, train, evaluation, **args)

    refused("temperature=1.0, this run has 2.0", temperature=2.0)
    refused("max_length=64, this run has 32", max_length=32)
    refused("packing=False, this run has True", packing=True)
    refused("divergence='mse' compares logits", divergence="mse")
    rate = {"teacher_correction": "concurrent", "teacher_original_learning_rate": 1e-3}
    refused("a cached teacher cannot be trained", **rate)
    refused(r"hidden states \[3\], and the cache holds none", hidden_loss="cosine")
    refused("written by another teacher", teacher=pocket_model("llama", seed=3, dtype=torch.float32))
    refused("train_dataset is not a teacher cache", train=data)
    refused("without its manifest", train=cache.dataset)
    refused("this dataset is not a teacher cache", evaluation=data)
    other = {**cache.manifest, "settings": {**cache.manifest["settings"], "tokenizer": "sha256:0"}}
    refused("written with another tokenizer", train=replace(cache, manifest=other))
    changed = cache.dataset.map(lambda row: {"labels": [-100] * 2 + row["input_ids"].tolist()[2:]})
    trainer = make_trainer(tmp_path / "run", copy.deepcopy(student), None, replace(cache, dataset=changed))
    with pytest.raises(MismatchError, match=r"tokens of a batch count, and the teacher cache holds"):
        trainer.train()
    smaller = pocket_model("llama", dtype=torch.float32, vocab_size=VOCAB - 2)
    with pytest.raises(MismatchError, match=f"{VOCAB - 2} tokens, the teacher's {VOCAB}"):
        make_trainer(tmp_path / "run", smaller, None, cache)
    (tmp_path / "cache" / "data-00001.arrow").write_bytes(b"")
    with pytest.raises(MismatchError, match="has 0 bytes, the manifest says"):
        load_teacher_cache(tmp_path / "cache")


def test_a_part_of_a_cache_beside_a_teacher_for_evaluation(tmp_path):
    student, teacher = models(dtype=torch.float32)
    data = token_dataset()
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, data))
    part = replace(cache, dataset=cache.dataset.select([5, 1, 2]))
    held_out = {"cached": part, "online": data.select([5, 1, 2])}
    metrics = make_trainer(tmp_path / "run", student, teacher, part, held_out, max_steps=1).evaluate()
    assert metrics["eval_cached_kl"] == pytest.approx(metrics["eval_online_kl"], rel=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0}, {"top_k": VOCAB + 1}, {"dtype": "int8"}, {"rows_per_file": 0}], ids=str
)
def test_what_makes_no_sense_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected"):
        write_cache(tmp_path, pocket_model("llama"), token_dataset(), **wrong)
    assert not list(tmp_path.glob("*.arrow"))


def test_the_head_is_applied_to_chunks(tmp_path, monkeypatch):
    sizes = []
    stock = signals.head_logits
    monkeypatch.setattr(signals, "default_chunk_size", lambda *_: 16)
    monkeypatch.setattr(signals, "head_logits", lambda h, head: (sizes.append(len(h)), stock(h, head))[1])
    _, teacher = models(dtype=torch.float32)
    write_cache(tmp_path, teacher, token_dataset())
    assert max(size for size in sizes if size != 1) <= 16
    assert len(sizes) > 5


def test_rows_that_are_tokenised_later_are_refused_before_anything_is_written(tmp_path):
    """As those of images and texts are: their digest would be the same whatever they hold."""
    data = Dataset.from_dict({"text": ["Once upon a time."]})
    args = DistillationConfig(
        str(tmp_path / "run"), report_to="none", bf16=False, dataset_kwargs={"skip_prepare_dataset": True}
    )
    with pytest.raises(MismatchError, match="the columns text and no input_ids"):
        cache_teacher_logits(
            pocket_model("llama"), data, tmp_path / "cache", top_k=4, args=args, processing_class=pocket_tokenizer()
        )
    assert not list((tmp_path / "cache").glob("data-*"))
