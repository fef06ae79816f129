"""Batches of several processes: rows that are repeated at the end of an epoch do not count again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from torch.utils.data import DataLoader

from minitron_hf.distillation.batches import (
    CACHED,
    LABELS,
    ROW_LENGTHS,
    CachedTeacher,
    row_of_positions,
    without_repeated_rows,
)
from minitron_hf.losses.fused import distillation_loss, next_token_positions
from minitron_hf.losses.heads import output_head
from minitron_hf.losses.signals import DenseSignal, TopKSignal
from pocket import pocket_model

LENGTHS = (3, 5, 2, 4)


def batch_of(rows: list[int], flat: bool, shifted: bool = False) -> dict:
    """Rows whose labels, and what a cache says of them, tell which row it is."""
    labels = [torch.tensor([-100, *[100 * row + i for i in range(1, LENGTHS[row])]]) for row in rows]
    tokens = torch.cat([each[1:] for each in labels]).unsqueeze(-1)
    if flat:
        batch = {LABELS: torch.cat(labels)[None], ROW_LENGTHS: torch.tensor([len(each) for each in labels])}
    else:
        batch = {LABELS: torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)}
    if shifted:
        batch["shift_labels"] = torch.nn.functional.pad(batch[LABELS], (0, 1), value=-100)[:, 1:]
    said = CachedTeacher(tokens, tokens.float(), tokens[:, 0].float(), {2: tokens.float()})
    return {**batch, CACHED: said}


@pytest.mark.parametrize("flat", [False, True])
def test_every_row_counts_in_one_process_alone(flat):
    """Three of four rows are new: of rows 3 and 0 in the second process, row 0 is the first's."""
    state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    seen = []
    for index, rows in enumerate([[1, 2], [3, 0]]):
        process = SimpleNamespace(num_processes=2, process_index=index, gradient_state=state, parallelism_config=None)
        batch = without_repeated_rows(batch_of(rows, flat, shifted=True), process)
        _, targets = next_token_positions(batch[LABELS])
        assert batch["shift_labels"][batch["shift_labels"] != -100].tolist() == targets.tolist()
        said = batch[CACHED]
        for values in (said.tokens[:, 0], said.log_probs[:, 0], said.log_tail, said.states[2][:, 0]):
            assert values.tolist() == targets.tolist()
        seen += targets.tolist()
    assert seen == [100 * row + i for row in (1, 2, 3) for i in range(1, LENGTHS[row])]

    whole = batch_of([3, 0], flat)
    for other in (
        SimpleNamespace(num_processes=1, process_index=0, gradient_state=state, parallelism_config=None),
        SimpleNamespace(
            num_processes=2,
            process_index=1,
            gradient_state=SimpleNamespace(end_of_dataloader=False),
            parallelism_config=None,
        ),
        SimpleNamespace(
            num_processes=2,
            process_index=1,
            gradient_state=SimpleNamespace(end_of_dataloader=True, remainder=0),
            parallelism_config=None,
        ),
    ):
        assert without_repeated_rows(whole, other) is whole


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize(("num_rows", "drop_last"), [(7, False), (8, False), (7, True)])
def test_every_row_counts_once_after_a_resume(skipped, num_rows, drop_last):
    """With Accelerate's own loaders of two processes, of which the first batches are skipped."""
    counted = []
    for index in range(2):
        loader = prepare_data_loader(
            DataLoader(torch.arange(num_rows), batch_size=2, drop_last=drop_last),
            num_processes=2,
            process_index=index,
            put_on_device=False,
        )
        process = SimpleNamespace(
            num_processes=2, process_index=index, gradient_state=GradientState(), parallelism_config=None
        )
        for rows in skip_first_batches(loader, skipped) if skipped else loader:
            batch = without_repeated_rows({LABELS: rows[:, None].expand(-1, 2)}, process)
            counted += [row for row in batch[LABELS][:, 1].tolist() if row != -100]
    last = 4 if drop_last else num_rows
    assert sorted(counted) == list(range(4 * skipped, last))


def test_a_batch_in_which_nothing_counts_has_gradients_of_zero():
    """DDP waits for every gradient of every process."""
    student, teacher = pocket_model("llama"), pocket_model("llama", seed=1)
    hidden = student.model(torch.zeros((1, 3), dtype=torch.long)).last_hidden_state[0][:0]
    none = torch.zeros(0, dtype=torch.long)
    cached = TopKSignal(none.reshape(0, 2), torch.zeros(0, 2), torch.zeros(0), teacher.config.vocab_size)
    for signal in (DenseSignal(hidden.detach(), output_head(teacher)), cached):
        student.zero_grad()
        losses = distillation_loss(hidden, output_head(student), signal, none, ce_weight=1.0)
        losses.total.backward(retain_graph=True)
        assert losses.total.item() == 0
        assert all(weight.grad is not None and not weight.grad.any() for weight in student.parameters())


def test_padding_behind_flattened_rows_belongs_to_the_last():
    """As `pad_to_multiple_of` leaves it."""
    batch = {LABELS: torch.tensor([[-100, 1, -100, 2, 3, -100, -100, -100]]), ROW_LENGTHS: torch.tensor([2, 3])}
    rows, count = row_of_positions(batch)
    assert (rows.tolist(), count) == ([0, 0, 1, 1, 1, 1, 1, 1], 2)
    state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    process = SimpleNamespace(num_processes=2, process_index=1, gradient_state=state, parallelism_config=None)
    assert without_repeated_rows(batch, process)[LABELS].tolist() == [[-100, 1, *[-100] * 6]]
