"""Time and peak memory of every stage of the path, each in a process of its own, on a real teacher.

The budgets are small: the table says what a stage costs per token, not how good the student becomes. Run from the
repository root, in about ten minutes for a teacher of 135M parameters on two cores:

    python -m benchmarks.real.stages --teacher work/teacher --train mixed.jsonl --eval wikitext2.jsonl \
        --questions gsm8k.jsonl --output benchmarks/results/real/stages-bfloat16.json --dtype bfloat16

Every stage is a row of the output, written when it ends. The same command continues an interrupted run: it skips
stages that are there, and does failed ones again. What stages leave for later ones is in `--work`, by default beside
the output. With `--dtype float32` every pass is computed in float32, also on processors that compute bfloat16.

`--questions` names a JSON-lines file with the fields `question` and `answer`; it is trained on as conversations and as
prompts with completions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Work:
    """The inputs of a stage.

    Attributes:
        arguments: of the command line.
        folder: where the stages leave their artefacts for one another.
    """

    arguments: argparse.Namespace
    folder: Path

    def teacher(self) -> Any:
        """The teacher in the dtype that is measured."""
        from minitron_hf import load_model

        return load_model(self.arguments.teacher, dtype=self.arguments.dtype)

    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from minitron_hf import load_tokenizer

        return load_tokenizer(self.arguments.teacher)

    def rows(self) -> Any:
        """Calibration rows."""
        from minitron_hf import token_rows

        size = {"max_length": self.arguments.max_length, "num_rows": self.arguments.rows}
        return token_rows(self.texts(), self.tokenizer(), **size)

    def texts(self) -> list[str]:
        """Training texts."""
        from .corpora import read_texts

        return read_texts(str(self.arguments.train))

    def plan(self) -> Any:
        """The plan that an earlier stage wrote."""
        from minitron_hf import PruningPlan

        return PruningPlan.from_pretrained(self.folder / "plan")


#: A stage loads its inputs, which is not measured, and returns the work, which is.
Stage = Callable[[Work], Callable[[], Any]]


def _score(**settings: Any) -> Stage:
    def stage(work: Work) -> Callable[[], Any]:
        from minitron_hf import estimate_importance

        teacher, rows, path = work.teacher(), work.rows(), work.folder / "scores"
        if "depth_metric" in settings:
            rows = rows.select(range(4))  # a pass for every layer

        def run() -> None:
            scores = estimate_importance(teacher, rows, show_progress=False, **settings)
            if not settings:
                scores.save_pretrained(path)

        return run

    return stage


def _plan(work: Work) -> Callable[[], Any]:
    from minitron_hf import ImportanceScores, PrunerConfig, make_plan
    from minitron_hf.models import load_config

    config = load_config(work.arguments.teacher)
    scores = ImportanceScores.from_pretrained(work.folder / "scores")
    depth, width = config.num_hidden_layers, config.intermediate_size
    request = PrunerConfig(
        num_hidden_layers=round(0.8 * depth), intermediate_size=round(0.7 * width / 8) * 8, repair="least_squares"
    )
    return lambda: make_plan(config, request, scores).save_pretrained(work.folder / "plan")


def _repair(work: Work) -> Callable[[], Any]:
    import torch

    from minitron_hf import repaired_weights

    teacher, plan, rows = work.teacher(), work.plan(), work.rows()
    limit = work.arguments.memory_limit
    return lambda: torch.save(repaired_weights(teacher, plan, rows, memory_limit=limit), work.folder / "repaired.pt")


def _prune(work: Work) -> Callable[[], Any]:
    import torch

    from minitron_hf import apply_plan, save_model

    teacher, plan, repaired = work.teacher(), work.plan(), torch.load(work.folder / "repaired.pt")
    tokenizer = work.tokenizer()

    def run() -> None:
        save_model(apply_plan(teacher, plan, repaired=repaired), work.folder / "student", tokenizer)

    return run


def _stream(work: Work) -> Callable[[], Any]:
    from dataclasses import replace

    from minitron_hf import prune_checkpoint

    plan = replace(work.plan(), repair=None)  # streaming does not repair
    return lambda: prune_checkpoint(work.arguments.teacher, work.folder / "streamed", plan)


def _cache(work: Work) -> Callable[[], Any]:
    from datasets import Dataset

    from minitron_hf import cache_teacher_logits

    teacher, corpus, args = work.teacher(), Dataset.from_dict({"text": work.texts()[:200]}), _training(work, "cache")
    args.max_steps = -1
    return lambda: cache_teacher_logits(teacher, corpus, work.folder / "cache", args=args)


def _training(work: Work, name: str, **settings: Any) -> Any:
    from minitron_hf import DistillationConfig

    return DistillationConfig(
        str(work.folder / name),
        **{
            "max_steps": work.arguments.steps,
            "per_device_train_batch_size": work.arguments.batch_size,
            "max_length": work.arguments.max_length,
            "packing": True,
            "learning_rate": 3e-4,
            "save_strategy": "no",
            **_precision(work),
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        },
    )


def _precision(work: Work) -> dict[str, bool]:
    """Training in float32 where that is measured; else what the processor is fast in."""
    return {"bf16": False} if work.arguments.dtype == "float32" else {}


def _distil(data: Callable[[Work], Any], **settings: Any) -> Stage:
    def stage(work: Work) -> Callable[[], Any]:
        from minitron_hf import DistillationTrainer, load_model

        student, teacher, dataset = load_model(work.folder / "student"), work.teacher(), data(work)
        tokenizer = work.tokenizer()

        def run() -> None:
            trainer = DistillationTrainer(
                model=student,
                teacher_model=None if settings.get("cached") else teacher,
                args=_training(work, "run", **{k: v for k, v in settings.items() if k != "cached"}),
                train_dataset=dataset,
                processing_class=tokenizer,
            )
            trainer.train()

        return run

    return stage


def _documents(work: Work) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"text": work.texts()[:200]})


def _cached(work: Work) -> Any:
    from minitron_hf import load_teacher_cache

    return load_teacher_cache(work.folder / "cache")


def _questions(work: Work) -> list[dict[str, str]]:
    lines = Path(work.arguments.questions).read_text().splitlines()[:200]
    return [json.loads(line) for line in lines]


def _messages(work: Work) -> Any:
    from datasets import Dataset

    rows = [
        [{"role": "user", "content": each["question"]}, {"role": "assistant", "content": each["answer"]}]
        for each in _questions(work)
    ]
    return Dataset.from_dict({"messages": rows})


def _completions(work: Work) -> Any:
    from datasets import Dataset

    rows = _questions(work)
    return Dataset.from_dict(
        {"prompt": [f"{row['question']}\n" for row in rows], "completion": [row["answer"] for row in rows]}
    )


def _correct(work: Work) -> Callable[[], Any]:
    from datasets import Dataset

    from minitron_hf import correct_teacher

    arguments = work.arguments
    corpus, teacher = Dataset.from_dict({"text": work.texts()[:200]}), work.teacher()
    size = {"per_device_train_batch_size": arguments.batch_size, "max_length": arguments.max_length}
    tokens = arguments.steps * arguments.batch_size * arguments.max_length
    return lambda: correct_teacher(
        teacher,
        corpus,
        work.folder / "corrected",
        original_learning_rate=1e-3,
        num_tokens=tokens,
        processing_class=work.tokenizer(),
        save_strategy="no",
        disable_tqdm=True,
        **_precision(work),
        **size,
    )


def _evaluate(**settings: Any) -> Stage:
    def stage(work: Work) -> Callable[[], Any]:
        from minitron_hf import evaluate_models, load_model

        from .corpora import read_texts

        models = {
            "teacher": work.teacher(),
            "student": load_model(work.folder / "student", dtype=work.arguments.dtype),
        }
        texts, tokenizer = read_texts(str(work.arguments.eval)), work.tokenizer()
        size = {"max_length": 2 * work.arguments.max_length, "num_rows": work.arguments.eval_rows}
        return lambda: evaluate_models(
            models, texts, processing_class=tokenizer, show_progress=False, rounds=2, **size, **settings
        )

    return stage


STAGES: dict[str, Stage] = {
    "load": lambda work: work.teacher,
    "score": _score(),
    "score, taylor": _score(metric="taylor"),
    "score depth by perplexity, 4 rows": _score(metric="random", depth_metric="perplexity", block_length=1),
    "plan": _plan,
    "repair": _repair,
    "prune and save": _prune,
    "prune, streamed": _stream,
    "cache": _cache,
    "distil": _distil(_documents),
    "distil from cache": _distil(_cached, cached=True),
    "distil on conversations": _distil(_messages, packing=False),
    "distil on completions": _distil(_completions, packing=False, completion_only_loss=True),
    "correct teacher": _correct,
    "evaluate quality": _evaluate(speed=False),
    "evaluate speed": _evaluate(speed=True),
}


#: Stage → file or folder that it leaves for later ones, or that it would go on from.
ARTEFACTS = {
    "score": "scores", "plan": "plan", "repair": "repaired.pt", "prune and save": "student", "cache": "cache",
    "prune, streamed": "streamed", "correct teacher": "corrected",
}  # fmt: skip


def main() -> None:
    """Run every stage in a process of its own; print and write the table."""
    arguments = parse_arguments()
    if arguments.stage:
        print("\n" + json.dumps(measured(arguments)), flush=True)
        return
    from minitron_hf.files import remove, versions, write_json

    names = ("dtype", "rows", "max_length", "batch_size", "steps", "eval_rows", "threads", "memory_limit")
    settings = {name: getattr(arguments, name) for name in names}
    results: dict[str, Any] = {"command": _command(arguments), "versions": versions(), "machine": arguments.machine}
    results |= {"settings": settings, "stages": earlier_rows(arguments.output, settings)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or (arguments.output.with_suffix(".work") if arguments.output else Path(temporary))
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.only or STAGES:
            if not is_done(name, folder, results["stages"]):
                remove(folder / ARTEFACTS.get(name, "run"), missing_ok=True)
                results["stages"][name] = in_a_process(name, folder, arguments)
            print(row_of(name, results["stages"][name]), flush=True)
            if arguments.output:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                write_json(arguments.output, results)


def earlier_rows(output: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier run with the same settings.

    Raises:
        SystemExit: if the file is of other settings.
    """
    if output is None or not output.is_file():
        return {}
    found = json.loads(output.read_text())
    if found["settings"] != settings:
        raise SystemExit(f"{output} was measured with {found['settings']}, not {settings}. Name another --output.")
    rows: dict[str, Any] = found["stages"]
    return rows


