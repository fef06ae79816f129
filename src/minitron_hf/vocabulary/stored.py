"""The cut of a student's vocabulary, as its plan holds it: attached to the model, in its folder or on the Hub."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import safe_open
from tokenizers.models import WordPiece

from ..compat import commit_hash
from ..data.tokens import text_tokenizer, tokenizer_digest
from ..errors import MismatchError
from ..formats import read_artefact
from ..models import cut_plan_files
from .ids import names_processor_ids, renumbered_fields
from .rewriting import cut_tokenizer


@dataclass(frozen=True)
class StoredCut:
    """The tokens that a student has of its teacher's.

    Attributes:
        kept: int64 [V], the teacher's id of every token of the student.
        facts: digests of both tokenizers, and more (`VocabularyCut.facts`).
    """

    kept: np.ndarray
    facts: Mapping[str, Any]

    def tokenizer(self, processing_class: Any) -> Any:
        """The student's tokenizer, or processor, from either model's.

        Raises:
            MismatchError: if it is neither.
        """
        found = tokenizer_digest(processing_class)
        if found == self.facts["student_tokenizer"]:
            return processing_class
        if found != self.facts["teacher_tokenizer"]:
            raise MismatchError(
                "The vocabulary of this plan was chosen with another tokenizer than the one that is given. Pass the "
                "teacher's tokenizer, or plan again."
            )
        whole = text_tokenizer(processing_class)
        cut = cut_tokenizer(whole, self.kept)
        return cut if whole is processing_class else self._with(processing_class, cut)

    def _with(self, processor: Any, cut: Any) -> Any:
        """A copy of a processor with the student's tokenizer, and the student's ids in its attributes."""
        new_ids = {int(old): new for new, old in enumerate(self.kept)}
        copied = copy.copy(processor)
        copied.tokenizer = cut
        num_rows = max(len(processor.tokenizer), int(self.kept.max()) + 1)
        vars(copied).update(renumbered_fields(vars(processor), new_ids, num_rows, names_processor_ids))
        return copied

    def respelled(self, tokens: Iterable[int], teacher: Any, student: Any) -> list[int]:
        """The student's ids of the teacher's tokens; a dropped token becomes the pieces that spell it.

        Args:
            tokens: ids of the teacher.
            teacher: its tokenizer.
            student: the student's.
        """
        new_ids = {int(old): new for new, old in enumerate(self.kept)}
        found: list[int] = []
        for token in tokens:
            if token in new_ids:
                found.append(new_ids[token])
            elif (piece := teacher.convert_ids_to_tokens(token)) is not None:  # None: a row that no text has
                found += _pieces(student.backend_tokenizer.model, piece)
        return found


def _pieces(model: Any, piece: str) -> list[int]:
    """The ids that spell a piece in another model of the same kind."""
    prefix = getattr(model, "continuing_subword_prefix", None)
    if not (isinstance(model, WordPiece) and prefix and piece.startswith(prefix)):
        return [token.id for token in model.tokenize(piece)]
    rest, found = piece.removeprefix(prefix), []
    while rest:  # the longest piece from the left that begins inside a word, as the model looks for them
        ends = range(len(rest), 0, -1)
        end, index = next((end, i) for end in ends if (i := model.token_to_id(prefix + rest[:end])) is not None)
        found.append(index)
        rest = rest[end:]
    return found


def stored_cut(model: Any) -> StoredCut | None:
    """The cut of a student's vocabulary; None if its plan has none, or is not known.

    Args:
        model: a model, its folder or its Hub id.
    """
    if (plan := getattr(model, "pruning_plan", None)) is not None:
        return None if plan.vocabulary is None else StoredCut(plan.teacher_tokens, plan.vocabulary)
    if isinstance(model, str | os.PathLike):
        files = cut_plan_files(model)
    else:
        name = getattr(model.config, "name_or_path", None)
        files = cut_plan_files(name, revision=commit_hash(model.config)) if name else None
    if files is None:
        return None
    plan_file, indices = files
    with safe_open(indices, "np") as stored:
        name = "vocab" if "vocab" in stored.keys() else "earlier_tokens"  # noqa: SIM118 (not a mapping)
        return StoredCut(stored.get_tensor(name), read_artefact(plan_file)["vocabulary"])
