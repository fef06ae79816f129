"""The teacher's last hidden states of training batches, computed once for all arms that read the same batches.

A file is named by a digest of everything that decides the states: the teacher, the batch, the precision, and what
computes them. So the states are those that would be computed again, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_hf import DistillationTrainer
from minitron_hf.files import replacing_file
from minitron_hf.losses.heads import output_head
from minitron_hf.losses.signals import DenseSignal, TeacherSignal

from .arms import key


class TeacherStatesTrainer(DistillationTrainer):
    """A trainer that reads the teacher's last hidden states from `states_folder`, and writes those that it lacks.

    Attributes:
        states_folder: of the files.
        teacher_digest: of the teacher's weights, which do not change.
    """

    states_folder: Path
    teacher_digest: str

    def _teacher_signal(
        self, inputs: dict[str, Any], positions: Tensor, targets: Tensor
    ) -> tuple[TeacherSignal, tuple[Tensor, ...]]:
        if self._intermediate or self._correction is not None:  # needs more than the last states
            return super()._teacher_signal(inputs, positions, targets)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)} | {
            "positions": positions
        }
        batch = [[name, list(one.shape), one.cpu().numpy().tobytes().hex()] for name, one in sorted(tensors.items())]
        computed_by = [str(self.teacher_model.dtype), self.args.bf16, torch.__version__, torch.get_num_threads()]
        path = self.states_folder / f"{key(self.teacher_digest, computed_by, str(positions.device), batch)}.pt"
        if path.is_file():
            hidden = torch.load(path, weights_only=True, map_location=positions.device)
            return DenseSignal(hidden, output_head(self.accelerator.unwrap_model(self.teacher_model))), ()
        signal, states = super()._teacher_signal(inputs, positions, targets)
        assert isinstance(signal, DenseSignal)
        self.states_folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as temporary:
            torch.save(signal.hidden, temporary)
        return signal, states
