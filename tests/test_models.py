"""Loading, counting and fingerprinting models."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    T5Config,
    tokenization_utils_base,
)

from minitron_hf import hardware, models, weights
from minitron_hf.compat import commit_hash
from minitron_hf.errors import DataError, HubError, UnsupportedModelError
from minitron_hf.models import load_config, load_tokenizer
from minitron_hf.pruning.stored_checkpoint import open_checkpoint
from pocket import pocket_tokenizer


def pocket_config(**changes) -> LlamaConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": 101,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **changes})


def pocket_model(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(pocket_config(**changes)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pocket_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Loading


def test_load_model_returns_the_saved_weights_in_evaluation_mode(saved: Path):
    model = models.load_model(saved)
    assert not model.training
    expected = pocket_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert models.load_model(str(saved), dtype=torch.float64).dtype == torch.float64


def test_load_model_keeps_the_dtype_of_the_checkpoint(tmp_path: Path):
    pocket_model().half().save_pretrained(tmp_path)
    assert models.load_model(tmp_path).dtype == torch.float16
    assert models.load_model(tmp_path, dtype="float32").dtype == torch.float32


def test_objects_pass_through():
    model = pocket_model()
    assert models.load_model(model) is model
    assert models.load_config(model.config) is model.config


@pytest.mark.parametrize("load", [models.load_model, models.load_config, models.load_tokenizer])
@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", ""])
def test_missing_folder(load, name: str):
    with pytest.raises(HubError, match="does not exist"):
        load(name)


def test_missing_folder_given_as_a_path(tmp_path: Path):
    with pytest.raises(HubError, match="does not exist"):
        models.load_model(tmp_path / "gone")


def test_a_file_instead_of_a_folder(saved: Path):
    with pytest.raises(HubError, match="is a file"):
        models.load_model(saved / "config.json")


def test_not_a_hub_id():
    with pytest.raises(HubError, match="neither a folder nor a Hub id"):
        models.load_config("what is this?")


def test_folder_without_config(tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        models.load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "frobnicate"}, "does not know its model_type"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"hidden_size": 30}, "does not know its model_type"),
    ],
)
def test_unusable_config(tmp_path: Path, config: dict, message: str):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        models.load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_config_that_is_not_json(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="not a valid JSON"):
        models.load_config(tmp_path)


def test_checkpoint_that_lacks_a_parameter_is_refused(saved: Path):
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 .*layers\.1\.mlp\.up_proj"):
        models.load_model(saved)


def test_checkpoint_that_does_not_fit_its_config_is_refused(saved: Path):
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:20].clone()
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight is \(20,\), expected \(32,\)"):
        models.load_model(saved)


def test_layers_beyond_the_config_are_refused(saved: Path):
    """Transformers would load the first of them, and warn."""
    values = json.loads((saved / "config.json").read_text())
    values["num_hidden_layers"] -= 1
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        UnsupportedModelError, match=r"holds more layers than its config.json says: model\.layers\.1\."
    ):
        models.load_model(saved)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.\S+ is not part of the model"):
        open_checkpoint(saved)
    stored = load_file(saved / "model.safetensors")  # as a base model would name them
    renamed = {key.removeprefix("model."): value.clone() for key, value in stored.items()}
    save_file(renamed, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"holds more layers .*layers\.1\."):
        models.load_model(saved)


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_layers_that_predict_further_tokens_may_lie_beside_the_model(saved: Path, field: str):
    weights = load_file(saved / "model.safetensors")
    further = {"model.layers.2.mlp.up_proj.weight": torch.zeros(3), "mtp.layers.0.weight": torch.zeros(3)}
    save_file({**weights, **further}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="holds more layers"):
        models.load_model(saved)
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, field: 1}))
    assert models.load_model(saved).config.num_hidden_layers == 2


def test_missing_and_damaged_weights(saved: Path):
    (saved / "model.safetensors").write_bytes(b"12345678901")
    with pytest.raises(UnsupportedModelError, match=r"deserializ"):
        models.load_model(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=r"no file named model\.safetensors"):
        models.load_model(saved)


def test_no_tokenizer(saved: Path):
    with pytest.raises(DataError, match="there are no tokenizer files"):
        models.load_tokenizer(saved)


def test_offline_without_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        models.load_config("nobody/nothing", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("status", "error_code", "message"),
    [
        (401, "GatedRepo", "Accept its terms at"),
        (401, "RepoNotFound", "no such model or it is private"),
        (404, "RevisionNotFound", "no such branch, tag or commit"),
        (403, None, "refused the token"),
        (418, None, "cannot be reached or does not answer"),  # 5xx would be retried, for 20 seconds
    ],
)
def test_refusals_of_the_hub(monkeypatch, tmp_path: Path, status: int, error_code: str | None, message: str):
    """A local server answers every request with one status, as the Hub does."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            if error_code:
                self.send_header("X-Error-Code", error_code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    try:
        with pytest.raises(HubError, match=message) as caught:
            models.load_config("someone/something", cache_dir=tmp_path, revision="v1", token=False)
    finally:
        server.shutdown()
        server.server_close()  # Transformers asks the first test's server again
    assert "someone/something" in str(caught.value)


# Counting

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
NEMO_12B = {
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 131072,
}


@pytest.mark.parametrize(
    ("config", "total", "without_embeddings"),
    [
        pytest.param(LlamaConfig(**LLAMA_8B), 8_030_261_248, 6_979_588_096, id="Llama-3.1-8B"),
        pytest.param(
            LlamaConfig(**{**LLAMA_8B, "hidden_size": 3072, "intermediate_size": 9216}),
            4_512_746_496,
            3_724_741_632,
            id="Llama-3.1-Minitron-4B-Width",
        ),
        pytest.param(
            LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": 16}),
            4_540_469_248,
            3_489_796_096,
            id="Llama-3.1-Minitron-4B-Depth",
        ),
        pytest.param(MistralConfig(**NEMO_12B), 12_247_782_400, 10_905_605_120, id="Mistral-NeMo-12B"),
        pytest.param(
            MistralConfig(**{**NEMO_12B, "hidden_size": 4096, "intermediate_size": 11520}),
            8_414_105_600,
            7_340_363_776,
            id="MN-Minitron-8B",
        ),
    ],
)
def test_published_parameter_counts(config, total: int, without_embeddings: int):
    """Sreenivas et al. 2024, table 1, and the published checkpoints."""
    assert models.count_parameters(config) == total
    assert models.count_parameters(config, embeddings=False) == without_embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_count_of_config_model_and_formula_agree(tied: bool):
    config = pocket_config(tie_word_embeddings=tied)
    heads, kv, dim, hidden, ffn, layers, vocab = 4, 2, 6, 32, 48, 2, 101
    block = 2 * heads * dim * hidden + 2 * kv * dim * hidden + 3 * ffn * hidden + 2 * hidden
    inner = layers * block + hidden
    model = AutoModelForCausalLM.from_config(config)
    for counted in (config, model):
        assert models.count_parameters(counted, embeddings=False) == inner
        assert models.count_parameters(counted) == inner + vocab * hidden * (1 if tied else 2)


def test_learned_positions_are_not_embeddings_of_tokens():
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=16)
    difference = models.count_parameters(config) - models.count_parameters(config, embeddings=False)
    assert difference == 50 * 8


