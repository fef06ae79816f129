"""The teacher in training: loads, places and freezes it, and computes its logits of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTTrainer

from ..compat import gathered_parameters, prepare_deepspeed
from ..errors import UnsupportedModelError
from ..families.tensors import is_quantised
from ..hardware import one_dtype
from ..losses.heads import check_output_head, gathered_head, output_head
from ..losses.signals import DenseSignal, TeacherSignal, top_k_signal
from ..models import load_model, make_fast
from .config import DistillationConfig
from .correction import ConcurrentCorrection, cross_entropy_sum
from .cut_vocabulary import KeptTokens
from .intermediate import IntermediateLosses, needed_states
from .parallel import forward_of_backbone, is_split, offload_layers, shard_teacher
from .teacher_cache import TeacherCache
from .training_inputs import fingerprint


class TeacherMixin(SFTTrainer):
    """The part of `DistillationTrainer` that loads and calls the teacher."""

    args: DistillationConfig
    model: Any
    hub_model_id: Any
    teacher_model: Any
    _caches: list[TeacherCache]
    _correction: ConcurrentCorrection | None
    _intermediate: IntermediateLosses
    _kept: KeptTokens | None
    _teacher_fingerprint: Any
    _teacher_loss: Tensor | None

    def _prepare_teacher(self, teacher_model: Any, init_kwargs: dict[str, Any]) -> Any:
        """Load, freeze and place the teacher with the same Accelerate plugin as the student."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        dtype = None
        if not isinstance(teacher_model, nn.Module):
            dtype = one_dtype(init_kwargs.pop("dtype", None), init_kwargs)
        teacher_model = load_model(teacher_model, dtype=dtype, **init_kwargs)
        for cache in self._caches:
            cache.require_teacher(teacher_model)
        teacher_model.requires_grad_(False)
        self._teacher_fingerprint = fingerprint(teacher_model)  # with its adapter, as nothing of it is trained
        teacher_model.eval()
        if dtype in (None, "auto"):
            make_fast(teacher_model, self.accelerator.device)
        if sharded and self.args.teacher_offload:
            raise UnsupportedModelError(
                "teacher_offload: FSDP and DeepSpeed split the teacher over the devices. Leave it out, or have the "
                "configuration keep all shards in main memory (fsdp_offload_params, offload_param_device)."
            )
        if is_split(teacher_model) and self.get_tp_size() == 1:
            raise UnsupportedModelError(
                "The teacher is split by tensor parallelism, and the student is not, so every process would train on "
                "other rows. Load both with distributed_config=DistributedConfig(tp_size=N)."
            )
        if not sharded:
            if self.args.teacher_offload:
                offload_layers(teacher_model, self.accelerator.device)
            elif getattr(teacher_model, "hf_device_map", None) is None:
                teacher_model.to(self.accelerator.device)
            check_output_head(self.model, role="student")
            check_output_head(teacher_model, role="teacher")
            return teacher_model
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher_model, self.accelerator)
        return shard_teacher(teacher_model, self.accelerator)

    def _teacher_correction(self) -> ConcurrentCorrection | None:
        """The callback that trains the teacher too; None without `teacher_correction`."""
        if self.args.teacher_correction is None:
            return None
        teacher = self.teacher_model
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or getattr(teacher, "hf_device_map", None):
            raise UnsupportedModelError(
                "teacher_correction='concurrent' needs the whole teacher on every device. Use one device or DDP, or "
                "correct the teacher beforehand with correct_teacher."
            )
        if is_quantised(teacher):
            raise UnsupportedModelError(
                "teacher_correction='concurrent' cannot train a quantised teacher. Load it without "
                "quantization_config."
            )
        assert self.args.teacher_original_learning_rate is not None  # checked by the arguments
        correction = ConcurrentCorrection(teacher, self.args.teacher_original_learning_rate)
        self.add_callback(correction)
        return correction

    def _teacher_signal(
        self, inputs: dict[str, Any], positions: Tensor, targets: Tensor
    ) -> tuple[TeacherSignal, tuple[Tensor, ...]]:
        """The teacher's distributions and hidden states at `positions` of the flattened batch.

        With `top_k`, training gets the most likely tokens; evaluation always gets whole distributions. With
        `teacher_correction` it also computes the teacher's own loss, which `compute_loss` backpropagates.
        """
        learns = self._correction is not None and self.model.training and torch.is_grad_enabled()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        teacher.eval()
        wanted = needed_states(self._intermediate.pairs, "teacher")
        extra = {"output_hidden_states": wanted} if wanted else {}
        with torch.set_grad_enabled(learns), self.accelerator.autocast(), forward_of_backbone(teacher):
            # Called through the wrapper, if there is one, whose hooks gather sharded parameters.
            if self._kept is not None:
                inputs, targets = self._kept.inputs_of_teacher(inputs), self._kept.of_teacher(targets)
            output = self.teacher_model(**inputs, **extra, use_cache=False)
        head = gathered_head(output_head(teacher))
        h_NH = output.last_hidden_state.flatten(0, 1).index_select(0, positions).to(head.weight.device)
        states = self._intermediate.teacher_states(output.hidden_states, positions) if wanted else ()
        if learns:
            with self.accelerator.autocast():
                self._teacher_loss = cross_entropy_sum(h_NH, head, targets)
        kept = None if self._kept is None else self._kept.ids
        dense = DenseSignal(h_NH.detach(), head, kept)
        signal: TeacherSignal = dense
        if self.args.top_k is not None and self.model.training:
            with self.accelerator.autocast(), gathered_parameters(head.weight, head.bias):
                signal = top_k_signal(dense, self.args.top_k, temperature=self.args.temperature)
        return signal, tuple(h.detach() for h in states)
