"""Teacher caches from a server that speaks as vLLM does, against caches from the same model's weights."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from minitron_hf.distillation import server
from minitron_hf.distillation.cache_coding import LOG_PROBS, LOG_TAIL
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.server_cache import _log_tail, cache_served_teacher
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.errors import DataError, MinitronError, MismatchError, ServerError
from pocket import VOCAB, pocket_model, pocket_tokenizer
from teacher_server import TeacherServer
from test_teacher_cache import LAYOUTS, OPTIONS, trained, write_cache
from test_trainer import float64, make_trainer, models, text_dataset, token_dataset  # noqa: F401


@pytest.fixture(scope="module")
def teacher():
    return pocket_model("llama", dtype=torch.float32)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch):
    monkeypatch.setattr(server, "WAITS", (0.0,) * 5)
    monkeypatch.delenv(server.API_KEY, raising=False)


def ask(folder, url, teacher, data, *, top_k=5, dtype="float32", args=None, **options):
    return cache_served_teacher(
        *(url, teacher.config, data, folder),
        top_k=top_k,
        dtype=dtype,
        args=DistillationConfig(str(folder), **{**OPTIONS, "bf16": False, **(args or {})}),
        processing_class=pocket_tokenizer(),
        show_progress=False,
        **{"rows_per_file": 2, **options},
    )


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cache_is_that_of_the_weights(tmp_path, teacher, layout, labels):
    data = token_dataset(labels=labels)
    args = {**LAYOUTS[layout], "bf16": False}
    expected = load_from_disk(write_cache(tmp_path / "weights", teacher, data, top_k=5, **args))
    with TeacherServer(teacher, pocket_tokenizer()) as vllm:
        folder = ask(tmp_path / "served", vllm.url, teacher, data, args=args)
    found = load_from_disk(folder)
    assert found.column_names == expected.column_names
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for name in set(found.column_names) - {LOG_PROBS, LOG_TAIL}:
            np.testing.assert_array_equal(mine[name], theirs[name])
        np.testing.assert_allclose(mine[LOG_PROBS], theirs[LOG_PROBS], atol=1e-5)
        np.testing.assert_allclose(np.exp(mine[LOG_TAIL]), np.exp(theirs[LOG_TAIL]), atol=1e-6)
    manifests = [json.loads((tmp_path / one / "teacher_cache.json").read_text()) for one in ("served", "weights")]
    assert manifests[0]["settings"]["server_model"] == "pocket"
    assert manifests[0]["num_tokens"] == manifests[1]["num_tokens"]
    assert manifests[0]["teacher"] == manifests[1]["teacher"]


@pytest.mark.usefixtures("float64")
def test_training_from_it_is_training_with_the_teacher(tmp_path):
    student, teacher = models()
    data = token_dataset()
    with TeacherServer(teacher, pocket_tokenizer(), max_logprobs=VOCAB) as vllm:
        cache = load_teacher_cache(ask(tmp_path / "cache", vllm.url, teacher, data, top_k=VOCAB))
    expected = trained(tmp_path / "online", copy.deepcopy(student), teacher, data)
    found = trained(tmp_path / "served", copy.deepcopy(student), None, cache)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-7)
    with pytest.raises(MismatchError, match="is from a server"):
        make_trainer(tmp_path / "both", student, teacher, cache, data)


def test_the_tail_is_what_remains_and_never_more_than_the_others_could_have():
    logits = 4 * torch.randn(200, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = logits.log_softmax(-1).sort(descending=True)[0]
    for k in (1, 7, 30):
        found = _log_tail(order[:, :k].numpy(), 31)
        np.testing.assert_allclose(np.exp(found), order[:, k:].exp().sum(-1), atol=1e-7)
    assert (_log_tail(order.numpy(), 31) == -np.inf).all()
    sure = np.log(np.array([[1 - 2e-12, 1e-12]]))
    assert np.exp(_log_tail(sure, 1000))[0] == pytest.approx(998e-12)


def test_requests_are_repeated_and_an_interrupted_cache_goes_on(tmp_path, teacher):
    data = token_dataset()
    with TeacherServer(teacher, pocket_tokenizer()) as vllm:
        whole = load_from_disk(ask(tmp_path / "whole", vllm.url, teacher, data, num_parallel=1))
        assert vllm.most_at_once <= 2  # an answer arrives before the server has counted it
        vllm.delay = 0.3
        ask(tmp_path / "parallel", vllm.url, teacher, data, num_parallel=6, rows_per_file=8)
        vllm.delay = 0.0
        assert vllm.most_at_once > 2
        vllm.faults += [503, "drop", 429]
        again = load_from_disk(ask(tmp_path / "faults", vllm.url, teacher, data))
        assert again.to_dict() == whole.to_dict()
        # Away for good, after the check and the first file.
        before = len(vllm.requests)
        vllm.faults += [None] * 4 + [500] * 100
        with pytest.raises(ServerError, match=r"failed 6 times: it answered 500: try again\. What was cached is kept"):
            ask(tmp_path / "parts", vllm.url, teacher, data, num_parallel=1)
        assert [path.name for path in (tmp_path / "parts").glob("*.arrow")] == ["data-00000.arrow"]
        assert len(vllm.requests) <= before + 4 + 1 + 2 * 6
        vllm.faults.clear()
        before = len(vllm.requests)
        ask(tmp_path / "parts", vllm.url, teacher, data, num_parallel=1)
        # The check, and the rows of the other files; a request of the call before may have been under way.
        assert 0 <= len(vllm.requests) - before - (3 + len(data) - 2) <= 1
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name


def test_text_and_a_key_and_a_named_model(tmp_path, teacher, monkeypatch):
    with TeacherServer(teacher, pocket_tokenizer(), key="secret", others=["second"]) as vllm:
        with pytest.raises(ServerError, match=f"wants a key.*Set {server.API_KEY}"):
            ask(tmp_path, vllm.url, teacher, text_dataset(4))
        monkeypatch.setenv(server.API_KEY, "secret")
        with pytest.raises(MismatchError, match=r"has the models pocket, second. Name one"):
            ask(tmp_path, vllm.url, teacher, text_dataset(4))
        with pytest.raises(MismatchError, match=r"no model 'pockets', but .* Did you mean 'pocket'"):
            ask(tmp_path, vllm.url, teacher, text_dataset(4), server_model="pockets")
        folder = ask(tmp_path, f"{vllm.url}/v1/", teacher, text_dataset(4), server_model="second", num_rows=2)
    cache = load_teacher_cache(folder)
    assert (cache.manifest["num_rows"], cache.manifest["settings"]["server_model"]) == (2, "second")
    assert "secret" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))


REFUSALS = {
    "away": ({}, {"url": "http://127.0.0.1:9"}, ServerError, "does not answer"),
    "no address": ({}, {"url": "localhost:8000"}, DataError, "expected an address such as"),
    "no end of an address": ({}, {"url": "http://[::1"}, DataError, "expected an address such as"),
    "no server of models": ({"program": "web"}, {}, ServerError, "not an OpenAI-compatible server"),
    "a page": ({"program": "page"}, {}, ServerError, "something else than JSON. A cache needs"),
    "TGI": ({"program": "tgi"}, {}, ServerError, "Text Generation Inference. Of a prompt"),
    "no prompts": ({"program": "openai"}, {}, ServerError, "gave no log-probabilities of the prompt"),
    "logits": ({"program": "raw logits"}, {}, ServerError, "not log-probabilities"),
    "few": ({"max_logprobs": 3}, {}, ServerError, "at most 3 .* top_k=5. Start vLLM with --max-logprobs 5"),
    "short": ({"max_model_len": 30}, {}, MismatchError, "30 tokens, .*--max-model-len 31"),
    "temperature": ({}, {"args": {"temperature": 2.0}}, MismatchError, "at temperature 1"),
    "states": ({}, {"args": {"hidden_loss": "mse"}}, MismatchError, "hidden states, which no server gives"),
    "logit distance": ({}, {"args": {"divergence": "mse"}}, MismatchError, "compares logits"),
    "top k": ({}, {"top_k": VOCAB + 1}, DataError, f"from 1 to the {VOCAB} tokens"),
    "parallel": ({}, {"num_parallel": 0}, DataError, "num_parallel=0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused_in_one_message(tmp_path, teacher, monkeypatch, name):
    monkeypatch.setattr(server, "PROBE", "the old")
    options, changes, error, message = REFUSALS[name]
    with TeacherServer(teacher, pocket_tokenizer(), **options) as vllm, pytest.raises(error, match=message):
        ask(tmp_path / "cache", **{"url": vllm.url, "teacher": teacher, "data": token_dataset(), **changes})
    assert not list(tmp_path.rglob("*.arrow"))


def test_another_vocabulary_is_refused(tmp_path, teacher):
    larger = pocket_model("llama", dtype=torch.float32, vocab_size=VOCAB + 200)
    with torch.no_grad():
        larger.get_output_embeddings().weight[VOCAB:] *= 50
    other = lambda text, **options: {"input_ids": [5 + index % 50 for index in range(len(text))]}  # noqa: E731
    for served, tokenizer, message in (
        (teacher, other, "splits text into other tokens"),
        (larger, pocket_tokenizer(), rf"gave the token \d+, and the teacher's config has {VOCAB} tokens"),
    ):
        with TeacherServer(served, tokenizer) as vllm, pytest.raises(MismatchError, match=message):
            ask(tmp_path / "cache", vllm.url, teacher, token_dataset())


def test_a_server_that_hangs_is_left(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(server, "WAITS", (0.0,))
    with TeacherServer(teacher, pocket_tokenizer()) as vllm:
        vllm.faults += ["stall", "stall"]
        with pytest.raises(ServerError, match=r"failed 2 times: no answer within 0\.2 s.*num_parallel"):
            ask(tmp_path, vllm.url, teacher, token_dataset(), timeout=0.2)
        assert issubclass(ServerError, MinitronError)


def test_a_recipe_and_the_command_line_ask_the_server(tmp_path, teacher):
    from minitron_hf.recipe.runner import run_recipe, try_recipe
    from minitron_hf.recipe.schema import Recipe
    from test_cli import minitron

    teacher.save_pretrained(tmp_path / "teacher")
    pocket_tokenizer().save_pretrained(tmp_path / "teacher")
    text_dataset(12).to_json(tmp_path / "text.jsonl")
    with TeacherServer(teacher, pocket_tokenizer()) as vllm:
        recipe = Recipe.from_dict(
            {
                "teacher": str(tmp_path / "teacher"),
                "data": {"train": str(tmp_path / "text.jsonl"), "eval": str(tmp_path / "text.jsonl")},
                "output_dir": str(tmp_path / "run"),
                "prune": {"intermediate_size": 0.5},
                "scores": {"num_rows": 4, "max_length": 16},
                "distill": {"max_steps": 1, "max_length": 32, "bf16": False},
                "teacher_cache": {"server": vllm.url, "top_k": 7},
            }
        )
        assert vllm.url not in json.dumps(recipe.teacher_cache.deciding())
        try_recipe(recipe, until="distill")
        assert not (tmp_path / "run").exists()
        run_recipe(recipe, until="distill", show_progress=False)
        given = ["--data", tmp_path / "text.jsonl", "--top-k", "7", "--set", "max_length=32", "--set", "bf16=false"]
        result = minitron("cache", tmp_path / "teacher", "--server", vllm.url, *given, "-o", tmp_path / "cache")
        assert result.returncode == 0, result.stderr
    caches = [load_teacher_cache(tmp_path / one) for one in ("run/teacher_cache/train", "run/teacher_cache/eval")]
    assert all(cache.manifest["settings"]["server_model"] == "pocket" for cache in caches)
    assert load_teacher_cache(tmp_path / "cache").manifest["settings"]["top_k"] == 7
    record = json.loads((tmp_path / "run" / "distillation.json").read_text())
    assert record["teacher_cache"][0]["server_model"] == "pocket"
    run_recipe(recipe, until="distill", show_progress=False)  # finished: the server may be gone
