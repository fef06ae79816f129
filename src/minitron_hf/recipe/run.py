"""`Run`: a recipe, its folder, and the models and datasets that its stages share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import tokenize_once
from ..data.images import holds_images, require_image_processor
from ..errors import DataError
from ..hardware import as_dtype, is_launched
from ..models import load_config, load_for_compute, load_processor, load_tokenizer, read_chat_template, stored_dtype
from ..pruning.iterations import CALIBRATION_ARGUMENTS
from ..pruning.plan import PruningPlan
from ..pruning.prune import prune_with_plan
from ..pruning.tokenizers import prune_tokenizer
from .corpora import Part, blend, load_corpus
from .launching import launch
from .schema import DatasetSection, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


#: The published recipe, and the complete one with secrets and paths, for other processes of the run.
RECIPE_NAME, PRIVATE_RECIPE_NAME = "recipe.yaml", "stages/recipe.private.yaml"
#: Working folders of a run, beside the published files.
STAGES_DIR, PRUNED_DIR, CONTROLS_DIR, UNFINISHED_DIR = "stages", "pruned", "controls", "unfinished.tmp"
CORRECTED_DIR, CACHE_DIR, CANDIDATES_DIR = "corrected_teacher", "teacher_cache", "candidates"
GENERATED_DIR, QUANTIZED_DIR = "generated", "quantized"


#: Where prompts stand in the recipe, by the name of the dataset.
PROMPTS: Mapping[str, str] = {"chat": "evaluate.chat.prompts", "prompts": "generate.prompts"}


def place_of(which: str) -> str:
    """Where a dataset stands in the recipe, for messages."""
    return PROMPTS.get(which, f"data.{which}")


@dataclass
class Run:
    """Holds a recipe, and its models and datasets, each loaded once when it is first needed.

    Attributes:
        recipe: the recipe; in a round, `Recipe.in_round`, whose teacher is the model to prune.
        show_progress: show progress bars.
        whole: the run that this round belongs to; the run itself if there are no rounds.
        number: which round, from 1.
        measured: lengths of corpora of `data.train` that are known already (`lineage.measured_part`).
        loaded: the models and datasets that are loaded, by their names.
    """

    recipe: Recipe
    show_progress: bool = True
    whole: Run = None  # type: ignore[assignment] # set below
    number: int = 1
    measured: dict[Any, Any] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = self.whole or self

    def in_round(self, number: int) -> Run:
        """The run of one round. Only one round's models are kept in memory."""
        current = self.loaded.get("round")
        if current is None or current.number != number:
            self.loaded["round"] = Run(self.recipe.in_round(number), self.show_progress, self, number)
        return self.loaded["round"]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.output_dir)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What is loaded under a name, which is made at the first call."""
        if key not in self.loaded:
            self.loaded[key] = make()
        return self.loaded[key]

    def release(self, key: str) -> None:
        """Free a loaded model or dataset; it is loaded again when needed."""
        self.loaded.pop(key, None)

    def release_teachers(self) -> None:
        """Free every model that was loaded, of this round and of the whole run."""
        for key in ("teacher", "distillation_teacher"):
            self.release(key)
            self.whole.release(key)

    @property
    def teacher_config(self) -> PretrainedConfig:
        """The teacher's config, as in its checkpoint."""
        section = self.recipe.teacher
        return self.once("config", lambda: load_config(section.model, revision=section.revision))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model to prune, with the chat template that the recipe names.

        It is one object for all rounds until one of them has cut the vocabulary.
        """
        if self is not self.whole:
            cut = earlier_cut(self)
            own = None if cut is None else self.once("tokenizer", lambda: prune_tokenizer(self.whole.tokenizer, cut))
            return own or self.whole.tokenizer
        section, path = self.recipe.teacher, self.recipe.distill.get("chat_template_path")

        def load() -> PreTrainedTokenizerBase:
            tokenizer = load_tokenizer(section.model, revision=section.revision)
            if path is not None:
                tokenizer.chat_template = read_chat_template(path, "distill.chat_template_path")
            return tokenizer

        return self.once("tokenizer", load)

    @property
    def teacher(self) -> PreTrainedModel:
        """The model to score and prune, with its weights as stored: the teacher, or the student before."""
        section = self.recipe.teacher
        if self is not self.whole and self.number == 1:
            return self.whole.teacher
        dtype = None if self.narrows_weights else section.dtype
        return self.once("teacher", lambda: load_for_compute(section.model, dtype=dtype, revision=section.revision))

    @property
    def distillation_teacher(self) -> PreTrainedModel:
        """The teacher of the distillation: the (corrected) teacher, or the student of the previous round."""
        if self is not self.whole and not self.learns_from_previous:
            return self.whole.distillation_teacher
        corrected = self is self.whole and self.recipe.teacher_correction is not None
        if not corrected and not self.narrows_weights:
            return self.teacher
        section = self.recipe.teacher
        if corrected:
            return self.once("distillation_teacher", lambda: self.load(self.folder / CORRECTED_DIR))
        return self.once("distillation_teacher", lambda: self.load(section.model, revision=section.revision))

    @property
    def learns_from_previous(self) -> bool:
        """Whether the teacher of this round is the student of the previous round."""
        return self.number > 1 and self.whole.recipe.rounds[self.number - 1].teacher == "previous"

    def distillation_teacher_path(self, settings: dict[str, Any]) -> str:
        """Name of the teacher of the distillation; the trainer loads it with `settings`."""
        self.release_teachers()
        if self is not self.whole and not self.learns_from_previous:
            return self.whole.distillation_teacher_path(settings)
        section = self.recipe.teacher
        corrected = self is self.whole and self.recipe.teacher_correction is not None
        where = {} if corrected or section.revision is None else {"revision": section.revision}
        given = settings.get("teacher_model_init_kwargs") or {}
        dtype = {} if section.dtype == "auto" else {"dtype": section.dtype}
        settings["teacher_model_init_kwargs"] = {**dtype, **where, **given}
        return str(self.folder / CORRECTED_DIR) if corrected else section.model

    def load(self, path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
        """Load a model for computing, in the dtype that the recipe names."""
        return load_for_compute(path, dtype=self.recipe.teacher.dtype, **kwargs)

    @property
    def narrows_weights(self) -> bool:
        """Whether the recipe's dtype is narrower than the stored one: used for computing, never for pruning."""
        import torch

        wanted, stored = self.recipe.teacher.dtype, stored_dtype(self.teacher_config)
        if wanted == "auto":
            return False
        return stored is None or torch.promote_types(stored, as_dtype(wanted)) != as_dtype(wanted)

    @property
    def starts_processes(self) -> bool:
        """Whether models are trained in other processes than this one."""
        return self.recipe.distributed is not None and not is_launched()

    def start_processes(self, *arguments: str | os.PathLike[str]) -> None:
        """Run a command in the recipe's processes, after this process has released its models."""
        import torch

        section = self.recipe.distributed
        assert section is not None
        self.release_teachers()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        quiet = [] if self.show_progress else ["--quiet"]
        given = [*arguments, *quiet, *([] if self is self.whole else [f"--round={self.number}"])]
        launch([os.fspath(argument) for argument in given], section.config, section.num_processes)

    def dataset(self, which: str) -> Any:
        """One of the recipe's corpora, or its prompts: `train`, `eval`, `calibration`, `chat` or `prompts`."""
        if self is not self.whole:
            return self.whole.dataset(which)
        if which == "calibration" and self.recipe.data.calibration is None:
            which = "train"
        if which == "train":
            return self.once("data.train", self._training_corpus)
        section = self.dataset_section(which)
        return self.once(f"data.{which}", lambda: load_corpus(section, place_of(which)))

    def part(self, number: int) -> Any:
        """One of the corpora of `data.train`, counted from 0."""
        data = self.recipe.data
        section, where = data.parts[number].dataset(str(self.folder / GENERATED_DIR)), data.place(number)
        return self.once(f"data.train.{number}", lambda: load_corpus(section, where, streaming=data.streaming))

    def _training_corpus(self) -> Any:
        data = self.recipe.data
        if not data.is_blend:
            return self.part(0)
        datasets = [self.part(number) for number in range(len(data.parts))]
        firsts: list[Mapping[str, Any]] = []
        for number, one in enumerate(datasets):
            if (first := next(iter(one), None)) is None:
                raise DataError(f"{data.place(number)}: the corpus has no rows. Name another split or file.")
            firsts.append(first)
        known = [Part(data.place(number), first, data.parts[number].text_field) for number, first in enumerate(firsts)]
        return blend(datasets, known, data.probabilities, seed=data.seed, stopping_strategy=data.stopping_strategy)

    def dataset_section(self, which: str) -> DatasetSection:
        """The section of a dataset other than the training corpus."""
        if which == "chat":
            assert self.recipe.evaluate.chat is not None
            return self.recipe.evaluate.chat.prompts
        if which == "prompts":
            assert self.recipe.generate is not None
            assert self.recipe.generate.prompts is not None
            return self.recipe.generate.prompts
        section: DatasetSection = getattr(self.recipe.data, which)
        return section

    def text_field(self, which: str) -> str:
        """The column with the text of one of the corpora. Blends have their own."""
        data = self.recipe.data
        if which == "train" or (which == "calibration" and data.calibration is None):
            return "text" if data.is_blend else data.parts[0].text_field
        return self.dataset_section(which).text_field

    def texts(self, which: str) -> Any:
        """The documents of one of the corpora. All stages with the same tokenizer share their tokens, computed once.

        Of the held-out text, the tokens that the distillation counts are measured. Importance scores use all tokens.
        """
        if self is not self.whole and earlier_cut(self) is None:
            return self.whole.texts(which)

        def wrap() -> Any:
            rows = self.dataset(which)
            turns = which == "eval" and self.recipe.measures_turns
            return tokenize_once(rows, self.tokenizer, self.text_field(which), turns)

        return self.once(f"texts.{which}", wrap)

    def prune_with_plan(self, plan: PruningPlan, *, verify: bool = False) -> Any:
        """Build the student of a plan; a plan with repair refits it on the calibration data."""
        repair = repair_arguments(self, plan)
        return prune_with_plan(self.teacher, plan, verify=verify, show_progress=self.show_progress, **repair)

    @property
    def plan(self) -> PruningPlan:
        """The plan that the stage `plan` wrote."""
        return PruningPlan.from_pretrained(self.folder)

    @property
    def plans(self) -> list[PruningPlan]:
        """The plans of all rounds between the teacher of the distillation and the student."""
        if self is self.whole:
            return [self.plan]
        first = self.number if self.learns_from_previous else 1
        folders = [Path(self.whole.recipe.in_round(number).output_dir) for number in range(first, self.number + 1)]
        return [PruningPlan.from_pretrained(folder) for folder in folders]


