"""Teacher caches of drawn tokens, and packed ones: laws of the loss, bits against a naive reference, sizes."""

from __future__ import annotations

import copy
import json
import math
import random

import numpy as np
import pyarrow as pa
import pytest
import torch

from minitron_hf.distillation import cache_writer
from minitron_hf.distillation.cache_coding import (
    COUNTS,
    LOG_PROBS,
    LOG_TAIL,
    SIGNAL_COLUMNS,
    TOKENS,
    Coding,
    bits_for,
    bytes_per_position,
    decode,
    pack,
    quantise,
    restore,
    unpack,
)
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.errors import MismatchError
from minitron_hf.losses.fused import distillation_loss
from minitron_hf.losses.heads import OutputHead, head_logits
from minitron_hf.losses.signals import DenseSignal, SampledSignal, sampled_signal, top_k_signal
from pocket import VOCAB
from test_teacher_cache import OPTIONS, write_cache
from test_trainer import float64, make_trainer, models, token_dataset  # noqa: F401

SIZE, WIDTH, POSITIONS = 29, 7, 4


def problem(copies: int, **head):
    """Student and teacher states of some positions, each repeated, and both heads."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    states, states_t, labels = normal(POSITIONS, WIDTH), normal(POSITIONS, WIDTH), torch.arange(POSITIONS)
    student = OutputHead(normal(SIZE, WIDTH), **head)
    teacher = DenseSignal(states_t.repeat(copies, 1), OutputHead(1.5 * normal(SIZE, WIDTH)))
    return states.repeat(copies, 1).requires_grad_(), student, teacher, labels.repeat(copies)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("num_draws", "head"), [(1, {}), (5, {"softcap": 4.0, "scale": 0.8}), (12, {})])
def test_the_mean_gradient_of_drawn_tokens_is_that_of_the_whole_distribution(num_draws, head, temperature):
    copies = 4000
    hidden, student, teacher, labels = problem(copies, **head)
    options = {"temperature": temperature, "ce_weight": 0.3}
    dense = distillation_loss(hidden, student, teacher, labels, **options)
    (expected,) = torch.autograd.grad(dense.total, hidden)
    offsets = torch.rand(len(teacher), generator=torch.Generator().manual_seed(num_draws), dtype=torch.float64)
    signal = sampled_signal(teacher, num_draws, offsets, temperature=temperature)
    drawn = distillation_loss(hidden, student, signal, labels, **options)
    (found,) = torch.autograd.grad(drawn.total, hidden)

    def is_mean(values, exact, spread):
        """Whether the mean over the copies is the exact value, within five standard errors."""
        values, exact, spread = (x.detach().view(copies, POSITIONS, -1) for x in (values, exact, spread))
        error = spread.std(0) / math.sqrt(copies)
        assert error.max() > 0
        return bool(((values.mean(0) - exact[0]).abs() <= 5 * error + 1e-9).all())

    assert is_mean(found, expected, found)
    assert is_mean(drawn.kl, dense.kl, drawn.kl)
    for name in ("agreement", "ce", "entropy", "accuracy"):
        torch.testing.assert_close(getattr(drawn, name), getattr(dense, name))
    # The same test sees the bias of as many of the most likely tokens.
    likely = top_k_signal(teacher, num_draws, temperature=temperature)
    likely = SampledSignal(likely.tokens, likely.log_probs.softmax(-1), signal.entropy, SIZE)
    (biased,) = torch.autograd.grad(distillation_loss(hidden, student, likely, labels, **options).total, hidden)
    assert not is_mean(biased, expected, found)


def test_the_draws_are_those_of_a_naive_search():
    _, _, teacher, _ = problem(3)
    offsets = torch.rand(len(teacher), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sampled_signal(teacher, 9, offsets, chunk_size=5)
    p = torch.softmax(head_logits(teacher.hidden, teacher.head), -1)
    torch.testing.assert_close(found.entropy, -(p * p.log()).sum(-1))
    for row, u in enumerate(offsets.tolist()):
        counts = [0] * SIZE
        for j in range(9):
            total, token = 0.0, -1
            while total <= (u + j) / 9:
                token += 1
                total += p[row, token].item()
            counts[token] += 1
        dense = torch.zeros(SIZE, dtype=torch.float64).scatter_add_(0, found.tokens[row], found.weights[row])
        assert (9 * dense).round().tolist() == counts
        assert found.tokens[row, 0] == p[row].argmax()
        drawn = found.tokens[row, 1:][found.weights[row, 1:] > 0].tolist()
        assert drawn == sorted(set(drawn) - {int(found.tokens[row, 0])})
        assert all(math.floor(9 * q) <= count <= math.ceil(9 * q) for q, count in zip(p[row].tolist(), counts))


@pytest.mark.parametrize("bits", [1, 5, 8, 12, 18, 31])
def test_numbers_are_packed_as_a_string_of_bits_is(bits):
    chosen = random.Random(bits)
    for count in (0, 1, 2, 7, 64, 101):
        values = [chosen.choice([0, (1 << bits) - 1, chosen.randrange(1 << bits)]) for _ in range(count)]
        text = "".join(f"{value:0{bits}b}" for value in values)
        text += "0" * (-len(text) % 8)
        packed = pack(np.array(values, dtype=np.int64), bits)
        assert packed.tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
        assert unpack(packed, bits, count).tolist() == values


@pytest.mark.parametrize(("count", "bits"), [(1, 1), (2, 1), (3, 2), (97, 7), (128, 7), (129, 8), (150_000, 18)])
def test_the_bits_of_an_id_are_the_logarithm_rounded_up(count, bits):
    assert bits_for(count) == bits


def test_fixed_point_numbers_are_half_a_step_away_at_most():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 32
    assert (restore(quantise(values, 32.0, 12), 32.0, 12) - values).abs().max() <= 16 / 4095 + 1e-6
    beyond = torch.tensor([40.0, torch.inf, -1.0])
    assert restore(quantise(beyond, 32.0, 12), 32.0, 12).tolist() == [32.0, 32.0, 0.0]


@pytest.mark.parametrize("vocab_size", [29, 150_000])
def test_rows_are_decoded_to_what_was_coded(vocab_size):
    """Also a row in which no token counts, and tokens with the highest ids."""
    tokens = torch.tensor([[5, 3, vocab_size - 1], [0, 2, 0], [vocab_size - 1, 7, 8]])
    weights = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    signal = SampledSignal(tokens, weights, torch.tensor([0.0, 1.5, math.log(vocab_size)]), vocab_size)
    rows = Coding(vocab_size, None, 4, "float16").columns(signal, [2, 0, 1])
    assert len(rows) == 3
    found, shares, entropy, drawn = decode(rows, tuple(rows[0]))
    assert drawn
    assert torch.equal(found, torch.tensor([[5, 3, vocab_size - 1], [0, 2, 0], [vocab_size - 1, 7, 8]]))
    torch.testing.assert_close(shares, weights)
    assert (entropy - signal.entropy).abs().max() <= math.log(vocab_size) / 131_070 + 1e-6
    none, *_ = decode(rows[1:2], tuple(rows[1]))
    assert len(none) == 0
    fixed = Coding(vocab_size, 3, None, "fixed12")
    likely = top_k_signal(DenseSignal(torch.randn(3, 5), OutputHead(torch.randn(29, 5))), 3)
    rows = fixed.columns(likely, [2, 0, 1])
    found, log_probs, log_tail, drawn = decode(rows, tuple(rows[0]))
    assert not drawn
    assert torch.equal(found, likely.tokens)
    torch.testing.assert_close(log_probs, likely.log_probs, rtol=0, atol=0.004)
    torch.testing.assert_close(log_tail, likely.log_tail, rtol=0, atol=0.004)
    assert len(decode(rows[1:2], tuple(rows[1]))[0]) == 0


def column_bytes(folder) -> tuple[int, int, int, float]:
    """Bytes of the teacher's columns, positions, rows, and mean number of entries of a position."""
    size = positions = rows = entries = 0
    settings = json.loads((folder / "teacher_cache.json").read_text())["settings"]
    for path in folder.glob("*.arrow"):
        table = pa.ipc.open_stream(path.read_bytes()).read_all()
        rows += len(table)
        for name in set(table.column_names) & set(SIGNAL_COLUMNS) - {"teacher_coding"}:
            flat = table[name].combine_chunks().flatten()
            size += len(flat) * flat.type.bit_width // 8
        positions += len(table[Coding.of(settings).positions].combine_chunks().flatten())
        for row in table.select([TOKENS, *([COUNTS] if COUNTS in table.column_names else [])]).to_pylist():
            entries += len(row[TOKENS]) * 8 // bits_for(VOCAB)
    return size, positions, rows, entries / positions


