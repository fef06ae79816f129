"""Scores and sizes → a plan. Every refusal is made here, and no weights are needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PretrainedConfig

from ..compat import commit_hash
from ..errors import MismatchError, PlanError, checks_kinds
from ..families import FIELD_OF_AXIS, PRUNER_FIELDS, VOCABULARY, ArchSpec, named_tensors, spec_for, text_config
from ..families.axes import CHANNELS
from ..models import empty_model
from ..names import public_name
from ..scoring.scores import ImportanceScores
from ..sizes.counts import parameter_counts
from ..sizes.legality import require_units, rounding_step
from ..sizes.request import SEQUENTIAL, PrunerConfig
from ..sizes.resolve import add_back_axes, repaired_axes, resolve_sizes
from ..sizes.student import build_student_config
from ..vocabulary.ids import ids_in, renumbered_generation_config
from ..weights import model_digest, on_meta
from .basis import principal_basis, require_in_memory
from .choice_of_layers import LARGE_BLOCK, choose_layers, tried_layer_sets
from .choice_of_units import choose_partners, choose_units, count_nonuniform
from .plan import PruningPlan, _config_to_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..vocabulary.counts import TokenCounts, VocabularyCut


@checks_kinds
def make_plan(
    model_or_config: PreTrainedModel | PretrainedConfig,
    config: PrunerConfig,
    scores: ImportanceScores | None = None,
    *,
    token_counts: TokenCounts | None = None,
) -> PruningPlan:
    """Choose the units and layers to keep. Needs no weights: a config, or a model on the meta device, is enough.

    Args:
        model_or_config: the teacher.
        config: the student's sizes.
        scores: importance scores of the teacher; needed if units or layers have to be chosen.
        token_counts: counts of the tokens of a corpus; needed for `vocab_size`.

    Returns:
        The plan, with the exact parameter counts of the student.

    Raises:
        UnsupportedModelError: if the family is unknown or the model differs from its table.
        PlanError: if the sizes cannot be pruned or are not legal in the stock config; the message names legal ones.
        MismatchError: if the scores belong to another model.
    """
    teacher, teacher_config = _checked_teacher(model_or_config, scores)
    spec, before = spec_for(teacher_config), spec_for(teacher_config).sizes(teacher_config)
    after, notes = resolve_sizes(spec, teacher_config, config)
    cut = [axis for axis in after if axis not in ("layers", VOCABULARY) and after[axis] < before[axis]]
    vocabulary = _choose_vocabulary(teacher, before, after, token_counts)
    require_units(spec, named_tensors(teacher), config, cut)
    ranked = bool(cut) or (after["layers"] < before["layers"] and config.layers_to_drop is None)
    _require_scores(cut, ranked, scores)
    layers_kept = choose_layers(spec, teacher_config, after["layers"], config, scores)
    nonuniform_sizes = _choose_nonuniform_sizes(config, before, after, layers_kept, scores)
    notes += _notes_on_sizes(config, before, after, nonuniform_sizes, vocabulary)
    student = build_student_config(
        spec, teacher_config, after, layers_kept, **_config_options(config, nonuniform_sizes, vocabulary)
    )
    basis = _choose_basis(teacher, config, scores) if "hidden" in cut else None
    kept = choose_units(spec, teacher_config, student, layers_kept, cut, scores, is_rotated=basis is not None)
    axes = add_back_axes(spec, before, after) if config.head_add_back else ()
    partners = choose_partners(spec, teacher_config, layers_kept, kept, axes, scores)
    units = {**kept, VOCABULARY: vocabulary.kept} if vocabulary else kept
    repair = config.repair if config.repair and repaired_axes(spec, before, after, config.repair) else None
    hidden_ratio = after["hidden"] / before["hidden"]
    return PruningPlan(
        model_type=spec.model_type,
        teacher=_describe_teacher(teacher, teacher_config, scores),
        student={**_count_student(spec, teacher, student, layers_kept), "config": _config_to_dict(student)},
        sizes={axis: {"teacher": before[axis], "student": after[axis]} for axis in before},
        layers_kept=layers_kept,
        kept=units,
        partners=partners,
        pruner_config=config.to_dict(),
        scales=_norm_scales(spec, hidden_ratio, norms=config.norm_compensation),
        basis=basis,
        repair=repair,
        **_describe_scores(scores if ranked else None),
        vocabulary=vocabulary.facts if vocabulary else None,
        notes=(*notes, *_notes_on_weights(spec, config, hidden_ratio, kept, partners, repair)),
    )


def _checked_teacher(
    model_or_config: PreTrainedModel | PretrainedConfig, scores: ImportanceScores | None
) -> tuple[PreTrainedModel, PretrainedConfig]:
    """The teacher as a model, maybe without weights, and its config; refuses what the table or the scores exclude."""
    if isinstance(model_or_config, PretrainedConfig):
        teacher, config = empty_model(model_or_config), model_or_config
    else:
        teacher, config = model_or_config, model_or_config.config
    spec_for(config).check(teacher)
    if scores is not None:
        scores.require_model(model_or_config)
    return teacher, config


def _config_options(
    config: PrunerConfig, nonuniform_sizes: Mapping[str, Sequence[int]], vocabulary: VocabularyCut | None
) -> dict[str, Any]:
    """Options of `build_student_config`."""
    return {
        "norm_compensation": config.norm_compensation,
        "model_type": config.model_type,
        "nonuniform_sizes": nonuniform_sizes,
        "new_ids": vocabulary.new_ids if vocabulary else None,
    }


def _choose_vocabulary(
    teacher: PreTrainedModel, before: Mapping[str, int], after: Mapping[str, int], counts: TokenCounts | None
) -> VocabularyCut | None:
    """The tokens that stay; None where all do.

    Raises:
        PlanError: without counts, or if more tokens have to stay.
    """
    if after[VOCABULARY] == before[VOCABULARY]:
        return None
    if counts is None:
        raise PlanError(
            f"vocab_size={after[VOCABULARY]:,} needs counts of tokens. Pass token_counts=count_tokens(corpus, "
            "tokenizer), or calibration_data to prune_model; on the command line, --data with text."
        )
    generation = teacher.generation_config
    if generation is not None:
        renumbered_generation_config(generation, {}, before[VOCABULARY])  # refuses what cannot be renumbered
    configs = (teacher.config, text_config(teacher.config))
    named = [*(one.to_dict() for one in configs), {} if generation is None else generation.to_dict()]
    needed = {index for fields in named for index in ids_in(fields, before[VOCABULARY])}
    return counts.cut(after[VOCABULARY], before[VOCABULARY], sorted(needed))


def _require_scores(cut: Sequence[str], ranked: bool, scores: ImportanceScores | None) -> None:
    """Refuse a choice of units or layers without their scores."""
    if scores is None and ranked:
        wanted = [FIELD_OF_AXIS[axis] for axis in cut] or ["num_hidden_layers"]
        raise PlanError(
            f"Cutting {', '.join(wanted)} needs importance scores. Pass scores=estimate_importance(…), "
            "or calibration_data to prune_model."
        )
    if scores is not None and (missing := sorted(set(cut) - set(scores.axes))):
        raise MismatchError(f"The scores lack {', '.join(missing)}. Make them again with estimate_importance(…).")


def _choose_basis(
    teacher: PreTrainedModel, config: PrunerConfig, scores: ImportanceScores | None
) -> np.ndarray | None:
    """The basis of the residual stream that a request asks for.

    Raises:
        PlanError: if the scores hold no covariance, or the teacher no weights.
        UnsupportedModelError: if the stream of this family cannot be rotated.
    """
    if config.hidden_basis is None:
        return None
    if scores is None or scores.covariance is None:
        raise PlanError(
            "hidden_basis='principal' needs scores with the covariance of the residual stream. Make them with "
            "estimate_importance(…, hidden_covariance=True), or pass calibration_data to prune_model."
        )
    if on_meta(teacher):
        raise PlanError(
            "hidden_basis='principal' reads the teacher's weights. Plan with the model, not with its config."
        )
    require_in_memory(teacher)
    return principal_basis(teacher, scores.covariance)


def _choose_nonuniform_sizes(
    config: PrunerConfig,
    before: Mapping[str, int],
    after: Mapping[str, int],
    layers_kept: tuple[int, ...],
    scores: ImportanceScores | None,
) -> dict[str, list[int]]:
    """Axis → size in every kept layer, for the sizes that may differ by layer."""
    if scores is None:
        return {}
    return {
        axis: count_nonuniform(
            [scores.axes[axis][layer].numpy() for layer in layers_kept],
            after[axis],
            rounding_step(before[axis], 1, config.multiple_of),
        )
        for axis in (PRUNER_FIELDS[name] for name in config.nonuniform_sizes)
    }


def _describe_teacher(
    teacher: PreTrainedModel, config: PretrainedConfig, scores: ImportanceScores | None
) -> dict[str, Any]:
    """The teacher's entry in a plan: `PruningPlan.teacher`."""
    if scores is not None:
        weights_digest = scores.digests["model"]
    else:
        weights_digest = None if on_meta(teacher) else model_digest(teacher)
    return {
        "name_or_path": public_name(config.name_or_path),
        "revision": commit_hash(config),
        "digest": weights_digest,
        **parameter_counts(teacher),
        "config": _config_to_dict(config),
    }