def is_done(name: str, folder: Path, rows: dict[str, Any]) -> bool:
    """Whether a stage has a row without an error, and what it leaves for later ones is there."""
    there = name not in ARTEFACTS or (folder / ARTEFACTS[name]).exists()
    return name in rows and "error" not in rows[name] and there


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one stage here; seconds by the clock and of the processor, resident bytes before it and at its peak."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from reporting import peak_memory, reset_peak_memory, resident_memory

    torch.set_num_threads(arguments.threads)
    run = STAGES[arguments.stage](Work(arguments, Path(arguments.work)))
    reset_peak_memory()
    before, clock, processor = resident_memory(), time.monotonic(), time.process_time()
    run()
    return {
        "seconds": round(time.monotonic() - clock, 2),
        "cpu_seconds": round(time.process_time() - processor, 2),
        "bytes_before": before,
        "bytes_peak": peak_memory(),
    }


def in_a_process(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one stage in a process of its own; what it says on the error stream is kept if it fails."""
    given = {**vars(arguments), "stage": name, "work": folder, "only": None, "output": None, "machine": None}
    flags = [
        str(word)
        for key, value in given.items()
        if value is not None
        for word in (f"--{key.replace('_', '-')}", value)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.real.stages", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    lines = [line.replace(sys.prefix, "…") for line in done.stderr.splitlines() if "it/s" not in line and line.strip()]
    return {**found, "messages": lines}


def row_of(name: str, found: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    if "error" in found:
        return f"| {name} | failed: {found['error']} |"
    added = (found["bytes_peak"] - found["bytes_before"]) / 1e6
    return (
        f"| {name} | {found['seconds']:.1f} | {found['cpu_seconds']:.1f} | {found['bytes_before'] / 1e6:.0f} | "
        f"{added:.0f} |"
    )


def _command(arguments: argparse.Namespace) -> str:
    names = ("rows", "max_length", "batch_size", "steps", "eval_rows", "threads", "dtype")
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in names)
    return f"python -m benchmarks.real.stages --teacher … --train … --eval … --questions … {flags}"


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--train", required=True, help="corpus; its beginning calibrates")
    parser.add_argument("--eval", required=True, help="held-out corpus")
    parser.add_argument("--questions", required=True, help="JSON lines with question and answer")
    parser.add_argument("--dtype", default="bfloat16", help="of the teacher, and of evaluation")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time")
    parser.add_argument("--steps", type=int, default=4, help="steps of distillation")
    parser.add_argument("--eval-rows", type=int, default=8, help="held-out rows, of twice the length")
    parser.add_argument("--memory-limit", type=float, help="bytes of the repair's matrices")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", help="words about the machine, for the record")
    parser.add_argument("--only", action="append", choices=list(STAGES), help="only these stages")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="folder of the artefacts; default: a temporary one")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
