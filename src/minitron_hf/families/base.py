"""`ArchSpec`: what one model family looks like, and the generic questions that can be asked of any of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from .axes import Axis, Dimension, Rounding, dimension_axes, dimension_size, implied_size, parse_dimensions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

# The standard axes. `PRUNER_FIELDS` gives the names under which users ask for their sizes.
LAYERS = Axis("layers", ("num_hidden_layers",))
HIDDEN = Axis("hidden", ("hidden_size",))
FFN = Axis("ffn", ("intermediate_size",), per_layer=True)
HEADS = Axis("heads", ("num_attention_heads",), per_layer=True)
KV = Axis("kv", ("num_key_value_heads",), implied="heads", per_layer=True)
HEAD_DIM = Axis("head_dim", ("head_dim",), implied="hidden/heads", prunable=False)
VOCAB = Axis("vocab", ("vocab_size",), prunable=False)
POSITIONS = Axis("positions", ("max_position_embeddings",), prunable=False)
EXPERTS = Axis("experts", ("num_experts",), per_layer=True)
MOE_FFN = Axis("moe_ffn", ("moe_intermediate_size",), per_layer=True, within="experts")
SHARED_FFN = Axis("shared_ffn", ("shared_expert_intermediate_size",), per_layer=True)
#: The same in families without any other MLP, where `intermediate_size` is that of the experts.
LOCAL_EXPERTS = Axis("experts", ("num_local_experts",), per_layer=True)
EXPERTS_FFN = Axis("moe_ffn", ("intermediate_size",), per_layer=True, within="experts")
#: Experts of routers that first choose among groups of them; without a number of groups all are one.
ROUTED_EXPERTS = Axis("experts", ("n_routed_experts",), per_layer=True)
ROUTER_GROUPS = Axis("router_groups", ("n_group",), implied="1", prunable=False)
#: Shared experts that are one MLP, as wide as so many routed experts.
SHARED_EXPERTS = Axis("shared_experts", ("n_shared_experts",), prunable=False)
SHARED_EXPERTS_FFN = Axis("shared_ffn", implied="shared_experts*moe_ffn", per_layer=True)

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
#: The reverse: axis → the name users know it by.
FIELD_OF_AXIS: Mapping[str, str] = {axis: name for name, axis in PRUNER_FIELDS.items()}


#: A dimension that no axis of the language model is part of.
ANY: Dimension = (("any",),)


@dataclass(frozen=True)
class Wrapper:
    """A model that holds a family's language model beside others: images and sound become inputs of it.

    Attributes:
        model_type: the wrapper's.
        prefix: what its names have instead of `model.`.
        tensors: tensor name → dimensions, for tensors outside the language model that know its sizes (projectors);
            `any` is a dimension of the wrapper's own.
        writers: those of them that write to the residual stream, where the embeddings are scaled.
        opaque: beginnings of the names of all other tensors, which are kept as they are.
        refused: axis → why it cannot be cut inside this wrapper.
    """

    model_type: str
    prefix: str
    opaque: tuple[str, ...]
    tensors: Mapping[str, str] = field(default_factory=dict)
    writers: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


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
        taps: axis → module (inside a layer) whose input carries that axis' units in its last dimension: the
            projection that writes them back to the residual stream. For `experts` and `moe_ffn` the module that holds
            the stacked experts. A layer without any tensor of an axis has no such units, and needs no tap.
        layer_norms: modules inside a layer whose output scores the hidden axis: the norms of what its sublayers read,
            or of what they write where nothing is normalised before. Every layer has at least one of them.
        final_norm: the last norm, which scores it too.
        groups: pairs (inner, outer): every kept outer unit keeps equally many inner units, ordered outer-major.
        equal: pairs of dimensions that the stock class cannot hold at different sizes; one axis of each can be cut.
        gated_norms: norm inside a layer, called with a gate → axis of the groups of channels, one after the other,
            each of which it takes by itself.
        readers: pairs (axis, module): another module inside a layer than the tap whose input carries the axis' units.
        absent_parts: config fields with a number of layers that checkpoints may hold beside those of the stock model:
            0 in the student, whose checkpoint has none.
        derived_fields: pairs (config field, expression of axes): fields that must hold that much, and are rewritten
            with the axes.
        multiples: pairs (axis, divisor axis) that the stock config insists on.
        layer_lists: config fields with one entry per layer, sliced with the layers. Sizes may be among them.
        layer_patterns: pairs (field, list with one entry per layer): the stock config expands the field, entries
            [[kind, …], repetitions], to the list; after a depth cut it holds the list, not repeated.
        leading_layers: config fields that count layers from the first one, recounted with the layers.
        trailing_layers: config fields that count layers from the last one, likewise.
        layer_indices: config fields that list layer indices, renumbered with the layers.
        needed_kinds: (config field with one entry per layer, kinds): at least one layer of these kinds has to stay,
            because the stock cache counts tokens there, or the stock config insists.
        sparse_layers: pairs (field that lists dense layers, field with the period of sparse ones): a layer has experts
            if its number, counted from 1, is a multiple of the period and it is not listed. After a depth cut the
            period is 1 and the list says it all.
        reusing_layers: (config field with one entry per layer, kind): a layer of this kind uses again what the nearest
            layer before it of another kind computed, and can only stay together with that one.
        sparse_ranges: triples (field with the first layer that may have experts, field with the last, field with the
            period of sparse ones), where a layer has experts if it lies between them and its number, counted from 1,
            is a multiple of the period. A depth cut that no numbers describe is refused.
        scaled_fields: (config field, axis, power): the stock class divides it by a size (to that power), so it is
            multiplied by the student's over the teacher's. A whole number with power 1 has to stay whole.
        fixed_layers: pairs (config property with one entry per layer, value): such a layer is never dropped, because
            later ones read what it stores.
        fixed_ends: layers, counted from the last one where negative, that are never dropped, because the stock classes
            build them unlike the others or insist on their kind there.
        derived_kinds: (config property with one entry per layer, fields from which it derives): what kind each layer
            is, where no field lists it; a depth cut that leaves another order is refused, naming the fields.
        norm_offset: what the norms add to their weights: 1 in families that store them minus one.
        bare_norms: whether norms without weights (of queries and keys) add the same number to the mean square.
        scaled_embeddings: whether token embeddings are multiplied by √hidden_size. A cut of the hidden axis would
            shrink them beside everything else that is written to the residual stream, `writers`, which are scaled
            alike; the norms that read it do not see the difference.
        writers: the tensors that scale what is written to the residual stream beside the token embeddings, needed
            where those are scaled: output projections with their biases, or the norms after them; learned positions.
        stream_readers: the tensors that read the residual stream without a norm, needed likewise.
        hidden_powers: pairs (tensor, power): the stock class multiplies what the tensor reads by hidden_size to that
            power. A vector over the hidden size among them scales what a norm without a weight gives.
        widened: (axis, flag, config property with one entry per layer, value, factor): where the flag is set, layers
            with that value hold so many times the units that the config says.
        stacked_states: whether the state between layers is several residual streams, stacked before batch and tokens.
        wrappers: models that hold this language model beside other parts.
        opaque: beginnings of names of tensors that are no part of the language model, and kept as they are.
        least: (axis, expression of config fields): the student keeps at least so many units (routing picks that many).
        refused: axis → why it cannot be cut in this family.
        refused_if: (config field, value, axis, reason): refusals that depend on a flag; axis `*` refuses the model.
        sisters: (model type, fields, changes): other stock classes that hold exactly the same model, if the teacher's
            config has these fields and once the changes are made, without a limit on sizes that its own config has.
        variants: (config field, value, table): other layouts under the same `model_type`; the first whose field has
            that value describes the model instead.
    """

    model_type: str
    axes: tuple[Axis, ...]
    layers_path: str
    outer: Mapping[str, str]
    layer: Mapping[str, str]
    taps: Mapping[str, str]
    layer_norms: tuple[str, ...]
    final_norm: str
    groups: tuple[tuple[str, str], ...] = ()
    equal: tuple[tuple[str, str], ...] = ()
    gated_norms: Mapping[str, str] = field(default_factory=dict)
    readers: tuple[tuple[str, str], ...] = ()
    absent_parts: tuple[str, ...] = ()
    derived_fields: tuple[tuple[str, str], ...] = ()
    multiples: tuple[tuple[str, str], ...] = ()
    layer_lists: tuple[str, ...] = ()
    layer_patterns: tuple[tuple[str, str], ...] = ()
    leading_layers: tuple[str, ...] = ()
    trailing_layers: tuple[str, ...] = ()
    layer_indices: tuple[str, ...] = ()
    needed_kinds: tuple[tuple[str, tuple[str, ...]], ...] = ()
    sparse_layers: tuple[tuple[str, str], ...] = ()
    reusing_layers: tuple[tuple[str, str], ...] = ()
    sparse_ranges: tuple[tuple[str, str, str], ...] = ()
    scaled_fields: tuple[tuple[str, str, float], ...] = ()
    fixed_layers: tuple[tuple[str, Any], ...] = ()
    fixed_ends: tuple[int, ...] = ()
    derived_kinds: tuple[tuple[str, str], ...] = ()
    norm_offset: float = 0.0
    bare_norms: bool = False
    scaled_embeddings: bool = False
    writers: tuple[str, ...] = ()
    stream_readers: tuple[str, ...] = ()
    hidden_powers: tuple[tuple[str, float], ...] = ()
    widened: tuple[tuple[str, str, str, Any, int], ...] = ()
    stacked_states: bool = False
    wrappers: tuple[Wrapper, ...] = ()
    opaque: tuple[str, ...] = ()
    least: tuple[tuple[str, str], ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    refused_if: tuple[tuple[str, Any, str, str], ...] = ()
    sisters: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = ()
    variants: tuple[tuple[str, Any, ArchSpec], ...] = ()

    def variant(self, config: PretrainedConfig) -> ArchSpec:
        """The layout that a config has: this one, or one of its variants."""
        for name, value, spec in self.variants:
            if getattr(config, name, None) == value:
                return spec.variant(config)
        return self

    def inside(self, wrapper: Wrapper) -> ArchSpec:
        """This layout as it is named inside a wrapper, with the wrapper's own tensors."""

        def renamed(name: str) -> str:
            return wrapper.prefix + name.removeprefix("model.") if name.startswith("model.") else name

        return replace(
            self,
            model_type=wrapper.model_type,
            layers_path=renamed(self.layers_path),
            final_norm=renamed(self.final_norm),
            outer={**{renamed(name): text for name, text in self.outer.items()}, **wrapper.tensors},
            writers=(*map(renamed, self.writers), *wrapper.writers),
            stream_readers=tuple(map(renamed, self.stream_readers)),
            hidden_powers=tuple((renamed(name), power) for name, power in self.hidden_powers),
            refused={**self.refused, **wrapper.refused},
            opaque=wrapper.opaque,
            sisters=(),  # of the language model alone
            variants=tuple((name, value, spec.inside(wrapper)) for name, value, spec in self.variants),
        )

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
                `per_layer_config`); None for what the config says of all: the largest entry of a list.

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
        for name, flag, kinds, kind, factor in self.widened:
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
    def residual_norms(self) -> tuple[str, ...]:
        """Weights of the norms over the hidden size, the only vectors of that width that are called weights."""
        hidden = ((("hidden",),),)
        return tuple(name for name, dims in self.dimensions.items() if dims == hidden and name.endswith("weight"))

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
            UnsupportedModelError: naming every parameter that is unclaimed or has another shape.
        """
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
            if located is None and name.startswith(self.opaque):
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
            for axis, module in self.taps.items()
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
                assert name.startswith(self.opaque), f"{name}: check() comes first"
                yield name, name, tuple(tensors[name].shape)
                continue
            pattern, layer = located
            if layer is None:
                yield name, name, self.shape(pattern, sizes, tensors[name].shape)
            elif layer in position:
                new = position[layer]
                yield self.layer_parameter(new, pattern), name, self.shape(pattern, layer_sizes[new])


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model inside a wrapper; a language model's own config as it is."""
    return getattr(config, "text_config", None) or config


