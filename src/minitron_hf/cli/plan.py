"""`minitron-hf plan`: the units and layers to keep, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import DataError
from .fit import fit
from .options import (
    Overwrite,
    Settings,
    SizeOption,
    Split,
    Target,
    TextField,
    _load,
    _number,
    _require_free,
    _sizes,
    _texts,
)
from .output import wrote
from .printing import _print_shapes
from .recommend import recommend as recommendation

if TYPE_CHECKING:
    from collections.abc import Mapping


#: Options that moved to commands of their own, still taken for one release.
Moved = Annotated[Optional[str], typer.Option(hidden=True)]  # noqa: UP045
MovedInt = Annotated[Optional[int], typer.Option(hidden=True)]  # noqa: UP045
MovedFloat = Annotated[Optional[float], typer.Option(hidden=True)]  # noqa: UP045
PlanScores = Annotated[Optional[Path], typer.Option(help="Folder or file with scores.")]  # noqa: UP045
PlanOutput = Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder to write to.")]  # noqa: UP045
TargetData = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="With --target or --vocab-size, text to measure or count: file, saved dataset or Hub id."),
]


def plan(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder; --target and hidden_basis read its weights.")],
    output: PlanOutput = None,
    scores: PlanScores = None,
    hidden_size: SizeOption = None,
    intermediate_size: SizeOption = None,
    num_attention_heads: SizeOption = None,
    num_key_value_heads: SizeOption = None,
    num_hidden_layers: SizeOption = None,
    vocab_size: SizeOption = None,
    set_: Settings = None,
    target: Target = None,
    data: TargetData = None,
    split: Split = "train",
    text_field: TextField = "text",
    overwrite: Overwrite = False,
    recommend: Annotated[bool, typer.Option("--recommend", hidden=True)] = False,
    tokens: Moved = None,
    goal: Moved = None,
    rounds: MovedInt = None,
    own_corpus: Annotated[bool, typer.Option("--own-corpus", hidden=True)] = False,
    teacher_learning_rate: MovedFloat = None,
    train_data: Moved = None,
    eval_data: Moved = None,
    device: Moved = None,
    devices: Annotated[int, typer.Option(hidden=True)] = 1,
    sharding: Annotated[str, typer.Option(hidden=True)] = "ddp",
    batch_size: Annotated[int, typer.Option(hidden=True)] = 1,
    max_length: Annotated[int, typer.Option(hidden=True)] = 1024,
    optimizer: Annotated[str, typer.Option(hidden=True)] = "adamw",
    lora_rank: MovedInt = None,
) -> None:
    """Choose the units and layers to keep (make_plan), and print the shapes.

    Without --output, nothing is written. With --target instead of sizes, several shapes that meet it are pruned and
    measured on --data before any retraining, and the best one is planned (plan_for_target). With --vocab-size, the
    tokens to keep are the most frequent ones of --data.
    """
    heads = (num_attention_heads, num_key_value_heads)
    sizes = (hidden_size, intermediate_size, *heads, num_hidden_layers, vocab_size)
    given = _sizes(*sizes)
    if recommend:
        _say_moved("--recommend", "recommend")
        target = _only_target(target, device, given, scores)
        corpora = (train_data, eval_data, False)
        own = (goal or "quality", rounds, own_corpus, teacher_learning_rate, *corpora, output, set_)
        recommendation(teacher, target, tokens, *own, overwrite)
        return
    if device is None and (devices, sharding, lora_rank) != (1, "ddp", None):
        raise DataError("plan: --devices, --sharding and --lora-rank belong to `minitron-hf fit`.")
    _require_target_options(target, None if _only_counts(given, set_, target) else data, scores)
    _require_no_plan(output, overwrite)
    if device is None or output is not None:
        _plan_and_print(teacher, output, scores, given, set_ or [], target, data, split, text_field)
    if device is not None:
        _say_moved("--device", "fit")
        fit(teacher, device, None, *sizes, set_, devices, sharding, batch_size, max_length, optimizer, lora_rank)


def _only_target(target: str | None, device: str | None, given: Mapping[str, Any], scores: Path | None) -> str:
    """The target of --recommend; refuses other options."""
    if device is not None or given or scores is not None or target is None:
        raise DataError(
            "--recommend needs --target. It chooses the sizes itself, so it takes no sizes, --scores or --device. "
            "Use `minitron-hf recommend` instead."
        )
    return target


def _only_counts(given: Mapping[str, Any], set_: list[str] | None, target: str | None) -> bool:
    """Whether --data is for the counts of tokens alone."""
    cuts = "vocab_size" in given or any(one.startswith("vocab_size=") for one in set_ or ())
    return cuts and target is None


def _require_target_options(target: str | None, data: str | None, scores: Path | None) -> None:
    if (target is None) != (data is None) or (target is not None and scores is None):
        given_options = {"--target": target, "--data": data, "--scores": scores}
        missing = ", ".join(name for name, value in given_options.items() if value is None)
        raise DataError(f"plan: --target, --data and --scores belong together; {missing} is missing.")


def _require_no_plan(output: Path | None, overwrite: bool) -> None:
    from ..pruning.plan import INDICES_NAME, PLAN_NAME
    from ..sizes.request import PRUNER_CONFIG_NAME

    if output is not None:
        _require_free(output, [PLAN_NAME, INDICES_NAME, PRUNER_CONFIG_NAME], overwrite)


def _say_moved(option: str, command: str) -> None:
    typer.echo(
        f"plan {option} is deprecated and will be removed in the next release: use `minitron-hf {command}`.", err=True
    )


def _plan_and_print(
    teacher: str,
    output: Path | None,
    scores: Path | None,
    given: dict[str, int | float],
    overrides: list[str],
    target: str | None,
    data: str | None,
    split: str,
    text_field: str,
) -> None:
    if target is not None:
        number = _number("target", target)
        given["target_parameters"] = number if number < 1 else round(number)
    texts = None if data is None else _texts(data, split, text_field)
    if output is None and texts is None and scores is None:
        _print_sizes(teacher, given, overrides)
    else:
        _plan(teacher, output, scores, given, overrides, texts)


def _print_sizes(teacher: str, given: Mapping[str, int | float], overrides: list[str]) -> None:
    """Sizes and counts of the student, from the teacher's config."""
    from ..families import spec_for
    from ..models import load_config
    from ..recipe.reading import apply_overrides
    from ..sizes.compared import compared_counts
    from ..sizes.counts import parameter_counts
    from ..sizes.request import PrunerConfig
    from ..sizes.student import check_sizes, student_config

    config, request = load_config(teacher), PrunerConfig.from_dict(apply_overrides(given, overrides))
    spec = spec_for(config)
    before, (after, notes) = spec.sizes(config), check_sizes(config, request)
    both = {"teacher": config, "student": student_config(config, request)}
    _print_shapes(
        {
            "model_type": spec.model_type,
            "sizes": {axis: {"teacher": before[axis], "student": after[axis]} for axis in before},
            **compared_counts({name: parameter_counts(one) for name, one in both.items()}),
            "notes": notes,
        }
    )


