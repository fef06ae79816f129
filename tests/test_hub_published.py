"""What a push publishes beside the student: scores on registered benchmarks, quantised copies, tags, collections.

Names that licences forbid, and repositories that are gated or missing, are refused with what to do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hub_server import check_card, hub_server_fixture, make_blob  # noqa: F401 (a fixture)
from minitron_hf.cli.app import app
from minitron_hf.errors import HubError, OutputError
from minitron_hf.publishing.card import render_model_card
from minitron_hf.publishing.eval_results import main_results
from minitron_hf.publishing.hub import push_student_to_hub
from minitron_hf.publishing.quantized_card import write_quantized_card
from minitron_hf.publishing.releases import prepare_quantized, quantized_repositories
from minitron_hf.quantization import quantize_checkpoint
from run_folder import TEACHER, evaluation, write_json
from test_hub import TEACHER_METADATA, client, faulty_pushes, finish, full_run, push, run_dir, student  # noqa: F401 (fixtures)

#: Registrations of benchmarks, as their datasets publish them.
GSM8K = "name: GSM8K\nevaluation_framework: inspect-ai\ntasks:\n  - {id: grade_school, config: main, split: test}\n"
ARC = "tasks:\n  - {id: easy, config: ARC-Easy}\n  - {id: challenge, config: ARC-Challenge}\n"
HELLASWAG = "tasks:\n  - {id: x, config: other}\n"
EVAL_RESULTS = ".eval_results/minitron-hf.yaml"


#: Several pushes in one process, each after its faults and without files that are named; no waits between tries.
PUSHES = """
import json, os, sys, urllib.request
from minitron_hf.errors import MinitronError
from minitron_hf.publishing import hub_errors
from minitron_hf.publishing.hub import push_student_to_hub
hub_errors.RETRY_WAITS = (0.0,) * 4

found = []
for step in json.loads(sys.argv[2]):
    faults = json.dumps(step.pop("faults", [])).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/faults", faults))
    for name in step.pop("without", []):
        os.unlink(os.path.join(sys.argv[1], name))
    try:
        found.append({"oid": push_student_to_hub(sys.argv[1], **step).oid})
    except MinitronError as error:
        found.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps({"found": found}))
"""


def pushes(folder, server, tmp_path, *steps: dict) -> tuple[list[dict], str]:
    """Answers of several pushes, and what they wrote to the standard error."""
    steps = tuple({"repo_id": "lab/tiny-stories"} | step for step in steps)
    done = finish(client(PUSHES, folder, json.dumps(steps), server=server, home=tmp_path / "home"))
    return done["found"], done["stderr"]


def score(value, count=1319, **more):
    how = {"num_documents": count, "num_documents_in_task": 1319, "num_fewshot": 5, "harness_version": "0.4.13"}
    return {"value": value, "stderr": 0.0125, **how, **more}


def test_scores_on_registered_benchmarks_are_published_as_the_hub_reads_them(run_dir, hub_server, tmp_path):  # noqa: F811
    """The task ids are those of `eval.yaml`; the client's own parser reads the file."""
    measured = {
        "gsm8k": {"exact_match,strict-match": score(0.34), "exact_match,flexible-extract": score(0.4)},
        "arc_challenge": {"acc": score(0.3), "acc_norm": score(0.33, chat_template=True)},
        "arc_easy": {"acc_norm": score(0.6, count=100)},  # on a part of the documents
        "piqa": {"acc": score(0.7)},  # of a dataset that nobody registers
        "winogrande": {"acc": score(0.55)},  # not registered
        "hellaswag": {"acc_norm": score(0.5)},  # registered without this config
    }
    write_json(run_dir / "benchmarks.json", {"format": 1, "models": {"student": measured, "teacher": measured}})
    for name, text in (("openai/gsm8k", GSM8K), ("allenai/ai2_arc", ARC), ("Rowan/hellaswag", HELLASWAG)):
        repo = hub_server.create(f"datasets/{name}", private=False)
        hub_server.commit(repo, repo.branches["main"], "register", {"eval.yaml": make_blob(text.encode())})

    [answer] = faulty_pushes(run_dir, hub_server, tmp_path, [["503 resolve"]])
    assert "oid" in answer
    published = hub_server.state_of(hub_server.repos["writer/tiny-0"]).files
    entries = parse_eval_result_entries(yaml.safe_load(published[EVAL_RESULTS].content))
    source = {
        "source_url": "https://huggingface.co/writer/tiny-0/blob/main/benchmarks.json",
        "source_name": "benchmarks.json",
    }
    how = "of lm-evaluation-harness 0.4.13, 5-shot"
    assert entries == [
        EvalResultEntry(
            "openai/gsm8k",
            "grade_school",
            34.0,
            notes=f"task gsm8k {how}, exact_match,strict-match in percent, standard error 1.2",
            **source,
        ),
        EvalResultEntry(
            "allenai/ai2_arc",
            "challenge",
            33.0,
            notes=f"task arc_challenge {how}, acc_norm in percent, standard error 1.2, chat template",
            **source,
        ),
    ]


