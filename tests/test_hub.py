"""Publishing over real HTTP: the real `huggingface_hub` client against a local server that speaks its endpoints.

Every client runs in a process of its own (`hub_clients`).
"""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from hub_clients import Client, Warm
from hub_server import (
    HubServer,
    card_metadata,
    check_card,
    hub_server_fixture,  # noqa: F401 (a fixture)
    make_blob,
)
from minitron_hf.errors import HubError, MissingDependencyError, OutputError
from minitron_hf.files import is_storage_error, replacing_file, replacing_folder
from minitron_hf.publishing.card import render_model_card
from minitron_hf.publishing.hub import push_student_to_hub, uploaded_files, write_teacher_metadata
from minitron_hf.publishing.hub_errors import hub_errors
from minitron_hf.publishing.report import render_report
from run_folder import KEPT, VOCAB, write_json, write_run

PUSH = """
import json, sys
from minitron_hf.errors import MinitronError
from minitron_hf.publishing.hub import push_student_to_hub
try:
    info = push_student_to_hub(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
    print(json.dumps({"oid": info.oid, "pr": info.pr_url}))
except MinitronError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""

LOAD = """
import json, sys
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("a story of a cat", return_tensors="pt").input_ids
with torch.no_grad():
    torch.save({"ids": ids, "logits": model(ids).logits}, sys.argv[2])
print(json.dumps({"snapshot": snapshot_download(sys.argv[1])}))
"""


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A complete run folder around a two-layer student with a tokenizer, and the model itself."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = write_run(tmp_path_factory.mktemp("published") / "run")
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=KEPT["hidden"],
        intermediate_size=KEPT["ffn"],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    words = ["[UNK]", "[EOS]", "a", "story", "of", "cat"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]").save_pretrained(folder)
    # What a run leaves behind and nobody should see.
    for name in ("checkpoint-10/model.safetensors", "checkpoint-10/optimizer.pt", "pruned/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"working file")
    (folder / "stages").mkdir()
    write_json(folder / "stages" / "score.json", {"digest": "x"})
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", ".README.md.x", "model.safetensors.tmp"):
        (folder / name).write_text("{}")
    return folder, model


@pytest.fixture
def full_run(student, tmp_path):
    """A private copy of the complete run folder."""
    return shutil.copytree(student[0], tmp_path / "run")


@pytest.fixture
def run_dir(full_run):
    """The run folder without what the plots are drawn from: drawing them takes most of the time of a push."""
    for name in PLOTTED_FROM:
        (full_run / name).unlink()
    record = json.loads((full_run / "evaluation.json").read_text())
    for model in record["models"].values():
        model.pop("decode_tokens_per_second", None)
    write_json(full_run / "evaluation.json", record)
    shutil.rmtree(full_run / "plots")
    return full_run


def client(code, *arguments, server: HubServer, home: Path, token: str | None = "hf_writer") -> Client:
    """Python code that runs in a process of its own, with the local Hub as the Hub."""
    return Client(warm(server.url), code, [*map(str, arguments)], home, {"HF_TOKEN": token} if token else {})


@functools.cache
def warm(endpoint: str) -> Warm:
    return Warm(endpoint)


def finish(process: Client) -> dict:
    """What the client printed last; its errors are answers too, a traceback is not."""
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]) | {"stderr": err}


def push(run_dir, server, tmp_path, repo_id="lab/tiny-stories", token: str | None = "hf_writer", **options) -> dict:
    return finish(
        client(PUSH, run_dir, repo_id, json.dumps(options), server=server, home=tmp_path / "home", token=token)
    )


EXPECTED = {
    ".gitattributes",
    "LICENSE",
    "README.md",
    "config.json",
    "distillation.json",
    "evaluation.json",
    "generation_config.json",
    "hub.json",
    "model.safetensors",
    "plots/importance.png",
    "plots/layers.png",
    "plots/search.png",
    "plots/speed.png",
    "plots/training.png",
    "pruner_config.json",
    "pruning_plan.json",
    "pruning_plan.safetensors",
    "recipe.yaml",
    "report.html",
    "samples.json",
    "scores.safetensors",
    "search.json",
    "teacher.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
PLOTTED = {name for name in EXPECTED if name.startswith("plots/")}
PLOTTED_FROM = {"scores.safetensors", "distillation.json", "search.json"}
EXPECTED_WITHOUT_PLOTS = EXPECTED - PLOTTED - PLOTTED_FROM


def test_push_then_load_from_the_hub(student, full_run, hub_server, tmp_path):
    import torch

    result = push(full_run, hub_server, tmp_path)
    repo = hub_server.repos["lab/tiny-stories"]
    assert repo.private
    (commit,) = repo.history()
    assert commit.oid == result["oid"]
    assert set(commit.files) == EXPECTED
    assert commit.files["model.safetensors"].sha256, "weights go to large-file storage"
    assert check_card(commit.files["README.md"].content.decode()) == ([], [])

    out = tmp_path / "logits.pt"
    loaded = finish(client(LOAD, "lab/tiny-stories", out, server=hub_server, home=tmp_path / "fresh"))
    result = torch.load(out)
    with torch.no_grad():
        expected = student[1](result["ids"]).logits
    assert torch.equal(result["logits"], expected)
    snapshot = Path(loaded["snapshot"])
    published = (snapshot / "README.md").read_text(encoding="utf-8")
    assert render_model_card(snapshot) == published
    assert render_report(snapshot) == (snapshot / "report.html").read_text(encoding="utf-8")
    assert 'name = "lab/tiny-stories"' in published
    assert published.count("# tiny-stories\n") == 1


def test_pushing_again_makes_no_second_commit_and_uploads_nothing(run_dir, hub_server, tmp_path):
    first = push(run_dir, hub_server, tmp_path)
    uploads = hub_server.count("PUT", "^/lfs/")
    assert uploads == 2, "weights and plan"
    again = push(run_dir, hub_server, tmp_path)
    assert again["oid"] == first["oid"]
    assert len(hub_server.repos["lab/tiny-stories"].history()) == 1
    assert hub_server.count("PUT", "^/lfs/") == uploads


#: Several pushes, each with faults of its own and without the waits between tries.
FAULTY_PUSHES = """
import json, os, sys, urllib.request
from minitron_hf.errors import MinitronError
from minitron_hf.publishing import hub_errors
from minitron_hf.publishing.hub import push_student_to_hub
hub_errors.RETRY_WAITS = (0.0,) * 4

