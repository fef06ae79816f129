"""Checks the free sections of a recipe, and `--set`, against the functions and classes that take them."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DataError, MinitronError, did_you_mean
from ..hardware import training_device
from ..pruning.iterations import require_iterations
from ..scoring.importance import estimate_importance
from ..scoring.metrics import metric_names
from ..sizes.request import SEQUENTIAL, PrunerConfig
from .actions import cached_arguments, search_arguments
from .environment import check_reporters
from .rules import hints_of, require_choice, require_settings
from .schema import DISTILL_DEFAULTS, CacheSection, EvaluateSection, GenerateSection, Recipe, TeacherSection
from .training import lora_config

if TYPE_CHECKING:
    from ..distillation.config import DistillationConfig


def scoring_hints() -> dict[str, Any]:
    """Arguments of `estimate_importance` that YAML can hold, and `iterations`."""
    given = ("model", "data", "processing_class", "show_progress")
    return {**hints_of(estimate_importance, without=given), "metric": Literal[metric_names()], "iterations": int}


def distillation_hints() -> dict[str, Any]:
    """Fields of `DistillationConfig`; the folder is given elsewhere."""
    from ..distillation.config import DistillationConfig

    # The trainer goes on from the folder's own checkpoints, and a student that was cut is in memory already.
    return hints_of(DistillationConfig, without=("output_dir", "resume_from_checkpoint", "model_init_kwargs"))


def search_hints() -> dict[str, Any]:
    """Arguments of `search_architectures` that YAML can hold."""
    from ..search.architectures import search_architectures

    own = ("model", "scores", "base", "output_dir", "processing_class", "show_progress", "token_counts")
    return hints_of(search_architectures, without=(*own, "calibration_data", "train_dataset", "eval_data"))


def section_names() -> dict[str, Iterable[str]]:
    """Section of a recipe → names of its entries."""
    own: dict[str, Any] = {
        "teacher": TeacherSection,
        "prune": PrunerConfig,
        "generate": GenerateSection,
        "teacher_cache": CacheSection,
        "evaluate": EvaluateSection,
    }
    arguments = {"scores": scoring_hints(), "distill": distillation_hints(), "search": search_hints()}
    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig

        own["lora"] = LoraConfig
    return {**{name: [one.name for one in fields(section)] for name, section in own.items()}, **arguments}


def require_search(values: Mapping[str, Any], prefix: str) -> None:
    """Refuse impossible arguments of `search_architectures`."""
    if given := [name for name in ("score_func", "score_floor") if name in values]:
        raise DataError(
            f"{prefix}{given[0]}: a score is a function. Call search_architectures in Python, or leave it out."
        )
    require_settings(values, search_hints(), prefix, "arguments of search_architectures")
    distillation = values.get("distillation") or {}
    require_settings(distillation, distillation_hints(), f"{prefix}distillation.", "fields of DistillationConfig")


def distillation_config(folder: Path, values: Mapping[str, Any], prefix: str) -> DistillationConfig:
    """The checked arguments of distillation.

    Raises:
        DataError: naming the wrong setting.
        MissingDependencyError: if a package that they ask for is not installed.
    """
    from ..distillation.config import DistillationConfig

    require_settings(values, distillation_hints(), prefix, "fields of DistillationConfig")
    return _built(DistillationConfig, folder, {**DISTILL_DEFAULTS, **values}, prefix)


def _built(config: Any, folder: Path, values: Mapping[str, Any], prefix: str) -> Any:
    """A configuration of TRL's, with a scheduler and an optimizer that exist."""
    from ..errors import MissingDependencyError

    try:
        made = config(str(folder), **values)
        _require_possible(made)
        _require_schedule(made)
    except DataError as error:
        raise DataError(f"{prefix}{error}") from error
    except MinitronError:
        raise
    except ImportError as error:
        raise MissingDependencyError(f"{prefix.rstrip('. ')}: {error}") from error
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{prefix.rstrip('. ')}: {error}") from error
    return made


def _entries(name: str) -> frozenset[str] | None:
    """Names that a setting of keyword arguments takes; None if they are checked elsewhere or unknown."""
    if name == "teacher_model_init_kwargs":
        from ..compat import loading_arguments

        return loading_arguments()
    if name == "dataset_kwargs":
        return frozenset({"skip_prepare_dataset"})  # the only one that TRL 1.16 reads
    if name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        from torch.utils.checkpoint import checkpoint

        return frozenset(inspect.signature(checkpoint).parameters) - {"function", "args", "kwargs"} | {
            "preserve_rng_state"
        }
    return None


def _require_possible(args: Any) -> None:
    """Refuse settings that Accelerate does not support here, and unknown keyword arguments."""
    if args.fp16 and training_device(args.use_cpu).type == "cpu":
        raise DataError("fp16=True: no accelerator here computes in it. Leave it out.")
    for one in fields(args):
        if not one.name.endswith("_kwargs"):
            continue
        if isinstance(value := getattr(args, one.name), str):
            raise DataError(f"{one.name}={value!r}: expected entries.")
        known = _entries(one.name)
        if known is not None and (unknown := sorted(map(str, {*(value or {})} - known))):
            raise DataError(
                f"{one.name} takes no {', '.join(unknown)}.{did_you_mean(unknown, known)} Expected some of "
                f"{', '.join(sorted(known))}."
            )


