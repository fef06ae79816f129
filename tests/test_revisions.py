"""Branches, tags and commits on the Hub, over real HTTP: what is read from them, and what a wrong one costs."""

from __future__ import annotations

import pytest
import torch

from hub_server import hub_server_fixture, make_blob  # noqa: F401 (a fixture)
from pocket import pocket_model, pocket_tokenizer
from test_hub import client, finish, full_run, run_dir, student  # noqa: F401 (fixtures)
from test_hub_published import pushes

LOAD = """
import json, sys
import huggingface_hub
from minitron_hf import models
from minitron_hf.distillation.arguments import config_of, processing_class_of
from minitron_hf.errors import MinitronError
from minitron_hf.publishing.hub import write_teacher_metadata
from minitron_hf.pruning.stored_checkpoint import open_checkpoint
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.schema import Recipe

name, folder = "lab/teacher", sys.argv[1]
weights = {at: models.load_model(name, revision=at).lm_head.weight[0, 0].item() for at in (None, "v1")}
tokenizer = processing_class_of(models.load_config(name, revision="v1"), False)
recipe = {
    "teacher": {"model": name, "revision": "v9"}, "data": {which: f"{folder}/text.txt" for which in ("train", "eval")},
    "output_dir": f"{folder}/run", "prune": {"intermediate_size": 0.5},
}
calls = {
    "config": lambda: models.load_config(name, revision="v9"),
    "model": lambda: models.load_model(name, revision="v9"),
    "tokenizer": lambda: models.load_tokenizer(name, revision="v9"),
    "processor": lambda: models.load_processor(name, revision="v9"),
    "streamed": lambda: open_checkpoint(name, revision="v9"),
    "teacher of a trainer": lambda: config_of(name, {"revision": "v9"}),
    "recipe": lambda: check_recipe(Recipe.from_dict(recipe)),
    "card": lambda: write_teacher_metadata(folder, name, revision="v9"),
}
found = {}
for what, call in calls.items():
    try:
        found[what] = repr(call())
    except MinitronError as error:
        found[what] = f"{type(error).__name__}: {error}"
huggingface_hub.constants.HF_HUB_OFFLINE = True
try:
    models.load_config(name, revision="v2")
except MinitronError as error:
    found["not in the cache"] = f"{type(error).__name__}: {error}"
print(json.dumps({"found": found, "weights": list(weights.values()), "tokens": len(tokenizer)}))
"""


def test_a_revision_is_read_and_a_missing_one_is_named_with_its_repository(hub_server, tmp_path):
    repo, first, tokenizer = hub_server.create("lab/teacher", private=False), {}, pocket_tokenizer()
    for branch, seed in (("main", 0), ("v1", 1), ("v2", 1)):
        folder = tmp_path / branch
        model = pocket_model("llama", dtype=torch.float32, seed=seed)
        model.save_pretrained(folder)
        if branch == "v1":
            tokenizer.save_pretrained(folder)  # the newest commit has no tokenizer
        first[branch] = model.lm_head.weight[0, 0].item()
        blobs = {path.name: make_blob(path.read_bytes()) for path in folder.iterdir()}
        hub_server.commit(repo, repo.branches["main"], branch, blobs, branch)
    (tmp_path / "text.txt").write_text("a story of a cat\n" * 20)
    answer = finish(client(LOAD, tmp_path, server=hub_server, home=tmp_path / "home"))
    assert answer["weights"] == pytest.approx([first["main"], first["v1"]])
    assert first["main"] != first["v1"]
    assert answer["tokens"] == len(tokenizer)
    offline = answer["found"].pop("not in the cache")
    assert all(words in offline for words in ("HubError", "lab/teacher", "'v2'", "HF_HUB_OFFLINE", "not in the cache"))
    for what, message in answer["found"].items():
        words = ("HubError", "lab/teacher", "'v9'", "branch, tag or commit")
        assert all(word in message for word in words), (what, message)


@pytest.mark.slow
def test_a_push_to_a_missing_or_impossible_revision_names_it(run_dir, hub_server, tmp_path):  # noqa: F811
    """A missing branch is made. A pull request can only go to a branch that exists."""
    refused = [{"revision": "refs/pr/9"}, {"revision": "v9", "create_pr": True}, {"revision": "v 9"}]
    found, _ = pushes(run_dir, hub_server, tmp_path, {"revision": "v1"}, *refused)
    repo = hub_server.repos["lab/tiny-stories"]
    assert found[0] == {"oid": repo.branches["v1"]}
    for step, answer in zip(refused, found[1:], strict=True):
        assert answer["error"] == "HubError"
        assert step["revision"] in answer["message"]
    for answer in found[1:3]:
        assert all(words in answer["message"] for words in ("lab/tiny-stories", "branch, tag or commit"))
    assert set(repo.branches) == {"main", "v1"}
