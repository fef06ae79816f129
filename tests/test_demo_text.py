"""The demo's text and teacher: what `examples/demo` promises."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo"
TEACHER = DEMO / "teacher"


def load_script(name: str) -> ModuleType:
    """Import a script of the demo the way running it would: with its folder on the path."""
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(DEMO))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DEMO))
    return module


@pytest.fixture(scope="module")
def text() -> ModuleType:
    return load_script("text")


@pytest.fixture(scope="module")
def train_teacher() -> ModuleType:
    module = load_script("train_teacher")
    sys.modules.pop("text", None)
    return module


def squeeze(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------- text


@pytest.mark.slow
def test_splits_share_no_source_and_no_paragraph(text: ModuleType) -> None:
    sources = {
        split: {re.match(r"Help on (.+):\n\n", document)[1] for document in text.documents(split)}
        for split in text.SPLITS
    }
    everything = {split: squeeze("\n".join(text.documents(split))) for split in text.SPLITS}
    for held_out in ("validation", "calibration"):
        for other in text.SPLITS:
            if other == held_out:
                continue
            assert not sources[held_out] & sources[other]
            paragraphs = [
                squeeze(paragraph)
                for document in text.documents(held_out)
                for paragraph in document.split("\n\n")
                if len(paragraph) > 150
            ]
            assert len(paragraphs) > 50
            repeated = [paragraph for paragraph in paragraphs if paragraph in everything[other]]
            assert not repeated


@pytest.mark.slow
def test_there_is_enough_english(text: ModuleType) -> None:
    train = text.documents("train")
    assert sum(map(len, train)) > 1_500_000
    assert len(train) > 500
    assert len(text.documents("validation")) > 20
    assert sum(len(document) > 2 * text.MAX_CHARACTERS for document in train) == 0
    words = " ".join(train).lower().split()
    assert words.count("the") > 0.04 * len(words)  # about 0.06 in English prose
    assert not any(">>>" in document or "::=" in document for document in train)


@pytest.mark.slow
def test_the_command_writes_the_same_text_in_another_process(text: ModuleType, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    result = subprocess.run(
        [sys.executable, str(DEMO / "text.py"), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert text.text_digest() in result.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{split}.jsonl" for split in text.SPLITS
    )
    for split in text.SPLITS:
        lines = (tmp_path / "out" / f"{split}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line)["text"] for line in lines] == text.documents(split)


def test_split_of_is_a_fixed_function_of_the_name(text: ModuleType) -> None:
    names = [f"package.module{number}" for number in range(4000)]
    shares = {split: sum(text.split_of(name) == split for name in names) / len(names) for split in text.SPLITS}
    for split, per_cent in text.SPLITS.items():
        assert shares[split] == pytest.approx(per_cent / 100, abs=0.015)
    # Frozen: a change here would put text that the shipped teacher was trained on into the validation split.
    held_out = ["topics.with", "queue", "xml.dom", "xmlrpc.server"]
    assert [name for name in ["json", "os", *held_out, "argparse"] if text.split_of(name) == "validation"] == held_out
    assert text.split_of("argparse") == "calibration"


def test_documented_things_become_prose(text: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        '"""A module that is only here to be read by a test."""\n'
        "# A comment of one line is left out.\n"
        "import os\n"
        "# A block comment of several lines says\n"
        "# something about what comes after it.\n"
        "if os.name:\n"
        "    class Thing:\n"
        '        """What a thing is, in one sentence of English.\n\n'
        "        >>> Thing()  # a session is not prose, it is left out\n"
        "        Thing\n\n"
        "            Indented words stay indented in the text.\n"
        "\n"
        "        # Lines like these belong to the docstring,\n"
        "        # they are no block comment of their own.\n"
        '        """\n'
        "        async def do(self, first, /, second, *, third=1):\n"
        '            """Do   what things usually do, with “quotes”."""\n'
    )
    entries = text._module_entries("package.module", source)
    seen: set[str] = set()
    assert [text._entry(heading, body, seen) for heading, body in entries] == [
        "package.module\nA module that is only here to be read by a test.",
        "A block comment of several lines says\nsomething about what comes after it.",
        "package.module.Thing\nWhat a thing is, in one sentence of English.\n\n"
        "    Indented words stay indented in the text.\n\n"
        "# Lines like these belong to the docstring,\n# they are no block comment of their own.",
        'package.module.Thing.do(self, first, second, third)\nDo what things usually do, with "quotes".',
    ]
    assert [text._entry(heading, body, seen) for heading, body in entries] == [""] * 4  # each paragraph once


def test_long_sources_are_cut_between_paragraphs(text: ModuleType) -> None:
    entries = [f"Paragraph {number} " + "word " * 100 for number in range(20)]
    documents = text._cut("name", entries)
    assert len(documents) > 2
    assert all(len(document) <= text.MAX_CHARACTERS + 20 for document in documents)
    assert all(document.startswith("Help on name:\n\n") for document in documents)
    assert [part for document in documents for part in document.split("\n\n")[1:]] == entries


def test_tests_and_packages_of_others_are_left_out(text: ModuleType) -> None:
    titles = {document.split("\n")[0] for split in text.SPLITS for document in text.documents(split)}
    names = [title.removeprefix("Help on ").removesuffix(":") for title in titles]
    assert {"json.decoder", "email", "with"} < set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("."))]


