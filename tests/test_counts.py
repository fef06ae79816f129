"""Counts of the parameters that one token uses, against what the routers of the stock models hand on."""

from __future__ import annotations

import pytest
import torch

from minitron_hf.families import spec_for
from minitron_hf.models import count_parameters
from minitron_hf.sizes.counts import count_active_parameters
from pocket import POCKETS, pocket_model, pocket_tokens


def used_parameters(model) -> int:
    """All parameters but those of experts that a token is not routed to: the routers' choices are counted."""
    spec = spec_for(model.config)
    module = spec.hook_points["experts"]
    chosen: dict[str, int] = {}
    handles = [
        part.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: chosen.update({name: (*args, *kwargs.values())[1].shape[-1]}),
            with_kwargs=True,
        )
        for name, part in model.named_modules()
        if name.endswith(f".{module}")
    ]
    with torch.no_grad():
        model(pocket_tokens(4)[None])
    for handle in handles:
        handle.remove()
    assert chosen
    unused = 0
    for name, count in chosen.items():
        for tensor in model.get_submodule(name).parameters():
            unused += tensor.numel() // len(tensor) * (len(tensor) - count)
    return sum(parameter.numel() for parameter in model.parameters()) - unused


#: These routers hand something else to the experts than the chosen indices.
OTHER_ROUTERS = ("llama4_text",)
MIXTURES = [name for name in POCKETS if "experts" in spec_for(POCKETS[name].config).axis and name not in OTHER_ROUTERS]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_uses_the_experts_that_its_routers_choose(family):
    model = pocket_model(family, dtype=torch.float32)
    assert count_active_parameters(model) == count_active_parameters(model.config) == used_parameters(model)
    assert count_active_parameters(model) < count_parameters(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba2"])
def test_a_token_uses_all_parameters_of_a_dense_model(family):
    config = pocket_model(family, dtype=torch.float32).config
    assert count_active_parameters(config) == count_parameters(config)


def test_llama4_uses_some_routed_experts_of_each_layer():
    model = pocket_model("llama4_text", dtype=torch.float32)
    routed = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    per_expert = sum(parameter[0].numel() for parameter in routed)
    unused = sum(map(torch.numel, routed)) - model.config.num_experts_per_tok * per_expert
    assert 0 < unused == count_parameters(model) - count_active_parameters(model)
