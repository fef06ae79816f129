"""The first draft of a family table: build the model without memory, change one config field at a time, and look.

How every dimension of every tensor moves with every field is read off, and with it the sum of products that it is.
What shapes cannot tell is marked TODO: the order inside fused dimensions, what is scaled by a size, what a layer's
index decides. The tests' oracles prove or refute a draft; nothing is believed because its shapes fit.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..families import PRUNER_FIELDS, named_tensors
from ..families import base as parts
from ..models import empty_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Deeper models are drafted from their first layers.
MOST_LAYERS = 8
#: Standard config names whose axis users cannot cut.
FIXED_FIELDS = {"head_dim": "head_dim", "vocab_size": "vocab", "max_position_embeddings": "positions"}
#: The axes of `base.py`, by name.
STANDARD = {
    axis.name: (constant, axis)
    for constant, axis in vars(parts).items()
    if isinstance(axis, parts.Axis) and constant == axis.name.upper()
}

#: Fields of a table that have no default.
NEEDED = ("taps", "layer_norms", "final_norm")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Probe:
    """What was found by building models.

    Attributes:
        values: fields of the config that is built, implied sizes written out.
        shapes: tensor → shape.
        slopes: field → tensor → how much each of its dimensions grows per unit of the field.
        implied: field that the config leaves to None → the expression that it stands for, over fields.
        structural: fields that change which tensors there are.
    """

    config: PretrainedConfig
    values: dict[str, Any]
    shapes: Shapes
    slopes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    implied: dict[str, str] = field(default_factory=dict)
    structural: list[str] = field(default_factory=list)

    def build(self, **changes: Any) -> Shapes | None:
        """Shapes with some fields changed; None where the stock class refuses."""
        try:
            config = type(self.config)(**{**self.values, **changes})
            return {name: tuple(x.shape) for name, x in named_tensors(empty_model(config), tied=True).items()}
        except Exception:  # whatever a stock class raises, it does not hold these sizes
            return None

    def dimension(self, tensor: str, position: int) -> str:
        """A dimension of a tensor as a sum of products of fields.

        Raises:
            UnsupportedModelError: if it is none.
        """
        size = self.shapes[tensor][position]
        grows = {name: by[tensor][position] for name, by in self.slopes.items() if by[tensor][position]}
        found = sum_of_products(size, {name: self.values[name] for name in grows}, grows)
        if found is None:
            raise UnsupportedModelError(
                f"{tensor} has a dimension of {size} that is no sum of products of {', '.join(grows)}. "
                "Write its table by hand."
            )
        return found


def sum_of_products(size: int, values: Mapping[str, int], slopes: Mapping[str, int]) -> str | None:
    """The sum of products of some numbers that has a size, and grows as observed with each of them.

    Args:
        size: the sum.
        values: the numbers by name; each occurs in it.
        slopes: how much the sum grows when one of them grows by one.

    >>> sum_of_products(180, {"heads": 12, "kv": 3, "head_dim": 10}, {"heads": 10, "kv": 20, "head_dim": 18})
    'heads*head_dim+kv*head_dim+kv*head_dim'
    >>> sum_of_products(66, {"positions": 64}, {"positions": 1}), sum_of_products(7, {}, {})
    ('2+positions', '7')
    """
    names = list(values)
    products = [
        (product, _product(values[name] for name in product))
        for count in range(min(len(names), 3), 0, -1)
        for product in itertools.combinations(names, count)
    ]

    def search(at: int, left: int, grows: dict[str, int]) -> list[str] | None:
        if not any(grows.values()):
            return [str(left)] if left > 0 else []
        if at == len(products):
            return None
        product, value = products[at]
        most = min([left // value, *(grows[name] * values[name] // value for name in product)])
        for times in range(most, -1, -1):
            rest = {
                name: each - times * value // values[name] if name in product else each for name, each in grows.items()
            }
            found = search(at + 1, left - times * value, rest)
            if found is not None:
                return found + ["*".join(product)] * times
        return None

    found = search(0, size, dict(slopes))
    if found is None:
        return None
    constant = [part for part in found if part.isdigit()]
    ordered = sorted(
        (part for part in found if not part.isdigit()), key=lambda part: [names.index(n) for n in part.split("*")]
    )
    return "+".join([*constant, *ordered]) if found else "0"


def _product(numbers: Any) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def probe(config: PretrainedConfig) -> Probe:
    """Build models of a config on the meta device, one field changed at a time.

    Raises:
        UnsupportedModelError: if it cannot be built.
    """
    names = {name: (config.attribute_map or {}).get(name, name) for name in (*PRUNER_FIELDS, *FIXED_FIELDS)}
    values = {
        key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")
    }
    depth_field = names["num_hidden_layers"]
    depth = values[depth_field]
    if depth > MOST_LAYERS:
        lists = [key for key, value in values.items() if isinstance(value, list) and len(value) == depth]
        values.update({key: values[key][:4] for key in lists}, **{depth_field: 4})
    heads, hidden = values.get(names["num_attention_heads"]), values.get(names["hidden_size"])
    if isinstance(heads, int) and isinstance(hidden, int) and not isinstance(values.get("head_dim"), int):
        values["head_dim"] = hidden // heads
    found = Probe(config, values, {})
    shapes = found.build()
    if shapes is None:
        empty_model(config)  # raises what is wrong
        raise UnsupportedModelError(f"No model of type {config.model_type!r} can be built with fewer layers.")
    found.shapes = shapes
    _write_out(found)
    for name, value in found.values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            continue
        for changed in (2 * value, 3 * value, value + 1, value // 2):
            after = found.build(**{name: changed}) if changed > 0 else None
            if after is None:
                continue
            if after.keys() != found.shapes.keys():
                found.structural.append(name)
            elif after != found.shapes:
                by = {
                    tensor: tuple((new - old) // (changed - value) for new, old in zip(after[tensor], shape))
                    for tensor, shape in found.shapes.items()
                }
                if all(
                    old + each * (changed - value) == new
                    for tensor, shape in found.shapes.items()
                    for old, each, new in zip(shape, by[tensor], after[tensor])
                ):
                    found.slopes[name] = by
            break
    found.implied = {name: _implied(found, name) for name in found.implied}
    return found


def _write_out(found: Probe) -> None:
    """Fields that the config leaves to None and that are sizes: found by giving them one."""
    for name, value in list(found.values.items()):
        if value is not None:
            continue
        after = found.build(**{name: 52})
        if after is None or after.keys() != found.shapes.keys() or after == found.shapes:
            continue
        sizes = {
            old
            for tensor in after
            for old, new in zip(found.shapes[tensor], after[tensor])
            if old != new and new == 52
        }
        if len(sizes) == 1:
            [size] = sizes
            if found.build(**{name: size}) == found.shapes:
                found.values[name] = size
                found.implied[name] = ""


def _implied(found: Probe, name: str) -> str:
    """What a field stands for while it is None: a multiple of another field, with which it grows, else a number."""
    size = found.values[name]
    [*tensors] = [
        tensor for tensor, shape in found.shapes.items() if size in shape and any(found.slopes[name][tensor])
    ]
    for other in found.slopes:
        value = found.values[other]
        after = found.build(**{name: None, other: 2 * value}) if other != name and size % value == 0 else None
        if after is not None and all(2 * size in after[tensor] for tensor in tensors):
            return other if size == value else f"{size // value}*{other}"
    return str(size)


@dataclass
class Draft:
    """A table, over axes: what `draft_family` writes down.

    Attributes:
        axes: field → axis.
        layers_path: path of the layers.
        outer: tensor → dimensions.
        layer: tensor inside a layer → dimensions.
    """

    axes: dict[str, parts.Axis]
    layers_path: str
    outer: dict[str, str]
    layer: dict[str, str]
    todo: list[str] = field(default_factory=list)
    coupled: bool = False

    @property
    def names(self) -> set[str]:
        """Names of the axes."""
        return {axis.name for axis in self.axes.values()}


def draft_family(config: PretrainedConfig) -> str:
    """Draft the family file of a model.

    Args:
        config: any config of the family; one whose optional sizes are given tells more.

    Returns:
        Python source of `families/<model_type>.py`, with TODO comments for what shapes cannot tell.

    Raises:
        UnsupportedModelError: if the model cannot be built, or a dimension is no sum of products of config fields.
    """
    found = probe(config)
    return _source(config, found, _draft(config, found))


def _draft(config: PretrainedConfig, found: Probe) -> Draft:
    standard = {
        (config.attribute_map or {}).get(name, name): axis for name, axis in {**PRUNER_FIELDS, **FIXED_FIELDS}.items()
    }
    depth_field = next(name for name, axis in standard.items() if axis == "layers")
    layers_path = _layers_path(found.shapes, found.values[depth_field])
    outer: dict[str, str] = {}
    layer: dict[str, str] = {}
    for tensor, shape in found.shapes.items():
        dimensions = " ".join(found.dimension(tensor, position) for position in range(len(shape)))
        inside = re.fullmatch(re.escape(layers_path) + r"\.\d+\.(.+)", tensor)
        table, name = (layer, inside[1]) if inside else (outer, tensor)
        if table.setdefault(name, dimensions) != dimensions:
            raise UnsupportedModelError(f"{name} has another shape in another layer. Write its table by hand.")
    axes = {depth_field: replace(parts.LAYERS, fields=(depth_field,))}
    draft = Draft(axes, layers_path, outer, layer)
    sized = [name for name in [*standard, *found.slopes] if name in found.slopes]
    for name in sorted(dict.fromkeys(sized), key=lambda name: standard.get(name) != "experts"):
        axes[name] = _axis(name, standard.get(name), found, draft)
    heads = next(name for name, axis in standard.items() if axis == "heads")
    draft.coupled = heads in found.values and heads not in axes
    if draft.coupled:
        axes[heads] = replace(parts.HEADS, fields=(heads,))
        axes["head_dim"] = parts.HEAD_DIM
    renamed = {name: axis.name for name, axis in axes.items()}

    def over_axes(table: Mapping[str, str]) -> dict[str, str]:
        return {
            tensor: re.sub(r"[a-z_]\w*", lambda word: renamed[word[0]], text, flags=re.IGNORECASE)
            for tensor, text in table.items()
        }

    draft.outer, draft.layer = over_axes(draft.outer), over_axes(draft.layer)
    if draft.coupled:
        _couple(draft)
    return draft


def _layers_path(shapes: Shapes, depth: int) -> str:
    """The module list that has as many entries as the model has layers, and the most tensors."""
    numbered: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for tensor in shapes:
        for found in re.finditer(r"\.(\d+)\.", tensor):
            path = tensor[: found.start()]
            numbered.setdefault(path, set()).add(int(found[1]))
            counts[path] = counts.get(path, 0) + 1
    paths = [path for path, numbers in numbered.items() if numbers == set(range(depth))]
    if not paths:
        raise UnsupportedModelError(f"No module list holds {depth} layers. Write its table by hand.")
    return max(paths, key=lambda path: counts[path])


def _axis(name: str, known: str | None, found: Probe, draft: Draft) -> parts.Axis:
    """The axis of a field."""
    tables = [*draft.outer.values(), *draft.layer.values()]
    experts = next((field for field, axis in draft.axes.items() if axis.name == "experts"), None)
    using = [text for text in tables if re.search(rf"\b{name}\b", text)]
    if known == "ffn" and experts and all(re.search(rf"\b{experts}\b", text) for text in using):
        known = "moe_ffn"
    hidden = next((field for field, axis in draft.axes.items() if axis.name == "hidden"), "")
    if (
        known is None
        and "ffn" not in draft.names
        and {f"{name} {hidden}", f"{hidden} {name}"} <= set(draft.layer.values())
    ):
        known = "ffn"
    implied = found.implied.get(name)
    if known in STANDARD:
        axis = replace(STANDARD[known][1], fields=(name,))
        return axis if implied is None else replace(axis, implied=_over(implied, draft))
    draft.todo.append(f"whether {name} can be cut: its axis is fixed as long as it is not one of base.py")
    return parts.Axis(name, (name,), implied=None if implied is None else _over(implied, draft), prunable=False)


def _over(expression: str, draft: Draft) -> str:
    return "*".join(draft.axes[part].name if part in draft.axes else part for part in expression.split("*"))


def _couple(draft: Draft) -> None:
    """Heads as wide together as the residual stream leave no trace in shapes: their projections are guessed."""
    attention = [name for name in draft.layer if "att" in name.lower() and " " in draft.layer[name]]
    inner = "heads*head_dim"
    for name in attention:
        rows, columns = draft.layer[name].split()
        if {*rows.split("+"), *columns.split("+")} != {"hidden"}:
            continue
        bias = draft.layer.get(f"{name.removesuffix('weight')}bias")
        fused = [side for side in (rows, columns) if "+" in side]
        if name == attention[-1] and not fused:
            # Linear or Conv1D: as the fused projection before it.
            transposed = any("+" in draft.layer[other].split()[1] for other in attention)
            draft.layer[name] = f"{inner} hidden" if transposed else f"hidden {inner}"
        elif fused and fused[0] == columns:
            draft.layer[name] = f"hidden {columns.replace('hidden', inner)}"
        else:
            draft.layer[name] = f"{rows.replace('hidden', inner)} hidden"
        if bias is not None and name != attention[-1]:
            draft.layer[f"{name.removesuffix('weight')}bias"] = bias.replace("hidden", inner)
    draft.todo.append(
        "the heads are as wide together as the residual stream, which shapes do not show: "
        f"that {', '.join(attention)} hold them is a guess, the order inside fused dimensions, too"
    )


def _taps(draft: Draft) -> dict[str, str]:
    """The last module of a layer that reads an axis and writes to the residual stream; stacked experts as a whole."""
    taps: dict[str, str] = {}
    for axis in draft.axes.values():
        if not axis.per_layer:
            continue
        for name, text in draft.layer.items():
            dimensions = text.split()
            module = name.rpartition(".")[0]
            if axis.name in ("experts", "moe_ffn"):
                if len(dimensions) == 3 and axis.name in dimensions:
                    taps[axis.name] = module
            elif "hidden" in dimensions and any(
                "+" not in side and axis.name in side.split("*") for side in dimensions
            ):
                taps[axis.name] = module
    if "kv" in draft.names and "heads" in taps:
        taps["kv"] = taps["heads"]
    return taps


def _source(config: PretrainedConfig, found: Probe, draft: Draft) -> str:
    """The draft as Python."""
    used = {"ArchSpec", "layer_tables"}

    def axis_source(axis: parts.Axis) -> str:
        constant, standard = STANDARD.get(axis.name, ("", None))
        if standard is None:
            used.add("Axis")
            implied = "" if axis.implied is None else f", implied={axis.implied!r}"
            return f"Axis({axis.name!r}, {axis.fields!r}{implied}, prunable=False)"
        used.add(constant)
        changes = [
            f"{name}={getattr(axis, name)!r}"
            for name in ("fields", "implied")
            if getattr(axis, name) != getattr(standard, name)
        ]
        return f"replace({constant}, {', '.join(changes)})" if changes else constant

    def table_source(table: Mapping[str, str], indent: str) -> list[str]:
        lines, taken = [], set()
        for name, text in table.items():
            module, _, leaf = name.rpartition(".")
            bias = table.get(f"{module}.bias")
            if leaf not in ("weight", "bias") or module in taken:
                lines += [] if module in taken else [f"{{{name!r}: {text!r}}},"]
                continue
            taken.add(module)
            sides = text.split()
            if leaf == "weight" and len(sides) == 1:
                helper, arguments = "norm", "" if text == "hidden" else f", width={text!r}"
            elif leaf == "weight" and len(sides) == 2 and bias in (None, sides[0]):
                helper, arguments = "linear", f", {sides[0]!r}, {sides[1]!r}"
            elif leaf == "weight" and len(sides) == 2 and bias == sides[1]:
                helper, arguments = "conv1d", f", {sides[0]!r}, {sides[1]!r}"
            else:
                taken.discard(module)
                lines.append(f"{{{name!r}: {text!r}}},")
                continue
            used.add(helper)
            fused = any("+" in side for side in sides)
            lines.append(f"{helper}({module!r}{arguments}),{'  # TODO: the order of the parts' if fused else ''}")
        return [indent + line for line in lines]

    taps = _taps(draft)
    hidden = [
        name.removesuffix(".weight")
        for name, text in draft.layer.items()
        if text == "hidden" and name.endswith("weight")
    ]
    final = [
        name.removesuffix(".weight")
        for name, text in draft.outer.items()
        if text == "hidden" and name.endswith("weight")
    ]
    depth = found.values[next(iter(draft.axes))]
    lists = [name for name, value in found.values.items() if isinstance(value, list) and len(value) == depth]
    groups = (("heads", "kv"),) if {"heads", "kv"} <= draft.names else ()
    fields: dict[str, Any] = {
        "taps": taps,
        "layer_norms": tuple(hidden),
        "final_norm": final[-1] if final else "",
        "groups": groups,
        "equal": (("heads*head_dim", "hidden"),) if draft.coupled else (),
        "multiples": () if draft.coupled else _multiples(found, draft),
        "layer_lists": tuple(lists),
        "least": (("experts", "num_experts_per_tok"),)
        if "experts" in draft.names and "num_experts_per_tok" in found.values
        else (),
    }
    notes = [
        *draft.todo,
        "which layer_norms normalise what is written instead of what is read; those do not score the hidden size",
        "norm_offset, scaled_embeddings and writers: read the norms' and the embeddings' forward",
        "what else depends on a size or on a layer's index; refuse what the stock class cannot hold",
    ]
    known = (*lists, next(iter(draft.axes)))
    counted = [
        name
        for name, value in found.values.items()
        if "layer" in name and name not in known and isinstance(value, int | list)
    ]
    if counted:
        notes.append(f"which of {', '.join(counted)} count, list or place layers")
    if structural := [name for name in found.structural if name not in draft.axes]:
        notes.append(f"which tensors there are depends on {', '.join(structural)}")
    if not final:
        notes.append("no norm has a weight: name layer_norms and final_norm by hand")
    body = [
        "SPEC = ArchSpec(",
        f"    model_type={config.model_type!r},",
        "    axes=(",
        *(f"        {axis_source(axis)}," for axis in draft.axes.values()),
        "    ),",
        f"    layers_path={draft.layers_path!r},",
        "    outer=layer_tables(",
        *table_source(draft.outer, " " * 8),
        "    ),",
        "    layer=layer_tables(",
        *table_source(draft.layer, " " * 8),
        "    ),",
        *(f"    {name}={value!r}," for name, value in fields.items() if value or name in NEEDED),
        ")",
    ]
    text = "\n".join(body).replace("'", '"')
    comments = [textwrap.wrap(f"TODO: {note}.", 115) for note in notes]
    head = [
        f'"""{type(config).__name__.removesuffix("Config")}: a draft. TODO: say what is particular about it."""',
        "",
        *(["from dataclasses import replace", ""] if "replace(" in text else []),
        f"from ..base import {', '.join(sorted(used))}",
        "",
        *(f"# {line}" for lines in comments for line in lines),
    ]
    return "\n".join([*head, text, ""])


def _multiples(found: Probe, draft: Draft) -> tuple[tuple[str, str], ...]:
    """Whether the stock config insists on a hidden size that the heads divide."""
    field_of = {axis.name: name for name, axis in draft.axes.items()}
    if not {"hidden", "heads"} <= field_of.keys():
        return ()
    hidden, heads = found.values[field_of["hidden"]], found.values[field_of["heads"]]
    fits = hidden // heads * heads + heads
    accepted = found.build(**{field_of["hidden"]: fits}), found.build(**{field_of["hidden"]: fits + 1})
    return (("hidden", "heads"),) if accepted[0] is not None and accepted[1] is None else ()
