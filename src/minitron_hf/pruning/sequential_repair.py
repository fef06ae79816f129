"""The sequential repair: refits what writes to the residual stream, layer after layer, on the student's activations.

The fits in `repair` take the teacher's activations for the student's, so the errors of the layers add up. Here layer l
is fitted after the layers before it. A projection that reads x [K] and whose output the layer adds to the stream,
times f, gains Δ: min ‖X Δ − (T − S) / f‖² + λ‖Δ‖², where T [N, H] is the teacher's stream after the same projection,
and S the student's. The last projection of a layer is fitted to what the teacher hands to the next layer that stays,
so that it makes up for dropped layers, too. Stacked experts are no plain projections, and are left to least squares. A
layer that normalises what its projections write (Gemma 2, OLMo 2) has none that could be; if channels are cut, nothing
makes up for them there. Neither model runs as a whole: the streams of all tokens are kept, and
both go on layer by layer (`layer_runs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..families import ArchSpec, named_tensors, spec_for
from ..models import evaluating
from ..scoring.batches import Batches
from ..scoring.calibration import Calibration
from ..scoring.hook_points import stacked_axes
from ..scoring.hooks import first_input
from ..scoring.reductions import accumulation_dtype
from ..weights import input_device, set_tensor, tensor_values
from .layer_runs import LayerRuns, tested_batch
from .layer_writers import Writer, layer_writers
from .repair_gaps import Gap, Projection, dropped_runs
from .repair_inputs import CutInputs
from .repair_solve import best_ridges, medians, refit_weights, warn_of_few_tokens
from .repair_sums import Products, add_products, forward, require_finite, require_tokens
from .surgery import kept_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .plan import PruningPlan


#: What a note adds where channels are cut.
_NOT_CHANNELS = " Nothing makes up for the cut channels there; the repair least_squares_all refits what reads them."


def sequential_writers(model: PreTrainedModel, plan: PruningPlan, notes: list[str]) -> dict[int, list[Writer]]:
    """The projections of every layer that stays, which `refit_sequentially` refits.

    Args:
        model: the teacher.
        plan: made for it.
        notes: gets notes for the plan on layers without such a projection, and on stacked experts.
    """
    if spec_for(model.config).stream.stacked_states:
        notes.append("The sequential repair changes nothing: this family has several residual streams.")
        return {layer: [] for layer in plan.layers_kept}
    writers = layer_writers(model, list(plan.layers_kept))
    if without := [layer for layer, own in writers.items() if not own]:
        notes.append(
            f"The sequential repair leaves out {len(without)} layers (the first is {without[0]}): they change "
            "what their projections write, by a norm or a weight." + (_NOT_CHANNELS if "hidden" in plan.kept else "")
        )
    if stacked := [layer for layer in _layers_with_experts(model) if layer in writers]:
        notes.append(
            f"The sequential repair leaves out stacked experts of {len(stacked)} layers (the first is {stacked[0]}). "
            "The repair least_squares refits those that lost neurons, or whose layer lost experts."
        )
    return writers


def covered_runs(plan: PruningPlan, writers: Mapping[int, Sequence[Writer]]) -> set[int]:
    """First layers of the runs of dropped layers that `refit_sequentially` makes up for.

    Args:
        plan: the plan.
        writers: see there.
    """
    covered = set()
    for first, _ in dropped_runs(plan):
        if first == 0:  # the first layer that stays is fitted to the teacher's stream, after the dropped ones
            is_covered = bool(writers.get(plan.layers_kept[0]))
        else:
            is_covered = any(writer.is_last for writer in writers.get(first - 1, ()))
        if is_covered:
            covered.add(first)
    return covered


def _layers_with_experts(model: PreTrainedModel) -> list[int]:
    """Layers with stacked experts, which are no plain projections."""
    spec, names = spec_for(model.config), list(named_tensors(model))
    axes = {axis for own in stacked_axes(spec).values() for axis in own}
    return sorted({layer for axis in axes for layer in spec.layers_with(axis, names)})


def refit_sequentially(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    plan: PruningPlan,
    writers: Mapping[int, Sequence[Writer]],
    calibration: Calibration,
    ridge: float | None = None,
    *,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Refit the projections of a student that write to the residual stream, layer by layer.

    Args:
        teacher: on the plan's axes, with its tensors in memory.
        student: of the plan, with the teacher's vocabulary; its projections are replaced.
        plan: the plan.
        writers: the teacher's projections (`sequential_writers`).
        calibration: rows.
        ridge: λ as a fraction of the mean of the diagonal of XᵀX; None: held-out rows choose it for each projection.
        show_progress: show a progress bar.

    Returns:
        Name of a teacher's tensor → the tensor with the refitted values of the student's projection.

    Raises:
        UnsupportedModelError: if a layer cannot run without the layers before it, or gives values that are not finite.
        DataError: if there are no tokens.
    """
    batches = list(calibration.batches())  # in one order: a loader may shuffle them anew for every pass
    calibration = calibration._replace(batches=lambda: batches)
    fitted = (
        _fitted(teacher, student, plan, writers, calibration, ridge, show_progress) if any(writers.values()) else {}
    )
    return _in_teacher(teacher, student, plan, fitted)


