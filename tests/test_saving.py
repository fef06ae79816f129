"""What is saved is read by Transformers 4.57 as well; `tests/ranges.py` asks that version itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from minitron_hf import PrunerConfig, apply_plan, make_plan, prune_checkpoint, save_model
from minitron_hf.families import families
from minitron_hf.families.releases import FIRST_RELEASE, first_release
from minitron_hf.models import load_tokenizer
from minitron_hf.saving import (
    LOADING_ARGUMENTS,
    least_transformers,
    save_config,
    save_processing_class,
    with_older_keys,
)
from pocket import POCKETS, pocket_config, pocket_model, pocket_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def saved_config(config: PretrainedConfig, folder: Path) -> dict:
    save_config(config, folder)
    return json.loads((folder / "config.json").read_text())


# Models


@pytest.mark.parametrize("name", POCKETS)
def test_older_keys_change_nothing_for_this_version(name: str, tmp_path: Path):
    """Strict validation included."""
    config = pocket_config(name)
    config.save_pretrained(tmp_path)
    plain = AutoConfig.from_pretrained(tmp_path).to_dict()
    save_config(config, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == plain


def test_rotary_base_and_scaling_stand_where_version_4_looks(tmp_path: Path):
    """It would read a base of 10,000 and no scaling otherwise."""
    config = saved_config(pocket_config("llama", rope_parameters=LLAMA3), tmp_path)
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert config["rope_parameters"] == LLAMA3
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, scaling)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("phi", {"rope_theta": 10000.0, "partial_rotary_factor": 0.6, "rope_scaling": None}),
        ("gpt_neox", {"rotary_emb_base": 10000.0, "rotary_pct": 0.5, "rope_scaling": None}),
        ("gemma3_text", {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None}),
        ("modernbert-decoder", {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}),
        ("qwen3_moe", {"num_experts": 6, "num_local_experts": 6}),
        ("granitemoehybrid", {"layer_types": ["mamba", "mamba", "attention", "mamba", "attention"]}),
    ],
)
def test_keys_that_version_4_spells_otherwise(name: str, expected: dict, tmp_path: Path):
    config = saved_config(pocket_config(name), tmp_path)
    assert {key: config.get(key, "missing") for key in expected} == expected


def test_both_names_of_the_dtype(tmp_path: Path):
    save_model(pocket_model("llama", dtype=torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_configs_inside_are_completed_and_other_values_left_alone():
    inner = {"model_type": "llama", "dtype": "float16", "rope_parameters": LLAMA3}
    config = with_older_keys({"model_type": "llava", "text_config": inner, "quantization_config": {"dtype": "int8"}})
    assert config["text_config"]["rope_theta"] == 500000.0
    assert config["text_config"]["torch_dtype"] == "float16"
    assert config["quantization_config"] == {"dtype": "int8"}


def test_families_that_version_4_does_not_have_keep_their_config():
    config = pocket_config("gemma4_text").to_dict()
    assert {**with_older_keys(config), "torch_dtype": None} == {**config, "torch_dtype": None}


def test_streamed_and_saved_students_have_the_keys(tmp_path: Path):
    teacher = pocket_model("llama", dtype=torch.float32, rope_parameters=LLAMA3)
    teacher.save_pretrained(tmp_path / "teacher")
    plan = make_plan(teacher, PrunerConfig(num_hidden_layers=4, layers_to_drop=(2,)))
    prune_checkpoint(tmp_path / "teacher", tmp_path / "streamed", plan, show_progress=False)
    save_model(apply_plan(teacher, plan), tmp_path / "saved")
    for name in ("streamed", "saved"):
        assert json.loads((tmp_path / name / "config.json").read_text())["rope_theta"] == 500000.0


def test_first_releases_are_those_of_families():
    """A family that is new has none until it is measured; the card then states none."""
    assert set(FIRST_RELEASE) <= set(families())
    assert first_release("llama") == "4.57"
    assert first_release("of-tomorrow") is None


def test_the_least_version_is_stated_where_it_is_known(tmp_path: Path):
    config = saved_config(pocket_config("llama"), tmp_path)
    assert least_transformers(config) == first_release("llama")
    assert least_transformers({**config, "model_type": "of-tomorrow"}) is None
    assert least_transformers({**config, "text_config": {}}) is None
    del config["rope_theta"]
    assert least_transformers(config) is None  # version 4 would load it, and compute something else


def test_a_head_size_that_an_older_class_derives(tmp_path: Path):
    """Before version 5, a Phi-MoE holds no other head size than hidden size / heads."""
    own = saved_config(pocket_config("phimoe"), tmp_path)
    derived = {**own, "hidden_size": own["head_dim"] * own["num_attention_heads"]}
    assert least_transformers(own) == first_release("phimoe")
    assert least_transformers(derived) == first_release("phimoe", implied_head_dim=True)


# Tokenizers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tokenizer as version 4 saved it: its own class name, one line, a file of special tokens, a key of its own."""
    folder = tmp_path / "source"
    pocket_tokenizer().save_pretrained(folder)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 64, "of_its_own": 1}
    config["chat_template"] = "{{ messages }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "tokenizer.model").write_bytes(b"the same words in another form")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_unchanged_tokenizer_is_copied_byte_for_byte(source: Path, tmp_path: Path):
    tokenizer = load_tokenizer(source, local_files_only=True)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)  # which tokenizer.json would hold
    save_processing_class(tokenizer, tmp_path / "saved")
    assert files(tmp_path / "saved") == files(source)


