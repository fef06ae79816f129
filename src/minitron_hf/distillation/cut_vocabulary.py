"""A student with fewer tokens than its teacher: it reads its own tokens, the teacher the same ones under its ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.vocabulary import refuse_other_tokenizers, stored_tokenizer
from ..errors import KINDS, ArgumentError, MismatchError
from ..families import VOCABULARY, is_multimodal
from ..files import digest
from ..losses.heads import base_model_of
from ..pruning.plan import PLAN_NAME, PruningPlan
from ..pruning.tokenizers import prune_tokenizer
from .adapters import source_name
from .arguments import processing_class_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .config import DistillationConfig
    from .inputs import TeacherSource, TrainingData


@dataclass(frozen=True)
class KeptTokens:
    """The teacher's tokens that the student has.

    Attributes:
        ids: int64 [V], the teacher's id of every token of the student.
        plan: the plan that chose them.
    """

    ids: Tensor
    plan: PruningPlan

    @classmethod
    def of(cls, plan: PruningPlan) -> KeptTokens:
        """Those of a plan that cuts the vocabulary, or whose earlier round has cut it."""
        assert plan.teacher_tokens is not None
        return cls(torch.from_numpy(plan.teacher_tokens), plan)

    @property
    def digest(self) -> str:
        """Digest of the ids."""
        return digest(self.ids.tolist())

    def tokenizer(self, processing_class: Any) -> Any:
        """The student's tokenizer, from either model's.

        Raises:
            MismatchError: if it is neither.
        """
        if processing_class is None:
            raise MismatchError(
                "The student's vocabulary was cut, and its tokenizer is not known. Pass processing_class=tokenizer."
            )
        return prune_tokenizer(processing_class, self.plan)

    def inputs_of_teacher(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of the student's forward pass with the teacher's ids."""
        return {**inputs, "input_ids": self.of_teacher(inputs["input_ids"])}

    def of_teacher(self, tokens: Tensor) -> Tensor:
        """The teacher's ids of the student's tokens."""
        return self.ids.to(tokens.device)[tokens]


def kept_tokens(
    student: Any, plans: Sequence[PruningPlan], student_config: PretrainedConfig, teacher_config: PretrainedConfig
) -> KeptTokens | None:
    """The teacher's tokens that a student has, if a plan cut the vocabulary from the one to the other.

    Args:
        student: a model, or a path or Hub id.
        plans: of the student; empty: the plan in its folder, if there is one.
        student_config: the student's.
        teacher_config: the teacher's.

    Returns:
        None where both have equally many tokens, or no plan connects them.
    """
    sizes = tuple(config.get_text_config().vocab_size for config in (teacher_config, student_config))
    if sizes[0] == sizes[1]:
        return None
    folder = source_name(student)
    if not plans and folder is not None and (Path(folder) / PLAN_NAME).is_file():
        plans = [PruningPlan.from_pretrained(folder)]
    cut = next((plan for plan in reversed(plans) if plan.teacher_tokens is not None), None)
    if cut is None or not _fits(cut, sizes[0]) or len(KeptTokens.of(cut).ids) != sizes[1]:
        return None
    return KeptTokens.of(cut)


def _fits(plan: PruningPlan, vocab_size: int) -> bool:
    """Whether a plan may be of a teacher with so many tokens."""
    if VOCABULARY in plan.kept:
        return bool(plan.sizes[VOCABULARY]["teacher"] == vocab_size)
    return int(KeptTokens.of(plan).ids.max()) < vocab_size  # the plan of a later round does not say


def tokens_of_plan(plan: PruningPlan | None, teacher_config: PretrainedConfig) -> KeptTokens | None:
    """The teacher's tokens that the student of a plan has; None where the plan does not cut the vocabulary.

    Args:
        plan: None: no plan.
        teacher_config: the teacher's.

    Raises:
        MismatchError: if the plan cuts a vocabulary of another size.
    """
    if plan is None or plan.teacher_tokens is None:
        return None
    if not _fits(plan, found := teacher_config.get_text_config().vocab_size):
        raise MismatchError(
            f"The plan cuts a vocabulary of {plan.sizes[VOCABULARY]['teacher']:,} tokens, and this teacher has "
            f"{found:,}. Use the teacher that the plan was made for, or plan again."
        )
    return KeptTokens.of(plan)


def require_own_caches(kept: KeptTokens | None, data: TrainingData) -> KeptTokens | None:
    """The kept tokens; refuses teacher caches that were written for a student with other tokens.

    Raises:
        MismatchError: if there is one.
    """
    for cache in data.caches:
        written_for = cache.manifest["settings"].get("kept_tokens")
        if kept is not None and written_for is None:
            raise MismatchError(
                "The student's vocabulary was cut, and this teacher cache holds distributions over all tokens of the "
                "teacher on rows that its own tokenizer splits. Write the cache with pruning_plan=plan, or pass the "
                "texts and teacher_model instead of the cache."
            )
        if written_for != (None if kept is None else kept.digest):
            raise MismatchError(
                "The teacher cache was written for a student with other tokens (pruning_plan of "
                "cache_teacher_logits). Write it with the plan of this student, or without a plan for one that has "
                "all tokens of the teacher."
            )
    return kept


def plans_of(model: Any, given: PruningPlan | Sequence[PruningPlan] | None) -> Sequence[PruningPlan]:
    """The plans of a student: those that are given, or the one that is attached to it.

    Raises:
        ArgumentError: if something else is given.
    """
    plans = getattr(base_model_of(model), "pruning_plan", None) if given is None else given
    plans = (plans,) if plans is None or isinstance(plans, PruningPlan) else tuple(plans)
    for plan in plans:
        if plan is not None and not isinstance(plan, PruningPlan):
            raise ArgumentError(
                f"pruning_plan: expected a PruningPlan, not a {type(plan).__name__}. {KINDS['PruningPlan']}"
            )
    return tuple(plan for plan in plans if plan is not None)


def checked_tokenizer(
    processing_class: Any,
    student: Any,
    student_config: Any,
    teacher: TeacherSource,
    kept: KeptTokens | None,
    args: DistillationConfig,
) -> Any:
    """The tokenizer of the student's tokens: the given one, or of a student in memory only, the teacher's.

    Raises:
        MismatchError: if it does not belong to the models.
        DataError: if there is none.
    """
    folder = source_name(student)
    if processing_class is None and folder is None:
        processing_class = processing_class_of(teacher.config, args.trust_remote_code)
    elif processing_class is None and args.assistant_only_loss:  # its chat template decides how the turns are found
        processing_class = processing_class_of(student_config, args.trust_remote_code)
    if kept is None:
        refuse_other_tokenizers(processing_class, student=student, teacher=teacher.model)
        return processing_class
    if processing_class is None and folder is not None:
        is_plain = not is_multimodal(student_config)
        processing_class = (
            stored_tokenizer(folder) if is_plain else processing_class_of(student_config, args.trust_remote_code)
        )
    processing_class = kept.tokenizer(processing_class)
    refuse_other_tokenizers(processing_class, student=student)
    return processing_class