def named_tensors(model: PreTrainedModel, *, tied: bool = False) -> dict[str, Tensor]:
    """Everything that a checkpoint holds: parameters and saved buffers by name.

    Args:
        model: the model.
        tied: list tied parameters under each of their names, instead of once.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters}
    return {**(parameters if tied else dict(own_parameters(model))), **buffers}


def own_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters`, tied ones once, although offloading gives each of them a placeholder of its own."""
    tied = getattr(model, "all_tied_weights_keys", {})
    seen: set[str] = set()
    for name, parameter in model.named_parameters():
        stored = tied.get(name, name)
        if not parameter.is_meta or stored not in seen:
            yield name, parameter
        seen.add(stored)


def layer_tables(*parts: Mapping[str, str]) -> dict[str, str]:
    """Compose the parameter table of a layer from parts; a name that two parts claim is a mistake in the table."""
    table: dict[str, str] = {}
    for part in parts:
        if clash := table.keys() & part.keys():
            raise ValueError(f"claimed twice: {sorted(clash)}")
        table.update(part)
    return table


def moved(table: Mapping[str, str], module: str, to: str) -> dict[str, str]:
    """The same table with everything of one module in another place."""
    assert all(name.startswith(f"{module}.") for name in table)
    return {to + name.removeprefix(module): dimensions for name, dimensions in table.items()}


