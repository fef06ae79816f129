"""Peak memory of every stage before, beside and after distillation, from configs alone.

Weights are counted; forward and backward passes run on tensors without values (`stage_passes`), whatever the
architecture; what a stage adds of its own is a formula, stated in its function. Distillation itself is
`capacity.estimate_capacity`. Left out: Python with its libraries (0.3 to 0.5 GB), files that the system caches, and
what an allocator wastes.

Legend: B rows of a batch, T tokens of a row, N = B·T, V vocabulary, H hidden size, L layers, W_t and W_s the bytes of
the weights of teacher and student, b bytes of a number; D inputs of a refitted projection, K those that stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..families import spec_for
from ..losses.chunks import default_chunk_size
from ..models import count_parameters, empty_model
from ..pruning.repair import CutProjection, projection_groups
from .stage_passes import backward_bytes, forward_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Workload:
    """What the stages are given.

    Attributes:
        batch_size: B.
        max_length: T of calibration, of the teacher cache.
        eval_length: T of evaluation.
        dtype: of the weights and of all passes.
        top_k: tokens per position of a teacher cache.
        memory_limit: of `repaired_weights`; None: all projections in one pass.
        device: where the models are, `"cpu"` or `"cuda"`.
    """

    batch_size: int = 8
    max_length: int = 512
    eval_length: int = 2048
    dtype: torch.dtype = torch.bfloat16
    top_k: int = 64
    memory_limit: float | None = None
    device: str = "cuda"

    @property
    def itemsize(self) -> int:
        """Bytes of a number, b."""
        return self.dtype.itemsize


#: Kind of memory → bytes, at the moment of peak memory.
Parts = Mapping[str, int]


def stage_memory(
    teacher: PretrainedConfig, student: PretrainedConfig, workload: Workload | None = None
) -> dict[str, dict[str, int]]:
    """Peak memory of the stages that hold models, weights included.

    Args:
        teacher: its config.
        student: its config, of the teacher's family.
        workload: batches and dtype.

    Returns:
        Stage → kind of memory → bytes. Their sum is the peak.

    Raises:
        PlanError: if a model cannot be run on tensors without values.
        UnsupportedModelError: if a family is unknown, or Transformers cannot build a model.
    """
    workload = workload or Workload()
    stages: dict[str, Callable[..., Parts]] = {
        "score": _score,
        "score by Taylor": _taylor,
        "score depth": _depth,
        "repair": _repair,
        "prune": _prune,
        "cache": _cache,
        "evaluate": _evaluate,
    }
    return {name: dict(stage(teacher, student, workload)) for name, stage in stages.items()}


def _score(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + a forward pass of B rows that keeps the inputs of all layers, (L + 1)·N·H·b."""
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length, keep_states=True)
    return {"weights": _weights(teacher, load), "forward pass with the inputs of all layers": passed}


