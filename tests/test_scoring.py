"""What the hooks make of tables that the families of today do not all need: axes inside others, pieces of an input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from minitron_hf.errors import UnsupportedModelError
from minitron_hf.families import ArchSpec, spec_for
from minitron_hf.families.axes import Axis
from minitron_hf.scoring.activations import ActivationPass
from pocket import float64_throughout, pocket_model, pocket_tokens

TOKENS = pocket_tokens(3, 8)


def changed_spec(model: nn.Module, heads: str, axes: tuple[Axis, ...], hook_points: dict[str, str]) -> ArchSpec:
    """Llama's table with other axes in the place of its query heads and their dimensions."""
    spec = spec_for(model.config)
    layer = {
        name: dimensions.replace("heads*head_dim", heads) if name.split(".")[1] in ("q_proj", "o_proj") else dimensions
        for name, dimensions in spec.layer.items()
    }
    kept = tuple(axis for axis in spec.axes if axis.name not in {axis.name for axis in axes})
    return replace(spec, axes=(*kept, *axes), layer=layer, hook_points=hook_points, groups=())


def scores_of(spec: ArchSpec, model: nn.Module) -> dict[str, torch.Tensor]:
    """Σ over rows and tokens, per layer."""
    spec.check(model)
    pass_ = ActivationPass(spec, model, "mean")
    with torch.no_grad(), float64_throughout(), pass_.hooks():
        pass_.run({"input_ids": TOKENS})
        return pass_.axis_scores("mean")


def mixed_values(model: nn.Module) -> torch.Tensor:
    """Inputs of the attention's output projection, [layers, rows, tokens, 120]."""
    caught = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad(), float64_throughout():
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    return torch.stack(caught)


def test_units_inside_units():
    """Heads of a state-space layer, and the dimensions of every one of them, are read off one projection."""
    model = pocket_model("llama")
    axes = (
        Axis("ssm_heads", ("num_attention_heads",), per_layer=True),
        Axis("ssm_dim", ("head_dim",), per_layer=True, within="ssm_heads"),
    )
    tap = "self_attn.o_proj"
    spec = changed_spec(model, "ssm_heads*ssm_dim", axes, {"ssm_heads": tap, "ssm_dim": tap})
    found = scores_of(spec, model)
    values = mixed_values(model).unflatten(-1, (12, 10))
    torch.testing.assert_close(found["ssm_heads"], values.norm(dim=-1).mean((1, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(found["ssm_dim"], values.abs().mean((1, 2)), rtol=1e-12, atol=0)
    assert found["ssm_dim"].shape == (5, 12, 10)


def test_pieces_of_an_input():
    """A projection may read several things side by side; groups of one of them have contributions of their own."""
    model = pocket_model("llama")
    model.config.num_left, model.config.num_right = 3, 9
    axes = (Axis("left", ("num_left",), per_layer=True), Axis("right", ("num_right",), per_layer=True))
    hook_points = dict.fromkeys(("left", "right", "kv"), "self_attn.o_proj")
    spec = changed_spec(model, "left*head_dim+right*head_dim", axes, hook_points)
    found = scores_of(replace(spec, groups=(("right", "kv"),)), model)
    values = mixed_values(model)
    heads = values.unflatten(-1, (12, 10)).norm(dim=-1).mean((1, 2))
    torch.testing.assert_close(found["left"], heads[:, :3], rtol=1e-12, atol=0)
    torch.testing.assert_close(found["right"], heads[:, 3:], rtol=1e-12, atol=0)
    for layer, block in enumerate(model.model.layers):
        for group in range(3):
            columns = slice(30 + 30 * group, 60 + 30 * group)
            contribution = values[layer][..., columns] @ block.self_attn.o_proj.weight[:, columns].T
            expected = contribution.norm(dim=-1).mean()
            torch.testing.assert_close(found["kv"][layer, group], expected, rtol=1e-12, atol=0)


def test_modules_may_be_called_by_keyword():
    model = pocket_model("llama")
    spec = spec_for(model.config)
    expected = scores_of(spec, model)
    for layer in model.model.layers:
        mlp, block = layer.mlp, layer.forward
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(input=mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        layer.forward = lambda hidden_states, block=block, **kwargs: block(hidden_states=hidden_states, **kwargs)
    found = scores_of(spec, model)
    for axis in expected:
        torch.testing.assert_close(found[axis], expected[axis], rtol=1e-12, atol=0)


def test_hook_points_that_are_not_called_are_named():
    """A fused kernel that takes a projection's weight leaves nothing to observe: no score is better than zeros."""
    model = pocket_model("llama")
    mlp = model.model.layers[3].mlp
    mlp.forward = lambda x: nn.functional.linear(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    with pytest.raises(UnsupportedModelError, match=r"did not call model\.layers\.3\.mlp\.down_proj, where"):
        scores_of(spec_for(model.config), model)