def linear(name: str, rows: str, columns: str) -> dict[str, str]:
    """A `torch.nn.Linear`: weight [out, in], and a bias where the config has one."""
    return {f"{name}.weight": f"{rows} {columns}", f"{name}.bias": rows}


def conv1d(name: str, columns: str, rows: str) -> dict[str, str]:
    """A Transformers `Conv1D`: weight [in, out], the transpose of `Linear`, and a bias."""
    return {f"{name}.weight": f"{columns} {rows}", f"{name}.bias": rows}


def stacked_experts(module: str = "mlp", router: str = "gate") -> dict[str, str]:
    """Stacked experts of a module, gate and up concatenated, and the router that chooses among them."""
    return {
        f"{module}.experts.gate_up_proj": "experts moe_ffn+moe_ffn hidden",
        f"{module}.experts.down_proj": "experts hidden moe_ffn",
        **linear(f"{module}.{router}", "experts", "hidden"),
    }


def norm(*names: str, width: str = "hidden") -> dict[str, str]:
    """Norms of one width, with a bias where the class has one."""
    return {f"{name}.{part}": width for name in names for part in ("weight", "bias")}


def attention(path: str, out: str) -> dict[str, str]:
    """Separate q, k and v projections of equally many heads, and the output projection."""
    return layer_tables(
        *(linear(f"{path}.{name}", "heads*head_dim", "hidden") for name in ("q_proj", "k_proj", "v_proj")),
        linear(f"{path}.{out}", "hidden", "heads*head_dim"),
    )


