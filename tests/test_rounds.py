"""Several rounds in one recipe: each cuts the student of the round before, and learns from whom it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.intermediate import _initial_map
from minitron_hf.errors import DataError, MismatchError, PlanError
from minitron_hf.models import load_model
from minitron_hf.pruning.plan import PruningPlan
from minitron_hf.pruning.surgery import apply_plan
from minitron_hf.publishing import card as card_module
from minitron_hf.publishing.hub import uploaded_files
from minitron_hf.recipe import actions, runner, training
from minitron_hf.recipe import run as run_module
from minitron_hf.recipe.schema import Recipe
from pocket import pocket_config, pocket_model, pocket_tokenizer

TEXTS = [f"the {a} {b} of {c} is {d}" for a in ("old", "new") for b in "xyz" for c in "abcd" for d in "klmnop"]
EXAMPLE = Path(__file__).parent.parent / "examples" / "qwen3-0.6b-two-rounds.yaml"
STAGES = ["1/score", "1/plan", "1/prune", "1/distill", "score", "plan", "prune", "distill"]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    pocket_model("llama", dtype=torch.float32).save_pretrained(folder / "teacher")
    pocket_tokenizer().save_pretrained(folder / "teacher")
    for name, texts in (("train", TEXTS), ("eval", TEXTS[::7])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture
def values(workshop, tmp_path):
    return {
        "teacher": str(workshop / "teacher"),
        "data": {"train": str(workshop / "train.jsonl"), "eval": str(workshop / "eval.jsonl")},
        "output_dir": str(tmp_path / "run"),
        "prune": {"multiple_of": 1},
        "rounds": [
            {"prune": {"intermediate_size": 0.75, "hidden_size": 0.75}, "distill": {"max_steps": 3}},
            {"prune": {"intermediate_size": 0.5, "hidden_size": 0.5, "num_hidden_layers": 4}},
        ],
        "scores": {"num_rows": 8, "max_length": 16},
        "distill": {"max_steps": 2, "max_length": 16, "per_device_train_batch_size": 2, "eval_strategy": "no"},
        "evaluate": {"num_rows": 4, "speed": False},
    }


def run(values, **kwargs):
    lines: list[str] = []
    folder = runner.run_recipe(Recipe.from_dict(values), show_progress=False, report=lines.append, **kwargs)
    return folder, lines


def names(lines):
    return [line[1 : line.index("]")] for line in lines]


@pytest.mark.slow
def test_the_shipped_example_runs_at_pocket_size(workshop, tmp_path, monkeypatch):
    """Every round cuts the student of the one before; the card, the evaluation and the repository show all of them."""
    monkeypatch.setattr(card_module, "write_plots", lambda folder: None)  # a matter of seconds, and of other tests
    overrides = [
        f"teacher={workshop / 'teacher'}",
        f"data={{train: {workshop / 'train.jsonl'}, eval: {workshop / 'eval.jsonl'}}}",
        f"output_dir={tmp_path / 'run'}",
        "scores={num_rows: 8, max_length: 16}",
        "distill={max_steps: 2, max_length: 16, per_device_train_batch_size: 2, eval_strategy: 'no'}",
        "rounds.1.prune={hidden_size: 0.7, intermediate_size: 0.75}",  # multiples of the 12 heads
        "rounds.2.distill={max_steps: 3}",
        "prune.multiple_of=1",
        "evaluate={num_rows: 4, speed: false}",
        "controls=[random_pruning]",
    ]
    recipe = Recipe.from_yaml(EXAMPLE, overrides)
    folder = runner.run_recipe(recipe, show_progress=False, report=lambda line: None)
    evaluation = json.loads((folder / "evaluation.json").read_text())["models"]
    assert list(evaluation) == ["teacher", "pruned", "round_1", "student", "random_pruning"]
    counts = [evaluation[name]["num_parameters"] for name in ("teacher", "round_1", "student")]
    assert counts == sorted(set(counts), reverse=True)
    assert evaluation["random_pruning"]["num_parameters"] == counts[2]
    shapes = runner.check_recipe(recipe)
    assert [shapes["num_parameters"][whose] for whose in ("teacher", "student")] == [counts[0], counts[2]]

    plans = [PruningPlan.from_pretrained(own) for own in (folder / "rounds" / "1", folder)]
    for source, own, plan in zip(
        (workshop / "teacher", folder / "rounds" / "1"), (folder / "rounds" / "1", folder), plans
    ):
        cut, expected = load_model(own / "pruned"), apply_plan(load_model(source), plan)
        assert all(found.equal(wanted) for found, wanted in zip(cut.parameters(), expected.parameters(), strict=True))
        distilled = load_model(own)
        assert any(not a.equal(b) for a, b in zip(cut.parameters(), distilled.parameters(), strict=True))

    card = (folder / "README.md").read_text()
    losses = [evaluation[name]["metrics"]["loss"]["value"] for name in ("teacher", "round_1", "student")]
    rows = [
        line.split("|")[1:-1]
        for line in card[card.index("## Rounds") : card.index("## Arch")].splitlines()[4:]
        if line
    ]
    rows = [[cell.strip() for cell in row] for row in rows[-3:]]
    assert [row[0] for row in rows] == ["Teacher", "1", "2"]
    assert [int(row[2].replace(",", "")) for row in rows] == counts
    for row, loss in zip(rows, losses, strict=True):
        assert float(row[4].split("±")[0]) == pytest.approx(loss, abs=0.05)
    kept = [plans[0].layers_kept[layer] for layer in plans[1].layers_kept]
    assert f"{len(kept)} of {plans[0].sizes['layers']['teacher']}" in card
    published = set(uploaded_files(folder))
    assert {"rounds/1/pruning_plan.json", "rounds/1/distillation.json", "model.safetensors"} <= published
    assert not [name for name in published if name.startswith("rounds/") and name.endswith("model.safetensors")]


def test_rounds_stop_resume_and_are_redone_like_stages(values, monkeypatch):
    folder, lines = run(values, until="1/distill")
    assert names(lines) == STAGES[:4]
    assert (folder / "rounds" / "1" / "config.json").is_file()
    assert not (folder / "pruning_plan.json").exists()
    learned: list[str] = []
    original = training.distill
    monkeypatch.setattr(
        training,
        "distill",
        lambda student, teacher, *args, **kwargs: (
            learned.append(teacher.config._name_or_path),
            original(student, teacher, *args, **kwargs),
        )[1],
    )
    _, lines = run(values, until="distill")
    assert names(lines) == STAGES
    assert ["skipped" in line for line in lines] == [True] * 4 + [False] * 4
    assert learned == [values["teacher"]]
    arguments = [json.loads((own / "distillation.json").read_text()) for own in (folder / "rounds" / "1", folder)]
    assert [one["global_step"] for one in arguments] == [3, 2]

    values["rounds"][1]["teacher"] = "previous"
    with pytest.raises(MismatchError, match=r"stage 'distill' was made from other inputs.*teacher: None → previous"):
        run(values, until="distill")
    _, lines = run(values, until="distill", redo=True)
    assert ["skipped" in line for line in lines] == [True] * 7 + [False]
    assert learned[1:] == [str(folder / "rounds" / "1")]

    values["rounds"][0]["prune"]["intermediate_size"] = 0.8
    with pytest.raises(MismatchError, match=r"stage '1/plan'.*intermediate_size: 0.75 → 0.8"):
        run(values, until="distill")
    single = {**values, "prune": {"intermediate_size": 0.5}, "rounds": []}
    (folder / "stages" / "score.json").unlink()
    with pytest.raises(MismatchError, match="no round 1"):
        run(single, until="score")
    run(single, until="score", redo=True)
    assert not (folder / "rounds" / "1").exists()


def test_states_are_compared_over_all_rounds(values):
    """The map to the teacher's width begins as the teacher's channels that both rounds have kept."""
    folder, _ = run(values, until="plan")
    plans = [PruningPlan.from_pretrained(own) for own in (folder / "rounds" / "1", folder)]
    width = plans[0].sizes["hidden"]["teacher"]
    channels = torch.eye(width)
    for plan in plans:
        channels = channels[torch.from_numpy(plan.kept["hidden"])]
    assert _initial_map(len(channels), width, plans).equal(channels.T)
    assert not _initial_map(len(channels), width, plans[1:]).equal(channels.T)
    assert [plan.digest for plan in run_module.Run(Recipe.from_dict(values)).in_round(2).plans] == [
        p.digest for p in plans
    ]


def test_several_processes_are_told_which_round_they_train(values, monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(run_module, "launch", lambda arguments, *how: started.append(arguments))
    values["distributed"] = {"config": "ddp", "num_processes": 2}
    whole = run_module.Run(Recipe.from_dict(values))
    for number, own in ((1, whole.folder / "rounds" / "1"), (2, whole.folder)):
        actions._distill(whole.in_round(number))
        wanted = [
            "stage",
            "distill",
            whole.folder / run_module.PRIVATE_RECIPE_NAME,
            own / "pruned",
            own,
            f"--round={number}",
        ]
        assert started[-1] == [str(argument) for argument in wanted]


OFFLOADED = {"teacher_offload": True}
CONCURRENT = {"teacher_correction": "concurrent", "teacher_original_learning_rate": 1e-3}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("how", [OFFLOADED, CONCURRENT], ids=["offloaded", "concurrent"])
def test_every_round_loads_its_teacher_by_its_settings(values, tmp_path, monkeypatch, how, corrected):
    """Where a teacher is kept in main memory, quantised or trained, the trainer loads it, and nothing else is held."""
    given: list[tuple[str, dict]] = []

    def distil(student, teacher, folder, tokenizer, settings, *data, **kwargs):
        given.append((teacher, settings))

    monkeypatch.setattr(training, "distill", distil)
    for module in (run_module, training):
        monkeypatch.setattr(module, "load_for_compute", lambda path, **kwargs: object())
    monkeypatch.setattr(run_module, "load_config", lambda path, **kwargs: pocket_config("llama"))
    quantised = {"teacher_model_init_kwargs": {"attn_implementation": "eager"} if how is OFFLOADED else {}}
    values["rounds"][0]["distill"] |= quantised
    values["rounds"].append({"prune": {"intermediate_size": 0.25}, "teacher": "previous"})
    values["distill"] |= how
    values["teacher"] = {"model": values["teacher"], "revision": "main", "dtype": "float32"}
    if corrected:
        values["teacher_correction"] = {"original_learning_rate": 1e-3, "num_tokens": 8}
    whole = run_module.Run(Recipe.from_dict(values))
    first = str(whole.folder / "corrected_teacher") if corrected else values["teacher"]["model"]
    for number, expected in ((1, first), (2, first), (3, str(whole.folder / "rounds" / "2"))):
        run = whole.in_round(number)
        assert all((run.teacher, run.distillation_teacher, whole.teacher))  # loaded by the stages before
        training.train(run, tmp_path / "student", tmp_path / "out", {})
        teacher, settings = given.pop()
        assert teacher == expected
        assert not {"teacher", "distillation_teacher"} & (whole.loaded.keys() | run.loaded.keys())
        wanted = {"dtype": "float32"} | ({"revision": "main"} if expected == values["teacher"]["model"] else {})
        wanted |= quantised["teacher_model_init_kwargs"] if number == 1 else {}
        assert settings["teacher_model_init_kwargs"] == wanted
        assert how.items() <= settings.items()
        assert settings["max_steps"] == (3 if number == 1 else 2)


def test_a_teacher_that_is_trained_beside_one_student_is_not_that_of_the_next(values):
    """Students and controls of one run all learn from the recipe's teacher: equal trainings have equal losses."""
    changes = {**CONCURRENT, "teacher_original_learning_rate": 0.1, "bf16": False, "logging_steps": 1}
    values |= {"rounds": [], "distill": {**values["distill"], **changes}}
    values["prune"] |= {"intermediate_size": 0.5}
    whole = run_module.Run(Recipe.from_dict(values), show_progress=False)
    losses = []
    for name in ("student", "control"):
        training.train(whole, Path(values["teacher"]), whole.folder / name, {})
        record = json.loads((whole.folder / name / "distillation.json").read_text())
        losses.append([entry["loss"] for entry in record["log_history"] if "loss" in entry])
    assert losses[0] == losses[1]


