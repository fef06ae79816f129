"""The notebook runs from top to bottom, at pocket length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "minitron_in_15_minutes.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent.parent)
    monkeypatch.setenv("NOTEBOOK_STEPS", "4")
    monkeypatch.setattr("sys.argv", ["notebook"])
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["result"]["models"]["student"]["metrics"]["kl_divergence"]["value"] > 0
    assert (names["WORK"] / "student" / "model.safetensors").is_file()


def test_the_notebook_shows_its_results():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
