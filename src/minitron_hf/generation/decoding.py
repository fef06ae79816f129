"""Continues batches of prompts. What a row becomes depends on its own seed, not on the batch that it is in.

Shapes: B rows of a batch, T tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..data.context import context_length
from ..errors import DataError
from ..models import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        do_sample: sample; False takes the most probable token.
        temperature: divides the logits; 1 samples from the model's own distribution.
        top_k: choose among the k most probable tokens; None: all.
        top_p: choose among the most probable tokens that have this probability together.
        seed: the random numbers of a row follow from this seed and the row's index.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise DataError(
                f"temperature={self.temperature}: expected a number above 0. do_sample=False takes the most probable "
                "token."
            )
        if self.top_k is not None and self.top_k < 1:
            raise DataError(f"top_k={self.top_k}: expected at least 1.")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p={self.top_p}: expected a number above 0 and at most 1.")
        if self.seed < 0:
            raise DataError(f"seed={self.seed}: expected at least 0.")

    def processors(self, indices: Sequence[int], num_steps: int) -> LogitsProcessorList:
        """The logits processors that choose the tokens of a batch.

        Args:
            indices: index of every row.
            num_steps: most tokens that are chosen.
        """
        if not self.do_sample:
            return LogitsProcessorList()
        found: list[LogitsProcessor] = []
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k is not None:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(float(self.top_p)))
        draws = [np.random.default_rng([self.seed, index]).random(num_steps) for index in indices]
        return LogitsProcessorList([*found, _ChoiceByRow(torch.from_numpy(np.stack(draws)))])


class _ChoiceByRow(LogitsProcessor):
    """Samples by inverting the distribution function at a number that was drawn for the row and the step.

    Transformers samples a whole batch from one random state, so a row would depend on the rows beside it.

    Args:
        draws_BN: float64 [B, N], uniform in [0, 1).
    """

    def __init__(self, draws_BN: torch.Tensor) -> None:
        self.draws_BN, self.step = draws_BN, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] of which only the chosen token's is finite."""
        wide = scores.float() if scores.device.type == "mps" else scores.double()  # MPS has no float64
        cumulative_BV = wide.softmax(-1).cumsum(-1)
        draws_B1 = self.draws_BN[:, self.step].to(cumulative_BV).unsqueeze(-1)
        self.step += 1
        chosen_B1 = (cumulative_BV <= draws_B1 * cumulative_BV[:, -1:]).sum(-1, keepdim=True)
        chosen_B1 = chosen_B1.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen_B1, 0.0)


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
    pad_token_id: int,
    sampling: Sampling | None = None,
    indices: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue the prompts of one batch, padded on the left.

    Args:
        model: in any mode; evaluated.
        prompts: token ids of every prompt, at least one each.
        max_new_tokens: longest continuation, in tokens.
        end_tokens: a row ends behind the first of these.
        pad_token_id: token that fills shorter prompts.
        sampling: default greedy.
        indices: index of every row, for its random numbers; default its place in the batch.

    Returns:
        New tokens of every prompt, with the end token if there is one.
    """
    sampling = sampling or Sampling(do_sample=False)
    indices = range(len(prompts)) if indices is None else indices
    output_BT = _generate(model, prompts, max_new_tokens, end_tokens, pad_token_id, sampling, indices).sequences
    rows = output_BT[:, max(map(len, prompts)) :].tolist()
    return [_until_end(row, end_tokens) for row in rows]


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_tokens: Collection[int],
    pad_token_id: int,
    sampling: Sampling,
    indices: Sequence[int],
) -> Any:
    input_ids, attention_mask = _left_padded(prompts, pad_token_id, model.device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the processors sample
        eos_token_id=sorted(end_tokens) or None,
        pad_token_id=pad_token_id,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=max_new_tokens == 1,
    )
    with evaluating([model]), without_generation_defaults(model):
        return model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=settings,
            logits_processor=sampling.processors(indices, max_new_tokens),
        )


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [B, T]."""
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, length - len(ids) :] = torch.tensor(ids)
        attention_mask[row, length - len(ids) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _until_end(ids: Sequence[int], end_tokens: Collection[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in end_tokens:
            return list(ids[: place + 1])
    return list(ids)


def length_batches(lengths: Sequence[int], batch_size: int, *, equal_lengths: bool = False) -> Iterator[list[int]]:
    """Places of the rows of each batch, longest rows first: the largest batch is tried at once.

    Args:
        lengths: tokens of every row.
        batch_size: most rows of a batch.
        equal_lengths: put only rows of one length into a batch.
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        is_full = len(batch) == batch_size or (equal_lengths and batch and lengths[batch[0]] != lengths[place])
        if is_full:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.no_grad()
def reads_padding(model: PreTrainedModel, ids: Sequence[int], pad_token_id: int) -> bool:
    """Whether padding on the left changes what a model predicts. Recurrent models may read it like text.

    Args:
        model: the model.
        ids: token ids of some text, at least one; a part of them where three times as many exceed the context.
        pad_token_id: token that fills shorter prompts.
    """
    if (context := context_length(model.config)) is not None:
        ids = ids[: max((context - 1) // 3, 1)]

    def next_logits(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        output = _generate(model, prompts, 1, (), pad_token_id, Sampling(do_sample=False), range(len(prompts)))
        logits: torch.Tensor = output.logits[0][0].cpu().double()
        return logits

    alone, padded = next_logits([ids]), next_logits([ids, [*ids, *ids, *ids]])
    # The spread of the difference, not its largest value: in bfloat16 SmolLM2-135M differs by 0.03 from itself in
    # another batch (largest 0.2), and by 0.7 where it reads the padding.
    tolerance = torch.finfo(model.dtype).eps ** 0.5
    return not bool((alone - padded).std() <= tolerance * alone.std())


@contextlib.contextmanager
def without_generation_defaults(model: Any) -> Iterator[None]:
    """Hide the model's own `generation_config.json`, whose penalties join every setting that a call leaves open."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def end_tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text or a turn: those in the model's generation config, and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list | tuple) else [own]
    return frozenset(int(token) for token in (*found, tokenizer.eos_token_id) if token is not None)


def pad_token_of(tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int]) -> int:
    """The padding token; of tokenizers without one, an end token, or 0. Padding is masked in any case."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return min(end_tokens, default=0)
