"""Compares models on the same tokens: quality, size, speed and memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import DataSource, TokenRows, token_rows
from ..errors import DataError, UnsupportedModelError, checks_kinds
from ..files import require_creatable, versions
from ..formats import FORMATS, write_artefact
from ..models import evaluating
from ..names import public_name
from ..scoring.row_starts import warn_of_broken_starts
from ..sizes.counts import parameter_counts
from ..weights import model_digest
from .benchmarks import measure_benchmarks
from .chat import ChatTest
from .draft import DraftTest, time_drafts
from .limits import Limits, checked_reference, chosen_models, require_image_models, require_positive
from .loading import common_device, in_float32, load_for_inference, load_processing_class
from .quality import measure_quality
from .speed import Workload, checkpoint_bytes, device_description, measure_speed
from .tasks import require_tasks
from .token_spaces import Readers, TokenSpaces

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: File name of what `evaluate_models` writes.
EVALUATION_NAME = "evaluation.json"


@checks_kinds
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
    assistant_only: bool = False,
    dataset_name: str | None = None,
    descriptions: Mapping[str, str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    speed: bool = True,
    speed_models: Sequence[str] | None = None,
    prefill_length: int | None = None,
    decode_tokens: int | None = None,
    rounds: int = 5,
    speed_batch_sizes: Sequence[int] = (),
    speed_prompt_tokens: Sequence[int] = (),
    checkpoints: Mapping[str, str | os.PathLike[str]] | None = None,
    chat_prompts: DataSource | None = None,
    chat_max_new_tokens: int = 256,
    num_chat_prompts: int | None = None,
    tasks: Sequence[str] = (),
    task_models: Sequence[str] | None = None,
    task_limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    task_data: str | os.PathLike[str] | None = None,
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
    draft_prompts: int | None = None,
    draft_tokens: int = 5,
    output_path: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Measure models side by side on the same tokens and, interleaved, at the same speed test.

    Long because all arguments are explained.

    Every document starts its own row. Longer documents continue on further rows that repeat one token, so every token
    after a document's first (the separator of `data.tokenize`) is predicted exactly once. The reference and all other
    models read each batch in one pass; neither padding nor the batch size changes a result.

    Quality, each with its standard error over rows (see `quality.mean_and_error`):

    - `loss`: nats per predicted token. `perplexity` = exp(loss), its error perplexity · stderr(loss) (delta method).
    - `bits_per_byte` = loss · tokens / (bytes · ln 2): comparable across tokenizers. Its error takes the number of
      tokens per byte as given. None when the data is token ids.
    - `kl_divergence`: KL(reference ‖ model), nats per token. `top1_agreement`: share of tokens where the model's most
      probable token is the reference's. None for the reference itself.

    `positions` has `loss` and `kl_divergence` by the position of the predicted token in its row, if rows are longer
    than 128 tokens: 0–127, 128–255, 256–511, and so on.

    Chat, with `chat_prompts`: every model answers the prompts greedily under the chat template. `stopping` is the
    share of answers that end with an end-of-turn token within the limit. `format` is the share of answers that hold
    text and no special token before that end. `answer_tokens` is the length of an answer. `loss`, `perplexity`,
    `kl_divergence` and `top1_agreement` are measured on the answers of the reference, answer tokens only. Standard
    errors are over prompts.

    Drafts, with `draft_prompts`: what the reference's greedy generation gains from each other model as its draft; see
    `measure_draft`.

    Benchmarks, with `tasks`: see `measure_benchmarks`. They come first, and finished tasks survive an interruption.

    Size and speed: parameters; bytes of the checkpoint; `prefill_tokens_per_second` of one prompt of `prefill_length`
    tokens up to the logits of its last token; `decode_tokens_per_second` of the `decode_tokens` greedy steps after it,
    with the cache; `kv_cache_bytes_per_token`, the bytes of the cache after the prompt, per token of the prompt.
    `peak_memory_bytes` is the most that weights, cache and activations take together. `speeds` has the same for every
    combination of `speed_batch_sizes` and `speed_prompt_tokens`, where they are given; tokens of all rows count.
    Each round times all models, in a rotating order, after one round that is not counted. A speed is the median of the
    rounds, with their first and third quartile.

    Args:
        models: name → model, or the path or Hub id of one. Model objects are measured in the dtype and on the device
            they have, and left unchanged.
        dataset: as in `token_rows`. Predictions of text are measured, also where rows have images; speed without them.
        processing_class: tokenizer, for images processor, or the path or Hub id of one; needed for text.
        reference: name of the model that the others are compared with; default `"teacher"` if there is one, else the
            first. A single model has no reference.
        max_length: longest row, in tokens; by default the shortest context of the models, at most 2,048.
        num_rows: stop reading after the document that completes so many rows; all of its rows are measured, so that
            bits per byte are exact. None: read all. The result has the number of rows that were measured.
        batch_size: rows per forward pass; logits exist for one row of two models at a time.
        text_field: column that holds the text.
        assistant_only: measure the assistant's turns of conversations alone, as training with `assistant_only_loss`
            counts them; the other turns are context.
        dataset_name: name to record, such as the Hub id.
        descriptions: name → description of a model for the model card.
        dtype: dtype of models that are loaded here. By default quality is measured in float32, and speed in the
            stored dtype, or in float32 where the hardware is slow in that. `"bfloat16"` halves the memory, and moves
            losses and divergences by about 0.001 nats.
        device: device of models that are loaded here; default the device of the model objects, else CUDA if available.
        speed: whether to time.
        speed_models: names of the models that are timed, and tried as drafts; None: all.
        prefill_length: tokens of the timed prompt; by default up to 512, as the models' contexts allow.
        decode_tokens: tokens of the timed generation; by default up to 64.
        rounds: number of timed rounds.
        speed_batch_sizes: numbers of prompts at a time to time, beside the one prompt.
        speed_prompt_tokens: lengths of prompts to time, beside `prefill_length`.
        checkpoints: name → path or Hub id that a model object was loaded from. It is the recorded name, its files are
            the size (by default the object's parameters are), and quality is measured as if it were loaded here.
        chat_prompts: prompts to answer: a dataset with `messages`, `prompt` or `text_field`, as for `generate_corpus`;
            answers in it are left out. Needs a tokenizer with a chat template. None: chat is not measured.
        chat_max_new_tokens: longest answer, in tokens.
        num_chat_prompts: number of prompts to answer; None: all.
        tasks: names of lm-evaluation-harness tasks or presets, or paths of task files (the extra `eval`).
        task_models: names of the models that do the tasks, the reference among them; None: all.
        task_limit: number of documents per task, or their fraction below 1; None: all.
        num_fewshot: number of worked examples in the prompts of tasks; None: the preset's or the task's own.
        include_path: folder with further task files.
        task_data: folder with documents of stock tasks, to read instead of the Hub.
        apply_chat_template: format the tasks' prompts with the tokenizer's chat template.
        confirm_run_unsafe_code: run tasks that execute code which the models write. Use a container.
        draft_prompts: number of rows that the reference continues with every other model as its draft; None: none.
        draft_tokens: tokens that a draft proposes at a time.
        output_path: folder for `evaluation.json`, or the file itself. `benchmarks.json` goes beside it.
        show_progress: show progress bars.

    Returns:
        The content of `evaluation.json`: the keys `format`, `versions`, `device`, `dtype` (of quality; `"mixed"`
        if models have several), `data` (`num_tokens` counts predicted tokens), `settings`, `reference`, `models`. With
        tasks, `benchmarks` holds the content of `benchmarks.json`.

    Raises:
        MismatchError: if vocabularies or tokenizers differ otherwise than by the `vocab_size` of a plan, the models
            lack some tokens, or a context is too short.
        DataError: if there is no text (see `token_rows`), or a setting is out of range.
        UnsupportedModelError: if a model cannot be loaded, or its logits are not finite.
        OutputError: if `output_path` cannot be written.
    """
    reference = checked_reference(models, reference)
    require_positive(batch_size=batch_size, rounds=rounds)
    sources = _sources(models, checkpoints or {})
    output = _output_file(output_path)
    compared_models = chosen_models(models, task_models=task_models)
    timed_models = chosen_models(models, speed_models=speed_models)
    # Refusals that need configs alone come before any weights are read.
    limits = Limits.of(models, reference, maps_tokens=True)
    if tasks:
        require_tasks(tasks, include_path, runs_code=confirm_run_unsafe_code)
    max_length = limits.row_length(max_length)
    timing, grid = Timing(min(16, max_length), 0, 0), []  # for the size of the cache alone
    if speed:
        timing = Timing(*limits.timed_lengths(prefill_length, decode_tokens), rounds)
        grid = _speed_grid(limits, timing, speed_batch_sizes, speed_prompt_tokens)
    require_image_models(models, dataset)
    given = load_processing_class(processing_class, dataset)
    talks = draft_prompts is not None or chat_prompts is not None
    readers = Readers.of(limits.spaces if talks else TokenSpaces(), models, given)
    processing_class = limits.spaces.tokenizer(given, models)
    limits.spaces.require_own(dataset)
    rows = token_rows(
        dataset,
        processing_class,
        max_length=max_length,
        num_rows=num_rows,
        packing=False,
        overlap=1,
        text_field=text_field,
        assistant_only=assistant_only,
    )
    text = rows.without_images()
    limits.require_known(text)
    draft = None if draft_prompts is None else _draft_test(limits, reference, text, draft_prompts, draft_tokens)
    chat = None
    if chat_prompts is not None:
        answers: Any = {
            "max_new_tokens": chat_max_new_tokens,
            "num_prompts": num_chat_prompts,
            "text_field": text_field,
        }
        chat = ChatTest.of(chat_prompts, processing_class, context=limits.context, readers=readers, **answers)
    device = common_device(models, device)
    loaded = {name: load_for_inference(model, dtype, device) for name, model in models.items()}
    benchmarks = None
    if tasks:
        benchmarks = measure_benchmarks(
            {name: loaded[name] for name in compared_models},
            tasks,
            processing_class=given,
            reference=reference if reference in compared_models else None,
            limit=task_limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            include_path=include_path,
            task_data=task_data,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            output_path=None if output is None else output.parent,
            show_progress=show_progress,
        )
    drafts = {}
    if draft is not None and reference is not None:
        compared = {name: loaded[name] for name in loaded if name in (reference, *timed_models)}
        with evaluating(compared.values()):
            drafts = time_drafts(compared, reference, text, draft, readers, show_progress)
    by_path = [name for name, source in sources.items() if isinstance(source, str | os.PathLike)]
    of_models = (limits.spaces.own_ids, by_path if dtype in (None, "auto") else [])
    of_speed = (timing, grid, timed_models)
    measured = _measure(loaded, rows, reference, batch_size, *of_speed, *of_models, chat, show_progress)
    result = {
        "format": FORMATS[EVALUATION_NAME],
        "versions": versions(),
        "device": device_description(device),
        "dtype": next(iter(measured.dtypes.values())) if len(set(measured.dtypes.values())) == 1 else "mixed",
        "data": {"name": public_name(dataset_name), **_described_rows(rows), "max_length": max_length},
        "settings": {
            "batch_size": batch_size,
            "num_rows": num_rows,
            "packing": False,
            "overlap": 1,
            **({"assistant_only": True} if assistant_only else {}),
            "dtypes": measured.dtypes,
            "speed_dtypes": _dtypes(loaded),
            "speed": speed,
            **{name: value if speed else None for name, value in asdict(timing).items()},
        },
        **({} if chat is None else {"chat": chat.described}),
        **({} if draft is None else {"draft": asdict(draft)}),
        "reference": reference,
        "models": {
            name: {
                **_described_model(sources[name], model, (descriptions or {}).get(name)),
                **measured.models[name],
                **({"draft": drafts[name]} if name in drafts else {}),
            }
            for name, model in loaded.items()
        },
    }
    if output is not None:
        write_artefact(output, result, EVALUATION_NAME)
    return result if benchmarks is None else {**result, "benchmarks": benchmarks}