def _fitted(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    plan: PruningPlan,
    writers: Mapping[int, Sequence[Writer]],
    calibration: Calibration,
    ridge: float | None,
    show_progress: bool,
) -> dict[str, Tensor]:
    """Name of a student's tensor → what it was replaced by; see `refit_sequentially`."""
    spec, channels = spec_for(teacher.config), plan.kept.get("hidden")
    streams = _Stream(teacher, calibration), _Stream(student, calibration)
    fit = _Fit(*streams, None if channels is None else torch.from_numpy(channels), _stream_scale(plan, spec), ridge)
    following = [*plan.layers_kept[1:], len(streams[0].runs.blocks)]
    found: dict[str, Tensor] = {}
    kept = tqdm(plan.layers_kept, desc="Sequential repair", unit="layer", disable=not show_progress)
    for layer, (source, stop) in enumerate(zip(kept, following)):
        streams[0].skip_to(source)
        theirs, paths = writers[source], (spec.layer_parameter(source, ""), spec.layer_parameter(layer, ""))
        own = [replace(one, projection=_moved(one.projection, *paths)) for one in theirs]
        found |= fit.layer(own, theirs, stop)
    warn_of_few_tokens(fit.widest, streams[1].num_tokens)
    return found


def _stream_scale(plan: PruningPlan, spec: ArchSpec) -> float:
    """Scale of the student's stream over the teacher's; embeddings times √hidden_size make it less than 1."""
    hidden = plan.sizes["hidden"]
    return math.sqrt(hidden["student"] / hidden["teacher"]) if spec.stream.scaled_embeddings else 1.0


def _moved(projection: Projection, before: str, after: str) -> Projection:
    """The same projection of another layer, whose names begin otherwise."""
    return replace(projection, path=after + projection.path.removeprefix(before))


