"""Formulas of what computing a model costs: floating-point operations of a token, bytes of a training step.

A product of [a, b] and [b, c] counts 2·a·b·c operations. Element-wise operations, scans of state-space layers and
convolutions over time are not counted: they take time by the memory that they move.

Legend: T tokens of a row, V vocabulary, H hidden size, P parameters of a model, S optimiser steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..families import named_tensors, spec_for, text_config
from ..families.axes import dimension_size
from ..models import count_parameters, empty_model
from ..pruning.repair import input_groups, probed_inputs
from ..pruning.repair_solve import RIDGES
from ..pruning.repair_sums import HELD_OUT_EVERY
from ..scoring.activations import head_groups
from ..scoring.hook_points import UnitView, holds_stacked_experts, norm_paths
from ..sizes.counts import active_share

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..distillation.config import DistillationConfig
    from ..pruning.repair_inputs import CutInputs

#: Bytes that AdamW moves per parameter in a step: it reads weight, gradient and two moments and writes three of them.
OPTIMIZER_TRAFFIC = 28
#: Bytes per parameter of a checkpoint to resume from: float32 weights and two moments; and of the moments alone.
CHECKPOINT_BYTES, MOMENT_BYTES = 12, 8
#: Bytes that scores by gradients move per observed number of 2 bytes: they multiply, mask and sum in float32; and per
#: number of a state and pair of layers, whose difference they take first.
GRADIENT_TERM_TRAFFIC, BLOCK_TERM_TRAFFIC = 36, 42
#: Bytes that the comparison of the inputs of all layers moves per number.
SIMILARITY_TRAFFIC = 16
#: Bytes that adding a product of inputs to its sum moves per number: both in float32 and float64, and the sum again.
SUM_TRAFFIC = 24
#: Bytes that the loss moves per token and entry of the vocabulary, softmaxes of both models and their gradient.
LOSS_TRAFFIC = 40


def layer_flops(config: PretrainedConfig, length: int) -> float:
    """Operations per token of a forward pass without the head: 2 × (active matrix parameters) + attention.

    Attention of a layer over full rows is 2·T·(query width + value width): the scores, and their product with the
    values. The upper triangle is counted too, as kernels without a mask structure compute it, and counters count it.
    Of stacked experts, as many are active as a token is routed to.

    Args:
        config: the model's config.
        length: T.
    """
    model = empty_model(config)
    spec = spec_for(config)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    skipped = tables if head is None else tables | {id(parameter) for parameter in head.parameters()}
    tensors = named_tensors(model)
    products = 0.0
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or id(tensor) in skipped:
            continue
        products += tensor.numel() * active_share(spec, config, name, tensor.shape)
    layers = spec.layers_with("heads", list(tensors)) if "heads" in spec.axis else ()
    return 2 * products + sum(_attention_flops(config, layer, length) for layer in layers)


def head_flops(config: PretrainedConfig) -> float:
    """Operations per token of the output head: 2·H·V."""
    text = text_config(config)
    return 2.0 * text.hidden_size * text.vocab_size


def training_flops(student: PretrainedConfig, length: int, *, recomputed: bool = False, lora: bool = False) -> float:
    """Operations per token of the student's passes without the head: forward, and twice as much backward.

    Args:
        student: the student's config.
        length: T.
        recomputed: whether activations are computed anew in the backward pass.
        lora: whether only an adapter is trained, so that weights need no gradient.
    """
    return layer_flops(student, length) * (1 + (1 if lora else 2) + (1 if recomputed else 0))


def loss_flops(teacher: PretrainedConfig | None, student: PretrainedConfig, *, trains_head: bool = True) -> float:
    """Operations per token of both heads: logits of both, and the gradients of the student's states and head.

    Args:
        teacher: the teacher's config; None reads its logits from a cache.
        student: the student's config.
        trains_head: whether the student's head gets a gradient.
    """
    own = head_flops(student) * (3 if trains_head else 2)
    return own + (0 if teacher is None else head_flops(teacher))


def group_flops(config: PretrainedConfig) -> float:
    """Operations of scoring once for the weights that groups of heads write with: 2·H·D²/U for U groups."""
    return sum(2.0 * text_config(config).hidden_size * units * inner**2 for units, inner in head_groups(config))


def similarity_flops(config: PretrainedConfig) -> float:
    """Operations per token that compare the inputs of all layers and the last output: 2·(L + 1)²·H."""
    return 2.0 * (spec_for(config).sizes(config)["layers"] + 1) ** 2 * text_config(config).hidden_size


def similarity_bytes(config: PretrainedConfig) -> float:
    """Bytes per token that this moves."""
    return SIMILARITY_TRAFFIC * (spec_for(config).sizes(config)["layers"] + 1) * text_config(config).hidden_size


def gradient_score_bytes(config: PretrainedConfig) -> float:
    """Bytes per token that scores by gradients move: terms of all observed numbers, and of all pairs of layers."""
    spec, model = spec_for(config), empty_model(config)
    names, modules = list(named_tensors(model, tied=True)), dict(model.named_modules())
    depth, width = spec.sizes(config)["layers"], text_config(config).hidden_size
    observed = width * sum(1 for _ in norm_paths(spec, modules, depth))
    for axis, module in spec.hook_points.items():
        for layer in () if holds_stacked_experts(spec, module) else spec.layers_with(axis, names):
            sizes = spec.sizes(config, layer)
            position = UnitView(spec, axis, module, sizes).position
            observed += dimension_size(spec.dimensions[f"{module}.weight"][position], sizes)
    return GRADIENT_TERM_TRAFFIC * observed + BLOCK_TERM_TRAFFIC * width * depth * (depth + 1) / 2


@dataclass(frozen=True)
class RepairCost:
    """What a repair computes.

    Attributes:
        passes: forward passes of the teacher over the calibration data, as a share of its layers each.
        products: operations of the products of inputs, in the dtype of the sums of a batch.
        solutions: operations in float64: factors, right-hand sides, solutions, errors on held-out rows.
        sum_bytes: bytes that adding the products of a batch to the sums moves.
    """

    passes: float
    products: float
    solutions: float
    sum_bytes: float


def repair_cost(
    teacher: PretrainedConfig, cuts: Sequence[CutInputs], *, num_tokens: int, num_batches: int, memory_limit: float
) -> RepairCost:
    """What a repair that chooses its ridge computes, from the list of its inputs (`expected_cut_inputs`).

    With K inputs that stay, R that are made up for, G channels of dropped layers and H outputs, an input takes
    2·N·K·(K + R + G) operations for its products, 2·K³/3 for factors, and 2·K·(K + R)·H for the solution of every
    projection. Of the inputs that choose the ridge, every fourth row is multiplied once more, and each of the ridges
    takes 2·K³/3 + 4·K·(K + R)·H. Where the sums need several passes, these inputs have passes of their own before.
    An expert is counted as if all tokens were given to it, at most.

    Args:
        teacher: its config.
        cuts: the inputs, in the order of the layers.
        num_tokens: N of the calibration data.
        num_batches: its batches.
        memory_limit: bytes of the sums of one pass.
    """
    weights = named_tensors(empty_model(teacher))
    depth = spec_for(teacher).sizes(teacher)["layers"]
    groups, probes = list(input_groups(cuts, memory_limit)), probed_inputs(cuts)
    probed_apart = list(input_groups(probes, memory_limit / 2)) if len(groups) > 1 else []
    held_out = num_tokens / HELD_OUT_EVERY
    passes = sum(_share_of_pass(teacher, group[-1], depth) for group in [*groups, *probed_apart])
    work = RepairCost(passes, 0.0, 0.0, 0.0)
    for cut in cuts:
        kept, rest = len(cut.kept_K), len(cut.rest_R)
        outputs = [weights[one.name].shape[-2:][1 - one.position] for one in cut.projections]
        kinds = len({f"{one.path}.bias" in weights for one in cut.projections})  # factored apart
        fit = 2 * kept * (kept + rest)
        rows = float(num_tokens)
        solved = kinds * 2 * kept**3 / 3 + fit * sum(outputs)
        times_added = num_batches
        if cut in probes:
            rows += held_out + (num_tokens if probed_apart else 0)
            solved += len(RIDGES) * (2 * kept**3 / 3 + 2 * fit * outputs[0])
            times_added += num_batches * (2 if probed_apart else 1)
        work = RepairCost(
            passes,
            work.products + 2 * kept * cut.width * rows,
            work.solutions + solved,
            work.sum_bytes + SUM_TRAFFIC * kept * cut.width * times_added,
        )
    return work


def sequential_cost(
    student: PretrainedConfig, writers: Sequence[CutInputs], *, num_tokens: int, num_batches: int
) -> RepairCost:
    """What a sequential repair computes, from the list of its projections (`expected_writers`).

    Each of the student's layers runs once for each of its projections that is fitted, and once more. A projection
    takes 2·N·K·(K + H) operations for its products, every fourth row of which are held out and multiplied once more,
    2·K³/3 + 2·K²·H to solve, and 2·K³/3 + 4·K²·H for each of the ridges.

    Args:
        student: its config.
        writers: the projections.
        num_tokens: N of the calibration data.
        num_batches: its batches.

    Returns:
        The cost; `passes` are those of the student. The teacher's layers run once beside them.
    """
    depth = spec_for(student).sizes(student)["layers"]
    work = RepairCost(1 + len(writers) / depth, 0.0, 0.0, 0.0)
    for cut in writers:
        kept, outputs = len(cut.kept_K), cut.width - len(cut.kept_K)
        ridges = len(RIDGES) * (2 * kept**3 / 3 + 4 * kept**2 * outputs)
        work = RepairCost(
            work.passes,
            work.products + 2 * kept * cut.width * num_tokens * (1 + 1 / HELD_OUT_EVERY),
            work.solutions + 2 * kept**3 / 3 + 2 * kept**2 * outputs + ridges,
            work.sum_bytes + SUM_TRAFFIC * kept * cut.width * num_batches * 2,
        )
    return work


def _share_of_pass(config: PretrainedConfig, last: CutInputs, depth: int) -> float:
    """Share of the layers that a pass computes which ends at some inputs."""
    if last.expert is not None:
        return (last.expert.layer + 1) / depth
    if last.gap is not None:
        return (last.gap.last + 1) / depth
    located = spec_for(config).locate(f"{last.path}.weight")
    layer = None if located is None else located[1]
    return 1.0 if layer is None else (layer + 1) / depth


def decode_bytes(config: PretrainedConfig, itemsize: int) -> float:
    """Bytes that decoding one token reads: every active weight, embeddings other than the head's aside."""
    return itemsize * (layer_flops(config, 0) + head_flops(config)) / 2