def test_quantised_models_are_counted_by_their_config():
    model = pocket_model()
    expected = models.count_parameters(model)
    packed = model.model.layers[0].mlp.up_proj
    packed.weight = torch.nn.Parameter(torch.zeros(10, dtype=torch.uint8), requires_grad=False)
    model.is_quantized = True
    assert models.count_parameters(model) == expected


def test_empty_model_holds_no_memory_and_leaves_the_config_alone():
    config = pocket_config()
    before = config.to_dict()
    model = models.empty_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert config.to_dict() == before


def test_empty_model_of_another_kind():
    with pytest.raises(UnsupportedModelError, match="no causal language model for model_type 't5'"):
        models.count_parameters(T5Config())


# Fingerprints


def test_model_digest_is_of_the_weights_alone():
    assert weights.model_digest(pocket_model()) == weights.model_digest(pocket_model())
    assert weights.model_digest(pocket_model()) != weights.model_digest(pocket_model(seed=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_digest_survives_a_wider_dtype(dtype: torch.dtype):
    model = pocket_model().to(dtype)
    before = weights.model_digest(model)
    assert weights.model_digest(model.float()) == before
    assert weights.model_digest(pocket_model()) != before  # the rounding itself is another model


def test_model_digest_notices_every_tensor():
    model = pocket_model()
    before = weights.model_digest(model)
    for _, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.normal_()
        assert weights.model_digest(model) != before
        with torch.no_grad():
            parameter.copy_(kept)
    assert weights.model_digest(model) == before


def test_model_digest_reads_more_than_one_column():
    """A sample with a stride that is a multiple of the width would not see a change of all other columns."""
    model = pocket_model(hidden_size=64, intermediate_size=1024)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.numel() // weights.DIGEST_SAMPLES == weight.shape[1]
    before = weights.model_digest(model)
    with torch.no_grad():
        weight[:, 1:].normal_()
    assert weights.model_digest(model) != before


def test_model_digest_is_taken_in_float32():
    model = pocket_model().double()
    before = weights.model_digest(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + 1e-12)
    assert weights.model_digest(model) == before == weights.model_digest(model.float())


def test_model_digest_survives_saving(tmp_path: Path):
    model = pocket_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert weights.model_digest(models.load_model(tmp_path)) == weights.model_digest(model)


def test_model_digest_needs_values():
    with pytest.raises(UnsupportedModelError, match="has no values"):
        weights.model_digest(models.empty_model(pocket_config()))


def test_architecture_digest_survives_saving_and_bookkeeping(tmp_path: Path):
    config = pocket_config()
    before = models.architecture_digest(config)
    pocket_model().half().save_pretrained(tmp_path)
    assert models.architecture_digest(models.load_config(tmp_path)) == before
    config.use_cache = False
    config.pad_token_id = 3
    assert models.architecture_digest(config) == before


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"head_dim": 8}, {"num_hidden_layers": 3}, {"rms_norm_eps": 1e-3}]
)
def test_architecture_digest_tells_networks_apart(change: dict):
    assert models.architecture_digest(pocket_config(**change)) != models.architecture_digest(pocket_config())