#: Heads that are as wide together as the residual stream: the stock code knows only one width for both.
SQUARE = (("heads*head_dim", "hidden"),)
_WITH_THE_HEADS = "the heads are as wide together as the residual stream, and "
#: Refusals where a head's place decides how far it looks.
ALIBI = {
    "heads": "the attention biases of ALiBi follow from a head's index and the number of heads",
    "hidden": _WITH_THE_HEADS + "the attention biases of ALiBi follow from a head's index and the number of heads",
}
#: Refusals where a channel's place decides which position it tells.
SINUSOIDAL = {
    "hidden": "the stock classes compute sinusoidal positions from a channel's index and the number of channels",
    "heads": _WITH_THE_HEADS + "its channels hold sinusoidal positions",
}
#: Neurons that no config field counts.
FOURFOLD_FFN = replace(FFN, fields=(), implied="4*hidden")
FOURFOLD = {"ffn": "the stock classes hold four neurons to a channel of the residual stream"}
#: Separate q, k, v and output projections with grouped queries.
GROUPED_ATTENTION = layer_tables(
    linear("self_attn.q_proj", "heads*head_dim", "hidden"),
    linear("self_attn.k_proj", "kv*head_dim", "hidden"),
    linear("self_attn.v_proj", "kv*head_dim", "hidden"),
    linear("self_attn.o_proj", "hidden", "heads*head_dim"),
)
#: What latent attention is made of: heads without groups, each with a key of a rotated part (common to all heads) and
#: one that is not, and a value; queries, keys and values come from low ranks. `head_dim` is what a head writes.
LATENT_AXES = (
    replace(HEADS, fields=("num_attention_heads", "num_key_value_heads")),
    replace(HEAD_DIM, fields=("v_head_dim",), implied=None),
    Axis("nope_dim", ("qk_nope_head_dim",), prunable=False),
    Axis("rope_dim", ("qk_rope_head_dim",), prunable=False),
    Axis("qk_dim", implied="nope_dim+rope_dim", prunable=False),
    Axis("kv_dim", implied="nope_dim+head_dim", prunable=False),
    Axis("q_rank", ("q_lora_rank",), implied="0", prunable=False),
    Axis("kv_rank", ("kv_lora_rank",), prunable=False),
)
#: The keys and values of latent attention, and what writes its heads' outputs back.
LATENT_KEYS = layer_tables(
    linear("self_attn.kv_a_proj_with_mqa", "kv_rank+rope_dim", "hidden"),
    norm("self_attn.kv_a_layernorm", width="kv_rank"),
    linear("self_attn.kv_b_proj", "heads*kv_dim", "kv_rank"),
    linear("self_attn.o_proj", "hidden", "heads*head_dim"),
)
#: Latent attention with compressed queries.
COMPRESSED_ATTENTION = layer_tables(
    linear("self_attn.q_a_proj", "q_rank", "hidden"),
    norm("self_attn.q_a_layernorm", width="q_rank"),
    linear("self_attn.q_b_proj", "heads*qk_dim", "q_rank"),
    LATENT_KEYS,
)
#: Latent attention whose queries are compressed unless `q_lora_rank` is None.
LATENT_ATTENTION = layer_tables(linear("self_attn.q_proj", "heads*qk_dim", "hidden"), COMPRESSED_ATTENTION)
#: The indexer of sparse latent attention, which chooses the tokens that all heads of a layer see.
INDEXER = layer_tables(
    linear("self_attn.indexer.wq_b", "index_heads*index_dim", "q_rank"),
    linear("self_attn.indexer.wk", "index_dim", "hidden"),
    norm("self_attn.indexer.k_norm", width="index_dim"),
    linear("self_attn.indexer.weights_proj", "index_heads", "hidden"),
)
INDEXER_AXES = (
    Axis("index_heads", ("index_n_heads",), prunable=False),
    Axis("index_dim", ("index_head_dim",), prunable=False),
)
#: Queries with a gate of the same width beside them, head by head: what attention writes is multiplied by its sigmoid.
GATED_QUERIES = layer_tables(
    linear("self_attn.q_proj", "heads*2*head_dim", "hidden"),
    linear("self_attn.k_proj", "kv*head_dim", "hidden"),
    linear("self_attn.v_proj", "kv*head_dim", "hidden"),
    linear("self_attn.o_proj", "hidden", "heads*head_dim"),
)
#: What linear attention by the gated delta rule is made of; none of it is cut.
DELTA_AXES = (
    Axis("linear_keys", ("linear_num_key_heads",), prunable=False),
    Axis("linear_values", ("linear_num_value_heads",), prunable=False),
    Axis("linear_key_dim", ("linear_key_head_dim",), prunable=False),
    Axis("linear_value_dim", ("linear_value_head_dim",), prunable=False),
    Axis("linear_kernel", ("linear_conv_kernel_dim",), prunable=False),
)
#: Queries, keys and values of all its heads, one after another.
DELTA_QKV = "linear_keys*linear_key_dim+linear_keys*linear_key_dim+linear_values*linear_value_dim"
#: Its convolution and decay, wherever its projections come from.
DELTA_RULE = {
    "linear_attn.conv1d.weight": f"{DELTA_QKV} 1 linear_kernel",
    "linear_attn.dt_bias": "linear_values",
    "linear_attn.A_log": "linear_values",
}
#: Its projections in Qwen 3.5.
QWEN_DELTA = layer_tables(
    DELTA_RULE,
    linear("linear_attn.in_proj_qkv", DELTA_QKV, "hidden"),
    linear("linear_attn.in_proj_z", "linear_values*linear_value_dim", "hidden"),
    linear("linear_attn.in_proj_b", "linear_values", "hidden"),
    linear("linear_attn.in_proj_a", "linear_values", "hidden"),
    linear("linear_attn.out_proj", "hidden", "linear_values*linear_value_dim"),
    norm("linear_attn.norm", width="linear_value_dim"),
)
#: A student of layers of linear attention has one of full attention too.
NEEDS_FULL_ATTENTION = (("layer_types", ("full_attention",)),)
#: Short convolutions, as wide as the residual stream but for channels of their own: two gates, and what they gate.
CONV_DIM = Axis("conv_dim", implied="hidden", per_layer=True)
CONV_KERNEL = Axis("conv_kernel", ("conv_L_cache",), prunable=False)
SHORT_CONVOLUTION = layer_tables(
    linear("conv.in_proj", "conv_dim+conv_dim+conv_dim", "hidden"),
    {"conv.conv.weight": "conv_dim 1 conv_kernel", "conv.conv.bias": "conv_dim"},
    linear("conv.out_proj", "hidden", "conv_dim"),
)
#: Gate, up and down projections.
GATED_MLP = layer_tables(
    linear("mlp.gate_proj", "ffn", "hidden"),
    linear("mlp.up_proj", "ffn", "hidden"),
    linear("mlp.down_proj", "hidden", "ffn"),
)
#: Gate and up in one projection, then down.
FUSED_GATED_MLP = layer_tables(
    linear("mlp.gate_up_proj", "ffn+ffn", "hidden"),
    linear("mlp.down_proj", "hidden", "ffn"),
)
#: Up and down projections.
PLAIN_MLP = layer_tables(linear("mlp.up_proj", "ffn", "hidden"), linear("mlp.down_proj", "hidden", "ffn"))
#: Stacked experts, gate and up concatenated, and the router that chooses among them.
EXPERTS_MLP = stacked_experts()
#: Shared experts beside them, and the bias that balances their load: it is added to choose, and in no weight.
SHARED_EXPERTS_MLP = layer_tables(
    linear("mlp.shared_experts.gate_proj", "shared_ffn", "hidden"),
    linear("mlp.shared_experts.up_proj", "shared_ffn", "hidden"),
    linear("mlp.shared_experts.down_proj", "hidden", "shared_ffn"),
)
ROUTER_BIAS = {"mlp.gate.e_score_correction_bias": "experts"}
#: One shared expert of a size of its own; and the same with a gate that scales its output.
SHARED_EXPERT_MLP = layer_tables(
    linear("mlp.shared_expert.gate_proj", "shared_ffn", "hidden"),
    linear("mlp.shared_expert.up_proj", "shared_ffn", "hidden"),
    linear("mlp.shared_expert.down_proj", "hidden", "shared_ffn"),
)
GATED_SHARED_EXPERT = layer_tables(SHARED_EXPERT_MLP, linear("mlp.shared_expert_gate", "1", "hidden"))
#: Where stacked experts are observed.
EXPERT_TAPS = {"experts": "mlp.experts", "moe_ffn": "mlp.experts"}
#: Groups are scored by their two best experts, and so many of them are chosen that `topk_group` tells.
GROUPED_EXPERTS_LEAST: tuple[tuple[str, str], ...] = (
    ("experts", "num_experts_per_tok"),
    ("experts", "num_experts_per_tok*n_group/topk_group"),
    ("experts", "2*n_group"),
)
#: Leading layers with an MLP, then experts that are chosen within groups, beside shared ones that are as wide.
GROUPED_EXPERTS: Mapping[str, Any] = {
    "mlp_axes": (FFN, ROUTED_EXPERTS, ROUTER_GROUPS, MOE_FFN, SHARED_EXPERTS, SHARED_EXPERTS_FFN),
    "mlp_taps": {"ffn": "mlp.down_proj", "shared_ffn": "mlp.shared_experts.down_proj", **EXPERT_TAPS},
    "groups": (("heads", "kv"), ("experts", "router_groups")),
    "equal": (("shared_experts*moe_ffn", "shared_ffn"),),
    "least": GROUPED_EXPERTS_LEAST,
    "leading_layers": ("first_k_dense_replace",),
}
#: The same beside latent attention.
LATENT_EXPERTS: Mapping[str, Any] = {
    **GROUPED_EXPERTS,
    "groups": (("experts", "router_groups"),),
    "attention_axes": LATENT_AXES,
}
#: The same where the config lists which layers have experts.
LISTED_LATENT_EXPERTS: Mapping[str, Any] = {
    **LATENT_EXPERTS,
    "leading_layers": (),
    "layer_lists": ("mlp_layer_types",),
}
#: One norm for every query head, one for every key head.
HEAD_NORMS = norm("self_attn.q_norm", "self_attn.k_norm", width="head_dim")
#: One norm over all query heads together, one over all key heads.
WIDE_HEAD_NORMS = layer_tables(
    norm("self_attn.q_norm", width="heads*head_dim"), norm("self_attn.k_norm", width="kv*head_dim")
)
#: State-space heads belong to groups, which have one B and C and, in a gated norm, a mean square of their own.
SSM_GROUPS: tuple[tuple[str, str], ...] = (("ssm_heads", "ssm_groups"),)


