"""A cut tokenizer emits kept tokens alone, decodes every text to what it was, and splits as before where it can."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minitron_hf.errors import MismatchError, PlanError, UnsupportedModelError
from minitron_hf.vocabulary.choice import choose_tokens
from minitron_hf.vocabulary.pieces import BYTE_TOKENS, pieces_of
from minitron_hf.vocabulary.required import template_tokens
from minitron_hf.vocabulary.rewriting import cut_tokenizer
from pocket import pocket_tokenizer

#: Tokens of the trained tokenizers: the large ones are trained and tried in slow tests.
LARGE, SMALL = 9000, 1500
DATA = Path(os.environ.get("MINITRON_TEST_DATA", "/nowhere"))
TEMPLATE = "{% for m in messages %}<|role|>{{ m.role + '\n' + m.content }} closing words{% endfor %}"


@cache
def corpus() -> tuple[str, ...]:
    """Documentation of the standard library: enough different words for 8,000 pieces."""
    from pydoc_data import topics

    text = [line for topic in topics.topics.values() for line in topic.splitlines() if line.strip()]
    for name in ("argparse", "decimal", "typing", "doctest", "tarfile", "turtle", "pickletools", "subprocess"):
        text += (Path(os.__file__).parent / f"{name}.py").read_text(encoding="utf-8").splitlines()
    return tuple(text)


@cache
def odd_lines(number: int) -> list[str]:
    """Words of the corpus mixed with all scripts, emoji, broken UTF-8 and control characters."""
    draw = random.Random(1)
    scripts = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co") and draw.random() < 0.2
    ]
    emoji = [
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "é",
        "é",
        "🇩🇪",
        "👍🏽",
        "한글",
        "ไทย",
        "\u202e",
        "\ufeff",
        "\x00",
        "\x1b[0m",
        "\r\n",
        "\t\t",
    ]
    words = [word for line in corpus()[::7] for word in line.split(" ")]
    lines = []
    for _ in range(number):
        kinds = draw.choices("wsebdc", k=draw.randrange(1, 9))
        parts = []
        for kind in kinds:
            if kind == "w":
                parts.append(" ".join(draw.choices(words, k=draw.randrange(1, 6))))
            elif kind == "s":
                parts.append("".join(draw.choices(scripts, k=draw.randrange(1, 4))))
            elif kind == "e":
                parts.append(draw.choice(emoji))
            elif kind == "b":
                broken = bytes(draw.randrange(256) for _ in range(6))
                parts.append(broken.decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode("utf-8"))
            elif kind == "d":
                parts.append(bytes(draw.randrange(128, 256) for _ in range(4)).decode("utf-8", "replace"))
            else:
                parts.append(chr(draw.randrange(32)))
        lines.append(draw.choice(["", " ", "  "]).join(parts))
    return lines


def trained(model, trainer, **parts) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    lines = corpus()
    tokenizer.train_from_iterator(lines if trainer.vocab_size >= LARGE else lines[:2000], trainer)
    tokenizer.add_tokens([AddedToken("<|role|>", normalized=False), AddedToken("closing", single_word=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@cache
def byte_level(size: int = SMALL) -> PreTrainedTokenizerFast:
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )


@cache
def byte_fallback(size: int = SMALL) -> PreTrainedTokenizerFast:
    """Llama 2's layout: characters, and bytes for those that are no token."""
    tokenizer = trained(
        models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *BYTE_TOKENS], show_progress=False
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        pre_tokenizer=pre_tokenizers.Split("▁", "merged_with_next"),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    return tokenizer


@cache
def unigram(size: int = SMALL) -> PreTrainedTokenizerFast:
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


@cache
def wordpiece(size: int = SMALL) -> PreTrainedTokenizerFast:
    return trained(
        models.WordPiece(unk_token="<unk>", max_input_chars_per_word=100),
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=False),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        post_processor=processors.BertProcessing(("</s>", 2), ("<s>", 1)),
        decoder=decoders.WordPiece(),
    )


