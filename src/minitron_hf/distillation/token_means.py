"""Logged losses as exact means over tokens, in training and evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from ..hardware import sum_dtype
from .batches import (
    model_inputs,
    row_of_positions,
)
from .checks import refuse_not_finite
from .config import DistillationConfig
from .intermediate import IntermediateLosses
from .parallel import refuse_unsharded

#: Values that are summed over tokens and logged, beside the intermediate losses.
COLUMNS = ("divergence", "kl", "ce", "agreement", "entropy", "mean_token_accuracy")


class TokenMeansMixin(SFTTrainer):
    """The part of `DistillationTrainer` that sums losses over tokens, and logs their means."""

    args: DistillationConfig
    model: Any
    hub_model_id: Any
    _columns: tuple[str, ...]
    _token_sums: dict[str, Tensor]
    _intermediate: IntermediateLosses

    if TYPE_CHECKING:

        def _token_losses(self, model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]: ...

        def _projection_attached(self) -> contextlib.AbstractContextManager[None]: ...

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(sum_dtype(values.device)), "sum")

    def _num_tokens_seen(self) -> int:
        """Tokens seen in training. The base class adds up those of all processes, of which some share their rows."""
        return int(self.state.num_input_tokens_seen) // self.get_tp_size()

    def _zero_sums(self) -> Tensor:
        shape = (len(self._columns) + 1,)
        return torch.zeros(shape, dtype=sum_dtype(self.accelerator.device), device=self.accelerator.device)

    def _values_per_token(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Every logged loss, and 1, per token: [N, columns + 1], ready to be summed."""
        columns = [losses[name].detach() for name in self._columns]
        columns.append(torch.ones_like(columns[0]))
        return torch.stack([column.to(sum_dtype(column.device)) for column in columns], 1)

    def _loss_means(self, sums: Tensor, *, own_weight: bool = False) -> dict[str, float]:
        """Logged values from sums over tokens, on the CPU.

        Args:
            sums: [columns + 1], the last of which counts the tokens.
            own_weight: compute a dynamic weight of the intermediate losses from these tokens, so that evaluations
                before, during and after training are comparable; otherwise it is the weight of the training step.
        """
        *values, count = sums.cpu().double().tolist()
        if not count:
            return {}
        means = {name: value / count for name, value in zip(self._columns, values, strict=True)}
        logit_loss = self.args.kd_weight * self.args.temperature**2 * means["divergence"]
        loss = logit_loss + self.args.ce_weight * means["ce"]
        if self._intermediate:
            extra = sum(means[term] for term in self._columns[len(COLUMNS) :])
            weight = self._intermediate.weight or 0.0
            if own_weight and self._intermediate.dynamic:
                weight = logit_loss / extra if extra > 0 else 0.0
            means["alpha"] = weight
            loss += weight * extra
        if self.args.divergence == "forward_kl":
            del means["divergence"]  # the same as `kl`
        return {"loss": loss, **means}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the other means over the tokens since the last log to the training loss."""
        if "loss" in logs:  # the training loop logs its loss on all processes
            means = self._loss_means(self.accelerator.reduce(self._token_sums["train"], "sum"))
            refuse_not_finite(means.values(), self.state.global_step)
            self._token_sums["train"] = self._zero_sums()
            logs.update((key, value) for key, value in means.items() if key != "loss")
            if self.args.include_num_input_tokens_seen != "no":  # TRL's own count restarts at 0 when a run is resumed
                logs["num_tokens"] = self._num_tokens_seen()
        super().log(logs, start_time)

    # ---- Evaluation ----

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """One evaluation batch: token sums per row, and logits only where something asks for them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, positions = self._token_losses(model, inputs)
            loss = losses["total"] / max(len(positions), 1)
            # Sums per row, because gathering drops the rows that the last batch repeats.
            row_of_position, num_rows = row_of_positions(inputs)
            sums = torch.zeros((num_rows, len(self._columns) + 1), dtype=sum_dtype(loss.device), device=loss.device)
            sums.index_add_(0, row_of_position[positions].to(loss.device), self._values_per_token(losses))
            if self.get_tp_size() == 1:  # else all processes have the same rows
                sums = self.accelerator.gather_for_metrics(sums)
            self._token_sums["eval"] += sums.sum(0)
            if prediction_loss_only:
                return loss.detach(), None, None
            return loss.detach(), model(**model_inputs(inputs), use_cache=False).logits.detach(), inputs["labels"]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over the tokens of the evaluation set, instead of means of batch means.

        Raises:
            UnsupportedModelError: under FSDP2, if the student is not sharded yet.
        """
        refuse_unsharded(self)
        self._token_sums["eval"] = self._zero_sums()
        with self._projection_attached():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        means = self._loss_means(self._token_sums["eval"], own_weight=True)
        metrics = {**(output.metrics or {}), **{f"{metric_key_prefix}_{key}": value for key, value in means.items()}}
        return output._replace(metrics=metrics)
