"""Writes a drafted table as Python, formatted as the linter wants it, and proposes a pocket config."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..families import base as parts
from .modelling_code import CodeHints
from .probe import STANDARD, Probe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Fields of a table that have no default.
NEEDED = ("hook_points", "layer_norms", "final_norm")
LINE_LENGTH = 119
#: Words in the config fields of axes → the file of pockets for such families; the first that fits.
POCKET_FILES = {"mamba|ssm|state": "state_space", "linear_|conv": "linear", "lora_rank": "latent", "expert": "experts"}


@dataclass
class Draft:
    """A table that was read off from shapes.

    Attributes:
        axes: config field → axis.
        layers_path: path of the layers.
        outer: tensor → dimensions.
        layer: tensor inside a layer → dimensions.
        todo: what a person has to decide.
        coupled: whether the heads are as wide together as the residual stream.
    """

    axes: dict[str, parts.Axis]
    layers_path: str
    outer: dict[str, str]
    layer: dict[str, str]
    todo: list[str] = field(default_factory=list)
    coupled: bool = False

    @property
    def axis_names(self) -> set[str]:
        """Names of the axes."""
        return {axis.name for axis in self.axes.values()}

    @property
    def norms(self) -> list[str]:
        """Norms over the hidden size inside a layer."""
        return [name.removesuffix(".weight") for name, text in self.layer.items() if _is_hidden_norm(name, text)]

    @property
    def final_norm(self) -> str:
        """The last norm over the hidden size, or nothing."""
        found = [name.removesuffix(".weight") for name, text in self.outer.items() if _is_hidden_norm(name, text)]
        return found[-1] if found else ""

    def hook_points(self) -> dict[str, str]:
        """The last module of a layer that reads an axis and writes to the residual stream; stacked experts whole."""
        found: dict[str, str] = {}
        for axis in self.axes.values():
            for name, text in self.layer.items() if axis.per_layer else ():
                dimensions = text.split()
                if axis.name in ("experts", "moe_ffn"):
                    matches = len(dimensions) == 3 and axis.name in dimensions
                else:
                    sides = [side.split("*") for side in dimensions if "+" not in side]
                    matches = "hidden" in dimensions and any(axis.name in side for side in sides)
                if matches:
                    found[axis.name] = name.rpartition(".")[0]
        if "kv" in self.axis_names and "heads" in found:
            found["kv"] = found["heads"]
        return found


def _is_hidden_norm(name: str, text: str) -> bool:
    return text == "hidden" and name.endswith("weight")


def write_source(
    config: PretrainedConfig, found: Probe, draft: Draft, fields: Mapping[str, Any], hints: CodeHints
) -> str:
    """The draft as Python source.

    Args:
        config: the model's.
        found: what building models has shown.
        draft: the table.
        fields: further fields of `ArchSpec`; plain values.
        hints: what the modelling code seems to do.
    """
    body = [
        "SPEC = ArchSpec(",
        f"    model_type={config.model_type!r},",
        "    axes=(",
        *(f"        {_axis_source(axis)}," for axis in draft.axes.values()),
        "    ),",
        f"    layers_path={draft.layers_path!r},",
        "    outer=layer_tables(",
        *_table_source(draft.outer),
        "    ),",
        "    layer=layer_tables(",
        *_table_source(draft.layer),
        "    ),",
        *(line for name, value in fields.items() if value or name in NEEDED for line in _field_source(name, value)),
        *_rules_source(draft, hints),
        ")",
    ]
    text = "\n".join(body).replace("'", '"')
    code = re.sub(r'"[^"]*"', "", text)
    names = [name for name in vars(parts) if re.search(rf"\b{name}\b", code)]
    rules = [name for name in ("LogitRules", "StreamRules") if f"{name}(" in text]
    comments = [f"TODO: {note}." for note in draft.todo]
    pocket = _pocket_entry(config, found, draft, hints)
    head = [
        f'"""{type(config).__name__.removesuffix("Config")}: a draft. TODO: say what is particular about it."""',
        "",
        *(["from dataclasses import replace", ""] if re.search(r"(?<!\w)replace\(", text) else []),
        _import_source("base", [name for name in names if name != "replace"]),
        *([_import_source("rules", rules)] if rules else []),
        "",
        *(f"# {line}" for comment in comments for line in textwrap.wrap(comment, LINE_LENGTH - 2)),
    ]
    return "\n".join([*head, text, "", *pocket, ""])


def _import_source(module: str, names: Iterable[str]) -> str:
    """An import in the linter's order: constants, classes, functions."""
    ordered = sorted(
        set(names), key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name.lower())
    )
    line = f"from .{module} import {', '.join(ordered)}"
    if len(line) <= LINE_LENGTH:
        return line
    return "\n".join([f"from .{module} import (", *(f"    {name}," for name in ordered), ")"])


