"""The student in other programs: the blocks of the guide run on a student whose heads do not fill the hidden size."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from minitron_hf import PrunerConfig, apply_plan, estimate_importance, make_plan, save_model
from minitron_hf.families import families
from minitron_hf.families.runtimes import _RECOMPUTED, HEADS_FILL_HIDDEN, MLP_FOUR_TIMES_HIDDEN
from pocket import pocket_model, pocket_tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "guides" / "runtimes.md").read_text(encoding="utf-8")
EXPORT, ONNX, TRAIN = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def pruned(name: str, folder: Path) -> Any:
    """A student of random units, saved and loaded again with the stock class."""
    teacher = pocket_model(name, dtype=torch.float32)
    scores = estimate_importance(teacher, metric="random")
    plan = make_plan(teacher, PrunerConfig(hidden_size=24, intermediate_size=32), scores)
    save_model(apply_plan(teacher, plan), folder, pocket_tokenizer())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_an_exported_student_computes_the_same_at_any_length(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    student = pruned(name, tmp_path / "student")
    assert student.config.head_dim * student.config.num_attention_heads != student.config.hidden_size
    exec(EXPORT, {"student": student})
    loaded = torch.export.load("student.pt2").module()
    for length in (3, 12, 40):
        ids = torch.arange(length).reshape(1, -1)
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids), student(ids, use_cache=False).logits)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs onnx and onnxruntime"
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_onnx_student_computes_the_same(tmp_path, monkeypatch, name):
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    student = pruned(name, tmp_path / "student")
    names: dict[str, Any] = {"student": student}
    exec(EXPORT, names)
    exec(ONNX, names)
    ids = torch.arange(20).reshape(1, -1)
    (found,) = onnxruntime.InferenceSession("student.onnx").run(None, {"input_ids": ids.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), student(ids, use_cache=False).logits)


def test_a_student_trains_with_trl_and_peft(tmp_path, monkeypatch):
    """Weights move; the merged adapter computes what the adapter computed; the result is a stock checkpoint."""
    monkeypatch.chdir(tmp_path)
    student = pruned("qwen2", tmp_path / "student")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    rows = Dataset.from_dict({"text": ["the old x of a is k", "the new y of b is l"]})
    pairs = Dataset.from_dict({"prompt": ["the old"] * 2, "chosen": [" x of a"] * 2, "rejected": [" z"] * 2})
    code = TRAIN.replace("max_steps=1", "max_steps=1, use_cpu=True, bf16=False, report_to='none', learning_rate=0.1")
    code = code.replace(
        "merged =", "ids = torch.arange(8)[None]\nadapted = dpo.model.eval()(ids).logits.detach()\nmerged ="
    )
    names = {"student": student, "train": rows, "pairs": pairs, "tokenizer": pocket_tokenizer(), "torch": torch}
    exec(code, names)
    merged = names["merged"].eval()
    assert any(not torch.equal(before[name], tensor) for name, tensor in merged.state_dict().items())
    with torch.no_grad():
        logits = merged(names["ids"]).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, names["adapted"], rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32).eval()
    assert again.config.head_dim == student.config.head_dim
    with torch.no_grad():
        torch.testing.assert_close(again(names["ids"]).logits, logits)


def test_the_guide_lists_the_model_types_of_the_table():
    shown = dict(re.findall(r"^\| (\S[^|]*\d\.\d+\.\d+) \| ([a-z][\w, ]+) \|", PAGE, flags=re.MULTILINE))
    assert {name: sorted(types.split(", ")) for name, types in shown.items()} == {
        name: sorted(types.split()) for name, types in _RECOMPUTED[HEADS_FILL_HIDDEN].items()
    }
    [neurons] = _RECOMPUTED[MLP_FOUR_TIMES_HIDDEN].values()
    assert f"for {', '.join(neurons.split()[:-1])} and {neurons.split()[-1]}." in PAGE
    every = [types for programs in _RECOMPUTED.values() for types in programs.values()]
    assert {one for types in every for one in types.split()} <= set(families())
