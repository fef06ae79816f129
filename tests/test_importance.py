"""Importance scores against a two-pass computation, row by row, without batches, padding or running sums."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from minitron_hf.data import TokenRows, token_rows
from minitron_hf.errors import DataError, MismatchError, UnsupportedModelError
from minitron_hf.families import FIELD_OF_AXIS, ArchSpec, spec_for
from minitron_hf.families.tensors import named_tensors
from minitron_hf.models import architecture_digest, empty_model
from minitron_hf.pruning.prune import prune_model
from minitron_hf.pruning.surgery import cut_tensor
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.scoring.scores import ImportanceScores
from minitron_hf.sizes.request import PrunerConfig
from minitron_hf.weights import model_digest
from pocket import (
    POCKETS,
    VOCAB,
    cuttable,
    float64_throughout,
    logits,
    pocket_model,
    pocket_tokenizer,
    pocket_tokens,
    residual_norms,
)

NAMES = list(POCKETS)
REDUCTIONS = list(itertools.product(("mean", "l2", "var"), repeat=2))
#: Ragged rows: most batches of them need padding.
ROWS = TokenRows(tuple(tuple(pocket_tokens(length, seed=length).tolist()) for length in (9, 4, 12, 7, 2)), None)


def scores_of(model, data=ROWS, **kwargs) -> ImportanceScores:
    """Scores computed in float64 throughout."""
    with float64_throughout():
        return estimate_importance(model, data, show_progress=False, **kwargs)


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str, rtol: float, atol: float = 0) -> None:
    """Equal up to rounding, NaN at the same places."""
    torch.testing.assert_close(
        found, expected, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def assert_equal_scores(one: ImportanceScores, other: ImportanceScores, tolerance: float = 1e-10) -> None:
    assert one.axes.keys() == other.axes.keys()
    for axis, expected in other.axes.items():
        assert_close(one.axes[axis], expected, axis, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.blocks, other.blocks, rtol=tolerance, atol=tolerance, equal_nan=True)


# The oracle


def only_row(x: torch.Tensor) -> torch.Tensor:
    if x.ndim == 4 and len(x) > 1:  # several residual streams, the first dimension: one state of all
        return x[:, 0].movedim(0, 1).flatten(1)
    return x if x.ndim == 2 else x[0]  # OPT's MLP sees rows and tokens as one


def expert_activations(
    module: nn.Module, inputs: tuple[torch.Tensor, ...], input_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of weighted outputs [tokens, experts] and weighted activations [tokens, experts, neurons].

    The stock module is asked for one token and expert at a time. Its neurons are read by putting pieces of the
    identity in the place of the down projection.
    """
    hidden, *routing = inputs
    num_experts, neurons = len(module.down_proj), module.down_proj.shape[1 + input_dim]
    hidden = hidden.reshape(num_experts if not routing else 1, -1, hidden.shape[-1])
    tokens, width = hidden.shape[1:]
    reader = copy.deepcopy(module)
    for name in ("down_proj_bias", "post_expert_norm"):
        if hasattr(reader, name):
            setattr(reader, name, nn.Identity() if "norm" in name else nn.Parameter(module.down_proj_bias * 0))
    routes = [
        [(int(expert), weight) for expert, weight in zip(*(part[token] for part in routing), strict=True)]
        if routing
        else [(expert, None) for expert in range(num_experts)]
        for token in range(tokens)
    ]
    pieces = [range(start, min(start + width, neurons)) for start in range(0, neurons, width)]

    def ask(asked: nn.Module, expert: int, token: int, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            # Chosen twice, once with no weight: LongCat's class knows no tokens with one choice.
            return asked.forward(
                hidden[:, token], torch.tensor([[expert, expert]]), torch.stack([weight, 0 * weight]).reshape(1, 2)
            )[0]
        alone = torch.zeros(num_experts, width, dtype=hidden.dtype)
        alone[expert] = hidden[expert, token]
        return asked.forward(alone)[expert]

    norms = torch.zeros(tokens, num_experts, dtype=torch.float64)
    inner = torch.zeros(tokens, num_experts, neurons, dtype=torch.float64)
    with torch.no_grad(), float64_throughout():
        for token in range(tokens):
            for expert, weight in routes[token]:
                if expert < num_experts:  # else one without weights
                    norms[token, expert] = ask(module, expert, token, weight).norm()
        for piece in pieces:
            reader.down_proj.zero_()
            for row, neuron in enumerate(piece):
                reader.down_proj.select(1 + input_dim, neuron).select(1, row).fill_(1)
            for token in range(tokens):
                chosen = (
                    zip(*(part[token] for part in routing)) if routing else ((e, None) for e in range(num_experts))
                )
                for expert, weight in chosen:
                    if int(expert) < num_experts:
                        answer = ask(reader, int(expert), token, weight)
                        inner[token, int(expert), piece.start : piece.stop] = answer[: len(piece)]
    return norms, inner


@cache
def activations(name: str) -> dict[str, list]:
    """Per-token activations of every row, each run by itself.

    Returns:
        axis → per source (layer or norm) → per row → [tokens, units], or None for a layer without such units;
        `"states"` → per row → [layers + 1, tokens, H].
    """
    pocket, model = POCKETS[name], pocket_model(name)
    layers = model.get_submodule(pocket.layers)
    caught: dict[object, torch.Tensor] = {}

    def catch_input(key: object) -> Callable:
        return lambda module, args: caught.__setitem__(key, args if "experts" in key else only_row(args[0]))

    def catch_output(key: object) -> Callable:
        return lambda module, args, output: caught.__setitem__(
            key, only_row(output[0] if isinstance(output, tuple) else output)
        )

    def catch_again(key):
        """A norm that is called twice counts twice."""
        return lambda module, args, output: caught.setdefault(key, []).append(only_row(output).numpy())

    norms = [path for path in residual_norms(name, model) if not path.endswith(pocket.output_norms or "-")]
    outer = {path: path.rpartition(".")[0] for path in norms}  # a norm inside one that gates what it makes
    norms = [
        outer[path] if "norm" in type(model.get_submodule(outer[path])).__name__.lower() else path for path in norms
    ]
    for path in norms:
        model.get_submodule(path).register_forward_hook(catch_again(path))
    paths = {
        "attention": pocket.attention_out,
        **pocket.writers,
        "experts": pocket.experts,
        "ssm_heads": pocket.ssm_out,
    }
    for index, layer in enumerate(layers):
        modules = dict(layer.named_modules())
        for key, path in paths.items():
            if path in modules:
                modules[path].register_forward_pre_hook(catch_input((key, index)))
    layers[-1].register_forward_hook(catch_output("last"))
    model.get_input_embeddings().register_forward_hook(catch_output("embeddings"))

    depth = len(layers)
    axes = [key for key, path in paths.items() if path and key != "attention"]
    axes += ["heads"] if pocket.attention_out else []
    axes += [*(["kv"] if pocket.kv else []), *(["moe_ffn"] if pocket.experts else [])]
    axes += ["ssm_dim"] if pocket.ssm_heads else []
    found: dict[str, list] = {
        "hidden": [[] for _ in norms],
        **{axis: [None] * depth for axis in axes},
        "states": [],
    }

    def note(axis: str, layer: int, values: torch.Tensor) -> None:
        found[axis][layer] = [*(found[axis][layer] or []), values.detach().numpy()]

    for row in ROWS.rows:
        caught.clear()
        with torch.no_grad(), float64_throughout():
            states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for index, path in enumerate(norms):
            found["hidden"][index] += caught[path]
        for (axis, index), value in [(key, value) for key, value in caught.items() if isinstance(key, tuple)]:
            if axis == "experts":
                module = layers[index].get_submodule(pocket.experts)
                scores, inner = expert_activations(module, value, pocket.expert_inputs)
                note("experts", index, scores)
                note("moe_ffn", index, inner.flatten(1))
            elif axis == "ssm_heads" and pocket.ssm_heads:
                note("ssm_heads", index, value.unflatten(-1, (pocket.ssm_heads, -1)).norm(dim=-1))
                note("ssm_dim", index, value)
            elif axis != "attention":
                note(axis, index, value)
            else:
                heads = model.config.num_attention_heads
                note("heads", index, value.unflatten(-1, (heads, -1)).norm(dim=-1))
            if axis == "attention" and pocket.kv:
                weight = layers[index].get_submodule(pocket.attention_out).weight
                groups = spec_for(model.config).sizes(model.config)["kv"]
                width = weight.shape[1] // groups
                contributions = []
                for group in range(groups):
                    columns = slice(group * width, (group + 1) * width)
                    contributions.append((value[:, columns] @ weight[:, columns].T).norm(dim=-1))
                note("kv", index, torch.stack(contributions, -1))
        # Recurrent models list what layers write, without the embeddings.
        if pocket.attention_out is None and not torch.equal(only_row(states[0]), caught["embeddings"]):
            states = (caught["embeddings"][None], *states[: depth - 1], states[-1])
        # Transformers puts the final norm's output in the last place.
        states = [only_row(state) for state in states[:-1]]
        found["states"].append(torch.stack([*states, caught["last"]]).flatten(2).numpy())
    return found


def naive_reduce(values: Iterable[float], reduction: str) -> float:
    values = [float(value) for value in values]
    if reduction == "l2":
        return math.sqrt(math.fsum(value * value for value in values))
    if reduction == "mean":
        return math.fsum(abs(value) for value in values) / len(values)
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / len(values)


def naive_axis(name: str, axis: str, batch_reduction: str, sequence_reduction: str) -> torch.Tensor:
    """Unit by unit: reduce the tokens of every row, then the rows; for hidden, sum over the norms."""
    sources = activations(name)[axis]
    [units] = {rows[0].shape[1] for rows in sources if rows is not None}
    scores = [
        [
            math.nan
            if rows is None
            else naive_reduce((naive_reduce(row[:, unit], sequence_reduction) for row in rows), batch_reduction)
            for unit in range(units)
        ]
        for rows in sources
    ]
    table = torch.tensor(scores, dtype=torch.float64)
    if outer := {"moe_ffn": "experts", "ssm_dim": "ssm_heads"}.get(axis):
        count = next(rows[0].shape[1] for rows in activations(name)[outer] if rows is not None)
        table = table.unflatten(1, (count, -1))
    return table.sum(0) if axis == "hidden" else table


def naive_blocks(name: str) -> torch.Tensor:
    """1 − the mean cosine over all tokens of all rows, for every first and last layer of a block."""
    states = activations(name)["states"]
    depth = len(states[0]) - 1
    blocks = torch.full((depth, depth), torch.nan, dtype=torch.float64)
    for first in range(depth):
        for last in range(first, depth):
            cosines = [
                float(np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)))
                for row in states
                for x, y in zip(row[first], row[last + 1], strict=True)
            ]
            assert len(cosines) == ROWS.num_tokens
            blocks[first, last] = 1 - math.fsum(cosines) / len(cosines)
    return blocks


