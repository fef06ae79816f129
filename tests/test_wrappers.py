"""Models that hold a language model beside a vision tower: the one is cut, the other kept bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    Mistral3Config,
    PretrainedConfig,
    PreTrainedModel,
)

from minitron_hf import models
from minitron_hf.data import TokenRows
from minitron_hf.errors import PlanError, UnsupportedModelError
from minitron_hf.families import PRUNER_FIELDS, spec_for
from minitron_hf.losses.heads import check_output_head
from minitron_hf.pruning.masking import masked_units
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.streaming import prune_checkpoint
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.recipe.recommendations import recommend
from minitron_hf.saving import save_model
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.search.architectures import search_architectures
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.student import student_config
from minitron_hf.sizes.targets import shapes_near_target
from pocket import float64_throughout, pocket_config, pocket_tokens

IMAGE_TOKEN = 95
#: Tokens of one image; none where only text is compared.
IMAGES = {"gemma3": 4, "gemma4": 0, "llava": 16, "mistral3": 4, "qwen3_5": 4, "qwen3_5_moe": 4}
TOKENS = pocket_tokens(2, 22) % 90
VISION = {
    "hidden_size": 20,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def configs() -> dict[str, PretrainedConfig]:
    """One wrapper around each of some pocket language models."""

    def around(model_type: str, text: str, kind: str, vision: dict | None = None, **changes) -> PretrainedConfig:
        own = {"model_type": kind, **VISION, **(vision or {})}
        inner = pocket_config(text).to_dict()
        return AutoConfig.for_model(model_type, text_config=inner, vision_config=own, **changes)

    image = {"image_token_index": IMAGE_TOKEN}
    qwen = {
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 36,
        "num_position_embeddings": 16,
        "temporal_patch_size": 2,
    }
    tokens = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 96,
        "vision_start_token_id": 93,
        "vision_end_token_id": 94,
    }
    gemma4 = {"head_dim": 12, "num_key_value_heads": 2, "position_embedding_size": 16}
    no_head = {"vision_use_head": False}
    return {
        "gemma3": around(
            "gemma3", "gemma3_text", "siglip_vision_model", vision=no_head, mm_tokens_per_image=4, **image
        ),
        "gemma4": around("gemma4", "gemma4_text", "gemma4_vision", vision=gemma4, image_token_id=IMAGE_TOKEN),
        "llava": around("llava", "llama", "clip_vision_model", **image),
        "mistral3": around("mistral3", "mistral", "pixtral", vision={"head_dim": 10}, **image),
        "qwen3_5": around("qwen3_5", "qwen3_5_text", "qwen3_5_vision", vision=qwen, **tokens),
        "qwen3_5_moe": around("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_moe_vision", vision=qwen, **tokens),
    }


CONFIGS = configs()


def wrapped(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    config = copy.deepcopy(CONFIGS[name])
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # what else there is knows no float64
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = (2 / sum(parameter.shape)) ** 0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(values * scale)
    return model.eval()


def inputs(name: str, image: bool) -> dict[str, torch.Tensor]:
    """Text alone, or with the tokens of one image in every row."""
    tokens = TOKENS.clone()
    if not image:
        return {"input_ids": tokens}
    generator = torch.Generator().manual_seed(1)
    tokens[:, 2 : 2 + IMAGES[name]] = IMAGE_TOKEN
    given = {"input_ids": tokens, "token_type_ids": (tokens == IMAGE_TOKEN).long()}
    if name.startswith("qwen"):
        pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
        grid = torch.tensor([[1, 4, 4]] * 2)
        kinds = given.pop("token_type_ids").int()
        return {**given, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    pixels = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    if name == "mistral3":
        given["image_sizes"] = torch.tensor([[16, 16]] * 2)
    if name != "gemma3":
        given.pop("token_type_ids")
    return {**given, "pixel_values": pixels}


@torch.no_grad()
def logits(name: str, model: PreTrainedModel, image: bool) -> torch.Tensor:
    with float64_throughout():
        return model(**inputs(name, image), use_cache=False).logits


def planned(model: PreTrainedModel, **request) -> PruningPlan:
    scores = estimate_importance(model, metric="random", seed=3)
    return make_plan(model, PrunerConfig(**request, multiple_of=1), scores)


def narrow_images(model: PreTrainedModel, plan: PruningPlan) -> None:
    """What the projector writes where images stand knows only the kept channels, at the scale of the embeddings."""
    projectors = [module for path, module in model.named_modules() if path.endswith("multi_modal_projector")]
    if "hidden" in plan.kept and projectors:
        mask = torch.zeros(plan.sizes["hidden"]["teacher"], dtype=torch.float64)
        scaled = spec_for(model.config).stream.scaled_embeddings
        mask[torch.from_numpy(plan.kept["hidden"])] = (len(plan.kept["hidden"]) / len(mask)) ** (0.5 if scaled else 0)
        projectors[0].register_forward_hook(lambda _, __, output: output * mask)


WIDTHS = [
    {"intermediate_size": 31},
    {"num_attention_heads": 6},
    {"num_key_value_heads": 2, "num_attention_heads": 4},
    {"layers_to_drop": [1, 3]},
    {"hidden_size": 24},
    {"hidden_size": 24, "intermediate_size": 17, "num_attention_heads": 6, "num_hidden_layers": 3},
]


CASES = [
    (name, request, image)
    for name in CONFIGS
    for request in WIDTHS
    for image in ([False, True] if IMAGES[name] else [False])
    if not {PRUNER_FIELDS.get(field) for field in request} & spec_for(CONFIGS[name]).refused.keys()
    and ("intermediate_size" not in request or "ffn" in spec_for(CONFIGS[name]).axis)
]


@pytest.mark.parametrize(("name", "request_", "image"), CASES, ids=str)
def test_student_equals_masked_teacher(name: str, request_: dict, image: bool):
    """With hidden channels dropped, up to the eps of norms: the masks scale embeddings, not eps."""
    model = wrapped(name)
    plan = planned(model, **request_)
    student = apply_plan(model, plan)
    assert type(student) is type(model)
    narrow_images(model, plan)
    with masked_units(model, plan):
        expected = logits(name, model, image)
    found = logits(name, student, image)
    gap = ((found - expected).abs().max() / expected.abs().max()).item()
    assert gap < (1e-3 if "hidden_size" in request_ else 1e-12)
    assert expected.std() > 0.01
    if image:
        assert not torch.allclose(found, logits(name, student, False))


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"gemma3"}))
def test_the_others_are_kept_bit_for_bit_and_reload(name: str, tmp_path: Path):
    model = wrapped(name, torch.float32)
    student = apply_plan(model, planned(model, num_attention_heads=6, layers_to_drop=[1]))
    before, after = model.state_dict(), student.state_dict()
    others = {name for name in before if "language_model" not in name and not name.startswith("lm_head")}
    assert len(others) > 10
    assert all(torch.equal(before[name], after[name]) for name in others)
    student.save_pretrained(tmp_path)
    reloaded = models.load_model(tmp_path)
    assert type(reloaded) is type(model)
    assert all(torch.equal(value, after[name]) for name, value in reloaded.state_dict().items())


@pytest.mark.parametrize("name", ["llava", "mistral3", "qwen3_5", "qwen3_5_moe"])
def test_hidden_sizes_that_others_are_derived_from_are_refused(name: str):
    with pytest.raises(PlanError, match=f"the stock '{name}' classes derive other sizes"):
        make_plan(CONFIGS[name], PrunerConfig(hidden_size=24))


def test_everything_else_is_kept_bit_for_bit(tmp_path: Path):
    model = wrapped("gemma3", torch.float32)
    plan = planned(model, **WIDTHS[-1])
    student = apply_plan(model, plan)
    before, after = model.state_dict(), student.state_dict()
    others = {name for name in before if "language_model" not in name and not name.startswith("lm_head")}
    projector = "model.multi_modal_projector.mm_input_projection_weight"
    assert projector in others
    assert any("vision_tower" in name for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others - {projector})
    scale = (24 / 36) ** 0.5  # that of the student's embeddings
    expected = before[projector][:, torch.from_numpy(plan.kept["hidden"])] * scale
    torch.testing.assert_close(after[projector], expected)
    assert student.config.vision_config.to_dict() == model.config.vision_config.to_dict()

    student.save_pretrained(tmp_path)
    reloaded = models.load_model(tmp_path)
    assert type(reloaded) is type(model)
    assert all(torch.equal(value, after[name]) for name, value in reloaded.state_dict().items())
    asked = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(*(one.generate(TOKENS[:, :5], **asked) for one in (student, reloaded)))
    counted = {models.count_parameters(one) for one in (student, plan.build_student_config())}
    assert counted == {plan.student["num_parameters"]}


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_all_in_one_call_and_from_disk(name: str, tmp_path: Path):
    model = wrapped(name, torch.float32)
    model.save_pretrained(tmp_path / "teacher")
    refused = spec_for(model.config).refused
    hidden = {} if "hidden" in refused else {"hidden_size": 24}
    config = PrunerConfig(**hidden, intermediate_size=20, num_hidden_layers=3, multiple_of=1)
    rows = (pocket_tokens(6, 16) % IMAGE_TOKEN % 93).tolist()
    student = prune_model(tmp_path / "teacher", config, calibration_data=rows, max_length=16, verify=True)
    assert "Verified" in student.pruning_plan.notes[-1]
    save_model(student, tmp_path / "memory")
    prune_checkpoint(tmp_path / "teacher", tmp_path / "disk", student.pruning_plan, show_progress=False)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "disk" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()


def test_sizes_are_those_of_the_language_model():
    config = CONFIGS["gemma3"]
    text = config.text_config
    assert isinstance(text, Gemma3TextConfig)
    assert spec_for(config).sizes(config) == spec_for(text).sizes(text)
    with pytest.raises(PlanError, match="larger than the teacher's 36"):
        make_plan(config, PrunerConfig(hidden_size=99))


def test_wrappers_without_a_table_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"'mistral3' around 'qwen2'. Supported: gemma3 \(gemma3_text\), "):
        spec_for(Mistral3Config(text_config={"model_type": "qwen2"}))


@pytest.mark.parametrize("name", CONFIGS)
def test_targets_and_recommendations_count_the_whole_model(name: str):
    """The parts beside the language model are parameters of the student too."""
    config = CONFIGS[name]
    limit = 0.9 * models.count_parameters(config)
    for shape in shapes_near_target(config, PrunerConfig(target_parameters=0.9, multiple_of=1), tolerance=0.2):
        count = models.count_parameters(student_config(config, shape.request))
        assert shape.num_parameters == count <= limit
    [*_, last] = recommend(config, 0.9).rounds
    assert last.num_parameters == models.count_parameters(student_config(config, last.request))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_knows_the_head_of_a_wrapped_language_model(name: str):
    model = wrapped(name, torch.float32)
    if hasattr(model.config.text_config, "final_logit_softcapping"):
        model.config.text_config.final_logit_softcapping = 1.5
    check_output_head(model)


def test_a_target_and_a_search_prune_the_language_model():
    model = wrapped("gemma3", torch.float32)
    rows = TokenRows(tuple(tuple(row) for row in TOKENS.tolist()), None)
    request = PrunerConfig(target_parameters=0.9, multiple_of=1)
    student = prune_model(model, request, calibration_data=rows, max_length=22, show_progress=False)
    assert student.pruning_plan.student["num_parameters"] <= 0.9 * models.count_parameters(model)
    scores = estimate_importance(model, rows, max_length=22, show_progress=False)
    found = search_architectures(
        model,
        scores,
        space={"intermediate_size": [0.5, 0.75, 1.0]},
        calibration_data=rows,
        max_parameters=0.99 * models.count_parameters(model),
        tolerance=0.5,
        max_length=22,
        show_progress=False,
    )
    assert [candidate.num_parameters for candidate in found.candidates] == [
        models.count_parameters(student_config(model.config, candidate.request)) for candidate in found.candidates
    ]
