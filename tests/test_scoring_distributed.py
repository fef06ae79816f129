"""Two gloo processes score like one. This file is also the script that the processes run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Case → model, lengths of the rows, rows in a batch, whether they come from a DataLoader.
CASES = {
    "three batches": ("llama", (9, 4, 12, 7, 2), 2, False),
    "experts, and layers without any": ("qwen2_moe", (9, 4, 12, 7, 2), 1, False),
    "fewer batches than processes": ("gpt2", (5, 8), 2, False),
    "covariance of fewer batches": ("mistral", (5, 8), 2, False),
    "loader": ("llama", (6, 6, 6), 1, True),
}
#: A minute of one core; `test_distributed` trains in two processes in the default run.
pytestmark = pytest.mark.slow


def run(folder: Path) -> None:
    import contextlib
    import io

    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from minitron_hf import estimate_importance
    from minitron_hf.data import TokenRows
    from minitron_hf.errors import DataError
    from pocket import float64_throughout, pocket_model, pocket_tokens

    rank = os.environ.get("RANK", "0")
    for case, (name, lengths, batch_size, as_loader) in CASES.items():
        rows = [pocket_tokens(length, seed=length).tolist() for length in lengths]
        data = TokenRows(tuple(map(tuple, rows)), None)
        if as_loader:
            data = DataLoader([{"input_ids": torch.tensor(row)} for row in rows], batch_size=batch_size)
        shown = io.StringIO()
        with float64_throughout(), contextlib.redirect_stderr(shown):
            model = pocket_model(name)
            scores = estimate_importance(model, data, batch_size=batch_size, hidden_covariance=name == "mistral")
        scores.save_pretrained(folder / rank / case)
        (folder / rank / case / "progress.txt").write_text(shown.getvalue(), encoding="utf-8")
    if "RANK" in os.environ:
        try:
            estimate_importance(pocket_model("llama"), Accelerator(cpu=True).prepare(data))
        except DataError as error:
            (folder / rank / "refusal.txt").write_text(str(error), encoding="utf-8")
        try:
            estimate_importance(pocket_model("llama"), DataLoader(data.dataset, shuffle=True))
        except DataError as error:
            (folder / rank / "shuffled.txt").write_text(str(error), encoding="utf-8")
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What one process scored, then what each of two did."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    run(one)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *launcher, __file__, str(two)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [one / "0", two / "0", two / "1"]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(folders: list[Path], case: str):
    import torch

    from minitron_hf import ImportanceScores

    one, first, second = (ImportanceScores.from_pretrained(folder / case) for folder in folders)
    assert first.digest == second.digest
    assert (one.settings, one.digests) == (first.settings, first.digests) == (second.settings, second.digests)
    assert one.axes.keys() == first.axes.keys()
    if one.covariance is not None:
        torch.testing.assert_close(first.covariance, one.covariance)
        assert torch.equal(first.covariance, second.covariance)
    for axis, expected in {**one.axes, "blocks": one.blocks}.items():
        found = first.blocks if axis == "blocks" else first.axes[axis]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert expected.dtype == torch.float64


def test_only_the_first_process_shows_progress(folders: list[Path]):
    for case in CASES:
        one, first, second = ((folder / case / "progress.txt").read_text(encoding="utf-8") for folder in folders)
        assert "Scoring: 100%" in one
        assert "Scoring: 100%" in first
        assert "Scoring" not in second


def test_loaders_that_are_dealt_out_already_are_refused(folders: list[Path]):
    for folder in folders[1:]:
        assert "prepared by Accelerate" in (folder / "refusal.txt").read_text(encoding="utf-8")
        assert "This DataLoader shuffles" in (folder / "shuffled.txt").read_text(encoding="utf-8")


if __name__ == "__main__":
    run(Path(sys.argv[1]))