def cache_bytes(config: PretrainedConfig, itemsize: int) -> float:
    """Bytes of the keys and values of a token in all layers; sliding windows are counted whole."""
    model = empty_model(config)
    spec, text = spec_for(config), text_config(config)
    if "heads" not in spec.axis:
        return 0.0
    total = 0
    for layer in spec.layers_with("heads", list(named_tensors(model))):
        sizes = spec.sizes(config, layer)
        width = sizes.get("head_dim") or text.hidden_size // sizes["heads"]
        total += 2 * sizes.get("kv", sizes["heads"]) * width
    return float(itemsize * total)


def optimizer_bytes(num_parameters: int) -> int:
    """Bytes that a step of AdamW moves: `OPTIMIZER_TRAFFIC`·P."""
    return OPTIMIZER_TRAFFIC * num_parameters


def checkpoint_bytes(num_parameters: int, num_frozen: int = 0) -> int:
    """Bytes of a checkpoint to resume from: `CHECKPOINT_BYTES`·P; of frozen parameters, the weights alone."""
    return CHECKPOINT_BYTES * num_parameters - MOMENT_BYTES * num_frozen


def training_checkpoint_bytes(student: PretrainedConfig, args: DistillationConfig, *, has_adapter: bool) -> int:
    """Bytes of a checkpoint of distillation; 0 of an adapter, which is small beside the student."""
    size = count_parameters(student)
    if has_adapter:
        return 0
    if args.save_only_model:
        return 4 * size
    return checkpoint_bytes(size, size - count_parameters(student, embeddings=False) if args.freeze_embeddings else 0)


def _attention_flops(config: PretrainedConfig, layer: int, length: int) -> float:
    sizes, text = spec_for(config).sizes(config, layer), text_config(config)
    default = sizes.get("head_dim") or text.hidden_size // sizes["heads"]
    query = getattr(text, "qk_head_dim", None) or default
    value = getattr(text, "v_head_dim", None) or default
    return 2.0 * length * sizes["heads"] * (query + value)
