"""Measures how every tensor dimension of an architecture moves with its config fields."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from ..families import PRUNER_FIELDS, named_tensors, text_config
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
        square: fields of the hidden size and of the number of heads, where the stock class derives the head width from
            both: then `head_dim` is varied instead of the hidden size. Nothing where it does not.
    """

    config: PretrainedConfig
    values: dict[str, Any]
    shapes: Shapes
    slopes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    implied: dict[str, str] = field(default_factory=dict)
    structural: list[str] = field(default_factory=list)
    square: tuple[str, str] | None = None

    def small_config(self) -> PretrainedConfig:
        """The config that is built, with few layers."""
        return type(self.config)(**self.values)

    def build(self, **changes: Any) -> Shapes | None:
        """Shapes with some fields changed; None where the stock class refuses."""
        values = {**self.values, **changes}
        if self.square is not None:
            hidden, heads = self.square
            values[hidden] = values[heads] * values["head_dim"]
        try:
            config = type(self.config)(**values)
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
        if self.square is not None:
            hidden, heads = self.square
            found = found.replace(f"{heads}*head_dim", hidden)
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
    if text_config(config) is not config:
        raise UnsupportedModelError(
            f"'{config.model_type}' is a model around a language model of type '{text_config(config).model_type}'. "
            "Draft that one; families/wrappers.py says how wrappers are added."
        )
    names = {name: (config.attribute_map or {}).get(name, name) for name in (*PRUNER_FIELDS, *FIXED_FIELDS)}
    values = {
        key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")
    }
    depth_field = names["num_hidden_layers"]
    depth = values.get(depth_field)
    if not isinstance(depth, int):
        raise UnsupportedModelError(
            f"The config of '{config.model_type}' has no number of layers (num_hidden_layers, or a name that its "
            "attribute_map gives it), so no family file can be drafted from it."
        )
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
    _write_implied_sizes(found)
    _measure_slopes(found)
    heads_field = names["num_attention_heads"]
    if any(slope < 0 for slopes in found.slopes.get(heads_field, {}).values() for slope in slopes):
        # More heads of the same hidden size are narrower, and so are the KV heads.
        found.square = (names["hidden_size"], heads_field)
        _measure_slopes(found)
    found.implied = {name: _implied(found, name) for name in found.implied}
    return found


def _measure_slopes(found: Probe) -> None:
    """Change one field after the other, and note how every dimension grows with it."""
    found.slopes.clear()
    found.structural.clear()
    for name, value in found.values.items():
        if (
            (found.square and name == found.square[0])
            or isinstance(value, bool)
            or not isinstance(value, int)
            or value < 1
        ):
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


def _write_implied_sizes(found: Probe) -> None:
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
