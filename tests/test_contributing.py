"""The worked page on adding a family shows what is there."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

from transformers import AutoConfig

from minitron_hf.families import ArchSpec
from minitron_hf.survey.draft import draft_family
from pockets import Pocket

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guides" / "add-a-family.md").read_text(encoding="utf-8")


def test_the_worked_family_is_the_shipped_one():
    # The others are run in test_outside_families and test_readme.
    draft, table, pocket, *_ = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert draft == draft_family(AutoConfig.for_model("qwen3"))
    assert table == (ROOT / "src" / "minitron_hf" / "families" / "qwen3.py").read_text(encoding="utf-8")
    assert pocket in (ROOT / "tests" / "pockets" / "dense.py").read_text(encoding="utf-8")


def test_no_family_is_left_a_draft():
    for folder in ("src/minitron_hf/families", "tests/pockets"):
        for path in (ROOT / folder).glob("*.py"):
            assert "TODO" not in path.read_text(encoding="utf-8"), f"{path} still has a TODO of `families draft`"


def test_what_the_page_names_exists():
    spec_fields = {field.name for field in fields(ArchSpec)}
    named = {
        "layer_norms",
        "norm_offset",
        "stream",
        "logits",
        "leading_layers",
        "layer_rules",
        "refused",
        "refused_if",
    }
    assert named <= spec_fields
    assert all(f"`{name}" in PAGE for name in named)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in re.findall(r"`make ([a-z-]+)`", PAGE))


def test_the_page_explains_every_field_of_a_pocket_and_every_file_of_pockets():
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", PAGE, flags=re.MULTILINE))
    for field in fields(Pocket):
        assert field.name in rows, field.name
        if field.default is not MISSING:
            assert rows[field.name] == f"`{field.default!r}`".replace("'", '"'), field.name
    files = {path.name for path in (ROOT / "tests" / "pockets").glob("*.py")} - {"__init__.py", "base.py"}
    assert files <= rows.keys()
