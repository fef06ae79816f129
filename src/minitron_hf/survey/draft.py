"""Drafts a family table: builds the model without memory and changes one config field at a time.

How every dimension of every tensor moves with every field is read off, and with it the sum of products that it is.
What shapes cannot tell is marked TODO: the order inside fused dimensions, what is scaled by a size, what a layer's
index decides. The tests' oracles prove or refute a draft; nothing is believed because its shapes fit.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..families import PRUNER_FIELDS
from ..families import base as parts
from .probe import FIXED_FIELDS, STANDARD, Probe, Shapes, probe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Fields of a table that have no default.
NEEDED = ("hook_points", "layer_norms", "final_norm")


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
    return _write_source(config, found, _draft(config, found))


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
        _guess_coupled_heads(draft)
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
        return axis if implied is None else replace(axis, implied=_in_axes(implied, draft))
    draft.todo.append(f"whether {name} can be cut: its axis is fixed as long as it is not one of base.py")
    return parts.Axis(name, (name,), implied=None if implied is None else _in_axes(implied, draft), prunable=False)


def _in_axes(expression: str, draft: Draft) -> str:
    return "*".join(draft.axes[part].name if part in draft.axes else part for part in expression.split("*"))


def _guess_coupled_heads(draft: Draft) -> None:
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


def _find_hook_points(draft: Draft) -> dict[str, str]:
    """The last module of a layer that reads an axis and writes to the residual stream; stacked experts as a whole."""
    hook_points: dict[str, str] = {}
    for axis in draft.axes.values():
        if not axis.per_layer:
            continue
        for name, text in draft.layer.items():
            dimensions = text.split()
            module = name.rpartition(".")[0]
            if axis.name in ("experts", "moe_ffn"):
                if len(dimensions) == 3 and axis.name in dimensions:
                    hook_points[axis.name] = module
            elif "hidden" in dimensions and any(
                "+" not in side and axis.name in side.split("*") for side in dimensions
            ):
                hook_points[axis.name] = module
    if "kv" in draft.names and "heads" in hook_points:
        hook_points["kv"] = hook_points["heads"]
    return hook_points


def _write_source(config: PretrainedConfig, found: Probe, draft: Draft) -> str:
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

    hook_points = _find_hook_points(draft)
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
        "hook_points": hook_points,
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
        "norm_offset, stream and logits: read the forward of norms, embeddings and head",
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
        f"from .base import {', '.join(sorted(used))}",
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