@pytest.mark.slow  # the client waits before it asks again
def test_a_hub_that_does_not_answer_costs_the_scores_their_place_not_the_push(run_dir, hub_server, tmp_path):  # noqa: F811
    measured = {"gsm8k": {"exact_match,strict-match": score(0.34)}}
    write_json(run_dir / "benchmarks.json", {"format": 1, "models": {"student": measured, "teacher": measured}})
    repo = hub_server.create("datasets/openai/gsm8k", private=False)
    hub_server.commit(repo, repo.branches["main"], "register", {"eval.yaml": make_blob(GSM8K.encode())})
    [answer] = faulty_pushes(run_dir, hub_server, tmp_path, [["429 resolve"] * 80])
    assert "oid" in answer
    assert EVAL_RESULTS not in hub_server.state_of(hub_server.repos["writer/tiny-0"]).files


@pytest.mark.slow
def test_a_public_name_that_the_licence_forbids_is_refused(run_dir, hub_server, tmp_path):  # noqa: F811
    write_json(run_dir / "teacher.json", TEACHER | {"license": "llama3.2"})
    (failed, *made), warned = pushes(
        run_dir,
        hub_server,
        tmp_path,
        {"repo_id": "lab/tiny", "private": False},
        {"repo_id": "lab/llama-tiny", "private": False},
        {"repo_id": "lab/private"},
    )
    assert failed["error"] == "HubError"
    assert "lab/Llama-tiny" in failed["message"]
    assert ["oid" in answer for answer in made] == [True, True]
    assert set(hub_server.repos) == {"lab/llama-tiny", "lab/private"}
    assert warned.count("That has to be done before you share it") == 1
    assert "lab/private: the teacher's licence (llama3.2)" in warned


def with_copies(folder: Path, *methods: str) -> None:
    """Quantised copies of the student, as far as a push looks at them."""
    measured = evaluation()
    for method in methods:
        copy = folder / "quantized" / method
        copy.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(folder / name, copy / name)
        config = json.loads((copy / "config.json").read_text())
        write_json(copy / "config.json", config | {"quantization_config": {"quant_method": "torchao"}})
        measured["models"][f"student_{method}"] = measured["models"]["pruned"] | {"checkpoint_bytes": 123_456}
    write_json(folder / "evaluation.json", measured)


def files_of(server, repo_id: str, folder: Path) -> Path:
    """A checkout of a repository, without its large files."""
    for name, blob in server.state_of(server.repos[repo_id]).files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(blob.content or b"")
    return folder


