"""The table of stages: inputs, outputs and action of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..distillation.deciding import deciding_arguments
from ..errors import DataError, did_you_mean
from ..privacy import without_publishing
from ..pruning.candidates import SEARCH_NAME, UNFINISHED_NAME
from ..pruning.plan import INDICES_NAME, PLAN_NAME
from ..publishing.plots import PLOTS
from ..scoring.scores import SCORES_NAME
from ..sizes.request import PRUNER_CONFIG_NAME
from .actions import (
    _cache,
    _card,
    _controls,
    _correct,
    _distill,
    _evaluate,
    _generate,
    _plan,
    _prune,
    _publish,
    _quantize,
    _score,
    _search,
    cached_arguments,
    search_arguments,
)
from .identity import (
    dataset_identity,
    folder_identity,
    model_identity,
    template_identity,
    training_identity,
)
from .launching import require_launchable
from .rules import OLD_NAMES
from .run import (
    CACHE_DIR,
    CANDIDATES_DIR,
    CONTROLS_DIR,
    CORRECTED_DIR,
    GENERATED_DIR,
    PRUNED_DIR,
    QUANTIZED_DIR,
    UNFINISHED_DIR,
    Run,
)
from .schema import DISTILL_DEFAULTS, ROUNDS_DIR, Recipe

#: The stage that lets the teacher write training text; the one that trains controls; those that publish.
GENERATE, CONTROLS_STAGE, CARD, PUBLISH = "generate", "controls", "card", "publish"


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: name for `--until`.
        help: description in one line.
        inputs: stages whose results it reads; see also `inputs_in`.
        settings: the part of the recipe that it depends on.
        outputs: files or folders (relative) that exist once it is done.
        run: does the work.
        leftovers: patterns of other files that it may write; they are removed before it is repeated.
        resumable: patterns of the work that an interrupted one goes on from; it is dropped on request alone.
        wanted: whether the recipe has this stage.
        corpora: corpora of the recipe that it reads, `train` or `calibration`.
    """

    name: str
    help: str
    inputs: tuple[str, ...]
    settings: Callable[[Recipe], Any]
    outputs: tuple[str, ...]
    run: Callable[[Run], None]
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    leftovers: tuple[str, ...] = ()
    resumable: tuple[str, ...] = ()
    corpora: tuple[str, ...] = ()

    def inputs_in(self, recipe: Recipe) -> tuple[str, ...]:
        """The stages whose results it reads, with the one that writes training text if it reads that text."""
        data = recipe.data
        reads = "train" in self.corpora or ("calibration" in self.corpora and data.calibration is None)
        written = reads and any(part.generated for part in data.parts)
        quantised = ("quantize",) if self.name == "evaluate" and recipe.quantize else ()
        return (*((GENERATE,) if written else ()), *self.inputs, *quantised)

    def dependencies(self, recipe: Recipe) -> Any:
        """The settings that the results depend on, without secrets and publishing settings.

        Stages that render conversations depend on the chat template that the recipe names.
        """
        renders = bool(self.corpora) or self.name in (GENERATE, "evaluate")
        template = template_identity(recipe.distill.get("chat_template_path")) if renders else {}
        return without_publishing({**self.settings(recipe), **template} if template else self.settings(recipe))


def _generation_settings(recipe: Recipe) -> Any:
    """What decides the text that the teacher writes. The size of batches does not."""
    if recipe.generate is None:
        return None
    settings = asdict(recipe.generate)
    del settings["batch_size"]
    prompts = recipe.generate.prompts
    return {
        "teacher": {**model_identity(recipe.teacher), "dtype": recipe.teacher.dtype},
        "generate": {**settings, "prompts": None if prompts is None else dataset_identity(prompts)},
    }


def _cache_settings(recipe: Recipe) -> Any:
    """The settings that the cache depends on."""
    if recipe.teacher_cache is None:
        return None
    settings = {**DISTILL_DEFAULTS, **recipe.distill}
    cuts = recipe.pruner_config.vocab_size is not None  # the plan says which tokens the cache is over
    return {
        **({"plan": {"prune": recipe.pruner_config.to_dict(), **_scoring_settings(recipe)}} if cuts else {}),
        "teacher": model_identity(recipe.teacher),
        "teacher_cache": recipe.teacher_cache.deciding(),
        "distill": {name: settings[name] for name in cached_arguments() if name in settings},
        "train": training_identity(recipe.data),
        "eval": dataset_identity(recipe.data.eval),
        **_compute_dtype(recipe),
    }


def _distill_settings(recipe: Recipe) -> Any:
    """The arguments that the student depends on."""
    settings = {**DISTILL_DEFAULTS, **recipe.distill}
    folders = [name for name in ("eval_include_path", "eval_task_data") if name in settings]
    settings |= {name: folder_identity(settings[name]) for name in folders}
    return deciding_arguments(settings, num_processes(recipe))


