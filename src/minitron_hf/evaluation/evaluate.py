"""Measures models side by side on the same tokens: quality, size, speed and memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import DataSource, TokenRows, token_rows
from ..data.context import context_length
from ..data.vocabulary import refuse_other_tokenizers
from ..errors import DataError, MismatchError, UnsupportedModelError
from ..files import public_name, require_creatable, versions
from ..formats import FORMATS, write_artefact
from ..models import count_parameters, evaluating, load_config, load_tokenizer
from ..scoring.row_starts import warn_of_broken_starts
from ..weights import model_digest
from .loading import common_device, in_float32, load_for_inference
from .quality import measure_quality
from .speed import checkpoint_bytes, device_description, measure_cost

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: File name of what `evaluate_models` writes.
EVALUATION_NAME = "evaluation.json"

#: Longest row when the models allow any length, in tokens.
DEFAULT_MAX_LENGTH = 2048


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
    descriptions: Mapping[str, str] | None = None,
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

    Quality, each with its standard error over rows (see `quality.mean_and_error`):

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
        processing_class: tokenizer or processor, or the path or Hub id of one; needed for text.
        reference: name of the model that the others are compared with; by default `"teacher"` if there is one, else
            the first. A single model has no reference.
        max_length: longest row, in tokens; by default the shortest context of the models, at most 2,048.
        num_rows: read documents until there are this many rows (None: all).
        batch_size: rows per forward pass; one batch of logits [B, T, V] of two models must fit into memory.
        text_field: column that holds the text.
        dataset_name: name to record, such as the Hub id.
        descriptions: what some of the models are, for readers of the model card.
        dtype: dtype of models that are loaded here. By default quality is measured in float32, and speed in the
            stored dtype, or in float32 where the hardware is slow in that. `"bfloat16"` halves the memory, and moves
            losses and divergences by about 0.001 nats.
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
        What is written to `evaluation.json`: the keys `format`, `versions`, `device`, `dtype` (of quality; `"mixed"`
        if models have several), `data` (`num_tokens` counts predicted tokens), `settings`, `reference`, `models`.

    Raises:
        MismatchError: if vocabularies or tokenizers differ, the models lack some tokens, or a context is too short.
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
        require_creatable(output.parent)

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

    if isinstance(processing_class, str | os.PathLike):
        processing_class = load_tokenizer(processing_class)
    if processing_class is not None:
        refuse_other_tokenizers(processing_class, **{f"model {name!r}": model for name, model in models.items()})
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

    device = common_device(models, device)
    loaded = {name: load_for_inference(model, dtype, device) for name, model in models.items()}
    # Half precision moves a KL by 0.001 nats, more than its standard error where a model is close to its reference.
    widened = [loaded[name] for name, model in models.items() if isinstance(model, str | os.PathLike)]
    with evaluating(loaded.values()):
        with in_float32(widened if dtype in (None, "auto") else ()):
            judged = reference or next(iter(loaded))
            warn_of_broken_starts(loaded[judged], rows, f"The model {judged!r}")
            quality = measure_quality(loaded, rows, reference, batch_size, show_progress)
            dtypes = {name: str(model.dtype).removeprefix("torch.") for name, model in loaded.items()}
        cost = measure_cost(
            loaded,
            rows,
            prefill_length=prefill_length or min(16, max_length),
            decode_tokens=decode_tokens or 0,
            rounds=rounds if speed else 0,
            show_progress=show_progress,
        )

    result = {
        "format": FORMATS[EVALUATION_NAME],
        "versions": versions(),
        "device": device_description(device),
        "dtype": next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else "mixed",
        "data": {
            "name": public_name(dataset_name),
            "digest": rows.digest,
            "num_rows": len(rows),
            "num_tokens": rows.num_predicted,
            "num_bytes": rows.num_bytes,
            "max_length": max_length,
        },
        "settings": {
            "batch_size": batch_size,
            "num_rows": num_rows,
            "packing": False,
            "overlap": 1,
            "dtypes": dtypes,
            "speed_dtypes": {name: str(model.dtype).removeprefix("torch.") for name, model in loaded.items()},
            "speed": speed,
            "prefill_length": prefill_length if speed else None,
            "decode_tokens": decode_tokens if speed else None,
            "rounds": rounds if speed else None,
        },
        "reference": reference,
        "models": {
            name: {
                "name_or_path": _recorded_name(sources[name]),
                **({"description": descriptions[name]} if descriptions and name in descriptions else {}),
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
        write_artefact(output, result, EVALUATION_NAME)
    return result


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
    found = {name: context_length(config) for name, config in configs.items()}
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


def _recorded_name(model: PreTrainedModel | str | os.PathLike[str]) -> str | None:
    return public_name(model if isinstance(model, str | os.PathLike) else model.config.name_or_path)


def _digest_or_none(model: PreTrainedModel) -> str | None:
    """Digest of the weights; None for a model whose weights are offloaded, which can be run but not read."""
    with contextlib.suppress(UnsupportedModelError):
        return model_digest(model)
    return None
