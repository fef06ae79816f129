"""What leaves this machine: no token, no path, no name of its user, and no file that a run has not made."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml

from hub_server import hub_server_fixture  # noqa: F401 (a fixture)
from minitron_hf.errors import DataError, OutputError, UnsupportedModelError
from minitron_hf.models import load_model, load_tokenizer
from minitron_hf.names import public_name
from minitron_hf.privacy import is_outside_folder, public_settings, recorded_settings
from minitron_hf.pruning.planning import make_plan
from minitron_hf.pruning.stored_checkpoint import open_checkpoint
from minitron_hf.pruning.streaming import prune_checkpoint
from minitron_hf.publishing.card import write_model_card
from minitron_hf.publishing.hub import uploaded_files, write_teacher_metadata
from minitron_hf.publishing.uploads import require_no_secret, require_student
from minitron_hf.recipe import runner
from minitron_hf.recipe.run import PRIVATE_RECIPE_NAME
from minitron_hf.recipe.schema import Recipe
from minitron_hf.saving import save_processing_class
from minitron_hf.search.record import SearchRecord
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokenizer
from run_folder import write_json, write_run
from test_hub import push

TOKEN, USER, WORD = "hf_" + "AbCdEfGhIj" * 3 + "KlMn", "jdoe_at_home", "correct-horse-battery"
TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klm"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The home folder of a user, with a teacher and corpora, and files that are nobody else's business."""
    folder = tmp_path_factory.mktemp("machine") / USER
    teacher = folder / "models" / "teacher"
    pocket_model("llama", dtype=torch.float32).save_pretrained(teacher)
    pocket_tokenizer().save_pretrained(teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n")
    (teacher / "LICENSE-MODEL").write_text("Do as you like.\n")
    (folder / "passwords.txt").write_text(WORD)
    (teacher / "LICENSE").symlink_to(folder / "passwords.txt")
    (teacher / "USE_POLICY.md").symlink_to("../../passwords.txt")
    for name, texts in (("train", TEXTS), ("eval", TEXTS[::7])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture
def values(home, tmp_path):
    """A recipe whose every text is private, as far as it can be."""
    return {
        "teacher": str(home / "models" / "teacher"),
        "data": {
            "train": {"source": str(home / "train.jsonl")},
            "eval": str(home / "eval.jsonl"),
            "calibration": str(home / "train.jsonl"),
        },
        "output_dir": str(tmp_path / USER / "run"),
        "prune": {"intermediate_size": 0.5},
        "scores": {"num_rows": 8, "max_length": 16},
        "distill": {
            "max_steps": 2,
            "max_length": 16,
            "hub_token": TOKEN,
            "hub_model_id": f"{USER}/secret-project",
            "run_name": f"/home/{USER}/{WORD}",
            "project": WORD,
            "optim_args": f"path=/home/{USER}",
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "teacher_model_init_kwargs": {"token": TOKEN, "cache_dir": f"/home/{USER}/cache", "dtype": "float32"},
            "dataset_kwargs": {"skip_prepare_dataset": False},
        },
        "evaluate": {"num_rows": 4, "speed": False, "prompts": ["the old"]},
        "publish": {"repo_id": "lab/tiny", "private": False},
    }


PRIVATE = (TOKEN, USER, WORD, "/home/", "/tmp/")


def leaks(files: dict[str, bytes]) -> list[tuple[str, str]]:
    return [(name, word) for name, content in files.items() for word in PRIVATE if word.encode() in content]


def test_nothing_private_is_pushed(home, values, hub_server, tmp_path):
    """A run whose every field holds secrets, in a folder with foreign files; what arrives is scanned as bytes."""
    folder = runner.run_recipe(Recipe.from_dict(values), until="card", show_progress=False, report=lambda _: None)
    published = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert published["teacher"]["model"] == "teacher"
    assert published["data"]["train"]["source"] == "train.jsonl"
    assert published["distill"] == {
        "max_steps": 2,
        "max_length": 16,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "teacher_model_init_kwargs": {"dtype": "float32"},
        "dataset_kwargs": {"skip_prepare_dataset": False},
    }
    private = folder / PRIVATE_RECIPE_NAME
    assert Recipe.from_yaml(private) == Recipe.from_dict(values), "the other processes of a run get all of it"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    records = {path.name: path.read_bytes() for path in folder.rglob("stages/**/*.json")}
    assert "score.json" in records
    assert not [name for name, content in records.items() if TOKEN.encode() in content]
    assert json.loads((folder / "teacher.json").read_text())["legal_files"] == ["LICENSE-MODEL"]

    foreign = (
        "credentials.json",
        "wallet.safetensors",
        "model-2.safetensors",
        "keys.model",
        "notes.tiktoken",
        "LICENSE_KEY",
        ".env",
        "README.old.md",
        "plots/me.png",
        "rounds/backup/distillation.json",
        "additional_chat_templates/x.txt",
    )
    for name in foreign:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(WORD)
    answer = push(folder, hub_server, tmp_path)
    assert "error" not in answer, answer
    (commit,) = hub_server.repos["lab/tiny-stories"].history()
    arrived = {
        name: blob.content if blob.sha256 is None else (hub_server.objects / blob.sha256).read_bytes()
        for name, blob in commit.files.items()
    }
    assert {"recipe.yaml", "README.md", "distillation.json", "model.safetensors", "LICENSE-MODEL"} <= set(arrived)
    assert not set(arrived) & set(foreign)
    assert leaks(arrived) == []


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    outside = tmp_path / "outside.json"
    write_json(outside, {"word": WORD})
    for name in ("samples.json", "LICENSE"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
        with pytest.raises(OutputError, match=rf"{name} is a link to .*outside of the folder"):
            uploaded_files(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(kept)
    plots = tmp_path / "elsewhere"
    shutil.move(folder / "plots", plots)
    (plots / "search.png").write_bytes(b"PNG")
    (folder / "plots").symlink_to(plots, target_is_directory=True)
    with pytest.raises(OutputError, match="outside of the folder"):
        uploaded_files(folder)


def test_snapshots_of_the_cache_are_whole(tmp_path):
    """They are folders of links into the blobs beside them."""
    cache = tmp_path / "models--lab--teacher"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for name, text in (("LICENSE", "Apache"), ("README.md", "---\nlicense: apache-2.0\n---\n")):
        (cache / "blobs" / f"blob-of-{name}").write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/blob-of-{name}")
    (tmp_path / "word").write_text(WORD)
    (snapshot / "NOTICE").symlink_to(tmp_path / "word")
    assert not is_outside_folder(snapshot / "LICENSE", snapshot)
    assert is_outside_folder(snapshot / "NOTICE", snapshot)
    teacher = json.loads(write_teacher_metadata(tmp_path, snapshot).read_text())
    assert (teacher["license"], teacher["legal_files"]) == ("apache-2.0", ["LICENSE"])
    assert (tmp_path / "LICENSE").read_text() == "Apache"
    assert not (tmp_path / "NOTICE").exists()


def test_links_of_a_teacher_are_not_followed_out_of_its_folder(home, tmp_path):
    """Neither by the tokenizer that is saved with a student, nor by the checkpoint that is cut from files."""
    teacher = shutil.copytree(home / "models" / "teacher", tmp_path / "teacher", symlinks=True)
    shutil.move(teacher / "tokenizer.json", tmp_path / "tokenizer.json")
    (teacher / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    (teacher / "tokenizer.model").symlink_to(home / "passwords.txt")
    (teacher / "vocab.txt").symlink_to(home / "passwords.txt")
    tokenizer = load_tokenizer(teacher)
    save_processing_class(tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()
    plan = make_plan(load_model(teacher), PrunerConfig(layers_to_drop=[1]))
    prune_checkpoint(teacher, tmp_path / "student", plan, show_progress=False)
    for folder in ("saved", "student"):
        contents = {path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file()}
        assert not [name for name, content in contents.items() if WORD.encode() in content]

    (teacher / "chat_template.jinja").symlink_to(home / "passwords.txt")
    with pytest.raises(DataError, match=r"chat_template\.jinja is a link out of its folder"):
        load_tokenizer(teacher)


@pytest.mark.parametrize("name", ["../teacher/model.safetensors", "/etc/passwd", "sub/model.safetensors", 3, ""])
def test_shards_of_a_teacher_lie_in_its_folder(home, tmp_path, name):
    teacher = tmp_path / "other"
    shutil.copytree(home / "models" / "teacher", teacher, symlinks=True)
    (teacher / "model.safetensors").unlink()
    write_json(teacher / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": name}})
    with pytest.raises(UnsupportedModelError, match="expected files in its own folder"):
        open_checkpoint(teacher)


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../../etc/model-00001-of-00002.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/model-00001-of-00001.safetensors"},
        {"a": "wallet.safetensors"},
        {"a": None},
        {},
        None,
        ["model-00001-of-00001.safetensors"],
    ],
)
def test_an_index_names_parts_in_its_own_folder(tmp_path, weight_map):
    folder = write_run(tmp_path / "run")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(OutputError, match=r"expected parts such as 'model-00001-of-00002\.safetensors'"):
        require_student(folder)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["distillation.json", "README.md", "chat_template.jinja", "scores.safetensors"])
def test_a_token_in_what_would_be_published_stops_the_push(tmp_path, name):
    folder = write_run(tmp_path / "run")
    write_model_card(folder)
    path = folder / name
    if name.endswith(".safetensors"):
        from safetensors.numpy import load_file, save_file

        save_file(load_file(path), path, metadata={"minitron_hf": json.dumps({"note": f"by {TOKEN}"})})
    else:
        path.write_text((path.read_text() if path.exists() else "") + f"\n{TOKEN}\n")
    with pytest.raises(OutputError, match=f"{name} holds what looks like an access token"):
        require_no_secret(uploaded_files(folder), ())
    require_no_secret({"tokenizer.json": path}, ())  # a vocabulary may hold any word
    with pytest.raises(OutputError, match="access token"):
        require_no_secret({"tokenizer.json": path}, (TOKEN,))


def test_a_recipe_from_elsewhere_is_redacted_before_it_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text(f"teacher: /home/{USER}/m\ndistill: {{hub_token: {TOKEN}, max_steps: 3}}\n")
    write_model_card(folder)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == {"teacher": "m", "distill": {"max_steps": 3}}
    assert TOKEN not in (folder / "README.md").read_text()


def test_a_search_records_no_secret(tmp_path):
    settings = {"space": {"hidden_size": [0.5]}, "distillation": {"hub_token": TOKEN, "learning_rate": 0.1}}
    SearchRecord(tmp_path, "inputs", settings, show_progress=False).save()
    found = json.loads((tmp_path / "search.json").read_text())["settings"]
    assert found == {"space": {"hidden_size": [0.5]}, "distillation": {"learning_rate": 0.1}}


@pytest.mark.parametrize(
    ("settings", "public"),
    [
        ({"optim": "adamw_torch", "optim_args": "a=b"}, {"optim": "adamw_torch"}),
        ({"target_modules": ["q", "/home/me/v"], "r": 8}, {"target_modules": ["q", "v"], "r": 8}),
        ({"target_modules": {"b", "a"}}, {"target_modules": ["a", "b"]}),
        ({"tasks": ["piqa", "/home/me/task.yaml", TOKEN]}, {"tasks": ["piqa", "task.yaml"]}),
        ({"revision": TOKEN, "seed": None}, {"seed": None}),
        ({TOKEN: 1, "alpha_pattern": {"x": 2}}, {"alpha_pattern": {"x": 2}}),
        ({"source": "s3://key:word@host/bucket/data.jsonl"}, {"source": "data.jsonl"}),
        ({"source": r"C:\Users\me\data.jsonl"}, {"source": "data.jsonl"}),
        ({"prompts": ["/bin/ls is a", "~ means", TOKEN]}, {"prompts": ["/bin/ls is a", "~ means"]}),
        ({"dtype": torch.float16, "x": {"token": "x", "n": 1}}, {"dtype": "torch.float16", "x": {"n": 1}}),
    ],
)
def test_settings_are_published_by_an_allow_list(settings, public):
    assert public_settings(settings) == public
    assert public_settings(public) == public, "what is public stays as it is"


def test_records_tell_changes_without_telling_what():
    first, second = (recorded_settings({"hub_token": token, "optim": "sgd"}) for token in (TOKEN, TOKEN[::-1]))
    assert first["optim"] == second["optim"] == "sgd"
    assert first["hub_token"] != second["hub_token"]
    assert TOKEN not in str(first)


def test_a_home_folder_has_no_name(monkeypatch, tmp_path):
    home = tmp_path / USER
    (home / "teacher").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert public_name(home) is None
    assert public_name("~/teacher") == "teacher"
    monkeypatch.chdir(home)
    assert public_name(".") is None
    assert public_name("x" * 10_000) == "x" * 10_000
