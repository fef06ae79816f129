"""The sections of a recipe. Unknown and mistyped entries are refused by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import DataError
from ..privacy import public_settings
from ..quantization import METHODS, quantised_name
from ..sizes.request import TARGETS, PrunerConfig
from .corpus_sections import ChatSection as ChatSection
from .corpus_sections import DataSection as DataSection
from .corpus_sections import DatasetSection as DatasetSection
from .corpus_sections import GenerateSection as GenerateSection
from .corpus_sections import TrainingSection as TrainingSection
from .reading import apply_overrides, read_yaml, write_yaml
from .rules import require_choice
from .sections import built_section

#: Controls that a run can train with the student's distillation settings, for comparison.
CONTROLS: Mapping[str, str] = {
    "random_pruning": "the same sizes, units and layers kept at random",
    "random_init": "the same sizes, weights initialised at random",
    "cross_entropy": "the same pruned student, retrained with cross-entropy instead of distillation",
}


@dataclass(frozen=True)
class TeacherSection:
    """The model to compress.

    Attributes:
        model: Hub id or folder.
        revision: branch, tag or commit.
        dtype: dtype in which the teacher computes. "auto": the checkpoint's dtype, or float32 if the hardware is slow
            in it. Only distillation and evaluation use a narrower dtype; the weights are scored and pruned as stored.
    """

    shorthand: ClassVar[str] = "model"
    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True)
class CorrectionSection:
    """Fine-tuning of the teacher on the training corpus before the student learns from it (`correct_teacher`).

    To correct the teacher during distillation instead, set `distill.teacher_correction: concurrent`.

    Attributes:
        original_learning_rate: peak learning rate of the teacher's own training; a fifth of it is used.
        num_tokens: number of training tokens.
        method: `"full"`, `"lora"` or `"norms"`.
        arguments: fields of `trl.SFTConfig`.
    """

    original_learning_rate: float
    num_tokens: int
    method: Literal["full", "lora", "norms"] = "full"
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheSection:
    """The teacher's distributions, stored on disk before distillation (`cache_teacher_logits`).

    Distillation, and every control, then needs no teacher in memory.

    Attributes:
        top_k: number of most likely tokens to store per position; None: 64, or none with `num_draws`.
        num_draws: number of draws from the teacher's distribution per position, stored instead of the most likely
            tokens; for `divergence: forward_kl` only.
        dtype: dtype of the stored log-probabilities, `"float16"`, `"float32"` or, packed, `"fixed12"`.
        server: address of a vLLM server that offers the teacher, such as `http://localhost:8000`; None: the teacher is
            loaded. With `top_k` only.
        server_model: the server's name of the teacher; None: its only model.
    """

    top_k: int | None = None
    num_draws: int | None = None
    dtype: Literal["float16", "float32", "fixed12"] = "float16"
    server: str | None = None
    server_model: str | None = None

    @property
    def kept(self) -> int | None:
        """Most likely tokens per position; None of drawn ones."""
        return 64 if self.top_k is None and self.num_draws is None else self.top_k

    @property
    def most_tokens(self) -> int:
        """Tokens per position, at most."""
        return self.kept or (self.num_draws or 0) + 1

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the contents: whether there is a server, not its address."""
        return {**asdict(self), "top_k": self.kept, "server": self.server and "served"}


@dataclass(frozen=True)
class DistributedSection:
    """Several processes for the stages that train, started by `accelerate launch`. The other stages use one process.

    Attributes:
        config: name of a packaged Accelerate configuration (`ddp`, `fsdp2`, `zero2`, `zero3`), or a file.
        num_processes: number of processes; None: one per accelerator.
    """

    config: str
    num_processes: int | None = None


