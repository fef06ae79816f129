"""Generates training text with the teacher itself, into a dataset folder that grows and resumes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..compat import commit_hash
from ..data.context import context_length
from ..data.tokens import text_tokenizer, tokenizer_digest
from ..data.vocabulary import refuse_other_tokenizers
from ..errors import DataError, MismatchError, checks_kinds
from ..files import digest, require_empty, require_writable, versions, write_text
from ..formats import read_artefact, write_artefact
from ..locks import with_locked_folder
from ..models import load_config, load_for_compute, load_tokenizer
from ..names import public_name
from ..weights import model_digest
from .decoding import Sampling, continue_prompts, end_tokens_of, length_batches, pad_token_of, reads_padding
from .prompts import OTHER_PROMPTS, Prompt, Prompts, require_count
from .shards import Shard

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: The record of a generated corpus: teacher, settings, files and counts.
RECORD_NAME = "generation.json"
#: Longest prompt of models whose config names no limit, in tokens.
DEFAULT_PROMPT_LENGTH = 2048

#: Without `configs`: `datasets` 5.2 would then confuse all local folders of one name (see `data.loading`).
_CARD = """---
tags:
- synthetic
- minitron-hf
---

Text that {teacher} generated, for distillation. `generation.json` says how. Columns: `{column}`; `index`, the place of
the prompt; `finished`, whether the text ended before the limit of {max_new_tokens} new tokens; `num_new_tokens`.
"""


@checks_kinds
@with_locked_folder("output_dir")
def generate_corpus(
    teacher: PreTrainedModel | str | os.PathLike[str],
    prompts: Iterable[Any] | None,
    output_dir: str | os.PathLike[str],
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    num_rows: int | None = None,
    chat: bool | None = None,
    text_field: str = "text",
    max_new_tokens: int = 512,
    max_prompt_length: int | None = None,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    rows_per_file: int = 1024,
    prompts_name: str | None = None,
    show_progress: bool = True,
) -> Path:
    """Let the teacher write training text; an interrupted call resumes and loses at most one batch.

    Long because all arguments are explained.

    The folder is a dataset: `datasets.load_dataset(folder)`, `load_text_dataset(folder)` and the `data` section of a
    recipe read it. A conversation becomes a row of `messages`, the prompt's and the answer; a text becomes a row of
    `text`, the prompt and its continuation. Rows stand in the order of their prompts. A finished file is never
    written again; the rows of the unfinished one are on disk after each batch.

    The random numbers of a row follow from `seed` and its index. So the rows do not depend on the batch size or on
    interruptions, as far as the hardware computes the same logits in batches of other sizes.

    Args:
        teacher: a model, or a path or Hub id.
        prompts: mappings with the columns `messages`, `prompt` or `text_field`; texts; or conversations (see
            `Prompts`). None: the teacher writes whole texts from its own begin-of-text token.
        output_dir: folder of the dataset.
        processing_class: tokenizer; by default the one in the teacher's folder.
        num_rows: number of rows; None: one for every prompt. Needed without prompts.
        chat: whether a text is the message of a user, under the chat template; None: where there is a template.
        text_field: column that holds the text.
        max_new_tokens: longest answer, in tokens.
        max_prompt_length: longest prompt, in tokens: longer texts are cut, longer conversations left out and counted.
            None: what the context leaves.
        do_sample: sample; False takes the most probable token.
        temperature: of the sampling; 1 samples the teacher's own distribution.
        top_k: sample among the k most probable tokens; None: all.
        top_p: sample among the most probable tokens that have this probability together.
        seed: seed of the random numbers.
        batch_size: rows that are generated at a time, of similar length.
        rows_per_file: rows of one file; those of one file are sorted by length into batches.
        prompts_name: name of the prompts to record, such as the Hub id.
        show_progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        DataError: if there are no prompts, a prompt cannot be read, or a setting is out of range.
        MismatchError: if the lengths exceed the context, or the folder was begun with other settings or prompts.
        OutputError: if the folder cannot be written, or holds other files.
    """
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
        ("rows_per_file", rows_per_file),
    ):
        if value < 1:
            raise DataError(f"{name}={value}: expected at least 1.")
    if num_rows is not None and num_rows < 1:
        raise DataError(f"num_rows={num_rows}: expected at least 1.")
    sampling = Sampling(do_sample, temperature, top_k, top_p, seed)
    processing_class = processing_class or load_tokenizer(_name_of(teacher))
    refuse_other_tokenizers(processing_class, teacher=teacher)
    config = load_config(teacher) if isinstance(teacher, str | os.PathLike) else teacher.config
    source = read_prompts(
        prompts,
        processing_class,
        config,
        chat=chat,
        text_field=text_field,
        max_new_tokens=max_new_tokens,
        max_prompt_length=max_prompt_length,
        num_rows=num_rows,
    )
    model = load_for_compute(teacher)
    settings = {
        **asdict(sampling),
        "chat": source.chat and prompts is not None,
        "text_field": text_field,
        "num_rows": num_rows,
        "max_new_tokens": max_new_tokens,
        "max_prompt_length": source.max_length,
        "rows_per_file": rows_per_file,
    }
    corpus = _Corpus(Path(output_dir), model, source, settings, sampling, batch_size)
    return corpus.write(prompts_name, show_progress)


def read_prompts(
    prompts: Iterable[Any] | None,
    processing_class: Any,
    config: PretrainedConfig,
    *,
    chat: bool | None,
    text_field: str,
    max_new_tokens: int,
    max_prompt_length: int | None,
    num_rows: int | None,
) -> Prompts:
    """The prompts of `generate_corpus`, whose arguments these are, within the context of the teacher.

    Raises:
        DataError: if the settings do not fit the data or the tokenizer.
        MismatchError: if the lengths exceed the context.
    """
    require_count(prompts, num_rows)
    return Prompts(
        prompts,
        processing_class,
        chat=chat,
        text_field=text_field,
        max_length=_prompt_length(config, max_prompt_length, max_new_tokens),
        num_rows=num_rows,
    )


def _name_of(teacher: PreTrainedModel | str | os.PathLike[str]) -> str:
    return os.fspath(teacher) if isinstance(teacher, str | os.PathLike) else str(teacher.config.name_or_path)


def _prompt_length(config: PretrainedConfig, max_prompt_length: int | None, max_new_tokens: int) -> int:
    """Longest prompt, in tokens.

    Raises:
        DataError: if it is below 1.
        MismatchError: if it does not fit into the context beside the answer.
    """
    context = context_length(config)
    if max_prompt_length is None:
        max_prompt_length = DEFAULT_PROMPT_LENGTH if context is None else context - max_new_tokens
        if context is not None and max_prompt_length < 1:
            raise MismatchError(
                f"max_new_tokens is {max_new_tokens} and leaves no room for a prompt: the teacher's context has "
                f"{context} tokens. Pass less, such as max_new_tokens={max(context // 2, 1)}."
            )
    if max_prompt_length < 1:
        raise DataError(f"max_prompt_length={max_prompt_length}: expected at least 1.")
    if context is not None and max_prompt_length + max_new_tokens > context:
        raise MismatchError(
            f"max_prompt_length={max_prompt_length} and max_new_tokens={max_new_tokens} exceed the teacher's context "
            f"of {context} tokens. Lower them."
        )
    return max_prompt_length


class _Corpus:
    """Writes one generated corpus.

    Args:
        folder: of the dataset.
        model: the teacher.
        prompts: its prompts.
        settings: what decides the rows, beside teacher and prompts.
        sampling: how tokens are chosen.
        batch_size: rows that are generated at a time.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        prompts: Prompts,
        settings: Mapping[str, Any],
        sampling: Sampling,
        batch_size: int,
    ) -> None:
        self.folder, self.model, self.prompts, self.settings = folder, model, prompts, settings
        self.sampling, self.batch_size = sampling, batch_size
        self.tokenizer = text_tokenizer(prompts.tokenizer)
        self.end_tokens = end_tokens_of(model, self.tokenizer)
        self.pad_token = pad_token_of(self.tokenizer, self.end_tokens)
        self.num_new_tokens, self.started = 0, time.monotonic()
        self.equal_lengths: bool | None = None  # found out with the first prompts of different lengths

    def write(self, prompts_name: str | None, show_progress: bool) -> Path:
        """Generate the missing rows.

        Raises:
            MismatchError: if the folder was begun with other settings or prompts.
        """
        identity: dict[str, Any] = {
            "teacher": {"digest": model_digest(self.model), "computed_in": str(self.model.dtype).split(".")[-1]},
            "tokenizer": digest(tokenizer_digest(self.tokenizer), self.tokenizer.chat_template),
            "end_tokens": sorted(self.end_tokens),
            "settings": dict(self.settings),
        }
        known = self._begin(identity)
        record = {
            "versions": versions(),
            **identity,
            "teacher": {
                "name_or_path": public_name(self.model.config.name_or_path),
                "revision": commit_hash(self.model.config),
                **identity["teacher"],
            },
            "prompts": public_name(prompts_name),
        }
        files: list[dict[str, Any]] = []
        with self._bar(show_progress) as bar:
            for number, prompts in enumerate(_groups(self.prompts, self.settings["rows_per_file"])):
                before = known[number] if number < len(known) else None
                files.append(self._file(Shard(self.folder, number), prompts, before, bar))
                self._write_record({**record, "files": files}, complete=False)
        if not files:
            raise DataError("There are no prompts, or all are longer than max_prompt_length. Pass others.")
        self._write_record({**record, "files": files}, complete=True)
        if self.prompts.num_skipped:
            logger.warning("%d prompts are longer than max_prompt_length and left out.", self.prompts.num_skipped)
        return self.folder

    def _begin(self, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Check the folder, and write its card; return what is known of its files.

        Raises:
            MismatchError: naming the first difference to what the folder was begun with.
        """
        path = self.folder / RECORD_NAME
        if path.is_file():
            found = read_artefact(path)
            for name, value, before in _compared(identity, found):
                if value != before:
                    raise MismatchError(
                        f"{self.folder} was begun with {name}={before!r}, this call has {value!r}. Choose another "
                        "folder, or the same settings."
                    )
            files: list[dict[str, Any]] = found["files"]
        else:
            require_empty(self.folder)
            require_writable(self.folder)
            files = []
            self._write_record({**identity, "files": files}, complete=False)
        if not (self.folder / "README.md").is_file():
            teacher = public_name(self.model.config.name_or_path)
            card = _CARD.format(
                teacher=f"`{teacher}`" if teacher else "a language model",
                column="messages" if self.settings["chat"] else "text",
                max_new_tokens=self.settings["max_new_tokens"],
            )
            write_text(self.folder / "README.md", card)
        return files

    def _bar(self, show_progress: bool) -> Any:
        try:
            total = len(self.prompts)
        except TypeError:
            total = None
        return tqdm(total=total, desc="Generating", unit="row", disable=not show_progress)

    def _file(
        self, shard: Shard, prompts: Sequence[Prompt], known: Mapping[str, Any] | None, bar: Any
    ) -> dict[str, Any]:
        """Generate the missing rows of one file; return its entry in the record."""
        digests = [digest(prompt.ids).removeprefix("sha256:")[:16] for prompt in prompts]
        whole = digest(digests)
        if shard.path.exists():
            if known is not None and known["digest"] != whole:
                raise MismatchError(f"{shard.path} was generated from other prompts: {OTHER_PROMPTS}")
            bar.update(len(prompts))
            return dict(known) if known is not None else shard.entry(whole)
        done = shard.unfinished(prompts, digests)
        bar.update(len(done))
        for places in self._batches(prompts):
            missing = [place for place in places if prompts[place].index not in done]
            if missing:
                # The whole batch again: a row that is computed beside others is the same as before.
                rows = self._rows([prompts[place] for place in places])
                wanted = {prompts[place].index for place in missing}
                new = [(row, digests[place]) for row, place in zip(rows, places) if row["index"] in wanted]
                shard.append(new)
                bar.update(len(new))
                self.num_new_tokens += sum(row["num_new_tokens"] for row in rows)
                bar.set_postfix_str(f"{self.num_new_tokens / (time.monotonic() - self.started):.0f} tokens/s")
        shard.finish()
        return shard.entry(whole)

    def _batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        lengths = [len(prompt.ids) for prompt in prompts]
        if self.equal_lengths is None and len(set(lengths)) > 1:
            shortest = min((prompt.ids for prompt in prompts), key=len)
            self.equal_lengths = reads_padding(self.model, shortest[:256], self.pad_token)
            if self.equal_lengths:
                logger.warning(
                    "Padding in front of a prompt changes what the teacher predicts. Only prompts of equal length are "
                    "generated together, which takes longer."
                )
        return length_batches(lengths, self.batch_size, equal_lengths=bool(self.equal_lengths))

    def _rows(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Generate one batch."""
        answers = continue_prompts(
            self.model,
            [prompt.ids for prompt in prompts],
            max_new_tokens=self.settings["max_new_tokens"],
            end_tokens=self.end_tokens,
            pad_token_id=self.pad_token,
            sampling=self.sampling,
            indices=[prompt.index for prompt in prompts],
        )
        return [self._row(prompt, answer) for prompt, answer in zip(prompts, answers)]

    def _row(self, prompt: Prompt, answer: Sequence[int]) -> dict[str, Any]:
        counts = {"finished": answer[-1] in self.end_tokens, "num_new_tokens": len(answer)}
        ids = list(answer) if prompt.messages is not None else [*prompt.ids, *answer]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if prompt.messages is None:
            return {"index": prompt.index, "text": text, **counts}
        messages = [*prompt.messages, {"role": "assistant", "content": text}]
        return {"index": prompt.index, "messages": messages, **prompt.columns, **counts}

    def _write_record(self, record: Mapping[str, Any], *, complete: bool) -> None:
        names = ("num_rows", "num_new_tokens", "num_finished")
        counts = {name: sum(file[name] for file in record["files"]) for name in names}
        content = {**record, **counts, "num_skipped": self.prompts.num_skipped, "complete": complete}
        write_artefact(self.folder / RECORD_NAME, content)


def _compared(identity: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, value now and value before of everything that decides the rows."""
    for name, value in identity.items():
        before = found.get(name)
        if isinstance(value, Mapping):
            for part, one in value.items():
                yield part if name == "settings" else f"{name}.{part}", one, (before or {}).get(part)
        else:
            yield name, value, before


def _groups(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    iterator = iter(prompts)
    while group := list(islice(iterator, size)):
        yield group
