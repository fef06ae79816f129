"""`minitron-hf plan`: sizes, recommendations and capacity, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..errors import DataError
from .options import Settings, SizeOption, _load, _number, _size, _texts
from .printing import _print_capacity, _print_recommendation, _print_shapes, _say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..distillation.fake_runs import Setup
    from ..pruning.plan import PruningPlan


def plan(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder; only its config is read.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="Folder to write to; with --recommend, the recipe file."),
    ] = None,
    scores: Annotated[Optional[Path], typer.Option(help="Folder or file with scores.")] = None,  # noqa: UP045
    hidden_size: SizeOption = None,
    intermediate_size: SizeOption = None,
    num_attention_heads: SizeOption = None,
    num_key_value_heads: SizeOption = None,
    num_hidden_layers: SizeOption = None,
    set_: Settings = None,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Say what the papers would do, and why; write it as a recipe.")
    ] = False,
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NUMBER|FRACTION", help="Parameters to keep, such as 4.5B or 0.5."),
    ] = None,
    tokens: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NUMBER", help="Tokens to distil on, such as 500M (default: 94B, as the papers)."),
    ] = None,
    goal: Annotated[str, typer.Option(help="quality or latency.")] = "quality",
    rounds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="How often to prune and distil (default: a third at most goes at once)."),
    ] = None,
    own_corpus: Annotated[
        bool, typer.Option("--own-corpus", help="The corpus is the one that the teacher was trained on.")
    ] = False,
    teacher_learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="The peak that the teacher was trained with; its correction on the corpus needs it."),
    ] = None,
    train_data: Annotated[Optional[str], typer.Option(help="The recipe's corpus.")] = None,  # noqa: UP045
    eval_data: Annotated[Optional[str], typer.Option(help="The recipe's held-out corpus.")] = None,  # noqa: UP045
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="With --target, text to measure shapes on: file, saved dataset or Hub id."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of that dataset.")] = "train",
    text_field: Annotated[str, typer.Option(help="Column that holds its text.")] = "text",
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME|SIZE", help="Say whether distilling fits on a device: h100, a100, l4, …, or 24GB."),
    ] = None,
    devices: Annotated[int, typer.Option(help="With --device, how many.")] = 1,
    sharding: Annotated[str, typer.Option(help="With --device: ddp, fsdp2, zero2 or zero3.")] = "ddp",
    batch_size: Annotated[int, typer.Option(help="With --device, rows on each of them, per pass.")] = 1,
    max_length: Annotated[int, typer.Option(help="With --device, tokens of a row.")] = 1024,
    optimizer: Annotated[str, typer.Option(help="With --device: adamw or adamw_8bit.")] = "adamw",
    lora_rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="With --device: train an adapter of that rank (default: all weights)."),
    ] = None,
) -> None:
    """Decide what stays (make_plan), and print the shapes.

    With a --target in the place of sizes, and calibration text as --data, shapes that meet it are cut and measured
    before any retraining, and the best is planned (plan_for_target).

    With --recommend and a --target, print what the papers would do with this teacher, each with reason and source.
    With --output, --train-data and --eval-data the recipe is written too; --set changes its entries.

    With a --device, print what distilling that student takes on each (estimate_capacity). Sizes alone are enough then.
    """
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": num_hidden_layers,
    }
    given = {name: _size(name, text) for name, text in sizes.items() if text is not None}
    if recommend:
        if device is not None:
            raise DataError("--device asks about a student's sizes, on which --recommend decides. Plan those sizes.")
        if given or scores is not None or target is None:
            raise DataError(
                "--recommend needs --target, and takes no sizes and no scores: it decides on the sizes. "
                "--set prune.hidden_size=… changes them in the recipe, --set rounds.1.prune.hidden_size=… those of a "
                "round."
            )
        from ..recipe.recommendations import recommend as decide

        if output is not None and (train_data is None or eval_data is None):
            raise DataError("A recipe names its corpora: --output needs --train-data and --eval-data.")
        if output is None and (set_ or train_data or eval_data):
            raise DataError("--set, --train-data and --eval-data are entries of the recipe: --output names its file.")
        from ..files import replacing_file
        from ..models import load_config

        made = decide(
            load_config(teacher),
            _number("target", target),
            goal=goal,  # type: ignore[arg-type] # refused there if unknown
            rounds=rounds,
            own_corpus=own_corpus,
            teacher_learning_rate=teacher_learning_rate,
            **({} if tokens is None else {"tokens": _number("tokens", tokens)}),
        )
        _print_recommendation(teacher, made)
        if output is not None:
            recipe = made.recipe(
                teacher,
                train=train_data,
                eval=eval_data,
                output_dir=f"runs/{output.stem}",
                overrides=set_ or [],
            )
            with replacing_file(output) as temporary:
                temporary.write_text(made.to_yaml(recipe), encoding="utf-8")
            _say(f"Wrote {output}")
        return
    setup: dict[str, Any] = {
        "devices": devices,
        "sharding": sharding,
        "batch_size": batch_size,
        "max_length": max_length,
        "optimizer": optimizer,
        "lora_rank": lora_rank,
    }
    checked = None if device is None else _setup(device, setup)
    if checked is None and (devices, sharding, lora_rank) != (1, "ddp", None):
        raise DataError("plan: --devices, --sharding and --lora-rank say how to distil on a --device. Name it.")
    if output is None and (checked is None or target is not None or scores is not None):
        raise DataError("plan: --output names the folder to write to.")
    if (target is None) != (data is None) or (target is not None and scores is None):
        raise DataError("plan: --target, --data to measure shapes on, and --scores go together.")
    if target is not None:
        number = _number("target", target)
        given["target_parameters"] = number if number < 1 else round(number)
    if output is not None:
        texts = None if data is None else _texts(data, split, text_field)
        student = _plan(teacher, output, scores, given, set_ or [], texts).build_student_config()
    if checked is not None:
        from ..distillation.capacity import estimate_capacity
        from ..models import load_config
        from ..recipe.reading import apply_overrides
        from ..sizes.request import PrunerConfig
        from ..sizes.student import student_config

        config = load_config(teacher)
        if output is None:
            student = student_config(config, PrunerConfig.from_dict(apply_overrides(given, set_ or [])))
        _print_capacity(estimate_capacity(config, student, checked), device, checked)


def _setup(device: str, setup: Mapping[str, Any]) -> Setup:
    """What a device's name, or the size of its memory, and the other options come to."""
    from ..distillation.devices import DEVICES, Device
    from ..distillation.fake_runs import Setup

    known = DEVICES.get(device.lower())
    if known is None:
        size = device.upper().removesuffix("GB")
        if size == device.upper() or not size.isdigit():
            raise DataError(f"--device {device}: expected a size such as 24GB, or one of {', '.join(DEVICES)}.")
        known = Device(int(size) * 1e9)
    return Setup(device=known, **setup)


def _plan(
    teacher: str,
    output: Path,
    scores: Path | None,
    given: Mapping[str, int | float],
    overrides: list[str],
    texts: Any,
) -> PruningPlan:
    from ..models import load_config
    from ..pruning.planning import make_plan
    from ..recipe.reading import apply_overrides
    from ..scoring.scores import ImportanceScores
    from ..sizes.request import PrunerConfig

    request = PrunerConfig.from_dict(apply_overrides(given, overrides))
    read = None if scores is None else ImportanceScores.from_pretrained(scores)
    if texts is None or read is None:
        made = make_plan(load_config(teacher), request, read)
    else:
        from ..pruning.prune import plan_for_target

        model, tokenizer = _load(teacher)
        made = plan_for_target(model, request, read, texts, processing_class=tokenizer)
    PrunerConfig.from_dict(made.pruner_config).save_pretrained(output)
    path = made.save_pretrained(output)
    _print_shapes(
        {
            "model_type": made.model_type,
            "sizes": made.sizes,
            **{
                key: {"teacher": made.teacher[key], "student": made.student[key]}
                for key in ("num_parameters", "num_parameters_without_embeddings")
            },
            "notes": made.notes,
        }
    )
    _say(f"Wrote {path}")
    return made
