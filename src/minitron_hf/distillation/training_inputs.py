"""What a training is of: digests of its models and data, which a resumed run has to have again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from ..data.images import COLUMNS
from ..files import digest

#: Number of rows of the data, and of values of a parameter, that are compared.
SAMPLED_ROWS, SAMPLED_VALUES = 64, 1024


def fingerprint(model: nn.Module | None) -> str | None:
    """Digest of the names, shapes and a sample of the values of a model's weights, without a trained adapter.

    Unlike `model_digest` it takes any model: values that are quantised, sharded or offloaded are left out.
    """
    if model is None:
        return None
    adapted = is_peft_model(model)
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if adapted and parameter.requires_grad:
            continue
        sha.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.data
        if type(values) is Tensor and values.is_floating_point() and not values.is_meta:
            stride = -(-values.numel() // SAMPLED_VALUES) | 1
            sample = values.reshape(-1)[::stride].to(device="cpu", dtype=torch.float32)
            sha.update(sample.contiguous().numpy().tobytes())
    return f"sha256:{sha.hexdigest()}"


def sampled_data(data: Any) -> dict[str, Any] | None:
    """Number of rows, and a digest of some of them without their images; None for streams."""
    if data is None or not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, Mapping):
        return None
    if images := [name for name in COLUMNS if name in getattr(data, "column_names", ())]:
        data = data.remove_columns(images)
    rows = []
    for index in range(0, len(data), max(1, len(data) // SAMPLED_ROWS)):
        row = data[index]
        if isinstance(row, Mapping) and "input_ids" in row:  # rows of a teacher cache have large columns beside
            row = {name: row[name] for name in ("input_ids", "labels") if name in row}
        rows.append(json.dumps(row, sort_keys=True, default=_json_value))
    return {"num_rows": len(data), "rows": digest(rows)}


def _json_value(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def describe_difference(name: str, before: Any, now: Any) -> str:
    """In words, that one of the inputs of a training is another than before."""
    if isinstance(now, str) and now.startswith("sha256:"):
        return f"other weights of the {name}"
    if isinstance(before, dict) or isinstance(now, dict):
        return f"other {name}"
    return f"{name}: {before} → {now}"