def _plan(
    teacher: str,
    output: Path | None,
    scores: Path | None,
    given: Mapping[str, int | float],
    overrides: list[str],
    texts: Any,
) -> None:
    from ..data import tokenize_once
    from ..locks import locked_folder
    from ..models import load_config, load_tokenizer
    from ..pruning.planning import make_plan
    from ..recipe.reading import apply_overrides
    from ..scoring.scores import ImportanceScores
    from ..sizes.compared import compared_counts
    from ..sizes.request import PrunerConfig
    from ..sizes.student import require_some_size
    from ..vocabulary.counts import count_tokens

    request = PrunerConfig.from_dict(apply_overrides(given, overrides))
    config = load_config(teacher)
    require_some_size(config, request)
    read = None if scores is None else ImportanceScores.from_pretrained(scores)
    counts = None
    if request.vocab_size is not None and texts is not None:
        tokenizer = load_tokenizer(teacher)
        texts = tokenize_once(texts, tokenizer)
        counts = count_tokens(texts, tokenizer)
    if not request.targets or texts is None or read is None:
        made = make_plan(_load(teacher)[0] if request.hidden_basis else config, request, read, token_counts=counts)
    else:
        from ..pruning.prune import plan_for_target

        model, tokenizer = _load(teacher)
        made = plan_for_target(model, request, read, texts, processing_class=tokenizer, token_counts=counts)
    _print_shapes(
        {
            "model_type": made.model_type,
            "sizes": made.sizes,
            **compared_counts({"teacher": made.teacher, "student": made.student}),
            "notes": made.notes,
        }
    )
    if output is not None:
        with locked_folder(output):
            PrunerConfig.from_dict(made.pruner_config).save_pretrained(output)
            path = made.save_pretrained(output)
        wrote(path)