def ssm_axes(heads: str, head_dim: str, groups: str, state: str, kernel: str) -> tuple[Axis, ...]:
    """Axes of a state-space layer, from the config fields that hold their sizes."""
    return (
        Axis("ssm_heads", (heads,), per_layer=True),
        Axis("ssm_dim", (head_dim,), per_layer=True, within="ssm_heads"),
        Axis("ssm_groups", (groups,), prunable=False),
        Axis("ssm_state", (state,), prunable=False),
        Axis("ssm_kernel", (kernel,), prunable=False),
    )


#: Most hybrid models call them so.
SSM_AXES = ssm_axes("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")


#: Where the stock config insists on state-space heads that are together so many times as wide as the residual stream.
SSM_EXPAND = Axis("ssm_expand", ("mamba_expand",), prunable=False)
SSM_WIDTH: tuple[tuple[str, str], ...] = (("ssm_heads*ssm_dim", "ssm_expand*hidden"),)
SSM_DIM_FOLLOWS = {"ssm_dim": "the stock config ties it to the hidden size, which the number of heads follows"}


def state_space(path: str) -> dict[str, str]:
    """The tensors of a state-space layer of several heads (Mamba-2): z, then x, B and C, which are convolved, then dt.

    Args:
        path: module inside a layer.
    """
    inner = "ssm_heads*ssm_dim"
    convolved = f"{inner}+ssm_groups*ssm_state+ssm_groups*ssm_state"
    return layer_tables(
        linear(f"{path}.in_proj", f"{inner}+{convolved}+ssm_heads", "hidden"),
        {f"{path}.conv1d.weight": f"{convolved} 1 ssm_kernel", f"{path}.conv1d.bias": convolved},
        {f"{path}.{name}": "ssm_heads" for name in ("dt_bias", "A_log", "D")},
        {f"{path}.norm.weight": inner},
        linear(f"{path}.out_proj", "hidden", inner),
    )


