"""Drafts of tables agree with the shipped ones in shape, and run; masks judge what shapes cannot tell."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import JetMoeConfig, LlamaConfig, LlavaConfig

from minitron_hf.errors import UnsupportedModelError, VerificationError
from minitron_hf.families import ArchSpec, families, spec_for
from minitron_hf.models import empty_model
from minitron_hf.pruning.prune import prune_model
from minitron_hf.survey.draft import draft_family
from minitron_hf.survey.draft_source import POCKET_DEFAULTS
from minitron_hf.survey.probe import sum_of_products
from pocket import POCKETS, pocket_config, pocket_model
from test_verification import everything

#: Where the order inside fused dimensions, which a draft can only guess, is guessed right.
RIGHT = ["llama", "qwen3", "gpt2", "gpt2-untied", "phi3", "mixtral"]
WRONG = ["gpt_neox"]
#: Families with something that stands in the modelling code alone.
READ = ["granite", "gemma", "gemma2", "cohere", "glm4", "helium", "olmo2", "phi", "stablelm"]
ROOT = Path(__file__).parent.parent


def executed(text: str) -> ArchSpec:
    names = {"__package__": "minitron_hf.families", "__name__": "minitron_hf.families.draft"}
    exec(compile(text, "draft.py", "exec"), names)
    return names["SPEC"]


@pytest.fixture(scope="module")
def drafts() -> dict[str, str]:
    return {name: draft_family(pocket_config(name)) for name in RIGHT + WRONG + READ}


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


@pytest.mark.parametrize("name", [*RIGHT, *WRONG, *READ])
def test_drafts_pass_the_linter(name: str, drafts, tmp_path):
    ruff = pytest.importorskip("ruff").find_ruff_bin()
    file = ROOT / "src" / "minitron_hf" / "families" / "drafted.py"
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [ruff, *command, "--stdin-filename", str(file), "-"],
            input=drafts[name],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stdout + drafts[name]


@pytest.mark.parametrize("name", [*RIGHT, *WRONG, *READ])
def test_drafts_propose_a_pocket_that_says_what_the_shipped_one_says(name: str, drafts):
    """Modules, norms and scales; the drafts themselves are made of the shipped pocket's config."""
    lines = re.search(r"# TODO: move this pocket to tests/pockets/(\w+)\.py.*\n((?:#     .*\n)+)", drafts[name])
    text = " ".join(line.removeprefix("#     ") for line in lines[2].splitlines())
    [proposed] = eval(f"{{{text}}}", vars(importlib.import_module("pockets.base"))).values()
    shipped = POCKETS[name]
    for field in (*POCKET_DEFAULTS, "coupled"):
        assert getattr(proposed, field) == getattr(shipped, field), field
    spec = spec_for(proposed.config)
    assert spec.sizes(proposed.config).keys() == spec_for(shipped.config).sizes(shipped.config).keys()
    spec.check(empty_model(proposed.config))
    own = importlib.import_module(f"pockets.{lines[1]}").POCKETS
    assert name in own or name.partition("-")[0] in own


@pytest.mark.parametrize("name", READ)
def test_drafts_read_scales_and_norms_in_the_modelling_code(name: str, drafts):
    draft, shipped = executed(drafts[name]), spec_for(pocket_config(name))
    for field in ("logits", "norm_offset", "layer_norms", "equal", "groups"):
        assert getattr(draft, field) == getattr(shipped, field), field
    assert draft.stream.scaled_embeddings == shipped.stream.scaled_embeddings
    assert set(draft.stream.stream_writers) >= set(shipped.stream.stream_writers)


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


def test_models_around_a_language_model_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"'llava' is a model around .*'llama'.*wrappers\.py"):
        draft_family(LlavaConfig())


def test_heads_beside_stacked_experts_are_drafted():
    """Their tensors have three dimensions; `att` is in their names, too."""
    config = JetMoeConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=24,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with contextlib.suppress(UnsupportedModelError):  # with the reason why it cannot be
        assert "TODO" in draft_family(config)


def test_a_draft_prints_no_warnings_about_special_tokens():
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4, eos_token_id=95)
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        draft_family(config)
        assert not seen
        LlamaConfig(vocab_size=48, eos_token_id=95)  # what a probe builds; warnings are on again
        assert seen
    finally:
        logging.getLogger("transformers").removeHandler(handler)