@dataclass(frozen=True)
class EvaluateSection:
    """The final measurement.

    Attributes:
        max_length: tokens in a row.
        num_rows: stop reading after the document that completes so many rows; all of its rows are measured, so that
            bits per byte are exact. None: read all.
        batch_size: rows per batch.
        speed: measure prefill and decode speed of the teacher, the students of all rounds and the quantised copies.
            The other models are as fast as one of these.
        speed_batch_sizes: numbers of prompts at a time to time, beside one prompt.
        speed_prompt_tokens: lengths of prompts to time, beside one of up to 512 tokens.
        tasks: lm-evaluation-harness tasks, or the presets `minitron`, `minitron_code` and `small` (needs the extra
            `eval`).
        task_models: models that do the tasks; None: the teacher, the student and its quantised copies (`student_int8`,
            …). Others are `pruned`, `corrected_teacher`, `round_1`, … and the controls by name.
        task_limit: number of examples per task, or a fraction below 1.
        num_fewshot: number of few-shot examples in the prompts of tasks; None: the preset's, or each task's default.
        include_path: folder with further task files.
        task_data: folder with documents of stock tasks, `TASK.jsonl`, to read instead of the Hub.
        confirm_run_unsafe_code: run tasks that execute code which the models write. Use a container.
        apply_chat_template: format the tasks' prompts with the tokenizer's chat template.
        draft_prompts: rows of held-out text that the teacher continues with every other model that is timed as its
            draft; None: drafts are not measured.
        draft_tokens: tokens that a draft proposes at a time.
        prompts: prompts to complete for the model card.
        chat: prompts that the models answer under the chat template; None: chat is not measured.
    """

    max_length: int | None = None
    num_rows: int | None = None
    batch_size: int = 8
    speed: bool = True
    speed_batch_sizes: list[int] = field(default_factory=list)
    speed_prompt_tokens: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    task_models: list[str] | None = None
    task_limit: float | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    task_data: str | None = None
    confirm_run_unsafe_code: bool = False
    apply_chat_template: bool = False
    draft_prompts: int | None = None
    draft_tokens: int = 5
    prompts: list[str] = field(default_factory=list)
    chat: ChatSection | None = None