def _in_teacher(
    teacher: PreTrainedModel, student: PreTrainedModel, plan: PruningPlan, refitted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The teacher's tensors, with the student's values at the places that the plan keeps.

    `apply_plan` scales what it cuts, and the student's values are scaled already.
    """
    spec, theirs = spec_for(teacher.config), named_tensors(teacher)
    sources = {name: source for name, source, _ in spec.student_tensors(theirs, student.config, plan.layers_kept)}
    found = {}
    for name, tensor in refitted.items():
        source = sources[name]
        whole = tensor_values(teacher, source).detach().clone(memory_format=torch.contiguous_format)
        positions = kept_positions(tuple(whole.shape), source, spec, teacher.config, plan)
        factor = plan.scales.get((spec.locate(source) or (source, None))[0], 1.0)
        if factor != 1:
            whole = whole.to(accumulation_dtype(whole))
            tensor = tensor.to(whole) / factor
        whole.view(-1)[positions.flatten().to(whole.device)] = tensor.to(whole).flatten()
        found[source] = whole
    return found


@dataclass
class _Seen:
    """What a batch shows of some consecutive layers.

    Attributes:
        entry: the input of the first one, [B, T, H].
        end: the output of the last one.
        calls: path of a projection of the first one → its input and output.
        watch: knows which tokens count.
    """

    entry: Tensor
    end: Tensor
    calls: dict[str, tuple[Tensor, Tensor]]
    watch: Batches

    def after(self, writers: Sequence[Writer]) -> Iterator[Tensor]:
        """The stream after each projection, [B, T, H]."""
        state = self.entry.to(accumulation_dtype(self.entry))
        for writer in writers:
            output = self.calls[writer.projection.path][1]
            state = state + writer.factor * output.reshape(state.shape).to(state)
            yield self.end.to(state) if writer.is_last else state

    def tokens(self, values: Tensor) -> Tensor:
        """[B, T, …] or [B·T, …] → [N, …], the tokens that count."""
        mask_N = self.watch.mask_BT.flatten().to(values.device)
        return values.reshape(len(mask_N), -1)[mask_N]


class _Stream:
    """The residual stream of a model before one of its layers, for all batches.

    Args:
        model: with its tensors in memory.
        calibration: rows.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration) -> None:
        self.model, self.calibration = model, calibration
        self.runs = LayerRuns(model, "Plan with repair='least_squares'.")
        self.spec, self.device = spec_for(model.config), input_device(model)
        self.layer, self.states, self.num_tokens = 0, list[Tensor](), 0
        self._test()

    def run(self, stop: int, writers: Sequence[Writer] = (), *, goes_on: bool = False) -> Iterator[_Seen]:
        """Run the layers up to before `stop` on all batches, and observe projections of the first one.

        Args:
            stop: index of a layer, or the number of layers.
            writers: projections to observe.
            goes_on: keep what the layers return; the next run begins there.
        """
        watch, first = Batches(self.spec, self.model), self.layer
        for index, batch in enumerate(self.calibration.batches()):
            with ExitStack() as stack:
                stack.enter_context(evaluating([self.model]))
                stack.enter_context(self.runs.leaving_out(first))
                if first:
                    self.runs.start_from(first, self.states[index].to(self.device), stack)
                entry, calls = list[Tensor](), dict[str, tuple[Tensor, Tensor]]()
                self._observe(writers, entry, calls, stack)
                end = self.runs.end_before(stop, stack)
                forward(self.model, watch, batch)
            if goes_on:
                self.states[index : index + 1] = [end[0].cpu()]
            yield _Seen(entry[0], end[0], calls, watch)
        require_tokens(watch)
        self.layer, self.num_tokens = stop if goes_on else first, watch.num_tokens

    def skip_to(self, layer: int) -> None:
        """Go on to a layer without observing anything."""
        if layer > self.layer:
            for _ in self.run(layer, goes_on=True):
                pass

    def _observe(
        self,
        writers: Sequence[Writer],
        entry: list[Tensor],
        calls: dict[str, tuple[Tensor, Tensor]],
        stack: ExitStack,
    ) -> None:
        def before(_: Any, args: Any, kwargs: Any) -> None:
            entry.append(first_input(args, kwargs))

        block = self.runs.blocks[self.layer]
        stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
        for path in (writer.projection.path for writer in writers):

            def on_call(_: Any, args: Any, kwargs: Any, output: Tensor, path: str = path) -> None:
                calls[path] = first_input(args, kwargs), output

            stack.callback(self.model.get_submodule(path).register_forward_hook(on_call, with_kwargs=True).remove)

    def _test(self) -> None:
        """Refuse a model whose layers compute something else one by one."""
        num_layers, watch = len(self.runs.blocks), Batches(self.spec, self.model)
        with ExitStack() as stack:
            stack.enter_context(evaluating([self.model]))
            self.runs.note_outputs(stack)
            ends = [self.runs.end_before(layer + 1, stack, is_last=False) for layer in range(num_layers)]
            forward(self.model, watch, tested_batch())
        for layer in range(1, num_layers):
            with evaluating([self.model]), self.runs.leaving_out(layer):
                self.runs.require_alone(layer, layer + 1, ends[layer - 1][0], ends[layer][0], watch)


