"""Covariance of the residual stream, from which a change of its basis is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .batches import Batches
from .hook_points import norm_paths
from .hooks import Hooks
from .reductions import accumulation_dtype


class CovariancePass(Batches):
    """Sums x xᵀ over the tokens, where x [H] is the input of a norm divided by its root mean square.

    The norms of all layers count alike: after the division, so does every token. The last norm is also summed by
    itself.
    """

    total: Tensor | None = None
    num_norms = 0

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Observe the inputs of the norms over the hidden channels."""
        with Hooks(self.model) as hooks:
            paths = [path for path, _ in norm_paths(self.spec, hooks.modules, self.sizes["layers"])]
            self.num_norms = len(paths)
            for path in paths:
                hooks.on_input(path, self._observer(is_last=path == self.spec.final_norm))
            yield

    def _observer(self, *, is_last: bool) -> Callable[[Tensor], None]:
        def observe(x_BTH: Tensor) -> None:
            mask_N = self.mask_BT.flatten().to(x_BTH.device)
            x_NH = x_BTH.reshape(len(mask_N), -1)[mask_N]
            x_NH = x_NH.to(accumulation_dtype(x_NH))
            x_NH = x_NH * x_NH.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            device = "cpu" if x_NH.device.type == "mps" else x_NH.device  # MPS has no float64
            product_HH = (x_NH.T @ x_NH).to(device, torch.float64)
            if self.total is None:
                self.total = torch.zeros(2, *product_HH.shape, dtype=torch.float64, device=device)
            self.total = self.total.to(device)
            self.total[: 2 if is_last else 1] += product_HH

        return observe

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Run the model, without its head, on one batch."""
        self.model.base_model(**self.inputs(self.begin(batch)), use_cache=False)

    def gather(self) -> None:
        """Add up the sums of all processes."""
        if self.total is None:  # this process had no batch
            size = self.sizes["hidden"]
            self.total = torch.zeros(2, size, size, dtype=torch.float64)
        self.total = self._add_up(self.total)
        super().gather()

    @property
    def covariance(self) -> Tensor:
        """The mean of x xᵀ over tokens and all norms, and over tokens for the last norm; float32 [2, H, H]."""
        assert self.total is not None
        counts = torch.tensor([self.num_norms, 1], device=self.total.device) * self.num_tokens
        return (self.total / counts[:, None, None]).float().cpu()