def _search_settings(recipe: Recipe) -> dict[str, Any]:
    """The arguments that the shapes depend on; a search distils in one process."""
    arguments = search_arguments(recipe)
    return {**arguments, "distillation": deciding_arguments(arguments["distillation"])}


def _correction_settings(recipe: Recipe) -> Any:
    """The settings that the corrected teacher depends on. Its number of steps follows from the rows in one."""
    if recipe.teacher_correction is None:
        return None
    settings = asdict(recipe.teacher_correction)
    return {**settings, "arguments": deciding_arguments(settings["arguments"], num_processes(recipe))}


def num_processes(recipe: Recipe) -> int:
    """Number of processes that train."""
    section = recipe.distributed
    return 1 if section is None else require_launchable(section.config, section.num_processes)


def _scoring_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that scores depend on, beside the model."""
    # The layers to measure depend on the sizes to prune.
    cut = recipe.scores.keys() & {"depth_metric", "iterations"}
    old_names = {new: old for old, new in OLD_NAMES["scores"].items()}  # finished stages have recorded these
    return {
        "scores": {old_names.get(name, name): value for name, value in recipe.scores.items()},
        **({"prune": recipe.pruner_config.to_dict()} if cut else {}),
        "data": training_identity(recipe.data)
        if recipe.data.calibration is None
        else dataset_identity(recipe.data.calibration),
    }


def _evaluation_settings(recipe: Recipe) -> Any:
    settings = asdict(recipe.evaluate)
    del settings["chat"]
    settings |= {name: folder_identity(settings[name]) for name in ("include_path", "task_data")}
    if recipe.evaluate.chat is not None:
        settings["chat"] = {**asdict(recipe.evaluate.chat), "prompts": dataset_identity(recipe.evaluate.chat.prompts)}
    turns = {"assistant_only": True} if recipe.measures_turns else {}
    return {"evaluate": settings, "data": dataset_identity(recipe.data.eval), **turns, **_compute_dtype(recipe)}


def _compute_dtype(recipe: Recipe) -> dict[str, Any]:
    """The dtype in which models are computed beside training, where the recipe names one."""
    return {} if recipe.teacher.dtype == "auto" else {"dtype": recipe.teacher.dtype}


STAGES: tuple[Stage, ...] = (
    Stage(
        GENERATE,
        "let the teacher write training text",
        (),
        _generation_settings,
        (GENERATED_DIR,),
        _generate,
        lambda recipe: recipe.generate is not None,
        resumable=(f"{GENERATED_DIR}/train-*", f"{GENERATED_DIR}/.unfinished-*"),
    ),
    Stage(
        "score",
        "score heads, neurons, channels and layers of the teacher on calibration text",
        (),
        lambda recipe: {"teacher": model_identity(recipe.teacher), **_scoring_settings(recipe)},
        (SCORES_NAME,),
        _score,
        corpora=("calibration",),
    ),
    Stage(
        "search",
        "compare shapes: prune, distil a little, keep the better half",
        ("score",),
        lambda recipe: {
            "search": _search_settings(recipe),
            "prune": recipe.pruner_config.to_dict(),
            "train": training_identity(recipe.data),
            "eval": dataset_identity(recipe.data.eval),
        },
        (SEARCH_NAME,),
        _search,
        lambda recipe: recipe.search is not None,
        (CANDIDATES_DIR,),
        (f"{CANDIDATES_DIR}/*/checkpoint-*",),
        ("train",),
    ),
    Stage(
        "plan",
        "choose the units and layers to keep",
        ("score", "search"),
        lambda recipe: {"prune": recipe.pruner_config.to_dict()},
        (PRUNER_CONFIG_NAME, PLAN_NAME, INDICES_NAME),
        _plan,
        leftovers=(UNFINISHED_NAME,),
    ),
    Stage(
        "prune",
        "build the student from the plan",
        ("plan",),
        lambda recipe: {"verify": True} if recipe.verify else {},
        (PRUNED_DIR,),
        _prune,
    ),
    Stage(
        "correct",
        "fine-tune the teacher on the corpus",
        (),
        lambda recipe: {
            "teacher": model_identity(recipe.teacher),
            "teacher_correction": _correction_settings(recipe),
            "train": training_identity(recipe.data),
        },
        (CORRECTED_DIR,),
        _correct,
        lambda recipe: recipe.teacher_correction is not None,
        resumable=(f"{CORRECTED_DIR}/checkpoint-*",),
        corpora=("train",),
    ),
    Stage(
        "cache",
        "store the teacher's top-k logits for the corpora",
        ("correct",),
        _cache_settings,
        (CACHE_DIR,),
        _cache,
        lambda recipe: recipe.teacher_cache is not None,
        resumable=(f"{CACHE_DIR}/*/data-*",),
        corpora=("train",),
    ),
    Stage(
        "distill",
        "train the student to predict like the teacher",
        ("prune", "correct", "cache"),
        lambda recipe: {
            "distill": _distill_settings(recipe),
            "lora": recipe.lora,
            "train": training_identity(recipe.data),
            "eval": dataset_identity(recipe.data.eval),
            **_compute_dtype(recipe),
        },
        ("config.json", "distillation.json"),
        _distill,
        leftovers=("checkpoint-*", "model*.safetensors*", UNFINISHED_DIR),
        resumable=("checkpoint-*",),
        corpora=("train",),
    ),
    Stage(
        CONTROLS_STAGE,
        "train the controls with the same settings",
        ("distill",),
        lambda recipe: {"controls": recipe.controls},
        (CONTROLS_DIR,),
        _controls,
        lambda recipe: bool(recipe.controls),
        resumable=(f"{CONTROLS_DIR}/*/checkpoint-*", f"{CONTROLS_DIR}/*/config.json"),
    ),
    Stage(
        "quantize",
        "quantise the weights of the student",
        ("distill",),
        lambda recipe: {"quantize": recipe.quantize},
        (QUANTIZED_DIR,),
        _quantize,
        lambda recipe: bool(recipe.quantize),
    ),
    Stage(
        "evaluate",
        "measure teacher, pruned and distilled student side by side",
        ("distill", "controls"),
        _evaluation_settings,
        ("evaluation.json",),
        _evaluate,
        leftovers=("samples.json", "benchmarks.json"),
    ),
    Stage(
        CARD,
        "draw the plots, write the report and the model card",
        ("evaluate",),
        lambda recipe: {},
        ("README.md", "report.html"),
        _card,
        leftovers=tuple(f"plots/{name}" for name in PLOTS),
    ),
    Stage(
        PUBLISH,
        "upload everything to the Hub in one commit",
        (CARD,),
        lambda recipe: None if recipe.publish is None else recipe.publish.given(),
        (),
        _publish,
        lambda recipe: recipe.publish is not None,
    ),
)
#: Stages of every round, and stages that run once before the first distillation. The others run at the end.
ROUND_STAGES, TEACHER_STAGES = ("score", "plan", "prune", "distill"), (GENERATE, "correct", "cache")


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe in their order; those of rounds before the last are called `1/score`, `1/plan`, …"""
    last = len(recipe.rounds)
    if not last:
        return STAGES
    stages = []
    for number, stage in itertools.product(range(1, last + 1), STAGES):
        if stage.name in ROUND_STAGES:
            stages.append(_in_round(stage, number, last))
        elif number == (1 if stage.name in TEACHER_STAGES else last):
            stages.append(stage)
    return tuple(stages)


