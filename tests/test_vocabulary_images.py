"""Models that read images, with a cut vocabulary: processor and configs have the new ids, images enter as before."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3Processor,
    GenerationConfig,
    Idefics3Processor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

from minitron_hf import (
    DistillationConfig,
    DistillationTrainer,
    PrunerConfig,
    apply_plan,
    cache_teacher_logits,
    count_tokens,
    estimate_importance,
    evaluate_models,
    load_teacher_cache,
    make_plan,
    prune_checkpoint,
    prune_model,
    prune_tokenizer,
    save_model,
    student_config,
    verify_student,
)
from minitron_hf.data import load_text_dataset
from minitron_hf.errors import DataError, PlanError
from minitron_hf.files import read_json
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.runner import run_recipe
from minitron_hf.recipe.schema import Recipe
from pocket_images import IMAGE_LENGTH, TEMPLATE, image_dataset, image_rows, images
from test_cli import minitron
from test_trainer import float64  # noqa: F401
from test_vocabulary_pruning import SIZE, bpe_tokenizer, texts
from test_wrappers import CONFIGS, filled


def image_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer that can be cut, with further tokens, whose ids are the largest."""
    whole = bpe_tokenizer()
    special = {f"{role}_token": getattr(whole, f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(
        tokenizer_object=whole.backend_tokenizer, **special, extra_special_tokens=tokens, chat_template=TEMPLATE
    )


def gemma3_processor(**others: str) -> Gemma3Processor:
    """Every image is four tokens between two others."""
    tokens = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", **others}
    pixels = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    tokenizer = image_tokenizer(**tokens)
    return Gemma3Processor(pixels, tokenizer, chat_template=TEMPLATE, image_seq_length=IMAGE_LENGTH)


def paddleocr_processor() -> PaddleOCRVLProcessor:
    """As in Qwen2-VL, an image is as many tokens as it has squares of four patches, with positions in a grid."""
    names = ("image", "video", "vision_start", "vision_end")
    tokenizer = image_tokenizer(**{f"{name}_token": f"<{name}>" for name in names})
    size = {"shortest_edge": 64, "longest_edge": 1024}
    pixels = PaddleOCRVLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    return PaddleOCRVLProcessor(pixels, tokenizer, chat_template=TEMPLATE.replace("<boi>", "<image>"))


def idefics3_processor() -> Idefics3Processor:
    """Four tiles and a whole image, each with a token that says its place."""
    places = {f"row_{row}_col_{column}": f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)}
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    marks = {"around": "<fake_token_around_image>", "end": "<end_of_utterance>", "whole": "<global-img>"}
    tokenizer = image_tokenizer(image_token="<image>", **marks, **places)
    template = TEMPLATE.replace("<boi>", "<image>")
    return Idefics3Processor(pixels, tokenizer, image_seq_len=IMAGE_LENGTH, chat_template=template)


@dataclass(frozen=True)
class Design:
    """How a wrapper's processor stands for images.

    Attributes:
        processor: makes it.
        mark: what stands for an image in a text.
        ids: field of the config → the token that it names.
        num_tokens: tokens of an image in whose place its parts stand.
    """

    processor: Callable[[], Any]
    mark: str
    ids: dict[str, str]
    num_tokens: int


#: Fixed many tokens between marks; a grid whose size follows the image; tiles with places.
DESIGNS = {
    "gemma3": Design(
        gemma3_processor,
        "<boi>",
        {"image_token_index": "<image>", "boi_token_index": "<boi>", "eoi_token_index": "<eoi>"},
        IMAGE_LENGTH,
    ),
    "paddleocr_vl": Design(
        paddleocr_processor,
        "<vision_start><image><vision_end>",
        {f"{name}_token_id": f"<{name}>" for name in ("image", "video", "vision_start", "vision_end")},
        6,
    ),
    "idefics3": Design(idefics3_processor, "<image>", {"image_token_id": "<image>"}, 5 * IMAGE_LENGTH),
}


def teacher_and_processor(name: str) -> tuple[Any, Any]:
    """A pocket whose config names the tokens of a processor."""
    processor, config = DESIGNS[name].processor(), copy.deepcopy(CONFIGS[name])
    for field, token in DESIGNS[name].ids.items():
        setattr(config, field, processor.tokenizer.convert_tokens_to_ids(token))
    teacher = filled(config, torch.float64)
    teacher.generation_config = GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id)
    return teacher, processor