@dataclass(frozen=True)
class Timing:
    """Tokens of the timed prompt and generation, and the number of timed rounds."""

    prefill_length: int
    decode_tokens: int
    rounds: int


@dataclass(frozen=True)
class _Measured:
    """What was measured: name → metrics and speeds, and name → dtype in which quality was computed."""

    models: Mapping[str, Mapping[str, Any]]
    dtypes: Mapping[str, str]


def _measure(
    models: Mapping[str, PreTrainedModel],
    rows: TokenRows,
    reference: str | None,
    batch_size: int,
    timing: Timing,
    grid: Sequence[Workload],
    timed: Sequence[str],
    own_ids: Mapping[str, torch.Tensor],
    in_full_precision: Sequence[str],
    chat: ChatTest | None,
    show_progress: bool,
) -> _Measured:
    """Measure quality and speed.

    Args:
        models: name → model.
        rows: rows to measure quality on.
        reference: name of the model that the others are compared with.
        batch_size: rows per forward pass.
        timing: lengths and number of the timed rounds.
        grid: further workloads to time.
        timed: names of the models to time.
        own_ids: name → the model's own id of every token, where it differs.
        in_full_precision: names of the models whose quality is computed in float32: half precision moves a KL by 0.001
            nats, more than its standard error where a model is close to its reference.
        chat: prompts to answer.
        show_progress: show progress bars.
    """
    with evaluating(models.values()):
        with in_float32([models[name] for name in in_full_precision]):
            judged = next(name for name in (reference, *models) if name is not None and name not in own_ids)
            warn_of_broken_starts(models[judged], rows, f"The model {judged!r}")
            quality = measure_quality(models, rows, reference, batch_size, show_progress, own_ids)
            positions = {name: quality[name].pop("positions") for name in models}
            answers = {} if chat is None else chat.measure(models, reference, batch_size, show_progress)
            dtypes = _dtypes(models)
        text, times = rows.without_images(), asdict(timing)
        speeds = measure_speed(
            {name: models[name] for name in timed}, text, **times, grid=grid, show_progress=show_progress
        )
        rest = {name: model for name, model in models.items() if name not in timed}
        speeds |= measure_speed(rest, text, **{**times, "rounds": 0}, show_progress=False)
    found = {}
    for name in models:
        found[name] = {"metrics": quality[name], **speeds[name]}
        if positions[name]:
            found[name]["positions"] = positions[name]
        if answers:
            found[name]["chat"] = answers[name]
    return _Measured(found, dtypes)


