"""Stacked experts of the stock classes, watched: the output stays the same, and what is reported adds up to it."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from minitron_hf.errors import UnsupportedModelError
from minitron_hf.families import spec_for
from minitron_hf.scoring.experts import RoutedActivations, is_stored_transposed, observed_experts
from pocket import POCKETS

TOKENS, EXPERTS, NEURONS, HIDDEN = 11, 5, 6, 8

#: What sets a class of experts apart → its model type, class and config. Between them they use all that the interface
#: lets them state: gates or none, their own gates, biases, transposed weights, interleaved halves, norms of outputs.
STATED = {
    "gated": ("mixtral", "MixtralExperts", {"num_local_experts": EXPERTS, "intermediate_size": NEURONS}),
    "plain": ("nemotron_h", "NemotronHExperts", {"n_routed_experts": EXPERTS, "moe_intermediate_size": NEURONS}),
    "transposed, interleaved, biased, own gate": (
        "gpt_oss",
        "GptOssExperts",
        {"num_local_experts": EXPERTS, "intermediate_size": NEURONS},
    ),
    "normalised": (
        "muse_spark_text",
        "MuseSparkExperts",
        {
            "num_local_experts": EXPERTS,
            "moe_intermediate_size": NEURONS,
            "moe_hidden_size": HIDDEN,
            "num_attention_heads": 2,
        },
    ),
    "own gate": ("deepseek_v4", "DeepseekV4Experts", {"n_routed_experts": EXPERTS, "moe_intermediate_size": NEURONS}),
}
#: Classes that compute their experts themselves, whatever the config says.
UNSTATED = {
    "sorted": ("llama4_text", "Llama4TextExperts", {"num_local_experts": EXPERTS, "intermediate_size": NEURONS}),
    "identities": (
        "longcat_flash",
        "LongcatFlashExperts",
        {"n_routed_experts": EXPERTS, "expert_ffn_hidden_size": NEURONS, "zero_expert_num": 2},
    ),
}
ALL = {**STATED, **UNSTATED}


def experts(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A stock module of 5 experts with 6 neurons and random weights."""
    model_type, name, sizes = ALL[kind]
    config = AutoConfig.for_model(model_type, hidden_size=HIDDEN, **sizes)
    config._experts_implementation = "eager"
    package = model_type.removesuffix("_text")
    module = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return module


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    index = torch.rand(TOKENS, EXPERTS - 1, generator=generator).argsort(1)[:, :2]  # no token goes to the last
    weights = torch.rand(TOKENS, 2, generator=generator).to(dtype)
    if kind == "sorted":
        gates = torch.zeros(TOKENS, EXPERTS, dtype=dtype).scatter(1, index, weights)
        return ((gates.T[..., None] * hidden).reshape(-1, HIDDEN),)
    return hidden, index, weights


class Reports(list):
    def __call__(self, expert: int, seen: RoutedActivations) -> None:
        self.append((expert, seen.token_n, seen.inner_nF * seen.weight_n1, seen.output_nH))

    def total(self) -> torch.Tensor:
        total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        for _, tokens, _, output in self:
            total.index_add_(0, tokens, output.double())
        return total


@torch.no_grad()
def watch(module: nn.Module, kind: str, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Reports]:
    reports = Reports()
    with observed_experts({module: reports}, transposed=kind == "sorted"):
        return module(*arguments), reports


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_and_the_sum_of_the_reports(kind: str):
    module, arguments = experts(kind), inputs(kind)
    expected = module(*arguments)
    output, reports = watch(module, kind, arguments)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    total = expected.view(EXPERTS, TOKENS, HIDDEN).sum(0) if kind == "sorted" else expected
    torch.testing.assert_close(reports.total(), total, rtol=1e-12, atol=1e-12)
    assert total.std() > 0.01
    assert [expert for expert, *_ in reports] == list(range(EXPERTS if kind == "sorted" else EXPERTS - 1))
    assert {inner.shape[1] for *_, inner, _ in reports} == {NEURONS}


