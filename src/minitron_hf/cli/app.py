"""The command line. Commands only parse arguments and print; everything heavy is imported when a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .._version import __version__
from ..errors import DataError, MinitronError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from ..distillation.capacity import Capacity, Setup
    from ..families import ArchSpec
    from ..pruning.plan import PruningPlan
    from ..recipe.recommendations import Recommendation

app = typer.Typer(
    name="minitron-hf",
    help="Make large causal language models small: score, prune width and depth, distil, measure, publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045 (Typer reads the annotation at run time, on Python 3.10 too)
    typer.Option("--set", metavar="KEY=VALUE", help="Change one entry; the value is YAML. Repeatable."),
]
Accelerate = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="NAME|FILE", help="Train in several processes: ddp, fsdp2, zero2, zero3 or a file."),
]
Processes = Annotated[Optional[int], typer.Option(help="How many (default: one for every accelerator).")]  # noqa: UP045
SizeOption = Annotated[Optional[str], typer.Option(metavar="INT|FRACTION", help="Units or fraction to keep.")]  # noqa: UP045


def main() -> None:
    """Entry point: errors of the user are one message and exit code 2, never a traceback."""
    try:
        app()
    except (MinitronError, OSError) as error:
        from ..recipe.launching import leave_message

        if not leave_message(str(error)):
            typer.echo(f"minitron-hf: {error}", err=True)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minitron-hf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    until: Annotated[Optional[str], typer.Option(help="Last stage to run.")] = None,  # noqa: UP045
    set_: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load configs only, make every refusal, print the shapes.")
    ] = False,
    redo: Annotated[bool, typer.Option("--redo", help="Do stages again whose inputs have changed.")] = False,
    accelerate: Accelerate = None,
    num_processes: Processes = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Run a recipe: score, plan, prune, distill, controls, evaluate, card, publish.

    Stages that are done for the same inputs are skipped; a killed run resumes. With --accelerate, stages that train do
    so in several processes (`distributed` in the recipe).
    """
    from ..recipe.launching import is_launched
    from ..recipe.runner import check_recipe, run_recipe
    from ..recipe.schema import Recipe

    if is_launched():
        raise DataError("run starts its processes itself: minitron-hf run RECIPE --accelerate ddp --num-processes 8")
    loaded = Recipe.from_yaml(recipe, [*(set_ or []), *_distributed(accelerate, num_processes)])
    if dry_run:
        _print_shapes(check_recipe(loaded))
        return
    try:
        folder = run_recipe(
            loaded, until=until, redo=redo, show_progress=not quiet, report=_say, report_shapes=_print_shapes
        )
    except KeyboardInterrupt:
        _say("Interrupted. The same command resumes where this one stopped.")
        raise typer.Exit(130) from None
    _print_results(folder)


@app.command()
def score(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    data: Annotated[str, typer.Option(help="Calibration text: file, saved dataset or Hub id.")],
    output: Output,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    text_field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    set_: Settings = None,
) -> None:
    """Score heads, neurons, channels and layers on calibration text (estimate_importance)."""
    from ..recipe.schema import apply_overrides
    from ..scoring.importance import estimate_importance

    texts = _texts(data, split, text_field)
    model, tokenizer = _load(teacher)
    scores = _with_arguments(
        "estimate_importance",
        lambda: estimate_importance(model, texts, processing_class=tokenizer, **apply_overrides({}, set_ or [])),
    )
    _say(f"Wrote {scores.save_pretrained(output)}")


@app.command()
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
        from ..recipe.schema import apply_overrides
        from ..sizes.request import PrunerConfig, student_config

        config = load_config(teacher)
        if output is None:
            student = student_config(config, PrunerConfig.from_dict(apply_overrides(given, set_ or [])))
        _print_capacity(estimate_capacity(config, student, checked), device, checked)


def _setup(device: str, setup: Mapping[str, Any]) -> Setup:
    """What a device's name, or the size of its memory, and the other options come to."""
    from ..distillation.capacity import DEVICES, Device, Setup

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
    from ..pruning.plan import make_plan
    from ..recipe.schema import apply_overrides
    from ..scoring.importance import ImportanceScores
    from ..sizes.request import PrunerConfig

    request = PrunerConfig.from_dict(apply_overrides(given, overrides))
    read = None if scores is None else ImportanceScores.from_pretrained(scores)
    if texts is None or read is None:
        made = make_plan(load_config(teacher), request, read)
    else:
        from ..pruning.surgery import plan_for_target

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


