"""Intermediate losses in training: attaches the projection to the student, and sets the weight of each step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import SFTTrainer

from ..errors import MismatchError
from ..losses.heads import base_model_of
from .checks import refuse_not_finite
from .config import DistillationConfig
from .intermediate import PROJECTION, IntermediateLosses, state_pairs

if TYPE_CHECKING:
    from ..pruning.plan import PruningPlan


class IntermediateLossMixin(SFTTrainer):
    """The part of `DistillationTrainer` for intermediate losses and their weight in each step."""

    args: DistillationConfig
    model: Any
    hub_model_id: Any
    _plans: Sequence[PruningPlan]
    _intermediate: IntermediateLosses
    _token_sums: dict[str, Tensor]

    if TYPE_CHECKING:

        def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]: ...

        def _sum_over_processes(self, values: Tensor) -> Tensor: ...

    def _intermediate_losses(self, student_config: Any, teacher_config: Any) -> IntermediateLosses:
        configs = [config.get_text_config() for config in (student_config, teacher_config)]
        layers: Any = self.args.hidden_layers  # a string was parsed by the arguments
        pairs = state_pairs(
            self.args.hidden_loss,
            self.args.embedding_loss,
            layers,
            depth=configs[0].num_hidden_layers,
            teacher_depth=configs[1].num_hidden_layers,
        )
        width, teacher_width = (config.hidden_size for config in configs)
        return IntermediateLosses(pairs, width, teacher_width, self.args.intermediate_weight, self._plans)

    @contextlib.contextmanager
    def _projection_attached(self) -> Iterator[None]:
        """Attach the projection to the student, unless it is attached already."""
        student = base_model_of(self.accelerator.unwrap_model(self.model))
        if hasattr(student, PROJECTION):
            yield
            return
        self._intermediate.attach(student)
        try:
            yield
        finally:
            self._intermediate.detach(student)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`."""
        with self._projection_attached():
            self._add_projection_to_optimizer()
            result = super().train(*args, **kwargs)
        refuse_not_finite(self._sum_over_processes(self._token_sums["train"]).tolist(), self.state.global_step)
        return result

    def _add_projection_to_optimizer(self) -> None:
        """Add the projection to an optimizer that was passed to the trainer."""
        projection = self._intermediate.projection
        if projection is None or self.optimizer is None:
            return
        known = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        if any(parameter is projection.weight for parameter in known):
            return
        if self.lr_scheduler is not None:
            raise MismatchError(
                "optimizers=(optimizer, scheduler): the scheduler does not know the projection to the teacher's width "
                "that hidden_loss and embedding_loss train. Pass (optimizer, None), or optimizer_cls_and_kwargs."
            )
        self.optimizer.add_param_group({"params": [projection.weight]})

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of an optimizer step; sets the weight of the intermediate losses before it."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._intermediate:
            if self._intermediate.weight is None and self._intermediate.step_sums is None:
                self.model.train()
                with torch.no_grad():  # the first step has no step before it
                    for batch in batches:
                        self._token_losses(self.model_wrapped, self._prepare_inputs(batch))
            self._intermediate.begin_step(self._sum_over_processes)
        return batches, num_items