def set_faults(faults):
    request = urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", json.dumps(faults).encode())
    return json.load(urllib.request.urlopen(request))

found = []
for number, faults in enumerate(json.loads(sys.argv[2])):
    set_faults(faults)
    try:
        answer = {"oid": push_student_to_hub(sys.argv[1], f"tiny-{number}", private=False).oid}
    except MinitronError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    found.append(answer | {"left": set_faults([])})
print(json.dumps({"found": found}))
"""


def faulty_pushes(run_dir, server, tmp_path, cases):
    faults = json.dumps(cases)
    return finish(client(FAULTY_PUSHES, run_dir, faults, server=server, home=tmp_path / "home"))["found"]


def test_a_push_survives_faults_that_pass(run_dir, hub_server, tmp_path):
    cases = [
        ["drop-commit"],
        ["lose-commit-response"],
        ["html make_commit"],
        ["hollow make_commit"],
        ["429 make_commit", "503 create_repo", "500 model_info", "502 validate_yaml", "504 preupload"],
        ["500 change_settings", "drop-commit", "drop-commit"],
    ]
    for number, answer in enumerate(faulty_pushes(run_dir, hub_server, tmp_path, cases)):
        repo = hub_server.repos[f"writer/tiny-{number}"]
        (commit,) = repo.history()
        assert answer == {"oid": commit.oid, "left": []}
        assert set(commit.files) == EXPECTED_WITHOUT_PLOTS
        assert not repo.private, "public once the commit is made"
    assert hub_server.count("PUT", "^/lfs/") == 2, "what is there is not sent twice"


def test_faults_that_stay_are_named_with_what_to_do(run_dir, hub_server, tmp_path):
    """One message each; a new repository that was to be public stays private and empty."""
    cases = [
        (["429 make_commit"] * 40, "too many requests", "Wait", "Push again"),
        (["500 make_commit"] * 40, "fault or is overloaded (500)", "status.huggingface.co", "Push again"),
        (["503 create_repo"] * 40, "fault or is overloaded (503)", "Push again"),
        (["drop-commit"] * 40, "the connection failed", "Push again"),
        (["html whoami"], "cannot be understood", "HF_ENDPOINT"),
        (["hollow whoami"], "cannot be understood", "HF_ENDPOINT"),
        (["html model_info"] * 40, "cannot be understood", "HF_ENDPOINT"),
    ]
    answers = faulty_pushes(run_dir, hub_server, tmp_path, [faults for faults, *_ in cases])
    for answer, (_, *words) in zip(answers, cases, strict=True):
        assert answer.get("error") == "HubError", answer
        assert all(word in answer["message"] for word in words), answer["message"]
        assert "no commit was made" not in answer["message"].lower()
    assert hub_server.repos
    assert all(repo.private and repo.history() == [] for repo in hub_server.repos.values())


CHECKS = """
import json, os, sys
from minitron_hf.errors import MinitronError
from minitron_hf.publishing import hub_errors
from minitron_hf.publishing.hub import check_push
hub_errors.RETRY_WAITS = (0.0,) * 4
if "--offline" in sys.argv:
    from huggingface_hub import constants
    constants.HF_HUB_OFFLINE = True
