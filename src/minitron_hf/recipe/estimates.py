"""Estimates time, memory and disk of every stage of a recipe on this machine, from formulas and measured speeds.

Every number is `operations / speed`, `bytes / traffic`, or a sum of them. The module `costs` has the operations of a
token, `machine` the speeds.

Legend: N tokens, T tokens of a row, P parameters, S optimiser steps; D inputs of a repaired projection, K kept ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..distillation.config import checkpointing_field
from ..distillation.rows import lower_to_context
from ..families import spec_for
from ..models import count_parameters
from ..publishing.markdown import byte_size
from ..scoring.calibration import default_max_length
from ..scoring.metrics import find_metrics
from ..sizes.student import student_config
from ..sizes.targets import shapes_near_target
from . import costs
from .evaluation_times import draft_seconds, evaluated_tokens, timing_seconds
from .generating import expected_text, generation_cost
from .lineage import beginning_notes, measured_dataset, measured_part, measured_training_corpus
from .machine import Machine, measure_machine
from .run import Run
from .schema import Recipe
from .settings import check_settings
from .stage_bytes import (
    UNKNOWN,
    Facts,
    evaluation_bytes,
    memory_of,
    pruning_memory,
    repair_limit,
    repair_seconds,
    row_length,
    training_memory,
)
from .stages import num_processes, stages_until

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..distillation.config import DistillationConfig

#: Time of ranking a block of layers relative to the forward pass of a model without it
#: (`benchmarks/results/scoring.json`).
BLOCK_RANKING = 0.52
#: Seconds to start a stage that has a model, beside its work; a stage of a pocket model takes 0.1 to 1.
START_SECONDS = 0.3
#: Bytes of a token's log-probability in what a server sends.
JSON_BYTES = 75
#: Shapes and rows that are measured for `target_parameters` (`plan_for_target`).
TARGET_SHAPES, TARGET_ROWS = 16, 32


@dataclass(frozen=True)
class StageCost:
    """What a stage is expected to take.

    Attributes:
        stage: its name.
        seconds: time; NaN where it is unknown.
        memory: peak bytes on the device that computes; NaN where it is unknown.
        disk: bytes that it leaves in the run folder, and the largest that it needs meanwhile.
        formula: how the time was computed, in words.
    """

    stage: str
    seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    formula: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; unknown numbers are None."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Estimate:
    """Costs of all stages.

    Attributes:
        machine: speeds that they were computed with.
        stages: in the order in which they run.
        notes: what could not be known.
    """

    machine: Machine
    stages: tuple[StageCost, ...]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Time of all stages whose time is known."""
        return sum(one.seconds for one in self.stages if not math.isnan(one.seconds))

    @property
    def disk(self) -> float:
        """Bytes of all stages."""
        return sum(one.disk for one in self.stages if not math.isnan(one.disk))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the name of the machine's folders."""
        return {
            "machine": {name: value for name, value in asdict(self.machine).items() if name != "notes"},
            "stages": [one.to_dict() for one in self.stages],
            "notes": list(self.notes),
        }


def estimate_recipe(recipe: Recipe, *, until: str | None = None, machine: Machine | None = None) -> Estimate:
    """Estimate what a run will cost on this machine. Nothing but a temporary file is written.

    Args:
        recipe: the recipe, checked (`check_recipe`).
        until: last stage to run; None: all of them.
        machine: speeds; by default they are measured, which takes a few seconds.
    """
    arguments = check_settings(recipe)
    run, last = Run(recipe), arguments[-1]
    lowered = _lower_to_context(recipe, run.teacher_config, arguments)
    if machine is None:
        rows, length = last.per_device_train_batch_size, row_length(last.max_length, run.teacher_config)
        machine = measure_machine(run.teacher_config, recipe.output_dir, length=length, rows=rows)
    others = ["eval", *(["calibration"] if recipe.data.calibration is not None else [])]
    corpora = {"train": measured_training_corpus(run), **{which: measured_dataset(run, which) for which in others}}
    written = None if recipe.generate is None else expected_text(run)
    students = _students(recipe, run.teacher_config)
    facts = Facts(recipe, run.teacher_config, students, arguments, machine, corpora, written)
    stages = tuple(_stage_cost(facts, stage.name) for stage in stages_until(recipe, until))
    notes = [*machine.notes, *lowered]
    unknown = [which for which, one in corpora.items() if one is None or one.num_documents is None]
    notes += [f"data.{which}: its number of tokens is not known here." for which in unknown]
    parts = {recipe.data.place(number): measured_part(run, number) for number in range(len(recipe.data.parts))}
    notes += beginning_notes({**parts, **{f"data.{which}": corpora[which] for which in others}})
    return Estimate(machine, stages, tuple(notes))


