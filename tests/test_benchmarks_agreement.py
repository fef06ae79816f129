"""Our readings of other pruners' criteria keep what the authors' code keeps, on a small real model.

What their code keeps is stored in `benchmarks/results/real/peers/agreement.json`, with commits, functions and changes.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.real import peer_criteria, peer_starts, peers, slicegpt
from benchmarks.real.peer_students import unit_parameters

from minitron_hf import count_parameters, load_model, load_tokenizer, token_rows
from minitron_hf.families import spec_for

DATA = Path(os.environ.get("MINITRON_TEST_DATA", ""))
AGREEMENT = json.loads((peers.RESULTS / peers.AGREEMENT_NAME).read_text())
CRITERIA = AGREEMENT["criteria"]
AXES = {"groups": "kv", "neurons": "ffn"}
#: Part of the largest score below which two scores are a tie: their code and ours round differently.
TIE = 3e-4

needs_data = pytest.mark.skipif(
    not (DATA / "models" / "stories260K").is_dir(), reason="needs MINITRON_TEST_DATA with models/stories260K"
)


@pytest.fixture(scope="module")
def model():
    return load_model(DATA / "models" / "stories260K", dtype=torch.float32)


@pytest.fixture(scope="module")
def repeated(model):
    """The same function without grouped queries: every KV head repeated for its query heads."""
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    groups, each = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    for name, values in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = values.unflatten(0, (groups, -1)).repeat_interleave(each, 0).flatten(0, 1)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.load_state_dict(state)
    made.tie_weights()
    return made.eval()


@pytest.fixture(scope="module")
def rows():
    given = AGREEMENT["rows"]
    lines = (DATA / "text" / given["source"]).read_text().splitlines()
    texts, tokenizer = [json.loads(line)["text"] for line in lines], load_tokenizer(DATA / "models" / "stories260K")
    found = token_rows(texts, tokenizer, max_length=given["max_length"], num_rows=given["num_rows"])
    assert found.digest == given["digest"]
    return found


def authors_masks(criterion, share, sizes):
    """What the authors' code keeps at a share: axis → bool [L, units]."""
    found = {}
    for name, axis in AXES.items():
        layers = CRITERIA[criterion]["kept"][share][name]
        found[axis] = torch.zeros(len(layers), sizes[axis], dtype=torch.bool)
        for layer, units in enumerate(layers):
            found[axis][layer, list(map(int, units.split()))] = True
    return found


def assert_kept(scores, authors):
    """The authors' units are those of the highest scores, up to ties at the threshold."""
    for one, kept in zip(scores, authors, strict=True):
        ours = peer_starts.top(one, int(kept.sum()))
        threshold = one[ours].min()
        assert ((one - threshold).abs()[ours != kept] <= TIE * one.abs().max()).all()


@needs_data
def test_block_influence_ranks_layers_as_theirs(model, rows):
    order = peer_criteria.block_influence(model, rows).argsort().tolist()
    assert order == CRITERIA["block_influence"]["least_important_first"]


@needs_data
def test_angular_distances_choose_their_blocks(model, rows):
    for count, dropped in CRITERIA["angular_distance"]["dropped"].items():
        distances = peer_criteria.angular_distances(model, rows, int(count))
        first = 1 + int(distances[1:].argmin())
        assert list(range(first, first + int(count))) == dropped


@needs_data
@pytest.mark.parametrize("share", ["0.3", "0.5"])
@pytest.mark.parametrize("criterion", ["taylor_element", "taylor_vector", "flap_alike", "wanda_sp", "flap_all_layers"])
def test_units_are_those_of_their_code(repeated, rows, criterion, share):
    spec = spec_for(repeated.config)
    sizes = spec.sizes(repeated.config)
    authors = authors_masks(criterion, share, sizes)
    if criterion.startswith("taylor"):
        scores = peer_criteria.group_taylor(repeated, rows, by_element=criterion == "taylor_element")
    elif criterion == "wanda_sp":
        scores = peer_starts.wanda_scores(
            repeated, rows, {axis: int(masks[0].sum()) for axis, masks in authors.items()}
        )
    else:
        metrics, _ = peer_starts.flap_scores(repeated, rows)
        scores = {
            axis: [peer_criteria.over_units(one, peer_criteria.input_units(spec, axis, sizes)) for one in layers]
            for axis, layers in metrics.items()
        }
    if criterion == "flap_all_layers":
        scores, each = peer_starts.standardised(repeated, metrics), unit_parameters(repeated.config)
        gone = sum(each[axis] * int((~masks).sum()) for axis, masks in authors.items())
        chosen = peer_starts.flap_choice(scores, each, gone)
        num_other = sum(int((torch.stack(chosen[axis]) != authors[axis]).sum()) for axis in authors)
        assert num_other <= 2  # a tie
        every, kept = ([torch.cat([one[axis].flatten() for axis in authors])] for one in (scores, authors))
        assert_kept(every, kept)
        return
    for axis in authors:
        assert_kept(scores[axis], authors[axis])


@needs_data
@pytest.mark.parametrize("width", ["48", "32"])
def test_sliced_models_are_theirs(model, rows, width):
    student = slicegpt.sliced(model, rows, int(width))
    tokens = torch.tensor([list(row) for row in rows.rows])
    with torch.no_grad():
        logits = student(input_ids=tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss) == pytest.approx(CRITERIA["slicegpt"]["cross_entropy"][width], abs=1e-3)
    assert sum(one.numel() for one in student.parameters()) == CRITERIA["slicegpt"]["parameters"][width]


@needs_data
def test_repeated_heads_compute_the_same(model, repeated, rows):
    tokens = torch.tensor([list(row) for row in rows.rows[:2]])
    with torch.no_grad():
        torch.testing.assert_close(repeated(tokens).logits, model(tokens).logits, rtol=0, atol=1e-3)
    assert count_parameters(repeated) > count_parameters(model)


def test_every_criterion_says_where_it_comes_from():
    for criterion, entry in CRITERIA.items():
        assert entry.keys() >= {"agrees", "repository", "commit", "function", "how"}, criterion
        assert len(entry["commit"]) == 40
    assert {method.criterion for method in peer_starts.METHODS.values()} - {None} == set(CRITERIA)
