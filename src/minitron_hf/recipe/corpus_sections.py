"""The sections of a recipe that name text: corpora, blends of corpora, prompts, and text that the teacher writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import DataError


@dataclass(frozen=True)
class DatasetSection:
    """A dataset: a local file, a saved dataset folder or a Hub id. A plain string in YAML means `source`.

    Attributes:
        source: path or Hub id.
        name: configuration name.
        split: split of the dataset, also a slice such as `train[:1%]`.
        revision: Hub revision.
        text_field: column with the text.
        num_rows: use the first rows only.
    """

    shorthand: ClassVar[str] = "source"
    source: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    num_rows: int | None = None


@dataclass(frozen=True)
class TrainingSection:
    """A corpus to train on, alone or as one of several. A plain string in YAML means `source`.

    Attributes:
        source: path or Hub id.
        generated: the text of the section `generate`, instead of a source.
        weight: of several corpora, the weight of this one: a row is drawn from it with probability weight / sum of
            all weights. These are shares of rows (documents, conversations), not of tokens.
        name: configuration name.
        split: split of the dataset, also a slice such as `train[:1%]`.
        revision: Hub revision.
        text_field: column with the text.
        num_rows: use the first rows only.
    """

    shorthand: ClassVar[str] = "source"
    source: str | None = None
    generated: bool = False
    weight: float = 1.0
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    num_rows: int | None = None

    def dataset(self, generated: str) -> DatasetSection:
        """The dataset to read.

        Args:
            generated: folder of the text that the teacher writes.
        """
        source = generated if self.source is None else self.source
        return DatasetSection(source, self.name, self.split, self.revision, self.text_field, self.num_rows)


@dataclass(frozen=True)
class DataSection:
    """The corpora of a run.

    Attributes:
        train: corpus for distillation; or a list of several, whose rows are drawn by weight
            (`datasets.interleave_datasets`).
        eval: held-out text for the trainer's evaluation and the final measurement.
        calibration: calibration data for importance scores; default: the beginning of `train`.
        streaming: read `train` row by row while it is used, instead of as a whole before. Needs `distill.max_steps`.
        stopping_strategy: when a pass over several corpora ends: `"all_exhausted"` once every row was drawn, so that
            small corpora are repeated; `"first_exhausted"` once one of the corpora ends, so that rows of the others
            are never read.
        seed: seed of the draws among several corpora.
    """

    train: TrainingSection | list[TrainingSection]
    eval: DatasetSection
    calibration: DatasetSection | None = None
    streaming: bool = False
    stopping_strategy: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    seed: int = 0

    @property
    def parts(self) -> list[TrainingSection]:
        """The corpora of `train`."""
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def is_blend(self) -> bool:
        """Whether `train` has several corpora."""
        return len(self.parts) > 1

    @property
    def probabilities(self) -> list[float]:
        """Probability of every corpus of `train` that a row is drawn from it."""
        total = sum(part.weight for part in self.parts)
        return [part.weight / total for part in self.parts]

    def place(self, number: int) -> str:
        """Where a corpus of `train` stands in the recipe, for messages.

        Args:
            number: of the corpus, from 0.
        """
        return f"data.train.{number + 1}" if isinstance(self.train, list) else "data.train"

    def require_possible(self, *, has_generated: bool) -> None:
        """Refuse corpora without a source, and generated text that nothing writes or reads.

        Args:
            has_generated: whether the recipe has the section `generate`.

        Raises:
            DataError: naming the entry.
        """
        if not self.parts:
            raise DataError("data.train=[]: expected at least one corpus.")
        for number, part in enumerate(self.parts):
            where = self.place(number)
            if (part.source is None) != part.generated:
                raise DataError(f"{where}: expected either a source or generated: true.")
            if part.generated and not has_generated:
                raise DataError(f"{where}.generated: the recipe has no section generate. Add it, or name a source.")
            ignored = [name for name in ("name", "revision") if getattr(part, name) is not None]
            if part.generated and (ignored or part.split != "train" or part.text_field != "text"):
                raise DataError(f"{where}: generated text takes weight and num_rows alone.")
        if has_generated and not any(part.generated for part in self.parts):
            raise DataError("generate: no corpus reads its text. Add {generated: true} to data.train.")


@dataclass(frozen=True)
class GenerateSection:
    """Training text that the teacher writes itself (`generate_corpus`), into the folder `generated` of the run.

    `data.train` reads it with `generated: true`.

    Attributes:
        prompts: dataset with the columns `messages`, `prompt` or `text_field`; answers in it are left out. None: the
            teacher writes whole texts from its own begin-of-text token.
        num_rows: number of rows; None: one for every prompt. Needed without prompts.
        chat: whether a text is the message of a user, under the chat template; None: where there is a template.
        max_new_tokens: longest answer, in tokens.
        max_prompt_length: longest prompt, in tokens: longer texts are cut, longer conversations left out. None: what
            the context leaves.
        do_sample: sample; false takes the most probable token.
        temperature: of the sampling; 1 samples the teacher's own distribution.
        top_k: sample among the k most probable tokens; None: all.
        top_p: sample among the most probable tokens that have this probability together.
        seed: seed of the random numbers; those of a row follow from it and the row's place.
        batch_size: rows that are generated at a time.
        rows_per_file: rows of one file of the dataset.
    """

    prompts: DatasetSection | None = None
    num_rows: int | None = None
    chat: bool | None = None
    max_new_tokens: int = 512
    max_prompt_length: int | None = None
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    rows_per_file: int = 1024


@dataclass(frozen=True)
class ChatSection:
    """Check that the student can still chat: its greedy answers to prompts, beside the teacher's.

    Attributes:
        prompts: dataset with the columns `messages`, `prompt` or `text_field`; answers in it are left out.
        num_prompts: number of prompts to answer; None: all.
        max_new_tokens: longest answer, in tokens.
    """

    prompts: DatasetSection
    num_prompts: int | None = 64
    max_new_tokens: int = 256
