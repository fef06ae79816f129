"""Family tables: they cover the stock models, and refuse by name what they do not describe."""

from __future__ import annotations

import re
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from minitron_hf.errors import UnsupportedModelError
from minitron_hf.families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, families, named_tensors, spec_for
from minitron_hf.families.axes import dimension_axes
from minitron_hf.families.base import layer_tables, linear, norm
from minitron_hf.models import empty_model
from pocket import POCKETS, pocket_config, pocket_model

NAMES = list(POCKETS)
SPECS = [layout for spec in families().values() for layout in spec.layouts()]

#: Full size: the stock defaults are those of a published model of the family, here with its options.
PUBLISHED = [
    LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
    LlamaConfig(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    MistralConfig(hidden_size=5120, num_hidden_layers=40, head_dim=128, vocab_size=131072),
    Qwen2Config(tie_word_embeddings=True),
    Qwen3Config(num_key_value_heads=8, attention_bias=True),
    GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    GPTNeoXConfig(),
    GPTNeoXConfig(attention_bias=False, tie_word_embeddings=True),
    Phi3Config(),
]
for _model_type in {pocket.config.model_type: None for pocket in POCKETS.values()}:
    if _model_type not in {config.model_type for config in PUBLISHED}:
        _own = [pocket.published for pocket in POCKETS.values() if pocket.config.model_type == _model_type]
        PUBLISHED += [AutoConfig.for_model(_model_type, **published) for published in filter(None, _own)] or [
            AutoConfig.for_model(_model_type)
        ]


def test_every_family_has_a_pocket_model_and_a_published_one():
    assert {POCKETS[name].config.model_type for name in NAMES} == families().keys()
    assert {config.model_type for config in PUBLISHED} == families().keys()
    used = [spec_for(pocket.config) for pocket in POCKETS.values()]
    assert all(any(layout is spec for spec in used) for layout in SPECS)


@pytest.mark.parametrize("name", NAMES)
def test_pocket_sizes_are_distinct(name: str):
    """Else a wrong axis could pass by coincidence."""
    config = POCKETS[name].config
    sizes = spec_for(config).sizes(config)
    coupled = {sizes["hidden"], sizes["heads"] * sizes["head_dim"]} if POCKETS[name].coupled else set()
    for axis in [axis for axis in spec_for(config).axes if axis.implied in sizes and not axis.fields]:
        sizes.pop(axis.name)  # always equal
    products = [sizes[axis] * sizes["head_dim"] for axis in ("heads", "kv") if axis in sizes]
    products += [sizes["ssm_heads"] * sizes["ssm_dim"]] if "ssm_dim" in sizes else []
    products += [2 * sizes[axis] for axis in ("ffn", "moe_ffn", "shared_ffn") if axis in sizes]
    distinct = [*sizes.values(), *(product for product in products if product not in coupled | {0})]
    assert len(set(distinct)) == len(distinct), sizes


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_table_covers_the_pocket_model(name: str):
    """Every parameter claimed once with its shape, and nothing claimed that no variant of the family has."""
    for changes in POCKETS[name].variants:
        variant = empty_model(pocket_config(name, **changes))
        spec_for(variant.config).check(variant)
    model = pocket_model(name)
    spec = spec_for(model.config)
    spec.check(model)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        pattern, layer = spec.locate(path)
        assert spec.shape(pattern, spec.sizes(model.config, layer)) == parameter.shape
        assert (spec.layer_parameter(layer, pattern) if layer is not None else pattern) == path


@pytest.mark.sampled(3)
@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config.model_type)
def test_table_covers_the_published_size(config: PretrainedConfig):
    spec_for(config).check(empty_model(config))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_type)
def test_every_weight_in_a_table_exists(spec: ArchSpec):
    """A table holds no names that the family never uses; biases depend on the variant."""
    used: set[str] = set()
    for name in NAMES:
        for changes in ({}, *POCKETS[name].variants):
            config = pocket_config(name, **changes)
            if spec_for(config) is spec:
                used |= {spec.locate(path)[0] for path in named_tensors(empty_model(config), tied=True)}
    unused = {pattern for pattern in spec.dimensions if pattern not in used}
    assert all(pattern.endswith(".bias") for pattern in unused), unused