def test_architecture_digest_tells_families_apart():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 101,
    }
    assert models.architecture_digest(LlamaConfig(**sizes)) != models.architecture_digest(MistralConfig(**sizes))


# dtype


@pytest.mark.skipif("MINITRON_TEST_BF16" in os.environ, reason="the probe that this tests is replaced")
@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "bf16"])
def test_what_is_fast_on_a_cpu_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, feature: str):
    found: dict[str, bool] = {"avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert not hardware.is_fast(torch.bfloat16, "cpu")
    found[feature] = True
    assert hardware.is_fast(torch.bfloat16, "cpu")
    assert not hardware.is_fast(torch.float16, "cpu")
    assert hardware.is_fast(torch.float32, "cpu")


def test_what_is_fast_elsewhere():
    assert not hardware.is_fast(torch.bfloat16, "meta")
    assert hardware.is_fast(torch.float16, "cuda")


def test_the_commit_of_a_config_from_the_hub_is_known(tmp_path):
    """The snapshot in the cache bears its name; `config.json` does not."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--lab--tiny"
    pocket_model().config.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in (None, commit):
        config = load_config("lab/tiny", revision=revision, cache_dir=tmp_path, local_files_only=True)
        assert commit_hash(config) == commit
        assert commit not in config.to_json_string(use_diff=False)
    assert commit_hash(load_config(repository / "snapshots" / commit)) is None


def test_names_of_dtypes_and_devices_are_read_by_hardware_alone():
    """`hardware.as_dtype` and `as_device` refuse bad names; `getattr(torch, name)` and `torch.device(name)` do not."""
    package = Path(models.__file__).parent
    found = [
        f"{path.relative_to(package)}: {call[0]}"
        for path in package.rglob("*.py")
        if path.name not in ("hardware.py", "compat.py")
        for call in re.finditer(r"getattr\(torch, (?!\")\w+|torch\.device\(str\b", path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_documents_longer_than_the_context_bring_no_warning(tmp_path, monkeypatch):
    tokenizer = pocket_tokenizer()
    tokenizer.model_max_length = 4
    tokenizer.save_pretrained(tmp_path)
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda *args: said.append(args))
    loaded = load_tokenizer(tmp_path)
    assert len(loaded("the old x of a is d the old x of a is d")["input_ids"]) > loaded.model_max_length == 4
    assert not said
