"""Bytes against formulas and files, speed against a clock that the test moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_hf.errors import DataError, HubError, MismatchError, UnsupportedModelError
from minitron_hf.evaluation import speed as speed_module
from minitron_hf.evaluation.evaluate import evaluate_models
from pocket import pocket_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen2-tied"])
def test_cache_bytes_follow_the_formula(name: str, dtype: torch.dtype):
    model = pocket_model(name, dtype=dtype)
    result = evaluate_models({"model": model}, [[5, 6, 7, 8]], max_length=32, speed=False, show_progress=False)
    layers, kv, head_dim = (4, 5, 8) if name == "gpt2" else (5, 3, 10)
    size = torch.finfo(dtype).bits // 8
    assert result["models"]["model"]["kv_cache_bytes_per_token"] == 2 * layers * kv * head_dim * size


def test_speed_is_measured_side_by_side(monkeypatch: pytest.MonkeyPatch):
    """With a clock that only forward passes move, speeds are exact and the order of the rounds can be read."""
    clock, order = [0.0], []
    seconds = {"teacher": 0.5, "student": 0.25}
    models = {name: pocket_model("llama", dtype=torch.float32) for name in seconds}
    for name, model in models.items():
        forward = model.forward

        def ticking(*args, input_ids, _name=name, _forward=forward, logits_to_keep=0, **kwargs):
            clock[0] += seconds[_name]
            order.append((_name, input_ids.shape[1]))
            return _forward(*args, input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

        monkeypatch.setattr(model, "forward", ticking)
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: clock[0])
    result = evaluate_models(
        models,
        [[5, 6, 7]],
        max_length=16,
        prefill_length=20,
        decode_tokens=4,
        rounds=3,
        show_progress=False,
    )
    for name, entry in result["models"].items():
        for key, speed in (("prefill", 20 / seconds[name]), ("decode", 1 / seconds[name])):
            expected = {"median": speed, "quartiles": [speed] * 2, "rounds": [speed] * 3}
            assert entry[f"{key}_tokens_per_second"] == expected
    prefills = [name for name, length in order if length == 20]
    assert prefills == ["teacher", "student", "student", "teacher"] * 2
    assert [length for _, length in order].count(1) == 4 * 2 * 4
    assert result["settings"]["prefill_length"] == 20


def test_workloads_are_timed_side_by_side_with_their_bytes(monkeypatch: pytest.MonkeyPatch):
    """A clock that moves by the tokens of a pass gives every workload the same speed per token and row."""
    clock, shapes = [0.0], []
    model = pocket_model("llama", dtype=torch.float32)
    forward = model.forward

    def ticking(*args, input_ids, **kwargs):
        clock[0] += input_ids.shape[1]
        shapes.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", ticking)
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: clock[0])
    result = evaluate_models(
        {"model": model},
        [[5, 6, 7]],
        max_length=16,
        prefill_length=20,
        decode_tokens=4,
        rounds=2,
        speed_batch_sizes=[1, 3],
        speed_prompt_tokens=[8, 20],
        show_progress=False,
    )
    entry = result["models"]["model"]
    assert [(one["batch_size"], one["prompt_tokens"]) for one in entry["speeds"]] == [(1, 8), (1, 20), (3, 8), (3, 20)]
    per_token = entry["kv_cache_bytes_per_token"]
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    for one in entry["speeds"]:
        rows, length = one["batch_size"], one["prompt_tokens"]
        assert one["prefill_tokens_per_second"]["rounds"] == [rows, rows]
        assert one["decode_tokens_per_second"]["rounds"] == [rows, rows]
        assert one["kv_cache_bytes"] == per_token * rows * length
        assert one["peak_memory_bytes"] > weights + one["kv_cache_bytes"]
    assert shapes.count((3, 20)) == 3, "one round for the bytes and two for the time"
    peaks = [one["peak_memory_bytes"] for one in entry["speeds"]]
    assert peaks[1] == entry["peak_memory_bytes"] < peaks[3]
    assert peaks[3] - weights == pytest.approx(3 * (peaks[1] - weights), rel=0.05)


def test_peak_memory_is_that_of_living_tensors():
    """A model that multiplies twice: its input, both products and, with the first one freed, nothing more."""

    class Twice(torch.nn.Module):
        device, is_quantized = torch.device("cpu"), False

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64, 64))

    model, measured = Twice(), speed_module._Measured()
    with torch.no_grad(), speed_module._peak_memory(model, measured):
        first = torch.ones(64, 64) @ model.weight
        first = first @ model.weight
    assert measured.peak_bytes == (1 + 2) * 64 * 64 * 4


def test_workloads_that_cannot_be_timed_are_refused():
    model, rows = pocket_model("llama"), [[5, 6, 7]]
    for settings, words in (
        ({"speed_batch_sizes": [0]}, "speed_batch_sizes=0"),
        ({"speed_prompt_tokens": [-1]}, "speed_prompt_tokens=-1"),
    ):
        with pytest.raises(DataError, match=words):
            evaluate_models({"model": model}, rows, show_progress=False, **settings)
    with pytest.raises(MismatchError, match="exceed the context"):
        evaluate_models({"model": model}, rows, show_progress=False, speed_prompt_tokens=[10**6])


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 8])
def test_speeds_are_summarised_by_median_and_quartiles(number: int):
    """Against NumPy's linear interpolation, in any order of the rounds."""
    speeds = np.random.default_rng(number).uniform(10, 20, number)
    summary = speed_module.summarize_speeds(speeds.tolist())
    assert summary["quartiles"] == pytest.approx(np.quantile(speeds, [0.25, 0.75]).tolist())
    assert summary["median"] == pytest.approx(np.quantile(speeds, 0.5))
    assert summary["rounds"] == speeds.tolist()
    assert speed_module.summarize_speeds([]) is None


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_decoding_uses_the_cache_and_continues_the_prompt(name: str, monkeypatch: pytest.MonkeyPatch):
    """The timed steps are the greedy continuation that generate() gives."""
    model = pocket_model(name)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    _, output = speed_module._timed_prefill(model, prompt)
    fed = []
    forward = model.forward

    def spy(*args, input_ids, **kwargs):
        fed.append(input_ids.item())
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    with torch.no_grad():
        speed_module._timed_decode(model, output, 6)
    monkeypatch.undo()
    generated = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert fed == generated[0, 5:].tolist()