def _lower_to_context(recipe: Recipe, teacher: PretrainedConfig, arguments: Sequence[DistillationConfig]) -> list[str]:
    """Lower `max_length` of every round to the context, as training does; returns a message of each that was."""
    notes = []
    for number, args in enumerate(arguments, 1):
        if note := lower_to_context(args, teacher=teacher):  # a student has its teacher's context
            notes.append(f"{f'rounds.{number}.' if recipe.rounds else ''}distill.{note.replace('=None', '=null')}")
    return notes


def _students(recipe: Recipe, config: PretrainedConfig) -> list[PretrainedConfig]:
    """The student of every round; of a target the largest shape, of a search the teacher, as upper bounds."""
    if recipe.search is not None:
        return [config]
    if recipe.pruner_config.targets:
        return [student_config(config, shapes_near_target(config, recipe.pruner_config)[0].request)]
    students = []
    for one in recipe.each_round():
        config = student_config(config, one.pruner_config)
        students.append(config)
    return students


def _stage_cost(facts: Facts, name: str) -> StageCost:
    """The cost of a stage, by its name in the run."""
    prefix, _, kind = name.rpartition("/")
    number = int(prefix) - 1 if prefix else len(facts.students) - 1
    found: StageCost = _FORMULAS[kind](facts, number)
    return StageCost(name, found.seconds, found.memory, found.disk, found.formula)


def _calibration(facts: Facts, number: int) -> tuple[int, int]:
    """Rows of calibration data and T."""
    recipe, model, *_ = facts.in_round(number)
    length = recipe.scores.get("max_length") or default_max_length(model)
    rows = recipe.scores.get("num_rows", 1024)
    corpus = facts.corpora["train" if recipe.data.calibration is None else "calibration"]
    if corpus is not None and not math.isnan(corpus.num_tokens):
        rows = min(rows, max(1, math.ceil(corpus.num_tokens / length)))
    return rows, length


def _generate(facts: Facts, number: int) -> StageCost:
    """See `generation_cost`."""
    assert facts.written is not None
    cost = generation_cost(facts.written, facts.teacher, facts.machine, facts.compute_bytes)
    rows = "an unknown number of rows" if facts.written.num_rows is None else f"at most {facts.written.num_rows:,}"
    formula = f"{rows} × {facts.written.max_new_tokens:,} new tokens"
    return StageCost("generate", cost.seconds + START_SECONDS, cost.memory, cost.disk, formula)


def _score(facts: Facts, number: int) -> StageCost:
    """N × operations / speed of scored layers; a `depth_metric` adds a forward pass for every block of layers."""
    recipe, model, student, _ = facts.in_round(number)
    rows, length = _calibration(facts, number)
    flops, speed = costs.layer_flops(model, length), facts.machine
    reads = find_metrics([recipe.scores.get("metric", "activation")])[0].reads
    seconds, stages, formula = 0.0, [], f"{rows:,} × {length:,} tokens"
    if reads == "gradients":  # logits and states, forwards and backwards
        per_token = 2 * (flops / speed.forward_flops + costs.head_flops(model) / speed.product_flops)
        per_token += costs.gradient_score_bytes(model) / speed.memory_traffic
        seconds, stages = rows * length * per_token, ["score by Taylor"]
    elif reads in ("activations", "pre_activations"):
        per_token = flops / speed.scoring_flops + costs.similarity_flops(model) / speed.float32_flops
        per_token += costs.similarity_bytes(model) / speed.memory_traffic
        seconds, stages = rows * length * per_token + costs.group_flops(model) / speed.float32_flops, ["score"]
    depths = [spec_for(model).sizes(one)["layers"] for one in (model, student)]
    if recipe.scores.get("depth_metric") is not None and depths[1] < depths[0]:
        blocks = depths[1] + 1
        per_token = flops / speed.forward_flops + costs.head_flops(model) / speed.product_flops
        seconds += BLOCK_RANKING * blocks * rows * length * per_token
        stages, formula = [*stages, "score depth"], f"{formula}, {blocks} blocks of layers"
    iterations = recipe.scores.get("iterations", 1)
    memory = memory_of(facts, model, student, stages, length=length, rows=recipe.scores.get("batch_size", 8))
    memory += 0 if iterations == 1 else count_parameters(student) * facts.compute_bytes  # of the round before
    return StageCost("score", iterations * seconds + START_SECONDS, memory, 0.0, formula)