def _axis_source(axis: parts.Axis) -> str:
    constant, standard = STANDARD.get(axis.name, ("", None))
    if standard is None:
        implied = "" if axis.implied is None else f", implied={axis.implied!r}"
        return f"Axis({axis.name!r}, {axis.fields!r}{implied}, prunable=False)"
    changes = [
        f"{name}={getattr(axis, name)!r}"
        for name in ("fields", "implied")
        if getattr(axis, name) != getattr(standard, name)
    ]
    return f"replace({constant}, {', '.join(changes)})" if changes else constant


def _table_source(table: Mapping[str, str]) -> list[str]:
    """The lines of a table of tensors, made of `linear`, `conv1d` and `norm` where they fit."""
    lines, taken = [], set()
    for name, text in table.items():
        module, _, leaf = name.rpartition(".")
        if module in taken:
            continue
        bias, sides = table.get(f"{module}.bias"), text.split()
        if leaf == "weight" and len(sides) == 1:
            call = f"norm({module!r}{'' if text == 'hidden' else f', width={text!r}'})"
        elif leaf == "weight" and len(sides) == 2 and bias in (None, sides[0]):
            call = f"linear({module!r}, {sides[0]!r}, {sides[1]!r})"
        elif leaf == "weight" and len(sides) == 2 and bias == sides[1]:
            call = f"conv1d({module!r}, {sides[0]!r}, {sides[1]!r})"
        else:
            lines.append(f"        {{{name!r}: {text!r}}},")
            continue
        taken.add(module)
        if any("+" in side for side in sides):
            lines.append("        # TODO: the order of the parts.")
        lines += _call_source(call)
    return lines


def _call_source(call: str) -> list[str]:
    """A call inside `layer_tables`: its arguments on a line of their own where it is too long."""
    if len(call) + 9 <= LINE_LENGTH:
        return [f"        {call},"]
    name, _, arguments = call.removesuffix(")").partition("(")
    return [f"        {name}(", f"            {arguments}", "        ),"]


def _field_source(name: str, value: Any, indent: str = "    ") -> list[str]:
    """A field of the table: on one line if it fits."""
    line = f"{indent}{name}={value!r},"
    if len(line) <= LINE_LENGTH or not isinstance(value, dict | tuple):
        return [line]
    if isinstance(value, dict):
        entries = [f"{key!r}: {one!r}" for key, one in value.items()]
        return [f"{indent}{name}={{", *(f"{indent}    {entry}," for entry in entries), f"{indent}}},"]
    return [f"{indent}{name}=(", *(f"{indent}    {one!r}," for one in value), f"{indent}),"]


def _rules_source(draft: Draft, hints: CodeHints) -> list[str]:
    """Fields of the table that the modelling code suggests."""
    lines = []
    if hints.norm_offset:
        lines.append(f"    norm_offset={hints.norm_offset},")
    if hints.scaled_embeddings:
        points = dict.fromkeys(draft.hook_points().values())
        writers = [f"{name}.weight" for name in hints.output_norms] or [
            f"{module}.{part}" for module in points for part in ("weight", "bias") if f"{module}.weight" in draft.layer
        ]
        lines += [
            "    stream=StreamRules(",
            "        scaled_embeddings=True,",
            *_field_source("stream_writers", tuple(writers), indent=" " * 8),
            "    ),",
        ]
    if hints.logits:
        rules = ", ".join(f"{name}={field!r}" for name, field in hints.logits.items())
        lines.append(f"    logits=LogitRules({rules}),")
    return lines


