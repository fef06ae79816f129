"""Complete checkpoints: a manifest of files, the progress of training, and its models, data and arguments.

`checkpoint.json` is empty until the end. A folder where it is, or that has other files than it lists, was left by a
killed process or a full disk. It is never resumed, and the next run removes it. A folder of the stock trainer has a
state and no such file; it is left alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..compat import forget_preparation
from ..errors import DivergedError, MismatchError, OutputError
from ..files import is_storage_error, is_working_file, read_json, remove, remove_abandoned, versions
from ..formats import migrate, read_artefact, write_artefact
from ..interruption import raise_if_interrupted
from ..models import load_model
from ..pruning.stored_checkpoint import weight_names
from .intermediate import PROJECTION
from .parallel import trains_in_parts
from .record import RECORDED_ARGUMENTS
from .training_inputs import describe_difference

logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint.json"
#: Of the stock trainer.
TRAINER_STATE_NAME = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")

#: Recorded arguments that may differ in a resumed run: how rows are split, and what depends on the machine.
FREE_ARGUMENTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16")
#: Arguments for the length of training; under a constant schedule a resumed run may be longer.
LENGTH_ARGUMENTS = ("max_steps", "num_train_epochs")


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """All checkpoints in a folder, complete or not, in the order of their steps."""
    found = {path: _NAME.fullmatch(path.name) for path in Path(folder).glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, match in found.items() if match), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, and has all files in their size."""
    try:
        content = read_json(checkpoint / MANIFEST_NAME)
    except (OSError, OutputError, MismatchError):
        return False
    files = migrate(content, checkpoint / MANIFEST_NAME).get("files", {})  # a newer format counts as complete
    try:
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, AttributeError):
        return False