@dataclass(frozen=True)
class PublishSection:
    """The Hub repository of the student.

    Attributes:
        repo_id: "owner/name".
        private: make a new repository private.
        revision: branch to push to.
        create_pr: open a pull request instead of committing to the branch.
        tag: name for the commit, such as `v1`.
        collection: title of a collection of the owner that gets teacher, student and quantised copies.
        quantized: also publish the copies that `quantize` writes, each in a repository of its own.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    collection: str | None = None
    quantized: bool = False

    def given(self) -> dict[str, Any]:
        """The entries as arguments of `push_student_to_hub`, those that changed nothing before they existed aside."""
        later = ("create_pr", "tag", "collection", "quantized")
        return {name: value for name, value in asdict(self).items() if value or name not in later}


#: Folder of the students of all rounds but the last, in the run folder.
ROUNDS_DIR = "rounds"
#: The teachers that a round can have.
ROUND_TEACHERS = ("original", "previous")


@dataclass(frozen=True)
class RoundSection:
    """One of several rounds of pruning and distillation. Its entries are added to the recipe's or replace them.

    Attributes:
        prune: fields of `PrunerConfig`. Fractions refer to the student of the previous round.
        scores: arguments of `estimate_importance`.
        distill: fields of `DistillationConfig`. By default, each round reads the corpus in another order.
        teacher: teacher of the round. `"original"` is the recipe's teacher, after its correction if the recipe has
            one; `"previous"` is the student of the previous round.
    """

    prune: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    teacher: str = "original"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run.

    Attributes:
        teacher: the model to compress.
        data: the corpora.
        output_dir: the run folder.
        prune: fields of `PrunerConfig`.
        search: arguments of `search_architectures`, such as `space` and a budget. The sizes that it finds are added to
            `prune`. It uses the settings of `distill`, but trains briefly and at a constant learning rate. None: no
            search.
        rounds: several rounds of pruning and distillation, from large to small; empty: one round.
        verify: compare the pruned student with the masked teacher before training (`verify_student`). This loads both
            into memory.
        stream_weights: read the teacher layer by layer from its files (`prune_checkpoint`) for a repair or a change of
            basis, too, instead of loading it. The student is the same, and a repair takes about twice as long.
        scores: arguments of `estimate_importance`.
        generate: training text that the teacher writes itself, for `data.train`; None: no such text.
        teacher_correction: fine-tune the teacher on the corpus before distillation; None: no correction.
        teacher_cache: the teacher's distributions, precomputed on disk; None: the teacher runs during distillation.
        distill: fields of `DistillationConfig`; they override `DISTILL_DEFAULTS`.
        lora: fields of `peft.LoraConfig`; the adapter is merged into the student. None: train all weights.
        controls: controls to train with the student's settings: `random_pruning`, `random_init` (which trains its
            embeddings, too, if `freeze_embeddings` is set; not with `lora`), `cross_entropy`.
        quantize: methods of `quantize_checkpoint` (`int8`, `int4`, `bnb_int8`, `bnb_nf4`): quantised copies of the
            student, in the folder `quantized`, which are measured beside it.
        distributed: several processes for the stages that train; None: one process. The results do not depend on it.
        evaluate: the final measurement.
        publish: the Hub repository; None: nothing is uploaded.
    """

    teacher: TeacherSection
    data: DataSection
    output_dir: str
    prune: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    rounds: list[RoundSection] = field(default_factory=list)
    verify: bool = False
    stream_weights: bool = False
    scores: dict[str, Any] = field(default_factory=dict)
    generate: GenerateSection | None = None
    teacher_correction: CorrectionSection | None = None
    teacher_cache: CacheSection | None = None
    distill: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    controls: list[str] = field(default_factory=list)
    quantize: list[str] = field(default_factory=list)
    distributed: DistributedSection | None = None
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    publish: PublishSection | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from nested mappings.

        Raises:
            DataError: naming every unknown, missing or mistyped entry.
        """
        recipe = built_section(cls, values, "")
        _require_one_choice(recipe)
        recipe.data.require_possible(has_generated=recipe.generate is not None)
        for place, name in enumerate(recipe.controls):
            require_choice(name, CONTROLS, f"controls[{place}]")
        for place, name in enumerate(recipe.quantize):
            require_choice(name, METHODS, f"quantize[{place}]")
        for where, names in (("controls", recipe.controls), ("quantize", recipe.quantize)):
            if len(set(names)) < len(names):
                raise DataError(f"{where}={names}: expected each name once.")
        if recipe.lora is not None and "random_init" in recipe.controls:
            raise DataError(
                "controls: random_init trains all weights, and with lora only an adapter on random ones. Leave out "
                "one of them."
            )
        for number, one in enumerate(recipe.rounds, 1):
            require_choice(one.teacher, ROUND_TEACHERS, f"rounds.{number}.teacher")
            if one.teacher == "previous" and recipe.teacher_cache is not None:
                raise DataError(
                    f"rounds.{number}.teacher='previous': teacher_cache holds the logits of the original teacher. "
                    "Leave out one of them."
                )
        return recipe

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: list[str] | None = None) -> Recipe:
        """Read a recipe file.

        Args:
            path: the file.
            overrides: `"section.key=value"`, the value in YAML; applied in order.

        Raises:
            DataError: if the file is missing or not a valid recipe.
        """
        try:
            values = read_yaml(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"Cannot read the recipe {path}: {error.strerror}. Check the path.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"The recipe {path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
        except DataError as error:
            raise DataError(f"The recipe {path}: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f"The recipe {path} holds no sections. Expected teacher, data, output_dir, prune, …")
        return cls.from_dict(apply_overrides(values, overrides or []))

    def to_yaml(self) -> str:
        """The recipe as YAML, with all defaults."""
        return write_yaml(asdict(self))

    def to_public_yaml(self) -> str:
        """The recipe for publication: paths are reduced to their last part; only text of listed settings is kept."""
        return write_yaml(public_settings(asdict(self)))

    def in_round(self, number: int) -> Recipe:
        """The recipe of one round. Its teacher is the student of the round before.

        Args:
            number: which round, counted from 1.
        """
        one = self.rounds[number - 1]
        folder = Path(self.output_dir) / ROUNDS_DIR
        distill = {**self.distill, **one.distill}
        if number > 1:
            # With the same order, a round that reads a part of the corpus would read the part of the previous round.
            distill = {"data_seed": int(distill.get("seed", 42)) + number - 1, **distill}
        return replace(
            self,
            teacher=self.teacher
            if number == 1
            else TeacherSection(str(folder / str(number - 1)), dtype=self.teacher.dtype),
            output_dir=self.output_dir if number == len(self.rounds) else str(folder / str(number)),
            prune={**self.prune, **one.prune},
            scores={**self.scores, **one.scores},
            distill=distill,
            rounds=[],
        )

    def each_round(self) -> list[Recipe]:
        """The recipes of all rounds; without rounds, the recipe itself."""
        return [self.in_round(number) for number in range(1, len(self.rounds) + 1)] or [self]

    def earlier_students(self) -> list[str]:
        """Names, in the evaluation, of the students of all rounds but the last."""
        return [f"round_{number}" for number in range(1, len(self.rounds))]

    def quantised_students(self) -> dict[str, str]:
        """Name, in the evaluation, of each quantised copy of the student → its method."""
        return {quantised_name(method): method for method in self.quantize}

    @property
    def measures_turns(self) -> bool:
        """Whether measurements count the assistant's turns alone, as the (last) distillation does."""
        last = self.rounds[-1].distill if self.rounds else {}
        return bool({**self.distill, **last}.get("assistant_only_loss"))

    @property
    def pruner_config(self) -> PrunerConfig:
        """The `prune` section, checked."""
        return PrunerConfig.from_dict(self.prune)


