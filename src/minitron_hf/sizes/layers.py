"""Which layers must stay, and the config fields that list, count or place layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..families import ArchSpec, text_config
from .request import PrunerConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def fixed_layers(spec: ArchSpec, config: PretrainedConfig) -> set[int]:
    """Layers that cannot be dropped: later ones read what they store, or the stock classes insist on them."""
    config = text_config(config)
    depth = spec.sizes(config)["layers"]
    fixed = {
        layer
        for kinds, kind in spec.layer_rules.fixed_layers
        for layer, own in enumerate(getattr(config, kinds))
        if own == kind
    }
    return fixed | {layer % depth for layer in spec.layer_rules.fixed_ends}


def protected_layers(spec: ArchSpec, config: PretrainedConfig, request: PrunerConfig) -> set[int]:
    """Layers that a choice by scores never drops."""
    depth = spec.sizes(config)["layers"]
    first, last = request.keep_first_layers, request.keep_last_layers
    ends = {layer for layer in range(depth) if layer < first or layer >= depth - last}
    return ends | fixed_layers(spec, config)


def reason_against_layers(spec: ArchSpec, config: PretrainedConfig, layers_kept: Iterable[int]) -> str:
    """What layers a choice of layers lacks, as a sentence; empty when it lacks none.

    Args:
        spec: the family.
        config: the teacher's config.
        layers_kept: teacher indices of the layers that stay.
    """
    config = text_config(config)
    kept = set(layers_kept)
    for name, kinds in spec.needed_kinds:
        needed = [layer for layer, kind in enumerate(getattr(config, name)) if kind in kinds]
        if needed and kept.isdisjoint(needed):
            return (
                f"the stock '{spec.model_type}' classes do not work without a layer of {name} "
                f"{' or '.join(kinds)}. Keep one of {needed}."
            )
    for names in spec.layer_rules.sparse_ranges:
        if _sparse_range([getattr(config, name) for name in names], sorted(kept)) is None:
            return (
                f"no values of {', '.join(names)} describe which of them have experts. "
                "Choose layers_to_drop so that these follow each other, or repeat as they did."
            )
    for name, reusing in spec.layer_rules.reusing_layers:
        source = 0
        for layer, kind in enumerate(getattr(config, name)):
            if kind != reusing:
                source = layer
            elif layer in kept and source not in kept:
                return (
                    f"layer {layer} ({name} '{kind}') uses what layer {source} computes. "
                    f"Keep layer {source} too, or drop both."
                )
    if spec.layer_rules.derived_kinds:
        shallower = copy.deepcopy(config)
        setattr(shallower, spec.axis["layers"].fields[0], len(kept))
        for name, rule in spec.layer_rules.derived_kinds:
            kinds = getattr(config, name)
            if getattr(shallower, name) != [kinds[layer] for layer in sorted(kept)]:
                return (
                    f"their {name} follow from {rule}, which stay as they are. "
                    "Choose layers_to_drop so that the kinds of layers repeat as they did, or num_hidden_layers so "
                    "that one block of layers can go."
                )
    return ""


def _sparse_range(described: Sequence[int], layers_kept: Iterable[int]) -> tuple[int, int, int] | None:
    """First, last and period of the layers that have experts, once only some layers stay; None where none describe it.

    Args:
        described: the same three numbers for all layers.
        layers_kept: those that stay, ascending.
    """
    first, last, period = described
    kept = list(layers_kept)
    sparse = [new for new, layer in enumerate(kept) if first <= layer <= last and (layer + 1) % period == 0]
    if not sparse:
        return len(kept), len(kept) - 1, period
    for every in range(1, len(kept) + 1):
        if [new for new in range(sparse[0], sparse[-1] + 1) if (new + 1) % every == 0] == sparse:
            return sparse[0], sparse[-1], every
    return None


def _layer_fields(
    spec: ArchSpec, values: Mapping[str, Any], depth: int, layers_kept: tuple[int, ...]
) -> dict[str, Any]:
    """Config fields that say something of single layers, for the layers that stay."""

    def renumbered(layers: Iterable[int]) -> list[int]:
        layers = set(layers)
        return [new for new, layer in enumerate(layers_kept) if layer in layers]

    changed: dict[str, Any] = {}
    for name in spec.layer_lists:
        if isinstance(values.get(name), list | tuple):
            changed[name] = [values[name][layer] for layer in layers_kept]
    for name, listed in spec.layer_rules.layer_patterns:
        changed[name] = [[[values[listed][layer] for layer in layers_kept], 1]]
    if own := values.get("per_layer_config"):
        own = {int(layer): overrides for layer, overrides in own.items()}
        changed["per_layer_config"] = {new: own[layer] for new, layer in enumerate(layers_kept) if layer in own}
    for name in spec.leading_layers:
        # May exceed the depth (Qwen2's default is 28), hence not recounted without need.
        if values.get(name) is not None:
            changed[name] = sum(layer < values[name] for layer in layers_kept)
    for name in spec.layer_rules.trailing_layers:
        if values.get(name) is not None:
            changed[name] = sum(layer >= depth - values[name] for layer in layers_kept)
    for name in spec.layer_rules.layer_indices:
        if values.get(name) is not None:
            changed[name] = renumbered(values[name])
    for listed, period in spec.layer_rules.sparse_layers:
        dense = {layer for layer in range(depth) if layer in (values[listed] or ()) or (layer + 1) % values[period]}
        changed |= {listed: renumbered(dense), period: 1}
    for names in spec.layer_rules.sparse_ranges:
        described = _sparse_range([values[name] for name in names], layers_kept)
        assert described is not None, "reason_against_layers() comes first"
        changed |= dict(zip(names, described))
    return changed
