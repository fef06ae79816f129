"""Compares pruned students before retraining: their divergence from the teacher on a few rows.

All candidates are measured on the same tokens, so that they are compared in pairs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import TokenRows, padded_batches
from ..data.images import image_inputs
from ..errors import DataError, MismatchError, PlanError, UnsupportedModelError, accept_old_names
from ..evaluation.quality import mean_and_error
from ..files import digest, parse_json, write_json
from ..formats import read_artefact
from ..losses.fused import distillation_loss
from ..losses.heads import OutputHead, backbone_output, output_head
from ..losses.signals import DenseSignal
from ..models import evaluating
from ..sizes.request import PrunerConfig
from ..sizes.shapes import name_of_sizes
from ..weights import input_device, tensor_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SEARCH_NAME = "search.json"
#: Measurements of a comparison of shapes that has not ended.
UNFINISHED_NAME = "shapes.unfinished.json"


#: Keys of `search.json` whose fields have another name.
FIELD_OF_KEY = {"proxy": "pruned_kl", "behind": "kl_above_best"}


@accept_old_names(proxy="pruned_kl", behind="kl_above_best")
@dataclass
class Candidate:
    """One shape, and its measurements.

    Attributes:
        request: its sizes.
        num_parameters: exact.
        num_active_parameters: those that one token uses; None in files of earlier versions.
        scores: results of a user's `score_func`, if there is one: before any retraining, then of every round.
        pruned_kl: KL(teacher ‖ pruned student) in nats per token before any retraining, `value` and `stderr`.
        rounds: one entry for every round of distillation it took part in: `num_tokens` so far, `kl` and `stderr` on
            held-out text.
        kl_above_best: `value` and `stderr` of its KL minus the KL of the best candidate, paired on the same rows,
            after the last round that both took part in; None for the best.
        prefill_tokens_per_second, decode_tokens_per_second: median speed, of the shapes that were retrained.
        row_sums: nats of every row: before any retraining, then of every round.
    """

    request: PrunerConfig
    num_parameters: int
    pruned_kl: dict[str, float] | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)
    kl_above_best: dict[str, float] | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    row_sums: list[list[float]] = field(default_factory=list, repr=False)
    num_active_parameters: int | None = None
    scores: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The sizes, in few words."""
        return name_of_sizes(self.request)

    @property
    def kl(self) -> float:
        """The last KL that was measured."""
        if self.rounds:
            return self.rounds[-1]["kl"]
        return self.pruned_kl_or_infinity

    def sort_key(self, num_rounds: int | None = None) -> float:
        """What candidates are ordered by, lowest first: minus the score, or the KL where there are no scores.

        Args:
            num_rounds: rounds of distillation before the measurement; None: the last measurement.
        """
        num_rounds = len(self.rounds) if num_rounds is None else num_rounds
        if self.scores:
            return -self.scores[num_rounds]
        return self.rounds[num_rounds - 1]["kl"] if num_rounds else self.pruned_kl_or_infinity

    @property
    def pruned_kl_or_infinity(self) -> float:
        """KL before any retraining; infinite where it was not measured."""
        return math.inf if self.pruned_kl is None else self.pruned_kl["value"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "request": {k: v for k, v in self.request.to_dict().items() if v is not None},
            "num_parameters": self.num_parameters,
            "num_active_parameters": self.num_active_parameters,
            "proxy": self.pruned_kl,
            "rounds": self.rounds,
            "behind": self.kl_above_best,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "row_sums": self.row_sums,
            "scores": self.scores,
        }

    def pruned_dict(self) -> dict[str, Any]:
        """The measurements before any retraining, JSON-ready."""
        names = ("name", "request", "num_parameters", "num_active_parameters", "proxy", "behind", "scores")
        return {name: value for name, value in self.to_dict().items() if name in names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Candidate:
        """The reverse of `to_dict`."""
        known = {FIELD_OF_KEY.get(k, k): value for k, value in values.items() if k not in ("name", "request")}
        for name in ("pruned_kl", "kl_above_best"):
            known[name] = known.get(name) and _with_nan(known[name])
        known["rounds"] = [_with_nan(one) for one in known.get("rounds", [])]
        return cls(request=PrunerConfig.from_dict(values["request"]), **known)


def _with_nan(values: Mapping[str, float | None]) -> dict[str, float]:
    """Numbers from JSON, which has no NaN."""
    return {name: math.nan if value is None else value for name, value in values.items()}


class MeasuredShapes:
    """What is measured of some shapes, in a file until all of them are: a comparison that was stopped goes on.

    Args:
        folder: for the file; None keeps nothing.
        inputs: digest of all that the measurements depend on; those with other inputs are done again.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, inputs: str) -> None:
        self.path = None if folder is None else Path(folder) / UNFINISHED_NAME
        self.inputs = inputs
        self.found: dict[str, Candidate] = {}
        if self.path is not None and self.path.is_file():
            with contextlib.suppress(MismatchError, PlanError, KeyError, TypeError):  # written by another version
                values = parse_json(self.path)
                if values["inputs"] == inputs:
                    self.found = {one.name: one for one in map(Candidate.from_dict, values["candidates"])}

    def measure(self, candidate: Candidate, measure: Callable[[Candidate], None]) -> None:
        """Measure a candidate, or give it the measurements in the file."""
        if (known := self.found.get(candidate.name)) is None:
            measure(candidate)
        else:
            for name in ("pruned_kl", "row_sums", "scores"):
                setattr(candidate, name, getattr(known, name))
        self.found[candidate.name] = candidate
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                self.path, {"inputs": self.inputs, "candidates": [one.to_dict() for one in self.found.values()]}
            )

    def end(self) -> None:
        """Remove the file: what was chosen stands in the plan."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def best_shape(folder: str | os.PathLike[str]) -> PrunerConfig:
    """The sizes that a finished search in a folder has found."""
    return PrunerConfig.from_dict(read_artefact(Path(folder) / SEARCH_NAME)["candidates"][0]["request"])


@dataclass(frozen=True)
class OwnScore:
    """A user's score of a model, which decides instead of the KL.

    Attributes:
        function: takes a model; the higher the result, the better.
        floor: the least score of a candidate that is taken; None: any.
    """

    function: Callable[[PreTrainedModel], float]
    floor: float | None = None

    @classmethod
    def of(cls, function: Callable[[PreTrainedModel], float] | None, floor: float | None) -> OwnScore | None:
        """The score, if there is one.

        Raises:
            PlanError: if there is a floor alone, or no function.
        """
        if function is None and floor is not None:
            raise PlanError("score_floor is the least result of score_func. Pass that, too, or leave it out.")
        if function is not None and not callable(function):
            raise PlanError(f"score_func={function!r}: expected a function that takes a model and returns a number.")
        return None if function is None else cls(function, floor)

    @property
    def identity(self) -> str:
        """Digest of what stored scores depend on: name and code of the function, arguments of `functools.partial`."""
        return digest(_identity(self.function))

    def __call__(self, model: PreTrainedModel) -> float:
        """The score of a model.

        Raises:
            DataError: if it is no finite number.
        """
        value: Any = self.function(model)
        name = getattr(self.function, "__name__", "score_func")
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise DataError(f"score_func: {name} returned {value!r}. Expected a number.") from None
        if not math.isfinite(value):
            raise DataError(f"score_func: {name} returned {value}. Expected a finite number.")
        return value

    def require(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates whose last score reaches the floor, in their order.

        Raises:
            PlanError: if there are none; it names the best one.
        """
        found = [one for one in candidates if self.floor is None or one.scores[-1] >= self.floor]
        if not found:
            best = max(candidates, key=lambda one: one.scores[-1])
            raise PlanError(
                f"score_floor={self.floor:g}: none of {len(candidates)} shapes reaches it. The best, {best.name}, has "
                f"{best.scores[-1]:.4g}. Lower the floor, or raise the budget."
            )
        return found


class Divergence:
    """KL(teacher ‖ student) on some rows. The teacher's hidden states are computed once, and its head applied again.

    Shapes: N predicted tokens, H_t hidden width of the teacher.

    Args:
        teacher: the teacher.
        rows: to measure on.
        batch_size: rows at a time.
        score: a user's score, measured beside it.
    """

    def __init__(
        self, teacher: PreTrainedModel, rows: TokenRows, batch_size: int = 8, score: OwnScore | None = None
    ) -> None:
        self.rows, self.batch_size, self.score = rows, batch_size, score
        self.head = _in_memory(output_head(teacher), teacher)
        self.states = [states.cpu() for states in self._hidden(teacher)]

    @torch.no_grad()
    def _hidden(self, model: PreTrainedModel) -> Iterator[Tensor]:
        """Hidden states that predict the measured tokens of each row: [N, H] of one batch after the other."""
        with evaluating([model]):
            for index, batch in enumerate(padded_batches(self.rows, self.batch_size)):
                # Padding is on the right, where causal attention never looks.
                inputs = {"input_ids": batch["input_ids"].to(input_device(model)), **image_inputs(batch, model)}
                h_BTH = backbone_output(model, **inputs, use_cache=False).last_hidden_state
                first = index * self.batch_size
                places = [torch.tensor(self.rows.predicted(first + i)) - 1 for i in range(len(h_BTH))]
                yield torch.cat([h_TH[place.to(h_TH.device)] for h_TH, place in zip(h_BTH, places)])

    @torch.no_grad()
    def __call__(self, student: PreTrainedModel, candidate: Candidate) -> dict[str, float]:
        """Mean and standard error. The candidate keeps the sums of the rows, for paired comparisons, and the score.

        Raises:
            UnsupportedModelError: if the KL is no finite number.
        """
        head = output_head(student)
        losses = []
        for h_NH, t_NH in zip(self._hidden(student), self.states, strict=True):
            device = head.weight.device
            teacher = DenseSignal(t_NH.to(device), _head_on_device(self.head, device))
            labels = torch.zeros(len(h_NH), dtype=torch.long, device=device)
            losses.append(distillation_loss(h_NH.to(device), head, teacher, labels).kl.cpu().double())
        counts = _counts(self.rows)
        sums = [part.sum().item() for part in torch.cat(losses).split(counts)]
        value, error = mean_and_error(sums, counts)
        if not math.isfinite(value):
            raise UnsupportedModelError(
                f"The student {candidate.name!r} has a KL of {value}: its logits or the teacher's are not finite in "
                f"{student.dtype}. Load the teacher in a wider dtype (dtype='float32'), or check its weights."
            )
        candidate.row_sums.append(sums)
        if self.score is not None:
            candidate.scores.append(self.score(student))
        return {"value": value, "stderr": math.nan if error is None else error}


def _counts(rows: TokenRows) -> list[int]:
    return [len(rows.predicted(index)) for index in range(len(rows))]


def _in_memory(head: OutputHead, model: PreTrainedModel) -> OutputHead:
    """The head with its values, where Accelerate has offloaded them."""
    if not head.weight.is_meta:
        return head
    layer = model.get_output_embeddings()
    [path] = [path for path, module in model.named_modules() if module is layer]
    bias = None if head.bias is None else tensor_values(model, f"{path}.bias")
    return OutputHead(tensor_values(model, f"{path}.weight"), bias, head.scale, head.softcap)


def _head_on_device(head: OutputHead, device: torch.device) -> OutputHead:
    bias = None if head.bias is None else head.bias.to(device)
    return OutputHead(head.weight.to(device), bias, head.scale, head.softcap)


def paired_gap(candidate: Candidate, best: Candidate, rows: TokenRows) -> dict[str, float]:
    """The KL of a candidate minus the KL of the best one, paired by rows, after the candidate's last round."""
    turn = len(candidate.rounds)
    differences = [one - other for one, other in zip(candidate.row_sums[turn], best.row_sums[turn], strict=True)]
    value, error = mean_and_error(differences, _counts(rows))
    return {"value": value, "stderr": math.nan if error is None else error}


def _identity(value: Any) -> Any:
    """What tells functions apart in every process: no addresses, and sets in one order."""
    if isinstance(value, functools.partial):
        return [_identity(value.func), repr(value.args), repr(value.keywords)]
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), list(value.co_names), [_identity(one) for one in value.co_consts]]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if not callable(value):
        return repr(value)
    code = getattr(value, "__code__", None)
    named = value if hasattr(value, "__qualname__") else type(value)
    return [named.__module__, named.__qualname__, None if code is None else _identity(code)]