@pytest.mark.parametrize("kind", sorted({*ALL} - {"normalised"}))
def test_neurons_are_what_the_down_projection_is_given(kind: str):
    """Dropping a neuron's row or column of the down projection takes exactly its reported activation away."""
    module, arguments = experts(kind), inputs(kind)
    output, reports = watch(module, kind, arguments)
    transposed = kind == "sorted" or getattr(module, "is_transposed", False)
    for expert, tokens, inner, _ in reports:
        for neuron in (0, NEURONS - 1):
            without = copy.deepcopy(module)
            with torch.no_grad():
                weights = without.down_proj[expert]
                column = (weights[neuron] if transposed else weights[:, neuron]).clone()
                (weights[neuron] if transposed else weights[:, neuron]).zero_()
                change = output - without(*arguments)
            if kind == "sorted":
                change = change.view(EXPERTS, TOKENS, HIDDEN)[expert]
            torch.testing.assert_close(change[tokens], inner[:, neuron, None] * column, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", STATED)
def test_an_index_beyond_the_experts_is_none_of_them(kind: str):
    """Where experts are spread over devices, those elsewhere are numbered past the last one here."""
    module, (hidden, index, weights) = experts(kind), inputs(kind)
    index[2, 0] = EXPERTS
    module._is_expert_parallel = True
    expected = batched_mm_experts_forward(module, hidden, index, weights)
    output, reports = watch(module, kind, (hidden, index, weights))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert max(expert for expert, *_ in reports) < EXPERTS


def test_identities_are_left_out():
    module, (hidden, index, weights) = experts("identities"), inputs("identities")
    index[3, 1] = EXPERTS + 1
    output, reports = watch(module, "identities", (hidden, index, weights))
    change = output - reports.total()
    torch.testing.assert_close(change[3], hidden[3] * weights[3, 1], rtol=1e-12, atol=1e-12)
    change[3] = 0
    assert change.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ALL)
def test_half_precision(kind: str):
    module, arguments = experts(kind, torch.bfloat16), inputs(kind, torch.bfloat16)
    output, reports = watch(module, kind, arguments)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, module(*arguments), rtol=0.03, atol=0.1)
    assert len(reports) >= EXPERTS - 1


@pytest.mark.parametrize("kind", ALL)
def test_modules_and_settings_are_left_as_they_were(kind: str):
    module = experts(kind)
    known = list(ALL_EXPERTS_FUNCTIONS)
    if kind in STATED:
        module.config._experts_implementation = "batched_mm"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), observed_experts({module: stop}, kind == "sorted"):
        module(*inputs(kind))
    assert list(ALL_EXPERTS_FUNCTIONS) == known
    assert not module._forward_hooks
    if kind in STATED:
        assert module.config._experts_implementation == "batched_mm"


def test_only_the_modules_named_are_watched():
    """Experts share their config with those of other layers."""
    one, other = experts("gated"), experts("gated")
    other.config = one.config
    reports = Reports()
    with observed_experts({one: reports}, False):
        torch.testing.assert_close(other(*inputs("gated")), one(*inputs("gated")), rtol=1e-12, atol=1e-12)
    assert len(reports) == EXPERTS - 1


@pytest.mark.parametrize("kind", UNSTATED)
def test_experts_that_compute_something_else_are_refused(kind: str):
    module = experts(kind)
    module.act_fn = nn.Identity()
    reference = copy.deepcopy(module)
    module.forward = lambda *arguments: reference.forward(*arguments) * 1.1
    with pytest.raises(UnsupportedModelError, match=f"{type(module).__name__} do not compute what their weights"):
        watch(module, kind, inputs(kind))


def test_the_table_says_how_weights_are_stored():
    assert not is_stored_transposed(spec_for(POCKETS["mixtral"].config), "mlp.experts")
