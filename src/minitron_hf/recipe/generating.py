"""What the stage `generate` will write, before it does: its format, its length, and every refusal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DataError, MinitronError
from ..families import text_config
from ..generation.corpus import RECORD_NAME, read_prompts
from ..generation.decoding import Sampling
from ..models import count_parameters
from . import costs
from .beginnings import FIRST_ROWS, beginning
from .run import GENERATED_DIR, place_of
from .schedules import Corpus

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .machine import Machine
    from .run import Run

#: Bytes of a logit while a token is sampled: two arrays in float32 and three in float64 (`generation.decoding`).
SAMPLED_LOGIT = 32
#: Seconds that a layer takes in a step of decoding beside its work: Python, and starting its operations. The five
#: layers of stories260K, which has hardly any work, take 3.3 ms.
LAYER_START = 6e-4
#: Bytes of a token of English text and its share of the row's other columns, on disk.
WRITTEN_TOKEN = 6


@dataclass(frozen=True)
class ExpectedText:
    """Text that is still to be written.

    Attributes:
        row: a row, with other words.
        num_rows: number of rows, at most; None where the number of prompts is not known.
        prompt_length: mean tokens of a prompt.
        max_new_tokens: longest answer, in tokens.
        batch_size: rows that are generated at a time.
    """

    row: Mapping[str, Any]
    num_rows: int | None
    prompt_length: float
    max_new_tokens: int
    batch_size: int

    @property
    def corpus(self) -> Corpus:
        """Its length, at most."""
        return Corpus([round(self.prompt_length) + self.max_new_tokens], self.num_rows)


def expected_text(run: Run) -> ExpectedText:
    """Read some prompts, and tell what the teacher will make of them.

    Raises:
        MinitronError: what `generate_corpus` would refuse.
    """
    section = run.recipe.generate
    assert section is not None
    try:
        Sampling(section.do_sample, section.temperature, section.top_k, section.top_p, section.seed)
        rows, available = None, None
        if section.prompts is not None:
            found = beginning(section.prompts, place_of("prompts"), partial(run.dataset, "prompts"))
            rows, available = found.rows, found.num_rows
        prompts = read_prompts(
            rows,
            run.tokenizer,
            run.teacher_config,
            chat=section.chat,
            text_field="text" if section.prompts is None else section.prompts.text_field,
            max_new_tokens=section.max_new_tokens,
            max_prompt_length=section.max_prompt_length,
            num_rows=section.num_rows if rows is None else None,
        )
        known = list(islice(prompts, FIRST_ROWS))
    except MinitronError as error:
        raise type(error)(f"generate: {error}") from error
    if not known:
        raise DataError("generate: the prompts are longer than max_prompt_length. Pass others.")
    limits = [count for count in (available, section.num_rows) if count is not None]
    number = min(limits, default=None)
    messages = known[0].messages
    answer = {"role": "assistant", "content": "An answer."}
    row = {"text": "A text."} if messages is None else {"messages": [*messages, answer], **known[0].columns}
    length = sum(len(one.ids) for one in known) / len(known)
    batch = min(section.batch_size, number or section.batch_size)
    return ExpectedText(row, number, length, section.max_new_tokens, batch)


class GenerationCost(NamedTuple):
    """Time, peak memory and bytes on disk."""

    seconds: float
    memory: float
    disk: float


def generation_cost(text: ExpectedText, config: PretrainedConfig, machine: Machine, itemsize: int) -> GenerationCost:
    """What it costs to write a text, at most: every answer is counted with `max_new_tokens`.

    Args:
        text: what is to be written.
        config: the teacher's config.
        machine: its speeds.
        itemsize: bytes of a weight in memory.
    """
    num_rows = math.nan if text.num_rows is None else text.num_rows
    length = text.prompt_length + text.max_new_tokens
    seconds = decoding_seconds(
        config,
        machine,
        itemsize,
        num_batches=num_rows if text.num_rows is None else math.ceil(text.num_rows / text.batch_size),
        batch_size=text.batch_size,
        prompt_tokens=text.prompt_length,
        new_tokens=text.max_new_tokens,
    )
    prompt_flops = costs.layer_flops(config, max(1, round(text.prompt_length)))
    seconds += num_rows * text.prompt_length * prompt_flops / machine.forward_flops
    memory = count_parameters(config) * itemsize + text.batch_size * length * costs.cache_bytes(config, itemsize)
    memory += text.batch_size * text_config(config).vocab_size * SAMPLED_LOGIT
    return GenerationCost(seconds, memory, num_rows * length * WRITTEN_TOKEN)


def decoding_seconds(
    config: PretrainedConfig,
    machine: Machine,
    itemsize: int,
    *,
    num_batches: float,
    batch_size: int,
    prompt_tokens: float,
    new_tokens: int,
) -> float:
    """Seconds of decoding after the prompts were read.

    A step of decoding makes one token of each of B rows. It takes the longer of two times: reading all active weights
    and the keys and values of B rows at the speed of the memory, and computing B tokens at the speed of products. Each
    layer adds `LAYER_START`.

    Args:
        config: the model's config.
        machine: its speeds.
        itemsize: bytes of a weight in memory.
        num_batches: number of batches.
        batch_size: B.
        prompt_tokens: tokens of a prompt.
        new_tokens: tokens that are decoded after each prompt.
    """
    length = prompt_tokens + new_tokens
    kept, head = costs.cache_bytes(config, itemsize), costs.head_flops(config) / machine.product_flops
    read = costs.decode_bytes(config, itemsize) + batch_size * (length - new_tokens / 2) * kept
    computed = batch_size * (costs.layer_flops(config, round(length)) / machine.forward_flops + head)
    starts = LAYER_START * text_config(config).num_hidden_layers
    return num_batches * new_tokens * (max(read / machine.memory_traffic, computed) + starts)


def is_written(run: Run) -> bool:
    """Whether the text is there as a whole, of this recipe or an earlier one."""
    from ..formats import read_artefact

    path = run.whole.folder / GENERATED_DIR / RECORD_NAME
    return path.is_file() and bool(read_artefact(path).get("complete"))