def stock_inputs(processor: Any, text: str) -> dict[str, torch.Tensor]:
    given = processor(text=text, images=images(1), return_tensors="pt")
    return {key: value.double() if value.is_floating_point() else value for key, value in given.items()}


@pytest.mark.parametrize("name", DESIGNS)
def test_a_model_that_reads_images_is_cut_with_its_processor(name, tmp_path):
    """On images and text, its logits are the teacher's at the kept tokens; its files hold the new ids."""
    design = DESIGNS[name]
    teacher, processor = teacher_and_processor(name)
    save_model(teacher, tmp_path / "teacher", processor)
    size = len(processor.tokenizer) - 9
    plan = make_plan(teacher, PrunerConfig(vocab_size=size), token_counts=count_tokens(texts(), processor))
    kept = torch.from_numpy(plan.kept["vocab"])
    student, cut = apply_plan(teacher, plan), prune_tokenizer(processor, plan)
    assert verify_student(teacher, student, plan) < 1e-6
    for field, token in design.ids.items():
        new, old = getattr(student.config, field), processor.tokenizer.convert_tokens_to_ids(token)
        assert kept[new] == old == getattr(teacher.config, field)
        assert new == cut.tokenizer.convert_tokens_to_ids(token) != old
    save_model(student, tmp_path / "student", cut)
    prune_checkpoint(tmp_path / "teacher", tmp_path / "streamed", plan, show_progress=False)
    text = f"{design.mark}abcd_ab"
    theirs = stock_inputs(processor, text)
    image_id = getattr(teacher.config, next(iter(design.ids)))
    assert (theirs["input_ids"] == image_id).sum() == design.num_tokens
    with torch.no_grad():
        expected = teacher(**theirs).logits[..., kept]
    for folder in ("student", "streamed"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / folder, dtype=torch.float64)
        for read in (cut, AutoProcessor.from_pretrained(tmp_path / folder)):
            given = stock_inputs(read, text)
            assert torch.equal(kept[given["input_ids"]], theirs["input_ids"])
            assert given.keys() == theirs.keys()
            assert all(torch.equal(given[key], theirs[key]) for key in given if key != "input_ids")
            ids = [key for key in vars(read) if key.endswith(("_id", "_ids")) and vars(read)[key]]
            assert all(kept[getattr(read, key)].tolist() == getattr(processor, key) for key in ids)
        with torch.no_grad():  # loaded models compute rotations in float32
            torch.testing.assert_close(loaded(**given).logits, expected, rtol=1e-4, atol=1e-5)
    without = teacher(input_ids=theirs["input_ids"]).logits[..., kept]
    assert not torch.allclose(without, expected, atol=1e-3)  # the image matters
    scored = evaluate_models(
        {"teacher": teacher, "student": student}, image_dataset(2), processing_class=processor, speed=False
    )
    assert scored["models"]["student"]["metrics"]["kl_divergence"]["value"] == pytest.approx(0, abs=1e-7)


def lettered_rows() -> list[dict[str, Any]]:
    """Conversations about images, of words that the tokenizer knows."""
    rows = image_rows(4)
    for row, text in zip(rows, texts(), strict=False):
        user, assistant = row["messages"]
        user["content"][1]["text"], assistant["content"][0]["text"] = text[:7], text[7:19]
    return rows


def written_rows(folder: Path) -> Path:
    """A file with eleven conversations about images, which lie beside it; the third is text alone."""
    rows = [row for _ in range(3) for row in lettered_rows()][:11]
    lines = []
    for number, row in enumerate(rows):
        row["images"][0].save(folder / f"{number}.png")
        lines.append({**row, "images": [f"{number}.png"]})
    del lines[2]["messages"][0]["content"][0]
    lines[2]["images"] = []
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "rows.jsonl"