@app.command()
def search(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    scores: Annotated[Path, typer.Option(help="Folder or file with scores.")],
    space: Annotated[
        list[str],
        typer.Option(metavar="SIZE=LIST", help="Sizes to try, as hidden_size=[0.5,0.75,1.0]. Repeatable."),
    ],
    data: Annotated[str, typer.Option(help="Calibration text: file, saved dataset or Hub id.")],
    output: Output,
    max_parameters: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NUMBER", help="Budget of parameters, such as 4.5B; or another budget."),
    ] = None,
    max_memory_bytes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NUMBER", help="Budget of bytes for weights and cache, such as 16B."),
    ] = None,
    max_seconds_per_token: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Budget of time to decode a token on this machine."),
    ] = None,
    train_data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Corpus to distil on; without it, shapes are ranked by what pruning alone loses."),
    ] = None,
    eval_data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Held-out text that decides (default: the calibration text)."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the datasets.")] = "train",
    text_field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    set_: Settings = None,
) -> None:
    """Compare shapes within a budget: prune, distil a little, keep the better half (search_architectures).

    --set takes its other arguments (num_candidates, num_rounds, num_tokens, tolerance, distillation.learning_rate, …).
    Resumes what was interrupted.
    """
    from ..data import load_text_dataset
    from ..publishing.plots import write_plots
    from ..recipe.schema import apply_overrides, read_yaml
    from ..scoring.importance import ImportanceScores
    from ..search.architectures import search_architectures, table

    sizes = {name: read_yaml(listed) for name, _, listed in (one.partition("=") for one in space)}
    settings = apply_overrides({"distillation": {"dataset_text_field": text_field}}, set_ or [])
    budgets = {"max_parameters": max_parameters, "max_memory_bytes": max_memory_bytes}
    limits: dict[str, Any] = {name: _number(name, text) for name, text in budgets.items() if text is not None}
    calibration = _texts(data, split, text_field)
    held_out = None if eval_data is None else _texts(eval_data, split, text_field)
    read = ImportanceScores.from_pretrained(scores)
    model, tokenizer = _load(teacher)
    found = _with_arguments(
        "search_architectures",
        lambda: search_architectures(
            model,
            read,
            space=sizes,
            calibration_data=calibration,
            max_seconds_per_token=max_seconds_per_token,
            train_dataset=None if train_data is None else load_text_dataset(train_data, split=split),
            eval_data=held_out,
            processing_class=tokenizer,
            output_dir=output,
            **limits,
            **settings,
        ),
    )
    _console().print(table(found.candidates))
    found.best.save_pretrained(output)
    write_plots(output)
    _say(f"Best: {found.candidates[0].name}. Wrote {found.path}")


@app.command()
def prune(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    plan: Annotated[Path, typer.Option(help="Folder with the plan.")],
    output: Output,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the student with the masked teacher; loads both into memory.")
    ] = False,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Calibration text for a plan with repair: file, saved dataset or Hub id."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    text_field: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    set_: Settings = None,
) -> None:
    """Cut the student out of the teacher's checkpoint (prune_checkpoint), a few rows at a time.

    Checkpoints without safetensors, and teachers of a plan with repair or --verify, are loaded into memory as a whole
    (carry_out). --set takes num_samples, max_length, packing and batch_size of a repair.
    """
    from ..files import replacing_folder, require_empty
    from ..pruning.plan import PruningPlan
    from ..pruning.streaming import is_streamable, prune_checkpoint
    from ..pruning.surgery import carry_out
    from ..recipe.schema import apply_overrides

    made = PruningPlan.from_pretrained(plan)
    if made.repair and data is None:
        raise DataError(f"The plan in {plan} has repair={made.repair!r}: --data names calibration text for it.")
    if (data or set_) and not made.repair:
        raise DataError(f"The plan in {plan} has no repair, so --data and --set say nothing. Plan with --set repair=…")
    require_empty(output)
    if is_streamable(teacher) and not verify and not made.repair:
        prune_checkpoint(teacher, output, made)
    else:
        if not verify and not made.repair:
            _say(f"{teacher} holds no safetensors, so all of it is loaded into memory.")
        texts = None if data is None else _texts(data, split, text_field)
        model, tokenizer = _load(teacher)
        arguments = apply_overrides({}, set_ or [])
        student = _with_arguments(
            "repaired_weights",
            lambda: carry_out(model, made, texts, processing_class=tokenizer, verify=verify, **arguments),
        )
        if verify:
            _say(student.pruning_plan.notes[-1])
        with replacing_folder(output) as folder:
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            student.pruning_plan.save_pretrained(folder)
    _say(f"Wrote {output}")