@pytest.mark.parametrize(
    "stored",
    [{"top_k": 9}, {"top_k": 9, "dtype": "float32"}, {"top_k": 9, "dtype": "fixed12"}, {"num_draws": 6}],
    ids=str,
)
def test_the_files_have_the_bytes_of_the_formula(tmp_path, stored):
    _, teacher = models(dtype=torch.float32)
    stored = {"top_k": None, "dtype": "float16", **stored}
    folder = write_cache(tmp_path, teacher, token_dataset(), **stored)
    size, positions, rows, entries = column_bytes(folder)
    formula = bytes_per_position(VOCAB, **stored, **({"entries": entries} if "num_draws" in stored else {}))
    packed_columns = 3 if "num_draws" in stored else 2 if stored["dtype"] == "fixed12" else 0
    # A row's columns are filled up to whole bytes, and the entries were counted from bytes.
    assert abs(size - positions * formula) <= 2 * packed_columns * rows
    if "num_draws" in stored:
        assert size <= positions * bytes_per_position(VOCAB, num_draws=6)


def test_fifteen_drawn_tokens_of_a_large_vocabulary_take_fifty_bytes():
    assert bytes_per_position(150_000, num_draws=50, entries=15) == pytest.approx((16 + 6 + 15 * (18 + 6)) / 8)
    assert bytes_per_position(150_000, num_draws=50, entries=15) < 50
    assert bytes_per_position(150_000, top_k=64, dtype="float16") == 64 * 6 + 2


