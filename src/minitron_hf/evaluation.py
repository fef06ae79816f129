"""Measuring models side by side: quality on text, agreement with a reference, size, speed and memory.

Shapes: B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .artifacts import public_name, require_writable, versions, write_json
from .data import DataSource, TokenRows, padded_batches, token_rows, tokenize
from .errors import DataError, HubError, MismatchError, MissingDependencyError, OutputError, UnsupportedModelError
from .models import (
    compute_dtype,
    count_parameters,
    load_config,
    load_model,
    load_tokenizer,
    model_digest,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: File name of what `evaluate_models` writes.
EVALUATION_NAME = "evaluation.json"

#: Longest row when the models allow any length, in tokens.
DEFAULT_MAX_LENGTH = 2048

#: The `evaluate` metrics of this package; `load_metric` loads them.
METRICS = ("causal_lm_loss", "kl_divergence", "token_agreement")

#: Logits converted to float32 at a time (64 MiB).
CHUNK_ELEMENTS = 1 << 24


# Per-token values and their mean


def token_log_probabilities(logits_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token under the logits that predict it.

    Args:
        logits_TV: [T, V], any floating dtype; computed in float32 (float64 stays), a chunk of tokens at a time.
        tokens_T: int [T]; `tokens_T[t]` is predicted by `logits_TV[t]`.

    Returns:
        Log-probabilities in nats, float64 [T], on the CPU.
    """
    found = [
        _log_softmax(logits).gather(-1, tokens.to(logits.device).unsqueeze(-1)).squeeze(-1).double().cpu()
        for logits, tokens in zip(*_chunks(logits_TV, tokens_T))
    ]
    return torch.cat(found)


def token_divergences(logits_TV: torch.Tensor, reference_logits_TV: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ model) of each token's prediction, Σ_v p_ref (ln p_ref − ln p): P1 §3, at temperature 1.

    Args:
        logits_TV: [T, V], any floating dtype; computed in float32 (float64 stays), a chunk of tokens at a time.
        reference_logits_TV: [T, V].

    Returns:
        Divergences in nats, float64 [T], on the CPU.

    Raises:
        MismatchError: if the vocabularies differ.
    """
    if logits_TV.shape[-1] != reference_logits_TV.shape[-1]:
        raise MismatchError(
            f"The model predicts {logits_TV.shape[-1]} tokens and the reference {reference_logits_TV.shape[-1]}. "
            "A divergence needs one vocabulary."
        )
    found = []
    for logits, reference in zip(*_chunks(logits_TV, reference_logits_TV)):
        log_q, log_p = _log_softmax(logits), _log_softmax(reference.to(logits.device))
        p = log_p.exp()
        # An outcome of probability 0 adds nothing, also where both logarithms are −∞.
        terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
        found.append(terms.sum(-1, dtype=torch.float64).cpu())
    return torch.cat(found)


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean per token over documents of different lengths, and its standard error over documents.

    The mean is the ratio r = Σsᵢ/Σnᵢ of two sums over documents, so its standard error is that of a ratio estimator
    (delta method): √(n/(n−1) · Σ(sᵢ − r·nᵢ)²) / Σnᵢ, with the tokens of one document as dependent as they are. It is
    the usual √(s²/n) when all documents have one length.

    Returns:
        (mean, standard error); the error of a single document is None.

    >>> mean_and_error([2.0, 6.0], [2, 2])
    (2.0, 1.0)
    """
    total = sum(counts)
    value = math.fsum(sums) / total
    if len(counts) < 2:
        return value, None
    squares = math.fsum((s - value * n) ** 2 for s, n in zip(sums, counts))
    return value, math.sqrt(squares * len(counts) / (len(counts) - 1)) / total


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _chunks(logits: torch.Tensor, other: torch.Tensor) -> tuple[Iterable[torch.Tensor], Iterable[torch.Tensor]]:
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    return logits.split(size), other.split(size)


