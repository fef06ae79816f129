"""`ArchSpec`: what one model family looks like, and the generic questions that can be asked of any of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..axes import Axis, Dimension, dimension_size, implied_size, parse_dimensions
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
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

#: Standard config name → axis: the vocabulary of `PrunerConfig`, and of every message about sizes.
PRUNER_FIELDS: Mapping[str, str] = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv",
}
#: The reverse: axis → the name users know it by.
FIELD_OF_AXIS: Mapping[str, str] = {axis: name for name, axis in PRUNER_FIELDS.items()}


@dataclass(frozen=True)
class ArchSpec:
    """A model family as a table. Families hold data only; every rule about them is a generic loop over it.

    Attributes:
        model_type: the config's `model_type`.
        axes: the family's axes. Order matters only for `implied` sizes, which read the axes before them.
        layers_path: path of the module list of decoder layers.
        outer: parameter name → dimensions, for parameters outside the layers.
        layer: parameter name inside one layer → dimensions. Biases that a config flag switches off are simply not
            found in such a model.
        taps: axis → module (inside a layer) whose input carries that axis' units in its last dimension: the
            projection that writes them back to the residual stream.
        layer_norms: modules inside a layer whose output scores the hidden axis: the norms of what its sublayers read,
            or of what they write where nothing is normalised before.
        final_norm: the last norm, which scores it too.
        groups: pairs (inner, outer): every kept outer unit keeps equally many inner units, ordered outer-major.
        equal: pairs of dimensions that the stock class cannot hold at different sizes.
        multiples: pairs (axis, divisor axis) that the stock config insists on.
        layer_lists: config fields with one entry per layer, sliced with the layers.
        leading_layers: config fields that count layers from the first one, recounted with the layers.
        refused: axis → why it cannot be cut in this family.
        refused_if: (config field, value, axis, reason): refusals that depend on a flag.
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
    multiples: tuple[tuple[str, str], ...] = ()
    layer_lists: tuple[str, ...] = ()
    leading_layers: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    refused_if: tuple[tuple[str, Any, str, str], ...] = ()

    @cached_property
    def axis(self) -> Mapping[str, Axis]:
        """Axes by name."""
        return {axis.name: axis for axis in self.axes}

    @cached_property
    def dimensions(self) -> Mapping[str, tuple[Dimension, ...]]:
        """Parsed dimensions of every pattern in `outer` and (relative names) `layer`."""
        return {name: parse_dimensions(text) for name, text in {**self.outer, **self.layer}.items()}

    @property
    def _observed_in_a_layer(self) -> tuple[str, ...]:
        return (*self.taps.values(), *self.layer_norms)

    def sizes(self, config: PretrainedConfig) -> dict[str, int]:
        """Size of every axis, read from a config.

        Raises:
            UnsupportedModelError: if the config lacks a size that has no implied value.
        """
        sizes: dict[str, int] = {}
        for axis in self.axes:
            value = getattr(config, axis.fields[0], None) if axis.fields else None
            if value is None and axis.implied is not None:
                value = implied_size(axis.implied, sizes)
            if not isinstance(value, int):
                raise UnsupportedModelError(
                    f"The config of this {self.model_type} model has {axis.fields[0]}={value!r}; expected an integer."
                )
            sizes[axis.name] = value
        return sizes

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

    def shape(self, pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape that the table gives to the parameters of a pattern."""
        return tuple(dimension_size(dimension, sizes) for dimension in self.dimensions[pattern])

    def check(self, model: PreTrainedModel) -> None:
        """Prove that the table describes this model: every tensor claimed, with exactly the declared shape.

        Works on the meta device too.

        Raises:
            UnsupportedModelError: naming every parameter that is unclaimed or has another shape.
        """
        sizes = self.sizes(model.config)
        problems = []
        layers = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            located = self.locate(name)
            if located is not None and located[1] is not None:
                layers.add(located[1])
            if located is None:
                problems.append(f"{name} {tuple(parameter.shape)} is not in the table")
            elif tuple(parameter.shape) != (expected := self.shape(located[0], sizes)):
                problems.append(f"{name} has shape {tuple(parameter.shape)}, expected {expected}")
        if layers != set(range(sizes["layers"])):
            problems.append(f"{self.layers_path} holds {len(layers)} layers, expected {sizes['layers']}")
        observed = [self.layer_parameter(layer, name) for layer in layers for name in self._observed_in_a_layer]
        modules = dict(model.named_modules(remove_duplicate=False))
        problems += [f"{path} is missing" for path in (*observed, self.final_norm) if path not in modules]
        problems += [f"{name} is a saved buffer, which the table does not know" for name in _saved_buffers(model)]
        if problems:
            shown = "\n  ".join(problems[:8] + ([f"… and {len(problems) - 8} more"] if len(problems) > 8 else []))
            raise UnsupportedModelError(
                f"This {type(model).__name__} is not what the family table '{self.model_type}' describes:\n  {shown}\n"
                "Load the plain model (adapters merged, not quantised, no patched modules) and try again; if it is "
                "plain already, the table and the installed Transformers disagree: please report it."
            )

    def student_parameters(
        self, parameters: Mapping[str, Any], sizes: Mapping[str, int], layers_kept: tuple[int, ...]
    ) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Every parameter of the student: (student name, teacher name, shape in the student).

        Args:
            parameters: the teacher's named parameters, tied ones once (only the names are read).
            sizes: the student's axis sizes.
            layers_kept: teacher indices of the layers that stay, in order.
        """
        position = {layer: index for index, layer in enumerate(layers_kept)}
        for name in parameters:
            located = self.locate(name)
            assert located is not None, f"{name}: check() comes first"
            pattern, layer = located
            if layer is None:
                yield name, name, self.shape(pattern, sizes)
            elif layer in position:
                yield self.layer_parameter(position[layer], pattern), name, self.shape(pattern, sizes)


def _saved_buffers(model: PreTrainedModel) -> list[str]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in model.state_dict() if name not in parameters]


