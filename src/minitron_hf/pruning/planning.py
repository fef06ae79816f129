"""Scores and sizes → a plan. Every refusal is made here, and no weights are needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PretrainedConfig

from ..compat import commit_hash
from ..errors import MismatchError, PlanError
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, ArchSpec, named_tensors, spec_for
from ..files import public_name
from ..models import count_parameters, empty_model
from ..scoring.scores import ImportanceScores
from ..sizes.layers import protected_layers, reason_against_layers
from ..sizes.legality import require_units, rounding_step
from ..sizes.request import PrunerConfig
from ..sizes.resolve import add_back_axes, repaired_axes, resolve_sizes
from ..sizes.student import build_student_config
from ..weights import model_digest, on_meta
from .plan import PruningPlan, _config_to_dict, _drop_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def make_plan(
    model_or_config: PreTrainedModel | PretrainedConfig,
    config: PrunerConfig,
    scores: ImportanceScores | None = None,
) -> PruningPlan:
    """Choose what stays. Needs no weights: a config, or a model on the meta device, is enough.

    Args:
        model_or_config: the teacher.
        config: the student's sizes.
        scores: importance of the teacher's units; needed for every axis that is cut by choice.

    Returns:
        The plan, with the exact parameter counts of the student.

    Raises:
        UnsupportedModelError: if the family is unknown or the model is not what its table says.
        PlanError: if the sizes cannot be cut, or the stock config cannot hold them; the message names legal sizes.
        MismatchError: if the scores belong to another model.
    """
    teacher_config = model_or_config if isinstance(model_or_config, PretrainedConfig) else model_or_config.config
    spec = spec_for(teacher_config)
    teacher = empty_model(model_or_config) if isinstance(model_or_config, PretrainedConfig) else model_or_config
    spec.check(teacher)
    if scores is not None:
        scores.require_model(model_or_config)

    before = spec.sizes(teacher_config)
    after, notes = resolve_sizes(spec, teacher_config, config)
    cut = [axis for axis in after if axis != "layers" and after[axis] < before[axis]]
    require_units(spec, named_tensors(teacher), config, cut)
    ranked = bool(cut) or (after["layers"] < before["layers"] and config.layers_to_drop is None)
    if ranked and scores is None:
        wanted = [FIELD_OF_AXIS[axis] for axis in cut] or ["num_hidden_layers"]
        raise PlanError(
            f"Cutting {', '.join(wanted)} needs importance scores. Pass scores=estimate_importance(…), "
            "or calibration_data to prune_model."
        )

    if scores is not None:
        weights_digest = scores.digests["model"]
    else:
        weights_digest = None if on_meta(teacher) else model_digest(teacher)
    if scores is not None and (missing := sorted(set(cut) - set(scores.axes))):
        raise MismatchError(f"The scores lack {', '.join(missing)}. Make them again with estimate_importance(…).")
    layers_kept = _choose_layers(spec, teacher_config, after["layers"], config, scores)
    nonuniform_sizes = {
        axis: _nonuniform_counts(
            [scores.axes[axis][layer].numpy() for layer in layers_kept],
            after[axis],
            rounding_step(before[axis], 1, config.multiple_of),
        )
        for axis in (PRUNER_FIELDS[name] for name in config.nonuniform_sizes)
        if scores is not None
    }
    for axis, counts in nonuniform_sizes.items():
        notes.append(f"{FIELD_OF_AXIS[axis]} differs by layer, from {min(counts)} to {max(counts)}.")
    student = build_student_config(
        spec,
        teacher_config,
        after,
        layers_kept,
        norm_compensation=config.norm_compensation,
        model_type=config.model_type,
        nonuniform_sizes=nonuniform_sizes,
    )
    kept = _choose_units(spec, teacher_config, student, layers_kept, cut, scores)
    if config.norm_compensation and after["hidden"] < before["hidden"] and not spec.residual_norms:
        notes.append("norm_compensation changes nothing: the norms of this family have no weights.")
    partners: dict[str, np.ndarray] = {}
    if config.head_add_back and scores is not None:
        axes = add_back_axes(spec, before, after)
        partners = _choose_partners(spec, teacher_config, layers_kept, kept, axes, scores)
        pairs, heads = (int((units >= 0).sum()) for units in (partners["heads"], kept["heads"]))
        notes.append(f"Head add-back: {pairs} of {heads} kept heads gained their difference to a dropped one.")
    repair = config.repair if config.repair and repaired_axes(spec, before, after) else None
    if repair:
        notes.append("Repair: the output projections of cut neurons and heads are refitted by least squares.")
    return PruningPlan(
        model_type=spec.model_type,
        teacher={
            "name_or_path": public_name(teacher_config.name_or_path),
            "revision": commit_hash(teacher_config),
            "digest": weights_digest,
            "num_parameters": count_parameters(teacher),
            "num_parameters_without_embeddings": count_parameters(teacher, embeddings=False),
            "config": _config_to_dict(teacher_config),
        },
        student={**_count_student(spec, teacher, student, layers_kept), "config": _config_to_dict(student)},
        sizes={axis: {"teacher": before[axis], "student": after[axis]} for axis in before},
        layers_kept=layers_kept,
        kept=kept,
        partners=partners,
        pruner_config=config.to_dict(),
        scales=_norm_scales(spec, after["hidden"] / before["hidden"], norms=config.norm_compensation),
        repair=repair,
        selection=None if scores is None or not ranked else str(scores.settings["metric"]),
        scores=None
        if scores is None or not ranked
        else {
            "digest": scores.digest,
            "settings": dict(scores.settings),
            "data_digest": scores.digests["data"],
            "tokenizer_digest": scores.digests["tokenizer"],
            **({"layers": _tried_layer_sets(scores)} if scores.settings.get("depth_metric") else {}),
        },
        notes=tuple(notes),
    )


def _choose_layers(
    spec: ArchSpec, teacher: PretrainedConfig, left: int, request: PrunerConfig, scores: ImportanceScores | None
) -> tuple[int, ...]:
    """Teacher indices of the layers that stay: what is dropped has the lowest scores that leave a possible model."""
    depth = spec.sizes(teacher)["layers"]
    num_drop = depth - left

    def without(drop: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(set(range(depth)) - set(drop)))

    if request.layers_to_drop is not None or num_drop == 0:
        return without(request.layers_to_drop or ())
    assert scores is not None
    protected = protected_layers(spec, teacher, request)
    if request.contiguous:
        starts = [start for start in range(left + 1) if protected.isdisjoint(range(start, start + num_drop))]
        if not starts:
            raise PlanError(
                f"num_hidden_layers={left}: there are no {num_drop} contiguous layers to drop between the protected "
                f"ones, {sorted(protected)}. Keep more layers, or set contiguous to false."
            )
        blocks = [range(start, start + num_drop) for start in starts]
        possible = [block for block in blocks if not reason_against_layers(spec, teacher, without(block))]
        importance = scores.blocks.diagonal(num_drop - 1)
        measured = [float(importance[block.start]) for block in possible]
        _require_measured(measured, scores, f"blocks of {num_drop} layers")
        least = min(possible or blocks, key=lambda block: float(importance[block.start]))
        return without(least)
    drop: list[int] = []
    movable = sorted(set(range(depth)) - protected)
    if scores.removals is not None:
        drop = scores.removed_layers[:num_drop]
        lacking = reason_against_layers(spec, teacher, without(drop))
        if len(drop) < num_drop or not protected.isdisjoint(drop) or lacking:
            raise PlanError(
                f"The scores removed layers {scores.removed_layers} one after another, and {num_drop} of the layers "
                f"{movable} are to go{f' ({lacking})' if lacking else ''}. Score again with block_length={num_drop}, "
                f"keep_first_layers={request.keep_first_layers} and keep_last_layers={request.keep_last_layers}, "
                "or set contiguous."
            )
        return without(drop)
    _require_measured([float(scores.layers[layer]) for layer in movable], scores, "single layers")
    ranked = sorted(movable, key=lambda layer: float(scores.layers[layer]))
    while len(drop) < num_drop:
        # A layer that others need may go once they are gone.
        free = [layer for layer in ranked if not reason_against_layers(spec, teacher, without([*drop, layer]))]
        if not free:
            why = reason_against_layers(spec, teacher, without([*drop, ranked[0]]))
            raise PlanError(f"num_hidden_layers={left}, of them the last {request.keep_last_layers}: {why}")
        drop.append(free[0])
        ranked.remove(free[0])
    return without(drop)


def _tried_layer_sets(scores: ImportanceScores) -> list[dict[str, Any]]:
    """What the model was worth without every set of layers that was tried, best first."""
    tried: dict[tuple[int, ...], float] = {}
    for first, last in (~scores.blocks.isnan()).nonzero().tolist():
        tried[tuple(range(first, last + 1))] = float(scores.blocks[first, last])
    if scores.removals is not None:
        for step, row in enumerate(scores.removals.tolist()):
            gone = scores.removed_layers[:step]
            for layer, value in enumerate(row):
                if not math.isnan(value):
                    tried[tuple(sorted([*gone, layer]))] = value
    return [
        {"dropped": list(layers), "score": value}
        for layers, value in sorted(tried.items(), key=lambda item: (len(item[0]), item[1]))
    ]


def _require_measured(values: Sequence[float], scores: ImportanceScores, what: str) -> None:
    if any(math.isnan(value) for value in values):
        raise PlanError(
            f"The scores by {scores.settings.get('depth_metric')} do not hold all {what}: they were made with "
            f"block_length={scores.settings.get('block_length')}, one_by_one={scores.settings.get('one_by_one')}. "
            "Score again with block_length the number of layers that go, or set contiguous to match."
        )


def _nonuniform_counts(rows: Sequence[np.ndarray], size: int, multiple_of: int) -> list[int]:
    """How many units every layer keeps, where all together keep as many as with `size` in each.

    Scores of different layers are on different scales. A unit's share of its layer's squared scores is not: the
    choice keeps the largest sum of shares, over all layers, that whole blocks of units (one or more in each) can have.

    Args:
        rows: scores of every layer, [units]; NaN beyond its own units.
        size: units in each layer, were they equal; layers that have fewer keep all.
        multiple_of: units in a block, if it divides all sizes.

    >>> even = np.array([1.0, 1.0, 1.0, 1.0])
    >>> steep = np.array([9.0, 0.1, 0.1, 0.1])
    >>> _nonuniform_counts([even, steep], 2, 1)
    [3, 1]
    """
    squares = [np.sort(row[~np.isnan(row)].astype(np.float64))[::-1] ** 2 for row in rows]
    total = sum(min(len(own), size) for own in squares)
    block = math.gcd(multiple_of, size, *map(len, squares))
    shares = [own.reshape(-1, block).sum(1) / max(own.sum(), np.finfo(np.float64).tiny) for own in squares]
    for own in shares:
        own[0] = np.inf
    layer_of = np.repeat(np.arange(len(shares)), list(map(len, shares)))
    chosen = np.argsort(-np.concatenate(shares), kind="stable")[: total // block]
    return [int(count) * block for count in np.bincount(layer_of[chosen], minlength=len(shares))]


def _choose_units(
    spec: ArchSpec,
    teacher: PretrainedConfig,
    student: PretrainedConfig,
    layers_kept: tuple[int, ...],
    cut: list[str],
    scores: ImportanceScores | None,
) -> dict[str, np.ndarray]:
    """Kept units per axis: the highest scores; ties go to the lower index. Inner axes are chosen within groups."""
    if not cut:
        return {}
    assert scores is not None
    sizes = spec.layer_sizes(teacher)
    before = [sizes[layer] for layer in layers_kept]
    after = spec.layer_sizes(student)
    ranking = {axis: units.numpy() for axis, units in scores.axes.items()}
    kept: dict[str, np.ndarray] = {}
    for axis in cut:
        if axis in dict(spec.groups) or spec.axis[axis].within is not None:
            continue
        if spec.axis[axis].per_layer:
            rows = [_top_units(ranking[axis][layer], own[axis]) for layer, own in zip(layers_kept, after)]
            kept[axis] = _pad_rows(rows)
        else:
            kept[axis] = _top_units(ranking[axis], spec.sizes(student)[axis])
    for inner, outer in spec.groups:
        if inner not in cut:
            continue
        rows = []
        for position, layer in enumerate(layers_kept):
            each_before = before[position][inner] // before[position][outer]
            each_after = after[position][inner] // after[position][outer]
            groups = _drop_padding(kept[outer][position]) if outer in kept else np.arange(before[position][outer])
            rows.append(
                np.concatenate(
                    [
                        group * each_before
                        + _top_units(
                            ranking[inner][layer][group * each_before : (group + 1) * each_before], each_after
                        )
                        for group in groups
                    ]
                )
            )
        kept[inner] = _pad_rows(rows)
    for axis in cut:
        outer_axis = spec.axis[axis].within
        if outer_axis is None:
            continue
        chosen = []
        for position, layer in enumerate(layers_kept):
            units = kept[outer_axis][position] if outer_axis in kept else range(before[position][outer_axis])
            count = after[position][axis]
            chosen.append(np.stack([_top_units(ranking[axis][layer][unit], count) for unit in units]))
        kept[axis] = np.stack(chosen)
    return kept


def _choose_partners(
    spec: ArchSpec,
    teacher: PretrainedConfig,
    layers_kept: tuple[int, ...],
    kept: Mapping[str, np.ndarray],
    axes: tuple[str, ...],
    scores: ImportanceScores,
) -> dict[str, np.ndarray]:
    """The dropped head that every kept one is compared with, per axis of heads and kept layer; -1 for none."""
    sizes = spec.layer_sizes(teacher)
    ranked = axes[-1]  # KV heads decide for their query head where each has its own
    rows = np.full_like(kept[ranked], -1)
    for position, layer in enumerate(layers_kept):
        before, chosen = sizes[layer], _drop_padding(kept[ranked][position])
        values = scores.axes[ranked][layer].numpy()[: before[ranked]]
        if np.isnan(values).all():
            continue  # no attention here
        if "kv" in axes and before["heads"] != before["kv"]:
            raise PlanError(
                f"head_add_back: layer {layer} shares KV heads, but other layers do not. Leave it out for this model."
            )
        if np.isnan(values).any():
            raise PlanError(
                "head_add_back needs the order of all heads, but some were cut in an earlier round of scoring. "
                "Score with iterations=1, or leave it out."
            )
        each = before["heads"] // before["kv"] if axes == ("heads",) and "kv" in before else before[ranked]
        for group in np.unique(chosen // each):
            members = np.arange(group * each, (group + 1) * each)
            own = np.flatnonzero(chosen // each == group)
            partner_of = {
                int(members[unit]): int(members[partner])
                for unit, partner in _add_back_pairs(values[members], len(own))
            }
            rows[position, own] = [partner_of.get(int(unit), -1) for unit in chosen[own]]
    return dict.fromkeys(axes, rows)


def _add_back_pairs(scores: np.ndarray, left: int) -> list[tuple[int, int]]:
    """Pairs of a kept and a dropped unit, where the `left` units of the highest scores are kept (P1 §2.2).

    By rank, counted from 1, unit i of K kept out of L goes with 2K - i + 1, for i from 2K - L + 1 to K: the paper
    prints a lower bound that is one too low. With K < L / 2 every kept unit has a partner, and the rest has none.

    >>> _add_back_pairs(np.array([5.0, 4.0, 3.0, 2.0, 1.0]), 3)
    [(1, 4), (2, 3)]
    >>> _add_back_pairs(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 1)
    [(4, 3)]
    """
    order = np.argsort(-scores, kind="stable").tolist()
    return [(order[rank], order[2 * left - rank - 1]) for rank in range(max(0, 2 * left - len(order)), left)]


def _norm_scales(spec: ArchSpec, ratio: float, *, norms: bool) -> dict[str, float]:
    """Factors that make up for a hidden axis cut to `ratio` of its size.

    A norm over the kept channels divides by their own root mean square, as if the dropped ones had been like them.
    The teacher with dropped channels zeroed divides by one that is smaller by √ratio: the norm weights make up for it,
    exactly for RMSNorm (with eps / ratio), nearly for LayerNorm. Token embeddings that the family multiplies by
    √hidden_size shrink by √ratio; scaling everything else that writes to the residual stream alike is exact up to eps,
    because norms that read it are free of scale; what reads it without a norm is scaled back. A constant power of
    hidden_size that the stock class multiplies by stays the teacher's.
    """
    scales: dict[str, float] = {}
    if ratio < 1 and norms:
        bare = [name for name, _ in spec.stream.hidden_powers if spec.dimensions[name] == ((("hidden",),),)]
        scales = dict.fromkeys((*spec.residual_norms, *bare), ratio**-0.5)
    if ratio < 1 and spec.stream.scaled_embeddings:
        scales |= {name: ratio**0.5 * scales.get(name, 1.0) for name in spec.stream.stream_writers}
        scales |= {name: ratio**-0.5 * scales.get(name, 1.0) for name in spec.stream.stream_readers}
    if ratio < 1:
        scales |= {name: ratio**-power * scales.get(name, 1.0) for name, power in spec.stream.hidden_powers}
    return {name: factor for name, factor in scales.items() if abs(factor - 1) > 1e-9}


def _pad_rows(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of unequal length as one array, filled up with -1.

    >>> _pad_rows([np.array([4]), np.array([0, 2])]).tolist()
    [[4, -1], [0, 2]]
    """
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


def _top_units(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores, ascending; NaN, where a layer has no such units, comes last.

    >>> _top_units(np.array([3.0, 1.0, 3.0, 2.0]), 2).tolist()
    [0, 2]
    """
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


def _count_student(
    spec: ArchSpec,
    teacher: PreTrainedModel,
    student: PretrainedConfig,
    layers_kept: tuple[int, ...],
) -> dict[str, int]:
    """Parameter counts by the table, proved against the stock class on the meta device."""
    tensors = spec.student_tensors(named_tensors(teacher), student, layers_kept)
    counts = {name: math.prod(shape) for name, _, shape in tensors}
    meta = empty_model(student)
    built = {name: tensor.numel() for name, tensor in named_tensors(meta).items()}
    if counts != built:
        wrong = sorted(counts.items() ^ built.items())[:4]
        raise PlanError(
            f"The stock {type(meta).__name__} built from the student's config differs from the table at {wrong}. "
            "This is a mistake in the family table: please report it."
        )
    return {
        "num_parameters": count_parameters(meta),
        "num_parameters_without_embeddings": count_parameters(meta, embeddings=False),
    }
