"""Arguments and data as `distillation.json` records them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..compat import dataset_fingerprint
from ..files import digest

RECORD_NAME = "distillation.json"

#: Arguments that `distillation.json` records because they affect the result.
RECORDED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "max_length",
    "packing",
    "packing_strategy",
    "completion_only_loss",
    "assistant_only_loss",
    "divergence",
    "jsd_beta",
    "temperature",
    "top_k",
    "kd_weight",
    "ce_weight",
    "fake_quantization",
    "freeze_embeddings",
    "teacher_correction",
    "teacher_original_learning_rate",
    "hidden_loss",
    "hidden_layers",
    "embedding_loss",
    "intermediate_weight",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


def describe_data(data: Any) -> dict[str, Any] | None:
    """Name, number of rows and fingerprint of a dataset; None for what is unknown, as of streams."""
    if data is None:
        return None
    if isinstance(data, Mapping):
        parts = {name: describe_data(part) for name, part in data.items()}
        counts = [None if part is None else part["num_rows"] for part in parts.values()]
        return {
            "name": ", ".join(map(str, parts)),
            "num_rows": None if None in counts else sum(count for count in counts if count is not None),
            "fingerprint": digest({name: part and part["fingerprint"] for name, part in parts.items()}),
        }
    info = getattr(data, "info", None)
    return {
        "name": _hub_id_of(info) or getattr(info, "dataset_name", None),
        "num_rows": len(data) if hasattr(data, "__len__") else None,
        "fingerprint": dataset_fingerprint(data),
    }


def _hub_id_of(info: Any) -> str | None:
    """Hub id of the repository that a dataset was read from, as its list of downloaded files tells."""
    sources = getattr(info, "download_checksums", None) or {}
    found = (re.match(r"hf://datasets/([^@]+)@", str(source)) for source in sources)
    return next((match[1] for match in found if match), None)