@app.command()
def cache(
    teacher: Annotated[str, typer.Argument(help="Hub id or folder.")],
    data: Annotated[str, typer.Option(help="Corpus: file, saved dataset or Hub id.")],
    output: Output,
    split: Annotated[str, typer.Option(help="Split of the corpus.")] = "train",
    top_k: Annotated[int, typer.Option(help="Tokens to keep of every distribution.")] = 64,
    set_: Settings = None,
) -> None:
    """Write down what the teacher says of a corpus (cache_teacher_logits); --set takes the arguments of distill.

    Resumes what was interrupted.
    """
    from ..data import load_text_dataset
    from ..distillation.config import DistillationConfig
    from ..distillation.teacher_cache import cache_teacher_logits
    from ..recipe.schema import DISTILL_DEFAULTS, apply_overrides

    model, tokenizer = _load(teacher)
    settings = {**apply_overrides(dict(DISTILL_DEFAULTS), set_ or []), "eval_strategy": "no"}
    args = DistillationConfig(str(output), **settings)
    rows = load_text_dataset(data, split=split)
    _say(f"Wrote {cache_teacher_logits(model, rows, output, top_k=top_k, args=args, processing_class=tokenizer)}")


@app.command()
def distill(
    student: Annotated[str, typer.Argument(help="Folder or Hub id of the pruned student.")],
    train_data: Annotated[str, typer.Option(help="Corpus: file, saved dataset, Hub id, or a cache of the teacher.")],
    output: Output,
    teacher: Annotated[Optional[str], typer.Option(help="Hub id or folder; not needed for a cache.")] = None,  # noqa: UP045
    eval_data: Annotated[Optional[str], typer.Option(help="Held-out corpus, likewise.")] = None,  # noqa: UP045
    split: Annotated[str, typer.Option(help="Split of the corpus.")] = "train",
    eval_split: Annotated[str, typer.Option(help="Split of the held-out corpus.")] = "train",
    accelerate: Accelerate = None,
    num_processes: Processes = None,
    set_: Settings = None,
) -> None:
    """Train the student to predict like the teacher (DistillationTrainer); --set takes its arguments.

    Resumes from the last checkpoint in the output folder.
    """
    from ..recipe.launching import is_main_process, launch

    if accelerate is not None:
        options = {
            "--train-data": train_data,
            "--output": str(output),
            "--teacher": teacher,
            "--eval-data": eval_data,
            "--split": split,
            "--eval-split": eval_split,
        }
        given = [f"{name}={value}" for name, value in options.items() if value is not None]
        given += [f"--set={entry}" for entry in set_ or []]
        launch(["distill", *given, "--", student], accelerate, num_processes)
        return
    if num_processes is not None:
        raise DataError("--num-processes needs --accelerate NAME, such as ddp.")
    from ..recipe.schema import DISTILL_DEFAULTS, apply_overrides
    from ..recipe.stages import distill as run_distillation

    model, tokenizer = _load(student, dtype="float32")
    settings = apply_overrides(dict(DISTILL_DEFAULTS), set_ or [])
    if eval_data is None:
        settings["eval_strategy"] = "no"
    run_distillation(
        model,
        teacher,
        output,
        tokenizer,
        settings,
        _corpus(train_data, split),
        None if eval_data is None else _corpus(eval_data, eval_split),
    )
    if is_main_process():
        _say(f"Wrote {output}")


@app.command()
def accelerate_config(
    name: Annotated[Optional[str], typer.Argument(help="ddp, fsdp2, zero2 or zero3.")] = None,  # noqa: UP045
) -> None:
    """Print the path of a packaged Accelerate configuration, for `accelerate launch --config_file`; or all names."""
    from ..recipe.launching import CONFIG_NAMES
    from ..recipe.launching import accelerate_config as path_of

    typer.echo("\n".join(CONFIG_NAMES) if name is None else path_of(name))