# Tables are consistent


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_type)
def test_tables_hold_together(spec: ArchSpec):
    assert len(spec.axis) == len(spec.axes)
    for pattern, dimensions in spec.dimensions.items():
        for dimension in dimensions:
            assert dimension_axes(dimension) <= spec.axis.keys(), pattern
    assert set(spec.gated_norms.values()) <= spec.axis.keys()
    assert all(f"{module}.weight" in spec.layer for module in spec.gated_norms)
    assert all(axis in spec.hook_points and f"{module}.weight" in spec.layer for axis, module in spec.readers)
    for axis, module in spec.hook_points.items():
        assert spec.axis[axis].per_layer
        assert f"{module}.weight" in spec.layer or any(name.startswith(f"{module}.") for name in spec.layer)
    for module in spec.layer_norms:
        assert spec.layer.get(f"{module}.weight", "hidden") == "hidden"  # some have no weight
    assert spec.outer.get(f"{spec.final_norm}.weight", "hidden") == "hidden"
    for name, _, variant in spec.variants:
        assert variant.model_type == spec.model_type, name
    for inner, outer in spec.groups:
        assert spec.axis[inner].per_layer
        assert spec.axis[outer].per_layer or not spec.axis[outer].prunable
    assert set(spec.stream.stream_writers) <= spec.dimensions.keys()
    assert bool(spec.stream.stream_writers) == spec.stream.scaled_embeddings
    for axis in spec.axes:
        assert axis.within is None or (axis.per_layer and spec.axis[axis.within].per_layer)
    named = {axis for pair in (*spec.groups, *spec.multiples) for axis in pair} | set(spec.refused)
    assert named <= spec.axis.keys()
    assert {axis for *_, axis, _ in spec.refused_if} <= spec.axis.keys() | {"*"}
    # Whatever can be cut, users can name; whatever is cut in a layer, a tap scores.
    prunable = {axis.name for axis in spec.axes if axis.prunable}
    assert prunable <= FIELD_OF_AXIS.keys()
    assert {axis for axis in prunable if spec.axis[axis].per_layer} == spec.hook_points.keys()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.model_type)
def test_sizes_name_fields_of_the_stock_config(spec: ArchSpec):
    config = next(POCKETS[name].config for name in NAMES if POCKETS[name].config.model_type == spec.model_type)
    for axis in spec.axes:
        for name in axis.fields:
            assert hasattr(config.per_layer_config[0], name) or axis.implied is not None, name
    counted = (
        *spec.leading_layers,
        *spec.layer_rules.trailing_layers,
        *(name for rule in (*spec.layer_rules.sparse_layers, *spec.layer_rules.sparse_ranges) for name in rule),
    )
    derived = (name for name, _ in spec.config_rules.derived_fields)
    refused = (name for name, *_ in (*spec.refused_if, *spec.variants))
    patterns = (name for pair in spec.layer_rules.layer_patterns for name in pair)
    for name in (
        *spec.layer_lists,
        *spec.layer_rules.layer_indices,
        *patterns,
        *counted,
        *refused,
        *derived,
        *spec.config_rules.absent_parts,
    ):
        assert hasattr(config, name.partition(".")[0]), name
    assert PRUNER_FIELDS.keys() == {FIELD_OF_AXIS[axis] for axis in FIELD_OF_AXIS}


def test_a_name_claimed_twice_is_a_mistake():
    with pytest.raises(ValueError, match=r"claimed twice: \['a\.bias', 'a\.weight'\]"):
        layer_tables(linear("a", "ffn", "hidden"), norm("a"))


def test_spec_fields_are_documented():
    documented = re.findall(r"^        (\w+): ", ArchSpec.__doc__ or "", re.MULTILINE)
    assert documented == [field.name for field in fields(ArchSpec)]


# Sizes


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(hidden_size=48, num_attention_heads=4), {"head_dim": 12, "kv": 4}),
        (LlamaConfig(hidden_size=48, num_attention_heads=4, head_dim=6, num_key_value_heads=2), {"head_dim": 6}),
        (Phi3Config(hidden_size=48, num_attention_heads=4), {"head_dim": 12, "kv": 4}),
        (Qwen2Config(hidden_size=48, num_attention_heads=4, num_key_value_heads=None), {"head_dim": 12, "kv": 4}),
        (GPT2Config(n_embd=48, n_head=4), {"head_dim": 12, "ffn": 192, "hidden": 48, "positions": 1024}),
        (GPT2Config(n_embd=48, n_head=4, n_inner=50), {"ffn": 50}),
        (Lfm2Config(intermediate_size=12288), {"ffn": 8192, "conv_dim": 2560}),
        (Lfm2Config(intermediate_size=6656, block_auto_adjust_ff_dim=False), {"ffn": 6656}),
    ],
)  # fmt: skip
def test_implied_sizes(config: PretrainedConfig, expected: dict[str, int]):
    sizes = spec_for(config).sizes(config)
    assert {axis: sizes[axis] for axis in expected} == expected


