"""Checkpoints that are whole: which files one has, how training stood, and what it was trained with.

`checkpoint.json` is written last. A folder without it, or whose files are not as it says, is what a killed process or
a full disk left: it is never resumed, and removed by the next run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..errors import MismatchError, OutputError
from ..files import digest, is_storage_error, is_working_file, read_json, remove, remove_abandoned, versions
from ..formats import migrate, read_artefact, write_artefact
from .record import RECORDED_ARGUMENTS

logger = logging.getLogger(__name__)

MANIFEST_NAME = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")

#: Recorded arguments that may differ when a run goes on: how rows are split, and what follows from the machine.
FREE_ARGUMENTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "optim")
#: Those that say how long to train: under a constant schedule, a longer run is a shorter one that goes on.
LENGTH_ARGUMENTS = ("max_steps", "num_train_epochs")
#: Rows of the data, and values of a parameter, that are compared.
SAMPLED_ROWS, SAMPLED_VALUES = 64, 1024


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, whole or not, by their step."""
    found = {path: _NAME.fullmatch(path.name) for path in Path(folder).glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, match in found.items() if match), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, and has all its files as they were."""
    try:
        content = read_json(checkpoint / MANIFEST_NAME)
    except (OSError, OutputError, MismatchError):
        return False
    files = migrate(content, checkpoint / MANIFEST_NAME).get("files", {})  # one of a newer version is whole
    try:
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, AttributeError):
        return False


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The checkpoint of the most steps in a folder from which training goes on as if never interrupted, if any.

    It is whole, and has the state of the optimizer (`save_only_model` leaves that out).
    """
    for path in checkpoints(folder)[::-1]:
        if is_complete(path) and read_artefact(path / MANIFEST_NAME).get("has_optimizer"):
            return os.fspath(path)
    return None


def remove_incomplete_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Remove the checkpoints in a folder that are not whole, which nothing can go on from."""
    for path in checkpoints(folder):
        if not is_complete(path):
            logger.warning("Removing %s: it was not written to its end.", path)
            remove(path)


class CheckpointMixin(Trainer):
    """The part of a trainer that writes checkpoints which are whole, and goes on from them to the same result.

    It adds to the stock trainer: the manifest; rotation by step, not by a clock; what was counted since the last log;
    and the end: a run that has done its steps takes no further one.
    """

    _restored_progress: Mapping[str, Any] | None = None
    _start: Mapping[str, Any] = {}

    def _record_inputs(self, **what: Any) -> None:
        """Record what is trained from what; to be called before training.

        Args:
            **what: name → `fingerprint` of a model, or other JSON values, beside the arguments.
        """
        arguments = self.args.to_dict()
        names = [name for name in RECORDED_ARGUMENTS if name not in FREE_ARGUMENTS]
        if str(arguments.get("lr_scheduler_type")).startswith("constant"):
            names = [name for name in names if name not in LENGTH_ARGUMENTS]
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self._start = json.loads(
            json.dumps(
                {
                    **what,
                    **{name: arguments.get(name) for name in names},
                    "rows_in_a_step": rows * self.accelerator.num_processes,
                },
                default=str,
            )
        )

    def differences(self, checkpoint: str | os.PathLike[str]) -> list[str]:
        """What differs between this training and the one that a checkpoint is of, in words."""
        try:
            before = read_artefact(Path(checkpoint) / MANIFEST_NAME)["trained_with"]
        except (OutputError, KeyError):
            return []  # of the stock trainer
        names = sorted(before.keys() & self._start.keys())
        return [
            _difference(name, before[name], self._start[name]) for name in names if before[name] != self._start[name]
        ]

    def require_same_training(self, checkpoint: str | os.PathLike[str]) -> None:
        """Refuse a checkpoint that was trained from other weights, on other data or with other arguments.

        Raises:
            MismatchError: naming the differences.
        """
        if found := self.differences(checkpoint):
            raise MismatchError(
                f"{checkpoint} is of another training: {'; '.join(found)}. Choose another output folder, or delete "
                "its checkpoints to begin anew (minitron-hf run --redo does so)."
            )

    # ---- Writing ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            remove(folder)  # torn, or of the training before: nothing of it may stay
        self.accelerator.wait_for_everyone()
        limit = self.args.save_total_limit
        try:
            self.args.save_total_limit = None  # the stock trainer would delete the last one before this one is whole
            with _clear_errors(folder):
                super()._save_checkpoint(model, trial)
                progress = self._progress()
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._finish(folder, progress)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            self._rotate(run_dir)

    def _finish(self, folder: Path, progress: Mapping[str, Any]) -> None:
        remove_abandoned(folder)
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not is_working_file(path)
        }
        manifest = {
            "versions": versions(),
            "trained_with": self._start,
            "progress": progress,
            "has_optimizer": not self.args.save_only_model,
            "files": files,
        }
        write_artefact(folder / MANIFEST_NAME, manifest)

    def _rotate(self, run_dir: Path) -> None:
        """Delete the oldest checkpoints by their steps, beyond those to keep, the best and the last one."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        remove_incomplete_checkpoints(run_dir)
        found = checkpoints(run_dir)
        if limit is None or limit <= 0 or not found:
            return
        kept = {found[-1], *([Path(best)] if best else [])}
        for path in found[: max(0, len(found) - limit)]:
            if path not in kept:
                remove(path)

    # ---- Going on ----

    def train_or_resume(self) -> Any:
        """Train from the last whole checkpoint of the output folder, or from the start where there is none.

        Raises:
            MismatchError: if that checkpoint is of another training.
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
        """See `transformers.Trainer.train`. True takes the last whole checkpoint of the output folder.

        Raises:
            OutputError: if there is none, or the one that is named is not whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise OutputError(
                    f"{self.args.output_dir} has no whole checkpoint with the state of the optimizer. Leave out "
                    "resume_from_checkpoint to begin anew."
                )
        self._restored_progress = None
        if resume_from_checkpoint and (Path(resume_from_checkpoint) / MANIFEST_NAME).is_file():
            if not is_complete(Path(resume_from_checkpoint)):
                raise OutputError(
                    f"{resume_from_checkpoint} lacks files, or holds half ones. Name another one, or begin anew."
                )
            self._restored_progress = read_artefact(Path(resume_from_checkpoint) / MANIFEST_NAME)["progress"]
            if found := self.differences(resume_from_checkpoint):
                logger.warning("%s was trained otherwise: %s.", resume_from_checkpoint, "; ".join(found))
        takes_up = _RestoreProgress(self)
        self.add_callback(takes_up)
        try:
            return super().train(resume_from_checkpoint or None, *args, **kwargs)
        finally:
            self.remove_callback(takes_up)

    @property
    def _is_finished(self) -> bool:
        """Whether this run goes on from the end of training, after which the stock loop would take another step."""
        return self._restored_progress is not None and self.state.global_step >= self.state.max_steps

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of an optimiser step; none once all steps are done."""
        if self._is_finished:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _progress(self) -> dict[str, Any]:
        """What the stock trainer counts and does not save, over all processes."""
        tr_loss = getattr(self, "_tr_loss", None)  # Transformers 5.23; earlier versions keep it to themselves
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
        """Go on counting where the checkpoint stood."""
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the stock trainer, with the mean loss of all steps at the end, not of those since it was resumed."""
        if (
            "train_loss" in logs
            and self._restored_progress is not None
            and self._restored_progress["loss_before_log"] is not None
        ):
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, *args, **kwargs)