def test_copies_tag_and_collection_follow_the_student(run_dir, hub_server, tmp_path):  # noqa: F811
    with_copies(run_dir, "bnb_nf4", "int8")
    hub_server.create("story-lab/stories-10M", private=False)
    options = {"repo_id": "lab/tiny", "private": False, "quantized": True, "tag": "v1", "collection": "Tiny stories"}
    faults = ["429 create_collection", "503 add_collection_item", "500 create_tag", "hollow create_tag"]
    (first, again), _ = pushes(run_dir, hub_server, tmp_path, options | {"faults": faults}, options)
    copies = {"bnb_nf4": "lab/tiny-bnb-nf4", "int8": "lab/tiny-int8"}
    assert set(hub_server.repos) == {"story-lab/stories-10M", "lab/tiny", *copies.values()}
    assert not any(repo.private for repo in hub_server.repos.values())
    assert hub_server.repos["lab/tiny"].tags == {"v1": first["oid"]}
    (collection,) = hub_server.collections.values()
    notes = {item["id"]: item["note"]["text"] for item in collection["items"]}
    assert collection["title"] == "Tiny stories"
    assert notes == {
        "lab/tiny": "student",
        "story-lab/stories-10M": "teacher",
        "lab/tiny-bnb-nf4": "student, quantised: bnb_nf4",
        "lab/tiny-int8": "student, quantised: int8",
    }

    card = render_model_card(files_of(hub_server, "lab/tiny", tmp_path / "tiny"))
    assert card == (tmp_path / "tiny" / "README.md").read_text(encoding="utf-8")
    for method, name in copies.items():
        assert f"- `{method}`: [{name}](https://huggingface.co/{name})" in card
        checkout = files_of(hub_server, name, tmp_path / method)
        assert not [path for path in checkout.rglob("*") if path.name.startswith(("pruning_plan", "recipe"))]
        content = (checkout / "README.md").read_text(encoding="utf-8")
        (checkout / "README.md").unlink()
        assert CliRunner().invoke(app, ["card", str(checkout)]).exit_code == 0
        assert (checkout / "README.md").read_text(encoding="utf-8") == content
        assert check_card(content) == ([], [])
        data = ModelCard(content).data
        assert (data.base_model, data.get("base_model_relation"), data.license) == ("lab/tiny", "quantized", "mit")
        assert "| Checkpoint size | 2.0 MB | 843.5 kB (0.42×) | 123.5 kB (0.06×) |" in content
        assert "[LICENSE](LICENSE)" in content

    assert again["oid"] == first["oid"]
    assert [len(repo.history()) for name, repo in hub_server.repos.items() if name.startswith("lab/")] == [1, 1, 1]
    assert len(collection["items"]) == 4
    assert len(hub_server.collections) == 1


@pytest.mark.slow
def test_a_tag_is_never_moved(run_dir, hub_server, tmp_path):  # noqa: F811
    steps = ({"tag": "v1"}, {"without": ["samples.json"]}, {"tag": "v1"}, {"tag": "v2"})
    (first, second, refused, last), _ = pushes(run_dir, hub_server, tmp_path, *steps)
    assert refused["error"] == "HubError"
    assert f"its tag v1 already names the commit {first['oid'][:12]}" in refused["message"]
    assert last == second != first
    assert hub_server.repos["lab/tiny-stories"].tags == {"v1": first["oid"], "v2": second["oid"]}


def test_faults_after_the_commit_say_what_was_done(run_dir, hub_server, tmp_path):  # noqa: F811
    """A teacher that is gone is left out of the collection; a failed collection names what was published."""
    (pushed, collected, tagged), warned = pushes(
        run_dir,
        hub_server,
        tmp_path,
        {"collection": "Tiny"},
        {"collection": "Other", "faults": ["403 create_collection"]},
        {"tag": "v1", "faults": ["403 create_tag"]},
    )
    assert "story-lab/stories-10M was not added to the collection 'Tiny': the Hub does not find it" in warned
    (collection,) = hub_server.collections.values()
    assert [item["id"] for item in collection["items"]] == ["lab/tiny-stories"]
    assert collected["error"] == tagged["error"] == "HubError"
    assert "lab/tiny-stories was published, but not added to the collection 'Other'" in collected["message"]
    assert f"The commit {pushed['oid'][:12]} was made in lab/tiny-stories, but not its tag v1" in tagged["message"]


@pytest.mark.slow
def test_a_pull_request_needs_its_repository_and_nothing_else(run_dir, hub_server, tmp_path):  # noqa: F811
    missing = push(run_dir, hub_server, tmp_path, create_pr=True)
    assert "there is no such repository, or it is private and not visible" in missing["message"]
    assert hub_server.repos == {}
    with pytest.raises(HubError, match="merge first"):
        push_student_to_hub(run_dir, "lab/x", create_pr=True, tag="v1", token="hf_writer")


