"""Sizes that Transformers takes and other programs may not: notes on them, and a request for none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

from ..errors import PlanError
from ..families import ArchSpec
from ..families.axes import dimension_size, parse_dimensions
from ..families.runtimes import HEADS_FILL_HIDDEN, MLP_FOUR_TIMES_HIDDEN, recomputing_runtimes
from .legality import Groups, _nearest_sizes, field_name, nearest_of
from .relations import fitting_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Stacked experts are multiplied by kernels that want rows of 16 bytes, that is this number of 16-bit values.
EXPERT_ALIGNMENT = 8


@dataclass(frozen=True)
class _ComputedSize:
    """A size that some programs compute from others, whatever the config says.

    Attributes:
        relation: two dimensions that are equal where the size is the computed one.
        runtimes: the programs, in words.
        axis: the size.
        name: its field.
        formula: what they compute, in the names of the config.
    """

    relation: tuple[str, str]
    runtimes: str
    axis: str
    name: str
    formula: str

    @property
    def compute(self) -> str:
        """The verb that goes with the programs."""
        return "compute" if " and " in self.runtimes else "computes"

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether the size is the computed one."""
        left, right = (dimension_size(parse_dimensions(one)[0], sizes) for one in self.relation)
        return left == right


def portable_spec(spec: ArchSpec, config_type: type[PretrainedConfig], before: Mapping[str, int]) -> ArchSpec:
    """The family with sizes that every program loads: those that some compute are tied to the hidden size.

    Args:
        spec: the student's family.
        config_type: its stock config.
        before: the teacher's sizes.

    Raises:
        PlanError: if the teacher's own sizes are not the computed ones.
    """
    for one in _computed_sizes(spec, config_type):
        if one.relation in spec.equal:
            continue
        if not one.holds(before):
            raise PlanError(
                f"portable: {one.runtimes} {one.compute} {one.name} as {one.formula}, which is not so in this "
                "teacher. It does not load there either. Leave out portable."
            )
        spec = replace(spec, equal=(*spec.equal, one.relation))
    return spec


def serving_notes(
    spec: ArchSpec,
    config_type: type[PretrainedConfig],
    config: PretrainedConfig,
    after: Mapping[str, int],
    groups: Groups,
) -> list[str]:
    """Sizes that Transformers takes, and other programs or fast kernels may not.

    Args:
        spec: the student's family.
        config_type: its stock config.
        config: the teacher's.
        after: the student's sizes.
        groups: of the student.
    """
    before = spec.sizes(config)
    if after == before:
        return []
    return [
        *(
            f"{one.name}={after[one.axis]} is honoured by Transformers, but {one.runtimes} {one.compute} "
            f"{one.formula} = {_computed_value(one, after)} instead, and cannot run this student."
            + (_safe_sizes(spec, config, after, groups, one.relation) if one.holds(before) else "")
            for one in _computed_sizes(spec, config_type)
            if not one.holds(after)
        ),
        *_expert_notes(spec, before, after),
    ]


def _computed_sizes(spec: ArchSpec, config_type: type[PretrainedConfig]) -> list[_ComputedSize]:
    """The sizes of a family that a program is known to compute, or is likely to."""
    found = []
    if runtimes := _recomputing(spec, config_type):
        formula = "hidden_size // num_attention_heads"
        found.append(_ComputedSize(HEADS_FILL_HIDDEN, runtimes, "head_dim", "head_dim", formula))
    if runtimes := " and ".join(recomputing_runtimes(spec.model_type, MLP_FOUR_TIMES_HIDDEN)):
        formula = f"4 × {field_name(spec, 'hidden')}"
        found.append(_ComputedSize(MLP_FOUR_TIMES_HIDDEN, runtimes, "ffn", field_name(spec, "ffn"), formula))
    return found


def _computed_value(one: _ComputedSize, sizes: Mapping[str, int]) -> int:
    return sizes["hidden"] // sizes["heads"] if one.axis == "head_dim" else 4 * sizes["hidden"]


def _recomputing(spec: ArchSpec, config_type: type[PretrainedConfig]) -> str | None:
    """The programs that compute `head_dim` for a family, in words; None if none is known or likely to."""
    head_dim = spec.axis.get("head_dim")
    if head_dim is None or head_dim.fields != ("head_dim",) or "heads" not in spec.axis:
        return None
    if runtimes := recomputing_runtimes(spec.model_type):
        return " and ".join(runtimes)
    declared = {declared.name for declared in fields(cast(Any, config_type))}
    return None if "head_dim" in declared else "a program that follows the declared fields of the config"


def _safe_sizes(
    spec: ArchSpec,
    config: PretrainedConfig,
    after: Mapping[str, int],
    groups: Groups,
    relation: tuple[str, str],
) -> str:
    """Sizes around the student's that these programs run, as advice."""
    if relation == MLP_FOUR_TIMES_HIDDEN:
        return f" It takes {4 * after['hidden']}; portable=True allows only such sizes."
    before = spec.sizes(config)
    fitting = fitting_sizes(spec, config, after, groups, relation, "hidden")
    if fitting.get(before["hidden"]) == before["heads"]:
        del fitting[before["hidden"]]  # as large as the teacher's
    pairs = [
        f"hidden_size={size} with num_attention_heads={fitting[size]}"
        for size in nearest_of(after["hidden"], list(fitting))
    ]
    return f" It takes {' or '.join(pairs)}; portable=True allows only such sizes." if pairs else ""


def _expert_notes(spec: ArchSpec, before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    notes = []
    for axis in ("hidden", "moe_ffn") if "moe_ffn" in after else ():
        if after[axis] % EXPERT_ALIGNMENT and not before[axis] % EXPERT_ALIGNMENT:
            nearest = _nearest_sizes(after[axis], range(EXPERT_ALIGNMENT, before[axis] + 1, EXPERT_ALIGNMENT))
            notes.append(
                f"{field_name(spec, axis)}={after[axis]}: fast kernels for stacked experts need rows of 16 bytes, "
                f"that is, multiples of {EXPERT_ALIGNMENT} in 16 bits (nearest: {nearest}). Load the student "
                "with experts_implementation='eager', or choose one of them."
            )
    return notes