def _require_schedule(args: Any) -> None:
    """Check scheduler and optimizer by building them without a model."""
    import torch
    from transformers import Trainer, get_scheduler

    nothing = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    get_scheduler(
        args.lr_scheduler_type,
        nothing,
        num_warmup_steps=1,
        num_training_steps=10,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
    )
    if args.torch_compile:
        require_choice(
            args.torch_compile_backend, torch.compiler.list_backends(exclude_tags=()), "torch_compile_backend"
        )
    # Those of whole layers want the model; what they need is found when it is there.
    if not any(word in str(args.optim) for word in ("galore", "apollo", "lomo")):
        Trainer.get_optimizer_cls_and_kwargs(args)


def check_settings(recipe: Recipe) -> list[DistillationConfig]:
    """Refuse arguments that would otherwise fail in a late stage, after hours of work.

    Returns:
        The arguments of distillation, of every round.
    """
    folder = Path(recipe.output_dir)
    rounds = recipe.each_round()
    _require_comparable_tokens(recipe, rounds)
    if recipe.search is not None:
        require_search(recipe.search, "search.")
        search_arguments(recipe)
    if recipe.rounds:
        require_sections(recipe)  # else the first round is blamed for what the recipe says
    found = []
    for number, one in enumerate(rounds, 1):
        where = f"rounds.{number}." if recipe.rounds else ""
        require_sections(one, where)
        require_iterations(one.pruner_config, one.scores.get("iterations", 1))
        found.append(distillation_config(folder, one.distill, f"{where}distill."))
        _require_shared(recipe, number)
        if recipe.teacher_cache is not None:
            _require_one_cache(recipe, one, found[-1], where)
    if recipe.data.streaming:
        _require_stream(recipe, found)
    if recipe.stream_weights:
        _require_streamable(recipe, rounds)
    lora_config(recipe)
    if recipe.teacher_correction is not None:
        _check_correction(recipe)
    return found


def require_sections(one: Recipe, where: str = "") -> None:
    """Refuse unknown and impossible entries of `scores` and `distill`.

    Args:
        one: the recipe, or one round of it.
        where: what stands before the names of the sections in a message.
    """
    require_settings(one.scores, scoring_hints(), f"{where}scores.", "arguments of estimate_importance")
    require_settings(one.distill, distillation_hints(), f"{where}distill.", "fields of DistillationConfig")


def require_lengths(recipe: Recipe, context: int | None) -> None:
    """Refuse rows that are longer than the teacher's context.

    Args:
        recipe: the recipe.
        context: in tokens; None if it has no limit.
    """
    sections: dict[str, Mapping[str, Any]] = {"distill": recipe.distill, "search": recipe.search or {}}
    sections["scores"] = recipe.scores
    for number, one in enumerate(recipe.rounds, 1):
        sections |= {f"rounds.{number}.distill": one.distill, f"rounds.{number}.scores": one.scores}
    if recipe.teacher_correction is not None:
        sections["teacher_correction.arguments"] = recipe.teacher_correction.arguments
    lengths = {where: values.get("max_length") for where, values in sections.items()}
    for where, length in {**lengths, "evaluate": recipe.evaluate.max_length}.items():
        if context is not None and isinstance(length, int) and length > context:
            raise DataError(f"{where}.max_length={length}: the teacher's context has {context} tokens. Lower it.")


def _require_comparable_tokens(recipe: Recipe, rounds: Sequence[Recipe]) -> None:
    """Refuse a cut of the vocabulary where other tokens than the teacher's cannot be read."""
    cut = [number for number, one in enumerate(rounds, 1) if one.pruner_config.vocab_size is not None]
    if len(cut) > 1:
        raise DataError(
            f"prune.vocab_size in the rounds {' and '.join(map(str, cut))}: a student knows the teacher's ids of its "
            "tokens after one cut of the vocabulary. Write vocab_size in the prune of one round."
        )
    if cut and recipe.teacher_cache is not None and recipe.rounds:
        raise DataError(
            "prune.vocab_size with teacher_cache and rounds: the rounds before the last read other tokens than the "
            "student, and all rounds share one cache. Leave it out: the teacher then runs during distillation."
        )
    if cut and recipe.teacher_cache is not None and recipe.teacher_cache.server is not None:
        raise DataError(
            "prune.vocab_size with teacher_cache.server: a server gives the teacher's likeliest tokens, and the "
            "probability of all tokens of the student is needed. Leave out the server."
        )


def _require_shared(recipe: Recipe, number: int) -> None:
    """Refuse a chat template of one round: calibration, generation, evaluation and all rounds share one tokenizer."""
    name = "chat_template_path"
    if recipe.rounds and name in recipe.rounds[number - 1].distill:
        raise DataError(
            f"rounds.{number}.distill.{name}: all rounds, calibration, generation and evaluation share one template. "
            f"Set distill.{name} instead."
        )


