"""Hand-made run folders: every file of a finished run, with known numbers and without any model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, FFN, HEADS, KV, HEAD_DIM, VOCAB = 8, 96, 256, 12, 4, 8, 1000
KEPT = {"layers": 6, "hidden": 64, "ffn": 160, "heads": 8, "kv": 4}
DROPPED = [4, 5]
VERSIONS = {"python": "3.11.7", "minitron_hf": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def model_config(**sizes: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": sizes["layers"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["ffn"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv"],
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "dtype": "float16",
    }


TEACHER_SIZES = {"layers": LAYERS, "hidden": HIDDEN, "ffn": FFN, "heads": HEADS, "kv": KV}


def plan() -> dict[str, Any]:
    return {
        "format": 1,
        "versions": VERSIONS,
        "model_type": "llama",
        "teacher": {
            "name_or_path": "story-lab/stories-10M",
            "revision": "0123456789abcdef0123456789abcdef01234567",
            "digest": "sha256:" + "a" * 64,
            "num_parameters": 1_000_000,
            "num_parameters_without_embeddings": 904_000,
            "config": model_config(**TEACHER_SIZES),
        },
        "student": {
            "num_parameters": 420_000,
            "num_parameters_without_embeddings": 356_000,
            "config": model_config(**KEPT),
        },
        "sizes": {axis: {"teacher": TEACHER_SIZES[axis], "student": KEPT[axis]} for axis in TEACHER_SIZES},
        "layers_kept": [layer for layer in range(LAYERS) if layer not in DROPPED],
        "layers_dropped": DROPPED,
        "pruner_config": {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_attention_heads": 8,
            "layers_to_drop": None,
        },
        "selection": "activation",
        "scores": {
            "digest": "sha256:" + "b" * 64,
            "settings": {"batch_reduction": "l2", "sequence_reduction": "mean", "num_tokens": 131072},
            "data_digest": "sha256:" + "c" * 64,
        },
        "notes": ["Query heads of dropped KV groups are dropped with them."],
    }


def scores() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores, and the kept indices that follow from them."""
    rng = np.random.default_rng(0)
    depth = np.linspace(1, 6, LAYERS)[:, None]
    tensors = {
        "hidden": rng.gamma(2.0, 1.0, HIDDEN).astype(np.float32),
        "ffn": (depth * rng.gamma(1.5, 1.0, (LAYERS, FFN))).astype(np.float32),
        "heads": (depth * rng.gamma(3.0, 1.0, (LAYERS, HEADS))).astype(np.float32),
        "kv": (depth * rng.gamma(3.0, 1.0, (LAYERS, KV))).astype(np.float32),
    }
    blocks = np.full((LAYERS, LAYERS), np.nan, dtype=np.float32)
    for first in range(LAYERS):
        for last in range(first, LAYERS):
            edge = 0.25 * (first == 0) + 0.15 * (last == LAYERS - 1)
            blocks[first, last] = 0.03 * (last - first + 1) + edge + 0.01 * rng.random()
    tensors["blocks"] = blocks
    layers = [layer for layer in range(LAYERS) if layer not in DROPPED]
    kept = {"hidden": np.sort(np.argsort(-tensors["hidden"])[: KEPT["hidden"]])}
    for axis in ("ffn", "heads", "kv"):
        kept[axis] = np.stack([np.sort(np.argsort(-tensors[axis][layer])[: KEPT[axis]]) for layer in layers])
    return tensors, {name: value.astype(np.int64) for name, value in kept.items()}


def training_record(steps: int = 400) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    history: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        loss = 0.35 + 3.0 * math.exp(-step / 60) + 0.02 * rng.random()
        rate = 1e-3 * min(1.0, step / 40) * 0.5 * (1 + math.cos(math.pi * step / steps))
        history.append(
            {"loss": round(loss, 4), "learning_rate": rate, "grad_norm": 1.0, "epoch": step / 400, "step": step}
        )
        if step % 100 == 0:
            history.append(
                {"eval_loss": round(loss + 0.04, 4), "eval_kl": round(loss + 0.04, 4), "step": step}
                | {"eval_agreement": round(0.8 - 0.5 * math.exp(-step / 90), 4), "epoch": step / 400}
            )
    history.append({"train_runtime": 61.2, "train_loss": 0.8, "total_flos": 1.0, "epoch": 1.0, "step": steps})
    return {
        "format": 1,
        "versions": VERSIONS,
        "teacher": {"name_or_path": "story-lab/stories-10M", "revision": None},
        "student": {"name_or_path": "pruned"},
        "arguments": {
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 40,
            "max_steps": steps,
            "num_train_epochs": 3.0,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "weight_decay": 0.1,
            "optim": "adamw_torch",
            "max_length": 256,
            "packing": True,
            "temperature": 1.0,
            "kd_weight": 1.0,
            "ce_weight": 0.0,
            "seed": 7,
            "bf16": False,
            "fp16": False,
        },
        "data": {"train": {"num_rows": 6400, "fingerprint": "f00d"}, "eval": {"num_rows": 100, "fingerprint": "beef"}},
        "num_processes": 1,
        "peft": None,
        "global_step": steps,
        "num_input_tokens_seen": 1_638_400,
        "train_runtime": 61.2,
        "log_history": history,
    }