found = []
for token, repo_id, *options in json.loads(sys.argv[1]):
    try:
        found.append(check_push(repo_id, token=token, create_pr="create_pr" in options))
    except MinitronError as error:
        assert isinstance(error, OSError), error
        found.append(str(error))
print(json.dumps({"found": found}))
"""


def test_access_is_checked_before_any_work(hub_server, tmp_path):
    cases = [
        ("hf_writer", "lab/new", None),
        ("hf_writer", "writer/new", None),
        ("hf_writer", "new", None),
        ("hf_writer", "readers/new", "may only read in readers"),
        ("hf_writer", "strangers/new", "belongs to writer, which may write to writer, lab"),
        ("hf_reader", "reader/new", "the access token may only read"),
        ("hf_fine", "writer/new", "no permission to write"),
        ("hf_wrong", "writer/new", "does not accept the access token"),
        (None, "writer/new", "there is no access token"),
        *(
            ("hf_writer", name, "expected `owner/name`")
            for name in ("a--b", "a/b/c", "-a/b", "a/b.git", "a b", "é", "")
        ),
    ]
    asked = json.dumps([case[:2] for case in cases])
    options = {"server": hub_server, "home": tmp_path / "home", "token": None}
    answers = finish(client(CHECKS, asked, **options))["found"]
    offline = finish(client(CHECKS, asked, "--offline", **options))["found"]
    hub_server.stop()
    unreachable = finish(client(CHECKS, asked, **options))["found"]
    for (token, repo_id, words), answer, *others in zip(cases, answers, offline, unreachable, strict=True):
        assert (answer is None) if words is None else (words in answer), (repo_id, answer)
        if repo_id and token and "expected" not in (words or ""):
            assert all("was not checked" in other for other in others), others
        else:
            assert all(words in other for other in others), "what needs no network is refused without one"
    assert "HF_HUB_OFFLINE" in offline[0]
    assert "does not answer" in unreachable[0]
    assert hub_server.repos == {}


@pytest.mark.slow
def test_a_pull_request_needs_no_access_to_the_owner(run_dir, hub_server, tmp_path):
    """As the Hub does: every account that may write at all opens pull requests in public repositories."""
    hub_server.create("strangers/tiny", private=False)
    asked = json.dumps([(token, "strangers/tiny", "create_pr") for token in ("hf_writer", "hf_reader", "hf_fine")])
    options = {"server": hub_server, "home": tmp_path / "home", "token": None}
    answers = finish(client(CHECKS, asked, **options))["found"]
    assert answers[0] is None
    assert "the access token may only read" in answers[1]
    assert "no permission to open pull requests" in answers[2]
    opened = push(run_dir, hub_server, tmp_path, repo_id="strangers/tiny", create_pr=True)
    assert opened["pr"].endswith("/strangers/tiny/discussions/1")


def test_a_file_that_vanishes_is_no_broken_connection(tmp_path):
    gone = r"Cannot push to x: .*gone\.json cannot be read .No such file"
    with pytest.raises(OutputError, match=gone), hub_errors("Cannot push to x", "Push again."):
        (tmp_path / "gone.json").read_bytes()
    with pytest.raises(ZeroDivisionError), hub_errors("Cannot push to x"):
        1 / 0  # noqa: B018


def test_errors_are_what_others_would_catch():
    assert issubclass(HubError, OSError)
    assert not issubclass(HubError, ValueError)
    assert issubclass(MissingDependencyError, ImportError)
    assert not issubclass(MissingDependencyError, ValueError)
    assert str(HubError("It is gone.")) == "It is gone."
    assert not is_storage_error(HubError("No space left")), "what is said already is not said again"


@pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
def test_an_error_of_the_hub_is_no_error_of_the_disk(tmp_path, replacing):
    with pytest.raises(HubError, match=r"^It is gone\.$"), replacing(tmp_path / "x"):
        raise HubError("It is gone.")


@pytest.mark.slow
def test_an_empty_private_repository_becomes_public_with_its_first_commit(run_dir, hub_server, tmp_path):
    """Left by a push that broke, or made by a trainer; one that holds something stays as it is."""
    hub_server.create("lab/tiny-stories", private=True)
    push(run_dir, hub_server, tmp_path, private=False)
    repo = hub_server.repos["lab/tiny-stories"]
    assert not repo.private
    repo.private = True
    (run_dir / "samples.json").unlink()
    answer = push(run_dir, hub_server, tmp_path, private=False)
    assert repo.private
    assert "already exists and is private: it stays private" in answer["stderr"]


@pytest.mark.slow
def test_a_pull_request_is_not_opened_twice(run_dir, hub_server, tmp_path):
    hub_server.create("lab/tiny-stories", private=True)
    hub_server.faults.append("lose-commit-response")
    answer = push(run_dir, hub_server, tmp_path, create_pr=True)
    assert answer["error"] == "HubError"
    assert "/lab/tiny-stories/discussions before you push again" in answer["message"]
    assert [name for name in hub_server.repos["lab/tiny-stories"].branches if "pr" in name] == ["refs/pr/1"]


def test_a_broken_upload_is_resent_by_the_same_push(run_dir, hub_server, tmp_path):
    hub_server.faults.append("drop-lfs")
    push(run_dir, hub_server, tmp_path)
    (commit,) = hub_server.repos["lab/tiny-stories"].history()
    assert set(commit.files) == EXPECTED_WITHOUT_PLOTS
    assert hub_server.count("PUT", "^/lfs/") == 3


@pytest.mark.slow
def test_a_push_killed_during_the_upload_can_be_repeated(run_dir, hub_server, tmp_path):
    hub_server.faults.append("stall-lfs")
    process = client(PUSH, run_dir, "lab/tiny-stories", "{}", server=hub_server, home=tmp_path / "home")
    assert hub_server.stalled.wait(60)
    time.sleep(0.2)  # the other files
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert hub_server.repos["lab/tiny-stories"].history() == []
    push(run_dir, hub_server, tmp_path)
    (commit,) = hub_server.repos["lab/tiny-stories"].history()
    assert set(commit.files) == EXPECTED_WITHOUT_PLOTS


@pytest.mark.slow
def test_files_of_an_earlier_push_that_are_gone_are_deleted_in_the_same_commit(run_dir, hub_server, tmp_path):
    write_json(run_dir / "benchmarks.json", {"piqa": {"acc,none": {"value": 0.6, "stderr": 0.01}}})
    push(run_dir, hub_server, tmp_path)
    repo = hub_server.repos["lab/tiny-stories"]
    (first,) = repo.history()
    assert "benchmarks.json" in first.files
    note = hub_server.state_of(repo).files["config.json"]
    hub_server.commit(repo, first.oid, "a note of the owner", {**first.files, "notes.json": note})
    (run_dir / "benchmarks.json").unlink()
    push(run_dir, hub_server, tmp_path)
    assert len(repo.history()) == 3
    assert set(hub_server.state_of(repo).files) == EXPECTED_WITHOUT_PLOTS | {"notes.json"}, "files of others stay"


def test_wrong_and_missing_tokens(run_dir, hub_server, tmp_path):
    for token, advice in (("hf_wrong", "does not accept the access token"), (None, "there is no access token")):
        refused = push(run_dir, hub_server, tmp_path, token=token)
        assert refused["error"] == "HubError"
        assert advice in refused["message"]
        assert "hf auth login" in refused["message"]
    refused = push(run_dir, hub_server, tmp_path, token="hf_reader")
    assert refused["error"] == "HubError"
    assert "write access" in refused["message"]
    assert hub_server.repos == {}


@pytest.mark.slow
def test_no_server(run_dir, hub_server, tmp_path):
    hub_server.stop()
    refused = push(run_dir, hub_server, tmp_path)
    assert refused["error"] == "HubError"
    assert "connection failed" in refused["message"]


def test_an_existing_repository_keeps_its_visibility(run_dir, hub_server, tmp_path):
    hub_server.create("writer/open", private=False)
    result = push(run_dir, hub_server, tmp_path, repo_id="open")
    assert hub_server.repos["writer/open"].private is False
    assert "stays public" in result["stderr"]
    assert json.loads((run_dir / "hub.json").read_text())["repo_id"] == "writer/open"


@pytest.mark.slow
def test_public_branch_and_pull_request(run_dir, hub_server, tmp_path):
    hub_server.faults.append("503 change_settings")
    push(run_dir, hub_server, tmp_path, private=False, revision="v1")
    repo = hub_server.repos["lab/tiny-stories"]
    assert not repo.private
    assert repo.history("main") == []
    assert len(repo.history("v1")) == 1
    result = push(run_dir, hub_server, tmp_path, create_pr=True, commit_message="Please")
    assert result["pr"].endswith("/discussions/1")
    assert repo.history("main") == []
    assert [commit.message for commit in repo.history("refs/pr/1")] == ["Please"]


def test_metadata_that_the_hub_refuses_stops_the_push_before_anything_is_made(run_dir, hub_server, tmp_path):
    teacher = json.loads((run_dir / "teacher.json").read_text())
    write_json(run_dir / "teacher.json", teacher | {"license": "my-own-idea"})
    refused = push(run_dir, hub_server, tmp_path)
    assert refused["error"] == "HubError"
    assert '"license" must be one of' in refused["message"]
    assert "connection" not in refused["message"]
    assert hub_server.repos == {}


def test_a_folder_without_a_complete_student_is_refused(run_dir, tmp_path):
    def refused(message):
        with pytest.raises(OutputError, match=message):
            push_student_to_hub(run_dir, "lab/tiny", token="hf_writer")

    (run_dir / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    refused("no tokenizer")
    (tmp_path / "tokenizer.json").rename(run_dir / "tokenizer.json")
    weights = (run_dir / "model.safetensors").read_bytes()
    (run_dir / "model.safetensors").write_bytes(weights[:-100])
    refused("damaged")
    (run_dir / "model.safetensors").unlink()
    refused(r"no model\.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    write_json(run_dir / "model.safetensors.index.json", index)
    (run_dir / "model-00001-of-00002.safetensors").write_bytes(weights)
    refused(r"no model-00002-of-00002\.safetensors")
    (run_dir / "config.json").unlink()
    refused(r"no config\.json")
    with pytest.raises(OutputError, match="does not exist"):
        push_student_to_hub(tmp_path / "nowhere", "lab/tiny")
    assert not (run_dir / "hub.json").exists()


def test_a_model_that_no_run_has_made_is_not_published(run_dir):
    for name in ("pruning_plan.json", "README.md", "hub.json"):
        (run_dir / name).unlink(missing_ok=True)
    before = sorted(run_dir.iterdir())
    with pytest.raises(OutputError, match="neither pruned nor distilled here"):
        push_student_to_hub(run_dir, "lab/tiny", token="hf_writer")
    assert sorted(run_dir.iterdir()) == before


def test_repository_names_are_checked(run_dir):
    with pytest.raises(HubError, match="owner/name"):
        push_student_to_hub(run_dir, "lab/tiny/extra", token="hf_writer")


def test_working_files_are_not_listed(student):
    files = uploaded_files(student[0])
    assert set(files) == EXPECTED - PLOTTED - {".gitattributes", "hub.json", "README.md", "report.html"}
    assert list(files) == sorted(files)


TEACHER_METADATA = """
import json, sys
from minitron_hf.errors import MinitronError
from minitron_hf.publishing.hub import write_teacher_metadata
try:
    print(write_teacher_metadata(sys.argv[1], sys.argv[2]).read_text().replace("\\n", ""))
