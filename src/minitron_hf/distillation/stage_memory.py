"""Peak memory of every stage before, beside and after distillation, from configs alone.

Weights are counted; forward and backward passes run on tensors without values (`stage_passes`), whatever the
architecture; what a stage adds of its own is a formula, stated in its function. Distillation itself is
`capacity.estimate_capacity`. Left out: Python with its libraries (0.3 to 0.5 GB), files that the system caches, and
what an allocator wastes.

Legend: B rows of a batch, T tokens of a row, N = B·T, V vocabulary, H hidden size, L layers, P parameters of the
teacher, W_t and W_s the bytes of the weights of teacher and student, b bytes of a number; D inputs of a refitted
projection, K those that stay, R those that the student lacks (all of them after a norm), G channels of the residual
stream for the projections before dropped layers, else 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..compat import as_stored, names_not_saved, storage_id
from ..families import named_tensors, spec_for
from ..losses.chunks import default_chunk_size
from ..models import empty_model
from ..pruning.stored_reading import BLOCK_BYTES
from ..scoring.activations import KEPT_GRAM_BYTES, head_groups
from ..sizes.request import SEQUENTIAL
from .stage_passes import backward_bytes, forward_bytes, training_bytes
from .stage_repair import expected_cut_inputs, expected_writers, not_sequential, num_refitted
from .stage_repair_memory import repair, repair_streamed
from .stage_workload import Parts, Workload, hidden_size, num_layers, vocabulary, weight_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def stage_memory(
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    workload: Workload | None = None,
    *,
    stages: Iterable[str] | None = None,
) -> dict[str, dict[str, int]]:
    """Peak memory of the stages that hold models, weights included.

    Args:
        teacher: its config.
        student: its config, of the teacher's family.
        workload: batches and dtype.
        stages: names of stages, some of `STAGES`; None: all.

    Returns:
        Stage → kind of memory → bytes. Their sum is the peak.

    Raises:
        PlanError: if a model cannot be run on tensors without values.
        UnsupportedModelError: if a family is unknown, or Transformers cannot build a model.
    """
    workload = workload or Workload()
    return {name: dict(STAGES[name](teacher, student, workload)) for name in stages or STAGES}


def evaluation_memory(models: Sequence[PretrainedConfig], load: Workload) -> dict[str, int]:
    """The stage `evaluate` for any number of models, the first of which is the reference.

    Their weights, Σ W, + the last states of all, Σ N·H·b, + the logits of a row of two, 2·T·V·b, + the chunk of the
    divergence, which converts 64 MiB of logits at a time: 6 times as much is alive. Or, if that is more, the states of
    all but one, the logits of a row, and the forward pass of that one.

    Args:
        models: their configs.
        load: batches and dtype.

    Raises:
        PlanError: if the reference cannot be run on tensors without values.
    """
    num_tokens, b = load.batch_size * load.eval_length, load.itemsize
    states = [num_tokens * hidden_size(model) * b for model in models]
    passed = forward_bytes(models[0], load.dtype, load.batch_size, load.eval_length)
    logits = load.eval_length * vocabulary(models[0]) * b
    chunk = 6 * 4 * min(1 << 24, load.eval_length * vocabulary(models[0]))
    weights = [weight_bytes(model, load) for model in models]
    parts = {"weights": weights[0], **({"student": sum(weights[1:])} if weights[1:] else {})}
    waiting = sum(states) - min(states) + (logits if weights[1:] else 0)
    if passed + waiting > sum(states) + 2 * logits + chunk:
        return {**parts, "last states and logits of a row": waiting, "forward pass": passed}
    return {**parts, "last states": sum(states), "logits of a row": 2 * logits, "chunk of the divergence": chunk}


def _score(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + a forward pass of B rows that keeps the inputs of all layers, (L + 1)·N·H·b, + Σ 4·D²/U of head groups.

    The sum is over layers with U groups, up to 512 MiB (`KEPT_GRAM_BYTES`). Or, if that is more, instead of the pass
    (L + 2)·N·H·b and the similarities of all layers for 2²⁰ numbers at a time (2²⁵ on accelerators), 2·(b + 4) bytes.
    """
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length, keep_states=True)
    parts = {"weights": weight_bytes(teacher, load), "matrices of groups": _gram_bytes(teacher)}
    state = load.batch_size * load.max_length * hidden_size(teacher)
    states = (num_layers(teacher) + 2) * state * load.itemsize
    compared = min(1 << (20 if load.device == "cpu" else 25), (num_layers(teacher) + 1) * state)
    chunk = 2 * (load.itemsize + 4) * compared
    if states + chunk > passed:
        return {**parts, "inputs of all layers": states, "similarities of a chunk": chunk}
    return {**parts, "forward pass with the inputs of all layers": passed}