def evaluation() -> dict[str, Any]:
    def model(loss: float, kl: float | None, agreement: float | None, **rest: Any) -> dict[str, Any]:
        return {
            "name_or_path": None,
            "metrics": {
                "loss": {"value": loss, "stderr": 0.0123},
                "perplexity": {"value": math.exp(loss), "stderr": math.exp(loss) * 0.0123},
                "bits_per_byte": {"value": loss / 3.1 / math.log(2), "stderr": 0.0057},
                "kl_divergence": None if kl is None else {"value": kl, "stderr": 0.0031},
                "top1_agreement": None if agreement is None else {"value": agreement, "stderr": 0.0042},
            },
            **rest,
        }

    return {
        "format": 1,
        "versions": VERSIONS,
        "device": {"type": "cpu", "name": "Example CPU @ 2.00GHz", "threads": 1},
        "dtype": "float32",
        "data": {
            "name": "story-lab/stories-valid",
            "digest": "sha256:" + "d" * 64,
            "num_rows": 433,
            "num_tokens": 91_234,
            "num_bytes": 370_000,
            "max_length": 256,
        },
        "settings": {"batch_size": 8},
        "reference": "teacher",
        "models": {
            "teacher": model(
                2.5,
                0.0,
                1.0,
                num_parameters=1_000_000,
                num_parameters_without_embeddings=904_000,
                checkpoint_bytes=2_003_456,
                prefill_tokens_per_second={
                    "median": 10_000.0,
                    "quartiles": [9_950.0, 10_050.0],
                    "rounds": [9_900.0, 10_000.0, 10_100.0],
                },
                decode_tokens_per_second={
                    "median": 200.0,
                    "quartiles": [199.4, 200.6],
                    "rounds": [199.0, 200.0, 201.0],
                },
                kv_cache_bytes_per_token=2048,
            ),
            "student": model(
                2.75,
                0.35,
                0.712,
                num_parameters=420_000,
                num_parameters_without_embeddings=356_000,
                checkpoint_bytes=843_456,
                prefill_tokens_per_second={
                    "median": 19_500.0,
                    "quartiles": [19_250.0, 19_550.0],
                    "rounds": [19_000.0, 19_500.0, 19_600.0],
                },
                decode_tokens_per_second={
                    "median": 310.0,
                    "quartiles": [307.4, 311.0],
                    "rounds": [305.0, 310.0, 312.0],
                },
                kv_cache_bytes_per_token=1536,
            ),
            "pruned": model(
                5.5,
                3.1,
                0.2,
                num_parameters=420_000,
                num_parameters_without_embeddings=356_000,
                checkpoint_bytes=843_456,
            ),
        },
    }


TEACHER = {
    "name_or_path": "story-lab/stories-10M",
    "hub_id": "story-lab/stories-10M",
    "revision": "0123456789abcdef0123456789abcdef01234567",
    "license": "mit",
    "license_name": None,
    "license_link": None,
    "language": ["en"],
    "datasets": ["roneneldan/TinyStories"],
    "tags": ["stories"],
}

SAMPLES = [
    {
        "prompt": "Once upon a time",
        "completions": {
            "teacher": " there was a girl named Lily.\nShe liked ``` and | pipes.",
            "student": " there was a cat.",
        },
    }
]


def search() -> dict[str, Any]:
    """Four shapes: three distilled, two of them twice; the third is beaten in size and in KL."""
    values = [
        # neurons, parameters, pruned, after each round, tokens/s
        (160, 420_000, 5.5, [0.90, 0.61], 310.0),
        (96, 300_000, 6.5, [1.20, 0.80], 400.0),
        (128, 430_000, 5.9, [1.40], 300.0),
        (64, 250_000, 8.0, [], None),
    ]
    return {
        "format": 1,
        "candidates": [
            {
                "name": f"intermediate_size={neurons}",
                "request": {"intermediate_size": neurons},
                "num_parameters": parameters,
                "proxy": {"value": pruned, "stderr": 0.1},
                "rounds": [
                    {"num_tokens": 1000 << turn, "kl": kl, "stderr": 0.02} for turn, kl in enumerate(distilled)
                ],
                "behind": {"value": 0.1 * index, "stderr": 0.01} if index else None,
                "prefill_tokens_per_second": None,
                "decode_tokens_per_second": speed,
                "row_sums": [],
            }
            for index, (neurons, parameters, pruned, distilled, speed) in enumerate(values)
        ],
    }


RECIPE = """\
teacher: story-lab/stories-10M
prune:
  hidden_size: 64
distill:
  max_steps: 400
"""


def save_scores(tensors: dict[str, np.ndarray], path: Path) -> None:
    header = {"format": 1, "settings": plan()["scores"]["settings"], "digests": {}, "versions": VERSIONS}
    save_file(tensors, path, metadata={"minitron_hf": json.dumps(header)})


def write_run(folder: Path) -> Path:
    """Write a complete run folder, except for the weights and the tokenizer (those need torch)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plots").mkdir(exist_ok=True)
    tensors, kept = scores()
    save_scores(tensors, folder / "scores.safetensors")
    save_file(kept, folder / "pruning_plan.safetensors")
    write_json(folder / "config.json", model_config(**KEPT))
    write_json(folder / "pruning_plan.json", plan())
    write_json(folder / "pruner_config.json", plan()["pruner_config"])
    write_json(folder / "teacher.json", TEACHER)
    write_json(folder / "distillation.json", training_record())
    write_json(folder / "evaluation.json", evaluation())
    write_json(folder / "samples.json", SAMPLES)
    write_json(folder / "search.json", search())
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "LICENSE").write_text("MIT License\n", encoding="utf-8")
    return folder