def _describe_scores(scores: ImportanceScores | None) -> dict[str, Any]:
    """The scores' entries in a plan: `PruningPlan.selection` and `PruningPlan.scores`."""
    if scores is None:
        return {}
    described = {
        "digest": scores.digest,
        "settings": dict(scores.settings),
        "data_digest": scores.digests["data"],
        "tokenizer_digest": scores.digests["tokenizer"],
        **({"layers": tried_layer_sets(scores)} if scores.settings.get("depth_metric") else {}),
    }
    return {"selection": str(scores.settings["metric"]), "scores": described}


def _notes_on_sizes(
    config: PrunerConfig,
    before: Mapping[str, int],
    after: Mapping[str, int],
    nonuniform_sizes: Mapping[str, Sequence[int]],
    vocabulary: VocabularyCut | None,
) -> list[str]:
    is_unchanged = after == before and config.model_type is None
    notes = ["Nothing is cut: all sizes are the teacher's."] if is_unchanged else []
    notes += [
        f"{FIELD_OF_AXIS[axis]} differs by layer, from {min(counts)} to {max(counts)}."
        for axis, counts in nonuniform_sizes.items()
    ]
    dropped = before["layers"] - after["layers"]
    if config.contiguous and config.layers_to_drop is None and dropped >= LARGE_BLOCK:
        notes.append(
            f"{dropped} of {before['layers']} layers go as one block. Of SmolLM2-135M, students that lost "
            f"{LARGE_BLOCK} or more single layers (contiguous=False) were much closer to the teacher; of "
            "Llama-3.1-8B, a block was better."
        )
    return notes if vocabulary is None else [*notes, vocabulary.note]