def load_metric(name: str, **kwargs: Any) -> Any:
    """Load one of this package's metrics with the `evaluate` library, from its script on disk, without a network.

    `causal_lm_loss` (predictions: logits [T, V] per document, references: the tokens [T] they predict) gives loss,
    perplexity and, with `compute(num_bytes=…)`, bits per byte. `kl_divergence` (predictions and references: logits
    [T, V] per document) gives KL(references ‖ predictions). `token_agreement` (predictions and references: token ids
    [T] per document) gives the share of equal tokens. All of them stream through `add_batch`, and report the standard
    error over documents beside the value.

    Args:
        name: one of `METRICS`.
        **kwargs: passed on to `evaluate.load`. Values are kept in memory unless `keep_in_memory=False` is given, as
            distributed evaluation needs it: `evaluate`'s cache files are locked, one instance at a time.

    Raises:
        DataError: if there is no such metric.
        OutputError: if `evaluate` cannot write its cache of module scripts.
    """
    if name not in METRICS:
        raise DataError(f"There is no metric {name!r}. Expected one of {', '.join(METRICS)}.")
    import evaluate

    script = Path(__file__).parent / "metrics" / name / f"{name}.py"
    try:
        return evaluate.load(str(script), **{"keep_in_memory": True, **kwargs})
    except PermissionError as error:
        raise OutputError(
            f"The evaluate library cannot write its cache ({error.filename}). Set HF_HOME to a writable folder."
        ) from error


# The comparison


