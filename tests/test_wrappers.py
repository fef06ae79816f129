"""Models that hold a language model beside a vision tower: the one is cut, the other kept bit for bit."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, Gemma3TextConfig, Mistral3Config, PreTrainedModel
from transformers.utils import is_timm_available

from minitron_hf import families as rooms
from minitron_hf import models
from minitron_hf.compat import image_text_types
from minitron_hf.data import TokenRows
from minitron_hf.data.images import image_inputs
from minitron_hf.distillation.adapters import refuse_split_tie
from minitron_hf.errors import PlanError, UnsupportedModelError
from minitron_hf.families import (
    FIELD_OF_AXIS,
    PRUNER_FIELDS,
    REFUSED,
    ROWS,
    families,
    register_wrapper,
    spec_for,
    wrapped_families,
)
from minitron_hf.families.refused_wrappers import WITHOUT_TABLE
from minitron_hf.losses.heads import backbone_output, check_output_head, head_logits, output_head
from minitron_hf.pruning.masking import masked_units
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.streaming import prune_checkpoint
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.recipe.recommendations import recommend
from minitron_hf.saving import save_model
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.logits import run_backbone
from minitron_hf.search.architectures import search_architectures
from minitron_hf.sizes.counts import parameter_counts
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.sizes.student import student_config
from minitron_hf.sizes.targets import shapes_near_target
from pocket import POCKETS, float64_throughout, pocket_config, pocket_tokens
from pockets.wrappers import IMAGE_TOKEN, WITH_TIMM, wrapper_config, wrapper_pockets

WRAPPERS = wrapper_pockets({name: pocket_config(name) for name in POCKETS})
CONFIGS = {name: pocket.config for name, pocket in WRAPPERS.items()}
#: A projector with neurons and a newline, one that is no module, and one inside the vision tower.
REPRESENTATIVES = ("llava_next", "gemma3", "qwen3_5")
EACH = [pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow) for name in WRAPPERS]
TOKENS = pocket_tokens(2, 22) % 90
#: Wrappers whose stock defaults lack a size, or do not fit together.
NOT_BUILT = ("aya_vision", "cohere_compass", "deepseek_ocr2", "emu3", "granite4_vision", "hunyuan_vl", "perception_lm")


def wrapped(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return filled(CONFIGS[name], dtype)


def filled(config, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # what else there is knows no float64
    model = models.auto_class(config).from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # some are pinned to float32
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = (2 / sum(parameter.shape)) ** 0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(values * scale)
    return model.eval()


def inputs(name: str, image: bool) -> dict[str, torch.Tensor]:
    """Text alone, or with the tokens of one image in every row."""
    pocket = WRAPPERS[name]
    tokens = pocket_tokens(2, max(22, pocket.num_tokens + 8)) % 90
    if not image:
        return {"input_ids": tokens}
    tokens[:, 2 : 2 + pocket.num_tokens] = IMAGE_TOKEN
    tokens[:, 1] = getattr(pocket.config, "vision_start_token_id", None) or tokens[:, 1]
    given = {"input_ids": tokens, **pocket.image(torch.Generator().manual_seed(1))}
    for key, kind in pocket.token_kinds.items():
        given[key] = (tokens == IMAGE_TOKEN).to(torch.int64) * kind
    return given


@torch.no_grad()
def logits(name: str, model: PreTrainedModel, image: bool) -> torch.Tensor:
    with float64_throughout():
        return model(**inputs(name, image), use_cache=False).logits


def planned(model: PreTrainedModel, **request) -> PruningPlan:
    scores = estimate_importance(model, metric="random", seed=3)
    return make_plan(model, PrunerConfig(**request, multiple_of=1), scores)


CASES = [
    pytest.param(name, request, image, marks=() if name in REPRESENTATIVES else pytest.mark.slow)
    for name, pocket in WRAPPERS.items()
    for request in pocket.widths
    for image in ([False, True] if pocket.num_tokens else [False])
    if not {PRUNER_FIELDS.get(field) for field in request} & spec_for(pocket.config).refused.keys()
    and {PRUNER_FIELDS.get(field, "layers") for field in request} <= spec_for(pocket.config).axis.keys()
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "request_", "image"), CASES, ids=str)
def test_student_equals_masked_teacher(name: str, request_: dict, image: bool):
    """With hidden channels dropped, up to the eps of norms where the table says that it is shared."""
    model = wrapped(name)
    plan = planned(model, **request_)
    student = apply_plan(model, plan)
    assert type(student) is type(model)
    with masked_units(model, plan):
        expected = logits(name, model, image)
    found = logits(name, student, image)
    gap = ((found - expected).abs().max() / expected.abs().max()).item()
    assert gap < (1e-12 if WRAPPERS[name].is_exact or "hidden" not in plan.kept else 1e-5)
    assert expected.std() > 0.01
    if image:
        assert not torch.allclose(found, logits(name, student, False))


@pytest.mark.parametrize("name", EACH)
def test_images_reach_the_language_model_through_the_kept_channels(name: str):
    """Written by hand: what stands for the embeddings is the teacher's, of kept channels, at the student's scale."""
    pocket, model = WRAPPERS[name], wrapped(name)
    if not pocket.num_tokens or "hidden" in spec_for(model.config).refused:
        pytest.skip("no images here, or no cut")
    plan = planned(model, **next(request for request in pocket.widths if "hidden_size" in request))
    student = apply_plan(model, plan)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for path in pocket.reads_neurons:
            dropped = torch.ones(tensors[path].shape[1], dtype=torch.bool)
            dropped[torch.from_numpy(plan.kept["projector"])] = False
            tensors[path][:, dropped] = 0
    expected, found = embedded(name, model), embedded(name, student)
    scaled, kept = spec_for(model.config).stream.scaled_embeddings, plan.kept["hidden"]
    scale = (len(kept) / expected.shape[-1]) ** 0.5 if scaled else 1.0
    expected = expected[..., torch.from_numpy(kept)] * scale
    assert (found - expected).abs().max() < (1e-12 if pocket.is_exact else 1e-5)


def test_images_reach_a_rotated_language_model():
    name = "llava_next"
    model = wrapped(name)
    rows = TokenRows(tuple(tuple(row) for row in TOKENS.tolist()), None)
    scores = estimate_importance(model, rows, max_length=22, hidden_covariance=True, show_progress=False)
    plan = make_plan(model, PrunerConfig(hidden_size=24, hidden_basis="principal", multiple_of=1), scores)
    assert "The neurons of the projector are ranked by their weights" in plan.notes[-1]
    student = apply_plan(model, plan)
    dropped = torch.ones(36, dtype=torch.bool)
    dropped[torch.from_numpy(plan.kept["projector"])] = False
    with torch.no_grad():
        for path in WRAPPERS[name].reads_neurons:
            model.get_parameter(path)[:, dropped] = 0
    directions = torch.from_numpy(plan.basis).double()[:, :24]
    torch.testing.assert_close(embedded(name, student), embedded(name, model) @ directions, atol=1e-6, rtol=1e-6)


def embedded(name: str, model: PreTrainedModel) -> torch.Tensor:
    """What the first layer reads, with an image in every row."""
    seen = []
    layers = model.get_submodule(spec_for(model.config).layers_path)
    hook = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    logits(name, model, True)
    hook.remove()
    return seen[0].clone()


@pytest.mark.parametrize("name", EACH)
def test_the_others_are_kept_bit_for_bit_and_reload(name: str, tmp_path: Path):
    model = wrapped(name, torch.float32)
    student = apply_plan(model, planned(model, **WRAPPERS[name].widths[0], layers_to_drop=[1]))
    before, after = model.state_dict(), student.state_dict()
    inside = spec_for(model.config)
    others = {name for name in before if inside.locate(name) is None}
    assert len(others) > 5 or name == "fuyu"  # which has no vision tower
    assert all(torch.equal(before[name], after[name]) for name in others)
    student.save_pretrained(tmp_path)
    reloaded = models.load_model(tmp_path)
    assert type(reloaded) is type(model)
    assert all(torch.equal(value, after[name]) for name, value in reloaded.state_dict().items())


def test_everything_else_is_kept_bit_for_bit(tmp_path: Path):
    model = wrapped("gemma3", torch.float32)
    plan = planned(model, hidden_size=24, intermediate_size=17, num_attention_heads=6, num_hidden_layers=3)
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
    asked = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(*(one.generate(TOKENS[:, :5], **asked) for one in (student, reloaded)))
    counted = {models.count_parameters(one) for one in (student, plan.build_student_config())}
    assert counted == {plan.student["num_parameters"]}


@pytest.mark.parametrize("name", EACH)
def test_all_in_one_call_and_from_disk(name: str, tmp_path: Path):
    model = wrapped(name, torch.float32)
    model.save_pretrained(tmp_path / "teacher")
    refused = [FIELD_OF_AXIS[axis] for axis in spec_for(model.config).refused if axis in FIELD_OF_AXIS]
    config = PrunerConfig(
        **next(one for one in reversed(WRAPPERS[name].widths) if one.keys().isdisjoint(refused)), multiple_of=1
    )
    rows = (pocket_tokens(6, 16) % IMAGE_TOKEN % 93).tolist()
    # What else there is for stacked experts takes other sizes.
    teacher = models.load_model(tmp_path / "teacher", experts_implementation={"text_config": "eager"})
    student = prune_model(teacher, config, calibration_data=rows, max_length=16, verify=True)
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


def test_language_models_that_a_wrapper_is_not_tested_with_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"'mistral3' around 'bloom'\. 'mistral3' around llama, mistral, "):
        spec_for(Mistral3Config(text_config={"model_type": "bloom"}))


@pytest.mark.parametrize(("model_type", "reason"), [("git", "no table describes its"), ("blip", "by cross-attention")])
def test_wrappers_that_cannot_be_pruned_are_refused_with_their_reason(model_type: str, reason: str):
    with pytest.raises(UnsupportedModelError, match=f"'{model_type}' models cannot be pruned: .*{reason}"):
        spec_for(AutoConfig.for_model(model_type))


def test_every_wrapper_of_transformers_has_a_row_or_a_reason():
    rows = {row.model_type for row in ROWS}
    assert rows & REFUSED.keys() == set()
    assert {*rows, *REFUSED, *WITHOUT_TABLE.values()} <= set(CONFIG_MAPPING)
    assert set(image_text_types()) <= rows | REFUSED.keys() | families().keys()
    assert rows == WRAPPERS.keys() | (set() if is_timm_available() else set(WITH_TIMM))
    assert WITHOUT_TABLE.keys() <= REFUSED.keys()
    assert families().keys().isdisjoint(WITHOUT_TABLE.values())


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
def test_rows_cover_the_stock_defaults(row):
    """At full size, on the meta device."""
    config = AutoConfig.for_model(row.model_type)
    if row.model_type in WITH_TIMM and not is_timm_available():
        pytest.skip("timm is not installed")
    for path in row.width_fields:
        *parents, name = path.split(".")
        setattr(getattr(config, parents[0]) if parents else config, name, config.text_config.hidden_size)
    if row.model_type in NOT_BUILT:
        with pytest.raises(UnsupportedModelError, match="cannot build"):
            models.empty_model(config)
    else:
        spec_for(config).check(models.empty_model(config))


def test_a_wrapper_is_registered_from_outside(monkeypatch):
    monkeypatch.setattr(rooms, "_REGISTERED_ROWS", {})
    row = replace(ROWS[0], model_type="outside", text_types=("doge",))
    try:
        register_wrapper(row)
        register_wrapper(row)
        assert wrapped_families()["outside", "doge"].layers_path == "model.language_model.layers"
        with pytest.raises(UnsupportedModelError, match="a row for model_type 'internvl' already"):
            register_wrapper(replace(ROWS[0], prefix="text."))
    finally:
        wrapped_families.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for outer, text in wrapped_families() if outer == "llava"])
def test_every_language_model_works_in_a_wrapper(text: str):
    """Also those that scale their embeddings, or call their backbone otherwise."""
    own = {"image_token_index": IMAGE_TOKEN}
    config = wrapper_config(pocket_config(text), "llava", "clip_vision_model", {}, own)
    model = filled(config)
    plan = planned(model, hidden_size=24, num_hidden_layers=3)
    student = apply_plan(model, plan)
    with masked_units(model, plan):
        expected = logits("llava", model, True)
    assert ((logits("llava", student, True) - expected).abs().max() / expected.abs().max()).item() < 1e-12
    check_output_head(filled(config, torch.float32))


@pytest.mark.slow
def test_sound_reaches_the_language_model_through_the_kept_channels():
    model, tokens = wrapped("qwen3_omni_moe_thinker"), TOKENS.clone()
    tokens[:, 2:5] = model.config.audio_token_id
    mask = torch.ones(2, 24, dtype=torch.long)
    sound = torch.randn(
        2, model.config.audio_config.num_mel_bins, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    given = {"input_ids": tokens, "input_features": sound, "feature_attention_mask": mask, "use_cache": False}
    plan = planned(model, hidden_size=24, num_experts=4, num_attention_heads=6, layers_to_drop=[2])
    student = apply_plan(model, plan)
    with float64_throughout(), torch.no_grad():
        with masked_units(model, plan):
            expected = model(**given).logits
        torch.testing.assert_close(student(**given).logits, expected, rtol=1e-10, atol=1e-10)
        silent = student(**{**given, "input_features": 0 * sound}).logits
        assert not torch.allclose(silent, expected)


@pytest.mark.parametrize("beside", ["text", "image"])
def test_both_projectors_of_sound_lose_their_neurons(beside: str):
    """Phi-4-multimodal has one for sound beside text, and one for sound beside images."""
    name = "phi4_multimodal"
    model, given = wrapped(name), inputs(name, image=beside == "image")
    given["input_ids"][:, -4:-1] = model.config.audio_config.audio_token_id
    sound = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given |= {"audio_input_features": sound, "audio_embed_sizes": torch.tensor([3, 3]), "use_cache": False}
    plan = planned(model, hidden_size=24, intermediate_size=31)
    student = apply_plan(model, plan)
    with float64_throughout(), torch.no_grad():
        with masked_units(model, plan):
            expected = model(**given).logits
        torch.testing.assert_close(student(**given).logits, expected, rtol=1e-10, atol=1e-10)
        other = student(**{**given, "audio_input_features": sound.flip(0)}).logits
        assert not torch.allclose(other, expected)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker"])
def test_layers_that_images_are_added_to_stay(name: str):
    config = copy.deepcopy(CONFIGS[name])
    config.vision_config.deepstack_visual_indexes = [0, 1]
    for layer in (0, 1):
        with pytest.raises(PlanError, match=rf"layers? .*{layer}.*stay"):
            make_plan(config, PrunerConfig(layers_to_drop=[layer]))
    assert student_config(config, PrunerConfig(num_hidden_layers=3)).text_config.num_hidden_layers == 3


def test_layers_that_the_config_numbers_stay_with_all_before_them():
    config = copy.deepcopy(CONFIGS["granite4_vision"])
    config.deepstack_layer_map, config.spatial_target_layers = [(0, 2)], [0, 1, 0, 1]
    with pytest.raises(PlanError, match=r"layers? .*1.*stay"):
        make_plan(config, PrunerConfig(layers_to_drop=[1]))
    assert student_config(config, PrunerConfig(layers_to_drop=[3])).text_config.num_hidden_layers == 4


@pytest.mark.parametrize("tied", [False, True])
def test_ties_are_read_from_the_config_of_the_whole_model(tied: bool):
    """That of the language model inside Qwen2-VL has no field for it."""
    config = copy.deepcopy(CONFIGS["qwen2_vl"])
    config.tie_word_embeddings = tied
    del config.text_config.tie_word_embeddings
    student = get_peft_model(filled(config, torch.float32), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(UnsupportedModelError, match="are one matrix") if tied else contextlib.nullcontext():
        refuse_split_tie(student)


@pytest.mark.parametrize("name", EACH)
def test_rows_of_a_batch_with_images_have_the_logits_of_the_whole_model(name: str):
    """As calibration and evaluation compute them; the inputs of images are found by the forward pass alone."""
    model, given = wrapped(name), inputs(name, image=True)
    if not WRAPPERS[name].num_tokens:
        pytest.skip("no images here")
    found = image_inputs({**given, "labels": given["input_ids"], "name": "of the batch"}, model)
    assert set(given) - set(found) <= {"input_ids", "mm_token_type_ids"}  # not all models take the latter
    with float64_throughout(), torch.no_grad():
        output = run_backbone(model, {"input_ids": given["input_ids"], **found})
        rows = torch.stack([output.logits(row) for row in range(len(given["input_ids"]))])
        trained = backbone_output(model, **given, use_cache=False).last_hidden_state
        assert torch.equal(trained, output.states_BTH)
    torch.testing.assert_close(rows, logits(name, model, image=True), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", EACH)
def test_targets_and_recommendations_count_the_whole_model(name: str):
    """The parts beside the language model are parameters of the student too."""
    config = CONFIGS[name]
    counts = parameter_counts(config)
    share = counts["num_language_model_parameters"] / counts["num_parameters"]
    target = 1 - 0.1 * share  # a tenth of the language model
    limit = target * counts["num_parameters"]
    for shape in shapes_near_target(config, PrunerConfig(target_parameters=target, multiple_of=1), tolerance=0.2):
        count = models.count_parameters(student_config(config, shape.request))
        assert shape.num_parameters == count <= limit
    [*_, last] = recommend(config, target).rounds
    assert last.num_parameters == models.count_parameters(student_config(config, last.request))


@pytest.mark.parametrize("name", EACH)
def test_the_loss_reads_the_same_hidden_states_with_an_image(name: str):
    model = wrapped(name)
    given = inputs(name, WRAPPERS[name].num_tokens > 0)
    with torch.no_grad(), float64_throughout():
        hidden = backbone_output(model, **given, use_cache=False).last_hidden_state
        found, expected = head_logits(hidden, output_head(model)), model(**given, use_cache=False).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", EACH)
def test_the_loss_knows_the_head_of_a_wrapped_language_model(name: str):
    model = wrapped(name, torch.float32)
    text = model.config.get_text_config()
    if hasattr(text, "final_logit_softcapping"):
        text.final_logit_softcapping = 1.5
    check_output_head(model)


@pytest.mark.parametrize("name", EACH)
def test_the_share_of_the_language_model_is_counted(name: str):
    config = CONFIGS[name]
    counts = parameter_counts(config)
    model = models.empty_model(config)
    inside = spec_for(config).layers_path.rpartition(".")[0]
    parts = model.get_submodule(inside).named_parameters()
    own = {id(one): one.numel() for path, one in parts if not path.startswith("embed_tokens_extend.")}  # of towers
    head = [one for path, one in model.named_parameters() if path.endswith("lm_head.weight")]
    own |= {id(one): one.numel() for one in head}
    assert counts["num_language_model_parameters"] == sum(own.values()) < counts["num_parameters"]
    assert counts["num_parameters"] == models.count_parameters(config)


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