def test_missing_and_damaged_copies_are_refused_before_anything_is_sent(run_dir):  # noqa: F811
    with pytest.raises(OutputError, match="holds no quantised copies to publish"):
        push_student_to_hub(run_dir, "lab/x", quantized=True, token="hf_writer")
    with_copies(run_dir, "int8")
    (run_dir / "quantized" / "int8" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(OutputError, match="damaged"):
        push_student_to_hub(run_dir, "lab/x", quantized=True, token="hf_writer")


def test_a_copy_of_earlier_weights_is_not_published(run_dir, caplog):  # noqa: F811
    pytest.importorskip("torchao")
    copy = quantize_checkpoint(run_dir, run_dir / "quantized" / "int8", "int8", device="cpu")
    caplog.clear()
    assert quantized_repositories(run_dir, "lab/x") == {"int8": "lab/x-int8"}
    assert not caplog.records
    weights = load_file(run_dir / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, run_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputError, match=r"quantised from other weights.*minitron-hf quantize .* --method int8"):
        push_student_to_hub(run_dir, "lab/x", quantized=True, token="hf_writer")
    (copy / "quantization.json").unlink()  # as earlier versions left it
    assert quantized_repositories(run_dir, "lab/x") == {"int8": "lab/x-int8"}
    assert "does not say from which weights" in caplog.text


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("others/gated", ["is gated", "Ask for access on its page"]),
        ("others/secret", ["no such repository, or it is private", "logged in"]),
        ("others/nothing", ["no such repository, or it is private"]),
    ],
)
def test_teachers_that_cannot_be_read_are_told_apart(hub_server, tmp_path, teacher, words):
    for name, private in (("gated", False), ("secret", True)):
        repo = hub_server.create(f"others/{name}", private=private)
        repo.gated = name == "gated"
        hub_server.commit(repo, repo.branches["main"], "card", {"README.md": make_blob(b"---\nlicense: mit\n---\n")})
    (tmp_path / "run").mkdir()
    answer = finish(client(TEACHER_METADATA, tmp_path / "run", teacher, server=hub_server, home=tmp_path / "home"))
    assert answer["error"] == "HubError"
    assert all(word in answer["message"] for word in [teacher, *words]), answer["message"]


def test_scores_on_the_users_own_documents_are_no_benchmark_results(run_dir):  # noqa: F811
    measured = {"gsm8k": {"exact_match,strict-match": score(0.34)}}
    for local in (False, True):
        content = {"format": 1, "models": {"student": measured, "teacher": measured}, "local_documents": local}
        write_json(run_dir / "benchmarks.json", content)
        assert len(list(main_results(run_dir / "benchmarks.json"))) == (0 if local else 1)
        assert ("local_documents: true" in render_model_card(run_dir)) == local


def test_a_copy_that_was_not_written_to_its_end_is_none(run_dir):  # noqa: F811
    with_copies(run_dir, "int8")
    shutil.copytree(run_dir / "quantized" / "int8", run_dir / "quantized" / ".int4.0123abcd-99-aa.partial")
    assert set(quantized_repositories(run_dir, "me/x")) == {"int8"}


def test_what_a_user_writes_in_the_folder_of_a_copy_stays(run_dir):  # noqa: F811
    with_copies(run_dir, "int8")
    folder = prepare_quantized(run_dir, "int8", "me/x-int8", "me/x")
    card = folder / "README.md"
    with card.open("a") as file:
        file.write("Mine.\n")
    assert card.read_text() == write_quantized_card(folder).read_text()
    assert card.read_text().endswith("Mine.\n")
    card.write_text("All mine.")
    write_quantized_card(folder)
    assert (folder / "README.before.md").read_text() == "All mine."


def test_a_student_that_may_not_be_shared_is_not_published(run_dir):  # noqa: F811
    write_json(run_dir / "teacher.json", TEACHER | {"license": "cc-by-nc-nd-4.0"})
    with pytest.raises(HubError, match="forbids sharing changed versions"):
        push_student_to_hub(run_dir, "lab/x", private=False, token="hf_writer")