def layer_tables(*parts: Mapping[str, str]) -> dict[str, str]:
    """Compose the parameter table of a layer from parts; a name that two parts claim is a mistake in the table."""
    table: dict[str, str] = {}
    for part in parts:
        if clash := table.keys() & part.keys():
            raise ValueError(f"claimed twice: {sorted(clash)}")
        table.update(part)
    return table


def linear(name: str, rows: str, columns: str) -> dict[str, str]:
    """A `torch.nn.Linear`: weight [out, in], and a bias where the config has one."""
    return {f"{name}.weight": f"{rows} {columns}", f"{name}.bias": rows}


def conv1d(name: str, columns: str, rows: str) -> dict[str, str]:
    """A Transformers `Conv1D`: weight [in, out], the transpose of `Linear`, and a bias."""
    return {f"{name}.weight": f"{columns} {rows}", f"{name}.bias": rows}


def norm(*names: str, width: str = "hidden") -> dict[str, str]:
    """Norms of one width, with a bias where the class has one."""
    return {f"{name}.{part}": width for name in names for part in ("weight", "bias")}


#: Separate q, k, v and output projections with grouped queries.
GROUPED_ATTENTION = layer_tables(
    linear("self_attn.q_proj", "heads*head_dim", "hidden"),
    linear("self_attn.k_proj", "kv*head_dim", "hidden"),
    linear("self_attn.v_proj", "kv*head_dim", "hidden"),
    linear("self_attn.o_proj", "hidden", "heads*head_dim"),
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
#: One norm for every query head, one for every key head.
HEAD_NORMS = norm("self_attn.q_norm", "self_attn.k_norm", width="head_dim")
#: One norm over all query heads together, one over all key heads.
WIDE_HEAD_NORMS = layer_tables(
    norm("self_attn.q_norm", width="heads*head_dim"), norm("self_attn.k_norm", width="kv*head_dim")
)
#: Embeddings and head of the models that keep everything under `model.`.
EMBEDDINGS = {"model.embed_tokens.weight": "vocab hidden", **linear("lm_head", "vocab", "hidden")}
#: Norms before attention and MLP.
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")


def decoder(
    model_type: str,
    *,
    layer: Mapping[str, str] | None = None,
    norms: tuple[str, ...] = PRE_NORMS,
    output_norms: tuple[str, ...] = (),
    attention_out: str = "self_attn.o_proj",
    mlp_out: str = "mlp.down_proj",
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
        **changes: any other field of `ArchSpec`.
    """
    fields: dict[str, Any] = {
        "axes": (LAYERS, HIDDEN, FFN, HEADS, KV, HEAD_DIM, VOCAB),
        "layers_path": "model.layers",
        "outer": layer_tables(EMBEDDINGS, norm("model.norm")),
        "layer": layer_tables(layer or layer_tables(GROUPED_ATTENTION, GATED_MLP), norm(*norms, *output_norms)),
        "taps": {"ffn": mlp_out, "heads": attention_out, "kv": attention_out},
        "layer_norms": norms,
        "final_norm": "model.norm",
        "groups": (("heads", "kv"),),
    }
    return ArchSpec(model_type=model_type, **{**fields, **changes})
