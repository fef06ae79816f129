"""The tokenizer of a student whose vocabulary is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import checks_kinds
from ..vocabulary.stored import StoredCut

if TYPE_CHECKING:
    from .plan import PruningPlan


@checks_kinds
def prune_tokenizer(processing_class: Any, plan: PruningPlan) -> Any:
    """The tokenizer of a plan's student, or its processor.

    It emits kept tokens alone, under the student's ids, and every text decodes to what it did. A text has the pieces
    that it had, where all of these stay.

    Args:
        processing_class: the teacher's tokenizer, or its processor of images or sound, which gets the tokenizer and
            the new ids of its tokens; not changed. The student's is returned as it is.
        plan: plan with `vocab_size`, or of a later round than the one with it. Without a cut of the vocabulary, a
            tokenizer is returned as it is.

    Raises:
        MismatchError: if the tokenizer is not the one that the plan was made with.
        UnsupportedModelError: if it cannot be rewritten.

    Example:
        >>> tokenizer = prune_tokenizer(tokenizer, student.pruning_plan)  # doctest: +SKIP
        >>> save_model(student, "student", tokenizer)  # doctest: +SKIP
    """
    if plan.teacher_tokens is None or plan.vocabulary is None:
        return processing_class
    return StoredCut(plan.teacher_tokens, plan.vocabulary).tokenizer(processing_class)