def test_recurrent_models_have_speeds_and_no_keys_and_values():
    model = pocket_model("mamba2", dtype=torch.float32)
    settings = {"max_length": 16, "prefill_length": 8, "decode_tokens": 3, "rounds": 2}
    entry = evaluate_models({"model": model}, [[5, 6, 7]], show_progress=False, **settings)["models"]["model"]
    assert entry["kv_cache_bytes_per_token"] is None
    assert len(entry["prefill_tokens_per_second"]["rounds"]) == len(entry["decode_tokens_per_second"]["rounds"]) == 2


def test_models_without_a_cache_are_refused_by_name():
    model = pocket_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM returns no cache .* Pass speed=False"):
        speed_module._timed_decode(model, model(torch.tensor([[5, 6]]), use_cache=False), 2)


def test_checkpoint_bytes(tmp_path: Path):
    model = pocket_model("qwen2-tied", dtype=torch.float32)
    in_memory = 4 * sum(parameter.numel() for parameter in model.parameters())  # the tied head counts once
    assert speed_module.checkpoint_bytes(model) == in_memory
    assert speed_module.checkpoint_bytes(model.half()) == in_memory // 2
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    (tmp_path / "one" / "scores.safetensors").write_bytes(b"not weights")
    one = (tmp_path / "one" / "model.safetensors").stat().st_size
    shards = [file.stat().st_size for file in (tmp_path / "many").glob("model-*.safetensors")]
    assert len(shards) > 1
    assert speed_module.checkpoint_bytes(tmp_path / "one") == one > in_memory // 2
    assert speed_module.checkpoint_bytes(str(tmp_path / "many")) == sum(shards)
    with pytest.raises(HubError, match="holds no weights"):
        speed_module.checkpoint_bytes(tmp_path)
