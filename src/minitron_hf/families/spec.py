"""`ArchSpec`: what one model family looks like, and the generic questions that can be asked of any of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError, accept_old_names
from .axes import CHANNELS, Axis, Dimension, dimension_axes, dimension_size, implied_size, parse_dimensions
from .rules import (
    NO_CONFIG_RULES,
    NO_LAYER_RULES,
    PLAIN_LOGITS,
    PLAIN_STREAM,
    ConfigRules,
    LayerRules,
    LogitRules,
    StreamRules,
)
from .tensors import is_quantised, named_tensors, text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Standard config name → axis: the vocabulary of `PrunerConfig`, and of every message about sizes.
PRUNER_FIELDS: Mapping[str, str] = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv",
    "num_experts": "experts",
    "moe_intermediate_size": "moe_ffn",
    "shared_expert_intermediate_size": "shared_ffn",
    "conv_dim": "conv_dim",
    "mamba_num_heads": "ssm_heads",
    "mamba_head_dim": "ssm_dim",
}
#: The size whose units are chosen by their counts in a corpus instead of scores, and its axis.
VOCABULARY_FIELD, VOCABULARY = "vocab_size", "vocab"
#: The reverse: axis → the name users know it by.
FIELD_OF_AXIS: Mapping[str, str] = {axis: name for name, axis in PRUNER_FIELDS.items()}


#: A dimension that no axis of the language model is part of.
ANY: Dimension = (("any",),)


@accept_old_names(taps="hook_points", sisters="equivalent_classes", opaque="unpruned_prefixes")
@dataclass(frozen=True)
class ArchSpec:
    """A model family as a table. Families hold data only; every rule about them is a generic loop over it.

    Attributes:
        model_type: the config's `model_type`.
        axes: the family's axes. Order matters only for `implied` sizes, which read the axes before them.
        layers_path: path of the module list of decoder layers.
        outer: tensor name → dimensions, for tensors outside the layers. A tensor is a parameter or a saved buffer;
            one without dimensions (`""`) is a single number.
        layer: tensor name inside one layer → dimensions: the union of all kinds of layers that the family has.
            Biases that a config flag switches off, or experts of a dense layer, are simply not found there.
        hook_points: axis → module (inside a layer) whose input carries that axis' units in its last dimension: the
            projection that writes them back to the residual stream. For `experts` and `moe_ffn` the module that holds
            the stacked experts. A layer without any tensor of an axis has no such units, and needs no hook point.
        layer_norms: modules inside a layer whose output scores the hidden axis: the norms of what its sublayers read,
            or of what they write where nothing is normalised before. Every layer has at least one of them.
        final_norm: the last norm, which scores it too.
        groups: pairs (inner, outer): every kept outer unit keeps equally many inner units, ordered outer-major.
        equal: pairs of dimensions that the stock class cannot hold at different sizes; one axis of each can be cut.
        gated_norms: norm inside a layer, called with a gate → axis of the groups of channels, one after the other,
            each of which it normalises separately.
        readers: pairs (axis, module): another module inside a layer whose input carries the axis' units.
        multiples: pairs (axis, divisor axis) that the stock config insists on.
        layer_lists: config fields with one entry per layer, sliced with the layers. Sizes may be among them.
        leading_layers: config fields that count layers from the first one, recounted with the layers.
        needed_kinds: (config field with one entry per layer, kinds): at least one layer of these kinds has to stay,
            because the stock cache counts tokens there, or the stock config insists.
        layer_rules: config fields that say something of single layers, and layers that depend on others.
        norm_offset: number that the norms add to their weights: 1 in families that store them minus one.
        bare_norms: whether norms without weights (of queries and keys) add the same number to the mean square.
        stream: further changes of the residual stream after a cut of the hidden size.
        config_rules: config fields that follow from sizes.
        unpruned_prefixes: beginnings of names of tensors that are no part of the language model, and kept as they are.
        input_writers: tensors in `outer` that write inputs of the language model beside its embeddings: projectors.
        width_fields: config fields outside the language model's config that hold its hidden size; `a.b` is the field
            `b` of the config `a`.
        deep_inputs: such a field with a list, as long as the number of first layers that images are added to.
        image_layers: such fields with the numbers of layers that images are added to; the last entry of a list counts.
        logits: scales and caps of the logits after the output projection.
        least: (axis, expression of config fields): the smallest number of units to keep (routing picks that many).
        refused: axis → why it cannot be cut in this family.
        refused_if: (config field, value, axis, reason): refusals that depend on a flag; axis `*` refuses the model.
        equivalent_classes: (model type, fields, changes): other stock classes that hold exactly the same model if the
            teacher's config has these fields, after these changes. They lack a limit on sizes of its own config.
        variants: (config field, value, table): other layouts under the same `model_type`; the first whose field has
            that value describes the model instead. `a.b` names the entry `b` of the field `a`.
    """

    model_type: str
    axes: tuple[Axis, ...]
    layers_path: str
    outer: Mapping[str, str]
    layer: Mapping[str, str]
    hook_points: Mapping[str, str]
    layer_norms: tuple[str, ...]
    final_norm: str
    groups: tuple[tuple[str, str], ...] = ()
    equal: tuple[tuple[str, str], ...] = ()
    gated_norms: Mapping[str, str] = field(default_factory=dict)
    readers: tuple[tuple[str, str], ...] = ()
    multiples: tuple[tuple[str, str], ...] = ()
    layer_lists: tuple[str, ...] = ()
    leading_layers: tuple[str, ...] = ()
    needed_kinds: tuple[tuple[str, tuple[str, ...]], ...] = ()
    layer_rules: LayerRules = NO_LAYER_RULES
    norm_offset: float = 0.0
    bare_norms: bool = False
    stream: StreamRules = PLAIN_STREAM
    config_rules: ConfigRules = NO_CONFIG_RULES
    unpruned_prefixes: tuple[str, ...] = ()
    input_writers: tuple[str, ...] = ()
    width_fields: tuple[str, ...] = ()
    deep_inputs: str = ""
    image_layers: tuple[str, ...] = ()
    logits: LogitRules = PLAIN_LOGITS
    least: tuple[tuple[str, str], ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    refused_if: tuple[tuple[str, Any, str, str], ...] = ()
    equivalent_classes: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = ()
    variants: tuple[tuple[str, Any, ArchSpec], ...] = ()

    def variant(self, config: PretrainedConfig) -> ArchSpec:
        """The layout that a config has: this one, or one of its variants."""
        for name, value, spec in self.variants:
            if _field(config, name) == value:
                return spec.variant(config)
        return self

    def with_fixed_layers(self, config: PretrainedConfig) -> ArchSpec:
        """This layout, in which the layers that images are added to stay, and all before them.

        Args:
            config: the whole model's.
        """
        if not self.deep_inputs and not self.image_layers:
            return self

        def entries(path: str) -> Sequence[Any]:
            return reduce(getattr, path.split("."), config) or ()  # type: ignore[arg-type]

        numbers = [one if isinstance(one, int) else one[-1] for path in self.image_layers for one in entries(path)]
        first = max([len(entries(self.deep_inputs)) if self.deep_inputs else 0, *(number + 1 for number in numbers)])
        fixed = (*range(first), *self.layer_rules.fixed_ends)
        return replace(self, layer_rules=replace(self.layer_rules, fixed_ends=fixed))

    def layouts(self) -> Iterator[ArchSpec]:
        """This layout and all its variants."""
        yield self
        for *_, spec in self.variants:
            yield from spec.layouts()

    @cached_property
    def axis(self) -> Mapping[str, Axis]:
        """Axes by name."""
        return {axis.name: axis for axis in self.axes}

    @cached_property
    def dimensions(self) -> Mapping[str, tuple[Dimension, ...]]:
        """Parsed dimensions of every pattern in `outer` and (relative names) `layer`."""
        return {name: parse_dimensions(text) for name, text in {**self.outer, **self.layer}.items()}

    def sizes(self, config: PretrainedConfig, layer: int | None = None) -> dict[str, int]:
        """Size of every axis, read from a config.

        Args:
            config: the config.
            layer: as this layer sees them, where they differ from layer to layer (list-valued fields,
                `per_layer_config`); None for the whole model: the largest entry of a list.

        Raises:
            UnsupportedModelError: if the config lacks a size that has no implied value, or is of a refused variant.
        """
        config = text_config(config)
        self._require_supported(config)
        sizes: dict[str, int] = {}
        for axis in self.axes:
            value = self._value(config, axis.fields[0], layer) if axis.fields else None
            for name in axis.fields[1:]:
                listed = getattr(config, name, None)
                if isinstance(listed, list) and set(listed) != {value}:
                    raise UnsupportedModelError(
                        f"The layers of this {self.model_type} model differ in {name}={listed}. Only models with the "
                        f"same number in every layer can be pruned."
                    )
            if value is None and axis.implied is not None:
                value = implied_size(axis.implied, sizes)
            if axis.rounding is not None and isinstance(value, int):
                value = axis.rounding.size(value, vars(config))
            if not isinstance(value, int):
                raise UnsupportedModelError(
                    f"The config of this {self.model_type} model has {axis.fields[0]}={value!r}; expected an integer."
                )
            sizes[axis.name] = value
        for name, flag, kinds, kind, factor in self.config_rules.size_multipliers:
            if layer is not None and getattr(config, flag) and getattr(config, kinds)[layer] == kind:
                sizes[name] *= factor
        return sizes

    def _value(self, config: PretrainedConfig, name: str, layer: int | None) -> Any:
        """What a config field says of one layer, or of all."""
        if name in (getattr(config, "per_layer_attributes", None) or ()):
            if layer is not None:
                return getattr(config.per_layer_config[layer], name)
            # Reading it as an attribute is an error there.
            return vars(config)[config.attribute_map.get(name, name)]
        value = getattr(config, name, None)
        if name in self.layer_lists and isinstance(value, list):
            return max(value) if layer is None else value[layer]
        return value

    def layer_sizes(self, config: PretrainedConfig) -> list[dict[str, int]]:
        """Sizes of all axes as each layer sees them."""
        return [self.sizes(config, layer) for layer in range(self.sizes(config)["layers"])]

    def holds_lists(self, axis: str, config: PretrainedConfig) -> bool:
        """Whether the stock config has one size of an axis for every layer."""
        config = text_config(config)
        fields = self.axis[axis].fields if axis in self.axis else ()
        return bool(fields) and fields[0] in self.layer_lists and isinstance(getattr(config, fields[0], None), list)

    @cached_property
    def numbered(self) -> Mapping[str, re.Pattern[str]]:
        """Patterns in `outer` for several tensors, which differ in a number, and the names that they match."""
        return {name: re.compile(re.escape(name).replace(r"\*", r"\d+")) for name in self.outer if ".*." in name}

    @cached_property
    def residual_norms(self) -> tuple[str, ...]:
        """Weights of the norms over the hidden size, the only vectors of that width that are called weights."""
        return tuple(name for name, dims in self.dimensions.items() if dims == (CHANNELS,) and name.endswith("weight"))

    def _require_supported(self, config: PretrainedConfig) -> None:
        for name, value, axis, why in self.refused_if:
            if axis == "*" and getattr(config, name, None) == value:
                raise UnsupportedModelError(
                    f"'{self.model_type}' models with {name}={value!r} cannot be pruned: {why}. Choose another one."
                )

    def own_units(self, axis: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of one value per unit, in one layer if it has its own: `[units]`, or `[outer, units]` within another.

        Args:
            axis: the axis.
            sizes: sizes of all axes, as the layer sees them.
        """
        within = self.axis[axis].within
        return (sizes[axis],) if within is None else (sizes[within], sizes[axis])

    def units(self, axis: str, config: PretrainedConfig) -> tuple[int, ...]:
        """Shape of one value per unit of the model: `[layers, …]` where every layer has its own.

        Where layers hold unequal numbers of them, there is room for the most.
        """
        if not self.axis[axis].per_layer:
            return self.own_units(axis, self.sizes(config))
        units = [self.own_units(axis, sizes) for sizes in self.layer_sizes(config)]
        return (len(units), *map(max, zip(*units, strict=True)))

    def layers_with(self, axis: str, names: Iterable[str]) -> list[int]:
        """Layers that hold units of an axis: some of their tensors have it.

        Args:
            axis: the axis.
            names: names of all tensors of the model.
        """
        located = [found for name in names if (found := self.locate(name)) is not None]
        having = {pattern for pattern, dims in self.dimensions.items() if any(axis in dimension_axes(d) for d in dims)}
        return sorted({layer for pattern, layer in located if layer is not None and pattern in having})

    def locate(self, parameter: str) -> tuple[str, int | None] | None:
        """Pattern and layer index of a parameter name, or None when the table does not claim it."""
        if parameter in self.outer:
            return parameter, None
        for pattern, name in self.numbered.items():
            if name.fullmatch(parameter):
                return pattern, None
        prefix = f"{self.layers_path}."
        if parameter.startswith(prefix):
            index, _, relative = parameter[len(prefix) :].partition(".")
            if index.isdigit() and relative in self.layer:
                return relative, int(index)
        return None

    def layer_parameter(self, layer: int, relative: str) -> str:
        """Full name of a parameter or module inside a layer."""
        return f"{self.layers_path}.{layer}.{relative}"

    def shape(self, pattern: str, sizes: Mapping[str, int], found: Sequence[int] = ()) -> tuple[int, ...]:
        """Shape that the table gives to the parameters of a pattern; `found` says how long a dimension `any` is."""
        dimensions = self.dimensions[pattern]
        if len(found) != len(dimensions):
            found = (0,) * len(dimensions)
        return tuple(
            own if dimension == ANY else dimension_size(dimension, sizes) for dimension, own in zip(dimensions, found)
        )

    def check(self, model: PreTrainedModel) -> None:
        """Prove that the table describes this model: every tensor claimed, with exactly the declared shape.

        Works on the meta device too.

        Raises:
            UnsupportedModelError: naming every parameter that is unclaimed or has another shape; or if the model is
                quantised, whose stored tensors are not the ones the table describes.
        """
        if is_quantised(model):
            raise UnsupportedModelError(
                f"This {type(model).__name__} is quantised, and scores, plans and students are made of plain weights. "
                "Load it without quantization_config (dequantise a checkpoint that is stored quantised first), and "
                "quantise the student."
            )
        sizes = self.sizes(model.config)
        layer_sizes = self.layer_sizes(model.config)
        tensors = named_tensors(model, tied=True)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        problems = []
        layers = set()
        for name, tensor in tensors.items():
            located = self.locate(name)
            if located is not None and located[1] is not None:
                layers.add(located[1])
            if located is None and name.startswith(self.unpruned_prefixes):
                continue
            if located is None:
                kind = "" if name in parameters else " (a saved buffer)"
                problems.append(f"{name} {tuple(tensor.shape)}{kind} is not in the table")
                continue
            pattern, layer = located
            own = sizes if layer is None or layer >= len(layer_sizes) else layer_sizes[layer]
            if tuple(tensor.shape) != (expected := self.shape(pattern, own, tensor.shape)):
                problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        if layers != set(range(sizes["layers"])):
            problems.insert(0, f"{self.layers_path} holds {len(layers)} layers, expected {sizes['layers']}")
        problems += [f"{path} is missing" for path in self._missing_modules(model, tensors, layers)]
        if problems:
            shown = "\n  ".join(problems[:8] + ([f"… and {len(problems) - 8} more"] if len(problems) > 8 else []))
            raise UnsupportedModelError(
                f"This {type(model).__name__} is not what the family table '{self.model_type}' describes:\n  {shown}\n"
                "Load the plain model (adapters merged, not quantised, no patched modules) and try again; if it is "
                "plain already, the table and the installed Transformers disagree: please report it."
            )

    def _missing_modules(self, model: PreTrainedModel, names: Iterable[str], layers: set[int]) -> list[str]:
        """Paths that are to be observed and do not exist."""
        modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        missing = [
            path
            for axis, module in self.hook_points.items()
            for layer in self.layers_with(axis, names)
            if (path := self.layer_parameter(layer, module)) not in modules
        ]
        norms = {layer: {self.layer_parameter(layer, name) for name in self.layer_norms} for layer in sorted(layers)}
        if layers:
            last = max(layers)
            for name in self.layer_norms:
                if not any(self.layer_parameter(layer, name) in modules for layer in layers):
                    missing.append(self.layer_parameter(last, name))
        missing += [f"every norm of {self.layers_path}.{n}" for n, paths in norms.items() if paths.isdisjoint(modules)]
        return missing + ([] if self.final_norm in modules else [self.final_norm])

    def student_tensors(
        self, tensors: Mapping[str, Any], config: PretrainedConfig, layers_kept: tuple[int, ...]
    ) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Every tensor of the student: (student name, teacher name, shape in the student).

        Args:
            tensors: the teacher's `named_tensors`, tied ones once (only names and shapes are read).
            config: the student's.
            layers_kept: teacher indices of the layers that stay, in order.
        """
        position = {layer: index for index, layer in enumerate(layers_kept)}
        sizes, layer_sizes = self.sizes(config), self.layer_sizes(config)
        for name in tensors:
            located = self.locate(name)
            if located is None:
                assert name.startswith(self.unpruned_prefixes), f"{name}: check() comes first"
                yield name, name, tuple(tensors[name].shape)
                continue
            pattern, layer = located
            if layer is None:
                yield name, name, self.shape(pattern, sizes, tensors[name].shape)
            elif layer in position:
                new = position[layer]
                yield self.layer_parameter(new, pattern), name, self.shape(pattern, layer_sizes[new])


def _field(config: PretrainedConfig, name: str) -> Any:
    """The value of a config field, or of an entry of one; None if there is none."""
    name, _, entry = name.partition(".")
    value = getattr(config, name, None)
    return (value or {}).get(entry) if entry else value
