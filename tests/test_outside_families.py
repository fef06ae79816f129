"""Tables that are registered from outside the package, for own classes and for models with remote code."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron_hf import PrunerConfig, load_model, make_plan, prune_model, register_family, verify_student
from minitron_hf import families as rooms
from minitron_hf.errors import UnsupportedModelError
from minitron_hf.families import families
from minitron_hf.models import load_config, load_tokenizer
from minitron_hf.survey.matrix import describe_family
from pocket import logits, pocket_model, pocket_tokens

CONFIGURATION = """
from transformers import LlamaConfig

class OutsideConfig(LlamaConfig):
    model_type = "outside"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_outside import OutsideConfig

class OutsideForCausalLM(LlamaForCausalLM):
    config_class = OutsideConfig
"""


@pytest.mark.parametrize("load", [load_config, load_model, load_tokenizer], ids=lambda load: load.__name__)
def test_code_of_a_model_is_not_run_unless_asked_for(tmp_path, monkeypatch, load):
    """And nobody is asked on the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 1)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for name, kind in (("config", {"model_type": "evil"}), ("tokenizer_config", {"tokenizer_class": "Evil"})):
        (tmp_path / f"{name}.json").write_text(json.dumps({"auto_map": classes, **kind}))
    with pytest.raises(UnsupportedModelError, match="it needs code of its own"):
        load(tmp_path)
    assert not ran.exists()


@pytest.fixture
def table():
    """Llama's table under another model type, forgotten after the test."""
    yield replace(families()["llama"], model_type="outside", equivalent_classes=())
    rooms._REGISTERED.clear()
    families.cache_clear()
    rooms.wrapped_families.cache_clear()


def remote_model(folder: Path) -> Path:
    """A model whose classes are files beside its weights."""
    model = pocket_model("llama", dtype=torch.float64)
    model.save_pretrained(folder)
    (folder / "configuration_outside.py").write_text(CONFIGURATION)
    (folder / "modeling_outside.py").write_text(MODELING)
    text = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "outside"')
    classes = '{"AutoConfig": "configuration_outside.OutsideConfig", ' + (
        '"AutoModelForCausalLM": "modeling_outside.OutsideForCausalLM"}'
    )
    (folder / "config.json").write_text(text.replace("{", f'{{"auto_map": {classes},', 1))
    return folder


def test_a_model_with_remote_code_is_pruned_by_a_registered_table(tmp_path, table):
    teacher = load_model(remote_model(tmp_path / "teacher"), trust_remote_code=True)
    assert type(teacher).__module__.startswith("transformers_modules.")
    with pytest.raises(UnsupportedModelError, match="register_family"):
        make_plan(teacher, PrunerConfig(layers_to_drop=[1]))
    register_family(table)
    plan = make_plan(teacher, PrunerConfig(layers_to_drop=[1]))
    student = prune_model(teacher, PrunerConfig(layers_to_drop=[1]))
    verify_student(teacher, student, plan)
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=True, dtype=torch.float64)
    tokens = pocket_tokens(2, 7)
    torch.testing.assert_close(logits(loaded, tokens), logits(student, tokens), rtol=1e-12, atol=1e-12)
    assert loaded.config.num_hidden_layers == teacher.config.num_hidden_layers - 1


def test_registering_twice_is_harmless_and_another_table_is_refused(table):
    register_family(table)
    register_family(table)
    assert families()["outside"] == table
    assert describe_family("outside")[0][0] == "A table from outside this package."
    with pytest.raises(UnsupportedModelError, match="already"):
        register_family(replace(families()["mistral"], model_type="llama"))


def test_entry_points_of_other_packages_are_found(table, monkeypatch):
    class Entry:
        def load(self):
            return table

    monkeypatch.setattr(rooms, "entry_points", lambda group: [Entry()] if group == "minitron_hf.families" else [])
    families.cache_clear()
    assert families()["outside"] == table


def test_the_page_registers_a_table(table, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/guides/add-a-family.md").read_text(encoding="utf-8")
    *_, block = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    asked = []
    monkeypatch.setattr("minitron_hf.load_model", lambda *args, **kwargs: asked.append((args, kwargs)))
    exec(compile(block, "add-a-family.md", "exec"), {})
    assert families()["my_model"].axes == families()["llama"].axes
    assert asked == [(("owner/my-model",), {"trust_remote_code": True})]