@pytest.mark.usefixtures("float64")
def test_many_draws_train_as_the_teacher_does(tmp_path):
    """With so many draws nothing is left to chance, so the cached student follows the other one."""
    student, teacher = models()
    data = token_dataset()
    cache = load_teacher_cache(
        write_cache(tmp_path / "c", teacher, data, top_k=None, num_draws=20_000, dtype="float32")
    )
    options = {"max_steps": 3, "learning_rate": 1e-3}
    online = make_trainer(tmp_path / "0", copy.deepcopy(student), teacher, data, data, **options)
    cached = make_trainer(tmp_path / "1", copy.deepcopy(student), None, cache, cache, **options)
    for trainer in (online, cached):
        trainer.train()
    found, expected = cached.evaluate(), online.evaluate()
    for name in ("eval_loss", "eval_kl", "eval_agreement", "eval_ce"):
        assert found[name] == pytest.approx(expected[name], rel=2e-3), name


@pytest.mark.usefixtures("float64")
def test_packed_log_probabilities_come_close(tmp_path):
    student, teacher = models()
    data = token_dataset()
    cache = load_teacher_cache(write_cache(tmp_path / "c", teacher, data, dtype="fixed12"))
    exact = make_trainer(tmp_path / "0", copy.deepcopy(student), teacher, data, data).evaluate()["eval_kl"]
    found = make_trainer(tmp_path / "1", copy.deepcopy(student), None, cache, cache).evaluate()["eval_kl"]
    assert found == pytest.approx(exact, rel=5e-3)


@pytest.mark.usefixtures("float64")
def test_draws_depend_on_the_seed_and_the_row_alone(tmp_path):
    _, teacher = models()
    data = token_dataset()
    options = {"top_k": None, "num_draws": 6}
    write_cache(tmp_path / "a", teacher, data, **options)
    first = load_teacher_cache(tmp_path / "a").dataset

    def columns(rows):
        return [[row[name].tolist() for name in (TOKENS, COUNTS)] for row in rows]

    for name, change, same in (
        ("batches", {"per_device_eval_batch_size": 1}, True),
        ("files", {"rows_per_file": 3}, True),
        ("seed", {"seed": 43}, False),
    ):
        other = load_teacher_cache(write_cache(tmp_path / name, teacher, data, **options, **change)).dataset
        assert (columns(other) == columns(first)) == same, name
    repeated = cache_writer._offsets(42, 7, 100)
    assert torch.equal(repeated, cache_writer._offsets(42, 7, 100))
    assert not torch.equal(repeated, cache_writer._offsets(42, 8, 100))
    assert 0 <= repeated.min() < 0.1 < 0.9 < repeated.max() < 1


def test_a_missing_file_is_written_again_with_the_same_bytes(tmp_path):
    _, teacher = models(dtype=torch.float32)
    data = token_dataset()
    folder = write_cache(tmp_path, teacher, data, top_k=None, num_draws=6)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for name in ("data-00001.arrow", "teacher_cache.json"):
        (folder / name).unlink()
    write_cache(tmp_path, teacher, data, top_k=None, num_draws=6)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    for change, message in (
        ({"num_draws": 7}, "num_draws=6, this run has 7"),
        ({"num_draws": None, "top_k": 6}, "top_k=None, this run has 6"),
        ({"num_draws": 6, "seed": 1}, "seed=42, this run has 1"),
    ):
        with pytest.raises(MismatchError, match=message):
            write_cache(tmp_path, teacher, data, **{"top_k": None, **change})


