"""The other width metrics against naive computations: explicit products, gradients of weights, cut tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from minitron_hf.errors import UnsupportedModelError
from minitron_hf.families import spec_for
from minitron_hf.families.tensors import named_tensors
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.surgery import cut_tensor
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import POCKETS, float64_throughout, pocket_model, residual_norms
from test_importance import ROWS, assert_close, assert_equal_scores, loader, naive_reduce, scores_of

#: Pocket → the modules that make the neurons of its MLP, and how many parts each of them writes.
MAKERS = {
    "llama": (("mlp.gate_proj", 1), ("mlp.up_proj", 1)),
    "phi3": (("mlp.gate_up_proj", 2),),
    "gpt2": (("mlp.c_fc", 1),),
    "nemotron": (("mlp.up_proj", 1),),
}
WATCHED = ["activation", "pre_activation", "contribution", "activation_range"]


def caught_by_row(name: str, paths: list[str], read: Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]) -> dict:
    """Per path and row, what `read` makes of the module's inputs and output, each row run by itself."""
    model = pocket_model(name)
    found: dict[str, list] = {path: [] for path in paths}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: found[path].append(read(module, args, output))
        )
    for row in ROWS.rows:
        with torch.no_grad(), float64_throughout():
            model(torch.tensor([row]))
    return found


