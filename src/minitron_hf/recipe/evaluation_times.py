"""Size and time of evaluations: tokens during training, timed speeds, and the student as a draft of the teacher."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ..evaluation.draft import DraftTest
from . import costs
from .generating import decoding_seconds
from .stage_bytes import Facts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..distillation.config import DistillationConfig

#: Timed decoding of `evaluate_models`: tokens of the prompt, decoded tokens, and rounds with the uncounted one.
PROMPT_TOKENS, DECODED_TOKENS, DECODE_ROUNDS = 512, 64, 6


def evaluated_tokens(facts: Facts, args: DistillationConfig, length: int) -> float:
    """Tokens of the held-out text that training evaluates."""
    tokens = facts.tokens("eval")
    return tokens if args.max_eval_rows is None else min(tokens, args.max_eval_rows * length)


def timing_seconds(facts: Facts, model: PretrainedConfig) -> float:
    """Seconds of the timed prompts and generations of a model, of every combination of lengths and batch sizes."""
    section = facts.recipe.evaluate
    if not section.speed:
        return 0.0
    batch_sizes = section.speed_batch_sizes or [1]
    lengths = section.speed_prompt_tokens or [PROMPT_TOKENS]
    workloads = {(1, PROMPT_TOKENS), *itertools.product(batch_sizes, lengths)}
    return sum(_round_seconds(facts, model, *one) for one in workloads) * DECODE_ROUNDS


def _round_seconds(facts: Facts, model: PretrainedConfig, batch_size: int, prompt_tokens: int) -> float:
    """Seconds of one prompt of each row of a batch, and of the tokens after it."""
    read = batch_size * prompt_tokens * costs.layer_flops(model, prompt_tokens) / facts.machine.forward_flops
    return read + decoding_seconds(
        model,
        facts.machine,
        facts.compute_bytes,
        num_batches=1,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=DECODED_TOKENS,
    )


def draft_seconds(facts: Facts, draft: PretrainedConfig) -> float:
    """Seconds of generating with a draft and without, at most: as if the teacher kept no proposed token."""
    section, test = facts.recipe.evaluate, DraftTest()
    if section.draft_prompts is None:
        return 0.0

    def decoding(model: PretrainedConfig, new_tokens: int) -> float:
        return decoding_seconds(
            model,
            facts.machine,
            facts.compute_bytes,
            num_batches=(section.draft_prompts or 0) + 1,
            batch_size=1,
            prompt_tokens=test.prompt_tokens,
            new_tokens=new_tokens,
        )

    return 2 * decoding(facts.teacher, test.new_tokens) + decoding(draft, test.new_tokens * section.draft_tokens)
