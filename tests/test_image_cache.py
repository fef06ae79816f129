"""Teacher caches of rows with images, against distillation with the teacher itself."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from minitron_hf import formats
from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.server_cache import cache_served_teacher
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import DataError, MismatchError
from pocket_images import TEMPLATE, image_dataset, image_rows, images, pocket_image_model, pocket_processor
from test_images import other
from test_trainer import float64  # noqa: F401

#: Settings of writing and of training.
SETTINGS = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False, "max_length": 64}


def write(folder: Any, teacher: Any, data: Any, processor: Any = None, args: Any = None, **stored: Any) -> Any:
    stored = {"top_k": teacher.config.get_text_config().vocab_size, "dtype": "float32"} | stored
    given = DistillationConfig(str(folder), per_device_eval_batch_size=4, **SETTINGS, **(args or {}))
    return cache_teacher_logits(
        teacher,
        data,
        folder,
        args=given,
        processing_class=processor or pocket_processor(),
        rows_per_file=4,
        show_progress=False,
        **stored,
    )


def trainer_of(folder: Any, student: Any, teacher: Any, data: Any, processor: Any = None, **settings: Any):
    args = DistillationConfig(str(folder), per_device_train_batch_size=2, max_steps=2, **SETTINGS, **settings)
    return DistillationTrainer(
        student, teacher, args, train_dataset=data, eval_dataset=data, processing_class=processor or pocket_processor()
    )


def with_text_alone() -> Dataset:
    """Rows of which the second one has no image."""
    rows = image_rows()
    [user, assistant] = rows[1]["messages"]
    rows[1] = {"messages": [{**user, "content": user["content"][1:]}, assistant], "images": []}
    return Dataset.from_list(rows)


def with_prompts() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]}
            for row in image_rows()
        ]
    )


def with_another_image(row: int = 4) -> Dataset:
    rows = image_rows()
    rows[row]["images"] = images(1, seed=9)
    return Dataset.from_list(rows)


@pytest.fixture
def teacher():
    return pocket_image_model(torch.float32)


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("data", [image_dataset, with_text_alone, with_prompts])
def test_the_whole_distribution_is_the_teacher(tmp_path, teacher, data):
    """With k = vocabulary size, all logged values and the trained student are those of training with the teacher."""
    teacher = teacher.double()
    data, args = data(), {"hidden_loss": "cosine", "ce_weight": 0.3, "temperature": 2.0}
    cache = load_teacher_cache(write(tmp_path / "cache", teacher, data, args=args), data)
    assert len(cache.manifest["files"]) == 2
    found = []
    for name, given, rows in (("online", teacher, data), ("cached", None, cache)):
        trainer = trainer_of(tmp_path / name, other(teacher), given, rows, **args)
        before = trainer.evaluate()
        trainer.train()
        log = {**before, **trainer.state.log_history[1], **trainer.evaluate()}
        found.append((log, trainer.model.state_dict()))
    (expected, weights), (log, same) = found
    assert log["eval_kl"] > 0
    for name, value in expected.items():
        if not name.endswith(("time", "runtime", "per_second")):
            assert log[name] == pytest.approx(value, rel=1e-6), name  # log-probabilities are kept in float32
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-5, atol=1e-7)


def test_the_cache_holds_no_images_and_resumes(tmp_path, teacher):
    data = image_dataset()
    folder = write(tmp_path / "cache", teacher, data, num_draws=8, top_k=None, dtype="float16")
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "data-00001.arrow").unlink()
    (folder / "teacher_cache.json").unlink()
    write(folder, teacher, data, num_draws=8, top_k=None, dtype="float16")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == written
    [[stored]] = data.with_format("arrow")[:1]["images"].to_pylist()
    assert not any(stored["bytes"][-64:-32] in content for content in written.values())
    cache = load_teacher_cache(folder, data)
    trainer = trainer_of(tmp_path / "run", other(teacher), None, cache)
    trainer.train()
    part = dataclasses.replace(cache, dataset=cache.dataset.select([5, 0]))
    assert np.isfinite(trainer_of(tmp_path / "part", other(teacher), None, part).evaluate()["eval_kl"])


def test_versions_that_know_no_images_refuse_the_files(tmp_path, teacher, monkeypatch):
    """Those before had the same format as caches of text, and are read on."""
    folder = write(tmp_path / "cache", teacher, image_dataset(2), top_k=4)
    files = [folder / "teacher_cache.json", folder / "data-00000.arrow"]
    with monkeypatch.context() as patch:
        patch.setattr(formats, "FORMATS", {**formats.FORMATS, **formats.PLAIN_FORMATS})
        for file in files:
            with pytest.raises(MismatchError, match=rf"{file.name} has format 3, .*Install a newer minitron-hf"):
                formats.require_readable(file)
    for file in files:
        formats.require_readable(file)
    manifest = json.loads(files[0].read_text())
    assert manifest.pop("format") == 3
    files[0].write_text(json.dumps({"format": 2, **manifest}))
    assert len(load_teacher_cache(folder, image_dataset(2)).dataset) == 2


def test_another_image_of_the_same_text_is_refused(tmp_path, teacher):
    folder = write(tmp_path / "cache", teacher, image_dataset(), top_k=4)
    with pytest.raises(MismatchError, match=r"Row 4 \(counted from 0\) of the corpus is not the one .*an image"):
        load_teacher_cache(folder, with_another_image())
    (folder / "teacher_cache.json").unlink()
    with pytest.raises(MismatchError, match=r"data-00001.arrow was written with other rows of the corpus"):
        write(folder, teacher, with_another_image(), top_k=4)


def test_files_on_disk_are_compared_by_their_content(tmp_path, teacher):
    [picture, changed] = images(2)
    picture.save(tmp_path / "cat.png")
    rows = [{"messages": image_rows(1)[0]["messages"], "images": [str(tmp_path / "cat.png")]}]
    folder = write(tmp_path / "cache", teacher, Dataset.from_list(rows), top_k=4)
    assert len(load_teacher_cache(folder, Dataset.from_list(rows)).dataset) == 1
    changed.save(tmp_path / "cat.png")
    with pytest.raises(MismatchError, match=r"Row 0 .* is not the one"):
        load_teacher_cache(folder, Dataset.from_list(rows))
    (tmp_path / "cat.png").unlink()
    with pytest.raises(DataError, match=r"Row 0 .*An image cannot be read"):
        load_teacher_cache(folder, Dataset.from_list(rows))


def test_some_rows_of_a_corpus(tmp_path, teacher):
    folder = write(tmp_path / "cache", teacher, image_dataset(), top_k=4, num_rows=3)
    cache = load_teacher_cache(folder, image_dataset())
    texts = [row["messages"][0]["content"][1]["text"] for row in cache.dataset]
    assert texts == ["What is 0?", "What is 2?", "What is 4?"]


def test_other_processors_are_refused(tmp_path, teacher):
    """By the tokens that they make, and where these are the same, by their settings."""
    data = image_dataset()
    cache = load_teacher_cache(write(tmp_path / "cache", teacher, data, top_k=4), data)
    bright, turned = pocket_processor(), pocket_processor(TEMPLATE.replace("}}:", "}}>"))
    bright.image_processor.image_mean = [0.4, 0.5, 0.5]
    with pytest.raises(MismatchError, match="other settings of the processor"):
        trainer_of(tmp_path / "run", other(teacher), None, cache, bright)
    with pytest.raises(MismatchError, match=r"Row 0 .* of the train dataset: the processor makes other tokens"):
        trainer_of(tmp_path / "run", other(teacher), None, cache, turned)


def test_what_a_cache_of_images_cannot_be_is_refused(tmp_path, teacher):
    data = image_dataset()
    folder = write(tmp_path / "cache", teacher, data, top_k=4)
    with pytest.raises(DataError, match=r"images are in the corpus alone\. Pass the corpus too"):
        load_teacher_cache(folder)
    with pytest.raises(DataError, match=r"must be a datasets\.Dataset, got a list"):
        load_teacher_cache(folder, image_rows())
    with pytest.raises(MismatchError, match="holds 6 rows, and the corpus has 3"):
        load_teacher_cache(folder, image_dataset(3))
    with pytest.raises(DataError, match=r"must be a datasets\.Dataset, got a list"):
        write(tmp_path / "list", teacher, image_rows(), top_k=4)
    with pytest.raises(DataError, match="packing: rows with images are not packed"):
        write(tmp_path / "packed", teacher, data, top_k=4, args={"packing": True})
    with pytest.raises(MismatchError, match="The data holds images, and a server is sent tokens alone"):
        cache_served_teacher("http://localhost:1", teacher.config, data, tmp_path / "served")
    for name in ("list", "packed", "served"):
        assert not list((tmp_path / name).glob("*.arrow"))
