"""Public names that have a new one: the old one does the same for one release, with a warning."""

from __future__ import annotations

from dataclasses import replace

import pytest

import minitron_hf
from minitron_hf.families import families
from minitron_hf.families.base import decoder
from minitron_hf.families.rules import ConfigRules, StreamRules
from minitron_hf.families.spec import Wrapper
from minitron_hf.pruning.candidates import Candidate
from minitron_hf.recipe.settings import require_search
from minitron_hf.sizes.request import PrunerConfig


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


def test_old_names_of_searches():
    with pytest.warns(DeprecationWarning, match="pruned_kl"):
        candidate = Candidate(PrunerConfig(hidden_size=8), 9, proxy={"value": 1.0, "stderr": 0.1})
    with pytest.warns(DeprecationWarning, match="kl_above_best"):
        assert candidate.behind is None
    assert Candidate.from_dict(candidate.to_dict()) == candidate
    with pytest.warns(DeprecationWarning, match="num_pruned"), pytest.raises(TypeError, match="missing"):
        minitron_hf.search_architectures(num_proxied=2)
    require_search({"space": {"hidden_size": [8]}, "max_parameters": 9, "num_proxied": 2}, "search.")
