"""Reads in the modelling code of Transformers what shapes cannot tell.

Every answer is a guess for a person to check.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models import empty_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class CodeHints:
    """What the code of a stock model seems to do.

    Attributes:
        logits: field of `LogitRules` → config field.
        logit_lines: the lines that compute the logits.
        norm_offset: 1.0 where the norms add one to their weights.
        is_layer_norm: whether the last norm is a LayerNorm.
        scaled_embeddings: whether something is multiplied by √hidden_size.
        output_norms: norms inside a layer of what attention and MLP write, in layers that also norm what they read.
    """

    logits: dict[str, str]
    logit_lines: tuple[str, ...]
    norm_offset: float
    is_layer_norm: bool
    scaled_embeddings: bool
    output_norms: tuple[str, ...]


def read_modelling_code(
    config: PretrainedConfig, layers_path: str, layer_norms: Iterable[str], final_norm: str
) -> CodeHints:
    """Look for the usual ways to write scaled logits, norms and embeddings.

    Args:
        config: the model's.
        layers_path: path of the module list of decoder layers.
        layer_norms: norms inside a layer.
        final_norm: path of the last norm, or nothing.
    """
    model = empty_model(config)
    forward = _source_of(type(model).forward)
    lines = tuple(line.strip() for line in forward.splitlines() if re.match(r"\s*logits = ", line))
    layer = type(model.get_submodule(f"{layers_path}.0"))
    norm = type(model.get_submodule(final_norm)) if final_norm else type(model)
    module = _source_of(sys.modules[type(model).__module__])
    return CodeHints(
        logits=_logit_rules(config, forward, lines),
        logit_lines=lines,
        norm_offset=float(bool(re.search(r"1(\.0)? \+ self\.weight|self\.weight \+ 1", _source_of(norm)))),
        is_layer_norm="LayerNorm" in norm.__name__,
        scaled_embeddings=bool(re.search(r"hidden_size ?\*\* ?0\.5|sqrt\([^)]*hidden_size\)", module)),
        output_norms=_output_norms(_source_of(layer.forward), set(layer_norms)),
    )


def _source_of(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # compiled, or made while running
        return ""


def _logit_rules(config: PretrainedConfig, forward: str, lines: Iterable[str]) -> dict[str, str]:
    """Fields of `LogitRules`, where the lines that compute the logits name config fields."""
    if capped := re.search(r"self\.config\.(\w*softcap\w*)", forward):
        return {"capped_by": capped[1]}
    rules = {}
    for line in lines:
        found = re.match(r"logits = (?:logits|self\.lm_head\(.*\)) ([*/]) self\.(?:config\.|model\.)?(\w+)", line)
        if found and hasattr(config, found[2]):
            rules["multiplied_by" if found[1] == "*" else "divided_by"] = found[2]
    return rules


def _output_norms(forward: str, norms: set[str]) -> tuple[str, ...]:
    """Norms called after a sublayer and not before one, unless nothing is normed before the first sublayer."""
    in_order = re.sub(r"self\.(\w+)\(self\.(\w+)\(", r"self.\2(self.\1(", forward)  # inner calls come first
    calls = [name for name in re.findall(r"self\.(\w+)\(", in_order) if name in norms or "drop" not in name]
    if not calls or calls[0] not in norms:
        return ()
    following = [*calls[1:], None]
    return tuple(
        name
        for before, name, after in zip(["", *calls], calls, following)
        if name in norms and before and before not in norms and (after is None or after in norms)
    )
