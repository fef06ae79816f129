"""Checks that this machine and the Hub have what a recipe needs: corpora, packages, tasks, access, disk space."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import token_rows
from ..data.context import context_length
from ..data.documents import is_conversation
from ..data.images import holds_images
from ..distillation.assistant_turns import require_turns
from ..distillation.checks import refuse_several_gpus
from ..errors import DataError, HubError, MissingDependencyError, OutputError, did_you_mean
from ..families import text_config
from ..files import refuse_own_folder, require_creatable
from ..models import count_parameters, read_chat_template
from ..names import is_repo_id
from ..publishing.hub import check_push
from ..publishing.markdown import byte_size
from ..publishing.releases import require_reference
from ..quantization import require_quantizable
from .beginnings import first_rows
from .corpora import Part, require_one_format, require_one_kind
from .costs import checkpoint_bytes, training_checkpoint_bytes
from .generating import expected_text
from .image_checks import check_images, require_images_in_training
from .launching import require_launchable
from .run import CACHE_DIR, place_of
from .schema import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from ..distillation.config import DistillationConfig
    from .run import Run


def check_environment(
    run: Run, stages: Set[str], arguments: Sequence[DistillationConfig], students: Sequence[PretrainedConfig]
) -> list[str]:
    """Refuse a run whose stages would not find what they need.

    Args:
        run: the run.
        stages: names of its stages, without their round.
        arguments: of distillation, of every round.
        students: the student's config, of every round; of a search, the teacher's.

    Returns:
        What could not be checked.
    """
    recipe = run.recipe
    require_creatable(run.folder)
    refuse_own_folder(run.folder, teacher=recipe.teacher.model)
    skipped = check_corpora(run, run.tokenizer, arguments)
    if stages & {"distill", "controls"}:
        if recipe.distributed is None:
            refuse_several_gpus(max(args.n_gpu for args in arguments), "Set distributed to {config: ddp}")
        check_reporters(arguments)
        check_tokens(run.tokenizer, arguments)
        _check_training_tasks(arguments)
        for args in arguments:
            if args.push_to_hub:
                check_push(args.hub_model_id or run.folder.resolve().name, token=args.hub_token)
    if recipe.distributed is not None:
        require_launchable(recipe.distributed.config, recipe.distributed.num_processes)
    if "quantize" in stages:
        for name in recipe.quantize:
            require_quantizable(students[-1], name)
    if "evaluate" in stages:
        check_benchmarks(recipe, run.tokenizer)
        skipped += check_chat_prompts(run)
    if "cache" in stages:
        _check_server(run)
    if "publish" in stages:
        skipped += check_publishing(recipe)
    if "search" not in stages:
        check_disk(recipe, stages, arguments, run.teacher_config, students)
    return skipped


def _check_server(run: Run) -> None:
    """Refuse a server that does not offer the teacher, unless its cache is finished."""
    section = run.recipe.teacher_cache
    if section is None or section.server is None:
        return
    from ..distillation.server_cache import check_server
    from ..distillation.teacher_cache import MANIFEST_NAME

    if not all((run.folder / CACHE_DIR / which / MANIFEST_NAME).is_file() for which in ("train", "eval")):
        check_server(section.server, run.tokenizer, section.most_tokens, model=section.server_model, timeout=60.0)


def check_corpora(
    run: Run, tokenizer: PreTrainedTokenizerBase, arguments: Collection[DistillationConfig]
) -> list[str]:
    """Refuse corpora that cannot be read, have no such column, hold no text, or cannot stand in one blend.

    Returns:
        What could not be checked.
    """
    skipped, data = [], run.recipe.data
    known = []
    for number, part in enumerate(data.parts):
        where = data.place(number)
        if part.generated:
            rows: list[Any] | str = [expected_text(run).row]
            source = "the text of generate"
        else:
            section = part.dataset("")
            rows, source = first_rows(section, where, partial(run.part, number)), section.source
        if isinstance(rows, str):
            skipped.append(f"{where}: {rows}")
            continue
        _check_rows(run, rows, source, part.text_field, where, tokenizer, arguments)
        known.append(Part(where, rows[0], part.text_field))
        run.loaded["images.train"] = holds_images(rows)
    require_one_format(known)
    require_one_kind(known)
    for which in ("eval", "calibration"):
        if which == "calibration" and data.calibration is None:
            continue
        section = run.dataset_section(which)
        rows = first_rows(section, place_of(which), partial(run.dataset, which))
        if isinstance(rows, str):
            skipped.append(f"data.{which}: {rows}")
        else:
            used = arguments if which == "eval" else ()
            run.loaded[f"images.{which}"] = holds_images(rows)
            if which == "eval":
                require_images_in_training(run)
            _check_rows(run, rows, section.source, section.text_field, place_of(which), tokenizer, used)
    return skipped


def _check_rows(
    run: Run,
    rows: Sequence[Any],
    source: str,
    text_field: str,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Collection[DistillationConfig],
) -> None:
    """Check the first rows of a corpus.

    Args:
        run: the run.
        rows: the first rows.
        source: where they come from.
        text_field: column that holds a text.
        where: where the corpus stands in the recipe.
        tokenizer: the teacher's.
        arguments: of the distillation that reads it; none for calibration data.
    """
    if holds_images(rows):
        require_text(rows, source, text_field, where)
        _require_columns(rows[0], arguments, f"{where}: {source}")
        check_images(run, rows, source, text_field, where, arguments)
        return
    require_text(rows, source, text_field, where, tokenizer)
    vocab_size = text_config(run.teacher_config).vocab_size
    largest = max((token for row in rows for token in row.get("input_ids", ())), default=-1)
    if largest >= vocab_size:
        raise DataError(
            f"{where}: {source} holds the token {largest}, and the teacher has {vocab_size} tokens. Use rows of its "
            "own tokenizer."
        )
    _require_chat_template(rows, tokenizer, f"{where}: {source}")
    _require_columns(rows[0], arguments, f"{where}: {source}")
    if any(args.assistant_only_loss for args in arguments):
        require_turns(rows, tokenizer)


def check_chat_prompts(run: Run) -> list[str]:
    """Refuse chat prompts that cannot be read, or that leave no room for an answer.

    Returns:
        What could not be checked.
    """
    section, where = run.recipe.evaluate.chat, "evaluate.chat.prompts"
    if section is None:
        return []
    context = context_length(run.teacher_config)
    if context is not None and section.max_new_tokens >= context:
        raise DataError(
            f"evaluate.chat.max_new_tokens={section.max_new_tokens}: the teacher's context has {context} tokens. "
            "Lower it."
        )
    rows = first_rows(section.prompts, where, partial(run.dataset, "chat"))
    if isinstance(rows, str):
        return [f"{where}: {rows}"]
    require_text(rows, section.prompts.source, section.prompts.text_field, where)
    return []


def require_text(
    rows: Sequence[Any],
    source: str,
    text_field: str,
    where: str,
    tokenizer: Any = None,
    named_with: str = "text_field",
) -> None:
    """Refuse rows without text.

    Args:
        rows: the first rows of a corpus.
        source: where they come from.
        text_field: column that holds the text.
        where: what a message calls the corpus.
        tokenizer: None: texts are not tokenised.
        named_with: what names the column.

    Raises:
        DataError: naming the columns that there are, or what a row holds.
    """
    if not rows:
        raise DataError(f"{where}: {source} has no rows. Name another split or file.")
    columns = list(rows[0])
    if not {text_field, "input_ids", "messages", "conversations", "prompt"} & set(columns):
        raise DataError(
            f"{where}: {source} has the columns {', '.join(columns)}, and no {text_field!r}."
            f"{did_you_mean(text_field, columns)} Name the text column with {named_with}."
        )
    if text_field not in columns:
        return
    if wrong := [row[text_field] for row in rows if not isinstance(row[text_field], str)]:
        raise DataError(
            f"{where}: the column {text_field!r} of {source} holds {wrong[0]!r}, expected text. Name another column, "
            "or leave out such rows."
        )
    if tokenizer is not None:
        try:
            token_rows([row[text_field] for row in rows], tokenizer, max_length=3, num_rows=1)
        except DataError as error:
            raise DataError(f"{where}: {source}: {error}") from error


def _require_chat_template(rows: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> None:
    """Refuse conversations that no chat template can render."""
    names = ("messages", "conversations", "prompt")
    if "input_ids" in rows[0] or not any(is_conversation(rows[0].get(name)) for name in names):
        return
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where} holds conversations, and the teacher's tokenizer has no chat template. Save the tokenizer with "
            "one, set distill.chat_template_path, or use texts."
        )


def _require_columns(row: Mapping[str, Any], arguments: Collection[DistillationConfig], where: str) -> None:
    """Refuse losses on parts of rows that do not have them."""
    needed = {
        "completion_only_loss": ("completion",),
        "assistant_only_loss": ("messages", "conversations", "completion"),
    }
    for name, columns in needed.items():
        if any(getattr(args, name) for args in arguments) and not {*columns, "input_ids"} & {*row}:
            raise DataError(
                f"distill.{name}: {where} has the columns {', '.join(row)}, expected {' or '.join(columns)}. Leave "
                "the entry out."
            )


def check_tokens(tokenizer: PreTrainedTokenizerBase, arguments: Collection[DistillationConfig]) -> None:
    """Refuse special tokens that the tokenizer does not have, and chat templates that are not there."""
    known = tokenizer.get_vocab()
    for args in arguments:
        for name in ("eos_token", "pad_token"):
            token = getattr(args, name, None)
            if token is not None and token not in known:
                raise DataError(f"distill.{name}={token!r}: the teacher's tokenizer has no such token.")
        if args.chat_template_path is not None:
            read_chat_template(args.chat_template_path, "distill.chat_template_path")


def check_reporters(arguments: Collection[DistillationConfig], prefix: str = "distill.") -> None:
    """Refuse trackers that are unknown or not installed.

    Args:
        arguments: of distillation.
        prefix: what stands before a name in a message.

    Raises:
        DataError: naming those that there are.
        MissingDependencyError: naming the package.
    """
    from ..compat import experiment_trackers

    known, installed = experiment_trackers()
    for name in dict.fromkeys(name for args in arguments for name in args.report_to or ()):
        if name not in known:
            raise DataError(
                f"{prefix}report_to={name!r} is unknown.{did_you_mean(name, known)} Expected none, "
                f"all, or some of {', '.join(known)}."
            )
        # Those that Transformers does not probe are tried by their callbacks.
        probed = name not in ("flyte",)
        if probed and name not in installed:
            raise MissingDependencyError(
                f"{prefix}report_to={name!r}: the package is not installed. Run pip install {name}, or leave "
                "report_to out."
            )


def check_benchmarks(recipe: Recipe, tokenizer: Any) -> None:
    """Refuse tasks that the harness does not have, or cannot run here."""
    from ..evaluation.tasks import require_tasks

    section = recipe.evaluate
    has_template = getattr(tokenizer, "chat_template", None) is not None
    for name, wanted in (
        ("apply_chat_template", section.apply_chat_template and section.tasks),
        ("chat", section.chat),
    ):
        if wanted and not has_template:
            raise DataError(f"evaluate.{name}: the teacher's tokenizer has no chat template. Leave the entry out.")
    for name in ("include_path", "task_data"):
        folder = getattr(section, name)
        if folder is not None and not Path(folder).is_dir():
            raise DataError(f"evaluate.{name}: the folder {folder!r} does not exist.")
    if section.tasks:
        models = set(_evaluated_models(recipe))
        if unknown := sorted(set(section.task_models or ()) - models):
            raise DataError(
                f"evaluate.task_models: this recipe has no model {', '.join(unknown)}.{did_you_mean(unknown, models)} "
                f"Expected some of {', '.join(sorted(models))}."
            )
        try:
            require_tasks(section.tasks, section.include_path, runs_code=section.confirm_run_unsafe_code)
        except DataError as error:
            raise DataError(f"evaluate.tasks: {error}") from error


def _check_training_tasks(arguments: Collection[DistillationConfig]) -> None:
    """Refuse tasks of training that the harness does not have, or cannot run here."""
    from ..evaluation.tasks import require_tasks

    for args in arguments:
        if args.eval_tasks:
            try:
                require_tasks(args.eval_tasks, args.eval_include_path)
            except DataError as error:
                raise DataError(f"distill.eval_tasks: {error}") from error


def _evaluated_models(recipe: Recipe) -> list[str]:
    """Names of the models that the stage `evaluate` measures."""
    corrected = ["corrected_teacher"] if recipe.teacher_correction else []
    students = [*recipe.earlier_students(), "student", *recipe.quantised_students()]
    return ["teacher", "pruned", *corrected, *students, *recipe.controls]


def check_publishing(recipe: Recipe) -> list[str]:
    """Refuse a repository that this account cannot write to.

    Returns:
        What could not be checked.
    """
    assert recipe.publish is not None
    name = recipe.publish.repo_id
    if not is_repo_id(name) or "/" not in name:
        raise HubError(f"publish.repo_id={name!r}: expected 'owner/name' (letters, digits, '-', '_' and '.').")
    for which in ("revision", "tag"):
        require_reference(f"publish.{which}", getattr(recipe.publish, which))
    if recipe.publish.create_pr and (recipe.publish.tag or recipe.publish.collection or recipe.publish.quantized):
        raise DataError(
            "publish.create_pr: a pull request gets no tag, collection or quantised copies. Leave them out."
        )
    if recipe.publish.quantized and not recipe.quantize:
        raise DataError("publish.quantized: the recipe quantises nothing. Add quantize: [int8], or leave it out.")
    skipped = check_push(name, create_pr=recipe.publish.create_pr)
    return [] if skipped is None else [skipped.rstrip(".")]


def check_disk(
    recipe: Recipe,
    stages: Set[str],
    arguments: Sequence[DistillationConfig],
    teacher: PretrainedConfig,
    students: Sequence[PretrainedConfig],
) -> None:
    """Refuse a run whose checkpoints certainly do not fit on the disk.

    Args:
        recipe: the recipe.
        stages: names of the stages that will run, without their round.
        arguments: of distillation, of every round.
        teacher: the teacher's config.
        students: the student's config, of every round.

    Raises:
        OutputError: saying how much is needed for what.
    """
    import torch
    from transformers.trainer_utils import SaveStrategy

    stored = teacher.dtype if isinstance(teacher.dtype, torch.dtype) else torch.float32
    parts: dict[str, int] = {}
    for number, (student, args) in enumerate(zip(students, arguments), start=1):
        size = count_parameters(student)
        controls = len(recipe.controls) if "controls" in stages and number == len(students) else 0
        copies = ("distill" in stages) + controls
        if "prune" in stages:
            parts["pruned students"] = parts.get("pruned students", 0) + size * stored.itemsize
        if copies:
            kept = 0 if args.save_strategy == SaveStrategy.NO else 1
            checkpoint = training_checkpoint_bytes(student, args, has_adapter=recipe.lora is not None)
            each = size * stored.itemsize + kept * checkpoint
            name = "trained students and one checkpoint of each"
            parts[name] = parts.get(name, 0) + each * copies
    if "correct" in stages and recipe.teacher_correction is not None:
        size = count_parameters(teacher)
        full = recipe.teacher_correction.method == "full"
        parts["the corrected teacher"] = size * stored.itemsize + (checkpoint_bytes(size) if full else 0)
    folder = Path(recipe.output_dir)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    needed, free = sum(parts.values()) - there, shutil.disk_usage(_existing(folder)).free
    if needed > free:
        listed = ", ".join(f"{name} {byte_size(size)}" for name, size in parts.items())
        raise OutputError(
            f"The disk of {folder} has {byte_size(free)} free, and the run needs at least {byte_size(needed)} "
            f"({listed}). Free space, or choose another output_dir."
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