def _search(facts: Facts, number: int) -> StageCost:
    """The first round distils all candidates; each later one half of them on twice the tokens in all."""
    from .actions import search_arguments

    given = search_arguments(facts.recipe)
    candidates, rounds = given.get("num_candidates", 8), given.get("num_rounds", 3)
    tokens, measured = given.get("num_tokens", 1_000_000), given.get("num_pruned", 32)
    length = given.get("max_length") or default_max_length(facts.teacher)
    trained = sum(candidates / 2**turn * tokens * (1 if turn == 0 else 2 ** (turn - 1)) for turn in range(rounds))
    seconds = trained * _seconds_per_token(facts, facts.teacher, length, lora=False)
    seconds += measured * given.get("num_rows", 32) * length * _forward_seconds(facts, facts.teacher, length)
    disk = costs.checkpoint_bytes(count_parameters(facts.teacher))
    memory = max(
        memory_of(facts, facts.teacher, facts.teacher, ["compare shapes"], length=length),
        training_memory(facts, facts.teacher, facts.teacher, facts.arguments[-1], length),
    )
    return StageCost("search", seconds, memory, disk, f"up to {trained:,.0f} tokens of distillation")


def _plan(facts: Facts, number: int) -> StageCost:
    """Nothing to compute, unless shapes are measured for a target."""
    recipe, model, *_ = facts.in_round(number)
    if not recipe.pruner_config.targets:
        return StageCost("plan", START_SECONDS, 0.0, 0.0, "no weights")
    length = recipe.scores.get("max_length") or default_max_length(model)
    passes = 2 if recipe.pruner_config.repair else 1
    tokens = TARGET_SHAPES * TARGET_ROWS * length * passes
    seconds = tokens * _forward_seconds(facts, model, length)
    stages = ["compare shapes", *(["repair", "prune, repaired"] if recipe.pruner_config.repair else [])]
    memory = memory_of(facts, model, facts.students[number], stages, length=length, num_rows=TARGET_ROWS)
    return StageCost("plan", seconds, memory, 0.0, f"up to {TARGET_SHAPES} shapes on {TARGET_ROWS} rows each")


def _prune(facts: Facts, number: int) -> StageCost:
    """P × stored bytes / disk traffic; of a repair, its passes, products, solutions and sums (`costs.repair_cost`)."""
    recipe, model, student, _ = facts.in_round(number)
    disk = count_parameters(student) * facts.stored_bytes
    seconds, formula = START_SECONDS + disk / facts.machine.disk_traffic, "writes the student"
    repair = recipe.pruner_config.repair
    if not repair:
        memory = pruning_memory(facts, recipe, model, student)
    else:
        rows, length = _calibration(facts, number)
        batch = recipe.scores.get("batch_size", 8)
        before, after = (spec_for(one).sizes(one)["layers"] for one in (model, student))
        gaps = min(1, before - after) if recipe.pruner_config.contiguous else before - after
        streamed = recipe.stream_weights
        seconds += repair_seconds(facts, model, student, repair, (rows, length, batch), gaps, streamed=streamed)
        formula = f"repair on {rows:,} × {length:,} tokens; {formula}"
        load = {
            "repair": repair,
            "num_gaps": gaps,
            "memory_limit": repair_limit(facts),
            "is_rotated": bool(recipe.pruner_config.hidden_basis),
        }
        stages = ["repair, streamed", "prune, streamed"] if streamed else ["repair", "prune, repaired"]
        memory = memory_of(facts, model, student, stages, length=length, rows=batch, calibration_rows=rows, **load)
    return StageCost("prune", seconds, memory, disk, formula)


def _correct(facts: Facts, number: int) -> StageCost:
    """N × (three forward passes of the teacher and its head) / training speed."""
    section = facts.recipe.teacher_correction
    assert section is not None
    length = row_length(section.arguments.get("max_length", 1024), facts.teacher)
    lora = section.method != "full"
    flops = costs.training_flops(facts.teacher, length, lora=lora)
    per_token = flops / facts.machine.training_flops
    per_token += costs.loss_flops(None, facts.teacher, trains_head=not lora) / facts.machine.product_flops
    size = count_parameters(facts.teacher)
    disk = size * facts.stored_bytes + (0 if lora else costs.checkpoint_bytes(size))
    stage = {"full": "correct", "lora": "correct by LoRA", "norms": "correct norms"}[section.method]
    rows = section.arguments.get("per_device_train_batch_size", 8)
    memory = memory_of(facts, facts.teacher, facts.teacher, [stage], length=length, rows=rows)
    seconds = START_SECONDS + section.num_tokens * per_token
    return StageCost("correct", seconds, memory, disk, f"{section.num_tokens:,} tokens of training")


