"""The tokens that models are measured on where students have fewer than the reference: those of the students.

Text is split by the students' tokenizer, and the other models read the same tokens under their own ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.documents import TokenizedDocuments
from ..data.tokens import tokenizer_digest
from ..data.vocabulary import refuse_other_tokenizers
from ..errors import DataError, MismatchError
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

    def refuse(self, **wanted: Any) -> None:
        """Refuse measurements whose prompts every model would have to split by a tokenizer of its own.

        Raises:
            DataError: naming them.
        """
        if self.cut is not None and (names := [name for name, value in wanted.items() if value]):
            raise DataError(
                f"{', '.join(names)}: not for models with different vocabularies in one call. Leave it out, or "
                "measure the models one at a time."
            )
