"""Tries every family in llama.cpp: converts a pocket model and its students to GGUF, and compares log-probabilities.

    python tools/llama_cpp.py LLAMA_CPP_SOURCES [FAMILY ...] --output llama_cpp.json

LLAMA_CPP_SOURCES is a checkout of llama.cpp, whose converter is used. llama.cpp itself comes from the package
`xllamacpp`; the converter needs `gguf` and `sentencepiece`. A family counts as tried if its whole teacher, whose
hidden size is num_attention_heads × head_dim, gives the same log-probabilities there as in Transformers. One student
has a smaller hidden size, so that its `head_dim` is not hidden_size / num_attention_heads; another has fewer neurons;
a third is cut with `portable=True`.

The vocabulary has 97 tokens. Its entry in the converter's list of known tokenizers is assumed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import string
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PROMPT = [5, 11, 40, 77, 31]  # shorter than the pockets' sliding windows, which some of its classes do not have
#: Nats. llama.cpp keeps keys and values, and its table of GELU, in float16.
TOLERANCE = 0.03
#: Fields of pockets whose variants llama.cpp does not have, set to what published models have.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": False},
    "ernie4_5": {"use_bias": False},
    "falcon": {"ffn_hidden_size": 160},
    "falcon-11b": {"ffn_hidden_size": 192},
    "falcon-40b": {"ffn_hidden_size": 192},
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3_text": {"query_pre_attn_scalar": 10},
    "gpt2": {"n_ctx": 64, "n_inner": 160},
    "gpt_bigcode": {"n_inner": 160},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": []},
    "seed_oss": {"attention_out_bias": False, "mlp_bias": False},
    "smollm3": {"use_sliding_window": False, "no_rope_layer_interval": 4, "no_rope_layers": None},
}


def main() -> None:
    """Try the families and write what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="checkout of llama.cpp")
    parser.add_argument("families", nargs="*", help="pockets to try; default: all")
    parser.add_argument("--output", type=Path, default=Path("llama_cpp.json"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(_llama_log_probabilities(arguments.run)))
        return
    sys.path[:0] = [str(ROOT / "tests"), str(arguments.sources), str(arguments.sources / "gguf-py")]
    logging.disable(logging.WARNING)
    from pocket import POCKETS

    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.families or POCKETS:
        if name in found and name not in arguments.families:
            continue
        found[name] = try_family(name, arguments.sources)
        print(f"{name:<28} {found[name]}", flush=True)
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    for words, names in summary(found).items():
        print(f"{words}: {', '.join(sorted(names))}")


def try_family(name: str, sources: Path) -> dict[str, Any]:
    """What happened to the teacher and to its student: the largest difference of log-probabilities, or the failure."""
    from minitron_hf import PrunerConfig, prune_model
    from minitron_hf.families import spec_for
    from minitron_hf.families.runtimes import HEADS_FILL_HIDDEN
    from pocket import POCKETS, cuttable, pocket_model

    if POCKETS[name].config is None:
        return {"teacher": "not in this release of Transformers"}
    spec, config = spec_for(POCKETS[name].config), POCKETS[name].config
    sizes = spec.sizes(config)
    whole = dict(PUBLISHED.get(name, {}))
    if {"heads", "head_dim"} <= set(sizes):
        whole["hidden_size"] = sizes["heads"] * sizes["head_dim"]
    try:
        teacher = pocket_model(name, dtype=torch.float32, **whole)
    except Exception as error:
        return {"teacher": f"not built: {_short(error)}"}
    outcome = {"teacher": _difference(teacher, sources)}
    if isinstance(outcome["teacher"], str) or outcome["teacher"] > TOLERANCE:
        return outcome
    cut = {field: 0.5 for field in ("hidden_size", "intermediate_size") if field in cuttable(name)}
    requests = {field: {field: 0.5} for field in cut}
    if "hidden_size" in cut and "hidden_size" in whole and HEADS_FILL_HIDDEN not in spec.equal:
        requests["hidden_size"] = {"hidden_size": whole["hidden_size"] - 2 * sizes["heads"]}
    if cut:
        requests["portable"] = {next(iter(cut)): 0.5, "portable": True}
    for kind, request in requests.items():
        try:
            student = prune_model(teacher, PrunerConfig(**request), calibration_data=[list(range(90))], max_length=90)
        except Exception as error:
            outcome[kind] = f"not pruned: {_short(error)}"
        else:
            outcome[kind] = _difference(student, sources)
    return outcome


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The families by what became of their students: in words → names."""
    groups: dict[str, list[str]] = {}
    for name, outcome in found.items():
        fits = {kind: isinstance(value, float) and value <= TOLERANCE for kind, value in outcome.items()}
        students = {kind: fit for kind, fit in fits.items() if kind not in ("teacher", "portable")}
        words = "all students run"
        if not fits["teacher"]:
            words = "teacher not tried"
        elif not all(students.values()):
            failing = " and ".join(kind for kind, fit in students.items() if not fit)
            words = f"{failing} fails" + (", portable runs" if fits.get("portable") else "")
        groups.setdefault(words, []).append(name)
    return groups


def _difference(model: Any, sources: Path) -> float | str:
    """Largest difference of log-probabilities after `PROMPT`, in nats, or why there is none."""
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, -1].double(), -1)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            path = _convert(Path(folder))
        except (Exception, SystemExit) as error:  # the converter exits, too
            return f"not converted: {_short(error)}"
        command = [sys.executable, __file__, str(sources), "--run", path]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if "rror" in line or "ASSERT" in line]
        return f"llama.cpp fails: {lines[0].split(' E ')[-1] if lines else ran.returncode}"
    found = json.loads(ran.stdout.splitlines()[-1])
    return max(abs(expected[int(token)].item() - value) for token, value in found.items())


def _convert(folder: Path) -> str:
    """Convert a checkpoint with the converter's class for it, and the pockets' tokenizer."""
    import conversion
    import gguf

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    settings = conversion.ModelBase.load_hparams(folder, False)
    kind = conversion.get_model_class(conversion.get_model_architecture(settings, conversion.ModelType.TEXT))
    kind.set_vocab = lambda self: self._set_vocab_gpt2()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    types = [gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)]
    kind.get_vocab_base = lambda self: (tokens, types, "smollm")
    path = folder / "model.gguf"
    with torch.inference_mode():
        kind(folder, gguf.LlamaFileType.ALL_F32, path).write()
    return str(path)


def _tokenizer() -> Any:
    """A byte-pair tokenizer of 97 tokens: llama.cpp takes no other kind without SentencePiece."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pockets import VOCAB

    letters = ["<s>", *string.ascii_letters, *string.digits, *"ĠĊ.,-_"]
    merges = list(itertools.pairwise(string.ascii_lowercase + string.ascii_uppercase))[: VOCAB - len(letters)]
    vocabulary = {
        token: index for index, token in enumerate([*letters, *(first + second for first, second in merges)])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="<s>")


def _llama_log_probabilities(path: str) -> dict[str, float]:
    """Token → log-probability after `PROMPT`, by llama.cpp."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.cpuparams.n_threads, settings.warmup = 64, 1, False
    server = xllamacpp.Server(settings)
    asked = {"prompt": PROMPT, "n_predict": 1, "n_probs": 20, "temperature": 1.0, "cache_prompt": False}
    answer = server.handle_completions(asked)
    if "choices" not in answer:
        raise RuntimeError(json.dumps(answer))
    entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {str(entry["id"]): entry["logprob"] for entry in entries}


def _short(error: BaseException) -> str:
    """The first line of an error's message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


if __name__ == "__main__":
    main()
