"""Peak memory of a repair, in memory and streamed, from configs alone. The legend is that of `stage_memory`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..pruning.repair import input_groups, probed_inputs
from ..pruning.repair_inputs import CutInputs
from ..pruning.repair_passes import segments_of
from ..pruning.repair_solve import OUTPUTS_AT_A_TIME
from ..sizes.request import SEQUENTIAL
from .stage_passes import forward_bytes
from .stage_repair import expected_cut_inputs, expected_writers, layer_bytes, not_sequential, num_outputs, num_refitted
from .stage_workload import Parts, Workload, hidden_size, num_layers, vocabulary, weight_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def repair(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """W_t + weights refitted in earlier passes, D·H·b each, + the sums of a pass, + the larger of two moments.

    A change of basis adds a copy of W_t.
    The sums of an input take 8·K·W, W = K + R + G, and twice that of those that choose the ridge, if all fit into one
    pass. A batch: a forward pass, and the inputs side by side, N·(K + R)·(b + 4) (4·N·(K + R) in float32), with their
    product, 4·K·(K + R), and two states, N·G·(2·b + 4) (8·N·G in float32). The solution for O outputs of one
    projection, 8,192 at most: `_solution_bytes`. A sequential repair: the larger of this and `_sequential`.
    """
    cuts = expected_cut_inputs(teacher, student, load.repair, load.num_gaps)
    writers = expected_writers(student) if load.repair == SEQUENTIAL else []
    cuts = not_sequential(cuts, writers)
    parts = _at_once(teacher, cuts, load)
    if writers:
        parts = max(parts, _sequential(teacher, student, cuts, writers, load), key=lambda one: sum(one.values()))
    return parts


def _sequential(
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    cuts: Sequence[CutInputs],
    writers: Sequence[CutInputs],
    load: Workload,
) -> Parts:
    """W_t (twice after a change of basis) + refitted weights + W_s + streams + sums + a forward pass or a solution.

    The refitted weights are those that it leaves to least squares. The streams of both models take
    M·T·(H_t + H_s)·b, and what each projection of a layer is fitted to M·T·H_s·4. The sums of a
    projection are kept twice where held-out rows choose the ridge, 16·K·(K + H_s).
    """
    largest = max(writers, key=lambda cut: cut.num_bytes)
    kept = load.calibration_rows * load.max_length if load.device == "cpu" else 0
    most = max(Counter(cut.layer for cut in writers).values())
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    solution = _solution_bytes(teacher, largest, load)
    return {
        "weights": weight_bytes(teacher, load),
        "rotated weights": weight_bytes(teacher, load) if load.is_rotated else 0,
        "refitted weights": num_refitted(cuts, teacher) * load.itemsize,
        "student": weight_bytes(student, load),
        "streams": kept * (hidden_size(teacher) + hidden_size(student)) * load.itemsize,
        "streams to fit to": kept * hidden_size(student) * 4 * most,
        "sums": 2 * largest.num_bytes,
        **({"forward pass": passed} if passed > solution else {"solution": solution}),
    }


def _at_once(teacher: PretrainedConfig, cuts: Sequence[CutInputs], load: Workload) -> Parts:
    """The fit to the teacher's activations; see `repair`."""
    if not cuts:
        return {"weights": weight_bytes(teacher, load)}
    groups = list(input_groups(cuts, load.memory_limit or math.inf))
    held_out = _sum_bytes(probed_inputs(cuts)) if len(groups) == 1 else 0
    passes = [
        (num_refitted([cut for group in groups[:index] for cut in group], teacher) * load.itemsize, _sum_bytes(group))
        for index, group in enumerate(groups)
    ]
    fitted, sums = max(passes, key=sum)
    largest = max(cuts, key=lambda cut: cut.num_bytes)
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)
    copies, solution = _batch_bytes(largest, load), _solution_bytes(teacher, largest, load)
    return {
        "weights": weight_bytes(teacher, load),
        "rotated weights": weight_bytes(teacher, load) if load.is_rotated else 0,
        "refitted weights": fitted,
        "sums": sums,
        "sums over held-out rows": held_out,
        **(
            {"forward pass": passed, "inputs and product": copies}
            if passed + copies > solution
            else {"solution": solution}
        ),
    }