def test_saving_where_it_was_loaded_from(source: Path):
    before = files(source)
    save_processing_class(load_tokenizer(source), source)
    assert files(source) == before


def test_a_changed_setting_changes_that_setting(source: Path, tmp_path: Path):
    tokenizer = load_tokenizer(source)
    tokenizer.pad_token = "</s>"
    save_processing_class(tokenizer, tmp_path / "saved")
    saved, original = files(tmp_path / "saved"), files(source)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads(saved.pop(name)) == {**json.loads(original.pop(name)), "pad_token": "</s>"}
    assert saved == original


def test_a_changed_chat_template_is_the_only_one(source: Path, tmp_path: Path):
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = "{{ bos_token }}"
    save_processing_class(tokenizer, tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "{{ bos_token }}"
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert "chat_template" not in config
    assert config["of_its_own"] == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == "{{ bos_token }}"


@pytest.mark.parametrize("template", [None, "{{ bos_token }}"])
def test_a_changed_chat_template_leaves_no_file_with_the_old_one(source: Path, tmp_path: Path, template: str | None):
    """Processors of Transformers 4 saved theirs in `chat_template.json`, which is read before the other places."""
    (source / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    tokenizer = load_tokenizer(source)
    save_processing_class(tokenizer, tmp_path / "same")
    assert (tmp_path / "same" / "chat_template.json").is_file()
    tokenizer.chat_template = template
    save_processing_class(tokenizer, tmp_path / "saved")
    assert not (tmp_path / "saved" / "chat_template.json").exists()


def test_an_added_token_leaves_no_file_without_it(source: Path, tmp_path: Path):
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens([AddedToken("<new>")])
    save_processing_class(tokenizer, tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.convert_tokens_to_ids("<new>") == len(tokenizer) - 1


@pytest.mark.parametrize("loaded", [False, True])
def test_what_version_5_made_is_named_as_version_4_knows_it(loaded: bool, tmp_path: Path):
    tokenizer = pocket_tokenizer(extra_special_tokens=["<extra>"])
    if loaded:
        tokenizer.save_pretrained(tmp_path / "source")
        tokenizer = load_tokenizer(tmp_path / "source", local_files_only=True)
    save_model(pocket_model("llama", dtype=torch.float32), tmp_path / "saved", tokenizer)
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<extra>"]
    assert not {"extra_special_tokens", *LOADING_ARGUMENTS} & config.keys()
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "Once <extra> upon."
    assert (again(text).input_ids, again.special_tokens_map) == (
        tokenizer(text).input_ids,
        tokenizer.special_tokens_map,
    )
    assert again.all_special_tokens == tokenizer.all_special_tokens
