"""What a trainer is given, checked before anything is loaded: the data, and where the teacher comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..compat import commit_hash
from ..data.images import holds_images, read_row, require_image_model, require_image_processor
from ..errors import ArgumentError, DataError, MismatchError
from .arguments import config_of, eval_packing, kwargs_dict, model_name
from .config import DistillationConfig
from .record import describe_data
from .rows import refuse_empty
from .teacher_cache import TeacherCache, rows_and_caches

if TYPE_CHECKING:
    from transformers import PretrainedConfig


#: Defaults where rows have images.
IMAGE_DEFAULTS: Mapping[str, Any] = {"packing": False}


def refuse_image_settings(settings: Mapping[str, Any], where: str = "") -> None:
    """Refuse settings under which rows with images cannot be read.

    Args:
        settings: fields of `DistillationConfig`.
        where: what stands before a name in a message.

    Raises:
        DataError: naming the setting.
    """
    for name in ("packing", "padding_free", "eval_packing"):
        if settings.get(name):
            raise DataError(f"{where}{name}: rows with images are not packed. Set it to false.")
    if settings.get("truncation_mode") == "keep_end":
        raise DataError(
            f"{where}truncation_mode='keep_end': images stand at the beginning of a row, and would be cut off. Leave "
            "it out."
        )


@dataclass(frozen=True)
class TrainingData:
    """Training and evaluation data, with teacher caches replaced by their rows.

    Attributes:
        train: rows to train on.
        eval: rows to evaluate on, several datasets by name, or None.
        train_caches: caches that `train` comes from.
        eval_caches: caches that `eval` comes from.
        described: what `distillation.json` records of both.
    """

    train: Any
    eval: Any
    train_caches: list[TeacherCache]
    eval_caches: list[TeacherCache]
    described: Mapping[str, Any]

    @classmethod
    def of(cls, train_dataset: Any, eval_dataset: Any) -> TrainingData:
        """Take the rows out of the caches among the arguments of a trainer.

        Raises:
            ArgumentError: if one of them is a list or a path.
            MismatchError: if cached rows come without their manifest.
            DataError: if there are no rows to train on.
        """
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if isinstance(data, Sequence | os.PathLike):
                raise ArgumentError(
                    f"{name}: expected a datasets.Dataset, not a {type(data).__name__}. Dataset.from_dict({{'text': "
                    "texts}) makes one of texts, load_text_dataset(source) reads one from a file or the Hub."
                )
        described = {"train": _described(train_dataset), "eval": _described(eval_dataset)}
        train, train_caches = rows_and_caches(train_dataset, "train_dataset")
        evaluation, eval_caches = rows_and_caches(eval_dataset, "eval_dataset")
        refuse_empty(train, "train")
        return cls(train, evaluation, train_caches, eval_caches, described)

    @property
    def caches(self) -> list[TeacherCache]:
        """All caches."""
        return [*self.train_caches, *self.eval_caches]

    def require_arguments(
        self, args: DistillationConfig, processing_class: Any = None, **configs: PretrainedConfig
    ) -> None:
        """Refuse arguments under which the rows of a cache would be others, and images that cannot be read.

        Args:
            args: of the trainer.
            processing_class: tokenizer or processor; None for the one in a model's folder.
            **configs: role → config of the model.

        Raises:
            MismatchError: naming the argument.
            DataError: naming what reads text alone.
        """
        self._require_readable_images(args, processing_class, **configs)
        for caches, packing in ((self.train_caches, args.packing), (self.eval_caches, eval_packing(args))):
            for cache in caches:
                cache.require_arguments(args, packing=packing)

    def _require_readable_images(
        self, args: DistillationConfig, processing_class: Any, **configs: PretrainedConfig
    ) -> None:
        if not holds_images(self.train):
            return
        refuse_image_settings(vars(args))
        if hasattr(self.train, "__getitem__"):
            try:
                read_row(self.train, 0)
            except DataError as error:
                raise DataError(f"Row 0 (counted from 0) of the train dataset: {error}") from error
        for role, config in configs.items():
            require_image_model(config, f"The {role}")
        if processing_class is not None:
            require_image_processor(processing_class)


@dataclass(frozen=True)
class TeacherSource:
    """Where the teacher comes from.

    Attributes:
        model: a model, or a path or Hub id; None where all data is cached.
        config: the teacher's config; without a teacher the config in the cache.
        kwargs: keyword arguments of `from_pretrained`.
    """

    model: Any
    config: PretrainedConfig
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: Any, args: DistillationConfig, caches: list[TeacherCache]) -> TeacherSource:
        """Find the teacher's config.

        Args:
            model: as given to the trainer.
            args: of the trainer.
            caches: caches of the training data.

        Raises:
            MismatchError: if there is neither a teacher nor a cache, or arguments for loading a loaded teacher.
        """
        if args.teacher_model_init_kwargs and (model is None or isinstance(model, nn.Module)):
            raise MismatchError(
                "teacher_model_init_kwargs say how a teacher is loaded, and this one is a model or a cache already. "
                "Leave them out, or pass the teacher's path or Hub id."
            )
        kwargs = {"trust_remote_code": args.trust_remote_code, **kwargs_dict(args.teacher_model_init_kwargs)}
        if model is not None:
            return cls(model, config_of(model, kwargs), kwargs)
        if not caches:
            raise MismatchError(
                "There is no teacher: teacher_model is None, and train_dataset is not a teacher cache. Pass a "
                "teacher, or load_teacher_cache(folder) as train_dataset."
            )
        return cls(None, caches[0].teacher_config, kwargs)

    @property
    def name(self) -> str | None:
        """Path or Hub id; None for a teacher that exists in memory only."""
        return model_name(self.model) if self.model is not None else self.config.name_or_path or None

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit on the Hub, where it is known."""
        return self.kwargs.get("revision") or commit_hash(self.config)


def _described(data: Any) -> dict[str, Any] | None:
    """Description of data for the record; of a cache, the data that it was made from."""
    if isinstance(data, TeacherCache):
        return data.manifest["data"]["given"]
    if isinstance(data, Mapping) and any(isinstance(part, TeacherCache) for part in data.values()):
        data = {name: part.dataset if isinstance(part, TeacherCache) else part for name, part in data.items()}
    return describe_data(data)