def ssm_taps(path: str) -> dict[str, str]:
    """Where the heads of a state-space layer, and their channels, are observed."""
    return dict.fromkeys(("ssm_heads", "ssm_dim"), f"{path}.out_proj")


#: Embeddings, head and last norm of the purely recurrent models.
RECURRENT_OUTER = layer_tables(
    {"backbone.embeddings.weight": "vocab hidden"}, linear("lm_head", "vocab", "hidden"), norm("backbone.norm_f")
)


def mamba(model_type: str) -> ArchSpec:
    """A model of state-space layers whose channels have states of their own (Mamba-1).

    Args:
        model_type: the config's `model_type`.
    """
    return ArchSpec(
        model_type=model_type,
        axes=(
            LAYERS,
            HIDDEN,
            FFN,
            Axis("ssm_state", ("state_size",), prunable=False),
            Axis("ssm_kernel", ("conv_kernel",), prunable=False),
            Axis("dt_rank", ("time_step_rank",), prunable=False),
            VOCAB,
        ),
        layers_path="backbone.layers",
        outer=RECURRENT_OUTER,
        layer=layer_tables(norm("norm"), channel_state_space("mixer", "ffn")),
        taps={"ffn": "mixer.out_proj"},
        readers=(("ffn", "mixer.x_proj"),),
        layer_norms=("norm",),
        final_norm="backbone.norm_f",
    )