def earlier_cut(run: Run) -> PruningPlan | None:
    """The plan of the round before this one that has cut the vocabulary; None if none has."""
    before = run.whole.recipe.each_round()[: run.number - 1]
    cut = next((one for one in before if one.pruner_config.vocab_size is not None), None)
    return None if cut is None else PruningPlan.from_pretrained(cut.output_dir)


def processor_of(run: Run) -> Any:
    """The processor of images and text in the teacher's folder, with the tokenizer's chat template.

    After a round that has cut the vocabulary, it is the student's.
    """
    whole = run.whole
    section, path = whole.recipe.teacher, whole.recipe.distill.get("chat_template_path")

    def load() -> Any:
        processor = load_processor(section.model, revision=section.revision)
        require_image_processor(processor)
        if path is not None:
            processor.chat_template = read_chat_template(path, "distill.chat_template_path")
        if processor.tokenizer.get_vocab() == whole.tokenizer.get_vocab():
            processor.tokenizer = whole.tokenizer  # one object, which all corpora are read with
        return processor

    processor, cut = whole.once("processor", load), earlier_cut(run)
    return processor if cut is None else run.once("processor", lambda: prune_tokenizer(processor, cut))


def has_images(run: Run, *which: str) -> bool:
    """Whether some of the corpora have images, by their first rows."""
    whole = run.whole
    return any(whole.once(f"images.{one}", partial(_holds_images, whole, one)) for one in which)


def _holds_images(run: Run, which: str) -> bool:
    return holds_images(run.dataset(which))


def reader_of(run: Run, *which: str) -> Any:
    """What reads some of the corpora: the processor, if one of them has images; else the tokenizer."""
    return processor_of(run) if has_images(run, *which) else run.tokenizer


def repair_arguments(run: Run, plan: PruningPlan) -> dict[str, Any]:
    """The calibration data of a plan's repair, and how to cut it into rows; nothing for a plan without."""
    if not plan.repair:
        return {}
    rows = {name: value for name, value in run.recipe.scores.items() if name in CALIBRATION_ARGUMENTS}
    read = {"data": run.texts("calibration"), "processing_class": reader_of(run, "calibration")}
    return {**read, **rows}
