"""Passes over the calibration data that observe the inputs of a repair: through the whole model, or layer by layer.

A teacher whose tensors are on disk runs layer by layer (`layer_runs`). The inputs of a layer are kept for all batches,
so that its tensors are read once per sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..families import spec_for
from ..models import evaluating
from ..scoring.batches import Batches
from ..scoring.calibration import Calibration
from .layer_runs import LayerRuns, tested_batch
from .repair_inputs import CutInputs
from .repair_sums import (
    Observed,
    Products,
    forward,
    input_products,
    observing,
    require_observed,
    require_tokens,
)
from .stored_layers import computing, is_stored, tensors_in_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: A group of inputs, their sums by path, and the number of tokens.
Summed = tuple[list[CutInputs], dict[str, Products], int]


def segments_of(inputs: Sequence[CutInputs], num_layers: int) -> list[range]:
    """The layers that run one after the other, each for all batches.

    They are single layers, but dropped layers run together with the one before that makes up for them.

    Args:
        inputs: all inputs that are fitted.
        num_layers: layers of the teacher.
    """
    ends = {cut.layer: cut.gap.last for cut in inputs if cut.gap is not None}
    segments, start = list[range](), 0
    while start < num_layers:
        segments.append(range(start, ends.get(start, start) + 1))
        start = segments[-1].stop
    return segments


class Passes:
    """Sums the products of groups of inputs in one pass per group.

    Args:
        model: the teacher.
        inputs: all inputs that are fitted.
        calibration: rows.
        device: on which a teacher computes whose tensors are on disk.
        show_progress: show a progress bar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Sequence[CutInputs],
        calibration: Calibration,
        device: torch.device,
        *,
        show_progress: bool = False,
    ) -> None:
        self.show_progress = show_progress
        self.model, self.calibration, self.device = model, calibration, device
        self.spec = spec_for(model.config)
        self.runs = LayerRuns(
            model,
            "Repair the teacher in memory: prune_with_plan(model, plan, data), minitron-hf prune --in-memory, or a "
            "recipe without stream_weights.",
        )
        num_layers = len(self.runs.blocks)
        self.segments = segments_of(inputs, num_layers)
        self._number_of = {layer: number for number, segment in enumerate(self.segments) for layer in segment}
        self._number_of[num_layers] = len(self.segments) - 1  # what comes after the layers
        self._batches: list[Mapping[str, Tensor]] = []
        #: What the test of every segment has to find, until it is tested.
        self._expected: dict[int, Tensor] | None = None

    def segment_of(self, cut: CutInputs) -> int:
        """Number of the segment in which some inputs are observed."""
        return self._number_of[cut.layer]

    def in_turn(self, groups: Sequence[list[CutInputs]], probes: Sequence[CutInputs] = ()) -> Iterator[Summed]:
        """Sum the products of each group in turn.

        Args:
            groups: inputs whose sums are kept together, in the order of the layers.
            probes: inputs whose held-out rows are summed apart.

        Raises:
            UnsupportedModelError: if the tensors are on disk, and a layer reads more of those before it than what the
                last of them returns; or if an observed module is not called.
            DataError: if there are no tokens.
        """
        stored, batches = is_stored(self.model), self.calibration.num_batches
        passes = 1 + max((self.segment_of(cut) for group in groups for cut in group), default=-1)
        passes = passes if stored else len(groups)
        total = None if batches is None else passes * batches
        with tqdm(total=total, desc="Repairing", unit="batch", disable=not self.show_progress) as self._bar:
            if stored:
                yield from self._by_layer(groups, probes)
                return
            for group in groups:
                yield group, *input_products(self.model, group, self.calibration, probes, self._bar.update)

    @torch.no_grad()
    def _by_layer(self, groups: Sequence[list[CutInputs]], probes: Sequence[CutInputs]) -> Iterator[Summed]:
        self._batches = self._batches or list(self.calibration.batches())
        if self._expected is None:
            self._expected = dict(enumerate(self._run_through()))
        # The inputs of the next segment: for every batch, and for the test.
        states, tested, number = list[Tensor](), list[Tensor](), 0
        with computing(self.model, self.device, layers=False):
            for index, group in enumerate(groups):
                watch = Batches(self.spec, self.model)
                last = max(map(self.segment_of, group))
                next_group = groups[index + 1] if index + 1 < len(groups) else None
                needed_until = last if next_group is None else self.segment_of(next_group[0])
                with observing(self.model, group, watch, probes) as observed:
                    while number <= last:
                        own = {cut.path for cut in group if self.segment_of(cut) == number}
                        goes_on = number < max(last, needed_until)
                        with self._segment(number):
                            self._test(number, watch, observed, tested)
                            self._observe(number, watch, observed, own, states, goes_on)
                        if not goes_on:
                            break
                        number += 1
                require_tokens(watch)
                yield group, observed.sums, watch.num_tokens

    @contextmanager
    def _segment(self, number: int) -> Iterator[None]:
        """Hold the tensors of a segment, and leave the layers before it out."""
        segment = self.segments[number]
        with ExitStack() as stack:
            stack.enter_context(tensors_in_memory([self.runs.blocks[layer] for layer in segment], self.device))
            stack.enter_context(self.runs.leaving_out(segment.start))
            yield

    def _observe(
        self,
        number: int,
        watch: Batches,
        observed: Observed,
        own: set[str],
        states: list[Tensor],
        goes_on: bool,
    ) -> None:
        """Run a segment on all batches.

        Args:
            number: of the segment.
            watch: counts the tokens, from the start.
            observed: its observers.
            own: paths that are observed in this segment.
            states: its inputs for every batch, none for the first one; replaced by those of the next one.
            goes_on: whether the next one will run.
        """
        watch.rows, watch.num_tokens, observed.ends = [], 0, not goes_on
        if not own and not goes_on:
            return
        for index, batch in enumerate(self._batches):
            observed.waiting.update(own)
            with ExitStack() as stack:
                segment = self.segments[number]
                if number:
                    self.runs.start_from(segment.start, states[index].to(self.device), stack)
                reached = self.runs.end_before(segment.stop, stack) if goes_on else []
                forward(self.model, watch, batch)
            require_observed(self.model, observed)
            self._bar.update()
            if goes_on:
                states[index : index + 1] = [state.cpu() for state in reached]

    def _run_through(self) -> list[Tensor]:
        """The ends of all segments for a few tokens, in a pass that is not interrupted."""
        watch = Batches(self.spec, self.model)
        with ExitStack() as stack:
            stack.enter_context(evaluating([self.model]))
            stack.enter_context(computing(self.model, self.device))
            self.runs.note_outputs(stack)
            ends = [self.runs.end_before(segment.stop, stack, is_last=False) for segment in self.segments]
            forward(self.model, watch, tested_batch())
        return [state for end in ends for state in end]

    def _test(self, number: int, watch: Batches, observed: Observed, tested: list[Tensor]) -> None:
        """Refuse a model that computes something else when the layers before a segment are left out."""
        assert self._expected is not None
        expected = self._expected.pop(number, None)
        if expected is None:
            return
        with observed.pause.on():
            segment, entry = self.segments[number], tested[0] if number else None
            tested[:] = [self.runs.require_alone(segment.start, segment.stop, entry, expected, watch)]
