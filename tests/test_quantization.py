"""Quantised copies of checkpoints: loaded by stock Transformers, measured, refused by name."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from minitron_hf.errors import DataError, MissingDependencyError, OutputError, UnsupportedModelError
from minitron_hf.files import read_json
from minitron_hf.models import load_model
from minitron_hf.quantization import METHODS, quantize_checkpoint, require_quantizable
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.estimates import estimate_recipe
from minitron_hf.recipe.runner import run_recipe
from minitron_hf.recipe.schema import Recipe
from pocket import pocket_config, pocket_model, pocket_tokenizer, pocket_tokens
from test_cli import TEXTS, minitron

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="no torchao")
#: Inputs of all projections are multiples of 32, and of the last one of 64.
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization")
    pocket_model("llama", dtype=torch.float32, **SIZES).save_pretrained(folder / "student")
    pocket_tokenizer().save_pretrained(folder / "student")
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return folder


def rounded(weight, bits, group):
    """Symmetric rounding to 2^bits levels with a scale for every group of a row's inputs, in plain arithmetic."""
    most = 2 ** (bits - 1) - 1
    groups = weight.reshape(len(weight), -1, group or weight.shape[1])
    scale = groups.abs().amax(-1, keepdim=True) / (most if bits == 8 else most + 0.5)
    return ((groups / scale).round().clamp(-most - 1, most) * scale).reshape(weight.shape)


@needs_torchao
@pytest.mark.parametrize(("method", "bits", "group"), [("int8", 8, None), ("int4", 4, 32)])
def test_stock_transformers_loads_weights_that_are_rounded_alone(folder, tmp_path, method, bits, group):
    """Head, embeddings and norms keep their values; every projection has those of the rounding by hand."""
    quantize_checkpoint(folder / "student", tmp_path / method, method, device="cpu")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / method)
    plain = load_model(folder / "student")
    for name, module in plain.named_modules():
        own = loaded.get_submodule(name)
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert type(own.weight) is not nn.Parameter, name
            with torch.no_grad():  # whatever the class: what it computes
                found = own(torch.eye(module.in_features)).T
            step = module.weight.abs().amax() / (2 ** (bits - 1) - 1)
            torch.testing.assert_close(found, rounded(module.weight.detach(), bits, group), atol=float(step), rtol=0)
            assert len(found[0, : group or 64].unique()) <= 2**bits
        elif getattr(module, "weight", None) is not None:
            assert torch.equal(own.weight, module.weight), name
    tokens = pocket_tokens(2, 8)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / method)(tokens).logits
        assert torch.equal(loaded(tokens).logits, again)
        assert not torch.equal(again, plain(tokens).logits)
    size = {where: (where / "model.safetensors").stat().st_size for where in (folder / "student", tmp_path / method)}
    assert size[tmp_path / method] < 0.5 * size[folder / "student"]


