"""Size and speed of models: bytes of checkpoint, cache and peak memory; prefill and decode in interleaved rounds."""

from __future__ import annotations

import contextlib
import inspect
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..allocations import AllocationCounter
from ..compat import commit_hash
from ..data import TokenRows
from ..errors import HubError, UnsupportedModelError
from ..files import read_json
from ..hardware import synchronize
from ..names import local_folder
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


@dataclass(frozen=True)
class Workload:
    """A batch of prompts to read, and tokens to decode after them.

    Attributes:
        batch_size: number of prompts.
        prompt_tokens: tokens of each.
    """

    batch_size: int
    prompt_tokens: int


@torch.no_grad()
def measure_speed(
    models: Mapping[str, PreTrainedModel],
    rows: TokenRows,
    *,
    prefill_length: int,
    decode_tokens: int,
    rounds: int,
    show_progress: bool,
    grid: Sequence[Workload] = (),
) -> dict[str, dict[str, Any]]:
    """Measure the cache size of every model and, with `rounds` > 0, its speed in interleaved rounds.

    Args:
        models: name → model.
        rows: the prompts are made of their tokens.
        prefill_length: tokens of the prompt.
        decode_tokens: greedy steps after the prompt.
        rounds: number of timed rounds.
        show_progress: show a progress bar.
        grid: further workloads.

    Returns:
        name → `prefill_tokens_per_second` and `decode_tokens_per_second`, see `summarize_speeds`,
        `kv_cache_bytes_per_token`, with rounds `peak_memory_bytes`, and with a grid `speeds`: the same for every
        workload of it, with `batch_size`, `prompt_tokens` and `kv_cache_bytes`. Tokens of all rows of a batch count.
    """
    main = Workload(1, prefill_length)
    timed = {load: {name: _Measured() for name in models} for load in dict.fromkeys((main, *grid))}
    names = list(models)
    # The first round warms up caches, kernels and allocators, and measures bytes.
    for turn in tqdm(range(rounds + 1), desc="Timing", unit="round", disable=not (show_progress and rounds)):
        for load, measured in timed.items():
            prompts = _prompts(rows, load)
            for name in names:
                _run(models[name], prompts, decode_tokens if rounds else 0, measured[name], counts_bytes=turn == 0)
        names = names[1:] + names[:1]
    found = {}
    for name in models:
        first = timed[main][name]
        bytes_per_token = None if first.cache_bytes is None else round(first.cache_bytes / prefill_length)
        found[name] = {**first.speeds, "kv_cache_bytes_per_token": bytes_per_token}
        if rounds:
            found[name]["peak_memory_bytes"] = first.peak_bytes
        if grid:
            found[name]["speeds"] = [{**asdict(load), **timed[load][name].described} for load in dict.fromkeys(grid)]
    return found


class _Measured:
    """Speeds and bytes of one model and workload."""

    def __init__(self) -> None:
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.cache_bytes: int | None = None
        self.peak_bytes: int | None = None

    @property
    def speeds(self) -> dict[str, Any]:
        return {
            "prefill_tokens_per_second": summarize_speeds(self.prefill),
            "decode_tokens_per_second": summarize_speeds(self.decode),
        }

    @property
    def described(self) -> dict[str, Any]:
        return {**self.speeds, "kv_cache_bytes": self.cache_bytes, "peak_memory_bytes": self.peak_bytes}


def _prompts(rows: TokenRows, load: Workload) -> torch.Tensor:
    """Token ids of the prompts, one after the other from the rows, which are repeated; int64 [B, T]."""
    wanted = load.batch_size * load.prompt_tokens
    stream = [token for row in rows.rows[:wanted] for token in row]
    return torch.tensor((stream * (wanted // len(stream) + 1))[:wanted]).view(load.batch_size, -1)


def _run(
    model: PreTrainedModel, prompts_BT: torch.Tensor, decode_tokens: int, measured: _Measured, *, counts_bytes: bool
) -> None:
    """Read prompts and decode after them, for the bytes or for the time."""
    input_ids = prompts_BT.to(model.device)
    with _peak_memory(model, measured) if counts_bytes else contextlib.nullcontext():
        seconds, output = _timed_prefill(model, input_ids)
        if counts_bytes:
            measured.cache_bytes = _cache_bytes(output)
        decoding = _timed_decode(model, output, decode_tokens) if decode_tokens else 0.0
    if not counts_bytes:
        measured.prefill.append(prompts_BT.numel() / seconds)
        measured.decode.append(len(prompts_BT) * decode_tokens / decoding)


@contextlib.contextmanager
def _peak_memory(model: PreTrainedModel, measured: _Measured) -> Iterator[None]:
    """Measure the peak of the weights and of everything that is allocated meanwhile.

    On CUDA it is what PyTorch's allocator gave; elsewhere the bytes of all living tensors, without the workspace
    inside an operation. It stays unknown for quantised weights outside of CUDA.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(stored_bytes(tensor) for tensor in tensors)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        yield
        measured.peak_bytes = weights + torch.cuda.max_memory_allocated(model.device) - before
    elif getattr(model, "is_quantized", False):
        yield
    else:
        with AllocationCounter(tensors) as counted:
            yield
        measured.peak_bytes = weights + max(counted.moments, default=0)


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


def _cache_bytes(output: Any) -> int | None:
    """Bytes of keys and values in a model's cache; None where a model has no such cache."""
    cache = output.get("past_key_values")
    tensors = [
        tensor
        for layer in getattr(cache, "layers", ())
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) if tensors else None


def _forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(type(base).forward).parameters


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