# Scores = the oracle


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_naive_computation(name: str):
    scores = scores_of(pocket_model(name), batch_size=2)
    expected = {axis: naive_axis(name, axis, "l2", "mean") for axis in activations(name) if axis != "states"}
    assert scores.axes.keys() == expected.keys()
    for axis in expected:
        assert_close(scores.axes[axis], expected[axis], axis, rtol=1e-10)
        assert expected[axis][~expected[axis].isnan()].std() > 0.01
    torch.testing.assert_close(scores.blocks, naive_blocks(name), rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(scores.layers, naive_blocks(name).diagonal(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("batch_reduction", "sequence_reduction"), REDUCTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_moe"])
def test_every_pair_of_reductions(name: str, batch_reduction: str, sequence_reduction: str):
    scores = scores_of(
        pocket_model(name), batch_size=3, batch_reduction=batch_reduction, sequence_reduction=sequence_reduction
    )
    for axis, found in scores.axes.items():
        expected = naive_axis(name, axis, batch_reduction, sequence_reduction)
        assert_close(found, expected, axis, rtol=1e-9, atol=1e-14)


def test_default_reductions_are_the_papers():
    scores = scores_of(pocket_model("llama"))
    assert (scores.settings["batch_reduction"], scores.settings["sequence_reduction"]) == ("l2", "mean")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_precision_follows_the_model(dtype: torch.dtype, tolerance: float):
    """Scores are float32 whatever the model computes in."""
    scores = estimate_importance(pocket_model("qwen3", dtype=dtype), ROWS, show_progress=False)
    for axis, found in scores.axes.items():
        assert found.dtype == torch.float32
        expected = naive_axis("qwen3", axis, "l2", "mean").float()
        assert_close(found, expected, axis, rtol=tolerance, atol=tolerance * float(expected.mean()))
    assert scores.blocks.dtype == torch.float32
    plain = estimate_importance(pocket_model("qwen3"), ROWS, show_progress=False)  # float64 without the alias
    assert {tensor.dtype for tensor in (*plain.axes.values(), plain.blocks)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reductions", [("mean", "mean"), ("l2", "l2"), ("var", "var")], ids="-".join)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, reductions: tuple[str, str]):
    """The activations are the model's, in its dtype; the sums over 64 tokens and 24 rows lose nothing more."""
    model = pocket_model("llama", dtype=dtype)
    rows = pocket_tokens(24, 64)
    caught: dict[str, list[torch.Tensor]] = {}
    paths = [
        "model.norm",
        *(f"model.layers.{i}.{norm}" for i in range(5) for norm in spec_for(model.config).layer_norms),
    ]
    for path in paths:
        caught[path] = []
        hook = lambda _, __, output, path=path: caught[path].append(output.double())  # noqa: E731
        model.get_submodule(path).register_forward_hook(hook)
    down = "model.layers.2.mlp.down_proj"
    caught[down] = []
    model.get_submodule(down).register_forward_pre_hook(lambda _, args: caught[down].append(args[0].double()))
    batch, sequence = reductions
    scores = estimate_importance(
        model, rows.tolist(), max_length=64, show_progress=False, batch_reduction=batch, sequence_reduction=sequence
    )

    def reduce(x: torch.Tensor, dim: int, how: str) -> torch.Tensor:
        return {"mean": x.abs().mean(dim), "l2": x.norm(dim=dim), "var": x.var(dim, correction=0)}[how]

    expected = {path: reduce(reduce(torch.cat(values), 1, sequence), 0, batch) for path, values in caught.items()}
    assert_close(scores.axes["ffn"][2].double(), expected.pop(down), "ffn", rtol=1e-5)
    assert_close(scores.axes["hidden"].double(), sum(expected.values()), "hidden", rtol=1e-5)


# Invariance


def loader(
    rows: Iterable[tuple[int, ...]], batch_size: int, side: str = "right", extra: int = 0, pad: int = 0
) -> DataLoader:
    """Padded batches as a DataLoader, with another key that the model does not know."""

    def collate(batch: list[tuple[int, ...]]) -> dict[str, object]:
        length = max(map(len, batch)) + extra
        ids = torch.full((len(batch), length), pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(batch):
            where = slice(length - len(row), length) if side == "left" else slice(len(row))
            ids[index, where], mask[index, where] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask, "text": ["…"] * len(batch)}

    return DataLoader(list(rows), batch_size=batch_size, collate_fn=collate)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("qwen2_moe", "eager"),
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("qwen2", "sdpa"),
        ("gpt2", "eager"),
        ("gpt2", "sdpa"),
        ("phi3", "sdpa"),
    ],
)
def test_scores_do_not_depend_on_batches_or_padding(name: str, attention: str):
    model = pocket_model(name, attn_implementation=attention)
    expected = scores_of(model, batch_size=1)
    for batch_size in (2, 5):
        assert_equal_scores(scores_of(model, batch_size=batch_size), expected)
    for side, extra, batch_size in itertools.product(("left", "right"), (0, 3), (1, 5)):
        assert_equal_scores(scores_of(model, loader(ROWS.rows, batch_size, side, extra)), expected)
    assert_equal_scores(scores_of(model, loader(reversed(ROWS.rows), 2)), expected)
    assert_equal_scores(scores_of(model, loader(ROWS.rows, 2, pad=VOCAB + 5)), expected)  # a token added for padding


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("reductions", REDUCTIONS, ids="-".join)
def test_no_reduction_counts_padding(reductions: tuple[str, str], name: str):
    model = pocket_model(name)
    names = dict(zip(("batch_reduction", "sequence_reduction"), reductions, strict=True))
    expected = scores_of(model, loader(ROWS.rows, 1), **names)
    assert_equal_scores(scores_of(model, loader(ROWS.rows, 5, "left", 3), **names), expected)


def test_rows_without_tokens_do_not_count():
    model = pocket_model("llama")
    expected = scores_of(model, batch_reduction="mean")
    found = scores_of(model, loader([*ROWS.rows, ()], 6), batch_reduction="mean")
    assert_equal_scores(found, expected)
    assert found.settings["num_rows"] == 5


def random_order(name: str, spec: ArchSpec, sizes: dict[str, int], generator: np.random.Generator) -> dict:
    """A new order of the units of every axis of one layer that its family lets be cut."""
    cut = cuttable(name)
    outer_of = dict(spec.groups)
    order: dict[str, np.ndarray] = {}
    for axis in (axis for axis in spec.axes if axis.per_layer and FIELD_OF_AXIS.get(axis.name) in cut):
        if axis.within:
            order[axis.name] = np.stack([generator.permutation(sizes[axis.name]) for _ in range(sizes[axis.within])])
        elif axis.name not in outer_of:
            order[axis.name] = generator.permutation(sizes[axis.name])
    for inner, outer in spec.groups:
        if FIELD_OF_AXIS.get(inner) in cut:
            each = sizes[inner] // sizes[outer]
            groups = order.get(outer, range(sizes[outer]))
            order[inner] = np.concatenate([group * each + generator.permutation(each) for group in groups])
    return order


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", NAMES)
def test_permuting_units_permutes_scores(name: str):
    """Reordered channels, neurons, heads, KV groups, experts: the same function, and the scores move along."""
    model = pocket_model(name)
    spec = spec_for(model.config)
    sizes = spec.sizes(model.config)
    generator = np.random.default_rng(5)
    hidden = np.arange(sizes["hidden"])
    if "hidden" not in spec.refused:  # of coupled sizes too: the stream may be permuted by itself
        hidden = generator.permutation(hidden)
    orders = [random_order(name, spec, own, generator) for own in spec.layer_sizes(model.config)]
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        for path, tensor in named_tensors(permuted).items():
            pattern, layer = spec.locate(path)
            order = {"hidden": hidden} | ({} if layer is None else orders[layer])
            own = spec.sizes(model.config, layer)
            tensor.copy_(cut_tensor(tensor, spec.dimensions[pattern], spec.axis, own, order))
    tokens = pocket_tokens(2, 9)
    torch.testing.assert_close(logits(permuted, tokens), logits(model, tokens), rtol=1e-12, atol=1e-12)

    before, after = scores_of(model), scores_of(permuted)
    assert_close(after.axes["hidden"], before.axes["hidden"][hidden], "hidden", rtol=1e-10)
    for layer, order in enumerate(orders):
        for axis, units in order.items():
            expected = before.axes[axis][layer]
            if outer := spec.axis[axis].within:
                expected = expected[order.get(outer, slice(None))].gather(1, torch.from_numpy(units))
            else:
                expected = expected[units]
            assert_close(after.axes[axis][layer], expected, axis, rtol=1e-10)
    torch.testing.assert_close(after.blocks, before.blocks, rtol=1e-10, atol=1e-12, equal_nan=True)


# The teacher is left alone


def test_model_is_left_as_it_was():
    model = pocket_model("gpt2").train()
    model.transformer.h[1].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    scores = scores_of(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert model.config.to_dict() == config
    assert_equal_scores(scores, scores_of(pocket_model("gpt2")))  # dropout was off


def test_model_is_left_as_it_was_after_an_error():
    model = pocket_model("llama").train()
    with pytest.raises(IndexError):
        scores_of(model, loader([(3, -200)], 1))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_are_not_recorded():
    model = pocket_model("llama")
    assert not any(tensor.requires_grad for tensor in scores_of(model).axes.values())


# Calibration data


def test_texts_are_packed_into_rows():
    tokenizer, model = pocket_tokenizer(), pocket_model("llama")
    texts = ["A quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs."]
    rows = token_rows(texts, tokenizer, max_length=16)
    scores = scores_of(model, texts, processing_class=tokenizer, max_length=16)
    assert_equal_scores(scores, scores_of(model, rows))
    assert scores.digests["data"] == rows.digest
    assert scores.settings["num_rows"] == len(rows) > 2
    assert scores.settings["num_tokens"] == rows.num_tokens
    assert scores.settings["max_length"] == 16
    assert scores.settings["packing"] is True
    other_texts = scores_of(model, texts[:1], processing_class=tokenizer, max_length=16)
    assert other_texts.digests["data"] != scores.digests["data"]
    ragged = scores_of(model, texts, processing_class=tokenizer, max_length=64, packing=False)
    assert ragged.settings["num_rows"] == 2


def test_num_rows_limits_the_rows():
    model = pocket_model("llama")
    some = scores_of(model, pocket_tokens(9, 8).tolist(), num_rows=4, max_length=8)
    assert some.settings["num_rows"] == 4
    assert_equal_scores(some, scores_of(model, pocket_tokens(9, 8)[:4].tolist(), max_length=8))


def test_rows_are_no_longer_than_the_models_positions():
    scores = scores_of(pocket_model("gpt2"), [pocket_tokens(200).tolist()])
    assert scores.settings["max_length"] == 64


def test_a_loader_has_the_digest_of_its_rows():
    model = pocket_model("llama")
    assert scores_of(model, loader(ROWS.rows, 2, "left")).digests["data"] == ROWS.digest
    assert scores_of(model).digests["data"] == ROWS.digest


def test_a_loader_without_length_or_mask():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ({"input_ids": torch.tensor(row)} for row in ROWS.rows)

    model = pocket_model("llama")
    assert_equal_scores(scores_of(model, DataLoader(Stream(), batch_size=1)), scores_of(model))


@pytest.mark.parametrize(
    ("data", "kwargs", "message"),
    [
        (None, {}, "needs calibration data"),
        ([], {}, "no documents"),
        (["", "  "], {"processing_class": True}, "no documents"),
        (["x"], {"processing_class": True}, "holds only 2 tokens, less than one row of 64"),
        (["some text"], {}, "tokenizer is needed"),
        ("some text", {}, "got the string 'some text'"),
        ([[3, 4, VOCAB] * 30], {}, f"token id {VOCAB}, but the model's vocabulary has {VOCAB}"),
        (loader([(3, 4, VOCAB)], 1), {}, f"token id {VOCAB}, but the model's vocabulary has {VOCAB}"),
        (loader([], 1), {}, "hold no tokens"),
        (DataLoader(["text"]), {}, "gave a list, expected batches with the integer tensor input_ids"),
        (DataLoader([{"text": "a"}]), {}, "gave a dict, expected batches"),
        (DataLoader([{"input_ids": [1, 2]}]), {}, "gave a list as input_ids"),
        (DataLoader(TensorDataset(torch.ones(2, 3).long())), {}, "gave a list, expected batches"),
        (loader([()], 1, extra=2), {}, "hold no tokens"),
        (ROWS, {"batch_reduction": "sum"}, "batch_reduction='sum' is unknown. Expected one of mean, l2, var"),
        (ROWS, {"sequence_reduction": "max"}, "sequence_reduction='max' is unknown"),
        (ROWS, {"metric": "wanda"}, "metric='wanda' is unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_calibration_is_refused(data, kwargs: dict, message: str):
    if kwargs.get("processing_class"):
        kwargs = {**kwargs, "processing_class": pocket_tokenizer()}
    with pytest.raises(DataError) as caught:
        estimate_importance(pocket_model("llama"), data, show_progress=False, **kwargs)
    assert message in str(caught.value)


def test_prompts_count_as_calibration_text():
    """Their tokens fill rows, too; only the completions' activations are scored."""
    pairs = [{"prompt": "the new world " * 3, "completion": "is old"} for _ in range(20)]
    given = {"processing_class": pocket_tokenizer(), "max_length": 64, "show_progress": False}
    assert estimate_importance(pocket_model("llama"), pairs, **given).settings["num_rows"] > 1


def test_a_metric_named_twice_is_summed_once():
    model = pocket_model("llama")
    once, twice = (scores_of(model, metric=metric)["activation"] for metric in (["activation"], ["activation"] * 2))
    assert_equal_scores(once, twice)


def test_a_tokenizer_is_needed_for_text_alone(tmp_path):
    pocket_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    rows = [list(row) for row in ROWS.rows]
    request = PrunerConfig(intermediate_size=0.5)
    assert prune_model(tmp_path, request, metric="magnitude").config.intermediate_size < 64
    for data in (rows, DataLoader([{"input_ids": torch.tensor(rows[0])}])):
        prune_model(tmp_path, request, calibration_data=data, show_progress=False, packing=False)
    with pytest.raises(DataError, match="tokenizer"):
        prune_model(tmp_path, request, calibration_data=["text"])
    with pytest.raises(DataError, match="target_parameters with a DataLoader"):
        prune_model(tmp_path, PrunerConfig(target_parameters=0.5), calibration_data=loader([(3, 4)], 1))


def test_unknown_or_changed_models_are_refused_before_any_compute():
    model = pocket_model("llama")
    model.model.layers[0].extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.extra"):
        estimate_importance(model, None)  # the missing data would come later
    model = pocket_model("llama")
    del model.model.layers[2]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers holds 4 layers, expected 5"):
        estimate_importance(model, None)


# Random scores


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_random_scores_are_a_function_of_the_seed(name: str):
    model = pocket_model(name)
    one, same, other = (estimate_importance(model, metric="random", seed=seed) for seed in (1, 1, 2))
    assert_equal_scores(one, same, 0)
    assert one.digest == same.digest != other.digest
    assert one.settings == {**one.settings, "metric": "random", "seed": 1}
    measured = scores_of(model)
    assert one.axes.keys() == measured.axes.keys()
    for axis, scores in one.axes.items():
        assert scores.shape == measured.axes[axis].shape
        assert torch.equal(scores.isnan(), measured.axes[axis].isnan())
    assert torch.equal(one.blocks.isnan(), measured.blocks.isnan())
    for axis, scores in one.axes.items():
        assert not torch.equal(scores, other.axes[axis])
        drawn = scores[~scores.isnan()]
        assert len(drawn.unique()) == len(drawn)
    assert one.digests["data"] is None


# Files


def test_scores_survive_saving(tmp_path: Path):
    model = pocket_model("qwen3", dtype=torch.float32)
    tokenizer = pocket_tokenizer()
    scores = estimate_importance(model, ROWS, processing_class=tokenizer, show_progress=False)
    path = scores.save_pretrained(tmp_path / "run")
    assert path == tmp_path / "run" / "scores.safetensors"
    for source in (path, tmp_path / "run", str(tmp_path / "run")):
        reread = ImportanceScores.from_pretrained(source)
        assert_equal_scores(reread, scores, 0)
        assert (reread.settings, reread.digests, reread.versions) == (scores.settings, scores.digests, scores.versions)
        assert reread.digest == scores.digest
        reread.require_model(model)
    assert scores.digests == {
        "model": model_digest(model),
        "architecture": architecture_digest(model.config),
        "tokenizer": scores.digests["tokenizer"],
        "data": ROWS.digest,
    }
    assert scores.digests["tokenizer"].startswith("sha256:")

    stored = load_file(path)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        "hidden": (torch.float32, (36,)),
        "ffn": (torch.float32, (5, 52)),
        "heads": (torch.float32, (5, 12)),
        "kv": (torch.float32, (5, 3)),
        "blocks": (torch.float32, (5, 5)),
    }
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"minitron_hf"}
        header = json.loads(file.metadata()["minitron_hf"])
    assert header.keys() == {"format", "settings", "digests", "versions", "content"}
    assert header["format"] == 1


def test_layers_without_units_survive_saving(tmp_path: Path):
    scores = estimate_importance(pocket_model("qwen2_moe", dtype=torch.float32), ROWS, show_progress=False)
    assert scores.axes["moe_ffn"].isnan().any(-1).any(-1).tolist() == [True, False, True, True, True]
    reread = ImportanceScores.from_pretrained(scores.save_pretrained(tmp_path))
    assert_equal_scores(reread, scores, 0)
    assert reread.digest == scores.digest


def test_saving_is_byte_for_byte_repeatable(tmp_path: Path):
    scores = scores_of(pocket_model("llama"))
    assert scores.save_pretrained(tmp_path / "a").read_bytes() == scores.save_pretrained(tmp_path / "b").read_bytes()


def test_files_that_hold_no_scores_are_refused(tmp_path: Path):
    with pytest.raises(MismatchError, match="No importance scores at"):
        ImportanceScores.from_pretrained(tmp_path)
    (tmp_path / "scores.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(MismatchError, match="does not hold importance scores"):
        ImportanceScores.from_pretrained(tmp_path)
    for metadata, tensors in (
        (None, {"hidden": torch.zeros(3)}),
        ({"minitron_hf": "{}"}, {"hidden": torch.zeros(3), "blocks": torch.zeros(1, 1)}),
        (
            {"minitron_hf": json.dumps({"format": 1, "settings": {}, "digests": {}, "versions": {}})},
            {"hidden": torch.zeros(3)},
        ),
        (
            {"minitron_hf": json.dumps({"format": 2, "settings": {}, "digests": {}, "versions": {}})},
            {"blocks": torch.zeros(1, 1)},
        ),
    ):
        save_file(tensors, tmp_path / "scores.safetensors", metadata=metadata)
        with pytest.raises(MismatchError, match=r"does not hold importance scores|has no format number|has format 2"):
            ImportanceScores.from_pretrained(tmp_path)


def test_scores_whose_last_bytes_were_overwritten_are_refused(tmp_path: Path):
    path = estimate_importance(pocket_model("llama"), metric="random").save_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(MismatchError, match="its tensors are not those that were written"):
        ImportanceScores.from_pretrained(path)


def test_scores_of_another_model_are_refused():
    model = pocket_model("llama")
    scores = estimate_importance(model, metric="random")
    scores.require_model(model)
    scores.require_model(model.config)
    scores.require_model(empty_model(model.config))
    scores.require_model(copy.deepcopy(model).float())  # float64 weights rounded to float32 are compared as float32
    with pytest.raises(MismatchError, match="other weights"):
        scores.require_model(pocket_model("llama", seed=1))
    for other in (pocket_model("mistral"), pocket_model("llama", num_hidden_layers=4), pocket_model("gpt2")):
        for model_or_config in (other, other.config, empty_model(other.config)):
            with pytest.raises(MismatchError, match="another architecture"):
                scores.require_model(model_or_config)


def test_digest_is_of_the_values():
    scores = estimate_importance(pocket_model("llama"), metric="random")
    changed = copy.deepcopy(scores)
    changed.axes["kv"][3, 1] += 1e-3
    assert changed.digest != scores.digest


@pytest.mark.parametrize("wrong", [{"num_rows": 0}, {"max_length": 0}, {"batch_size": -1}], ids=str)
def test_numbers_that_make_no_sense_are_named(wrong: dict):
    [(name, value)] = wrong.items()
    with pytest.raises(DataError, match=f"{name}={value!r}: expected an integer of at least 1"):
        estimate_importance(pocket_model("llama"), pocket_tokens(4, 8).tolist(), show_progress=False, **wrong)