def test_a_size_that_is_missing_is_named():
    config = SimpleNamespace(**{**pocket_config("llama").to_dict(), "intermediate_size": [52, 52]})
    with pytest.raises(UnsupportedModelError, match=r"intermediate_size=\[52, 52\]; expected an integer"):
        families()["llama"].sizes(config)


# Refusals


def test_unknown_model_types_list_the_known_ones():
    with pytest.raises(UnsupportedModelError) as caught:
        spec_for(BertConfig())
    assert "No family table for model_type 'bert'" in str(caught.value)
    for known in ("gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3"):
        assert known in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_unclaimed_parameters_are_refused_by_name(name: str):
    model = pocket_model(name)
    layers = model.get_submodule(POCKETS[name].layers)
    layers[1].adapter = nn.Linear(3, 2, bias=False)
    model.extra = nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedModelError) as caught:
        spec_for(model.config).check(model)
    assert f"{POCKETS[name].layers}.1.adapter.weight (2, 3) is not in the table" in str(caught.value)
    assert "extra (4,) is not in the table" in str(caught.value)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_shape_is_refused_by_name(name: str):
    model = pocket_model(name)
    spec = spec_for(model.config)
    paths = [path for path, _ in model.named_parameters() if ".0." in path or ".layers." not in path]
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        module = model.get_submodule(parent)
        whole = getattr(module, leaf)
        wrong = torch.zeros(*whole.shape[:-1], whole.shape[-1] + 1)
        setattr(module, leaf, nn.Parameter(wrong))
        with pytest.raises(UnsupportedModelError) as caught:
            spec.check(model)
        assert f"{path} has shape {tuple(wrong.shape)}, expected {tuple(whole.shape)}" in str(caught.value)
        setattr(module, leaf, whole)
    spec.check(model)


def test_swapped_shapes_are_refused():
    """A Conv1D where the table says Linear."""
    model = pocket_model("llama")
    model.model.layers[3].mlp.up_proj.weight = nn.Parameter(model.model.layers[3].mlp.up_proj.weight.T.contiguous())
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight has shape \(36, 52\), expected \(52, 36\)"):
        spec_for(model.config).check(model)


@pytest.mark.parametrize(
    ("name", "change", "missing"),
    [
        ("stablelm", {"use_parallel_residual": True}, "model.layers.4.post_attention_layernorm"),
        ("opt", {"_remove_final_layer_norm": True}, "model.decoder.final_layer_norm"),
    ],
)
def test_layouts_without_an_observed_module_are_refused(name: str, change: dict, missing: str):
    model = pocket_model(name, **change)
    with pytest.raises(UnsupportedModelError, match=f"{re.escape(missing)} is missing"):
        spec_for(model.config).check(model)


def test_saved_buffers_are_refused():
    model = pocket_model("llama")
    model.model.register_buffer("statistics", torch.zeros(2))
    model.model.register_buffer("scratch", torch.zeros(2), persistent=False)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.statistics \(2,\) \(a saved buffer\) is not in the table"
    ) as caught:
        spec_for(model.config).check(model)
    assert "scratch" not in str(caught.value)


@pytest.mark.parametrize("other", [LlamaModel, LlamaForSequenceClassification])
def test_models_without_a_language_head_are_refused(other: type):
    model = other(pocket_config("llama"))
    with pytest.raises(UnsupportedModelError, match=f"This {other.__name__} is not what the family table 'llama'"):
        spec_for(model.config).check(model)


def test_long_lists_of_problems_are_shortened():
    model = pocket_model("llama")
    model.config.intermediate_size = 51
    with pytest.raises(UnsupportedModelError, match="… and 7 more"):
        spec_for(model.config).check(model)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [-1, 1], ids=["too few", "too many"])
def test_depth_that_disagrees_with_the_config_is_refused(name: str, change: int):
    """Also where a layer is merely used twice."""
    model = pocket_model(name)
    spec = spec_for(model.config)
    layers = model.get_submodule(POCKETS[name].layers)
    depth = len(layers)
    if change < 0:
        del layers[1]
    else:
        layers.append(layers[0])
    with pytest.raises(UnsupportedModelError, match=rf"holds {depth + change} layers, expected {depth}"):
        spec.check(model)