def test_a_cache_of_the_first_format_is_read_and_resumed(tmp_path):
    """It has no `num_draws`, and its most likely tokens are stored as they still are."""
    student, teacher = models(dtype=torch.float32)
    data = token_dataset()
    kept = load_teacher_cache(write_cache(tmp_path / "kept", teacher, data, top_k=8))
    folder = write_cache(tmp_path / "cache", teacher, data, top_k=8)
    for path in sorted(folder.glob("*.arrow")):
        table = pa.ipc.open_stream(path.read_bytes()).read_all()
        header = json.loads(table.schema.metadata[b"minitron_hf"])
        del header["num_draws"]
        old = table.schema.with_metadata({b"minitron_hf": json.dumps({**header, "format": 1})})
        with pa.ipc.new_stream(str(path), old) as writer:
            writer.write_table(table.cast(old))
    (folder / "teacher_cache.json").unlink()
    write_cache(folder, teacher, data, top_k=8)  # the old files are taken
    manifest = json.loads((folder / "teacher_cache.json").read_text())
    del manifest["settings"]["num_draws"]
    (folder / "teacher_cache.json").write_text(json.dumps({**manifest, "format": 1}))
    found = load_teacher_cache(folder)
    assert found.manifest["settings"] == kept.manifest["settings"]
    for name in (TOKENS, LOG_PROBS, LOG_TAIL):
        assert [row.tolist() for row in found.dataset[name]] == [row.tolist() for row in kept.dataset[name]]
    make_trainer(tmp_path / "run", student, None, found, max_steps=1).train()


def test_what_drawn_tokens_cannot_do_is_refused_by_name(tmp_path):
    student, teacher = models(dtype=torch.float32)
    data = token_dataset()
    for wrong, message in (
        ({"num_draws": 0, "top_k": None}, "num_draws=0: expected at least 1"),
        ({"num_draws": 4, "top_k": 4}, "top_k=4 and num_draws=4"),
        ({"num_draws": 4, "top_k": None, "dtype": "fixed12"}, "Leave out dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            write_cache(tmp_path / "cache", teacher, data, **wrong)
    with pytest.raises(MismatchError, match="divergence='jsd' with a cache of num_draws=4"):
        write_cache(tmp_path / "cache", teacher, data, num_draws=4, top_k=None, divergence="jsd")
    cache = load_teacher_cache(write_cache(tmp_path / "cache", teacher, data, num_draws=4, top_k=None))
    with pytest.raises(MismatchError, match="divergence='tv' with a cache of num_draws=4"):
        make_trainer(tmp_path / "run", student, None, cache, divergence="tv")
    hidden, head, dense, labels = problem(1)
    signal = sampled_signal(dense, 4, torch.zeros(len(dense), dtype=torch.float64))
    with pytest.raises(MismatchError, match="divergence='reverse_kl': drawn tokens"):
        distillation_loss(hidden, head, signal, labels, divergence="reverse_kl")


@pytest.mark.parametrize("stored", [{"top_k": 5, "dtype": "fixed12"}, {"top_k": None, "num_draws": 3}], ids=str)
def test_hidden_states_are_kept_beside_packed_tokens(tmp_path, stored):
    student, teacher = models(dtype=torch.float32)
    stored = {"dtype": "float16", **stored}
    cache = load_teacher_cache(write_cache(tmp_path / "c", teacher, token_dataset(), embedding_loss="mse", **stored))
    trainer = make_trainer(tmp_path / "run", student, None, cache, max_steps=1, embedding_loss="mse", **OPTIONS)
    assert np.isfinite(trainer.train().training_loss)


def test_tokens_of_no_probability_are_never_drawn():
    weight = torch.zeros(SIZE, WIDTH, dtype=torch.float64)
    bias = torch.full((SIZE,), -torch.inf, dtype=torch.float64)
    bias[[3, 11]] = 0.0
    dense = DenseSignal(torch.zeros(64, WIDTH, dtype=torch.float64), OutputHead(weight, bias))
    offsets = torch.arange(64, dtype=torch.float64) / 64
    found = sampled_signal(dense, 8, offsets)
    assert set(found.tokens[found.weights > 0].tolist()) == {3, 11}