except MinitronError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def test_teacher_metadata_from_the_hub(hub_server, tmp_path):
    card = "---\nlicense: apache-2.0\nlanguage: en\ndatasets:\n- lab/text\nbase_model: lab/other\n---\n# Teacher\n"
    repo = hub_server.create("lab/teacher", private=True)
    files = {"README.md": card, "LICENSE": "Apache", "NOTICE.txt": "Notice", "config.json": "{}"}
    blobs = {name: make_blob(text.encode()) for name, text in files.items()}
    oid = hub_server.commit(repo, repo.branches["main"], "teacher", blobs)
    run = tmp_path / "run"
    run.mkdir()
    options = {"server": hub_server, "home": tmp_path / "home"}
    teacher = finish(client(TEACHER_METADATA, run, "lab/teacher", **options))
    del teacher["stderr"]
    assert teacher == {
        "format": 1,
        "name_or_path": "lab/teacher",
        "hub_id": "lab/teacher",
        "revision": oid,
        "license": "apache-2.0",
        "license_name": None,
        "license_link": None,
        "language": ["en"],
        "datasets": ["lab/text"],
        "tags": None,
        "legal_files": ["LICENSE", "NOTICE.txt"],
    }
    assert {path.name for path in run.iterdir()} == {"teacher.json", "LICENSE", "NOTICE.txt"}
    missing = finish(client(TEACHER_METADATA, run, "lab/nobody", **options))
    assert missing["error"] == "HubError"
    assert "lab/nobody" in missing["message"]