class _RestoreProgress(TrainerCallback):
    """Takes up what a checkpoint had counted, once the training loop has set everything to zero."""

    def __init__(self, trainer: CheckpointMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._restore_progress()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._is_finished and args.save_strategy == "epoch":
            # The checkpoint was written here: what comes before it was done.
            control.should_log = control.should_evaluate = control.should_save = False


# ---- What was trained ----


def fingerprint(model: nn.Module | None) -> str | None:
    """Names, shapes and a sample of the weights that training starts from; without an adapter, which starts at random.

    Unlike `model_digest` it takes any model: values that are quantised, split or elsewhere are left out.
    """
    if model is None:
        return None
    adapted = is_peft_model(model)
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if adapted and parameter.requires_grad:
            continue
        sha.update(f"{name} {tuple(parameter.shape)}\n".encode())
        values = parameter.data
        if type(values) is Tensor and values.is_floating_point() and not values.is_meta:
            stride = -(-values.numel() // SAMPLED_VALUES) | 1
            sample = values.reshape(-1)[::stride].to(device="cpu", dtype=torch.float32)
            sha.update(sample.contiguous().numpy().tobytes())
    return f"sha256:{sha.hexdigest()}"


def sampled_data(data: Any) -> dict[str, Any] | None:
    """Number of rows, and a digest of some of them; None for streams."""
    if data is None or not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, Mapping):
        return None
    rows = []
    for index in range(0, len(data), max(1, len(data) // SAMPLED_ROWS)):
        row = data[index]
        if isinstance(row, Mapping) and "input_ids" in row:  # a teacher cache has much beside
            row = {name: row[name] for name in ("input_ids", "labels") if name in row}
        rows.append(json.dumps(row, sort_keys=True, default=_plain))
    return {"num_rows": len(data), "rows": digest(rows)}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(now, str) and now.startswith("sha256:"):
        return f"other weights of the {name}"
    if isinstance(before, dict) or isinstance(now, dict):
        return f"other {name}"
    return f"{name}: {before} → {now}"


@contextlib.contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises, in whichever library, into one clear message."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutputError) or not is_storage_error(error):
            raise
        raise OutputError(
            f"Cannot write the checkpoint {folder}: {error}. Free space; the same command then resumes."
        ) from error
