"""Rules that only some families need, in small objects, so that `ArchSpec` stays a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import accept_old_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LogitRules:
    """Scales, caps and modules between the backbone and the logits of a stock class, beside the output projection.

    The same config field multiplies in one family and divides in another, so each table says which it does.

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


@dataclass(frozen=True)
class LayerRules:
    """Config fields that say something of single layers beside lists and counts, and layers that depend on others.

    Attributes:
        layer_patterns: pairs (field, list with one entry per layer): the stock config expands the field, entries
            [[kind, …], repetitions], to the list; after a depth cut it holds the list, not repeated.
        trailing_layers: config fields that count layers from the last one, recounted with the layers.
        layer_indices: config fields that list layer indices, renumbered with the layers.
        sparse_layers: pairs (field that lists dense layers, field with the period of sparse ones): a layer has experts
            if its number, counted from 1, is a multiple of the period and it is not listed. After a depth cut the
            period is 1 and the list says it all.
        reusing_layers: (config field with one entry per layer, kind): a layer of this kind uses again what the nearest
            layer before it of another kind computed, and can only stay together with that one.
        sparse_ranges: triples (field with the first layer that may have experts, field with the last, field with the
            period of sparse ones), where a layer has experts if it lies between them and its number, counted from 1,
            is a multiple of the period. A depth cut that no numbers describe is refused.
        fixed_layers: pairs (config property with one entry per layer, value): such a layer is never dropped, because
            later ones read what it stores.
        fixed_ends: layers, counted from the last one where negative, that are never dropped, because the stock classes
            build them unlike the others or insist on their kind there.
        derived_kinds: (config property with one entry per layer, fields from which it derives): what kind each layer
            is, where no field lists it; a depth cut that leaves another order is refused, naming the fields.
    """

    layer_patterns: tuple[tuple[str, str], ...] = ()
    trailing_layers: tuple[str, ...] = ()
    layer_indices: tuple[str, ...] = ()
    sparse_layers: tuple[tuple[str, str], ...] = ()
    reusing_layers: tuple[tuple[str, str], ...] = ()
    sparse_ranges: tuple[tuple[str, str, str], ...] = ()
    fixed_layers: tuple[tuple[str, Any], ...] = ()
    fixed_ends: tuple[int, ...] = ()
    derived_kinds: tuple[tuple[str, str], ...] = ()


@accept_old_names(writers="stream_writers")
@dataclass(frozen=True)
class StreamRules:
    """Further changes of the residual stream after a cut of the hidden size.

    Attributes:
        scaled_embeddings: whether the stock class multiplies token embeddings by √hidden_size. A cut of the hidden
            size shrinks that factor, so the `stream_writers` are scaled alike. The norms that read the residual stream
            do not see the difference.
        stream_writers: the tensors that scale what else is written to the residual stream: output projections with
            their biases, or the norms after them; learned positions. Needed where the embeddings are scaled.
        stream_readers: the tensors that read the residual stream without a norm. Needed where the embeddings are
            scaled.
        hidden_powers: pairs (tensor, power): the stock class multiplies what the tensor reads by hidden_size to that
            power. A vector over the hidden size among them scales what a norm without a weight gives.
        stacked_states: whether the state between layers is several residual streams, stacked before batch and tokens.
        fixed_basis: why the channels of the residual stream cannot be rotated, where the tensors alone do not show
            it: a function of single channels, or one that is not in the table. Empty: they can be.
    """

    scaled_embeddings: bool = False
    stream_writers: tuple[str, ...] = ()
    stream_readers: tuple[str, ...] = ()
    hidden_powers: tuple[tuple[str, float], ...] = ()
    stacked_states: bool = False
    fixed_basis: str = ""


@accept_old_names(widened="size_multipliers")
@dataclass(frozen=True)
class ConfigRules:
    """Config fields that follow from sizes, and sizes that follow from flags.

    Attributes:
        absent_parts: config fields with a number of layers that checkpoints may hold beside those of the stock model:
            0 in the student, whose checkpoint has none.
        derived_fields: pairs (config field, expression of axes): fields that must hold that much, and are rewritten
            with the axes.
        scaled_fields: (config field, axis, power): the stock class divides it by a size (to that power), so it is
            multiplied by the student's over the teacher's. A whole number with power 1 has to stay whole.
        size_multipliers: (axis, flag, config property with one entry per layer, value, factor): where the flag is
            set, layers with that value hold `factor` times the units that the config says.
    """

    absent_parts: tuple[str, ...] = ()
    derived_fields: tuple[tuple[str, str], ...] = ()
    scaled_fields: tuple[tuple[str, str, float], ...] = ()
    size_multipliers: tuple[tuple[str, str, str, Any, int], ...] = ()


#: Most families need none of these.
PLAIN_LOGITS, NO_LAYER_RULES, PLAIN_STREAM, NO_CONFIG_RULES = LogitRules(), LayerRules(), StreamRules(), ConfigRules()
#: Gemma's relatives bound their logits.
CAPPED_LOGITS = LogitRules(capped_by="final_logit_softcapping")
#: Cohere's scale them, and so do Granite's, the other way round.
COHERE_LOGITS = LogitRules(multiplied_by="logit_scale")
GRANITE_LOGITS = LogitRules(divided_by="logits_scaling")