def test_teacher_metadata_from_a_folder(tmp_path):
    folder, run = tmp_path / "my-teacher", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\nlanguage: [en, no]\n---\n")
    (folder / "USE_POLICY.md").write_text("Be kind")
    teacher = json.loads(write_teacher_metadata(run, folder).read_text())
    assert teacher["name_or_path"] == "my-teacher", "no path of this machine"
    assert teacher["hub_id"] is None
    assert (teacher["license"], teacher["license_name"]) == ("other", "llama3.1")
    assert teacher["language"] == ["en", "no"], "YAML reads `no` as False"
    assert (run / "USE_POLICY.md").read_text() == "Be kind"


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ("base_model: lab/stories\nbase_model_relation: cousin", "lab/stories"),
        ("base_model: [lab/stories]", "lab/stories"),
        ("base_model: [lab/stories, lab/poems]", None),
        ("base_model: ./stories", None),
        ("base_model: 7", None),
    ],
)
def test_a_local_teacher_says_which_model_it_was_made_from(tmp_path, base, known):
    """The student's card names it, for neither a folder of this machine nor one of several is a base on the Hub."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text(f"---\nlicense: mit\n{base}\n---\n")
    write_run(tmp_path / "run")
    teacher = json.loads(write_teacher_metadata(tmp_path / "run", tmp_path / "teacher").read_text())
    assert teacher.get("base_model") == known
    card = render_model_card(tmp_path / "run")
    data = card_metadata(card)
    assert (data.get("base_model"), data.get("base_model_relation")) == (known, known and "finetune")
    assert ("(made from [lab/stories](https://huggingface.co/lab/stories)), pruned from" in card) is bool(known)


@pytest.mark.parametrize("card", [None, "# no metadata\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n"])
def test_an_unknown_licence_stays_unknown(tmp_path, card):
    folder = tmp_path / "teacher"
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    teacher = json.loads(write_teacher_metadata(tmp_path, folder).read_text())
    assert {key: value for key, value in teacher.items() if value is not None} == {
        "format": 1,
        "name_or_path": "teacher",
    }
