"""Whether a student can still chat: its own answers, and its predictions of the reference's answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..data import DataSource, TokenRows
from ..errors import DataError
from ..files import digest
from ..generation.decoding import (
    continue_prompts,
    end_tokens_of,
    length_batches,
    pad_token_of,
    reads_padding,
)
from ..generation.prompts import Prompt, Prompts
from .means import mean_and_error
from .quality import measure_quality
from .token_spaces import Readers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What is measured on the reference's answers.
ANSWER_METRICS = ("loss", "perplexity", "kl_divergence", "top1_agreement")


@dataclass(frozen=True)
class ChatTest:
    """Prompts that models answer greedily.

    Attributes:
        prompts: in their order.
        tokenizer: with a chat template.
        max_new_tokens: longest answer, in tokens.
        readers: own ids and tokenizers of the models. Where the vocabulary of students was cut, the prompts are split
            by the students' tokenizer, and the reference answers in its own tokens.
    """

    prompts: Sequence[Prompt]
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    readers: Readers = field(default_factory=Readers)

    @property
    def described(self) -> dict[str, Any]:
        """What `evaluation.json` records of the test."""
        return {
            "num_prompts": len(self.prompts),
            "max_new_tokens": self.max_new_tokens,
            "digest": digest([prompt.ids for prompt in self.prompts]),
        }

    @classmethod
    def of(
        cls,
        data: DataSource,
        processing_class: Any,
        *,
        context: int | None,
        max_new_tokens: int,
        num_prompts: int | None,
        text_field: str = "text",
        readers: Readers | None = None,
    ) -> ChatTest:
        """Read the prompts.

        Args:
            data: as for `generate_corpus`; the answers in it are left out.
            processing_class: tokenizer, or a processor with one.
            context: tokens of the models' shortest context; prompts that leave no room for an answer are left out.
            max_new_tokens: longest answer, in tokens.
            num_prompts: number of prompts; None: all.
            text_field: column that holds a text.
            readers: own ids and tokenizers of the models.

        Raises:
            DataError: if there are no prompts, no tokenizer or no chat template, or no room for an answer.
        """
        if processing_class is None:
            raise DataError("chat_prompts needs a tokenizer. Pass processing_class=tokenizer.")
        room = None if context is None else context - max_new_tokens
        if max_new_tokens < 1 or (room is not None and room < 1):
            raise DataError(
                f"chat_max_new_tokens={max_new_tokens}: expected at least 1, and fewer than the {context} tokens of "
                "the models' context."
            )
        source = Prompts(
            data, processing_class, chat=True, text_field=text_field, max_length=room, num_rows=num_prompts
        )
        prompts = list(source)
        if not prompts:
            raise DataError("chat_prompts holds no prompts that leave room for an answer. Pass others.")
        return cls(prompts, source.tokenizer, max_new_tokens, readers or Readers())

    def measure(
        self, models: Mapping[str, PreTrainedModel], reference: str | None, batch_size: int, show_progress: bool
    ) -> dict[str, dict[str, Any]]:
        """Let every model answer, and measure all of them on the answers of the reference.

        Args:
            models: name → model.
            reference: name of the model whose answers are the measure; None for a single model: its own.
            batch_size: rows at a time.
            show_progress: show progress bars.

        Returns:
            Name → metric → value and standard error over prompts (see `evaluate_models`).
        """
        judge = reference or next(iter(models))
        tokenizers = {name: self.readers.tokenizers.get(name, self.tokenizer) for name in models}
        ends = {name: end_tokens_of(models[judge], self.tokenizer) for name in models}
        if self.readers.tokenizers:  # under their own ids
            ends = {name: end_tokens_of(model, tokenizers[name]) for name, model in models.items()}
        with tqdm(
            total=len(models) * len(self.prompts), desc="Answering", unit="prompt", disable=not show_progress
        ) as bar:
            answers = {name: self._answers(name, model, ends[name], batch_size, bar) for name, model in models.items()}
        rows = self._rows(judge, answers[judge])
        spaces = self.readers.spaces
        quality = measure_quality(models, rows, reference, batch_size, show_progress, spaces.own_ids)
        special = {name: {*ends[name], *_special_tokens(tokenizers[name])} for name in models}
        return {
            name: {
                **{metric: quality[name][metric] for metric in ANSWER_METRICS},
                "stopping": _share([answer[-1] in ends[name] for answer in answers[name]]),
                "format": _share([keeps_format(answer, ends[name], special[name]) for answer in answers[name]]),
                "answer_tokens": _mean([len(answer) for answer in answers[name]]),
            }
            for name in models
        }

    def _answers(
        self, name: str, model: PreTrainedModel, ends: Collection[int], batch_size: int, bar: Any
    ) -> list[list[int]]:
        """The greedy answers of a model in its own tokens, in the order of the prompts."""
        pad = pad_token_of(self.readers.tokenizers.get(name, self.tokenizer), ends)
        prompts = [self.readers.spaces.of_model(name, prompt.ids) for prompt in self.prompts]
        lengths = [len(ids) for ids in prompts]
        equal = len(set(lengths)) > 1 and reads_padding(model, min(prompts, key=len)[:256], pad)
        answers: list[list[int]] = [[] for _ in prompts]
        for places in length_batches(lengths, batch_size, equal_lengths=equal):
            found = continue_prompts(
                model,
                [prompts[place] for place in places],
                max_new_tokens=self.max_new_tokens,
                end_tokens=ends,
                pad_token_id=pad,
            )
            for place, answer in zip(places, found):
                answers[place] = answer
            bar.update(len(places))
        return answers

    def _rows(self, judge: str, answers: Sequence[Sequence[int]]) -> TokenRows:
        """Prompts with the answers of a model; only the answers are measured."""
        prompts = [prompt.ids for prompt in self.prompts]
        spaces = self.readers.spaces
        if spaces.cut is not None and judge in spaces.own_ids:
            own = self.readers.tokenizers[judge]
            answers = [spaces.cut.respelled(answer, own, self.tokenizer) for answer in answers]
        return TokenRows(
            tuple((*ids, *answer) for ids, answer in zip(prompts, answers)),
            None,
            context=tuple(tuple(range(len(ids))) for ids in prompts),
        )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, found in added if found.special)}


def keeps_format(answer: Sequence[int], ends: Collection[int], special: Collection[int]) -> bool:
    """Whether an answer is one turn: some text without the special tokens that begin or end turns.

    Args:
        answer: token ids, with the end-of-turn token if there is one.
        ends: tokens that end a turn.
        special: special tokens of the tokenizer.

    >>> keeps_format([5, 6, 2], {2}, {1, 2}), keeps_format([5, 1, 6], {2}, {1, 2}), keeps_format([2], {2}, {1, 2})
    (True, False, False)
    """
    text = answer[:-1] if answer[-1] in ends else answer
    return bool(text) and not any(token in special for token in text)


def _share(found: Sequence[bool]) -> dict[str, float | None]:
    return _mean([float(one) for one in found])


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    value, stderr = mean_and_error([float(value) for value in values], [1] * len(values))
    assert math.isfinite(value)
    return {"value": value, "stderr": stderr}