@needs_torchao
def test_what_is_not_quantised_keeps_its_dtype_on_every_processor(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("minitron_hf.hardware._cpu_has_bf16", lambda: False)
    load_model(folder / "student", dtype=torch.bfloat16).save_pretrained(tmp_path / "student")
    pocket_tokenizer().save_pretrained(tmp_path / "student")
    quantize_checkpoint(tmp_path / "student", tmp_path / "int8", "int8", device="cpu")
    stored = load_file(tmp_path / "int8" / "model.safetensors")
    assert {stored[name].dtype for name in ("model.embed_tokens.weight", "model.norm.weight")} == {torch.bfloat16}


@needs_torchao
def test_a_folder_around_the_student_is_not_replaced(folder, tmp_path):
    with pytest.raises(OutputError, match="would be removed with all its other content"):
        quantize_checkpoint(folder / "student", folder, "int8", overwrite=True)
    assert (folder / "student" / "config.json").is_file()


@pytest.mark.slow
@needs_torchao
def test_a_recipe_measures_quantised_copies_beside_the_student(folder, tmp_path):
    recipe = {
        "teacher": str(folder / "student"),
        "data": {"train": str(folder / "text.jsonl"), "eval": str(folder / "text.jsonl")},
        "output_dir": str(tmp_path / "run"),
        "prune": {"intermediate_size": 64},
        "scores": {"num_rows": 4, "max_length": 16},
        "distill": {"max_steps": 2, "max_length": 16, "per_device_train_batch_size": 2, "eval_strategy": "no"},
        "evaluate": {"num_rows": 4, "speed": False},
        "quantize": ["int8", "int4"],
    }
    made = run_recipe(Recipe.from_dict(recipe), show_progress=False, report=lambda line: None)
    models = read_json(made / "evaluation.json")["models"]
    assert list(models)[-3:] == ["student", "student_int8", "student_int4"]
    losses = {name: models[name]["metrics"]["kl_divergence"]["value"] for name in models if name != "teacher"}
    assert losses["student_int8"] == pytest.approx(losses["student"], rel=0.2)
    assert models["student_int8"]["checkpoint_bytes"] < 0.5 * models["student"]["checkpoint_bytes"]
    assert "Student int4" in (made / "README.md").read_text()
    [estimate] = [one for one in estimate_recipe(Recipe.from_dict(recipe)).stages if one.stage == "quantize"]
    written = sum(path.stat().st_size for path in (made / "quantized").glob("*/model.safetensors"))
    assert estimate.disk == pytest.approx(written, rel=0.25)  # scales and names of tensors come on top
    lines: list[str] = []
    run_recipe(Recipe.from_dict(recipe), show_progress=False, report=lines.append)
    assert all("skipped" in line for line in lines)


@needs_torchao
def test_the_command_writes_a_copy_once(folder, tmp_path):
    done = minitron("quantize", folder / "student", "-o", tmp_path / "copy", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"Wrote {tmp_path / 'copy'} \(\d+\.\d kB\)", done.stdout)
    for arguments, words in (
        ((folder / "student", "-o", tmp_path / "copy"), "already holds files"),
        ((folder / "student", "-o", folder / "student"), "is the model's own, whose files would be overwritten"),
        ((tmp_path / "copy", "-o", tmp_path / "twice"), "is quantised already"),
        ((folder / "student", "-o", tmp_path / "other", "--method", "int9"), "There is no method 'int9'"),
    ):
        refused = minitron("quantize", *arguments)
        assert refused.returncode == 2
        assert words in refused.stderr
    assert not (tmp_path / "twice").exists()


@needs_torchao
def test_projections_that_no_group_fits_are_named(folder, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="minitron_hf"):
        quantize_checkpoint(folder / "student", tmp_path / "whole", "int4", device="cpu")
    assert not caplog.messages
    pocket_model("llama", dtype=torch.float32, **{**SIZES, "intermediate_size": 72}).save_pretrained(tmp_path / "odd")
    pocket_tokenizer().save_pretrained(tmp_path / "odd")
    with caplog.at_level("WARNING", logger="minitron_hf"):
        quantize_checkpoint(tmp_path / "odd", tmp_path / "part", "int4", device="cpu")
    [message] = caplog.messages
    assert "int4: 5 of 35 projections are not quantised" in message  # of 5 layers
    assert "no multiple of 32: model.layers.0.mlp.down_proj" in message


@needs_torchao
def test_what_cannot_be_quantised_is_refused_by_name(folder, tmp_path):
    with pytest.raises(UnsupportedModelError, match="None of the projections of this GPT2LMHeadModel"):
        require_quantizable(pocket_config("gpt2"), "int8")
    with pytest.raises(UnsupportedModelError, match="Groups of 32 divide the inputs of none"):
        require_quantizable(pocket_config("llama"), "int4")
    with pytest.raises(DataError, match="group_size=48: expected one of 128, 64, 32"):
        quantize_checkpoint(folder / "student", tmp_path / "x", "int4", group_size=48)
    with pytest.raises(DataError, match="only int4 has groups"):
        quantize_checkpoint(folder / "student", tmp_path / "x", "int8", group_size=32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(OutputError, match="already holds files"):
        quantize_checkpoint(folder / "student", tmp_path / "full")


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_package_is_named_before_the_run(folder, tmp_path, method, monkeypatch):
    monkeypatch.setattr("minitron_hf.quantization.importlib.util.find_spec", lambda _: None)
    text = str(folder / "text.jsonl")
    values = {
        "teacher": str(folder / "student"), "data": {"train": text, "eval": text}, "output_dir": str(tmp_path / "run"),
        "prune": {"intermediate_size": 0.5}, "distill": {"max_steps": 1, "max_length": 16}, "quantize": [method],
    }  # fmt: skip
    with pytest.raises(MissingDependencyError, match=rf"{method}: the package \w+ is not installed"):
        check_recipe(Recipe.from_dict(values))


def test_unknown_and_repeated_methods_are_refused():
    values = {"teacher": "t", "data": {"train": "a", "eval": "a"}, "output_dir": "o", "prune": {"hidden_size": 0.5}}
    with pytest.raises(DataError, match=r"quantize\[0\]='int5': expected one of 'int8', 'int4'"):
        Recipe.from_dict(values | {"quantize": ["int5"]})
    with pytest.raises(DataError, match="each name once"):
        Recipe.from_dict(values | {"quantize": ["int8", "int8"]})
