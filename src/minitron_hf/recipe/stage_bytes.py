"""What the estimates need of a recipe, and the peak memory of its stages (`distillation.stage_memory`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.context import row_limit
from ..distillation.capacity import estimate_capacity
from ..distillation.config import checkpointing_field
from ..distillation.fake_runs import Setup
from ..distillation.gpu_data_sheets import Device
from ..distillation.stage_memory import evaluation_memory, stage_memory
from ..distillation.stage_repair import expected_cut_inputs, expected_writers, not_sequential
from ..distillation.stage_workload import Workload
from ..errors import MinitronError
from ..hardware import as_dtype, training_device
from ..models import count_parameters
from ..pruning.repair import SHARE_OF_FREE_MEMORY
from ..sizes.request import SEQUENTIAL
from . import costs
from .generating import ExpectedText
from .machine import Machine
from .schedules import Corpus
from .schema import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..distillation.config import DistillationConfig

#: Costs that cannot be known.
UNKNOWN = math.nan
#: Tokens of a row that stand for documents of any length, each of them a row.
UNLIMITED = 1024


@dataclass
class Facts:
    """What the formulas need of a recipe.

    Attributes:
        recipe: the recipe.
        teacher: config of the teacher.
        students: config of the student of every round.
        arguments: of every round's training, with the lengths of rows that it has (`lower_to_context`).
        machine: its speeds.
        corpora: `train` and `eval`; None where a corpus is not known here.
        written: text that the teacher writes for the corpus.
        trained: costs of the rounds' distillations, once they are computed.
    """

    recipe: Recipe
    teacher: PretrainedConfig
    students: Sequence[PretrainedConfig]
    arguments: Sequence[DistillationConfig]
    machine: Machine
    corpora: Mapping[str, Corpus | None]
    written: ExpectedText | None = None
    trained: dict[int, Any] = field(default_factory=dict)

    @property
    def stored_bytes(self) -> int:
        """Bytes of a stored weight."""
        dtype = self.teacher.dtype
        return dtype.itemsize if isinstance(dtype, torch.dtype) else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of a weight in memory."""
        return self.compute_dtype.itemsize

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of weights in memory, other than those that are trained."""
        return torch.bfloat16 if self.machine.dtype == "bfloat16" and self.stored_bytes == 2 else torch.float32

    def tokens(self, which: str) -> float:
        """N of a corpus, with as many rows as the recipe takes."""
        corpus = self.corpora[which]
        return UNKNOWN if corpus is None else corpus.num_tokens

    def length(self, number: int) -> int:
        """T of the training rows of a round, counted from 0."""
        return row_length(self.arguments[number].max_length, self.teacher)

    def in_round(self, number: int) -> tuple[Recipe, PretrainedConfig, PretrainedConfig, DistillationConfig]:
        """Recipe, model to prune, student and arguments of a round, counted from 0."""
        recipe = self.recipe.each_round()[number]
        before = self.teacher if number == 0 else self.students[number - 1]
        return recipe, before, self.students[number], self.arguments[number]


def row_length(max_length: int | None, model: PretrainedConfig) -> int:
    """T of full rows, at most the context of the model."""
    return row_limit(max_length or UNLIMITED, model=model)[0] or UNLIMITED


def memory_of(
    facts: Facts, teacher: PretrainedConfig, student: PretrainedConfig, stages: Sequence[str], **load: Any
) -> float:
    """Peak bytes of the largest of some stages (`stage_memory`), at least the teacher's weights.

    NaN where they cannot be known. Rows per batch are `rows`, and tokens of each `length`.
    """
    renamed = {"length": "max_length", "rows": "batch_size"}
    settings: dict[str, Any] = {renamed.get(name, name): value for name, value in load.items()}
    workload = Workload(dtype=facts.compute_dtype, device=training_device().type, **settings)
    try:
        found = stage_memory(teacher, student, workload, stages=stages)
    except MinitronError:
        return UNKNOWN
    sums = (sum(parts.values()) for parts in found.values())
    return float(max(sums, default=count_parameters(teacher) * facts.compute_bytes))


def repair_limit(facts: Facts) -> int:
    """Bytes that the repair's matrices may take."""
    return int(SHARE_OF_FREE_MEMORY * facts.machine.memory)