class _Fit:
    """Fits the projections of the student's layers, one layer after the other.

    Args:
        teacher: its stream.
        student: its stream.
        channels: those of the teacher that the student keeps; None for all.
        scale: of the student's stream over the teacher's.
        ridge: see `refit_sequentially`.

    Attributes:
        widest: the most inputs of a projection so far.
    """

    def __init__(
        self, teacher: _Stream, student: _Stream, channels: Tensor | None, scale: float, ridge: float | None
    ) -> None:
        self.teacher, self.student, self.channels, self.scale, self.ridge = teacher, student, channels, scale, ridge
        self.widest = 0

    @torch.no_grad()
    def layer(self, own: Sequence[Writer], theirs: Sequence[Writer], stop: int) -> dict[str, Tensor]:
        """Fit the projections of the student's next layer, and take both models past it.

        Args:
            own: projections of the student, in the order of the calls.
            theirs: the same of the teacher.
            stop: layer of the teacher that the student's next one comes from.

        Returns:
            Name of a student's tensor → what it was replaced by.
        """
        wanted = [list(map(self._kept, seen.after(theirs))) for seen in self.teacher.run(stop, theirs, goes_on=True)]
        found: dict[str, Tensor] = {}
        for number, writer in enumerate(own):
            whole = torch.arange(self._num_inputs(writer))
            self.widest = max(self.widest, len(whole))
            gap = Gap(0, 0, writer.factor, wanted[0][number].shape[-1])
            cut = CutInputs(writer.projection.path, whole, whole[:0], (writer.projection,), gap=gap)
            sums = self._sums(cut, own[: number + 1], [batch[number] for batch in wanted])
            require_finite(self.student.model, sums)
            ridge = self.ridge
            if ridge is None:
                ridge = medians(best_ridges(self.student.model, [cut], sums))[cut.kind]
            refitted: dict[str, Tensor] = {}
            refit_weights(self.student.model, cut, sums[cut.path].all, ridge, refitted)
            for name, tensor in refitted.items():
                set_tensor(self.student.model, name, tensor)
            found |= refitted
        self.student.skip_to(self.student.layer + 1)
        return found

    def _sums(self, cut: CutInputs, called: Sequence[Writer], wanted: Sequence[Tensor]) -> dict[str, Products]:
        """Sums over all tokens of what the last of some projections reads, and of what the stream after it lacks.

        Args:
            cut: its inputs.
            called: projections of the student's next layer up to this one.
            wanted: the stream that the teacher has after it, for every batch.
        """
        sums: dict[str, Products] = {}
        for wanted_BTH, seen in zip(wanted, self.student.run(self.student.layer + 1, called), strict=True):
            *_, state = seen.after(called)
            missing_NH = seen.tokens(wanted_BTH.to(state) - state).div_(called[-1].factor)
            inputs_NK = cut.observed(seen.tokens(seen.calls[cut.path][0]))
            add_products(sums, cut, (inputs_NK, missing_NH), seen.watch, self.ridge is None, None)
        return sums

    def _kept(self, state: Tensor) -> Tensor:
        state = self.scale * state.cpu()
        return state if self.channels is None else state[..., self.channels]

    def _num_inputs(self, writer: Writer) -> int:
        weight: Any = self.student.model.get_submodule(writer.projection.path).weight
        return int(weight.shape[writer.projection.position])