@cache
def smollm2(size: int):
    folder = next((path for path in sorted(DATA.glob("models/*mol*2*")) if (path / "tokenizer.json").is_file()), None)
    if folder is None:
        pytest.skip("no SmolLM2 in MINITRON_TEST_DATA/models")
    return AutoTokenizer.from_pretrained(folder)


KINDS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "smollm2": smollm2,
}


def counts_of(tokenizer, lines) -> np.ndarray:
    ids = list(itertools.chain.from_iterable(tokenizer(list(lines))["input_ids"]))
    return np.bincount(ids, minlength=len(tokenizer))


def cut_to(tokenizer, fraction: float):
    """The tokenizer cut by the first half of the corpus, and the kept ids."""
    size = int(len(tokenizer) * fraction)
    kept = choose_tokens(tokenizer, counts_of(tokenizer, corpus()[::2]), size, len(tokenizer))
    assert len(kept) == size
    return cut_tokenizer(tokenizer, kept), kept


def require_laws(whole, lines) -> None:
    """Ids are kept ones, texts decode alike, and kept pieces stay."""
    cut, kept = cut_to(whole, 0.6)
    before, after = whole(lines)["input_ids"], cut(lines)["input_ids"]
    same = 0
    for line, old, new in zip(lines, before, after):
        assert not new or max(new) < len(kept)
        if np.isin(old, kept).all():
            assert kept[new].tolist() == old, line
            same += 1
    assert before != after
    assert same > len(lines) / 20
    assert whole.batch_decode(before) == cut.batch_decode(after)
    assert cut.get_vocab() == {token: np.searchsorted(kept, i) for token, i in whole.get_vocab().items() if i in kept}
    for token in whole.convert_ids_to_tokens(kept.tolist()):  # whatever is reached alone is still reached
        if [piece.value for piece in whole.backend_tokenizer.model.tokenize(token)] == [token]:
            assert [piece.value for piece in cut.backend_tokenizer.model.tokenize(token)] == [token]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_tokenizer_keeps_its_laws(kind):
    """On odd lines and on text of the corpus."""
    require_laws(KINDS[kind](SMALL), [*odd_lines(1000), *corpus()[1::80]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_cut_tokenizer_keeps_its_laws(kind):
    """On 10,000 odd lines, with at least 8,000 tokens."""
    whole = KINDS[kind](LARGE)
    assert len(whole) >= 8000
    require_laws(whole, [*odd_lines(10_000), *corpus()[1::40]])


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"smollm2"}))
def test_a_cut_tokenizer_is_saved_and_loaded(kind, tmp_path):
    cut, _ = cut_to(KINDS[kind](SMALL), 0.7)
    cut.save_pretrained(tmp_path)
    loaded, lines = AutoTokenizer.from_pretrained(tmp_path), odd_lines(300)
    assert loaded(lines)["input_ids"] == cut(lines)["input_ids"]
    assert loaded.get_vocab() == cut.get_vocab()
    assert loaded.special_tokens_map == cut.special_tokens_map


def test_merges_that_make_kept_tokens_stay_with_their_parts():
    """By hand: of two ways to the same token, the one that the ranks take counts."""
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("abc", "d"), ("c", "d")]
    tokens = ["a", "b", "c", "d", "ab", "bc", "abc", "abcd", "cd"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    )
    counts = np.zeros(9, dtype=np.int64)
    counts[7] = 1  # abcd
    kept = choose_tokens(tokenizer, counts, 7, 9)
    assert [tokens[index] for index in kept] == ["a", "b", "c", "d", "ab", "abc", "abcd"]
    assert cut_tokenizer(tokenizer, kept).tokenize("abcd") == ["abcd"]
    assert pieces_of(tokenizer).parts("bc") == ("b", "c")