def repair_seconds(
    facts: Facts,
    model: PretrainedConfig,
    student: PretrainedConfig,
    repair: str,
    rows: tuple[int, int, int],
    gaps: int,
    *,
    streamed: bool = False,
) -> float:
    """Seconds of a repair on a number of rows, of some tokens each, in batches of some rows.

    A streamed one takes two passes, one of which chooses the ridge, and reads the weights for both and for a test.
    """
    writers = expected_writers(student) if repair == SEQUENTIAL else []
    cuts = not_sequential(expected_cut_inputs(model, student, repair, gaps), writers)
    num_rows, length, batch = rows
    tokens, num_batches, speed = num_rows * length, math.ceil(num_rows / batch), facts.machine

    def seconds_of(found: costs.RepairCost) -> float:
        solving = speed.float32_flops / 2 if math.isnan(speed.solve_flops) else speed.solve_flops
        seconds = found.products / speed.float32_flops + found.sum_bytes / speed.memory_traffic
        return seconds + found.solutions / solving

    flops, seconds = 0.0, 0.0
    if cuts:
        limit = 0 if streamed else repair_limit(facts)
        found = costs.repair_cost(model, cuts, num_tokens=tokens, num_batches=num_batches, memory_limit=limit)
        passes = 2 if streamed else found.passes
        seconds += 3 * count_parameters(model) * facts.stored_bytes / speed.disk_traffic if streamed else 0.0
        flops += passes * costs.layer_flops(model, length)
        seconds += seconds_of(found)
    if writers:
        sequential = costs.sequential_cost(student, writers, num_tokens=tokens, num_batches=num_batches)
        flops += costs.layer_flops(model, length) + sequential.passes * costs.layer_flops(student, length)
        seconds += seconds_of(sequential)
    return seconds + tokens * flops / speed.forward_flops


def pruning_memory(facts: Facts, recipe: Recipe, model: PretrainedConfig, student: PretrainedConfig) -> float:
    """Peak bytes without a repair. A checkpoint in safetensors files is streamed, while the scored model is there."""
    folder = Path(recipe.teacher.model)
    weights = count_parameters(model) * facts.compute_bytes
    if recipe.verify or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        return weights + memory_of(facts, model, student, ["save"])
    return weights + (memory_of(facts, model, student, ["prune, streamed"]) if training_device().type == "cpu" else 0)


def training_memory(
    facts: Facts, teacher: PretrainedConfig, student: PretrainedConfig, args: DistillationConfig, length: int
) -> float:
    """Peak bytes of a step, from `estimate_capacity`."""
    recipe = facts.recipe
    device = Device(facts.machine.memory, type=training_device().type)
    try:
        setup = Setup(
            device=device,
            batch_size=args.per_device_train_batch_size,
            max_length=length,
            activation_checkpointing=bool(getattr(args, checkpointing_field())),
            lora_rank=None if recipe.lora is None else int(recipe.lora.get("r", 8)),
            cached_top_k=None if recipe.teacher_cache is None else recipe.teacher_cache.most_tokens,
            accumulates=args.gradient_accumulation_steps > 1,
            fake_quantization=args.fake_quantization,
            freeze_embeddings=args.freeze_embeddings,
        )
        # A recipe's student is cut from this teacher, so a smaller vocabulary is one that was cut.
        return estimate_capacity(teacher, student, setup, cuts_vocabulary=True).peak
    except MinitronError:
        return UNKNOWN


def evaluation_bytes(facts: Facts, models: Sequence[PretrainedConfig], length: int) -> float:
    """Peak bytes of all models together, in float32 unless the recipe names a dtype."""
    given, device = facts.recipe.teacher.dtype, training_device().type
    dtype = torch.float32 if given == "auto" else as_dtype(given)
    batch = facts.recipe.evaluate.batch_size
    load = Workload(dtype=dtype, device=device, batch_size=batch, eval_length=length)
    try:
        return float(sum(evaluation_memory(models, load).values()))
    except MinitronError:
        return UNKNOWN
