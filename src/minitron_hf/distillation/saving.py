"""Saves and publishes a distilled student: checkpoints, the stock model, its record and its card."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers.trainer_utils import HubStrategy
from trl import SFTTrainer

from ..errors import MinitronError, OutputError
from ..files import refuse_own_folder, require_writable, versions
from ..formats import write_artefact
from ..hardware import as_dtype
from ..losses.heads import base_model_of
from ..models import empty_model
from ..names import public_name
from ..privacy import public_settings, public_texts
from ..pruning.stored_checkpoint import weight_names
from ..publishing.card import write_model_card
from ..publishing.hub import push_student_to_hub, write_teacher_metadata
from ..saving import in_stored_dtype, save_model
from .adapters import adapter_type, merged_copy, remove_replaced_model
from .checks import refuse_nan_weights, refuse_not_finite
from .config import DistillationConfig
from .correction import ConcurrentCorrection
from .intermediate import PROJECTION, IntermediateLosses
from .parallel import (
    gathered_model,
    gathered_projection,
    saves_shards,
    trains_in_parts,
)
from .record import RECORD_NAME, RECORDED_ARGUMENTS
from .rows import longest_row
from .teacher_cache import TeacherCache

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from ..pruning.plan import PruningPlan

logger = logging.getLogger(__name__)

#: Files that record how a student was made; copied to every folder it is saved in.
ORIGIN_FILES = ("pruning_plan.json", "pruning_plan.safetensors", "pruner_config.json", "scores.safetensors")

#: Config fields that the libraries change for training, and that a saved student gets back.
TRAINING_FIELDS = ("use_cache", "output_router_logits", "router_aux_loss_coef")


class SavingMixin(SFTTrainer):
    """The part of `DistillationTrainer` that writes files and pushes them."""

    args: DistillationConfig
    model: Any
    hub_model_id: Any
    _stock_fields: dict[str, Any]
    _plans: Sequence[PruningPlan]
    _student_name: str | None
    _teacher_name: str | None
    _teacher_revision: str | None
    _caches: list[TeacherCache]
    _datasets: dict[str, Any]
    _correction: ConcurrentCorrection | None
    _intermediate: IntermediateLosses
    teacher_model: Any
    _token_sums: dict[str, Tensor]
    #: Further facts on the training data for `distillation.json` and the card, such as the parts of a blend.
    training_data_facts: Mapping[str, Any] = {}

    # ---- Saving ----

    @contextlib.contextmanager
    def _stock_config(self) -> Iterator[None]:
        """Give the student the config fields that it had before training, without `auto_map`, while files are written.

        Transformers writes `auto_map` itself for a class whose code it saves beside the weights.
        """
        whole = base_model_of(self.accelerator.unwrap_model(self.model)).config
        config = whole.get_text_config()
        changed = {name: getattr(config, name) for name in self._stock_fields}
        auto_map = vars(whole).pop("auto_map", None)
        try:
            for name, value in self._stock_fields.items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in changed.items():
                setattr(config, name, value)
            if auto_map is not None:
                whole.auto_map = auto_map

    if TYPE_CHECKING:

        def _sum_over_processes(self, values: Tensor) -> Tensor: ...

        def _num_tokens_seen(self) -> int: ...

    def save_model(self, output_dir: str | os.PathLike[str] | None = None, _internal_call: bool = False) -> None:
        """Save the student (or its adapter) in its training dtype, with its plan and `distillation.json`.

        `save_student` writes the stock student to publish: adapters merged, in the dtype asked for. So does this where
        processes hold parts of the student and save them apart: tensor parallelism, and FSDP with sharded state dicts.
        """
        output_dir = os.fspath(output_dir or output_dir_of(self.args))
        if self.get_tp_size() > 1 or (saves_shards(self) and not _internal_call):
            self.save_student(output_dir)  # the base class would save the part of one process, or nothing
        else:
            self._save_as_trained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_as_trained(self, output_dir: str) -> None:
        """Save the student or its adapter as the base class does; of FSDP's shards, the record alone."""
        refuse_own_folder(output_dir, student=self._student_name, teacher=self._teacher_name)
        with self._stock_config(), _explained_write_errors(output_dir):
            if self.args.should_save:
                remove_replaced_model(output_dir, adapter=is_peft_model(self.accelerator.unwrap_model(self.model)))
            super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self._save_plan_and_record(Path(output_dir))

    def save_student(
        self, output_dir: str | os.PathLike[str] | None = None, *, dtype: torch.dtype | str | None = None
    ) -> None:
        """Save the stock student: plain weights that `AutoModelForCausalLM.from_pretrained` loads, adapters merged.

        To be called on all processes. Where each has a part of the student, they return when the folder is complete.

        Args:
            output_dir: default: the output folder of the run.
            dtype: of the saved weights, for example that of the teacher's checkpoint; by default the training dtype.

        Raises:
            DataError: if there is no such dtype.
            DivergedError: if a weight is NaN.
            OutputError: if the folder cannot be written, or holds the teacher or another model.
        """
        output_dir = Path(output_dir or output_dir_of(self.args))
        refuse_own_folder(output_dir, student=self._student_name, teacher=self._teacher_name)
        dtype = None if dtype is None else as_dtype(dtype)
        if callable(use_average := getattr(self.optimizer, "eval", None)):
            use_average()  # a schedule-free optimizer swaps in the averaged weights, as before an evaluation
        base = self.accelerator.unwrap_model(self.model)
        if trains_in_parts(self):
            base = gathered_model(self)
        elif is_peft_model(base) and self.args.should_save:
            base = merged_copy(base)
        if self.args.should_save:
            self._write_student(base, output_dir, dtype)
        if trains_in_parts(self):  # else it may be called on the first process alone
            self.accelerator.wait_for_everyone()  # the others would find a folder without the student

    def _write_student(self, base: Any, output_dir: Path, dtype: torch.dtype | None) -> None:
        """Write the stock student: the weights of `base`, of which the stock model is built anew."""
        state_dict = base.state_dict()
        state_dict.pop(f"{PROJECTION}.weight", None)
        with self._stock_config():
            config = copy.deepcopy(base.config)
            for name, value in self._stock_fields.items():
                setattr(config.get_text_config(), name, value)
            vars(config).pop("distributed_config", None)  # the saved student is whole
            student: Any = empty_model(config)
        student.load_state_dict(state_dict, assign=True)
        student.tie_weights()
        refuse_nan_weights(student)
        student.generation_config = base.generation_config
        require_writable(output_dir)
        remove_replaced_model(output_dir, adapter=False)
        with _explained_write_errors(output_dir):
            save_model(in_stored_dtype(student, dtype), output_dir, self.processing_class)
        self._save_plan_and_record(output_dir)

    def _save_plan_and_record(self, folder: Path) -> None:
        """Write the plan and the training record into `folder`."""
        if self._plans:
            self._plans[-1].save_pretrained(folder)
        source = Path(self._student_name) if self._student_name else None
        if source is not None and source.is_dir() and source.resolve() != folder.resolve():
            for name in ORIGIN_FILES:
                if (source / name).is_file() and not (folder / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        write_artefact(folder / RECORD_NAME, self.distillation_record())

    def distillation_record(self) -> dict[str, Any]:
        """Content of `distillation.json`: teacher, arguments, data and all logs."""
        arguments = self.args.to_dict()
        model = self.accelerator.unwrap_model(self.model)
        peft: dict[str, Any] | None = None
        if is_peft_model(model):
            peft = public_settings(
                {
                    key: value
                    for key, value in model.peft_config[model.active_adapter].to_dict().items()
                    if isinstance(value, bool | int | float | str | set | list)
                }
            )
            peft["base_model_name_or_path"] = public_name(self._student_name)
        history = self.state.log_history
        return {
            "versions": versions(),
            "teacher": {
                "name_or_path": public_name(self._teacher_name),
                "revision": self._teacher_revision,
                **adapter_type(self.teacher_model),
            },
            "student": {"name_or_path": public_name(self._student_name)},
            "teacher_cache": [public_texts(cache.manifest["settings"]) for cache in self._caches] or None,
            "arguments": public_settings({name: arguments.get(name) for name in RECORDED_ARGUMENTS}),
            "data": {**self._datasets, **self._training_facts()},
            "num_processes": self.accelerator.num_processes,
            "peft": peft,
            "global_step": self.state.global_step,
            "num_input_tokens_seen": None
            if self.args.include_num_input_tokens_seen == "no"
            else self._num_tokens_seen(),
            "train_runtime": next(
                (entry["train_runtime"] for entry in history[::-1] if "train_runtime" in entry), None
            ),
            "log_history": history,
        }

    def _training_facts(self) -> dict[str, Any]:
        """What is known of the training data, with its longest row: what lies behind it is not trained."""
        facts = {"longest_row": longest_row(self.train_dataset), **self.training_data_facts}
        return {"train": {**(self._datasets.get("train") or {}), **facts}}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        refuse_not_finite(self._sum_over_processes(self._token_sums["train"]).tolist(), self.state.global_step)
        # Skips TRL's card; ours is made from the finished run, in `push_to_hub` or `create_model_card`.
        super(SFTTrainer, self)._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self._correction is not None and self.args.should_save:
            self._correction.save(folder)
        if self._intermediate:
            weight = self._intermediate.next_weight(self._sum_over_processes)
            projection = gathered_projection(self._intermediate.projection)
            if self.args.should_save:
                self._intermediate.save(folder, weight, projection)

    # ---- Card and Hub ----

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **kwargs: Any
    ) -> None:
        """Write the model card from the files of the output folder; the arguments of TRL's method are not needed."""
        if self.is_world_process_zero():
            self._save_teacher_metadata()
            write_model_card(output_dir_of(self.args))

    def _save_teacher_metadata(self) -> None:
        folder = Path(output_dir_of(self.args))
        if self._teacher_name and not (folder / "teacher.json").is_file():
            write_teacher_metadata(folder, self._teacher_name, revision=self._teacher_revision)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Any:
        """Save the stock student into the output folder and publish the folder.

        Args:
            commit_message: of the commit.
            blocking: False uploads in the background and returns a `Future`.
            token: default: `args.hub_token`, or the stored one.
            revision: branch; default `args.hub_revision`.
            private: whether a new repository is private; default `args.hub_private_repo`, or True.
            **kwargs: accepted for compatibility with `Trainer.push_to_hub`.

        Raises:
            HubError: if the Hub refuses, or cannot be reached.
            OutputError: if the output folder cannot be written.
        """
        from huggingface_hub import HfApi

        self.save_student()
        if not self.is_world_process_zero():
            return None
        self._save_teacher_metadata()
        options: dict[str, Any] = {
            "private": self._is_private(private),
            "token": token or self.args.hub_token,
            "commit_message": commit_message,
            "revision": revision or self.args.hub_revision,
        }
        folder = output_dir_of(self.args)
        repo_id = self.args.hub_model_id or Path(folder).resolve().name
        if blocking:
            return push_student_to_hub(folder, repo_id, **options)
        return HfApi().run_as_future(push_student_to_hub, folder, repo_id, **options)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create a private repository; a public one is made public with its first commit."""
        super().init_hf_repo(token=token, private=True)

    def _is_private(self, private: bool | None) -> bool:
        return next(value for value in (private, self.args.hub_private_repo, True) if value is not None)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `Trainer` would upload the whole output folder, and before the checkpoint is complete."""

    def push_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Publish a complete checkpoint, if `push_to_hub` is set with the strategy `every_save`.

        A Hub that cannot be reached does not end the training: the student is pushed at the end, too. Other processes
        wait, and abort after `ddp_timeout`. Raise it for uploads that take longer, or use the strategy `end`.
        """
        wanted = self.args.push_to_hub and self.args.hub_strategy == HubStrategy.EVERY_SAVE
        # An adapter or the shards of FSDP alone are not a student.
        if not wanted or not self.is_world_process_zero() or not weight_names(Path(folder)):
            return
        step = self.state.global_step
        try:
            push_student_to_hub(
                folder,
                self.hub_model_id,
                private=self._is_private(None),
                token=self.args.hub_token,
                commit_message=f"Training in progress, step {step}",
                revision=self.args.hub_revision,
            )
        except MinitronError as error:
            logger.warning("The checkpoint of step %s was not pushed, and training goes on: %s", step, error)


@contextlib.contextmanager
def _explained_write_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of a full disk or a read-only folder into one clear error."""
    try:
        yield
    except MinitronError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(f"Cannot write to {folder}: {error}. Free space or choose another folder.") from error


def output_dir_of(args: DistillationConfig) -> str:
    assert args.output_dir is not None  # the base class fills it in
    return args.output_dir
