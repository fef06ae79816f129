"""Runs the arms of `experiments.yaml` on a teacher, one after another; the same command goes on where it was stopped.

Each arm becomes one JSON file in `--results`; pruned starts, checkpoints and students stay in `--work`. For example:

    python -m benchmarks.real.run --teacher work/teacher --data work/data --work work/runs --screen --until 18:30
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import transformers

from minitron_hf import count_parameters, load_tokenizer
from minitron_hf.errors import OutputError
from minitron_hf.evaluation.speed import device_description
from minitron_hf.files import read_json, remove, versions, write_json
from minitron_hf.locks import locked_folder
from minitron_hf.models import load_for_compute
from minitron_hf.names import public_name
from minitron_hf.weights import model_digest

from .arms import SCREEN_SEEDS, SCREEN_TOKENS, TABLE, Arm, Experiment, key, load_experiments
from .corpora import MANIFEST_NAME, corpus_files, given_file
from .measure import VALUES, Domain, Reference, RowSums, packed, row_sums, summary
from .starts import Starts
from .stopping import Stop, Stopped, log, seconds_until
from .teacher import teacher_metadata
from .training import RECORD_NAME, Workshop

RESULTS = Path(__file__).with_name("results")
#: Held-out rows of a domain, of `ROW_LENGTH` tokens each: 24k tokens of the first domain, half of it of others.
ROWS, OTHER_ROWS, ROW_LENGTH = 48, 24, 512

#: Folder of the results that holds the claims of arms which runs have begun.
CLAIMS_DIR = ".claims"
#: Steps of the run that measures the speed, and the part of the time that is planned with: the rest is for evaluation.
FILL_STEPS, FILL_SHARE = 20, 0.8


class Bench:
    """A teacher, its texts, and the folders that results and working files go to.

    Args:
        teacher: folder or Hub id.
        corpora: `{"train": {name: entry}, "held_out": {name: entry}}`, see `corpora.corpus_files`.
        work: folder of working files.
        results: folder of the results.
        stop: whether to stop.
        rows: held-out rows of the first domain; others have half as many.
        row_length: tokens of a held-out row.
        dtype: that the teacher is computed in; None: as `hardware` says.
        keep_students: whether students stay after they were measured.
        save_seconds: training time that an interruption can cost.
        keep_states: whether the teacher's last hidden states of training batches are kept for other arms.
    """

    def __init__(
        self,
        teacher: str,
        corpora: dict[str, dict[str, dict[str, Any]]],
        work: Path,
        results: Path,
        *,
        stop: Stop | None = None,
        rows: int = ROWS,
        row_length: int = ROW_LENGTH,
        dtype: str | None = None,
        keep_students: bool = True,
        save_seconds: float = 50.0,
        keep_states: bool = False,
    ) -> None:
        self.work, self.results, self.stop, self.keep_students = work, results, stop or Stop(), keep_students
        self.teacher = load_for_compute(teacher, dtype=dtype)
        self.teacher.requires_grad_(False)
        self.tokenizer = load_tokenizer(teacher)
        self.digest = model_digest(self.teacher)
        self.described = {
            **teacher_metadata(teacher),
            "name": public_name(teacher),
            "digest": self.digest,
            "num_parameters": count_parameters(self.teacher),
            "computed_in": str(self.teacher.dtype).removeprefix("torch."),
        }
        self.corpora = corpora
        shared = work / "shared"
        shared.mkdir(parents=True, exist_ok=True)
        self.domains = [
            Domain.read(name, entry["file"], self.tokenizer, rows if index == 0 else max(1, rows // 2), row_length)
            for index, (name, entry) in enumerate(corpora["held_out"].items())
        ]
        self.references = {
            domain.name: Reference.of(self.teacher, self.digest, domain, shared, self.stop.check)
            for domain in self.domains
        }
        self.starts = Starts(self.teacher, self.digest, self.tokenizer, corpora["train"], shared)
        self.workshop = Workshop(
            teacher,
            self.teacher,
            self.digest,
            self.tokenizer,
            corpora["train"],
            shared,
            self.stop,
            save_seconds,
            keep_states,
        )

    def key(self, arm: Arm) -> str:
        """Short name of everything that determines an arm's result."""
        rows = [domain.rows.digest for domain in self.domains]
        start = self.starts.name(arm)
        corpus = self.corpora["train"][arm["corpus"]]["digest"]
        return key(self.digest, str(self.teacher.dtype), corpus, rows, start, arm.identity())

    def result_path(self, arm: Arm) -> Path:
        """The arm's JSON file."""
        return self.results / f"{arm.name}.{self.key(arm)}.json"

    def run(self, arm: Arm) -> dict[str, Any]:
        """Prune, distil and measure an arm, or resume it. Nothing is done if its JSON file exists."""
        path = self.result_path(arm)
        if path.is_file():
            return read_json(path)
        begun = time.monotonic()
        log(f"{arm.name}: {arm.steps} steps of {arm.rows_per_step} × {arm['length']} tokens")
        folder = self.work / "arms" / path.stem
        start = self.starts.get(arm.rounds()[0])
        before = self._measure(start, self.work / "shared" / f"{start.name}-measured")
        student = self._distil(arm, start, folder)
        after = self._measure(student, folder / "measured")
        result = self._result(arm, student, before, after)
        write_json(path, result)
        self._clean(folder)
        first = self.domains[0].name
        kl, was = (result["summary"][when][first]["kl_divergence"] for when in ("after", "before"))
        log(f"  KL {was['value']:.4f} → {kl['value']:.4f} ± {kl['stderr'] or 0:.4f}, {time.monotonic() - begun:.0f} s")
        return result

    def _distil(self, arm: Arm, start: Path, folder: Path) -> Path:
        """The student after its last round; the student of a first round is scored and pruned once more."""
        *first, last = arm.rounds()
        for each in first:
            student = self.workshop.distil(each, start, folder / "first-round")
            model = load_for_compute(student, dtype=self.teacher.dtype)
            shared = self.work / "shared"
            starts = Starts(model, model_digest(model), self.tokenizer, self.corpora["train"], shared)
            start = starts.get(last)
        return self.workshop.distil(last, start, folder)

    def _measure(self, model_folder: Path, folder: Path) -> dict[str, RowSums]:
        """Row sums of every domain; sums in the folder are read instead of computed."""
        found, model = {}, None
        for domain in self.domains:
            path = folder / f"{domain.name}-{key(domain.rows.digest)}.json"
            if not path.is_file():
                if model is None:
                    model = load_for_compute(model_folder, dtype=self.teacher.dtype)
                sums = row_sums(model, domain, self.references[domain.name], self.stop.check)
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, sums)
            found[domain.name] = read_json(path)
        return found

    def _result(
        self, arm: Arm, student: Path, before: dict[str, RowSums], after: dict[str, RowSums]
    ) -> dict[str, Any]:
        training = read_json(student / RECORD_NAME)
        seconds = training.pop("seconds")
        rows = {domain.name: domain.counts for domain in self.domains}
        num_bytes = {domain.name: domain.rows.num_bytes for domain in self.domains}
        teacher = {name: {"loss": reference.loss} for name, reference in self.references.items()}
        measured = {"teacher": teacher, "before": before, "after": after}
        return {
            "format": 1,
            "arm": dict(arm.settings),
            "shape": dict(arm.shape),
            "loss": dict(arm.loss),
            "key": self.key(arm),
            "teacher": self.described,
            "student": {"num_parameters": count_parameters(load_for_compute(student))},
            "corpus": {name: part for name, part in self.corpora["train"][arm["corpus"]].items() if name != "file"},
            "training": training,
            "held_out": {domain.name: domain.to_dict() for domain in self.domains},
            "summary": {
                when: {name: summary(sums, rows[name], num_bytes[name]) for name, sums in found.items()}
                for when, found in measured.items()
            },
            "rows": {
                when: {
                    name: {value: packed(sums[value]) for value in VALUES if value in sums}
                    for name, sums in found.items()
                }
                for when, found in measured.items()
            },
            "versions": {**versions(), "commit": commit()},
            "device": device_description(self.teacher.device),
            "seconds": seconds,
        }

    def _clean(self, folder: Path) -> None:
        for path in folder.iterdir():
            if path.name != "student" or not self.keep_students:
                remove(path)