def _require_one_choice(recipe: Recipe) -> None:
    """Refuse a recipe without sizes, or with sizes from two sources."""
    search = recipe.search
    if recipe.rounds:
        if search is not None:
            raise DataError("rounds and search: leave out one. A search finds the shape of one cut.")
        prunes = (recipe.prune, *(one.prune for one in recipe.rounds))
        if given := [target for target in TARGETS if any(target in prune for prune in prunes)]:
            raise DataError(
                f"rounds need sizes: what the next one can cut has to be known. Leave out {' and '.join(given)}."
            )
        return
    if search is None:
        if not recipe.prune:
            raise DataError("The recipe lacks prune, the sizes to cut to, or search, which finds them, or rounds.")
        return
    if not isinstance(search.get("space"), Mapping) or not search["space"]:
        raise DataError("search lacks space: the sizes to try, such as {hidden_size: [0.5, 0.75]}.")
    if twice := sorted(search["space"].keys() & recipe.prune.keys()):
        raise DataError(f"{', '.join(twice)}: in prune and in search.space. Leave it out of one of them.")
    if given := [name for name in TARGETS if recipe.prune.get(name) is not None]:
        budget = given[0].replace("target", "max")
        raise DataError(f"prune.{given[0]} and search: leave out one. A search takes {budget}.")


#: Defaults of `distill`; the recipe can set any field of `DistillationConfig`. After Sreenivas et
#: al. 2024: peak learning rate 1e-4, cosine schedule, documents joined into full rows. Training evaluates often and on
#: few rows; the stage `evaluate` measures all rows once.
DISTILL_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "packing": True,
    "packing_strategy": "wrapped",
    "logging_steps": 0.02,
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "max_eval_rows": 64,
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 1,
    "report_to": "none",
}
