"""Messages of the library in the words of a command: options, entries of --set, sections of a recipe, commands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import minitron_hf
from minitron_hf.cli import wording

OPTIONS = {"vocab_size": "--vocab-size", "top_k": "--top-k", "output": "--output", "set_": "--set"}


@pytest.fixture(autouse=True)
def command():
    wording.begin(OPTIONS)
    wording.takes(["tolerance", "repair", "speed", "nonuniform_sizes", "max_length"])
    yield
    wording.begin({})


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        ("vocab_size=40 is larger.", "--vocab-size 40 is larger."),
        ("vocab_size=40,000 needs counts", "--vocab-size 40,000 needs counts"),
        ("costs 3M: tolerance=0.07 takes it.", "costs 3M: --set tolerance=0.07 takes it."),
        ("Set tolerance=0.07. Or", "Set --set tolerance=0.07. Or"),
        ("repair='sequential' and top_k=None: no", "--set repair=sequential and --top-k null: no"),
        ("nonuniform_sizes=['a', 'b']: no", "--set nonuniform_sizes=['a', 'b']: no"),
        ("(top_k=3)", "(--top-k 3)"),
        # Of Python alone, entries that are named already, and what is no argument.
        ("Pass processing_class=tokenizer.", "Pass processing_class=tokenizer."),
        ("--set tolerance=2: no", "--set tolerance=2: no"),
        ("--set 'speed=2': no", "--set 'speed=2': no"),
        ("prune.vocab_size=2: no", "prune.vocab_size=2: no"),
        ("--space top_k=3", "--space top_k=3"),
        ("a == b, ACCELERATE_USE_CPU=true", "a == b, ACCELERATE_USE_CPU=true"),
        # Calls.
        ("Count again: count_tokens(corpus, tokenizer).", "Count again: `minitron-hf plan --vocab-size`."),
        ("call make_plan(model, request, scores).", "call `minitron-hf plan`."),
        ("Plan with PrunerConfig(tolerance=0.1).", "Plan with --set tolerance=0.1."),
        ("arguments of estimate_importance: a", "arguments of estimate_importance: a"),
    ],
)
def test_settings_are_options_or_entries(python, expected):
    assert wording.worded(python) == expected


def test_options_without_a_value_are_named_alone():
    wording.begin({"portable": "--portable", "top_k": "--top-k"}, {"portable"})
    wording.takes(["portable"])
    assert wording.worded("portable=True allows, portable=False: no") == "--portable allows, --set portable=false: no"


def test_sections_of_a_recipe_are_named_where_one_alone_has_the_entry():
    wording.begin({"recipe": "--recipe"})
    wording.takes_sections(lambda: {"prune": ["vocab_size", "both"], "scores": ["both"]})
    assert wording.worded("vocab_size=3, both=4") == "prune.vocab_size=3, both=4"
    assert wording.worded("scores: both=4") == "scores: scores.both=4"


def test_advice_that_is_reworded_is_given_somewhere():
    """Every sentence is a part of a message, and every call is a function or class of the package."""
    texts, names = [], set()
    for path in Path(minitron_hf.__file__).parent.rglob("*.py"):
        if path.name != "wording.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts.append("".join(str(one.value) for one in parts if isinstance(one, ast.Constant)))
                names |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
    for advice in wording.SENTENCES:
        assert any(advice in text for text in texts), advice
    assert set(wording.CALLS) <= names