def channel_state_space(path: str, channels: str) -> dict[str, str]:
    """The tensors of a state-space layer whose channels have states of their own: x and z, then dt, B and C from x.

    Args:
        path: module inside a layer.
        channels: their axis.
    """
    return layer_tables(
        linear(f"{path}.in_proj", f"{channels}+{channels}", "hidden"),
        {f"{path}.conv1d.weight": f"{channels} 1 ssm_kernel", f"{path}.conv1d.bias": channels},
        {f"{path}.x_proj.weight": f"dt_rank+ssm_state+ssm_state {channels}"},
        linear(f"{path}.dt_proj", channels, "dt_rank"),
        {f"{path}.A_log": f"{channels} ssm_state", f"{path}.D": channels},
        linear(f"{path}.out_proj", "hidden", channels),
    )


#: Embeddings and head of the models that keep everything under `model.`.
EMBEDDINGS = {"model.embed_tokens.weight": "vocab hidden", **linear("lm_head", "vocab", "hidden")}
#: Attention and MLP of LFM2, and what it shares with its successors: the names of norms, and layers that all need.
LFM_ATTENTION = layer_tables(
    linear("self_attn.q_proj", "heads*head_dim", "hidden"),
    linear("self_attn.k_proj", "kv*head_dim", "hidden"),
    linear("self_attn.v_proj", "kv*head_dim", "hidden"),
    linear("self_attn.out_proj", "hidden", "heads*head_dim"),
    norm("self_attn.q_layernorm", "self_attn.k_layernorm", width="head_dim"),
)
LFM_MLP = layer_tables(
    linear("feed_forward.w1", "ffn", "hidden"),
    linear("feed_forward.w3", "ffn", "hidden"),
    linear("feed_forward.w2", "hidden", "ffn"),
)
#: The neurons that LFM2's class makes of its config: two thirds, scaled and rounded.
LFM_FFN = replace(
    FFN, rounding=Rounding("block_auto_adjust_ff_dim", (2, 3), "block_ffn_dim_multiplier", "block_multiple_of")
)
LFM_LAYOUT: Mapping[str, Any] = {
    "outer": layer_tables(EMBEDDINGS, norm("model.embedding_norm")),
    "norms": ("operator_norm", "ffn_norm"),
    "final_norm": "model.embedding_norm",
    "equal": (("conv_dim", "hidden"),),
    "layer_lists": ("layer_types",),
    "needed_kinds": (("layer_types", ("full_attention", "sliding_attention")),),
}
#: Norms before attention and MLP.
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