def evaluate_models(
    models: Mapping[str, PreTrainedModel | str | os.PathLike[str]],
    dataset: DataSource,
    *,
    processing_class: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    reference: str | None = None,
    max_length: int | None = None,
    num_rows: int | None = None,
    batch_size: int = 8,
    text_field: str = "text",
    dataset_name: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    speed: bool = True,
    prefill_length: int | None = None,
    decode_tokens: int | None = None,
    rounds: int = 5,
    checkpoints: Mapping[str, str | os.PathLike[str]] | None = None,
    output_path: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Measure models side by side on the same tokens and, interleaved, at the same speed test.

    Every document is its own row, longer ones continue on further rows that repeat one token, so that every token
    after a document's first (the separator that `data.tokenize` puts there) is predicted exactly once. In one pass
    the reference and all other models read each batch; neither padding nor the batch size changes a result.

    Quality, each with its standard error over rows (see `mean_and_error`):

    - `loss`: nats per predicted token. `perplexity` = exp(loss), its error perplexity · stderr(loss) (delta method).
    - `bits_per_byte` = loss · tokens / (bytes · ln 2): comparable across tokenizers. Its error takes the number of
      tokens per byte as given. None when the data is token ids.
    - `kl_divergence`: KL(reference ‖ model), nats per token. `top1_agreement`: share of tokens where the model's most
      probable token is the reference's. None for the reference itself.

    Size and speed: parameters; bytes of the checkpoint; `prefill_tokens_per_second` of one prompt of `prefill_length`
    tokens up to the logits of its last token; `decode_tokens_per_second` of the `decode_tokens` greedy steps after it,
    with the cache; `kv_cache_bytes_per_token`, the bytes of the cache that the prompt left, per token of the prompt.
    In every round all models are timed, in a rotating order, after one round that is not counted.

    Args:
        models: name → model, or the path or Hub id of one. Model objects are measured in the dtype and on the device
            they have, and left unchanged.
        dataset: as in `token_rows`.
        processing_class: tokenizer, or the path or Hub id of one; needed for text.
        reference: name of the model that the others are compared with; by default `"teacher"` if there is one, else
            the first. A single model has no reference.
        max_length: longest row, in tokens; by default the shortest context of the models, at most 2,048.
        num_rows: read documents until there are this many rows (None: all).
        batch_size: rows per forward pass; one batch of logits [B, T, V] of two models must fit into memory.
        text_field: column that holds the text.
        dataset_name: name to record, such as the Hub id.
        dtype: dtype of models that are loaded here; by default bfloat16 where the hardware has it, else float32.
        device: device of models that are loaded here; by default that of the model objects, else CUDA if there is one.
        speed: whether to time.
        prefill_length: tokens of the timed prompt; by default up to 512, as the models' contexts allow.
        decode_tokens: tokens of the timed generation; by default up to 64.
        rounds: timed rounds; their median is reported.
        checkpoints: name → path or Hub id that a model object was loaded from: what is recorded as its name, and whose
            files are its checkpoint's size. Without it that is the size of the object's parameters.
        output_path: folder for `evaluation.json`, or the file itself.
        show_progress: show progress bars.

    Returns:
        What is written to `evaluation.json`: the keys `format`, `versions`, `device`, `dtype` (`"mixed"` if models
        have several), `data` (`num_tokens` counts predicted tokens), `settings`, `reference`, `models`.

    Raises:
        MismatchError: if vocabularies differ, the models do not know all tokens, or a context is too short.
        DataError: if there is nothing to read (see `token_rows`), or a setting makes no sense.
        UnsupportedModelError: if a model cannot be loaded, or its logits are not finite.
        OutputError: if `output_path` cannot be written.
    """
    reference = _checked_reference(models, reference)
    for setting, value in (("batch_size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise DataError(f"{setting}={value}, expected at least 1.")
    sources = {**models, **(checkpoints or {})}
    if unknown := sorted(set(sources) - set(models)):
        raise DataError(f"checkpoints names {', '.join(unknown)}, expected some of the models {', '.join(models)}.")
    output = None if output_path is None else Path(output_path)
    if output is not None:
        output = output if output.suffix == ".json" else output / EVALUATION_NAME
        require_writable(output.parent)

    # Refusals that need configs alone come before any weights are read.
    configs = {name: _config(model) for name, model in models.items()}
    _check_vocabularies({name: _vocabulary_size(models[name], config) for name, config in configs.items()}, reference)
    context = _shortest_context(configs)
    if max_length is None:
        max_length = min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    elif context is not None and max_length > context:
        raise MismatchError(
            f"max_length={max_length} exceeds the context of {_of_shortest_context(configs)}. Lower max_length."
        )
    if speed:
        prefill_length, decode_tokens = _speed_lengths(prefill_length, decode_tokens, context, configs)

    if processing_class is not None:
        processing_class = load_tokenizer(processing_class)
    rows = token_rows(
        dataset,
        processing_class,
        max_length=max_length,
        num_rows=num_rows,
        packing=False,
        overlap=1,
        text_field=text_field,
    )
    _check_tokens(rows, {name: _vocabulary_size(models[name], config) for name, config in configs.items()})

    device = _common_device(models, device)
    loaded = {
        name: load_model(model, dtype=compute_dtype(device) if dtype is None else dtype, device=device)
        if isinstance(model, str | os.PathLike)
        else model
        for name, model in models.items()
    }
    with _evaluating(loaded.values()):
        quality = _quality(loaded, rows, reference, batch_size, show_progress)
        cost = _cost(
            loaded,
            rows,
            prefill_length=prefill_length or min(16, max_length),
            decode_tokens=decode_tokens or 0,
            rounds=rounds if speed else 0,
            show_progress=show_progress,
        )

    dtypes = {name: str(model.dtype).removeprefix("torch.") for name, model in loaded.items()}
    result = {
        "format": 1,
        "versions": versions(),
        "device": device_description(device),
        "dtype": next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else "mixed",
        "data": {
            "name": public_name(dataset_name),
            "digest": rows.digest,
            "num_rows": len(rows),
            "num_tokens": _num_predicted(rows),
            "num_bytes": rows.num_bytes,
            "max_length": max_length,
        },
        "settings": {
            "batch_size": batch_size,
            "num_rows": num_rows,
            "packing": False,
            "overlap": 1,
            "dtypes": dtypes,
            "speed": speed,
            "prefill_length": prefill_length if speed else None,
            "decode_tokens": decode_tokens if speed else None,
            "rounds": rounds if speed else None,
        },
        "reference": reference,
        "models": {
            name: {
                "name_or_path": _recorded_name(sources[name]),
                "digest": _digest_or_none(model),
                "metrics": quality[name],
                "num_parameters": count_parameters(model),
                "num_parameters_without_embeddings": count_parameters(model, embeddings=False),
                "checkpoint_bytes": checkpoint_bytes(sources[name], loaded=model),
                **cost[name],
            }
            for name, model in loaded.items()
        },
    }
    if output is not None:
        write_json(output, result)
    return result


def _quality(
    models: Mapping[str, PreTrainedModel], rows: TokenRows, reference: str | None, batch_size: int, show_progress: bool
) -> dict[str, dict[str, Any]]:
    """The metrics of every model, in one pass over the rows, longest rows first (they pad each other least)."""
    names = sorted(models, key=lambda name: name != reference)
    compared = [name for name in names if reference is not None and name != reference]
    losses = {name: load_metric("causal_lm_loss") for name in names}
    divergences = {name: load_metric("kl_divergence") for name in compared}
    agreements = {name: load_metric("token_agreement") for name in compared}

    ordered = TokenRows(tuple(sorted(rows.rows, key=len, reverse=True)), rows.num_bytes, rows.overlap)
    with tqdm(total=_num_predicted(rows), desc="Evaluating", unit="token", disable=not show_progress) as bar:
        for index, batch in enumerate(padded_batches(ordered, batch_size)):
            chunk = ordered.rows[index * batch_size : (index + 1) * batch_size]
            targets = [torch.tensor(row[1:]) for row in chunk]
            reference_rows: list[torch.Tensor] = []
            reference_tokens: list[list[int]] = []
            for name in names:
                logits_BTV = _logits(models[name], batch)
                # Padding is on the right: the first len(row) − 1 positions predict the tokens after the first.
                predictions = [logits_BTV[i, : len(row) - 1] for i, row in enumerate(chunk)]
                losses[name].add_batch(predictions=predictions, references=targets)
                if len(names) == 1:
                    continue
                tokens = [logits_TV.argmax(-1).tolist() for logits_TV in predictions]
                if name == reference:
                    reference_rows, reference_tokens = predictions, tokens
                else:
                    divergences[name].add_batch(predictions=predictions, references=reference_rows)
                    agreements[name].add_batch(predictions=tokens, references=reference_tokens)
            bar.update(sum(len(row) - 1 for row in chunk))

    def entry(result: Mapping[str, Any], key: str) -> dict[str, Any] | None:
        return None if result[key] is None else {"value": result[key], "stderr": result[f"{key}_stderr"]}

    found = {}
    for name in models:
        loss = losses[name].compute(num_bytes=rows.num_bytes)
        if not math.isfinite(loss["loss"]):
            raise UnsupportedModelError(
                f"The model {name!r} gives a loss of {loss['loss']}: its logits are not finite in "
                f"{models[name].dtype}. Load it in a wider dtype (dtype='float32'), or check its weights."
            )
        found[name] = {key: entry(loss, key) for key in ("loss", "perplexity", "bits_per_byte")}
        found[name]["kl_divergence"] = found[name]["top1_agreement"] = None
        if name in divergences:
            found[name]["kl_divergence"] = entry(divergences[name].compute(), "kl_divergence")
            found[name]["top1_agreement"] = entry(agreements[name].compute(), "token_agreement")
    return found


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    # Causal attention never looks right, where the padding is, so neither a mask nor positions are needed. A mask
    # could harm: with a sliding window, padding far enough right sees nothing at all, and becomes NaN in some dtypes.
    return model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits


# Size, speed and memory


def checkpoint_bytes(
    model_or_path: PreTrainedModel | str | os.PathLike[str], *, loaded: PreTrainedModel | None = None
) -> int:
    """Bytes of a model's weights: of its files when it is a path or a cached Hub id, else of its unique parameters.

    Args:
        model_or_path: what to measure.
        loaded: the model that was loaded from it, for a Hub id whose files are not in the cache.
    """
    if isinstance(model_or_path, str | os.PathLike):
        local = Path(os.path.expanduser(model_or_path))
        folder = local if local.is_dir() else _cached_folder(str(model_or_path), loaded)
        if files := weight_files(folder) if folder is not None else []:
            return sum(file.stat().st_size for file in files)
        if loaded is None or folder == local:
            raise HubError(f"{str(model_or_path)!r} holds no weights. Expected the folder or Hub id of a saved model.")
        model_or_path = loaded
    return sum(parameter.numel() * parameter.element_size() for parameter in model_or_path.parameters())


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The weight files that `from_pretrained` reads from a folder: one file, or the shards named in its index."""
    from .artifacts import read_json

    folder = Path(folder)
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        if (index := folder / f"{stem}.index.json").is_file():
            return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return []


def _cached_folder(repo_id: str, loaded: PreTrainedModel | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    revision = getattr(loaded.config, "_commit_hash", None) if loaded is not None else None
    found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


@torch.no_grad()
def _cost(
    models: Mapping[str, PreTrainedModel],
    rows: TokenRows,
    *,
    prefill_length: int,
    decode_tokens: int,
    rounds: int,
    show_progress: bool,
) -> dict[str, dict[str, Any]]:
    """Cache size of every model and, with `rounds` > 0, its speed in interleaved rounds."""
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

    def summary(speeds: list[float]) -> dict[str, Any] | None:
        return {"median": statistics.median(speeds), "rounds": speeds} if speeds else None

    return {
        name: {
            "prefill_tokens_per_second": summary(prefill[name]),
            "decode_tokens_per_second": summary(decode[name]),
            "kv_cache_bytes_per_token": cache_bytes[name],
        }
        for name in models
    }


def _timed_prefill(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[float, Any]:
    """Seconds until the logits of the prompt's last token are there, and the model's output."""
    # Generation computes no other logits; a model whose forward cannot leave them out computes all.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in _forward_parameters(model) else {}
    _synchronize(model.device)
    start = time.perf_counter()
    output = model(input_ids=input_ids, use_cache=True, **last_only)
    _synchronize(model.device)
    return time.perf_counter() - start, output


def _timed_decode(model: PreTrainedModel, output: Any, num_tokens: int) -> float:
    """Seconds of `num_tokens` greedy steps that continue `output` with its cache."""
    if output.get("past_key_values") is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} returns no key-value cache, so decoding cannot be timed. Pass speed=False."
        )
    _synchronize(model.device)
    start = time.perf_counter()
    for _ in range(num_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    _synchronize(model.device)
    return time.perf_counter() - start


def _cache_bytes_per_token(output: Any, num_tokens: int) -> int | None:
    """Bytes of keys and values in a model's cache per token; None where a model has no such cache."""
    cache = output.get("past_key_values")
    if cache is None:
        return None
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    ]
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / num_tokens)


