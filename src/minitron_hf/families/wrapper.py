"""`Wrapper`: a model that holds a language model beside others, and how the language model's table reads inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import accept_old_names
from .axes import Axis
from .rules import PLAIN_LOGITS, LogitRules
from .spec import ArchSpec

#: Neurons of a projector that the stock class makes as many as the hidden size: no config field holds their number.
PROJECTOR = Axis("projector", implied="hidden")


@accept_old_names(writers="stream_writers", opaque="unpruned_prefixes")
@dataclass(frozen=True)
class Wrapper:
    """A model that holds a language model beside others: images and sound become inputs of it.

    The language model is described by the table of its own family.

    Attributes:
        model_type: the wrapper's.
        text_types: model types of the language models that it may hold.
        prefix: what names of the language model begin with.
        is_flat: whether the config has no part for the language model alone, whose sizes stand beside the others'.
        has_whole_model: whether the language model has its output head inside the wrapper, too; else the wrapper holds
            its backbone, and the head is the wrapper's own `lm_head`.
        tensors: tensor name → dimensions, for tensors outside the language model that know its sizes (projectors).
            `any` is a dimension of the wrapper's own; `projector` that of neurons that are as many as the hidden size.
            A number between dots is written `*` where any may stand.
        unpruned_prefixes: beginnings of the names of all other tensors, which are kept as they are.
        width_fields: config fields beside the language model's config that hold its hidden size; `a.b` is the field
            `b` of the config `a`.
        deep_inputs: config field with a list, as long as the number of first layers that images of their own are added
            to; these layers stay.
        image_layers: config fields with the numbers of layers that images of their own are added to, or lists that end
            with such a number; these layers and all before them stay.
        refused: axis → why it cannot be cut inside this wrapper.
        logits: scales and caps of the logits, in the forward pass of the wrapper; with `has_whole_model` they are
            the language model's own.
        stream_writers: those of `tensors` that write to the residual stream; default: all with a `hidden` dimension.
    """

    model_type: str
    text_types: tuple[str, ...] = ()
    prefix: str = "model.language_model."
    unpruned_prefixes: tuple[str, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)
    stream_writers: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    logits: LogitRules = PLAIN_LOGITS
    width_fields: tuple[str, ...] = ()
    deep_inputs: str = ""
    image_layers: tuple[str, ...] = ()
    has_whole_model: bool = False
    is_flat: bool = False

    def around(self, spec: ArchSpec) -> ArchSpec:
        """The table of a language model as it is named inside the wrapper, with the wrapper's own tensors."""

        def renamed(name: str) -> str:
            base = f"{spec.layers_path.partition('.')[0]}."
            if self.has_whole_model:
                return self.prefix + name
            return self.prefix + name.removeprefix(base) if name.startswith(base) else name

        refused = {**spec.refused, **self.refused}
        tensors = {} if "hidden" in refused else self.tensors
        # What is as wide as a hidden size that stays is refused as well.
        equal = tuple(pair for pair in spec.equal if "hidden" not in refused or "hidden" not in pair)
        writers = self.stream_writers or tuple(name for name, text in tensors.items() if "hidden" in text.split())
        has_projector = any("projector" in text for text in tensors.values())
        stream = replace(
            spec.stream,
            stream_writers=(
                *map(renamed, spec.stream.stream_writers),
                *(writers if spec.stream.scaled_embeddings else ()),
            ),
            stream_readers=tuple(map(renamed, spec.stream.stream_readers)),
            hidden_powers=tuple((renamed(name), power) for name, power in spec.stream.hidden_powers),
        )
        return replace(
            spec,
            model_type=self.model_type,
            axes=(*spec.axes, PROJECTOR) if has_projector else spec.axes,
            equal=(*equal, ("projector", "hidden")) if has_projector else equal,
            layers_path=renamed(spec.layers_path),
            final_norm=renamed(spec.final_norm),
            outer={**{renamed(name): text for name, text in spec.outer.items()}, **tensors},
            input_writers=writers,
            width_fields=self.width_fields,
            deep_inputs=self.deep_inputs,
            image_layers=self.image_layers,
            stream=stream,
            logits=spec.logits if self.has_whole_model else self.logits,
            refused=refused,
            unpruned_prefixes=self.unpruned_prefixes,
            equivalent_classes=(),  # of the language model alone
            variants=tuple((name, value, self.around(variant)) for name, value, variant in spec.variants),
        )
