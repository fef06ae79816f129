"""Precomputed teacher distributions on disk, as training data."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import AutoConfig

from ..compat import set_commit_hash
from ..data.tokens import tokenizer_digest
from ..errors import DataError, MismatchError, OutputError
from ..file_digests import cached_file_digest
from ..formats import read_artefact
from ..losses.divergences import OF_LOGITS
from ..losses.signals import SampledSignal, TopKSignal
from ..pruning.plan import config_values
from ..weights import model_digest
from .batches import (
    CACHED,
    is_cached,
)
from .config import DistillationConfig
from .image_cache import processor_digest, with_images

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

MANIFEST_NAME = "teacher_cache.json"
#: Key of the settings in the metadata of every file, by which a resumed run recognises its files.
METADATA_KEY = b"minitron_hf"
#: These files in `formats.FORMATS`.
ROWS_KIND = "data-*.arrow"

#: Arguments that decide which tokens a row has, and which of them count.
ROW_ARGUMENTS = (
    "max_length",
    "packing",
    "packing_strategy",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "eos_token",
    "chat_template_path",
)


def refuse_uncacheable(args: DistillationConfig, *, num_draws: int | None = None) -> None:
    """Refuse arguments that need the teacher itself, or more of it than a cache holds.

    Args:
        args: arguments of the run.
        num_draws: tokens drawn per position; None: the most likely ones are stored.

    Raises:
        MismatchError: naming the argument.
    """
    if args.divergence in OF_LOGITS:
        raise MismatchError(
            f"divergence={args.divergence!r} compares logits, and a cache of the teacher holds probabilities. Use "
            "another divergence, or train with the teacher itself."
        )
    if num_draws is not None and args.divergence != "forward_kl":
        raise MismatchError(
            f"divergence={args.divergence!r} with a cache of num_draws={num_draws}: tokens drawn from the teacher "
            "give the right gradient on average for the forward KL only. Use divergence='forward_kl', or cache top_k "
            "tokens."
        )
    if args.top_k is not None:
        raise MismatchError(
            f"top_k={args.top_k} of the distillation selects among the teacher's tokens in training, and a teacher "
            "cache has a top_k of its own. Leave it out of the arguments of the distillation."
        )
    if args.teacher_correction:
        raise MismatchError(
            f"teacher_correction={args.teacher_correction!r}: a cached teacher cannot be trained. Correct it "
            "beforehand with correct_teacher, then cache it."
        )
    if args.teacher_model_init_kwargs:
        raise MismatchError(
            "teacher_model_init_kwargs say how a teacher is loaded, and a cached one is not loaded for training. "
            "Leave them out; to cache a teacher that is loaded so, pass the model itself to cache_teacher_logits."
        )


# ---- Reading ----


@dataclass(frozen=True)
class TeacherCache:
    """Rows with precomputed teacher logits, for `train_dataset` or `eval_dataset` of `DistillationTrainer`.

    Attributes:
        dataset: the rows; `dataclasses.replace(cache, dataset=cache.dataset.select(…))` selects some of them.
        manifest: settings, teacher and data of the cache.
    """

    dataset: Dataset
    manifest: Mapping[str, Any]

    @property
    def teacher_config(self) -> PretrainedConfig:
        """Config of the teacher, with the name that it was loaded by."""
        values = config_values(self.manifest["teacher"]["config"])
        config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
        config.name_or_path = self.manifest["teacher"]["name_or_path"] or ""
        set_commit_hash(config, self.manifest["teacher"]["revision"])
        return config

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary that its distributions are over."""
        size: int = self.manifest["settings"]["vocab_size"]
        return size

    def require_arguments(self, args: DistillationConfig, *, packing: bool) -> None:
        """Refuse arguments that need other rows or other cached values.

        Args:
            args: arguments of the run.
            packing: whether documents would be packed, in training or in evaluation.

        Raises:
            MismatchError: naming the argument.
        """
        settings = self.manifest["settings"]
        refuse_uncacheable(args, num_draws=settings["num_draws"])
        wanted = {"temperature": args.temperature, **{name: getattr(args, name) for name in ROW_ARGUMENTS}}
        wanted["packing"] = packing
        if not packing and not settings["packing"]:
            del wanted["packing_strategy"]
        for name, value in wanted.items():
            if settings[name] != value:
                raise MismatchError(
                    f"The teacher cache was written with {name}={settings[name]!r}, this run has {value!r}. Pass "
                    f"{name}={settings[name]!r}, or cache the teacher again."
                )

    def require_states(self, states: Sequence[int]) -> None:
        """Refuse a cache that lacks hidden states which the loss needs.

        Raises:
            MismatchError: naming the states.
        """
        kept = self.manifest["settings"]["states"]
        if absent := sorted(set(states) - set(kept)):
            raise MismatchError(
                f"hidden_loss and embedding_loss need the teacher's hidden states {absent}, and the cache holds "
                f"{kept or 'none'}. Cache the teacher again with these arguments, or train with the teacher itself."
            )

    def require_tokenizer(self, processing_class: PreTrainedTokenizerBase | Any) -> None:
        """Refuse another tokenizer; of rows with images, also other settings of the processor.

        Raises:
            MismatchError: if its vocabulary differs, or what it makes of images.
        """
        if tokenizer_digest(processing_class) != self.manifest["settings"]["tokenizer"]:
            raise MismatchError(
                "The teacher cache was written with another tokenizer: the vocabularies differ, so its token ids "
                "would mean something else. Pass the tokenizer of the teacher as processing_class, or cache it again."
            )
        written_with = self.manifest["settings"].get("processor")
        if written_with is not None and processor_digest(processing_class) != written_with:
            raise MismatchError(
                "The teacher cache was written with other settings of the processor (such as the size of images), or "
                "with another chat template. Pass the processor of the teacher as processing_class, or cache it again."
            )

    def require_teacher(self, teacher: PreTrainedModel) -> None:
        """Refuse another teacher than the one that was cached.

        Raises:
            MismatchError: if its weights differ, or are not known because the cache is from a server.
        """
        if served := self.manifest["settings"].get("server_model"):
            raise MismatchError(
                f"The teacher cache is from a server (model {served!r}), so nothing tells whether teacher_model has "
                "the same weights. Leave teacher_model out, and cache the held-out data, too."
            )
        if model_digest(teacher) != self.manifest["settings"]["teacher"]:
            raise MismatchError(
                f"The teacher cache was written by another teacher ({self.manifest['teacher']['name_or_path']}) than "
                "teacher_model: the weights differ. Pass that one, or leave teacher_model out."
            )


