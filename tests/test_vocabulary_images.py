"""Models that read images, with a cut vocabulary: processor and configs have the new ids, images enter as before."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3Processor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from minitron_hf import (
    PrunerConfig,
    apply_plan,
    count_tokens,
    evaluate_models,
    make_plan,
    prune_checkpoint,
    prune_tokenizer,
    save_model,
    student_config,
)
from minitron_hf.errors import PlanError
from pocket_images import IMAGE_LENGTH, TEMPLATE, image_dataset, images
from test_vocabulary_pruning import SIZE, bpe_tokenizer, texts
from test_wrappers import CONFIGS, filled


def image_processor() -> Gemma3Processor:
    """A processor of images whose tokenizer can be cut."""
    tokens = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    whole = bpe_tokenizer()
    special = {f"{role}_token": getattr(whole, f"{role}_token") for role in ("bos", "eos", "pad", "unk")}
    backend = whole.backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, extra_special_tokens=tokens)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=IMAGE_LENGTH)


def test_a_model_that_reads_images_is_cut_with_its_processor(tmp_path):
    """On images and text, its logits are the teacher's at the kept tokens; its files hold the new ids."""
    processor = image_processor()
    config = copy.deepcopy(CONFIGS["gemma3"])
    ids = {
        "image_token_index": processor.tokenizer.image_token_id,
        "boi_token_index": processor.tokenizer.boi_token_id,
    }
    for name, value in {**ids, "eoi_token_index": processor.tokenizer.eoi_token_id}.items():
        setattr(config, name, value)
    teacher = filled(config, torch.float64)
    teacher.generation_config = GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id)
    save_model(teacher, tmp_path / "teacher", processor)
    counts = count_tokens(texts(), processor)
    plan = make_plan(teacher, PrunerConfig(vocab_size=SIZE + 4), token_counts=counts)
    kept = torch.from_numpy(plan.kept["vocab"])
    student, cut = apply_plan(teacher, plan), prune_tokenizer(processor, plan)
    assert kept[student.config.image_token_index] == processor.tokenizer.image_token_id
    assert cut.tokenizer.image_token_id == student.config.image_token_index
    save_model(student, tmp_path / "student", cut)
    prune_checkpoint(tmp_path / "teacher", tmp_path / "streamed", plan, show_progress=False)
    for folder in ("student", "streamed"):
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / folder, dtype=torch.float64)
        read = AutoProcessor.from_pretrained(tmp_path / folder)
        assert read.tokenizer.image_token_id == loaded.config.image_token_index == student.config.image_token_index
        assert kept[read.image_token_id] == processor.image_token_id  # of the beginning of an image, in Gemma 3
        inputs = read(text="<boi>abcd_ab", images=images(1), return_tensors="pt")
        assert (inputs["input_ids"] == loaded.config.image_token_index).sum() == IMAGE_LENGTH
        theirs = processor(text="<boi>abcd_ab", images=images(1), return_tensors="pt")
        assert torch.equal(kept[inputs["input_ids"]], theirs["input_ids"])
        with torch.no_grad():
            expected = teacher(**theirs).logits[..., kept]
            # Loaded models compute rotations in float32.
            torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    without = teacher(input_ids=theirs["input_ids"]).logits[..., kept]
    assert not torch.allclose(without, expected, atol=1e-3)  # the image matters
    scored = evaluate_models(
        {"teacher": teacher, "student": student}, image_dataset(4), processing_class=processor, speed=False
    )
    assert scored["models"]["student"]["metrics"]["kl_divergence"]["value"] == pytest.approx(0, abs=1e-7)


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
