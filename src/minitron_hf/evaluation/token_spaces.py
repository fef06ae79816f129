"""The tokens that models are measured on where students have fewer than the reference: those of the students.

Text is split by the students' tokenizer, and the other models read the same tokens under their own ids.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.documents import TokenizedDocuments
from ..data.tokens import text_tokenizer, tokenizer_digest
from ..data.vocabulary import refuse_other_tokenizers, stored_tokenizer
from ..errors import DataError, MismatchError
from ..models import load_config
from ..vocabulary.stored import StoredCut, stored_cut


@dataclass(frozen=True)
class TokenSpaces:
    """What each model calls the tokens that all are measured on.

    Attributes:
        own_ids: name → int64 [V], the model's own id of every token; models with just these tokens are absent.
        cut: the cut of the students' vocabulary; None where all models have the same tokens.
    """

    own_ids: Mapping[str, Tensor] = field(default_factory=dict)
    cut: StoredCut | None = None

    @classmethod
    def of(cls, models: Mapping[str, Any], sizes: Mapping[str, int], reference: str | None) -> TokenSpaces:
        """Find the tokens that all models have.

        Args:
            models: name → model, or its folder.
            sizes: name → number of tokens.
            reference: name of the model that the others are compared with.

        Returns:
            Nothing to map where all have equally many tokens, or it is not known which tokens a model has.
        """
        smaller = [name for name, size in sizes.items() if reference is not None and size != sizes[reference]]
        cuts = [stored_cut(models[name]) for name in smaller]
        if reference is None or not cuts or (first := cuts[0]) is None:
            return cls()
        fits = first.kept.max() < sizes[reference] and {sizes[name] for name in smaller} == {len(first.kept)}
        if not fits or any(one is None or not np.array_equal(one.kept, first.kept) for one in cuts):
            return cls()
        ids = torch.from_numpy(first.kept)
        return cls({name: ids for name in sizes if name not in smaller}, first)

    def tokenizer(self, processing_class: Any, models: Mapping[str, Any]) -> Any:
        """The tokenizer of the measured tokens.

        Args:
            processing_class: tokenizer or processor, of any of the models; None for token ids.
            models: name → model.

        Raises:
            MismatchError: if it does not belong to the models.
        """
        if processing_class is None:
            return None
        if self.cut is not None:
            processing_class = self.cut.tokenizer(processing_class)
        compared = {f"model {name!r}": model for name, model in models.items() if name not in self.own_ids}
        refuse_other_tokenizers(processing_class, **compared)
        return processing_class

    def require_own(self, data: Any) -> None:
        """Refuse documents that were split by the teacher's tokenizer before.

        Raises:
            MismatchError: if they were.
        """
        before = data.processing_class if isinstance(data, TokenizedDocuments) else None
        if self.cut is None or before is None or tokenizer_digest(before) == self.cut.facts["student_tokenizer"]:
            return
        raise MismatchError(
            "These documents were tokenised by another tokenizer than the student's, whose vocabulary was cut. Pass "
            "the texts."
        )

    def of_model(self, name: str, tokens: Sequence[int]) -> list[int]:
        """A model's own ids of some of the measured tokens."""
        return self.own_ids[name][list(tokens)].tolist() if name in self.own_ids else list(tokens)


@dataclass(frozen=True)
class Readers:
    """How each model reads and writes text.

    Attributes:
        spaces: the models' own ids of the measured tokens.
        tokenizers: name → tokenizer; empty where all models have the same tokens.
    """

    spaces: TokenSpaces = field(default_factory=TokenSpaces)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spaces: TokenSpaces, models: Mapping[str, Any], processing_class: Any) -> Readers:
        """Find the tokenizers where the vocabulary of students was cut.

        Raises:
            DataError: without a tokenizer.
            MismatchError: see `own_tokenizers`.
        """
        if spaces.cut is None:
            return cls()
        if processing_class is None:
            raise DataError("Drafts of models with different vocabularies need a tokenizer. Pass the teacher's.")
        return cls(spaces, own_tokenizers(models, text_tokenizer(processing_class)))

    def translation(self, teacher: str, draft: str | None) -> dict[str, Any]:
        """Arguments of `generate` for a draft with other tokens."""
        if draft is None or (teacher in self.spaces.own_ids) == (draft in self.spaces.own_ids):
            return {}
        return {"tokenizer": self.tokenizers[teacher], "assistant_tokenizer": self.tokenizers[draft]}


def own_tokenizers(models: Mapping[str, Any], processing_class: Any) -> dict[str, Any]:
    """The tokenizer of every model, where the vocabularies of students were cut: they follow from the teacher's.

    Args:
        models: name → model, or its folder.
        processing_class: tokenizer or processor of one of the models.

    Raises:
        MismatchError: if the tokenizer of a model is neither given, nor follows from it, nor is beside the model.
    """
    cuts = {name: stored_cut(model) for name, model in models.items()}
    known = next((cut for cut in cuts.values() if cut is not None), None)
    if known is None:
        return dict.fromkeys(models, processing_class)
    found = {}
    for name, model in models.items():
        config = load_config(model) if isinstance(model, str | os.PathLike) else model.config
        cut = cuts[name] or (known if config.get_text_config().vocab_size == len(known.kept) else None)
        if cut is not None:
            found[name] = text_tokenizer(cut.tokenizer(processing_class))
            continue
        folder = model if isinstance(model, str | os.PathLike) else config.name_or_path
        beside = stored_tokenizer(os.fspath(folder)) if folder else None
        whole = [text_tokenizer(processing_class), *([] if beside is None else [beside])]
        own = [one for one in whole if tokenizer_digest(one) == known.facts["teacher_tokenizer"]]
        if not own:
            raise MismatchError(
                f"The model {name!r} has more tokens than the tokenizer that is given, and none of its own beside it. "
                "Pass the teacher's tokenizer: that of a student with a cut vocabulary follows from it."
            )
        found[name] = own[0]
    return found