@app.command(hidden=True)
def stage(
    name: Annotated[str, typer.Argument()],
    recipe: Annotated[Path, typer.Argument()],
    student: Annotated[Optional[Path], typer.Argument()] = None,  # noqa: UP045
    output: Annotated[Optional[Path], typer.Argument()] = None,  # noqa: UP045
    set_: Settings = None,
    round_: Annotated[Optional[int], typer.Option("--round")] = None,  # noqa: UP045
    quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
) -> None:
    """What a run does in several processes: `correct`, or `distill` the student in one folder into another."""
    from ..recipe.schema import Recipe, apply_overrides
    from ..recipe.stages import Run, correct, train

    at_work = Run(Recipe.from_yaml(recipe), show_progress=not quiet)
    at_work = at_work if round_ is None else at_work.in_round(round_)
    if name == "correct":
        correct(at_work)
    else:
        assert student is not None
        assert output is not None
        train(at_work, student, output, apply_overrides({}, set_ or []))


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="NAME=MODEL...", help="For example teacher=… student=…")],
    data: Annotated[str, typer.Option(help="Held-out text: file, saved dataset or Hub id.")],
    output: Output,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "train",
    set_: Settings = None,
) -> None:
    """Measure models side by side on the same text (evaluate_models)."""
    from ..data import load_text_dataset
    from ..evaluation.evaluate import evaluate_models
    from ..models import load_tokenizer
    from ..recipe.schema import apply_overrides

    named = dict(model.partition("=")[::2] for model in models)
    if not all(named.values()):
        raise DataError(f"Expected NAME=MODEL for every model, got {' '.join(models)}.")
    tokenizer = load_tokenizer(next(iter(named.values())))
    _with_arguments(
        "evaluate_models",
        lambda: evaluate_models(
            named,
            load_text_dataset(data, split=split),
            processing_class=tokenizer,
            output_path=output,
            **apply_overrides({}, set_ or []),
        ),
    )
    _print_results(output)


