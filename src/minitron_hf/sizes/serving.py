"""Sizes that Transformers takes and other programs may not: notes on them, and a request for none of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

from ..errors import PlanError
from ..families import ArchSpec
from ..families.runtimes import HEADS_FILL_HIDDEN, MLP_FOUR_TIMES_HIDDEN, recomputing_runtimes
from .legality import _nearest_sizes, field_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Stacked experts are multiplied by kernels that want rows of 16 bytes, that is this number of 16-bit values.
EXPERT_ALIGNMENT = 8
#: Relations of two sizes that `portable` asks for.
PORTABLE_RELATIONS = (HEADS_FILL_HIDDEN, MLP_FOUR_TIMES_HIDDEN)


def portable_spec(spec: ArchSpec, config_type: type[PretrainedConfig], before: Mapping[str, int]) -> ArchSpec:
    """The family with sizes that every program loads: those that some compute are tied to the hidden size.

    Args:
        spec: the student's family.
        config_type: its stock config.
        before: the teacher's sizes.

    Raises:
        PlanError: if the teacher's own sizes are not the computed ones.
    """
    if (runtimes := _recomputing(spec, config_type)) and HEADS_FILL_HIDDEN not in spec.equal:
        if before["heads"] * before["head_dim"] != before["hidden"]:
            raise PlanError(
                f"portable: {runtimes} computes head_dim as hidden_size / num_attention_heads, which is not so in "
                "this teacher. It does not load there either. Leave out portable."
            )
        spec = replace(spec, equal=(*spec.equal, HEADS_FILL_HIDDEN))
    if runtimes := _recomputing_neurons(spec):
        if before["ffn"] != 4 * before["hidden"]:
            raise PlanError(
                f"portable: {runtimes} computes {field_name(spec, 'ffn')} as 4 × {field_name(spec, 'hidden')}, which "
                "is not so in this teacher. It does not load there either. Leave out portable."
            )
        spec = replace(spec, equal=(*spec.equal, MLP_FOUR_TIMES_HIDDEN))
    return spec


def serving_notes(
    spec: ArchSpec, config_type: type[PretrainedConfig], before: Mapping[str, int], after: Mapping[str, int]
) -> list[str]:
    """Sizes that Transformers takes, and other programs or fast kernels may not.

    Args:
        spec: the student's family.
        config_type: its stock config.
        before: the teacher's sizes.
        after: the student's sizes.
    """
    if after == before:
        return []
    return [
        *_head_notes(spec, config_type, before, after),
        *_neuron_notes(spec, before, after),
        *_expert_notes(spec, before, after),
    ]


def _recomputing(spec: ArchSpec, config_type: type[PretrainedConfig]) -> str | None:
    """The programs that compute `head_dim` for a family, in words; None if none is known or likely to."""
    head_dim = spec.axis.get("head_dim")
    if head_dim is None or head_dim.fields != ("head_dim",) or "heads" not in spec.axis:
        return None
    if runtimes := recomputing_runtimes(spec.model_type):
        return " and ".join(runtimes)
    declared = {declared.name for declared in fields(cast(Any, config_type))}
    return None if "head_dim" in declared else "a program that follows the declared fields of the config"


def _head_notes(
    spec: ArchSpec, config_type: type[PretrainedConfig], before: Mapping[str, int], after: Mapping[str, int]
) -> list[str]:
    runtimes = _recomputing(spec, config_type)
    if runtimes is None or after["heads"] * after["head_dim"] == after["hidden"]:
        return []
    return [
        f"head_dim={after['head_dim']} is honoured by Transformers, but {runtimes} "
        f"{'compute' if ' and ' in runtimes else 'computes'} hidden_size // num_attention_heads = "
        f"{after['hidden'] // after['heads']} instead, and cannot run this student.{_safe_sizes(spec, before, after)}"
    ]


def _recomputing_neurons(spec: ArchSpec) -> str:
    """The programs that compute the number of neurons for a family, in words; empty if none is known."""
    return " and ".join(recomputing_runtimes(spec.model_type, MLP_FOUR_TIMES_HIDDEN))


def _neuron_notes(spec: ArchSpec, before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    runtimes = _recomputing_neurons(spec)
    if not runtimes or after["ffn"] == 4 * after["hidden"]:
        return []
    safe = ""
    if before["ffn"] == 4 * before["hidden"]:
        safe = f" It takes {4 * after['hidden']}; portable=True allows only such sizes."
    return [
        f"{field_name(spec, 'ffn')}={after['ffn']} is honoured by Transformers, but {runtimes} computes 4 × "
        f"{field_name(spec, 'hidden')} = {4 * after['hidden']} instead, and cannot run this student.{safe}"
    ]


def _safe_sizes(spec: ArchSpec, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Sizes around the student's at which heads fill the hidden size, as advice."""
    if before["heads"] * before["head_dim"] != before["hidden"]:
        return ""
    groups = math.lcm(*(after[outer] for inner, outer in spec.groups if inner == "heads"))
    step = groups * after["head_dim"]
    legal = range(step, before["hidden"] + 1, step)
    pairs = [
        f"hidden_size={size} with num_attention_heads={size // after['head_dim']}"
        for size in map(int, _nearest_sizes(after["hidden"], legal).split(" or "))
    ]
    return f" It takes {' or '.join(pairs)}; portable=True allows only such sizes."


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