def _notes_on_weights(
    spec: ArchSpec,
    config: PrunerConfig,
    hidden_ratio: float,
    kept: Mapping[str, np.ndarray],
    partners: Mapping[str, np.ndarray],
    repair: str | None,
) -> list[str]:
    """Notes on kept weights that change, or that do not although the request asks for it."""
    notes = []
    if config.norm_compensation and hidden_ratio < 1 and not spec.residual_norms:
        notes.append("norm_compensation changes nothing: the norms of this family have no weights.")
    if partners:
        pairs, heads = (int((units >= 0).sum()) for units in (partners["heads"], kept["heads"]))
        notes.append(f"Head add-back: {pairs} of {heads} kept heads gained their difference to a dropped one.")
    if "projector" in kept:
        notes.append("The neurons of the projector are ranked by their weights, not by calibration data.")
    if repair == SEQUENTIAL:
        notes.append(
            "Sequential repair: projections that write to the residual stream are refitted layer after layer, on the "
            "student's own activations. Other projections that read cut units are refitted by least squares."
        )
    elif repair:
        notes.append(
            "Least-squares repair: projections that read cut units, or precede dropped layers, are refitted to give "
            "what the teacher's give, from the units that stay."
        )
    return notes


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
        bare = [name for name, _ in spec.stream.hidden_powers if spec.dimensions[name] == (CHANNELS,)]
        scales = dict.fromkeys((*spec.residual_norms, *bare), ratio**-0.5)
    if ratio < 1 and spec.stream.scaled_embeddings:
        scales |= {name: ratio**0.5 * scales.get(name, 1.0) for name in spec.stream.stream_writers}
        scales |= {name: ratio**-0.5 * scales.get(name, 1.0) for name in spec.stream.stream_readers}
    if ratio < 1:
        scales |= {name: ratio**-power * scales.get(name, 1.0) for name, power in spec.stream.hidden_powers}
    return {name: factor for name, factor in scales.items() if abs(factor - 1) > 1e-9}


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
    return dict(parameter_counts(meta))