@app.command()
def card(folder: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Draw the plots and write the model card from the files of a run folder."""
    from ..publishing.card import write_model_card

    _say(f"Wrote {write_model_card(folder)}")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    revision: Annotated[Optional[str], typer.Option(help="Branch to push to.")] = None,  # noqa: UP045
) -> None:
    """Upload a student with plan, plots, evaluation and card to the Hub, in one commit."""
    from ..publishing.hub import push_student_to_hub

    _say(f"Published {push_student_to_hub(folder, repo_id, private=not public, revision=revision).commit_url}")


@app.command()
def families(
    model_type: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="[MODEL_TYPE | draft MODEL]", help="Show this family alone; or draft a new one."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(metavar="", help="With draft: a model type of Transformers, a folder or a Hub id."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the matrix as Markdown.")] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="With draft: the file to write, instead of printing it."),
    ] = None,
) -> None:
    """Print what can be cut in which model family, and why not where it cannot.

    `families draft MODEL` writes the first draft of a family's table, from the shapes of models that are built without
    memory.
    """
    from ..survey.matrix import described, support_matrix, to_markdown

    if model_type == "draft":
        if model is None:
            raise DataError("families draft: name a model type, a folder or a Hub id.")
        _write_draft(model, output)
    elif model_type is not None:
        for about, spec in described(model_type):
            _print_family(about, spec)
    elif markdown:
        typer.echo(to_markdown(support_matrix()))
    else:
        _print_matrix()


def _write_draft(model: str, output: Path | None) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ..files import replacing_file
    from ..models import load_config
    from ..survey.draft import draft_family

    text = draft_family(AutoConfig.for_model(model) if model in CONFIG_MAPPING else load_config(model))
    if output is None:
        typer.echo(text, nl=False)
    else:
        with replacing_file(output) as temporary:
            temporary.write_text(text, encoding="utf-8")
        _say(f"Wrote {output}")


def _distributed(accelerate: str | None, num_processes: int | None) -> list[str]:
    """The options for several processes as entries of a recipe."""
    entries = {"config": accelerate, "num_processes": num_processes}
    return [f"distributed.{key}={value}" for key, value in entries.items() if value is not None]


def _say(text: str) -> None:
    typer.echo(text)


def _load(name: str, **kwargs: Any) -> tuple[Any, Any]:
    from ..models import load_model, load_tokenizer

    return load_model(name, **kwargs), load_tokenizer(name)


def _texts(data: str, split: str, text_field: str) -> Any:
    """Calibration texts one by one, or rows of tokens."""
    from ..data import load_text_dataset

    rows = load_text_dataset(data, split=split)
    columns = rows.column_names or []
    if not {text_field, "input_ids"} & {*columns}:
        raise DataError(f"{data} has the columns {', '.join(columns)}, and no {text_field!r}. Pass --text-field.")
    return (row[text_field] for row in rows) if text_field in columns else rows


def _corpus(source: str, split: str) -> Any:
    from ..data import load_text_dataset
    from ..distillation.teacher_cache import MANIFEST_NAME, load_teacher_cache

    if (Path(source) / MANIFEST_NAME).is_file():
        return load_teacher_cache(source)
    return load_text_dataset(source, split=split)


def _size(name: str, text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise DataError(f"--{name.replace('_', '-')} {text}: expected an integer or a fraction.") from None


def _number(name: str, text: str) -> float:
    """A number that may end in k, M, B or T."""
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:], 1)
    try:
        return float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        raise DataError(f"--{name} {text}: expected a number, such as 0.5, 4.5e9 or 4.5B.") from None


def _with_arguments(function: str, call: Any) -> Any:
    """Call with user-given keyword arguments; an unknown one is the user's mistake, not ours."""
    try:
        return call()
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise DataError(f"--set: {function} has no argument {str(error).split()[-1]}.") from error
        raise


def _print_shapes(shapes: Mapping[str, Any]) -> None:
    from rich.table import Table

    from ..families import FIELD_OF_AXIS

    if "candidates" in shapes:
        total, found = shapes["num_parameters"]["teacher"], shapes["candidates"]
        table = Table("shape", title=f"{len(found)} shapes to compare ({shapes['model_type']})", title_justify="left")
        for column in ("parameters", "kept"):
            table.add_column(column, justify="right")
        for one in found:
            table.add_row(one["name"], f"{one['num_parameters']:,}", f"{one['num_parameters'] / total:.0%}")
        _console().print(table)
        return
    table = Table(title=f"Shapes ({shapes['model_type']})", title_justify="left")
    for column in ("", "teacher", "student", "kept"):
        table.add_column(column, justify="left" if not column else "right")
    sizes = {FIELD_OF_AXIS.get(axis, axis): both for axis, both in shapes["sizes"].items()}
    rows = {**sizes, "parameters": shapes["num_parameters"]}
    rows["without embeddings"] = shapes["num_parameters_without_embeddings"]
    for name, both in rows.items():
        share = both["student"] / both["teacher"]
        table.add_row(name, f"{both['teacher']:,}", f"{both['student']:,}", f"{share:.0%}")
    console = _console()
    console.print(table)
    for note in shapes["notes"]:
        console.print(f"Note: {note}")


def _print_recommendation(teacher: str, made: Recommendation) -> None:
    from rich.table import Table

    from ..recipe.recommendations import SOURCES

    table = Table("", "recommended", "why", "source", title=f"How to prune {teacher}", show_lines=True)
    for decision in made.decisions:
        table.add_row(decision.name, decision.value, decision.reason, decision.source)
    console = _console()
    console.print(table, markup=False, highlight=False)
    console.print("; ".join(f"{name}: {where}" for name, where in SOURCES.items()), markup=False, highlight=False)


def _print_capacity(found: Capacity, device: str | None, setup: Setup) -> None:
    from rich.table import Table

    number = "" if setup.devices == 1 else f"each of {setup.devices} × "
    what = f"{number}{device}, {setup.sharding}, {setup.batch_size} × {setup.max_length:,} tokens"
    table = Table("distilling takes")
    table.add_column("GB", justify="right")
    for name, size in found.parts.items():
        table.add_row(name, f"{size / 1e9:,.1f}")
    table.add_section()
    table.add_row(f"at the worst moment ({found.worst_moment})", f"{found.peak / 1e9:,.1f}")
    table.add_row("there is", f"{found.memory / 1e9:,.1f}")
    console = _console()
    console.print(f"On {what}:", markup=False, highlight=False)
    console.print(table)
    fits = f"It fits; the largest batch per device is {found.largest_batch}."
    smaller = f"It does not fit; a batch of {found.largest_batch} per device would."
    none = "It does not fit, whatever the batch."
    console.print(fits if found.fits else smaller if found.largest_batch else none, highlight=False)
    if found.tokens_per_second is not None:
        speed = f"About {found.tokens_per_second:,.0f} tokens/s in all, limited by {found.limited_by}."
        console.print(speed, highlight=False)
    console.print(f"Assumed: {'; '.join(found.assumptions)}.", markup=False, highlight=False)


def _print_matrix() -> None:
    from rich.table import Table

    from ..survey.matrix import support_matrix

    matrix = support_matrix()
    console = _console()
    table = Table(title="What can be cut", title_justify="left", show_lines=True)
    table.add_column("family", min_width=32)
    if console.width >= 40 + sum(len(axis) + 3 for axis in matrix.axes):
        for axis in matrix.axes:
            table.add_column(axis, justify="center", no_wrap=True)
        for names, cells in matrix.rows:
            table.add_row(", ".join(names), *(cells.get(axis, "") for axis in matrix.axes))
    else:  # a column for every size would leave no room for the names
        table.add_column("sizes: ✓ can be cut, ✗ cannot")
        for names, cells in matrix.rows:
            table.add_row(
                ", ".join(names), "  ".join(f"{axis} {cells[axis]}" for axis in matrix.axes if cells.get(axis))
            )
    console.print(table)
    console.print(matrix.legend, markup=False, highlight=False)
    for number, remark in enumerate(matrix.remarks, 1):
        console.print(f"{number}. {remark}", markup=False, highlight=False)


def _print_family(about: str, spec: ArchSpec) -> None:
    from rich.table import Table

    from ..families import FIELD_OF_AXIS
    from ..survey.matrix import conditions, cuts

    console = _console()
    console.print(about, markup=False, highlight=False)
    allowed = cuts(spec)
    table = Table("size", "in config.json", "can be cut", "remarks", title=spec.model_type, title_justify="left")
    for axis in spec.axes:
        fields = ", ".join(axis.fields) or "–"
        stored = fields if axis.implied is None else f"{fields} (else {axis.implied})"
        cut = allowed.get(axis.name)
        mark, remarks = ("–", "") if cut is None else ("yes" if cut.allowed else "no", "; ".join(cut.remarks))
        table.add_row(FIELD_OF_AXIS.get(axis.name, axis.name), stored, mark, remarks)
    console.print(table)
    for condition in conditions(spec):
        console.print(f"Models {condition}", markup=False, highlight=False)
    rewritten = (*spec.layer_lists, *spec.leading_layers, *spec.trailing_layers, *spec.layer_indices)
    rewritten += tuple(name for rule in (*spec.sparse_layers, *spec.sparse_ranges) for name in rule)
    if rewritten:
        console.print(f"Rewritten with the layers: {', '.join(rewritten)}.", markup=False, highlight=False)


def _print_results(folder: Path) -> None:
    """What a run found: the table, the card and the samples, as far as they exist."""
    import json

    from rich.table import Table

    console = _console()
    if (folder / "evaluation.json").is_file():
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        table = Table(title=f"On {evaluation['data']['num_tokens']:,} held-out tokens", title_justify="left")
        for column in ("model", "parameters", "perplexity", "bits per byte", "KL to teacher", "top-1 agreement"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for name, values in evaluation["models"].items():
            cells = [
                _with_error(values["metrics"].get(metric), digits)
                for metric, digits in (
                    ("perplexity", 2),
                    ("bits_per_byte", 3),
                    ("kl_divergence", 3),
                    ("top1_agreement", 3),
                )
            ]
            table.add_row(name, f"{values['num_parameters']:,}", *cells)
        console.print(table)
    if (folder / "samples.json").is_file():
        for sample in json.loads((folder / "samples.json").read_text(encoding="utf-8"))[:2]:
            for name, text in sample["completions"].items():
                console.print(f"\n[bold]{name}[/bold] | {sample['prompt']!r} →", highlight=False)
                console.print(text.strip(), markup=False, highlight=False)
    if (folder / "README.md").is_file():
        console.print(f"\nModel card: {folder / 'README.md'}")


def _console() -> Console:
    """A console that does not fold tables where there is no terminal to fit."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def _with_error(metric: Mapping[str, float] | None, digits: int) -> str:
    if not metric:
        return "–"
    value = f"{metric['value']:.{digits}f}"
    return value if metric["stderr"] is None else f"{value} ± {metric['stderr']:.{digits}f}"