def test_words_that_are_tokens_whole_need_no_merges():
    """`ignore_merges` (Llama 3): a word in the vocabulary is emitted, whether or not merges make it."""
    model = models.BPE({"a": 0, "b": 1, "ba": 2, "ab": 3}, [("b", "a")], ignore_merges=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    kept = choose_tokens(tokenizer, np.array([0, 0, 0, 1]), 3, 4)
    assert kept.tolist() == [0, 1, 3]
    assert cut_tokenizer(tokenizer, kept).tokenize("ab") == ["ab"]


def test_characters_that_the_decoder_replaces_stay():
    """A space that became bytes would decode to `▁`, because the decoder replaces before it decodes bytes."""
    whole = byte_fallback()
    known = whole.get_vocab()
    counts = np.array([int("▁" not in token) for token in sorted(known, key=known.get)])
    kept = choose_tokens(whole, counts, 400, len(whole))
    assert [token for token, index in known.items() if "▁" in token and index in kept] == ["▁"]
    cut, text = cut_tokenizer(whole, kept), "two words, ▁ and 漢"
    assert cut.decode(cut(text)["input_ids"]) == whole.decode(whole(text)["input_ids"])


def test_unknown_characters_of_unigrams_cost_what_they_did():
    """By hand: `c` becomes bytes, at the smallest score less 10. With a cheaper one, `c|defgh` would win."""
    scores = {"c": -30, "cd": -8, "ef": -8, "gh": -8, "defgh": -1, "zq": -31}
    pieces = [("<unk>", 0.0), *((byte, 0.0) for byte in BYTE_TOKENS), *((one, float(n)) for one, n in scores.items())]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.ByteFallback()
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    counts = np.bincount(whole("cdefgh cd defgh", add_special_tokens=False)["input_ids"], minlength=len(whole))
    kept = choose_tokens(whole, counts, len(whole) - 1, len(whole))
    cut = cut_tokenizer(whole, kept)
    assert whole.tokenize("cdefgh") == cut.tokenize("cdefgh") == ["cd", "ef", "gh"]
    assert cut.tokenize("c") == ["<0x63>"]


def test_words_of_chat_templates_stay():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    try:
        wanted = template_tokens(tokenizer)
        kept = choose_tokens(tokenizer, np.zeros(1, dtype=np.int64), 600, len(tokenizer))
        cut = cut_tokenizer(tokenizer, kept)
        assert wanted <= set(kept.tolist())
        messages = [{"role": "user", "content": "Hi."}]
        old, new = (one.apply_chat_template(messages)["input_ids"] for one in (tokenizer, cut))
        assert kept[new].tolist() == old
    finally:
        tokenizer.chat_template = None


def test_rows_beyond_the_tokenizer_are_kept_last():
    tokenizer = byte_level()
    size, rows = len(tokenizer), len(tokenizer) + 64
    counts = np.ones(rows, dtype=np.int64)
    assert choose_tokens(tokenizer, counts, size, rows).tolist() == list(range(size))
    assert choose_tokens(tokenizer, counts, size + 2, rows).tolist() == list(range(size + 2))


def test_too_few_tokens_are_refused():
    with pytest.raises(PlanError, match=r"vocab_size=100: 2\d\d tokens have to stay.* Keep 2\d\d or more"):
        choose_tokens(byte_level(), np.zeros(1), 100, len(byte_level()))


def test_tokenizers_of_larger_models_are_refused():
    with pytest.raises(MismatchError, match="embeddings have 50 rows"):
        choose_tokens(byte_level(), np.zeros(1), 40, 50)


def with_piece(tokenizer, change) -> PreTrainedTokenizerFast:
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    change(whole)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (pocket_tokenizer, "with a WordLevel model"),
        (lambda: object(), "needs a fast tokenizer"),
        (lambda: with_piece(unigram(), lambda one: one["model"]["vocab"].append(["aΩ", -9])), "'aΩ' holds 'Ω'"),
        (
            lambda: with_piece(
                wordpiece(), lambda one: one["model"]["vocab"].update({"##aΩ": len(one["model"]["vocab"])})
            ),
            "'##aΩ' holds",
        ),
    ],
)
def test_what_cannot_be_rewritten_is_refused_by_name(tokenizer, message):
    tokenizer = tokenizer()
    with pytest.raises(UnsupportedModelError, match=message):
        choose_tokens(tokenizer, np.zeros(1, dtype=np.int64), 1000, 10_000)
