"""Rules that only some families need, in small objects, so that `ArchSpec` stays a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LogitRules:
    """What a stock class does between its backbone and its logits, beside the output projection.

    The same field name means different things in different families, so each table says which it is.

    Attributes:
        multiplied_by: config field (or property) that the logits are multiplied by.
        divided_by: config field that they are divided by.
        transformed_by: module between the last norm of the backbone and the output projection.
        capped_by: config field with the `cap` of `cap * tanh(logits / cap)`, applied last; None in a config for none.
    """

    multiplied_by: str | None = None
    divided_by: str | None = None
    transformed_by: str | None = None
    capped_by: str | None = None

    def scale(self, config: PretrainedConfig) -> float:
        """Factor on the logits of a model.

        Args:
            config: the language model's.
        """
        factor = 1.0
        if self.multiplied_by and (value := getattr(config, self.multiplied_by, None)) is not None:
            factor *= float(value)
        if self.divided_by and (value := getattr(config, self.divided_by, None)) is not None:
            factor /= float(value)
        return factor

    def cap(self, config: PretrainedConfig) -> float | None:
        """Bound of the logits of a model, or None.

        Args:
            config: the language model's.
        """
        value = getattr(config, self.capped_by, None) if self.capped_by else None
        return None if value is None else float(value)


#: Most families leave them as they are.
PLAIN_LOGITS = LogitRules()
#: Gemma's relatives bound their logits.
CAPPED_LOGITS = LogitRules(capped_by="final_logit_softcapping")
#: Cohere's scale them, and so do Granite's, the other way round.
COHERE_LOGITS = LogitRules(multiplied_by="logit_scale")
GRANITE_LOGITS = LogitRules(divided_by="logits_scaling")