def _gram_bytes(config: PretrainedConfig) -> int:
    """Bytes of the matrices of groups of heads that scoring keeps."""
    found = 0
    for units, inner in head_groups(config):
        size = 4 * units * inner**2
        found += size if found + size <= KEPT_GRAM_BYTES else 0
    return found


def _taylor(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + activations of a forward and backward pass of B rows, or those that wait and the logits of one row.

    The logits of a row and their gradient take T·V·(2b + 8) bytes below float32, and 12·T·V in float32.
    """
    waiting, peak = backward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    logits = load.max_length * vocabulary(teacher) * (12 if load.itemsize >= 4 else 2 * load.itemsize + 8)
    return {"weights": weight_bytes(teacher, load), **_larger(waiting, {"logits of a row": logits}, peak)}


def _depth(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + the inputs of all layers and two last states, (L + 2)·N·H·b, + a forward pass, or the logits of one row.

    The logits of a row take T·V·(b + 8) bytes below float32, and 8·T·V in float32.
    """
    num_tokens = load.batch_size * load.max_length
    states = (num_layers(teacher) + 2) * num_tokens * hidden_size(teacher) * load.itemsize
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    logits = load.max_length * vocabulary(teacher) * (8 if load.itemsize >= 4 else load.itemsize + 8)
    parts = {"weights": weight_bytes(teacher, load), "inputs of all layers": states}
    return {**parts, **({"forward pass": passed} if passed > logits else {"logits of a row": logits})}


def _prune(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + W_s."""
    return {"weights": weight_bytes(teacher, load), "student": weight_bytes(student, load)}


def _prune_repaired(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + refitted weights, D·H·b each, those of all layers after a sequential repair, + W_s."""
    cuts = expected_cut_inputs(teacher, student, load.repair, load.num_gaps)
    if load.repair == SEQUENTIAL:
        writers = expected_writers(student)
        cuts = [*not_sequential(cuts, writers), *writers]
    fitted = num_refitted(cuts, teacher) * load.itemsize
    return {"weights": weight_bytes(teacher, load), "refitted weights": fitted, "student": weight_bytes(student, load)}


def _stream(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """Two blocks of at most 32 MiB of the student, in `prune_checkpoint`: one is written while the next is read.

    To read a block whose rows or columns are cut takes as many bytes of the teacher, at most 32 MiB, and what is kept
    of them beside the block if it is read in several pieces. After a change of basis, a tensor is a block, and to read
    it takes 8 bytes for each number more.
    """
    theirs = named_tensors(empty_model(teacher))
    kept = tuple(range(num_layers(student)))
    blocks, readings = [0], [0]
    for _, source, shape in spec_for(teacher).student_tensors(theirs, student, kept):
        whole, cut = theirs[source].numel() * load.itemsize, math.prod(shape) * load.itemsize
        block, piece = min(BLOCK_BYTES, cut), min(BLOCK_BYTES, whole)
        if load.is_rotated:
            block, piece = cut, whole + 8 * theirs[source].numel()
        blocks.append(block)
        rest = piece * cut // whole if whole > piece else 0
        readings.append(block + (piece + rest if cut < whole else 0))
    return {"block that is written": max(blocks), "block that is read": max(readings)}


def _save(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_s + tensors that a checkpoint stores in another layout than the model, such as experts one by one.

    On an accelerator, the main memory holds a copy of one file's tensors, at most 50 GB (`max_shard_size`).
    """
    model = empty_model(student)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in names_not_saved(model)}
    own = {storage_id(tensor) for tensor in state.values()}
    copies = [
        tensor.numel() * load.itemsize
        for tensor in as_stored(model, state, state).values()
        if storage_id(tensor) not in own or not tensor.is_contiguous()
    ]
    return {"student": weight_bytes(student, load), "tensors in another layout": sum(copies)}


def _compare(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + W_s + the teacher's states of M rows, M·T·H_t·b in main memory, + a forward pass of B rows, or the loss.

    The loss takes the last states of both, N·(H_t + H_s)·b, logits of a chunk of both, 2·C·V·b, and softmaxes of some
    of their rows.
    """
    num_tokens, b, vocab_size = load.batch_size * load.max_length, load.itemsize, vocabulary(teacher)
    device = torch.device(load.device)
    chunk = min(default_chunk_size(num_tokens, vocab_size, device, load.dtype), num_tokens)
    block = min(chunk, max(1, (torch.get_num_threads() << 17 if device.type == "cpu" else 1 << 23) // vocab_size))
    loss = num_tokens * (hidden_size(teacher) + hidden_size(student)) * b + 2 * chunk * vocab_size * b
    loss += 16 * block * vocab_size
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    return {
        "weights": weight_bytes(teacher, load),
        "student": weight_bytes(student, load),
        "states of the teacher": load.num_rows * load.max_length * hidden_size(teacher) * b,
        **({"forward pass": passed} if passed > loss else {"states and logits of a chunk": loss}),
    }


def _correct(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """4·P of weights + 8·P of AdamW + the larger of two moments; P are the trained parameters for AdamW.

    The loss: the activations of B rows, and TRL's fused head. The backward pass: its activations with the gradients
    formed so far, and the gradient of the head, 4·V·H.
    """
    return _training(teacher, load, "full")


def _correct_by_lora(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """As `_correct`, where only an adapter is trained; the weights are float32 all the same."""
    return _training(teacher, load, "lora")


def _correct_norms(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """As `_correct`, where only norms are trained."""
    return _training(teacher, load, "norms")


def _training(config: PretrainedConfig, load: Workload, method: str) -> Parts:
    mixed, on_cpu = load.itemsize < 4, load.device == "cpu"
    found = training_bytes(
        config, load.batch_size, load.max_length, mixed=mixed, checkpointing=not on_cpu, method=method
    )
    head = 4 * vocabulary(config) * hidden_size(config) if method == "full" else 0
    loss = head + _fused_head_bytes(config, load)
    parts = {"weights": found.weights, "optimizer": 8 * found.trained}
    if found.waiting + loss > found.backward + head:
        return {**parts, "activations": found.waiting, "loss": loss}
    return {**parts, "activations and gradients": found.backward + head}


#: Tokens and entries of the vocabulary of a tile in TRL 1.16 (`trl.kernels.chunked_logprob`), and the bytes of each
#: entry that it takes on a CPU: five float32 tensors, two more for a moment, and a mask.
TILE_TOKENS, TILE_ENTRIES, TILE_BYTES = 4096, 32768, 29


def _fused_head_bytes(config: PretrainedConfig, load: Workload) -> int:
    """TRL's loss of N tokens, without the gradient of the head's weight.

    A tile of n = min(N, 4096) tokens and v = min(V, 32768) entries takes 32768·n·b bytes, on a CPU 29·n·v more. The
    gradient of the states takes 4·N·H, and half-precision copies of a tile's weights v·H·b.
    """
    num_tokens, width = load.batch_size * (load.max_length - 1), hidden_size(config)
    rows, entries = min(num_tokens, TILE_TOKENS), min(vocabulary(config), TILE_ENTRIES)
    tile = rows * TILE_ENTRIES * load.itemsize + (TILE_BYTES * rows * entries if load.device == "cpu" else 0)
    return tile + 4 * num_tokens * width + (load.itemsize * entries * width if load.itemsize < 4 else 0)


def _cache(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + a forward pass, or the last states, 2·N·H·b, k numbers and tokens per token, and the logits of a chunk.

    A chunk of C tokens (`default_chunk_size`) takes C·V·(b + 12) bytes below float32, and 12·C·V in float32; drawing
    takes 16·C·V more, for probabilities in float64.
    """
    num_tokens = load.batch_size * load.max_length
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    vocab_size, b = vocabulary(teacher), load.itemsize
    chunk = min(default_chunk_size(num_tokens, vocab_size, torch.device(load.device)), num_tokens)
    logits = chunk * vocab_size * ((12 if b >= 4 else b + 12) + (16 if load.drawn else 0))
    kept = num_tokens * (2 * hidden_size(teacher) * b + 12 * load.top_k)
    moment = {"states and top k": kept, "logits of a chunk": logits}
    return {"weights": weight_bytes(teacher, load), **(moment if kept + logits > passed else {"forward pass": passed})}


def _evaluate(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """Teacher and student: see `evaluation_memory`."""
    return evaluation_memory([teacher, student], load)


def _larger(waiting: int, moment: Mapping[str, int], peak: int) -> Parts:
    """The activations that wait and something else at that moment, or the peak of the passes if it is higher."""
    if waiting + sum(moment.values()) > peak:
        return {"activations": waiting, **moment}
    return {"activations": peak}


#: Stage → its function.
STAGES: Mapping[str, Callable[[PretrainedConfig, PretrainedConfig, Workload], Parts]] = {
    "score": _score, "score by Taylor": _taylor, "score depth": _depth, "compare shapes": _compare,
    "repair": repair, "repair, streamed": repair_streamed, "prune": _prune, "prune, repaired": _prune_repaired,
    "prune, streamed": _stream, "save": _save, "correct": _correct, "correct by LoRA": _correct_by_lora,
    "correct norms": _correct_norms, "cache": _cache, "evaluate": _evaluate,
}  # fmt: skip
