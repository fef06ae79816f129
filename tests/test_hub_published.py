"""What a push publishes beside the student's files: scores on registered benchmarks, and names that licences allow."""

from __future__ import annotations

import yaml
from huggingface_hub import EvalResultEntry, parse_eval_result_entries

from hub_server import hub_server_fixture, make_blob  # noqa: F401 (a fixture)
from run_folder import TEACHER, write_json
from test_hub import faulty_pushes, full_run, push, run_dir, student  # noqa: F401 (fixtures)

#: Registrations of benchmarks, as their datasets publish them.
GSM8K = "name: GSM8K\nevaluation_framework: inspect-ai\ntasks:\n  - {id: grade_school, config: main, split: test}\n"
ARC = "tasks:\n  - {id: easy, config: ARC-Easy}\n  - {id: challenge, config: ARC-Challenge}\n"
HELLASWAG = "tasks:\n  - {id: x, config: other}\n"
EVAL_RESULTS = ".eval_results/minitron-hf.yaml"


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

    # A Hub that does not answer costs the scores their place there, not the push.
    answers = faulty_pushes(run_dir, hub_server, tmp_path, [["429 resolve"] * 80, ["503 resolve"]])
    assert ["oid" in answer for answer in answers] == [True, True]
    published = [hub_server.state_of(hub_server.repos[f"writer/tiny-{number}"]).files for number in (0, 1)]
    assert EVAL_RESULTS not in published[0]
    entries = parse_eval_result_entries(yaml.safe_load(published[1][EVAL_RESULTS].content))
    source = {
        "source_url": "https://huggingface.co/writer/tiny-1/blob/main/benchmarks.json",
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


def test_a_public_name_that_the_licence_forbids_is_refused(run_dir, hub_server, tmp_path):  # noqa: F811
    write_json(run_dir / "teacher.json", TEACHER | {"license": "llama3.2"})
    failed = push(run_dir, hub_server, tmp_path, repo_id="lab/tiny", private=False)
    assert failed["error"] == "HubError"
    assert "lab/Llama-tiny" in failed["message"]
    assert hub_server.repos == {}
    assert "Rename" not in push(run_dir, hub_server, tmp_path, repo_id="lab/llama-tiny", private=False)["stderr"]
    assert "Rename it before you share it" in push(run_dir, hub_server, tmp_path, repo_id="lab/tiny")["stderr"]