def _taylor(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + activations of a forward and backward pass of B rows, or those that wait and the logits of one row.

    The logits of a row and their gradient take T·V·(2b + 8) bytes below float32, and 12·T·V in float32.
    """
    waiting, peak = backward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    logits = load.max_length * _vocab(teacher) * (12 if load.itemsize >= 4 else 2 * load.itemsize + 8)
    return {"weights": _weights(teacher, load), **_larger(waiting, {"logits of a row": logits}, peak)}


def _depth(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + the inputs of all layers and two last states, (L + 2)·N·H·b, + a forward pass, or the logits of one row.

    The logits of a row take T·V·(b + 8) bytes below float32, and 8·T·V in float32.
    """
    num_tokens = load.batch_size * load.max_length
    states = (_depth_of(teacher) + 2) * num_tokens * _hidden(teacher) * load.itemsize
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    logits = load.max_length * _vocab(teacher) * (8 if load.itemsize >= 4 else load.itemsize + 8)
    parts = {"weights": _weights(teacher, load), "inputs of all layers": states}
    return {**parts, **({"forward pass": passed} if passed > logits else {"logits of a row": logits})}


def _repair(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + refitted weights, D·H·b each, + the sums of a pass, Σ 8·K·D, + the larger of two moments.

    A batch: a forward pass, and the inputs in order, N·D·(b + 4) (8·N·D in float32), with their product, 4·K·D.
    The solution of one projection: 8·(K² + 2·K·H + (D − K)·H).
    """
    cuts = _cut_projections(teacher, student)
    width = _hidden(teacher)
    fitted = sum(len(cut.order_D) for cut in cuts) * width * load.itemsize
    if not cuts:
        return {"weights": _weights(teacher, load)}
    groups = list(projection_groups(cuts, load.memory_limit or math.inf))
    sums = max(sum(cut.num_bytes for cut in group) for group in groups)
    largest = max(cuts, key=lambda cut: cut.num_bytes)
    kept, inputs = largest.num_kept, len(largest.order_D)
    num_tokens = load.batch_size * load.max_length
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    copies = num_tokens * inputs * (load.itemsize + (4 if load.itemsize < 4 else 0)) + 4 * kept * inputs
    solution = 8 * (kept * kept + 2 * kept * width + (inputs - kept) * width)
    moment = {"forward pass": passed, "inputs and product": copies}
    return {
        "weights": _weights(teacher, load),
        "refitted weights": fitted,
        "sums": sums,
        **(moment if passed + copies > solution else {"solution": solution}),
    }


def _prune(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + W_s, in memory. `prune_checkpoint` holds one tensor and one file's share of the student instead."""
    return {"weights": _weights(teacher, load), "student": _weights(student, load)}


def _cache(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + a forward pass, or the last states, 2·N·H·b, k numbers and tokens per token, and the logits of a chunk.

    A chunk of C tokens (`default_chunk_size`) takes C·V·(b + 12) bytes below float32, and 12·C·V in float32.
    """
    num_tokens = load.batch_size * load.max_length
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    vocab_size, b = _vocab(teacher), load.itemsize
    chunk = min(default_chunk_size(num_tokens, vocab_size, torch.device(load.device)), num_tokens)
    logits = chunk * vocab_size * (12 if b >= 4 else b + 12)
    kept = num_tokens * (2 * _hidden(teacher) * b + 12 * load.top_k)
    moment = {"states and top k": kept, "logits of a chunk": logits}
    return {"weights": _weights(teacher, load), **(moment if kept + logits > passed else {"forward pass": passed})}


def _evaluate(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + W_s + last states of both, + the teacher's forward pass, or the logits of a row of both, 2·T·V·b.

    The divergence converts 64 MiB of logits at a time: 6 times as much is alive.
    """
    num_tokens = load.batch_size * load.eval_length
    states = num_tokens * (_hidden(teacher) + _hidden(student)) * load.itemsize
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.eval_length)
    logits = 2 * load.eval_length * _vocab(teacher) * load.itemsize
    chunk = 6 * 4 * min(1 << 24, load.eval_length * _vocab(teacher))
    parts = {"weights": _weights(teacher, load), "student": _weights(student, load)}
    if passed > states + logits + chunk:
        return {**parts, "forward pass": passed}
    return {**parts, "last states": states, "logits of a row": logits, "chunk of the divergence": chunk}


def _larger(waiting: int, moment: Mapping[str, int], peak: int) -> Parts:
    """The activations that wait and something else at that moment, or the peak of the passes if it is higher."""
    if waiting + sum(moment.values()) > peak:
        return {"activations": waiting, **moment}
    return {"activations": peak}


def _cut_projections(teacher: PretrainedConfig, student: PretrainedConfig) -> list[CutProjection]:
    """Projections whose inputs the student has fewer of, with as many kept inputs."""
    spec = spec_for(teacher)
    ours = dict(empty_model(student).named_parameters())
    theirs = dict(empty_model(teacher).named_parameters())
    layers = min(_depth_of(teacher), _depth_of(student))
    found: dict[str, CutProjection] = {}
    for module in spec.hook_points.values():
        for layer in range(layers):
            path = spec.layer_parameter(layer, module)
            if f"{path}.weight" not in ours:
                continue
            position = _input_position(spec, module)
            inputs, kept = (weights[f"{path}.weight"].shape[position] for weights in (theirs, ours))
            if kept < inputs:
                found[path] = CutProjection(path, position, torch.arange(inputs), kept)
    return list(found.values())


def _input_position(spec: Any, module: str) -> int:
    """The dimension of a projection's weight that does not hold the hidden channels."""
    first = spec.dimensions[f"{module}.weight"][0]
    return 1 if any("hidden" in product for product in first) else 0


def _weights(config: PretrainedConfig, load: Workload) -> int:
    return count_parameters(config) * load.itemsize


def _vocab(config: PretrainedConfig) -> int:
    size: int = config.get_text_config().vocab_size
    return size


def _hidden(config: PretrainedConfig) -> int:
    size: int = config.get_text_config().hidden_size
    return size


def _depth_of(config: PretrainedConfig) -> int:
    size: int = config.get_text_config().num_hidden_layers
    return size
