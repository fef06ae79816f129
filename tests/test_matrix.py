"""The matrix family × axis says what the tables say, and the documentation shows the current one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from minitron_hf.errors import DataError, UnsupportedModelError
from minitron_hf.families import FIELD_OF_AXIS, REFUSED, families, wrapped_families
from minitron_hf.survey.matrix import (
    BEGIN,
    END,
    Cut,
    cuttable_axes,
    describe_family,
    insert_matrix,
    support_matrix,
    to_markdown,
)

PAGE = (Path(__file__).parent.parent / "docs" / "families.md").read_text(encoding="utf-8")


def test_the_page_shows_the_current_matrix():
    assert insert_matrix(PAGE) == PAGE, "make families writes it"


def test_every_family_is_in_one_row():
    listed = [name.rstrip("⁰¹²³⁴⁵⁶⁷⁸⁹ ") for names, _ in support_matrix().rows for name in names]
    assert sorted(listed) == sorted(families())


def test_every_model_around_a_language_model_has_one_row():
    rows = support_matrix().wrappers
    listed = {name: (texts, said) for names, texts, said in rows for name in names}
    assert len(listed) == sum(len(names) for names, *_ in rows)
    assert listed.keys() == {outer for outer, _ in wrapped_families()} | REFUSED.keys()
    pairs = {(name, text) for name, (texts, said) in listed.items() for text in texts if "✗" not in said}
    assert pairs == set(wrapped_families())
    texts, said = listed["git"]
    assert (texts, said[:42]) == (("git",), "✗ no table describes its language model: B")
    assert "| `git` | `git` | ✗ no table" in PAGE
    with pytest.raises(UnsupportedModelError, match="'git' models cannot be pruned: no table"):
        describe_family("git")


def test_models_around_language_models_are_described():
    [(said, spec)] = describe_family("gemma3")
    assert said.startswith("A model that holds a language model of type 'gemma3_text'. Gemma 3, text only")
    assert "model.multi_modal_projector.mm_input_projection_weight" in spec.outer
    assert describe_family("gemma3_text")[0][1] is families()["gemma3_text"]
    with pytest.raises(UnsupportedModelError, match=r"No family table for 'gem'.* gemma3_text, .* llava"):
        describe_family("gem")


def test_cells_say_whether_and_why():
    """A table with one of everything; the expected cells are written down by hand."""
    spec = replace(
        families()["qwen2_moe"],
        refused={"layers": "the layers share their keys"},
        refused_if=(("alibi", True, "ffn", "biases"), ("hash", True, "*", "experts are chosen by token id")),
        equal=(("heads*head_dim", "hidden"),),
        multiples=(("shared_ffn", "kv"),),
    )
    heads = "only together, so that `hidden_size` = `num_attention_heads` × head_dim"
    assert cuttable_axes(spec) == {
        "layers": Cut(False, ("the layers share their keys",)),
        "hidden": Cut(True, (heads,)),
        "ffn": Cut(True, ("not with `alibi=True`: biases",)),
        "heads": Cut(True, (heads, "the same number for every kept unit of `num_key_value_heads`")),
        "kv": Cut(True),
        "experts": Cut(True, ("at least num_experts_per_tok",)),
        "moe_ffn": Cut(True),
        "shared_ffn": Cut(True, ("only multiples of `num_key_value_heads`",)),
    }
    mistral = families()["mistral"]
    matrix = support_matrix([spec, mistral, replace(mistral, model_type="kin")])
    assert to_markdown(matrix).splitlines()[2:4] == [
        "| `qwen2_moe`⁷ | ✗¹ | ✓² | ✓³ | ✓² ⁴ | ✓ | ✓⁵ | ✓ | ✓⁶ |",
        "| `mistral`, `kin` | ✓ | ✓ | ✓ | ✓⁴ | ✓ |  |  |  |",
    ]
    assert matrix.remarks[6] == "not with `hash=True`: experts are chosen by token id"
    assert all(FIELD_OF_AXIS[axis] in matrix.legend for axis in matrix.axes)


def test_variants_are_remarks():
    heads = "only together, so that `hidden_size` = `num_attention_heads` × head_dim"
    mistral = families()["mistral"]
    narrow = replace(mistral, axes=tuple(axis for axis in mistral.axes if axis.name != "kv"), groups=())
    square = replace(mistral, equal=(("heads*head_dim", "hidden"),), refused={"ffn": "four times the width"})
    found = cuttable_axes(replace(narrow, variants=(("square", True, square),)))
    assert found["kv"] == Cut(True, ("only with `square=True`",))
    assert found["hidden"] == Cut(True, (f"with `square=True`: {heads}",))
    assert found["ffn"] == Cut(True, ("with `square=True`: no", "four times the width"))


def test_a_text_without_markers_is_refused():
    for text in ("", BEGIN, f"{END} {BEGIN}"):
        with pytest.raises(DataError, match="between which the matrix stands"):
            insert_matrix(text)