_DECODER = inspect.signature(parts.decoder).parameters
_EXPERTS = inspect.signature(parts.stacked_experts).parameters
#: What `Pocket` assumes of a family, unless told otherwise.
POCKET_DEFAULTS: Mapping[str, Any] = {
    "layers": "model.layers",
    "attention_out": _DECODER["attention_out"].default,
    "mlp_out": _DECODER["mlp_out"].default,
    "experts": None,
    "router": f"{_EXPERTS['module'].default}.{_EXPERTS['router'].default}",
    "kv": True,
    "norm": "rms",
    "num_norms": 2,
    "output_norms": (),
    "head_norms": (),
    "scaled_embeddings": False,
}
#: Sizes of pockets that neither `GROUPED` nor `COUPLED` hold, by axis.
POCKET_SIZES = {"experts": 7, "moe_ffn": 14, "shared_ffn": 20}
COUPLED_SIZES = {"hidden": 40, "ffn": 52, "layers": 4, "heads": 5, "positions": 64}


def _pocket_fields(draft: Draft, hints: CodeHints) -> dict[str, Any]:
    """Fields of `Pocket` that differ from their defaults."""
    points = draft.hook_points()
    wide = [name for name, text in draft.layer.items() if text in ("heads*head_dim", "kv*head_dim")]
    routers = [name.removesuffix(".weight") for name, text in draft.layer.items() if text == "experts hidden"]
    fields = {
        "layers": draft.layers_path,
        "attention_out": points.get("heads"),
        "mlp_out": points.get("ffn"),
        "experts": points.get("experts"),
        "router": routers[0] if routers else POCKET_DEFAULTS["router"],
        "kv": "kv" in draft.axis_names,
        "norm": ("layer" if hints.is_layer_norm else "rms") + ("1p" if hints.norm_offset else ""),
        "num_norms": len(draft.norms),
        "output_norms": hints.output_norms,
        "head_norms": tuple(name.removesuffix(".weight") for name in wide if name.endswith("weight")),
        "scaled_embeddings": hints.scaled_embeddings,
    }
    defaults = {**POCKET_DEFAULTS, **({"kv": False, "norm": "layer"} if draft.coupled else {})}
    return {name: value for name, value in fields.items() if value != defaults[name]}


def _pocket_entry(config: PretrainedConfig, found: Probe, draft: Draft, hints: CodeHints) -> list[str]:
    """A comment with a pocket config for the tests."""
    values = {axis.name: name for name, axis in draft.axes.items() if axis.fields == (name,)}
    fields = _pocket_fields(draft, hints)
    helper, sizes = ("grouped", "") if not draft.coupled else ("coupled", "GROUPED_COUPLED, ")
    if draft.coupled and "kv" not in draft.axis_names:
        own = ", ".join(f"{values[axis]}={size}" for axis, size in COUPLED_SIZES.items() if axis in values)
        modules = ", ".join(
            repr(fields.pop(name)) for name in ("layers", "attention_out", "mlp_out") if name in fields
        )
        sizes = f"dict(**COUPLED, {own}), {modules}{', ' if modules else ''}"
    changes = [f"{name}={value!r}" for name, value in fields.items()]
    changes += [
        f"{values[axis]}={size}"
        for axis, size in POCKET_SIZES.items()
        if values.get(axis, "intermediate_size") != "intermediate_size"
    ]
    if "experts" in values and "num_experts_per_tok" in found.values:
        changes.append("num_experts_per_tok=2")
    if isinstance(found.values.get("layer_types"), list):
        changes.append('layer_types=kinds("sfsff")')
    if "use_sliding_window" in found.values:
        changes.append("use_sliding_window=True")
    if "sliding_window" in found.values:
        changes.append("sliding_window=6")
    changes += [f"{name}={3.0 if 'cap' in name else 0.5}" for name in hints.logits.values()]
    names = " ".join(name for axis in draft.axes.values() for name in axis.fields)
    file = next((name for words, name in POCKET_FILES.items() if re.search(words, names)), "dense")
    call = (
        f"{config.model_type!r}: {helper}({config.model_type!r}, {sizes}{', '.join(changes)}".removesuffix(", ") + "),"
    )
    return [
        f"# TODO: move this pocket to tests/pockets/{'classic' if draft.coupled else file}.py; "
        "docs/guides/add-a-family.md explains its fields.",
        *(f"#     {line}" for line in textwrap.wrap(call.replace("'", '"'), LINE_LENGTH - 6)),
    ]
