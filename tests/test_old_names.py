"""Public names that have a new one: the old one does the same for one release, with a warning."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

import minitron_hf
from minitron_hf.cli.options import _settings
from minitron_hf.errors import DataError
from minitron_hf.families import families
from minitron_hf.families.base import decoder
from minitron_hf.families.rules import ConfigRules, StreamRules
from minitron_hf.families.wrapper import Wrapper
from minitron_hf.pruning.candidates import Candidate
from minitron_hf.recipe.schema import Recipe
from minitron_hf.recipe.stages import _scoring_settings
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokens


def test_old_public_functions():
    with pytest.warns(DeprecationWarning, match="carry_out is deprecated .* use prune_with_plan"):
        assert minitron_hf.carry_out is minitron_hf.prune_with_plan
    assert "carry_out" not in dir(minitron_hf)


def test_old_fields_of_a_request():
    with pytest.warns(DeprecationWarning, match="nonuniform_sizes"):
        request = PrunerConfig(uneven=["intermediate_size"])
    assert request == PrunerConfig(nonuniform_sizes=["intermediate_size"])
    with pytest.warns(DeprecationWarning, match="nonuniform_sizes"):
        assert request.uneven == ["intermediate_size"]
    with pytest.warns(DeprecationWarning, match="nonuniform_sizes"):
        assert PrunerConfig.from_dict({"uneven": ["intermediate_size"]}) == request
    assert "uneven" not in request.to_dict()


def test_old_fields_of_family_tables():
    llama = families()["llama"]
    with pytest.warns(DeprecationWarning, match="hook_points"):
        assert llama.taps == llama.hook_points
    with pytest.warns(DeprecationWarning, match="equivalent_classes"):
        assert replace(llama, sisters=()).equivalent_classes == ()
    with pytest.warns(DeprecationWarning, match="mlp_hook_points"):
        old = decoder("other", mlp_taps={"ffn": "mlp.c_proj"})
    assert old == decoder("other", mlp_hook_points={"ffn": "mlp.c_proj"})
    with pytest.warns(DeprecationWarning, match="stream_writers"):
        assert StreamRules(writers=("a",)) == StreamRules(stream_writers=("a",))
    with pytest.warns(DeprecationWarning, match="size_multipliers"):
        assert ConfigRules(widened=()) == ConfigRules()
    with pytest.warns(DeprecationWarning, match="unpruned_prefixes"):
        assert Wrapper("a", prefix="b.", opaque=("c.",)).unpruned_prefixes == ("c.",)


def test_old_and_new_name_together_are_refused():
    with pytest.raises(DataError, match=r"estimate_importance\(num_samples=…\) is the old name of num_rows=…"):
        minitron_hf.estimate_importance(None, num_samples=2, num_rows=3)


def test_old_name_of_the_number_of_rows(tmp_path):
    """In Python, in recipes and after --set. Finished scores of a recipe stay valid."""
    model, rows = pocket_model("llama"), [pocket_tokens(8, seed=seed).tolist() for seed in range(6)]
    with pytest.warns(DeprecationWarning, match="num_samples.* use num_rows"):
        scores = minitron_hf.estimate_importance(model, rows, num_samples=2, max_length=8)
    assert scores.settings["num_rows"] == 2
    request = PrunerConfig(intermediate_size=0.5, multiple_of=1, repair="least_squares")
    with pytest.warns(DeprecationWarning, match=r"prune_model\(num_samples"):
        old = minitron_hf.prune_model(model, request, calibration_data=rows, num_samples=2, max_length=8)
    new = minitron_hf.prune_model(model, request, calibration_data=rows, num_rows=2, max_length=8)
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    with pytest.warns(DeprecationWarning, match=r"prune_with_plan\(num_samples"):
        minitron_hf.prune_with_plan(model, new.pruning_plan, rows, num_samples=2, max_length=8)
    (tmp_path / "a.txt").write_text("text")
    data = {"train": str(tmp_path / "a.txt"), "eval": str(tmp_path / "a.txt")}
    recipes = []
    for scores in ({"num_samples": 8}, {"num_rows": 8}):
        round_ = {"prune": {"hidden_size": 8}, "scores": scores}
        values = {"teacher": "t", "data": data, "output_dir": "o", "scores": scores, "rounds": [round_]}
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            recipes.append(Recipe.from_dict(values))
        assert sorted(str(one.message).partition(" ")[0] for one in found) == (
            ["rounds.1.scores.num_samples", "scores.num_samples"] if "num_samples" in scores else []
        )
    assert recipes[0] == recipes[1]
    assert recipes[0].in_round(1).scores == {"num_rows": 8}
    assert _scoring_settings(recipes[0])["scores"] == {"num_samples": 8}
    with pytest.raises(DataError, match=r"scores\.num_samples is the old name of scores\.num_rows"):
        Recipe.from_dict(values | {"scores": {"num_samples": 8, "num_rows": 8}})
    with pytest.warns(DeprecationWarning, match="--set num_rows"):
        assert _settings(["num_samples=3"], {"num_rows": int}, "arguments") == {"num_rows": 3}


def test_old_names_of_searches():
    with pytest.warns(DeprecationWarning, match="pruned_kl"):
        candidate = Candidate(PrunerConfig(hidden_size=8), 9, proxy={"value": 1.0, "stderr": 0.1})
    with pytest.warns(DeprecationWarning, match="kl_above_best"):
        assert candidate.behind is None
    assert Candidate.from_dict(candidate.to_dict()) == candidate
    with pytest.warns(DeprecationWarning, match="num_pruned"), pytest.raises(TypeError, match="missing"):
        minitron_hf.search_architectures(num_proxied=2)
    values = {"teacher": "t", "data": {"train": "a.txt", "eval": "a.txt"}, "output_dir": "o"}
    search = {"space": {"hidden_size": [8]}, "max_parameters": 9}
    with pytest.warns(DeprecationWarning, match=r"search\.num_proxied"):
        made = Recipe.from_dict(values | {"search": {**search, "num_proxied": 2}})
    assert made.search == {**search, "num_pruned": 2}
    with pytest.raises(DataError, match=r"search\.num_proxied is the old name of search\.num_pruned"):
        Recipe.from_dict(values | {"search": {**search, "num_proxied": 2, "num_pruned": 3}})
