"""Drafts a family table: builds the model without memory and changes one config field at a time.

How every dimension of every tensor moves with every field is read off, and with it the sum of products that it is.
What shapes cannot tell is marked TODO: the order inside fused dimensions, what is scaled by a size, what a layer's
index decides. The tests' oracles prove or refute a draft; nothing is believed because its shapes fit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..errors import UnsupportedModelError
from ..families import PRUNER_FIELDS
from ..families import base as parts
from .draft_source import Draft, write_source
from .modelling_code import CodeHints, read_modelling_code
from .probe import FIXED_FIELDS, STANDARD, Probe, Shapes, probe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def draft_family(config: PretrainedConfig) -> str:
    """Draft the family file of a model.

    Args:
        config: any config of the family; one whose optional sizes are given tells more.

    Returns:
        Python source of `families/<model_type>.py`, with TODO comments for what shapes cannot tell.

    Raises:
        UnsupportedModelError: if the model cannot be built, or a dimension is no sum of products of config fields.
    """
    with _without_warnings():  # about special tokens outside of small vocabularies
        return _source(config)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the warnings of Transformers."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _source(config: PretrainedConfig) -> str:
    found = probe(config)
    draft = _draft(config, found)
    hints = read_modelling_code(found.small_config(), draft.layers_path, draft.norms, draft.final_norm)
    fields = _table_fields(found, draft, hints.output_norms)
    draft.todo += _notes(found, draft, hints, fields["layer_lists"])
    return write_source(config, found, draft, fields, hints)


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
    sizes = set(found.slopes)
    if found.square is not None:
        sizes = (sizes | {found.square[0]}) - {found.square[1], "head_dim"}
    sized = [name for name in [*standard, *found.slopes] if name in sizes]
    for name in sorted(dict.fromkeys(sized), key=lambda name: standard.get(name) != "experts"):
        axes[name] = _axis(name, standard.get(name), found, draft)
    heads = next(name for name, axis in standard.items() if axis == "heads")
    draft.coupled = heads in found.values and heads not in axes
    if draft.coupled:
        after = {name: axes.pop(name) for name in [*axes] if axes[name].name == "kv"}  # implied by the heads
        axes |= {heads: replace(parts.HEADS, fields=(heads,)), "head_dim": parts.HEAD_DIM, **after}
    renamed = {name: axis.name for name, axis in axes.items()}

    def over_axes(table: Mapping[str, str]) -> dict[str, str]:
        return {
            tensor: re.sub(r"[a-z_]\w*", lambda word: renamed[word[0]], text, flags=re.IGNORECASE)
            for tensor, text in table.items()
        }

    draft.outer, draft.layer = over_axes(draft.outer), over_axes(draft.layer)
    if draft.coupled:
        _guess_coupled_heads(draft)
    elif "heads" in draft.axis_names:
        _couple_square_output(draft)
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
        and "ffn" not in draft.axis_names
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
    attention = [name for name in draft.layer if "att" in name.lower() and draft.layer[name].count(" ") == 1]
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
    for name, text in draft.layer.items():
        # Norms inside attention are over the heads.
        if text == "hidden" and re.match(r"[^.]*att[^.]*\.\w*norm", name.lower()):
            draft.layer[name] = inner
    draft.todo.append(
        "the heads are as wide together as the residual stream, which shapes do not show: "
        f"that {', '.join(attention)} hold them is a guess, the order inside fused dimensions, too"
    )


def _couple_square_output(draft: Draft) -> None:
    """An output projection of attention that is as wide as the residual stream on both sides reads the heads."""
    square = [name for name, text in draft.layer.items() if text == "hidden hidden" and "att" in name.lower()]
    if square:
        draft.coupled = True
        draft.layer[square[-1]] = "hidden heads*head_dim"
        draft.todo.append(f"that {square[-1]} reads the heads, which are as wide together as its inputs, is a guess")


def _table_fields(found: Probe, draft: Draft, output_norms: tuple[str, ...]) -> dict[str, Any]:
    """Fields of the table beside axes and tensors, as plain values."""
    depth = found.values[next(iter(draft.axes))]
    routed = "experts" in draft.axis_names and "num_experts_per_tok" in found.values
    return {
        "hook_points": draft.hook_points(),
        "layer_norms": tuple(name for name in draft.norms if name not in output_norms),
        "final_norm": draft.final_norm,
        "groups": (("heads", "kv"),) if {"heads", "kv"} <= draft.axis_names else (),
        "equal": (("heads*head_dim", "hidden"),) if draft.coupled else (),
        "multiples": () if draft.coupled else _multiples(found, draft),
        "layer_lists": tuple(
            name for name, value in found.values.items() if isinstance(value, list) and len(value) == depth
        ),
        "least": (("experts", "num_experts_per_tok"),) if routed else (),
    }


def _notes(found: Probe, draft: Draft, hints: CodeHints, layer_lists: tuple[str, ...]) -> list[str]:
    """What neither shapes nor a look at the modelling code decide."""
    lines = "; ".join(hints.logit_lines)
    notes = [
        f"logits: {'a guess' if hints.logits else 'nothing found'} in {lines or 'code that cannot be read'}",
        "norm_offset and stream: whether norms add one to their weights, and what scales the embeddings, are guesses",
        "layer_norms: norms of what is read score the hidden size; norms of what is written belong to layer alone",
        "what else depends on a size or on a layer's index; refuse what the stock class cannot hold",
    ]
    known = (*layer_lists, next(iter(draft.axes)))
    counted = [
        name
        for name, value in found.values.items()
        if "layer" in name and name not in known and isinstance(value, int | list)
    ]
    if counted:
        notes.append(f"which of {', '.join(counted)} count, list or place layers")
    if structural := [name for name in found.structural if name not in draft.axes]:
        notes.append(f"which tensors there are depends on {', '.join(structural)}")
    if not draft.final_norm:
        notes.append("no norm has a weight: name layer_norms and final_norm by hand")
    return notes


def _multiples(found: Probe, draft: Draft) -> tuple[tuple[str, str], ...]:
    """Whether the stock config insists on a hidden size that the heads divide."""
    field_of = {axis.name: name for name, axis in draft.axes.items()}
    if not {"hidden", "heads"} <= field_of.keys():
        return ()
    hidden, heads = found.values[field_of["hidden"]], found.values[field_of["heads"]]
    fits = hidden // heads * heads + heads
    accepted = found.build(**{field_of["hidden"]: fits}), found.build(**{field_of["hidden"]: fits + 1})
    return (("hidden", "heads"),) if accepted[0] is not None and accepted[1] is None else ()