def _require_streamable(recipe: Recipe, rounds: Sequence[Recipe]) -> None:
    """Refuse a teacher that cannot be pruned from its files, and what needs it in memory."""
    if recipe.verify:
        raise DataError(
            "stream_weights: verify loads the teacher into memory, to compare the student with it. "
            "Leave one of them out."
        )
    if any(one.pruner_config.repair == SEQUENTIAL for one in rounds):
        raise DataError(
            f"stream_weights: prune.repair={SEQUENTIAL!r} runs teacher and student side by side, so both have to be "
            "in memory. Leave one of them out, or write repair: least_squares."
        )
    folder = Path(recipe.teacher.model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise DataError(
            f"stream_weights: the teacher in {folder} holds no safetensors, and only these can be read in parts. Load "
            "it and save it with save_pretrained, or leave stream_weights out."
        )


def _require_stream(recipe: Recipe, arguments: Sequence[DistillationConfig]) -> None:
    """Refuse a stream where the length of the corpus or its rows as a whole are needed."""
    if recipe.teacher_cache is not None:
        raise DataError("data.streaming: a teacher_cache reads the whole corpus. Leave out one of them.")
    if any(args.max_steps < 1 for args in arguments):
        raise DataError("data.streaming: a stream has no length. Say with distill.max_steps how many steps to train.")
    if any("[" in part.split for part in recipe.data.parts):
        raise DataError("data.streaming: a stream has no slices of a split. Use num_rows.")
    is_even = all(args.packing and args.packing_strategy == "wrapped" for args in arguments)
    if recipe.distributed is not None and not is_even:
        raise DataError(
            "data.streaming with distributed: one process reads the rows for all, and joins them only if they have "
            "one length. Set distill.packing to true and distill.packing_strategy to 'wrapped', or leave one out."
        )


@contextlib.contextmanager
def _of_section(name: str) -> Iterator[None]:
    """Begin errors with the section whose settings they name."""
    try:
        yield
    except MinitronError as error:
        raise type(error)(f"{name}: {error}") from error


def _require_one_cache(recipe: Recipe, one: Recipe, args: DistillationConfig, where: str) -> None:
    from ..distillation.cache_coding import refuse_both
    from ..distillation.teacher_cache import refuse_uncacheable

    section = recipe.teacher_cache
    assert section is not None
    try:
        refuse_both(section.top_k, section.num_draws, section.dtype)
    except DataError as error:
        raise DataError(f"teacher_cache.{error}") from error
    with _of_section("distill"):
        refuse_uncacheable(args, num_draws=section.num_draws)
    if section.server is not None:
        _require_served(recipe, args)
    elif section.server_model is not None:
        raise DataError("teacher_cache.server_model names a model of teacher_cache.server, which is missing. Set it.")
    whole, own = ({**DISTILL_DEFAULTS, **each.distill} for each in (recipe, one))
    if other := [name for name in cached_arguments() if own.get(name) != whole.get(name)]:
        raise DataError(
            f"{where}distill: {', '.join(other)} cannot differ between rounds that read one teacher_cache. Set it "
            "for all of them, or leave out teacher_cache."
        )


def _require_served(recipe: Recipe, args: DistillationConfig) -> None:
    """Refuse what a teacher behind a server cannot do."""
    from ..distillation.server import plain_url
    from ..distillation.server_cache import refuse_unserved

    section = recipe.teacher_cache
    assert section is not None
    plain_url(str(section.server))
    with _of_section("distill"):
        refuse_unserved(args)
    if section.num_draws is not None:
        raise DataError(
            "teacher_cache.num_draws with a server: it gives the most likely tokens, and draws none. Use top_k."
        )
    if recipe.teacher_correction is not None:
        raise DataError(
            "teacher_cache.server with teacher_correction: the server offers the teacher as it was before. Leave one "
            "out, or correct the teacher in a run of its own and serve the result."
        )


def _check_correction(recipe: Recipe) -> None:
    from trl import SFTConfig

    from ..distillation.correction import correct_teacher

    section = recipe.teacher_correction
    assert section is not None
    own = {one for one in inspect.signature(correct_teacher).parameters if one not in ("max_length", "arguments")}
    hints = hints_of(SFTConfig, without=(*own, "output_dir", "max_steps", "model_init_kwargs"))
    prefix = "teacher_correction.arguments."
    if "max_steps" in section.arguments:
        raise DataError(f"{prefix}max_steps: teacher_correction.num_tokens sets the number of steps. Leave it out.")
    require_settings(section.arguments, hints, prefix, "fields of trl.SFTConfig")
    on_any = {"bf16": False, "use_cpu": False, "report_to": "none"}
    made = _built(SFTConfig, Path(recipe.output_dir), {**on_any, **section.arguments}, prefix)
    check_reporters([made], prefix)