def _sources(models: Mapping[str, Any], checkpoints: Mapping[str, Any]) -> dict[str, Any]:
    """Name → path, Hub id or model object that is recorded and whose files are counted.

    Raises:
        DataError: if a checkpoint belongs to none of the models.
    """
    if unknown := sorted(set(checkpoints) - set(models)):
        raise DataError(f"checkpoints names {', '.join(unknown)}, expected some of the models {', '.join(models)}.")
    return {**models, **checkpoints}


def _speed_grid(
    limits: Limits, timing: Timing, batch_sizes: Sequence[int], prompt_tokens: Sequence[int]
) -> list[Workload]:
    """Every combination of the batch sizes and lengths to time; none without both.

    Raises:
        DataError: if one of them is below 1.
        MismatchError: if a length exceeds the models' context.
    """
    if not batch_sizes and not prompt_tokens:
        return []
    for size in batch_sizes:
        require_positive(speed_batch_sizes=size)
    lengths = prompt_tokens or (timing.prefill_length,)
    for length in lengths:
        require_positive(speed_prompt_tokens=length)
        limits.timed_lengths(length, timing.decode_tokens)
    return [Workload(size, length) for size in batch_sizes or (1,) for length in lengths]


def _draft_test(
    limits: Limits, reference: str | None, rows: TokenRows, draft_prompts: int, draft_tokens: int
) -> DraftTest:
    """How drafts are measured, within the models' context.

    Raises:
        DataError: if there is nothing to draft for, no row is long enough, or a setting is out of range.
    """
    if reference is None:
        raise DataError("draft_prompts needs two models: the one whose text is generated, and its draft.")
    room = limits.context or DraftTest.prompt_tokens + DraftTest.new_tokens
    prompt_tokens = max(1, min(DraftTest.prompt_tokens, room // 3))
    test = DraftTest(
        draft_prompts, prompt_tokens, max(1, min(DraftTest.new_tokens, room - prompt_tokens)), draft_tokens
    )
    return replace(test, num_prompts=len(test.prompts(rows)))


def _output_file(output_path: str | os.PathLike[str] | None) -> Path | None:
    """The file to write; a folder gets `evaluation.json`.

    Raises:
        OutputError: if it cannot be written.
    """
    if output_path is None:
        return None
    path = Path(output_path)
    path = path if path.suffix == ".json" else path / EVALUATION_NAME
    require_creatable(path.parent)
    return path


def _dtypes(models: Mapping[str, PreTrainedModel]) -> dict[str, str]:
    return {name: str(model.dtype).removeprefix("torch.") for name, model in models.items()}


def _described_rows(rows: TokenRows) -> dict[str, Any]:
    return {
        "digest": rows.digest,
        "num_rows": len(rows),
        "num_tokens": rows.num_predicted,
        "num_bytes": rows.num_bytes,
    }


def _described_model(source: Any, model: PreTrainedModel, description: str | None) -> dict[str, Any]:
    """Name, digest and sizes of a model.

    Args:
        source: path or Hub id of its checkpoint, or the model itself.
        model: the loaded model.
        description: for the model card.
    """
    return {
        "name_or_path": _recorded_name(source),
        **({} if description is None else {"description": description}),
        "digest": _digest_or_none(model),
        **parameter_counts(model),
        "checkpoint_bytes": checkpoint_bytes(source, loaded=model),
    }


def _recorded_name(model: PreTrainedModel | str | os.PathLike[str]) -> str | None:
    return public_name(model if isinstance(model, str | os.PathLike) else model.config.name_or_path)


def _digest_or_none(model: PreTrainedModel) -> str | None:
    try:
        return model_digest(model)
    except UnsupportedModelError:  # of offloaded weights, which cannot be read
        return None
