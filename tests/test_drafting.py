"""Drafts of tables agree with the shipped ones in shape, and run; masks judge what shapes cannot tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minitron_hf.errors import UnsupportedModelError, VerificationError
from minitron_hf.families import ArchSpec, families, spec_for
from minitron_hf.pruning.prune import prune_model
from minitron_hf.survey.draft import draft_family
from minitron_hf.survey.probe import sum_of_products
from pocket import pocket_config, pocket_model
from test_verification import everything

#: Where the order inside fused dimensions, which a draft can only guess, is guessed right.
RIGHT = ["llama", "qwen3", "gpt2", "gpt2-untied", "phi3", "mixtral"]
WRONG = ["gpt_neox"]


def executed(text: str) -> ArchSpec:
    names = {"__package__": "minitron_hf.families", "__name__": "minitron_hf.families.draft"}
    exec(compile(text, "draft.py", "exec"), names)
    return names["SPEC"]


@pytest.fixture(scope="module")
def drafts() -> dict[str, str]:
    return {name: draft_family(pocket_config(name)) for name in RIGHT + WRONG}


@pytest.mark.parametrize("name", RIGHT + WRONG)
def test_drafts_agree_with_the_tables_in_shape(name: str, drafts):
    """Up to the order of what is concatenated or nested: the same sizes at three different choices of all of them."""
    draft, shipped = executed(drafts[name]), spec_for(pocket_config(name))
    assert draft.axis.keys() == shipped.axis.keys()
    for axis in shipped.axes:
        assert draft.axis[axis.name].fields == axis.fields or axis.name in ("hidden", "head_dim"), axis.name
        assert (draft.axis[axis.name].prunable, draft.axis[axis.name].within) == (axis.prunable, axis.within)
    model = pocket_model(name)
    draft.check(model)
    patterns = {draft.locate(path)[0] for path, _ in model.named_parameters(remove_duplicate=False)}
    for factor in (1, 7, 11):
        sizes = {axis.name: factor * (index + 2) ** 2 + index for index, axis in enumerate(shipped.axes)}
        sizes["hidden"] = sizes["heads"] * sizes["head_dim"] if shipped.equal else sizes["hidden"]
        for pattern in patterns:
            assert draft.shape(pattern, sizes) == shipped.shape(pattern, sizes), pattern
    for fact in ("layers_path", "hook_points", "groups", "equal", "multiples", "layer_lists", "least"):
        assert getattr(draft, fact) == getattr(shipped, fact), fact


@pytest.mark.parametrize("name", RIGHT + WRONG)
def test_the_masks_judge_drafts(name: str, drafts, monkeypatch):
    draft = executed(drafts[name])
    monkeypatch.setitem(families(), draft.model_type, draft)
    teacher = pocket_model(name, dtype=torch.float32)
    if name in RIGHT:
        assert prune_model(teacher, everything(name), metric="random", verify=True)
    else:
        with pytest.raises(VerificationError):
            prune_model(teacher, everything(name), metric="random", verify=True)
        fused = "+".join(["heads*head_dim"] * 3)
        corrected = {key: text.replace(fused, "heads*3*head_dim") for key, text in draft.layer.items()}
        monkeypatch.setitem(families(), draft.model_type, replace(draft, layer=corrected))
        assert prune_model(teacher, everything(name), metric="random", verify=True)


def test_drafts_say_what_shapes_cannot_tell(drafts):
    assert "# TODO: which of max_window_layers count, list or place layers." in drafts["qwen3"]
    assert "# TODO: the order of the parts" in drafts["phi3"]
    assert "is a guess" in drafts["gpt_neox"]
    assert 'implied="4*hidden"' in drafts["gpt2-untied"]
    assert all(len(line) < 120 for text in drafts.values() for line in text.splitlines() if line.startswith("#"))


def test_sums_of_products():
    assert sum_of_products(3 * 8 + 2 * 5, {"a": 8, "b": 5}, {"a": 3, "b": 2}) == "a+a+a+b+b"
    assert sum_of_products(8 * 8, {"a": 8}, {"a": 16}) is None  # a square grows otherwise


def test_what_cannot_be_built_is_refused():
    config = pocket_config("llama")
    config.hidden_act = "nothing"
    with pytest.raises(UnsupportedModelError, match="cannot build"):
        draft_family(config)