def _batch_bytes(cut: CutInputs, load: Workload) -> int:
    """Some inputs of a batch side by side, with their product, and the states around dropped layers."""
    kept, rest = len(cut.kept_K), len(cut.rest_R)
    num_tokens, added = load.batch_size * load.max_length, cut.gap.width if cut.gap else 0
    wider = 4 if load.itemsize < 4 else 0
    inputs = num_tokens * (kept + rest) * (load.itemsize + wider) + 4 * kept * (kept + rest)
    return inputs + num_tokens * added * (2 * load.itemsize + wider)


def _solution_bytes(teacher: PretrainedConfig, cut: CutInputs, load: Workload, *, chooses: bool = True) -> int:
    """Matrices in float64 to solve for the outputs of one projection, beside the sums, and the cut rows of its weight.

    To choose a ridge takes 8·(K·(K + W) + 4·K·O + R·O) + K·O·b, to fit with one 8·(K² + 3·K·O + R·O) + K·O·b.
    """
    kept, rest = len(cut.kept_K), len(cut.rest_R)
    outputs = min(OUTPUTS_AT_A_TIME, num_outputs(teacher, cut))
    matrices = kept * (kept + cut.width) + 4 * kept * outputs if chooses else kept * (kept + 3 * outputs)
    return 8 * (matrices + rest * outputs) + kept * outputs * load.itemsize


def repair_streamed(teacher: PretrainedConfig, student: PretrainedConfig, load: Workload) -> Parts:
    """Embeddings, the inputs of a layer for all M rows, M·T·H·b, + the larger of two moments of the largest layer.

    On an accelerator these inputs wait in main memory, and are not counted.
    A batch: the weights of the layer (with those of dropped layers that it makes up for), the sums and the rest as in
    `repair`. A solution: the sums, twice where they choose the ridge, the refitted weights of the layer and one more,
    D·H·b each, and the matrices in float64. A change of basis reads the embeddings with 8 bytes for each number more.
    """
    cuts, tensors = (
        expected_cut_inputs(teacher, student, load.repair, load.num_gaps),
        layer_bytes(teacher, load.itemsize),
    )
    outside = tensors.pop(None)
    if load.is_rotated:
        outside += 8 * vocabulary(teacher) * hidden_size(teacher)
    if not cuts:
        return {"embeddings": outside}
    segments = segments_of(cuts, num_layers(teacher))
    number_of = {layer: number for number, segment in enumerate(segments) for layer in segment}
    number_of[num_layers(teacher)] = len(segments) - 1
    passed = forward_bytes(teacher, load.dtype, load.batch_size, load.max_length)

    def moments(group: Sequence[CutInputs], sums: int) -> Iterator[dict[str, int]]:
        number, held = number_of[group[0].layer], {"sums": _sum_bytes(group) * sums}
        layer, copies = sum(tensors[one] for one in segments[number]), max(_batch_bytes(cut, load) for cut in group)
        yield {**held, "layer": layer, "forward pass": passed, "inputs and product": copies}
        own = [cut for cut in cuts if number_of[cut.layer] == number] if sums == 1 else []
        read = max(
            num_refitted([replace(cut, projections=(one,))], teacher) for cut in group for one in cut.projections
        )
        solution = max(_solution_bytes(teacher, cut, load, chooses=sums > 1) for cut in group)
        fitted = (num_refitted(own, teacher) + read) * load.itemsize
        yield {**held, "refitted weights": fitted, "solution": solution}

    found: list[dict[str, int]] = []
    limit = load.memory_limit or math.inf
    for inputs, sums in ((probed_inputs(cuts), 2), (cuts, 1)):
        for group in input_groups(inputs, limit / sums, lambda cut: number_of[cut.layer]):
            found += moments(group, sums)
    rows = load.calibration_rows if load.device == "cpu" else 0
    return {
        "embeddings": outside,
        "inputs of a layer": rows * load.max_length * hidden_size(teacher) * load.itemsize,
        **max(found, key=lambda parts: sum(parts.values())),
    }


def _sum_bytes(group: Sequence[CutInputs]) -> int:
    return sum(cut.num_bytes for cut in group)