def naive_ids(processor: Any, row: dict[str, Any]) -> list[int]:
    """What the processor makes of a row, whose template is written out here."""
    text = ""
    for message in row["messages"]:
        parts = ("<boi>" if part["type"] == "image" else part["text"] for part in message["content"])
        text += f"{message['role'][0]}:{''.join(parts)}</s>"
    return processor(text=text, images=row["images"] or None, add_special_tokens=False)["input_ids"][0]


def test_tokens_of_rows_with_images_are_counted(tmp_path):
    """The counts are naive ones, of all rows but the tenth, on which tokens per byte are measured without images."""
    processor, data = gemma3_processor(), load_text_dataset(str(written_rows(tmp_path)))
    every = [naive_ids(processor, row) for row in data]
    counts = count_tokens(data, processor)
    expected = Counter(token for number, ids in enumerate(every) for token in ids if number != 9)
    assert {token: count for token, count in enumerate(counts.counts.tolist()) if count} == expected
    assert expected[processor.tokenizer.image_token_id] == 9 * IMAGE_LENGTH
    text = [token for token in every[9] if token != processor.tokenizer.image_token_id]
    assert counts.held_out
    assert counts.sample == (processor.tokenizer.decode(text),)
    first = count_tokens(list(data), processor, max_tokens=len(every[0]) + 1).counts
    assert first.sum() == len(every[0]) + len(every[1])
    with pytest.raises(DataError, match=r"processing_class is a .*, which reads text alone"):
        count_tokens(data, processor.tokenizer)


@pytest.mark.slow
def test_rows_with_images_choose_the_vocabulary(tmp_path):
    """In Python, at the command line and in recipes with a teacher cache, the same tokens stay."""
    teacher, processor = teacher_and_processor("gemma3")
    save_model(teacher.float(), tmp_path / "teacher", processor)
    rows, size = written_rows(tmp_path), len(processor.tokenizer) - 9
    request = PrunerConfig(vocab_size=size, intermediate_size=0.5, multiple_of=1)
    student = prune_model(
        str(tmp_path / "teacher"),
        request,
        calibration_data=load_text_dataset(str(rows)),
        max_length=64,
        show_progress=False,
    )
    kept = student.pruning_plan.kept["vocab"].tolist()
    assert len(kept) == student.config.text_config.vocab_size == size
    options = ("--vocab-size", size, "--data", rows, "-o", tmp_path / "plan")
    done = minitron("plan", tmp_path / "teacher", *options)
    assert done.returncode == 0, done.stderr
    assert PruningPlan.from_pretrained(tmp_path / "plan").kept["vocab"].tolist() == kept
    values = {
        "teacher": str(tmp_path / "teacher"),
        "data": {"train": str(rows), "eval": str(rows)},
        "output_dir": str(tmp_path / "run"),
        "prune": {"vocab_size": size, "intermediate_size": 0.5, "multiple_of": 1},
        "scores": {"max_length": 64},
        "distill": {"max_steps": 2, "max_length": 64, "per_device_train_batch_size": 2},
        "teacher_cache": {"top_k": 8},
        "evaluate": {"speed": False, "max_length": 64},
    }
    recipe = Recipe.from_dict(values)
    check_recipe(recipe)
    made = run_recipe(recipe, show_progress=False, report=lambda line: None)
    assert PruningPlan.from_pretrained(made).kept["vocab"].tolist() == kept
    assert len(AutoProcessor.from_pretrained(made).tokenizer) == size
    assert read_json(made / "evaluation.json")["models"]["student"]["metrics"]["loss"]["value"] > 0


def naive_divergence(teacher: Any, student: Any, processor: Any, kept: torch.Tensor, row: dict[str, Any]) -> list:
    """Divergence over the kept tokens, weighted with their probability, where text is predicted."""
    [user, assistant] = row["messages"]
    text = f"u:<boi>{user['content'][1]['text']}</s>a:{assistant['content'][0]['text']}</s>"
    given = processor(text=text, images=row["images"], return_tensors="pt", add_special_tokens=False)
    given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    ids = given["input_ids"][0]
    with torch.no_grad():
        z_s, z_t = student(**given).logits[0], teacher(**{**given, "input_ids": kept[ids][None]}).logits[0]
    p = z_t.softmax(-1)[:, kept]
    m = p.sum(-1, keepdim=True)
    found = (p * ((p / m).log() - z_s.log_softmax(-1))).sum(-1)
    return [found[place - 1] for place in range(1, len(ids)) if ids[place] != student.config.image_token_index]