def _forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_description(device: str | torch.device) -> dict[str, Any]:
    """Type and name of a device, and the number of threads that PyTorch uses on the CPU."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def _processor_name() -> str:
    import platform

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Benchmarks and samples


def evaluate_tasks(
    model: PreTrainedModel | str | os.PathLike[str],
    tasks: str | Sequence[str],
    *,
    processing_class: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    add_bos_token: bool | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Score a model on tasks of lm-evaluation-harness (the extra `eval`).

    Args:
        model: a model, or the path or Hub id of one.
        tasks: names of tasks or groups, or paths of task files.
        processing_class: tokenizer, or the path or Hub id of one; by default that of `model` when it is a path.
        limit: documents per task (or their share, below 1), for a quick look.
        num_fewshot: worked examples in the prompt; None: as the task says.
        batch_size: requests per forward pass.
        include_path: folders with further task files.
        add_bos_token: whether prompts start with the beginning-of-text token; None: as the tokenizer does.
        dtype: dtype of a model that is loaded here; by default bfloat16 where the hardware has it, else float32.
        device: device of a model that is loaded here.
        **kwargs: passed on to `lm_eval.simple_evaluate` (`random_seed`, `apply_chat_template`, …).

    Returns:
        `{task: {metric: {"value": …, "stderr": …}}}`. A metric behind a filter other than `none` is named
        `"metric,filter"`, as in the harness; `stderr` is None where it has none.

    Raises:
        MissingDependencyError: without lm-evaluation-harness.
        DataError: if a task is unknown, or there is no tokenizer.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            f"Benchmarks need lm-evaluation-harness ({error}). Run: pip install minitron-hf[eval]"
        ) from error

    names = [tasks] if isinstance(tasks, str) else list(tasks)
    folders = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
    for folder in folders:
        if not os.path.isdir(folder):
            raise DataError(f"include_path: the folder {str(folder)!r} does not exist.")
    paths = [str(folder) for folder in folders]
    # The harness needs ten seconds to index its own 15,000 tasks: not where the given folders hold all that is asked.
    manager = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths or None)
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known and not os.path.exists(name)]:
        raise DataError(
            f"lm-evaluation-harness has no task {', '.join(map(repr, unknown))}. "
            "`lm-eval ls tasks` lists its tasks; name folders of your own with include_path."
        )
    if processing_class is None:
        if not isinstance(model, str | os.PathLike):
            raise DataError("A model object needs its tokenizer. Pass processing_class=tokenizer.")
        processing_class = model
    tokenizer = load_tokenizer(processing_class)
    if isinstance(model, str | os.PathLike):
        device = _common_device({}, device)
        model = load_model(model, dtype=compute_dtype(device) if dtype is None else dtype, device=device)

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=add_bos_token)
    with _evaluating([model]):
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            **{"log_samples": False, "bootstrap_iters": 1000, **kwargs},
        )
    return {task: _task_metrics(values) for task, values in results["results"].items()}


def _task_metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`{"acc,none": x, "acc_stderr,none": y, …}` → `{"acc": {"value": x, "stderr": y}}`."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        found[metric if filtered == "none" else key] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return found


def generate_samples(
    models: Mapping[str, PreTrainedModel | str | os.PathLike[str]],
    processing_class: PreTrainedTokenizerBase | str | os.PathLike[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 60,
    do_sample: bool = False,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> list[dict[str, Any]]:
    """Let every model continue every prompt: the content of `samples.json`.

    Args:
        models: name → model, or the path or Hub id of one.
        processing_class: tokenizer of them all.
        prompts: texts to continue; each begins as documents do in training (see `data.tokenize`).
        max_new_tokens: longest continuation, in tokens.
        do_sample: sample from the models (temperature 1) instead of taking the most probable token.
        seed: of the sampling; every model starts every prompt from it. The caller's random state is left alone.
        dtype: dtype of models that are loaded here; by default bfloat16 where the hardware has it, else float32.
        device: device of models that are loaded here.

    Returns:
        `[{"prompt": …, "completions": {name: text}}]`, completions without the prompt.
    """
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(processing_class)
    device = _common_device(models, device)
    samples: list[dict[str, Any]] = [{"prompt": prompt, "completions": {}} for prompt in prompts]
    for name, model_or_path in models.items():
        model = load_model(model_or_path, dtype=compute_dtype(device) if dtype is None else dtype, device=device)
        end = model.generation_config.eos_token_id if model.generation_config is not None else None
        end = tokenizer.eos_token_id if end is None else end
        pad = tokenizer.pad_token_id
        if pad is None:
            pad = end[0] if isinstance(end, list) else end
        # Not the model's own generation_config.json: its temperature or penalties would differ between the models.
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=do_sample, eos_token_id=end, pad_token_id=pad, use_cache=True
        )
        with _evaluating([model]), torch.random.fork_rng(), torch.no_grad():
            for sample, ids in zip(samples, tokenize(prompts, tokenizer)):
                torch.manual_seed(seed)
                input_ids = torch.tensor([ids], device=model.device)
                output: Any = model.generate(  # type: ignore[operator]
                    input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=settings
                )
                sample["completions"][name] = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return samples


# Checks and descriptions


def _checked_reference(models: Mapping[str, Any], reference: str | None) -> str | None:
    if not models:
        raise DataError("There are no models to evaluate. Pass {'teacher': …, 'student': …}.")
    if reference is not None and reference not in models:
        raise DataError(f"The reference {reference!r} is not among the models {', '.join(models)}.")
    if len(models) == 1:
        return None
    if reference is not None:
        return reference
    return "teacher" if "teacher" in models else next(iter(models))


def _config(model: PreTrainedModel | str | os.PathLike[str]) -> PretrainedConfig:
    return load_config(model) if isinstance(model, str | os.PathLike) else model.config


def _vocabulary_size(model: Any, config: PretrainedConfig) -> int:
    """Number of logits per token."""
    if not isinstance(model, str | os.PathLike):
        head = model.get_output_embeddings()
        # Quantised heads pack their weights, but keep the number of outputs.
        if (size := getattr(head, "out_features", None)) is not None:
            return int(size)
    return int(config.get_text_config().vocab_size)


def _check_vocabularies(sizes: Mapping[str, int], reference: str | None) -> None:
    if reference is None:
        return
    for name, size in sizes.items():
        if size != sizes[reference]:
            raise MismatchError(
                f"The model {name!r} has a vocabulary of {size} tokens and the reference {reference!r} one of "
                f"{sizes[reference]}. Models are compared on the same tokens: evaluate them one at a time and compare "
                "their bits per byte."
            )


def _check_tokens(rows: TokenRows, sizes: Mapping[str, int]) -> None:
    largest = max(map(max, rows.rows))
    for name, size in sizes.items():
        if largest >= size:
            raise MismatchError(
                f"The data holds the token {largest}, but the model {name!r} knows tokens below {size} only. "
                "Pass the tokenizer that belongs to the models."
            )


def _contexts(configs: Mapping[str, PretrainedConfig]) -> dict[str, int]:
    found = {
        name: getattr(config.get_text_config(), "max_position_embeddings", None) for name, config in configs.items()
    }
    return {name: context for name, context in found.items() if context}


def _shortest_context(configs: Mapping[str, PretrainedConfig]) -> int | None:
    return min(_contexts(configs).values(), default=None)


def _of_shortest_context(configs: Mapping[str, PretrainedConfig]) -> str:
    contexts = _contexts(configs)
    name = min(contexts, key=contexts.__getitem__)
    return f"the model {name!r}, {contexts[name]} tokens"


def _speed_lengths(
    prefill_length: int | None, decode_tokens: int | None, context: int | None, configs: Mapping[str, PretrainedConfig]
) -> tuple[int, int]:
    """Lengths of the timed prompt and generation that fit into the shortest context together."""
    room = context or DEFAULT_MAX_LENGTH
    if decode_tokens is None:
        decode_tokens = max(1, min(64, room // 4 if prefill_length is None else room - prefill_length))
    if prefill_length is None:
        prefill_length = max(1, min(512, room - decode_tokens))
    if prefill_length < 1 or decode_tokens < 1:
        raise DataError(
            f"prefill_length={prefill_length} and decode_tokens={decode_tokens}: expected at least 1 of each. "
            "Pass speed=False to skip the timing."
        )
    if context is not None and prefill_length + decode_tokens > context:
        raise MismatchError(
            f"prefill_length={prefill_length} and decode_tokens={decode_tokens} exceed the context of "
            f"{_of_shortest_context(configs)}. Lower them."
        )
    return prefill_length, decode_tokens


def _common_device(models: Mapping[str, Any], device: str | torch.device | None) -> torch.device:
    """The device of the model objects; for paths alone the one asked for, else CUDA if there is one."""
    found = {name: model.device for name, model in models.items() if not isinstance(model, str | os.PathLike)}
    if device is not None:
        wanted = torch.device(device)
        found["device="] = torch.device("cuda", torch.cuda.current_device()) if str(wanted) == "cuda" else wanted
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {where}" for name, where in found.items())
        raise MismatchError(f"The models are on different devices ({listed}). Move them to one device.")
    if found:
        return next(iter(found.values()))
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def _evaluating(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Put models into evaluation mode, and afterwards every module back into the mode it had."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _num_predicted(rows: TokenRows) -> int:
    return sum(len(row) - 1 for row in rows.rows)


def _recorded_name(model: PreTrainedModel | str | os.PathLike[str]) -> str | None:
    return public_name(model if isinstance(model, str | os.PathLike) else model.config._name_or_path)


def _digest_or_none(model: PreTrainedModel) -> str | None:
    """Digest of the weights; None for a model whose weights are offloaded, which can be run but not read."""
    with contextlib.suppress(UnsupportedModelError):
        return model_digest(model)
    return None