def test_what_can_go_wrong_is_said(
    text: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"no split 'test'.*validation, calibration, train"):
        text.documents("test")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["text.py", str(tmp_path / "file")])
    assert text.main() == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"no module pydoc_data\.topics"):
        text._topics()


def test_a_python_without_sources_is_refused(
    text: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"hardly any text .* Use a Python that comes with its \.py sources"):
        text._all_documents.__wrapped__()


# ------------------------------------------------------------------------------------------------------------- teacher


def test_the_teacher_is_small_and_is_what_its_record_says() -> None:
    record = json.loads((TEACHER / "training.json").read_text("utf-8"))
    assert sum(path.stat().st_size for path in TEACHER.rglob("*")) < 8e6
    assert {path.name for path in TEACHER.iterdir()} == {*record["files"], "README.md", "training.json"}
    for name, recorded in record["files"].items():
        assert f"sha256:{hashlib.sha256((TEACHER / name).read_bytes()).hexdigest()}" == recorded, name
    validation = record["validation"]
    assert validation["loss_of_the_stored_float16_weights"] == pytest.approx(validation["loss"], abs=1e-4)
    card = (TEACHER / "README.md").read_text("utf-8")
    for said in (record["data"]["digest"], record["command"], f"{validation['bits_per_byte']:.3f}"):
        assert said in card


def test_the_teacher_is_a_stock_model_that_knows_the_text(text: ModuleType) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = json.loads((TEACHER / "training.json").read_text("utf-8"))
    with safe_open(TEACHER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    assert model.num_parameters() == record["num_parameters"]
    assert len(tokenizer) == model.config.vocab_size
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 1, 2)

    losses: list[float] = []
    for document in text.documents("validation")[:8]:
        ids = tokenizer(document)["input_ids"][:256]
        assert ids[0] == tokenizer.bos_token_id  # from the post-processor, so that every caller sees it
        assert 0 not in ids[1:]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-log_probabilities[position, token].item() for position, token in enumerate(ids[1:])]
    assert len(losses) > 1000
    assert sum(losses) / len(losses) < 0.6 * math.log(len(tokenizer))
    for sample in ("def f(x):\n    return x\n", "naïve café 漢字 \t end"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"], skip_special_tokens=True) == sample


# -------------------------------------------------------------------------------------------------------- its training


def test_orthogonal_keeps_singular_vectors_and_evens_out_singular_values(train_teacher: ModuleType) -> None:
    import torch

    torch.manual_seed(0)
    for shape in ((3, 8, 20), (2, 20, 8), (1, 12, 12)):
        left, values, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        values = torch.linspace(1, 0.1, values.shape[-1], dtype=torch.float64)
        found = train_teacher.orthogonal(left * values @ right)
        inner = left.mT @ found @ right.mT
        torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), atol=1e-9, rtol=0)
        assert inner.diagonal(dim1=1, dim2=2).min() > 0.6
        assert inner.diagonal(dim1=1, dim2=2).max() < 1.3


def test_an_epoch_shows_every_document_once(train_teacher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(train_teacher, "CONTEXT", 3)
    monkeypatch.setattr(train_teacher, "BATCH_SIZE", 2)
    documents = [[10 * number + offset for offset in range(4)] for number in range(1, 7)]
    order = train_teacher.BatchOrder(documents, seed=0)
    assert order.rows_per_epoch == 6
    epochs = [torch.cat([order.batch(step) for step in range(start, start + 3)]).tolist() for start in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == documents
    assert epochs[0] != epochs[1]
    assert train_teacher.BatchOrder(documents, seed=0).batch(4).tolist() == epochs[1][2:4]


def test_a_killed_training_resumes_to_the_same_weights(
    train_teacher: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlamaConfig

    texts = [f"Document {number} says that word {number * number} comes after it. " * 3 for number in range(40)]
    monkeypatch.setattr(train_teacher.text, "documents", lambda split: texts[:5] if split == "validation" else texts)
    monkeypatch.setattr(train_teacher.text, "text_digest", lambda: "sha256:pocket")
    monkeypatch.setattr(train_teacher, "VOCAB_SIZE", 300)
    monkeypatch.setattr(train_teacher, "CONTEXT", 16)
    monkeypatch.setattr(train_teacher, "BATCH_SIZE", 2)
    monkeypatch.setattr(
        train_teacher,
        "teacher_config",
        lambda tokenizer: LlamaConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
    )
    whole, _, record = train_teacher.train(80, tmp_path / "whole.pt")
    assert record["validation"]["loss"] < record["history"][0]["loss"]

    steps, step_of_muon = iter(range(60)), train_teacher.Muon.step

    def step_until_killed(self: object, closure: None = None) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        step_of_muon(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_teacher.Muon, "step", step_until_killed)
        with pytest.raises(KeyboardInterrupt):
            train_teacher.train(80, tmp_path / "killed.pt")
    resumed, _, _ = train_teacher.train(80, tmp_path / "killed.pt")
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters()):
        torch.testing.assert_close(found, expected, atol=0, rtol=0, msg=name)