def reduced(rows: list[torch.Tensor], batch: str = "l2", sequence: str = "mean") -> torch.Tensor:
    """Per row [tokens, units] → [units]."""
    return torch.tensor(
        [
            naive_reduce((naive_reduce(row[:, unit], sequence) for row in rows), batch)
            for unit in range(rows[0].shape[1])
        ],
        dtype=torch.float64,
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reductions", [("l2", "mean"), ("mean", "l2"), ("var", "var")], ids="-".join)
@pytest.mark.parametrize("name", MAKERS)
def test_neurons_before_the_nonlinearity(name: str, reductions: tuple[str, str]):
    batch, sequence = reductions
    scores = scores_of(
        pocket_model(name), metric="pre_activation", batch_reduction=batch, sequence_reduction=sequence, batch_size=2
    )
    layers = POCKETS[name].layers
    for layer in range(POCKETS[name].config.num_hidden_layers):
        total = torch.zeros(scores.axes["ffn"].shape[1], dtype=torch.float64)
        for path, parts in MAKERS[name]:
            path = f"{layers}.{layer}.{path}"
            rows = caught_by_row(name, [path], lambda _, __, output: output[0])[path]
            for part in range(parts):
                total += reduced([row.chunk(parts, -1)[part] for row in rows], batch, sequence)
        assert_close(scores.axes["ffn"][layer], total, f"ffn of layer {layer}", rtol=1e-10)
    plain = scores_of(pocket_model(name), batch_reduction=batch, sequence_reduction=sequence)
    assert_close(scores.axes["heads"], plain.axes["heads"], "heads", rtol=1e-12)
    assert not torch.allclose(scores.axes["ffn"], plain.axes["ffn"])


def expert_inputs(name: str) -> dict[str, list]:
    path = [
        f"{POCKETS[name].layers}.{layer}.{POCKETS[name].experts}"
        for layer in range(POCKETS[name].config.num_hidden_layers)
    ]
    modules = dict(pocket_model(name).named_modules())
    return caught_by_row(
        name, [p for p in path if p in modules], lambda module, args, _: (module, *(arg.detach() for arg in args))
    )


@pytest.mark.parametrize("metric", ["pre_activation", "contribution"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_neurons_of_experts(name: str, metric: str):
    scores = scores_of(pocket_model(name), metric=metric, batch_size=2)
    for path, rows in expert_inputs(name).items():
        layer = int(path.split(".")[2])
        module = rows[0][0]
        for expert in range(len(module.down_proj)):
            parts: list[list[torch.Tensor]] = [[], []]
            for _, hidden, index, weights in rows:
                gates = torch.zeros(len(hidden), dtype=torch.float64)
                for token, choice in (index == expert).nonzero().tolist():
                    gates[token] = weights[token, choice]
                gate, up = (hidden @ module.gate_up_proj[expert].T).chunk(2, -1)
                if metric == "pre_activation":
                    parts[0].append((gates[:, None] * gate).detach())
                    parts[1].append((gates[:, None] * up).detach())
                else:
                    inner = gates[:, None] * module.act_fn(gate) * up
                    columns = (inner[:, None, :] * module.down_proj[expert]).norm(dim=1)
                    parts[0].append(columns.detach())
            expected = sum(reduced(part) for part in parts if part)
            assert_close(scores.axes["moe_ffn"][layer, expert], expected, f"{path} {expert}", rtol=1e-10)
    plain = scores_of(pocket_model(name))
    assert_close(scores.axes["experts"], plain.axes["experts"], "experts", rtol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_contributions_are_what_a_unit_adds_to_the_output(name: str):
    """Every head, group and neuron by an explicit product with its columns of the projection."""
    pocket, config = POCKETS[name], POCKETS[name].config
    scores = scores_of(pocket_model(name), metric="contribution", batch_size=2)
    axes = {"ffn": (pocket.mlp_out, config.intermediate_size if name == "llama" else scores.axes["ffn"].shape[1])}
    axes["heads"] = (pocket.attention_out, config.num_attention_heads)
    if pocket.kv:
        axes["kv"] = (pocket.attention_out, config.num_key_value_heads)
    for axis, (module, count) in axes.items():
        for layer in range(config.num_hidden_layers):
            path = f"{pocket.layers}.{layer}.{module}"

            def read(module: nn.Module, args: tuple, _: torch.Tensor, count: int = count) -> torch.Tensor:
                x = args[0][0].detach()
                weight = module.weight if x.shape[1] != module.weight.shape[1] or name == "gpt2" else module.weight.T
                pieces = zip(x.chunk(count, 1), weight.detach().chunk(count, 0), strict=True)
                return torch.stack([(piece @ rows).norm(dim=-1) for piece, rows in pieces], 1)

            expected = reduced(caught_by_row(name, [path], read)[path])
            assert_close(scores.axes[axis][layer], expected, f"{axis} {layer}", rtol=1e-9)


def test_contributions_of_channels():
    model = pocket_model("llama")
    scores = scores_of(model, metric="contribution")
    total = torch.zeros(36, dtype=torch.float64)
    for path in residual_norms("llama", model):
        if path == "model.norm":
            weight = model.lm_head.weight.detach().norm(dim=0)
        else:
            block = model.get_submodule(path.rpartition(".")[0])
            readers = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
            matrices = [module.weight for module in (*readers, block.mlp.gate_proj, block.mlp.up_proj)]
            matrices += [block.self_attn.o_proj.weight.T, block.mlp.down_proj.weight.T]
            weight = torch.cat(matrices).detach().norm(dim=0)
        rows = caught_by_row("llama", [path], lambda _, __, output: output[0])[path]
        total += reduced([row * weight for row in rows])
    assert_close(scores.axes["hidden"], total, "hidden", rtol=1e-10)


def shares(*matrices: torch.Tensor) -> torch.Tensor:
    """Largest minus smallest weight of every unit, [U, elements] each, over the largest range; summed."""
    ranges = [matrix.flatten(1).amax(1) - matrix.flatten(1).amin(1) for matrix in matrices]
    return sum(each / each.max() for each in ranges)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_ranges_of_weights(name: str):
    """Fused projections count as the projections that they hold."""
    model, config = pocket_model(name), POCKETS[name].config
    scores, plain = (scores_of(model, metric=metric, batch_size=2) for metric in ("activation_range", "activation"))
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        if name == "llama":
            q, k, v = (each.weight.detach() for each in (attention.q_proj, attention.k_proj, attention.v_proj))
            gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
        else:
            width = attention.head_dim
            q, k, v = attention.qkv_proj.weight.detach().split([heads * width, kv * width, kv * width])
            gate, up = mlp.gate_up_proj.weight.detach().chunk(2)
        o = attention.o_proj.weight.detach().T
        expected = {
            "ffn": shares(gate, up, mlp.down_proj.weight.detach().T),
            "heads": shares(*(each.unflatten(0, (heads, -1)) for each in (q, o))),
            "kv": shares(*(each.unflatten(0, (kv, -1)) for each in (q, k, v, o))),
        }
        for axis, factor in expected.items():
            found = scores.axes[axis][index].flatten()
            assert_close(found, plain.axes[axis][index].flatten() * factor, f"{axis} of layer {index}", rtol=1e-6)
    assert_close(scores.axes["hidden"], plain.axes["hidden"], "hidden", rtol=1e-12)


def test_ranges_of_the_weights_of_experts():
    model = pocket_model("mixtral")
    scores, plain = (scores_of(model, metric=metric) for metric in ("activation_range", "activation"))
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.detach().chunk(2, 1)
        down = experts.down_proj.detach().mT
        by_expert = shares(gate, up, down, layer.mlp.gate.weight.detach())
        by_neuron = shares(*(each.flatten(0, 1) for each in (gate, up, down))).unflatten(0, gate.shape[:2])
        for axis, factor in {"experts": by_expert, "moe_ffn": by_neuron}.items():
            assert_close(scores.axes[axis][index], plain.axes[axis][index] * factor, f"{axis} {index}", rtol=1e-6)


@pytest.mark.parametrize("batch_reduction", ["l2", "mean", "var"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_taylor_is_weight_times_its_gradient(name: str, batch_reduction: str):
    """Row by row, gradients of the output projections' weights (and of norms) by autograd."""
    pocket, model = POCKETS[name], pocket_model(name)
    layers, heads = model.get_submodule(pocket.layers), model.config.num_attention_heads
    found: dict[str, list] = {}
    for row in ROWS.rows:
        model.zero_grad()
        ids = torch.tensor([row])
        with float64_throughout():
            log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
            (-log_probabilities[range(len(row) - 1), list(row[1:])].mean()).backward()

        def column_terms(module: nn.Module) -> torch.Tensor:
            terms = module.weight * module.weight.grad
            return terms.sum(1) if name == "gpt2" else terms.sum(0)

        values: dict[str, torch.Tensor] = {
            "heads": torch.stack(
                [column_terms(m.get_submodule(pocket.attention_out)).view(heads, -1).sum(1) for m in layers]
            ),
            "hidden": sum(
                p * p.grad for path in residual_norms(name, model) for p in model.get_submodule(path).parameters()
            ),
        }
        if pocket.kv:
            groups = model.config.num_key_value_heads
            values["kv"] = values["heads"].view(len(layers), groups, -1).sum(-1)
        if pocket.mlp_out:
            values["ffn"] = torch.stack([column_terms(m.get_submodule(pocket.mlp_out)) for m in layers])
        if pocket.experts:
            down = [m.get_submodule(pocket.experts).down_proj for m in layers]
            values["moe_ffn"] = torch.stack([(p * p.grad).sum(1) for p in down])
            values["experts"] = values["moe_ffn"].sum(-1)
        for axis, terms in values.items():
            found.setdefault(axis, []).append(terms.detach())
    scores = scores_of(pocket_model(name), metric="taylor", batch_reduction=batch_reduction, batch_size=2)
    assert scores.axes.keys() == found.keys()
    for axis, rows in found.items():
        table = torch.stack(rows)
        expected = {
            "l2": table.square().sum(0).sqrt(),
            "mean": table.abs().mean(0),
            "var": table.var(0, correction=0),
        }[batch_reduction]
        assert_close(scores.axes[axis], expected, axis, rtol=1e-8, atol=1e-13)


def test_taylor_of_blocks_is_the_slope_towards_their_removal():
    """The derivative of the loss at t = 0 where a block's output is moved by −t times what it adds, numerically."""
    row = ROWS.rows[0]
    scores = scores_of(pocket_model("llama"), [list(row)], metric="taylor", max_length=9)
    for first, last in ((0, 0), (1, 3), (2, 4)):
        losses = []
        for t in (-1e-5, 1e-5):
            model = pocket_model("llama")
            states: list[torch.Tensor] = []
            model.model.layers[first].register_forward_pre_hook(lambda _, args, states=states: states.append(args[0]))
            model.model.layers[last].register_forward_hook(
                lambda _, __, output, states=states, t=t: output - t * (output - states[0])
            )
            with torch.no_grad(), float64_throughout():
                losses.append(float(model(torch.tensor([row]), labels=torch.tensor([row])).loss))
        slope = abs(losses[1] - losses[0]) / 2e-5
        assert math.isclose(float(scores.blocks[first, last]), slope, rel_tol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "phi3", "qwen2_moe"])
def test_magnitude_is_what_goes_with_a_unit(name: str):
    """‖teacher‖² − ‖teacher without the unit‖², by the code that cuts."""
    model = pocket_model(name)
    spec = spec_for(model.config)
    sizes = spec.sizes(model.config)
    scores = scores_of(model, metric="magnitude")
    members = {outer: (inner, sizes[inner] // sizes[outer]) for inner, outer in spec.groups}
    for axis, table in scores.axes.items():
        assert table.shape == spec.units(axis, model.config)
        within = spec.axis[axis].within
        for layer in [None] if not spec.axis[axis].per_layer else [1, sizes["layers"] - 1]:
            for unit in (0, sizes[axis] - 1):
                others = np.delete(np.arange(sizes[axis]), unit)
                kept = {axis: others}
                if axis in members:
                    inner, each = members[axis]
                    kept[inner] = np.concatenate([group * each + np.arange(each) for group in others])
                if within:
                    rows = np.tile(np.arange(sizes[axis] - 1), (sizes[within], 1))
                    rows[2] = others
                    last = np.tile(np.arange(sizes[axis] - 1), (sizes[within], 1))
                    last[2] = np.arange(sizes[axis] - 1)
                gone = 0.0
                for path, tensor in named_tensors(model).items():
                    tensor = tensor.detach()
                    pattern, where = spec.locate(path)
                    if layer is not None and where != layer:
                        continue
                    dimensions = spec.dimensions[pattern]
                    if within:
                        # Both lose one neuron everywhere; in expert 2 it is `unit` in one and the last in the other.
                        one, other = (
                            cut_tensor(tensor, dimensions, spec.axis, sizes, {axis: r}).square().sum()
                            for r in (last, rows)
                        )
                        gone += float(one - other)
                    else:
                        left = cut_tensor(tensor, dimensions, spec.axis, sizes, kept)
                        gone += float(tensor.square().sum() - left.square().sum())
                if within:
                    expected = table[layer, 2, unit] ** 2 - table[layer, 2, sizes[axis] - 1] ** 2
                    if not table[layer].isnan().any():
                        assert math.isclose(float(expected), gone, rel_tol=1e-6, abs_tol=1e-9), (axis, layer, unit)
                    continue
                score = table[unit] if layer is None else table[layer, unit]
                if gone == 0:
                    assert score.isnan()
                else:
                    assert math.isclose(float(score) ** 2, gone, rel_tol=1e-6), (axis, layer, unit)
    for first, last in ((0, 0), (1, 2)):
        squares = sum(
            float(tensor.detach().square().sum())
            for path, tensor in named_tensors(model).items()
            if (where := spec.locate(path)[1]) is not None and first <= where <= last
        )
        assert math.isclose(float(scores.blocks[first, last]) ** 2, squares, rel_tol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_neither_batches_nor_padding_matter(name: str):
    metrics = [*WATCHED, "taylor"]
    expected = scores_of(pocket_model(name), loader(ROWS.rows, 1), metric=metrics)
    found = scores_of(pocket_model(name), loader(ROWS.rows, 5, "left", 3), metric=metrics)
    for metric in metrics:
        assert_equal_scores(found[metric], expected[metric], 1e-9)


def test_metrics_asked_for_together_share_one_pass():
    model = pocket_model("qwen2_moe")
    calls = []
    model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    together = scores_of(model, metric=["contribution", "random", "activation", "magnitude", "pre_activation"])
    assert len(calls) == 1
    assert list(together) == ["contribution", "random", "activation", "magnitude", "pre_activation"]
    for metric, scores in together.items():
        alone = scores_of(model, metric=metric)
        assert alone.digest == scores.digest
        assert (alone.settings, alone.digests) == (scores.settings, scores.digests)
        with float64_throughout():
            make_plan(model, PrunerConfig(hidden_size=24, num_hidden_layers=4), scores)


def test_taylor_leaves_no_trace_and_forms_no_gradient_of_a_weight():
    model = pocket_model("llama").train()
    model.lm_head.weight.requires_grad_(False)
    scores = scores_of(model, metric="taylor")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(tensor.requires_grad for tensor in scores.axes.values())
    assert "sequence_reduction" not in scores.settings


def test_taylor_refuses_experts_that_are_not_computed_here(monkeypatch: pytest.MonkeyPatch):
    model = pocket_model("mixtral")
    for layer in model.model.layers:
        monkeypatch.delattr(type(layer.mlp.experts), "has_post_expert_norm", raising=False)
        monkeypatch.delattr(layer.mlp.experts, "has_post_expert_norm", raising=False)
    with pytest.raises(UnsupportedModelError, match="a metric that reads no gradients"):
        estimate_importance(model, ROWS, metric="taylor", show_progress=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