def filling(bench: Bench, arm: Arm, seconds: float) -> Arm:
    """The arm with as many tokens as fit into a time. A short run measures the speed."""
    trial = arm.at(tokens=FILL_STEPS * arm["tokens_per_step"])
    took = bench.run(trial)["seconds"]
    steps = int(FILL_SHARE * seconds / took * FILL_STEPS)
    return arm.at(tokens=max(steps, FILL_STEPS) * arm["tokens_per_step"])


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether no other run has claimed what a folder stands for. The claim ends with the block."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_folder(folder))
        except OutputError:
            yield False
            return
        yield True


def commit() -> str | None:
    """The commit of this checkout; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None if found.returncode == 0 else None


def chosen(experiments: dict[str, Experiment], arguments: argparse.Namespace) -> Iterator[Arm]:
    """The arms that the command line asks for, each once."""
    tokens = [SCREEN_TOKENS] if arguments.screen else arguments.tokens
    seeds = list(SCREEN_SEEDS) if arguments.screen else arguments.seeds
    known = set()
    for name, experiment in experiments.items():
        if arguments.only and name not in arguments.only:
            continue
        for arm in experiment.runs(tokens, seeds):
            if arm.name not in known and (not arguments.arm or arm.label in arguments.arm):
                known.add(arm.name)
                yield arm


def given_corpora(arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """The texts of `--data`, and those given one by one."""
    found: dict[str, dict[str, Any]] = {"train": {}, "held_out": {}}
    if arguments.data is not None:
        found = corpus_files(arguments.data)
    for kind, options in (("train", arguments.corpus), ("held_out", arguments.held_out)):
        for name, _, path in (option.partition("=") for option in options):
            found[kind][name] = given_file(path)
    first = {name: entry for name, entry in found["held_out"].items() if name == arguments.first_domain}
    found["held_out"] = {**first, **found["held_out"]}
    return found


def main() -> None:
    """Run the arms that the command line asks for."""
    arguments = parse_arguments()
    experiments = load_experiments(arguments.experiments)
    arms = list(chosen(experiments, arguments))
    labels = {arm.label for arm in arms}
    if unknown := [label for label in arguments.arm or () if label not in labels]:
        sys.exit(f"No arm is called {unknown[0]!r} in {arguments.experiments}. --list prints the arms.")
    if arguments.list:
        for arm in arms:
            print(f"{arm.name}: {arm.steps} steps of {arm.rows_per_step} × {arm['length']} tokens")
        return
    for library in (transformers, datasets):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("trl").setLevel(logging.ERROR)
    stop = Stop()
    seconds = arguments.minutes * 60 if arguments.minutes is not None else None
    if arguments.until is not None:
        seconds = min(seconds or float("inf"), seconds_until(arguments.until))
    try:
        with locked_folder(arguments.work):
            stop.listen(seconds)
            bench = Bench(
                arguments.teacher,
                given_corpora(arguments),
                arguments.work,
                arguments.results,
                stop=stop,
                dtype=arguments.dtype,
                keep_students=not arguments.drop_students,
                keep_states=arguments.cache_teacher,
            )
            for index, arm in enumerate(arms):
                with claimed(arguments.results / CLAIMS_DIR / bench.key(arm)) as is_ours:
                    log(f"arm {index + 1} of {len(arms)}" + ("" if is_ours else ": another run has begun it"))
                    if is_ours:
                        bench.run(arm if arguments.fill is None else filling(bench, arm, 60 * arguments.fill))
    except Stopped:
        log("stopped; the same command goes on.")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="folder or Hub id", required=True)
    parser.add_argument("--data", type=Path, help=f"folder with {MANIFEST_NAME}, see benchmarks.real.corpora")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=FILE", help="a training text")
    parser.add_argument("--held-out", action="append", default=[], metavar="NAME=FILE", help="a held-out text")
    parser.add_argument("--first-domain", default="wikitext2", help="held-out text with the most rows")
    parser.add_argument("--work", type=Path, required=True, help="folder for starts, checkpoints and students")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for one JSON per arm")
    parser.add_argument("--experiments", type=Path, default=TABLE, help="the table of arms")
    parser.add_argument("--only", action="append", help="only this experiment")
    parser.add_argument("--arm", action="append", help="only the arm of this label, as --list and the tables have it")
    parser.add_argument("--screen", action="store_true", help=f"{SCREEN_TOKENS:,} tokens and one seed for every arm")
    parser.add_argument("--tokens", type=int, action="append", help="budget instead of the experiment's")
    parser.add_argument("--seeds", type=int, action="append", metavar="SEED", help="seed instead of the experiment's")
    parser.add_argument("--fill", type=float, metavar="MINUTES", help="as many tokens for an arm as this time gives")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--until", metavar="HH:MM", help="stop at this time of day")
    parser.add_argument("--dtype", help="to compute teacher and evaluation in; default: as the hardware is fast")
    parser.add_argument("--drop-students", action="store_true", help="delete students once they are measured")
    parser.add_argument(
        "--cache-teacher",
        action="store_true",
        help="keep the teacher's last hidden states (tokens × hidden × bytes) for arms with the same batches",
    )
    parser.add_argument("--list", action="store_true", help="list the arms and do nothing")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