@pytest.mark.usefixtures("float64")
def test_a_cache_of_images_for_a_cut_vocabulary_trains_as_the_teacher(tmp_path):
    """Losses and weights are those of training with the teacher, and the loss is the naive one."""
    processor = gemma3_processor(x_token="<x>", y_token="<y>")
    config = copy.deepcopy(CONFIGS["gemma3"])
    for field, token in DESIGNS["gemma3"].ids.items():
        setattr(config, field, processor.tokenizer.convert_tokens_to_ids(token))
    teacher = filled(config, torch.float64)
    counts, scores = count_tokens(texts(), processor), estimate_importance(teacher, metric="random")
    size = len(processor.tokenizer) - 2
    request = PrunerConfig(vocab_size=size, intermediate_size=31, multiple_of=1)
    plan = make_plan(teacher, request, scores, token_counts=counts)
    kept, student = torch.from_numpy(plan.kept["vocab"]), apply_plan(teacher, plan)
    # The teacher's token of images is another token of the student, and one that all rows hold.
    assert kept[config.image_token_index] == processor.tokenizer.convert_tokens_to_ids("<eoi>")
    data = Dataset.from_list(lettered_rows())
    settings = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False, "max_length": 64}
    args = DistillationConfig(str(tmp_path / "cache"), per_device_eval_batch_size=2, ce_weight=0.3, **settings)
    given = {"args": args, "processing_class": processor, "pruning_plan": plan, "show_progress": False}
    folder = cache_teacher_logits(teacher, data, tmp_path / "cache", top_k=size, dtype="float32", **given)
    cache, found = load_teacher_cache(folder, data), []
    for name, one, rows in (("online", teacher, data), ("cached", None, cache)):
        args = DistillationConfig(str(tmp_path / name), max_steps=2, ce_weight=0.3, **settings)
        trainer = DistillationTrainer(
            copy.deepcopy(student), one, args, train_dataset=rows, eval_dataset=rows, processing_class=processor
        )
        before = trainer.evaluate()
        trainer.train()
        found.append(({**before, **trainer.state.log_history[1]}, trainer.model.state_dict()))
    (expected, weights), (log, same) = found
    for name in ("loss", "kl", "eval_loss", "eval_kl", "eval_ce", "eval_agreement"):
        assert log[name] == pytest.approx(expected[name], rel=1e-6), name
    for name, value in weights.items():
        torch.testing.assert_close(same[name], value, rtol=1e-5, atol=1e-7)
    cut = prune_tokenizer(processor, plan)
    naive = [one for row in lettered_rows() for one in naive_divergence(teacher, student, cut, kept, row)]
    assert log["eval_kl"] == pytest.approx(float(torch.stack(naive).mean()), rel=1e-5)


def test_ids_that_the_config_does_not_name_are_a_reason(tmp_path):
    config = copy.deepcopy(CONFIGS["gemma3"])
    rows = config.text_config.vocab_size
    for changes, words in (
        ({"image_token_index": rows + 3}, "image_token_index of its config lie outside"),
        ({"image_patch_id": 5, "image_token_index": 7}, "image_patch_id of its config may be ids of tokens"),
    ):
        changed = copy.deepcopy(config)
        for name, value in {"boi_token_index": 5, "eoi_token_index": 6, **changes}.items():
            setattr(changed, name, value)
        with pytest.raises(PlanError, match=words):
            student_config(changed, PrunerConfig(vocab_size=SIZE))
    for name, words in (
        ("emu3", "vocabulary_map of its config holds the ids"),
        ("phi4_multimodal", "the configs of its towers"),
    ):
        with pytest.raises(PlanError, match=words):
            student_config(CONFIGS[name], PrunerConfig(vocab_size=SIZE))