#: Axes under the names that GPT-2's config gives them.
GPT_AXES = (
    replace(LAYERS, fields=("n_layer",)),
    replace(HIDDEN, fields=("n_embd",)),
    replace(FFN, fields=("n_inner",), implied="4*hidden"),
    replace(HEADS, fields=("n_head",)),
    HEAD_DIM,
    VOCAB,
)
GPT_POSITIONS = replace(POSITIONS, fields=("n_positions",))
#: Embeddings, last norm and head of the models that keep everything under `transformer.`.
GPT_OUTER = layer_tables(
    {"transformer.wte.weight": "vocab hidden"}, linear("lm_head", "vocab", "hidden"), norm("transformer.ln_f")
)
GPT_POSITION_EMBEDDINGS = {"transformer.wpe.weight": "positions hidden"}


#: Llama's layout without biases is Mistral's without a window, and that config takes any hidden size.
AS_MISTRAL = (("mistral", {"attention_bias": False, "mlp_bias": False}, {"sliding_window": None}),)


def beside(model_type: str, *parts: str) -> Wrapper:
    """A wrapper whose other parts hold the hidden size where no channel of the residual stream can be told.

    The projector's neurons are as many as the hidden size, or a field of the vision config says what it writes.

    Args:
        model_type: the wrapper's.
        *parts: the modules beside the language model.
    """
    return Wrapper(
        model_type,
        prefix="model.language_model.",
        opaque=tuple(f"{part}." for part in parts),
        refused={"hidden": f"the stock '{model_type}' classes derive other sizes beside the language model from it"},
    )


def decoder(
    model_type: str,
    *,
    layer: Mapping[str, str] | None = None,
    norms: tuple[str, ...] = PRE_NORMS,
    output_norms: tuple[str, ...] = (),
    attention_out: str = "self_attn.o_proj",
    mlp_out: str = "mlp.down_proj",
    attention_axes: tuple[Axis, ...] = (HEADS, KV, HEAD_DIM),
    mlp_axes: tuple[Axis, ...] = (FFN,),
    mlp_taps: Mapping[str, str] | None = None,
    **changes: Any,
) -> ArchSpec:
    """The layout that most decoders share: grouped attention, gated MLP, everything under `model.`.

    Args:
        model_type: the config's `model_type`.
        layer: attention and MLP of one layer, without the norms over the hidden size (default: separate projections).
        norms: those norms, where their outputs score the hidden axis.
        output_norms: norms of what attention and MLP write, in layers that also have norms of what they read.
        attention_out: the projection that writes the heads back to the residual stream.
        mlp_out: likewise for the neurons.
        attention_axes: axes of attention; the heads, and the KV heads where they are an axis, are observed at
            `attention_out`.
        mlp_axes: axes of the MLP.
        mlp_taps: where they are observed (default: the neurons at `mlp_out`).
        **changes: any other field of `ArchSpec`.
    """
    fields: dict[str, Any] = {
        "axes": (LAYERS, HIDDEN, *mlp_axes, *attention_axes, VOCAB),
        "layers_path": "model.layers",
        "outer": layer_tables(EMBEDDINGS, norm("model.norm")),
        "layer": layer_tables(layer or layer_tables(GROUPED_ATTENTION, GATED_MLP), norm(*norms, *output_norms)),
        "taps": {
            **({"ffn": mlp_out} if mlp_taps is None else mlp_taps),
            **{axis.name: attention_out for axis in attention_axes if axis.name in ("heads", "kv")},
        },
        "layer_norms": norms,
        "final_norm": "model.norm",
        "groups": (("heads", "kv"),) if any(axis.name == "kv" for axis in attention_axes) else (),
    }
    return ArchSpec(model_type=model_type, **{**fields, **changes})


def gpt(model_type: str, *, learned_positions: bool = False, **changes: Any) -> ArchSpec:
    """GPT-2's layout: a `decoder` under `transformer.`, its heads as wide together as the residual stream.

    Args:
        model_type: the config's `model_type`.
        learned_positions: whether positions have embeddings.
        **changes: whatever else `decoder` is told.
    """
    fields: dict[str, Any] = {
        "axes": (*GPT_AXES, GPT_POSITIONS) if learned_positions else GPT_AXES,
        "layers_path": "transformer.h",
        "outer": layer_tables(GPT_OUTER, GPT_POSITION_EMBEDDINGS) if learned_positions else GPT_OUTER,
        "norms": ("ln_1", "ln_2"),
        "final_norm": "transformer.ln_f",
        "attention_axes": (HEADS, HEAD_DIM),
        "equal": SQUARE,
    }
    return decoder(model_type, **{**fields, **changes})