def test_the_control_of_cross_entropy_compares_nothing(values, monkeypatch):
    """Neither distributions nor hidden states, and its settings are possible, whatever the recipe compares."""
    given = []
    monkeypatch.setattr(actions, "_train", lambda run, student, folder, **changes: given.append(changes))
    values |= {"controls": ["cross_entropy"], "rounds": []}
    values["prune"] |= {"intermediate_size": 0.5}
    states = {"hidden_loss": "cosine", "hidden_layers": [[-2, -2]], "embedding_loss": "mse"}
    actions._controls(run_module.Run(Recipe.from_dict({**values, "distill": {**values["distill"], **states}})))
    args = DistillationConfig(values["output_dir"], report_to="none", **{**states, **given[0]})
    assert (args.kd_weight, args.ce_weight, args.hidden_loss, args.embedding_loss) == (0, 1, None, None)


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="two processes need two accelerators where there are any")
def test_rounds_in_two_processes_equal_rounds_in_one(values):
    """With layers of the teacher in main memory, which in the second round is the first one's student."""
    values["rounds"][1]["teacher"] = "previous"
    values["distill"] |= {"teacher_offload": True, "logging_steps": 1, "learning_rate": 1e-2, "bf16": False}
    folders = [run(values, until="distill")[0]]
    values |= {"output_dir": values["output_dir"] + "-two", "distributed": {"config": "ddp", "num_processes": 2}}
    values["distill"] |= {"per_device_train_batch_size": 1}
    folders.append(run(values, until="distill")[0])
    for own in ("rounds/1", "."):
        records = [json.loads((folder / own / "distillation.json").read_text()) for folder in folders]
        assert [record["num_processes"] for record in records] == [1, 2]
        logged = [[entry for entry in record["log_history"] if "kl" in entry] for record in records]
        for one, two in zip(*logged, strict=True):
            for name in ("kl", "ce", "grad_norm"):
                assert two[name] == pytest.approx(one[name], rel=1e-4), (own, name)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"rounds": [{"prune": {"intermediate_size": 0.5}}, {"prune": {"intermediate_size": 9999}}]},
            PlanError,
            "Round 2",
        ),
        (
            {"rounds": [{"prune": {"intermediate_size": 20}}, {"prune": {"intermediate_size": 20}}]},
            PlanError,
            "nothing would be cut",
        ),
        ({"rounds": [{"scores": {}}]}, DataError, "rounds.1 lacks 'prune'"),
        ({"rounds": [{"prune": {}, "teacher": "mine"}]}, DataError, "rounds.1.teacher='mine'"),
        ({"rounds": [{"prune": {}, "colour": 1}]}, DataError, "rounds.1 has no entry colour"),
        ({"rounds": {"prune": {}}}, DataError, "rounds=.*expected a list"),
        ({"rounds": [], "prune": {}}, DataError, "lacks prune"),
        ({"search": {"space": {"hidden_size": [0.5]}}}, DataError, "rounds and search"),
        ({"rounds": [{"prune": {"target_parameters": 0.5}}]}, DataError, "Leave out target_parameters"),
        ({"rounds": [{"prune": {"hidden_size": 0.5}, "distill": {"stpes": 3}}]}, DataError, "rounds.1.distill: stpes"),
        ({"rounds": [{"prune": {"hidden_size": 0.5}, "scores": {"rows": 3}}]}, DataError, "rounds.1.scores: rows"),
        (
            {"rounds": [{"prune": {"hidden_size": 0.5}, "distill": {"temperature": 2.0}}], "teacher_cache": {}},
            DataError,
            "rounds.1.distill: temperature cannot differ",
        ),
        (
            {"rounds": [{"prune": {"hidden_size": 0.5}, "teacher": "previous"}], "teacher_cache": {}},
            DataError,
            "teacher_cache holds the logits of the original",
        ),
    ],
)
def test_mistakes_are_refused_before_the_first_file(values, changes, error, words):
    with pytest.raises(error, match=words):
        run({**values, **changes})
    assert not Path(values["output_dir"]).exists()


def test_entries_of_a_round_are_counted_from_one():
    recipe = Recipe.from_yaml(EXAMPLE, ["rounds.1.prune.hidden_size=0.5"])
    assert [one.prune.get("hidden_size") for one in recipe.rounds] == [0.5, None]
    with pytest.raises(DataError, match="none of the 2 entries"):
        Recipe.from_yaml(EXAMPLE, ["rounds.0.prune.hidden_size=0.5"])
    orders = [recipe.in_round(number).distill.get("data_seed") for number in (1, 2)]
    assert orders == [None, 43]


def test_all_rounds_have_one_tokenizer(tmp_path):
    """Texts that one round has tokenised are read by the next."""
    pocket_tokenizer().save_pretrained(tmp_path)
    rounds = [{"prune": {"intermediate_size": 40}}, {"prune": {"intermediate_size": 24}}]
    values = {"teacher": str(tmp_path), "output_dir": str(tmp_path / "run"), "rounds": rounds}
    whole = run_module.Run(Recipe.from_dict({**values, "data": {"train": "a.jsonl", "eval": "a.jsonl"}}))
    assert whole.in_round(2).tokenizer is whole.tokenizer