def load_teacher_cache(folder: str | os.PathLike[str], dataset: Dataset | None = None) -> TeacherCache:
    """Open a cache that `cache_teacher_logits` wrote; the rows stay on disk.

    Args:
        folder: of the cache.
        dataset: of rows with images, the corpus that the cache was written from; it holds the images.

    Raises:
        OutputError: if there is no cache, or an unfinished one.
        DataError: if a cache of rows with images comes without its corpus, or one of text with a corpus.
        MismatchError: if a file is missing or incomplete, or a row of the corpus is not the one that was cached.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_NAME).is_file():
        begun = len(list(folder.glob("data-*.arrow")))
        raise OutputError(
            f"{folder} holds no finished teacher cache: no {MANIFEST_NAME}, {begun} file(s) of rows. "
            "Run cache_teacher_logits, which resumes where it was interrupted."
        )
    manifest = read_artefact(folder / MANIFEST_NAME)
    if ("processor" in manifest["settings"]) != (dataset is not None):
        raise DataError(
            f"{folder} is a teacher cache of text, which holds its rows. Leave out the dataset."
            if dataset is not None
            else f"{folder} is a teacher cache of rows with images, and the images are in the corpus alone. Pass the "
            "corpus too: load_teacher_cache(folder, dataset); with `minitron-hf distill`, --train-images or "
            "--eval-images."
        )
    for file in manifest["files"]:
        path = folder / file["file"]
        size = path.stat().st_size if path.is_file() else 0
        if size != file["num_bytes"]:
            raise MismatchError(
                f"{path} has {size} bytes, the manifest says {file['num_bytes']}. Copy the whole folder again, or "
                "delete that file and the manifest and run cache_teacher_logits."
            )
        # One process of a machine reads all of it, once: the digest is remembered.
        reads_all = os.environ.get("LOCAL_RANK", "0") == "0"
        if reads_all and file.get("sha256", cached_file_digest(path)) != cached_file_digest(path):
            raise MismatchError(
                f"{path} has changed since it was written: its SHA-256 is not that of the manifest. Copy the file "
                "again, or delete it and the manifest and run cache_teacher_logits."
            )
    rows: Any = load_from_disk(os.fspath(folder))
    return TeacherCache(rows if dataset is None else with_images(rows, dataset, manifest["settings"]), manifest)


def rows_and_caches(data: Any, role: str) -> tuple[Any, list[TeacherCache]]:
    """A dataset, or several by name, with caches replaced by their rows; and the caches.

    Raises:
        MismatchError: if cached rows come without their manifest.
    """
    if isinstance(data, Mapping):
        parts = {name: rows_and_caches(part, role) for name, part in data.items()}
        return {name: rows for name, (rows, _) in parts.items()}, [
            cache for _, found in parts.values() for cache in found
        ]
    if isinstance(data, TeacherCache):
        return data.dataset, [data]
    if is_cached(getattr(data, "column_names", None)):
        raise MismatchError(
            f"{role} holds rows of a teacher cache without its manifest, so nothing tells whether they fit. Pass "
            "load_teacher_cache(folder), or dataclasses.replace(cache, dataset=rows) for a part of it."
        )
    return data, []


def cached_signal(batch: Mapping[str, Any], positions: Tensor, vocab_size: int, states: Sequence[int]) -> Any:
    """The teacher signal of a batch of cached rows at `positions`, and the teacher's hidden states in `states`.

    Raises:
        MismatchError: if other tokens count than when the cache was written.
    """
    cached = batch[CACHED]
    if len(cached.log_tail) != len(positions):
        raise MismatchError(
            f"{len(positions)} tokens of a batch count, and the teacher cache holds {len(cached.log_tail)}: the rows "
            "or labels were changed. Pass the cached rows as they are, without a data_collator that changes labels."
        )
    tokens, log_probs, log_tail = (x.to(positions.device) for x in (cached.tokens, cached.log_probs, cached.log_tail))
    share = None if cached.kept_share is None else cached.kept_share.to(positions.device)
    signal = (SampledSignal if cached.drawn else TopKSignal)(tokens, log_probs, log_tail, vocab_size, share)
    return signal, tuple(cached.states[index].to(positions.device) for index in states)
