"""Size and speed of models: checkpoint bytes, KV-cache bytes, prefill and decode speed in interleaved rounds."""

from __future__ import annotations

import contextlib
import inspect
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..compat import commit_hash
from ..data import TokenRows
from ..errors import HubError, UnsupportedModelError
from ..files import local_folder, read_json
from ..weights import stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Names under which stock models return and take their cache of keys and values, or of recurrent states. Since
#: Transformers 5.24 all take it as `cache`; the returned names have not changed.
CACHES = ("cache", "past_key_values", "cache_params")


def checkpoint_bytes(
    model_or_path: PreTrainedModel | str | os.PathLike[str], *, loaded: PreTrainedModel | None = None
) -> int:
    """Bytes of a model's weights: of its files when it is a path or a cached Hub id, else of its unique parameters.

    Args:
        model_or_path: the model, or the path or Hub id of one.
        loaded: the model that was loaded from it, for a Hub id whose files are not in the cache.
    """
    if isinstance(model_or_path, str | os.PathLike):
        local = local_folder(model_or_path)
        folder = _cached_folder(str(model_or_path), loaded) if local is None else local
        if files := weight_files(folder) if folder is not None else []:
            return sum(file.stat().st_size for file in files)
        if loaded is None or local is not None:
            raise HubError(f"{str(model_or_path)!r} holds no weights. Expected the folder or Hub id of a saved model.")
        model_or_path = loaded
    return sum(stored_bytes(parameter) for parameter in model_or_path.parameters())


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The weight files that `from_pretrained` reads from a folder: one file, or the shards named in its index."""
    folder = Path(folder)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        if (index := folder / f"{stem}.index.json").is_file():
            return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return []


def _cached_folder(repo_id: str, loaded: PreTrainedModel | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    revision = commit_hash(loaded.config) if loaded is not None else None
    found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


@torch.no_grad()
def measure_speed(
    models: Mapping[str, PreTrainedModel],
    rows: TokenRows,
    *,
    prefill_length: int,
    decode_tokens: int,
    rounds: int,
    show_progress: bool,
) -> dict[str, dict[str, Any]]:
    """Measure the cache size of every model and, with `rounds` > 0, its speed in interleaved rounds.

    Args:
        models: name → model.
        rows: the prompt is made of their tokens.
        prefill_length: tokens of the prompt.
        decode_tokens: greedy steps after the prompt.
        rounds: number of timed rounds.
        show_progress: show a progress bar.

    Returns:
        name → `prefill_tokens_per_second` and `decode_tokens_per_second`, see `summarize_speeds`, and
        `kv_cache_bytes_per_token`.
    """
    stream = [token for row in rows.rows[:prefill_length] for token in row]
    prompt = torch.tensor([(stream * (prefill_length // len(stream) + 1))[:prefill_length]])
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    cache_bytes: dict[str, int | None] = {}

    names = list(models)
    # The first round warms up caches, kernels and allocators, and measures the cache's size.
    for turn in tqdm(range(rounds + 1), desc="Timing", unit="round", disable=not (show_progress and rounds)):
        for name in names:
            model = models[name]
            input_ids = prompt.to(model.device)
            seconds, output = _timed_prefill(model, input_ids)
            if turn == 0:
                cache_bytes[name] = _cache_bytes_per_token(output, prefill_length)
            if turn > 0:
                prefill[name].append(prefill_length / seconds)
            if rounds:
                seconds = _timed_decode(model, output, decode_tokens)
            if turn > 0:
                decode[name].append(decode_tokens / seconds)
            del output
        names = names[1:] + names[:1]

    return {
        name: {
            "prefill_tokens_per_second": summarize_speeds(prefill[name]),
            "decode_tokens_per_second": summarize_speeds(decode[name]),
            "kv_cache_bytes_per_token": cache_bytes[name],
        }
        for name in models
    }


def summarize_speeds(speeds: Sequence[float]) -> dict[str, Any] | None:
    """Median, first and third quartile, and the speeds of all rounds; None without rounds.

    >>> summarize_speeds([4.0, 1.0, 2.0, 3.0, 5.0])
    {'median': 3.0, 'quartiles': [2.0, 4.0], 'rounds': [4.0, 1.0, 2.0, 3.0, 5.0]}
    """
    if not speeds:
        return None
    quartiles = statistics.quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else [speeds[0]] * 3
    return {"median": statistics.median(speeds), "quartiles": quartiles[::2], "rounds": list(speeds)}


def _timed_prefill(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[float, Any]:
    """Seconds to compute the logits of the prompt's last token, and the model's output."""
    # Generation computes no other logits; a model whose forward cannot leave them out computes all.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in _forward_parameters(model) else {}
    synchronize(model.device)
    start = time.perf_counter()
    output = model(input_ids=input_ids, use_cache=True, **last_only)
    synchronize(model.device)
    return time.perf_counter() - start, output


def _timed_decode(model: PreTrainedModel, output: Any, num_tokens: int) -> float:
    """Seconds of `num_tokens` greedy steps that continue `output` with its cache."""
    returned = next((name for name in CACHES if output.get(name) is not None), None)
    taken = next((name for name in CACHES if name in _forward_parameters(model)), returned)
    if returned is None or taken is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no cache ({' or '.join(CACHES[1:])}), so decoding cannot be timed. "
            "Pass speed=False."
        )
    synchronize(model.device)
    start = time.perf_counter()
    for _ in range(num_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, **{taken: output[returned]})
    synchronize(model.device)
    return time.perf_counter() - start


def _cache_bytes_per_token(output: Any, num_tokens: int) -> int | None:
    """Bytes of keys and values in a model's cache per token; None where a model has no such cache."""
    cache = output.get("past_key_values")
    tensors = [
        tensor
        for layer in getattr(cache, "layers", ())
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    ]
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / num_tokens) if tensors else None


def _forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(type(base).forward).parameters


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_description(device: str | torch.device) -> dict[str, Any]:
    """Type and name of a device, and the number of threads that PyTorch uses on the CPU."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
