"""Logits of one row at a time are the model's own, and no logits of a whole batch come to be."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_hf import estimate_importance, evaluate_models
from minitron_hf.data import TokenRows
from minitron_hf.scoring.logits import run_backbone
from pocket import pocket_model, pocket_tokens

ROWS = TokenRows(tuple(tuple(row.tolist()) for row in pocket_tokens(6, 11)), None)
#: Heads with a bias, a scale, a soft cap or a transformation; layers in other places; several residual streams.
NAMES = ["llama", "gpt2", "opt", "gemma2", "cohere", "gptj", "llama4_text", "mamba2", "gemma3n_text", "mixtral"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_model(name: str):
    model, ids_BT = pocket_model(name), pocket_tokens(3, 7)
    with torch.no_grad():
        expected = model(input_ids=ids_BT, use_cache=False).logits
        output = run_backbone(model, {"input_ids": ids_BT})
        for row in range(3):
            torch.testing.assert_close(output.logits(row), expected[row], rtol=1e-9, atol=1e-9)
            some = output.logits(row, torch.tensor([1, 4]))
            torch.testing.assert_close(some, expected[row, [1, 4]], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(input_ids=ids_BT, use_cache=False).logits, expected)


class Largest(TorchDispatchMode):
    """The most elements of a tensor whose last dimension is the vocabulary, apart from the head."""

    def __init__(self, config) -> None:
        super().__init__()
        self.vocab_size, self.width, self.elements = config.vocab_size, config.hidden_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ()
            if shape[-1:] == (self.vocab_size,) and shape != (self.width, self.vocab_size):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("what", ["taylor", "perplexity", "logit_nmse", "evaluate"])
def test_no_tensor_holds_the_logits_of_two_rows(what: str, tmp_path: Path):
    model = pocket_model("llama", vocab_size=997)
    with Largest(model.config) as largest:
        if what == "taylor":
            estimate_importance(model, ROWS, metric="taylor", batch_size=3)
        elif what == "evaluate":
            evaluate_models({"a": model, "b": model}, ROWS, batch_size=3, speed=False, show_progress=False)
        else:
            estimate_importance(model, ROWS, depth_metric=what, block_length=1, batch_size=3)
    assert 10 * 997 <= largest.elements <= 11 * 997


def test_taylor_scores_leave_no_activations_behind():
    """A gradient hook that holds its own tensor is never freed: every batch would stay in memory."""
    model = pocket_model("mixtral")

    def living() -> int:
        gc.collect()
        return sum(isinstance(each, torch.Tensor) and each.grad_fn is not None for each in gc.get_objects())

    before = living()
    estimate_importance(model, ROWS, metric="taylor", batch_size=2, show_progress=False)
    assert living() == before