def is_of_stock_trainer(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by the stock trainer, or by another one without manifests."""
    return not (checkpoint / MANIFEST_NAME).exists() and (checkpoint / TRAINER_STATE_NAME).is_file()


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The latest checkpoint in a folder that can be resumed exactly, if any.

    It is complete and has the state of the optimizer, which `save_only_model` leaves out.
    """
    for path in checkpoints(folder)[::-1]:
        if is_complete(path) and read_artefact(path / MANIFEST_NAME).get("has_optimizer"):
            return os.fspath(path)
    return None


def remove_incomplete_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Remove the incomplete checkpoints in a folder, which cannot be resumed."""
    for path in checkpoints(folder):
        if not is_complete(path) and not is_of_stock_trainer(path):
            logger.warning("Removing %s: it was not written to its end.", path)
            remove(path)


class CheckpointMixin(Trainer):
    """Mixin for a trainer with complete checkpoints, from which a resumed run comes to the same result.

    It adds to the stock trainer: the manifest; rotation by step instead of time; the sums since the last log; and the
    end: a run that has done all its steps takes no further one.
    """

    _restored_progress: Mapping[str, Any] | None = None
    _inputs: Mapping[str, Any] = {}

    def _record_inputs(self, **what: Any) -> None:
        """Record the models, data and arguments of this training; to be called before it starts.

        Args:
            **what: name → `fingerprint` of a model, or another JSON value.
        """
        arguments = self.args.to_dict()
        names = [name for name in RECORDED_ARGUMENTS if name not in FREE_ARGUMENTS]
        if str(arguments.get("lr_scheduler_type")).startswith("constant"):
            names = [name for name in names if name not in LENGTH_ARGUMENTS]
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self._inputs = json.loads(
            json.dumps(
                {
                    **what,
                    **{name: arguments.get(name) for name in names},
                    "optim": str(arguments.get("optim")).removesuffix("_fused"),  # the same, with the same states
                    "rows_in_a_step": rows * self.accelerator.num_processes // self.get_tp_size(),
                },
                default=str,
            )
        )

    def differences(self, checkpoint: str | os.PathLike[str]) -> list[str]:
        """Differences between this training and that of a checkpoint, in words."""
        try:
            before = read_artefact(Path(checkpoint) / MANIFEST_NAME)["trained_with"]
        except (OutputError, KeyError):
            return []  # written by the stock trainer
        names = sorted(before.keys() & self._inputs.keys())
        return [
            describe_difference(name, before[name], self._inputs[name])
            for name in names
            if before[name] != self._inputs[name]
        ]

    def require_same_training(self, checkpoint: str | os.PathLike[str]) -> None:
        """Refuse a checkpoint of other weights, data or arguments.

        Raises:
            MismatchError: naming the differences.
        """
        if found := self.differences(checkpoint):
            raise MismatchError(
                f"{checkpoint} belongs to another training: {'; '.join(found)}. Choose another output folder, or "
                "delete its checkpoints to start again (minitron-hf run --redo does so)."
            )

    # ---- Writing ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            with _explained_storage_errors(folder):
                if folder.exists():
                    remove(folder)  # incomplete, or of an earlier training
                folder.mkdir(parents=True)
                (folder / MANIFEST_NAME).touch()
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        try:
            # The stock trainer would delete the last checkpoint before this one is complete.
            self.args.save_total_limit = None
            with _explained_storage_errors(folder):
                super()._save_checkpoint(model, trial)
                progress = self._progress()
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._write_manifest(folder, progress)
        except DivergedError:  # before anything was written
            if self.args.should_save:
                remove(folder)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            self._rotate(run_dir)

    def _write_manifest(self, folder: Path, progress: Mapping[str, Any]) -> None:
        remove_abandoned(folder)
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not is_working_file(path) and path != folder / MANIFEST_NAME
        }
        manifest = {
            "versions": versions(),
            "trained_with": self._inputs,
            "progress": progress,
            "has_optimizer": not self.args.save_only_model,
            "files": files,
        }
        write_artefact(folder / MANIFEST_NAME, manifest)

    def _rotate(self, run_dir: Path) -> None:
        """Delete the oldest checkpoints beyond `save_total_limit`, except the best and the last one."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        remove_incomplete_checkpoints(run_dir)
        found = [path for path in checkpoints(run_dir) if not is_of_stock_trainer(path)]
        if limit is None or limit <= 0 or not found:
            return
        kept = {found[-1], *([Path(best)] if best else [])}
        for path in found[: max(0, len(found) - limit)]:
            if path not in kept:
                remove(path)

    # ---- Resuming ----

    def train_or_resume(self) -> Any:
        """Resume from the last complete checkpoint of the output folder, or start where there is none.

        Raises:
            MismatchError: if that checkpoint belongs to another training.
        """
        folder = str(self.args.output_dir)
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            self.require_same_training(checkpoint)
        if self.is_world_process_zero():
            remove_incomplete_checkpoints(folder)
        result = self.train(resume_from_checkpoint=checkpoint)
        if self.args.should_save:
            self._rotate(Path(folder))  # where a run was killed between its last checkpoint and this
        return result

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`. True takes the last complete checkpoint of the output folder.

        Raises:
            OutputError: if there is none, or the given one is incomplete.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise OutputError(
                    f"{self.args.output_dir} has no complete checkpoint with the state of the optimizer. Leave out "
                    "resume_from_checkpoint to start again."
                )
        self._restored_progress = None
        if resume_from_checkpoint and (Path(resume_from_checkpoint) / MANIFEST_NAME).is_file():
            if not is_complete(Path(resume_from_checkpoint)):
                raise OutputError(
                    f"{resume_from_checkpoint} is incomplete: files are missing or cut off. "
                    "Pass another one, or start again."
                )
            self._restored_progress = read_artefact(Path(resume_from_checkpoint) / MANIFEST_NAME)["progress"]
            if found := self.differences(resume_from_checkpoint):
                logger.warning("%s belongs to another training: %s.", resume_from_checkpoint, "; ".join(found))
        raise_if_interrupted()  # `datasets` may have swallowed it while the rows were made
        if self.accelerator.num_processes > 1 and self.model_wrapped is self.model and not trains_in_parts(self):
            forget_preparation(self.model)  # after an evaluation DDP would not wrap it, and each process train alone
        callback = _RestoreProgress(self)
        self.add_callback(callback)
        try:
            with self._intervals_in_steps(resume_from_checkpoint or None):
                return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self.remove_callback(callback)

    @contextlib.contextmanager
    def _intervals_in_steps(self, checkpoint: str | None) -> Iterator[None]:
        """Give intervals that are fractions of a training in the steps that a checkpoint counts.

        The stock trainer takes them from the checkpoint, and would warn that 0.2 of 20 steps are not 4.
        """
        given = {name: getattr(self.args, name) for name in ("logging_steps", "eval_steps", "save_steps")}
        if checkpoint is not None and (path := Path(checkpoint) / TRAINER_STATE_NAME).is_file():
            state = json.loads(path.read_text(encoding="utf-8"))
            for name, value in given.items():
                if value is not None and value < 1 and math.ceil(value * state["max_steps"]) == state[name]:
                    setattr(self.args, name, state[name])
        try:
            yield
        finally:
            for name, value in given.items():
                setattr(self.args, name, value)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.state.best_model_checkpoint is not None:
            self._load_renamed(self.state.best_model_checkpoint, self.model)

    def _load_renamed(self, checkpoint: str, model: Any) -> None:
        """Load what a checkpoint stores under other names; the stock trainer skips it and keeps the values before."""
        if self._is_whole(model):
            load_renamed(model, Path(checkpoint))

    def _is_whole(self, model: Any) -> bool:
        return not trains_in_parts(self) and not is_peft_model(model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not self._is_whole(self.model):  # otherwise what the stock trainer skipped is loaded or refused
            super()._issue_warnings_after_load(load_result)

    @property
    def _is_finished(self) -> bool:
        """Whether the resumed training had ended; the stock loop would take another step."""
        return self._restored_progress is not None and self.state.global_step >= self.state.max_steps

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of an optimiser step; none once all steps are done."""
        if self._is_finished:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _progress(self) -> dict[str, Any]:
        """Counts of the stock trainer that its checkpoints lack, over all processes."""
        tr_loss = getattr(self, "_tr_loss", None)  # an attribute since Transformers 5.23
        sums = getattr(self, "_token_sums", {}).get("train")
        return {
            "loss_since_log": None if tr_loss is None else self.accelerator.gather(tr_loss.detach()).mean().item(),
            "loss_before_log": getattr(self, "_total_loss_scalar", None),
            "step_of_log": getattr(self, "_globalstep_last_logged", None),
            "token_sums": None if sums is None else self.accelerator.reduce(sums, "sum").tolist(),
            "metrics": dict(getattr(self, "_metrics", {}).get("train", {})),  # TRL's lists since the last log
            "num_tokens": getattr(self, "_total_train_tokens", None),  # TRL's count
        }

    def _restore_progress(self) -> None:
        """Set the counts to those of the checkpoint."""
        self._find_best_checkpoint()
        progress = self._restored_progress
        if progress is None:
            return
        if progress["loss_since_log"] is not None and hasattr(self, "_tr_loss"):
            self._tr_loss: Tensor = torch.full_like(self._tr_loss, progress["loss_since_log"])
            self._total_loss_scalar: float = progress["loss_before_log"]
            self._globalstep_last_logged: int = progress["step_of_log"]
        if progress["token_sums"] is not None and self.accelerator.is_main_process:
            sums: Tensor = self._token_sums["train"]  # type: ignore[attr-defined] # of `TokenMeansMixin`
            sums.copy_(torch.tensor(progress["token_sums"], dtype=sums.dtype))
        if progress["num_tokens"] is not None:
            self._total_train_tokens: int = progress["num_tokens"]
            self._metrics["train"].update(progress["metrics"])  # type: ignore[attr-defined] # of TRL's trainer

    def _find_best_checkpoint(self) -> None:
        """Find the best checkpoint in the output folder, where that was moved since it was written."""
        step = self.state.best_global_step
        if step and self.state.best_model_checkpoint is None:
            of_step = (path for path in checkpoints(str(self.args.output_dir)) if step_of(path) == step)
            self.state.best_model_checkpoint = next((str(path) for path in of_step if is_complete(path)), None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the stock trainer does; the final mean loss is over all steps, not only those since the resume."""
        if (
            "train_loss" in logs
            and self._restored_progress is not None
            and self._restored_progress["loss_before_log"] is not None
        ):
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, *args, **kwargs)


class _RestoreProgress(TrainerCallback):
    """Restores the counts of a checkpoint after the training loop has set them to zero."""

    def __init__(self, trainer: CheckpointMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._restore_progress()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._is_finished and args.save_strategy == "epoch":
            # The checkpoint was written at this point: all of this was done before it.
            control.should_log = control.should_evaluate = control.should_save = False


def load_renamed(model: nn.Module, checkpoint: Path) -> None:
    """Load those tensors of a model that its checkpoint stores under other names or apart, such as stacked experts.

    Args:
        model: not wrapped; its other tensors are loaded already.
        checkpoint: of `model.save_pretrained`. One without safetensors files is left to the stock trainer.

    Raises:
        OutputError: if the checkpoint lacks a tensor of the model.
    """
    stored = set[str]()
    for name in weight_names(checkpoint):
        with safe_open(checkpoint / name, "pt") as file:
            stored |= set(file.keys())
    own = model.state_dict(keep_vars=True)
    loaded = {id(own[name]) for name in own.keys() & stored}  # tied tensors are stored under one of their names
    rest = [name for name, tensor in own.items() if id(tensor) not in loaded and name != f"{PROJECTION}.weight"]
    if not stored or not rest:
        return
    converted = load_model(checkpoint).state_dict()
    if lacking := [name for name in rest if name not in converted]:
        raise OutputError(
            f"{checkpoint} lacks {len(lacking)} tensors of the model ({lacking[0]} is the first), so training cannot "
            "go on from it. Delete it, or choose another output folder, to start again."
        )
    model.load_state_dict({name: converted[name] for name in rest}, strict=False)


@contextlib.contextmanager
def _explained_storage_errors(folder: Path) -> Iterator[None]:
    """Turn the errors that libraries raise on a full disk into one clear message."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutputError) or not is_storage_error(error):
            raise
        raise OutputError(
            f"Cannot write the checkpoint {folder}: {error}. Free space; the same command then resumes."
        ) from error