def _cache(facts: Facts, number: int) -> StageCost:
    """N × the teacher's forward pass with its head; N × `bytes_per_position`."""
    from ..distillation.cache_coding import bytes_per_position

    section = facts.recipe.teacher_cache
    assert section is not None
    length = facts.length(-1)
    tokens = facts.tokens("train") + evaluated_tokens(facts, facts.arguments[-1], length)
    vocab_size = facts.teacher.get_text_config().vocab_size
    disk = tokens * bytes_per_position(
        vocab_size, top_k=section.kept, num_draws=section.num_draws, dtype=section.dtype
    )
    seconds = START_SECONDS + tokens * _forward_seconds(facts, facts.teacher, length)
    seconds += disk / facts.machine.disk_traffic
    if section.server is not None:
        sent = tokens * (section.most_tokens + 1) * JSON_BYTES
        what = f"{tokens:,.0f} tokens, as fast as the server; it sends about {byte_size(sent)}"
        return StageCost("cache", UNKNOWN, 0.0, disk, what)
    rows = facts.arguments[-1].per_device_eval_batch_size
    drawn = section.num_draws is not None
    load = {"length": length, "rows": rows, "top_k": section.most_tokens, "drawn": drawn}
    memory = memory_of(facts, facts.teacher, facts.teacher, ["cache"], **load)
    what = f"at most {section.most_tokens} drawn" if drawn else f"top {section.kept}"
    return StageCost("cache", seconds, memory, disk, f"{tokens:,.0f} tokens, {what}")


def _distill(facts: Facts, number: int) -> StageCost:
    """S × (N of a step × operations / speed + 28·P / memory traffic), evaluations, and checkpoints of 12·P bytes."""
    if number not in facts.trained:
        facts.trained[number] = _training_cost(facts, number)
    return facts.trained[number]


def _training_cost(facts: Facts, number: int) -> StageCost:
    recipe, _, student, args = facts.in_round(number)
    length, size = facts.length(number), count_parameters(student)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    corpus, batch = facts.corpora["train"], 1 if args.padding_free else args.per_device_train_batch_size
    filled, number_of_rows = (length, math.nan) if corpus is None else corpus.rows(length, args.packing, batch)
    steps = float(args.max_steps)
    if steps <= 0:
        steps = args.num_train_epochs * number_of_rows / (rows * num_processes(recipe))
    lora, frozen = recipe.lora is not None, args.freeze_embeddings
    trained = count_parameters(student, embeddings=False) if frozen else size
    seconds = steps * rows * filled * _seconds_per_token(facts, student, length, lora=lora, trains_head=not frozen)
    seconds += 0 if lora else steps * costs.optimizer_bytes(trained) / facts.machine.memory_traffic
    formula = f"{steps:,.0f} steps of {rows:,} × {filled:,.0f} tokens"
    if _is_by_steps(args.eval_strategy) and not math.isnan(facts.tokens("eval")):
        evaluations, tokens = _times(args.eval_steps, steps), evaluated_tokens(facts, args, length)
        both = sum(_forward_seconds(facts, one, length) for one in (facts.teacher, student))
        seconds += evaluations * tokens * both
        formula += f"; {evaluations:.0f} evaluations on {tokens:,.0f}"
    kept = 0.0
    if _is_by_steps(args.save_strategy):
        saves = _times(args.save_steps, steps)
        checkpoint = costs.training_checkpoint_bytes(student, args, has_adapter=lora)
        seconds += saves * checkpoint / facts.machine.disk_traffic
        kept = checkpoint * ((args.save_total_limit or saves) + 1)  # a new one, then the old goes
    disk = size * facts.stored_bytes + kept
    memory = training_memory(facts, facts.teacher, student, args, length)
    return StageCost("distill", START_SECONDS + seconds, memory, disk, formula)


def _is_by_steps(strategy: Any) -> bool:
    return getattr(strategy, "value", strategy) == "steps"


