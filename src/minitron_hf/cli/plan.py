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
    _reader,
    _require_prepared,
    _sizes,
    _texts,
)
from .output import wrote
from .printing import _print_shapes
from .recommend import recommend as recommendation
from .wording import takes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..sizes.request import PrunerConfig


#: Options that moved to commands of their own, still taken for one release.
Moved = Annotated[Optional[str], typer.Option(hidden=True)]  # noqa: UP045
MovedInt = Annotated[Optional[int], typer.Option(hidden=True)]  # noqa: UP045
MovedFloat = Annotated[Optional[float], typer.Option(hidden=True)]  # noqa: UP045
Portable = Annotated[bool, typer.Option("--portable", help="Take only sizes that every runtime loads.")]
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
    portable: Portable = False,
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
    set_ = [*(set_ or ()), *(["portable=true"] if portable else ())]
    request = _request(given, target, set_)
    _require_target_options(request, data, scores)
    _require_no_plan(output, overwrite)
    if device is None or output is not None:
        _plan_or_sizes(teacher, output, scores, request, None if data is None else _texts(data, split, text_field))
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


def _request(given: Mapping[str, Any], target: str | None, overrides: list[str]) -> PrunerConfig:
    """The sizes that the options ask for."""
    from ..recipe.reading import apply_overrides
    from ..sizes.request import PrunerConfig

    takes(PrunerConfig.__dataclass_fields__)
    if target is not None:
        number = _number("target", target)
        given = {**given, "target_parameters": number if number < 1 else round(number)}
    return PrunerConfig.from_dict(apply_overrides(given, overrides))


def _require_target_options(request: PrunerConfig, data: str | None, scores: Path | None) -> None:
    """Refuse a target without text or scores, and text that nothing reads."""
    name = next(iter({**request.targets, "target_parameters": None})).replace("target_parameters", "--target")
    if request.targets or (data is not None and request.vocab_size is None):
        given_options = {name: request.targets or None, "--data": data, "--scores": scores}
        if missing := ", ".join(option for option, value in given_options.items() if value is None):
            raise DataError(f"plan: {name}, --data and --scores belong together. Missing: {missing}.")


def _require_no_plan(output: Path | None, overwrite: bool) -> None:
    from ..pruning.plan import INDICES_NAME, PLAN_NAME
    from ..sizes.request import PRUNER_CONFIG_NAME

    if output is not None:
        # The plan is written last: indices alone, or with a config, are what a killed command left.
        by_hand = [] if (output / INDICES_NAME).exists() else [PRUNER_CONFIG_NAME]
        _require_prepared(output, [PLAN_NAME, *by_hand], overwrite)


def _say_moved(option: str, command: str) -> None:
    typer.echo(
        f"plan {option} is deprecated and will be removed in the next release: use `minitron-hf {command}`.", err=True
    )


def _plan_or_sizes(teacher: str, output: Path | None, scores: Path | None, request: PrunerConfig, texts: Any) -> None:
    if output is None and texts is None and scores is None:
        _print_sizes(teacher, request)
    else:
        _plan(teacher, output, scores, request, texts)


def _print_sizes(teacher: str, request: PrunerConfig) -> None:
    """Sizes and counts of the student, from the teacher's config."""
    from ..families import spec_for
    from ..models import load_config
    from ..sizes.compared import compared_counts
    from ..sizes.counts import parameter_counts
    from ..sizes.student import check_sizes, student_config

    config = load_config(teacher)
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


def _plan(teacher: str, output: Path | None, scores: Path | None, request: PrunerConfig, texts: Any) -> None:
    from ..data import tokenize_once
    from ..locks import locked_folder
    from ..models import load_config
    from ..pruning.planning import make_plan
    from ..scoring.scores import ImportanceScores
    from ..sizes.compared import compared_counts
    from ..sizes.student import require_some_size
    from ..vocabulary.counts import count_tokens

    config = load_config(teacher)
    require_some_size(config, request)
    read = None if scores is None else ImportanceScores.from_pretrained(scores)
    if read is not None:
        read.require_model(config)  # before the weights are loaded
    counts = None
    if request.vocab_size is not None and texts is not None:
        reader = _reader(teacher, texts)
        texts = tokenize_once(texts, reader)
        counts = count_tokens(texts, reader)
    if not request.targets or texts is None or read is None:
        made = make_plan(_load(teacher)[0] if request.hidden_basis else config, request, read, token_counts=counts)
    else:
        from ..pruning.prune import plan_for_target

        model, tokenizer = _load(teacher, texts)
        given: Any = {"processing_class": tokenizer, "token_counts": counts, "output_dir": output}
        made = plan_for_target(model, request, read, texts, **given)
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
            path = made.save_pretrained(output, with_request=True)
        wrote(path)