def stages_until(recipe: Recipe, until: str | None = None) -> list[Stage]:
    """The stages of a recipe, up to the last one to run.

    Raises:
        DataError: if there is no such stage, or the recipe does not ask for it.
    """
    names = [stage.name for stage in stages_of(recipe)]
    wanted = [stage for stage in stages_of(recipe) if stage.wanted(recipe)]
    if until is None:
        return wanted
    if until not in names:
        raise DataError(
            f"There is no stage {until!r}.{did_you_mean(until, names)} Expected one of {', '.join(names)}."
        )
    if until not in [stage.name for stage in wanted]:
        raise DataError(
            f"The recipe does not ask for the stage {until!r}. It has {', '.join(stage.name for stage in wanted)}."
        )
    return wanted[: [stage.name for stage in wanted].index(until) + 1]


def _in_round(stage: Stage, number: int, last: int) -> Stage:
    """A stage as a part of one of several rounds; the last one's files are at the root of the run folder."""

    def prefix(which: int) -> str:
        return f"{which}/" if which < last else ""

    def settings(recipe: Recipe) -> Any:
        own = recipe.in_round(number)
        if number == 1:
            return stage.settings(own)
        if stage.name == "score":  # the scored model is the output of earlier stages
            return _scoring_settings(own)
        teacher = recipe.rounds[number - 1].teacher
        changed = {"teacher": teacher} if stage.name == "distill" and teacher != "original" else {}
        return {**stage.settings(own), **changed}

    before = (f"{prefix(number - 1)}distill",) if stage.name == "score" and number > 1 else ()
    folder = f"{ROUNDS_DIR}/{number}/" if number < last else ""
    return replace(
        stage,
        name=prefix(number) + stage.name,
        inputs=(*before, *(prefix(number) + name if name in ROUND_STAGES else name for name in stage.inputs)),
        settings=settings,
        outputs=tuple(folder + output for output in stage.outputs),
        leftovers=tuple(folder + pattern for pattern in stage.leftovers),
        resumable=tuple(folder + pattern for pattern in stage.resumable),
        run=lambda run: stage.run(run.in_round(number)),
    )