def _times(every: float | None, steps: float) -> float:
    """How often something happens that comes every so many steps, or every such share of them."""
    return 0.0 if not every else steps / every if every >= 1 else 1 / every


def _controls(facts: Facts, number: int) -> StageCost:
    """As many distillations as there are controls."""
    one, count = _distill(facts, len(facts.students) - 1), len(facts.recipe.controls)
    return StageCost("controls", count * one.seconds, one.memory, count * one.disk, f"{count} × distill")


def _quantize(facts: Facts, number: int) -> StageCost:
    """Every copy reads and writes the student; weights take a byte or less, embeddings and head stay."""
    count = len(facts.recipe.quantize)
    inner, size = (count_parameters(facts.students[-1], embeddings=each) for each in (False, True))
    written = inner + (size - inner) * facts.stored_bytes
    seconds = count * (START_SECONDS + (size * facts.stored_bytes + written) / facts.machine.disk_traffic)
    return StageCost("quantize", seconds, size * facts.compute_bytes, count * written, f"quantised copies: {count}")


def _evaluate(facts: Facts, number: int) -> StageCost:
    """N × forward passes of all models in float32, and what is timed: speeds and drafts."""
    section, recipe = facts.recipe.evaluate, facts.recipe
    length = section.max_length or min(default_max_length(facts.teacher, 2048), 2048)
    tokens = facts.tokens("eval")
    if section.num_rows is not None:
        most = section.num_rows * length
        tokens = most if math.isnan(tokens) else min(most, tokens)
    student = facts.students[-1]
    drafts = [*facts.students, *[student] * len(recipe.quantize)]
    models = [facts.teacher, *drafts, *[student] * (1 + len(recipe.controls))]
    models += [facts.teacher] if recipe.teacher_correction is not None else []
    slower = facts.machine.product_flops / facts.machine.float32_flops
    seconds = 0.0
    for model in models:
        layers = costs.layer_flops(model, length) * max(1.0, slower) / facts.machine.forward_flops
        layers = min(layers, costs.layer_flops(model, length) / (facts.machine.float32_flops / 2))
        seconds += START_SECONDS + tokens * (layers + costs.head_flops(model) / facts.machine.float32_flops)
    seconds += sum(timing_seconds(facts, model) for model in (facts.teacher, *drafts))
    seconds += sum(draft_seconds(facts, draft) for draft in drafts)
    memory = evaluation_bytes(facts, models, length)
    formula = f"{tokens:,.0f} tokens, {len(models)} models" + (", tasks not counted" if section.tasks else "")
    return StageCost("evaluate", seconds, memory, 0.0, formula)


def _card(facts: Facts, number: int) -> StageCost:
    return StageCost("card", 5.0, 0.0, 0.0, "plots and card")


def _publish(facts: Facts, number: int) -> StageCost:
    size = count_parameters(facts.students[-1]) * facts.stored_bytes
    return StageCost("publish", UNKNOWN, 0.0, 0.0, f"uploads {byte_size(size)}")


_FORMULAS: Mapping[str, Callable[[Facts, int], StageCost]] = {
    "generate": _generate, "score": _score, "search": _search, "plan": _plan, "prune": _prune, "correct": _correct,
    "cache": _cache,
    "distill": _distill, "controls": _controls, "quantize": _quantize, "evaluate": _evaluate, "card": _card,
    "publish": _publish,
}  # fmt: skip


def _forward_seconds(facts: Facts, model: PretrainedConfig, length: int) -> float:
    """Seconds of a token's forward pass with the head."""
    layers = costs.layer_flops(model, length) / facts.machine.forward_flops
    return layers + costs.head_flops(model) / facts.machine.product_flops


def _seconds_per_token(
    facts: Facts, student: PretrainedConfig, length: int, *, lora: bool, trains_head: bool = True
) -> float:
    """Seconds of a token of distillation: the teacher's pass, the student's passes, and the loss."""
    teacher = None if facts.recipe.teacher_cache is not None else facts.teacher
    recomputed = bool(getattr(facts.arguments[-1], checkpointing_field()))
    seconds = costs.training_flops(student, length, recomputed=recomputed, lora=lora) / facts.machine.training_flops
    seconds += costs.loss_flops(teacher, student, trains_head=trains_head and not lora) / facts.machine.product_flops
    seconds += costs.LOSS_TRAFFIC * student.get_text_config().vocab_size / facts.machine.memory_traffic
    if teacher is not None:
        seconds += costs.layer_flops(teacher, length) / facts.machine.forward_flops
    return seconds
