"""Blends of corpora, and text that the teacher writes for them: drawn as told, recorded, the same after a resume."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value, load_from_disk

from minitron_hf.errors import DataError, MismatchError
from minitron_hf.files import read_json
from minitron_hf.generation import corpus as corpus_module
from minitron_hf.publishing.hub import uploaded_files
from minitron_hf.recipe import runner
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.corpora import Part, blend
from minitron_hf.recipe.estimates import estimate_recipe
from minitron_hf.recipe.run import CORRECTED_DIR, Run
from minitron_hf.recipe.schema import Recipe
from pocket import pocket_model, pocket_tokenizer
from test_generation import CHAT

QUESTIONS = [f"what is {a} {b}" for a in ("old", "new", "the") for b in "abcd"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A chat teacher, two corpora of texts, one of conversations, and questions."""
    folder = tmp_path_factory.mktemp("blends")
    pocket_model("llama", dtype=torch.float32).save_pretrained(folder / "teacher")
    pocket_tokenizer(chat_template=CHAT).save_pretrained(folder / "teacher")
    texts = {
        "web": [{"body": f"web {a} {b} of {c} d"} for a in "abcde" for b in "xyz" for c in "klm"],
        "code": [{"text": f"code {a} {b}"} for a in "pq" for b in "rst"],
        "eval": [{"text": f"the {a} is {b} and {a}"} for a in "abc" for b in "xy"],
        "questions": [{"question": question} for question in QUESTIONS],
        "chat": [
            {"conversations": [{"from": "user", "value": f"hi {a}"}, {"from": "assistant", "value": f"yes {a}"}]}
            for a in "abcdefgh"
        ],
    }
    for name, rows in texts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def values(workshop, tmp_path, **changes):
    training = [
        {"source": str(workshop / "web.jsonl"), "text_field": "body", "weight": 3},
        {"source": str(workshop / "code.jsonl"), "weight": 1},
    ]
    return {
        "teacher": str(workshop / "teacher"),
        "data": {"train": training, "eval": str(workshop / "eval.jsonl"), **changes.pop("data", {})},
        "output_dir": str(tmp_path / "run"),
        "prune": {"intermediate_size": 0.5},
        "scores": {"num_rows": 4, "max_length": 16},
        "distill": {
            "max_steps": 6,
            "max_length": 16,
            "per_device_train_batch_size": 2,
            "save_steps": 2,
            "eval_strategy": "no",
            "save_total_limit": 9,
            **changes.pop("distill", {}),
        },
        "evaluate": {"num_rows": 4, "speed": False},
        **changes,
    }


def generating(workshop, tmp_path, **generate):
    """A recipe that blends conversations with answers of the teacher."""
    training = [{"source": str(workshop / "chat.jsonl"), "weight": 1}, {"generated": True, "weight": 3}]
    prompts = {"source": str(workshop / "questions.jsonl"), "text_field": "question"}
    return values(
        workshop,
        tmp_path,
        data={"train": training},
        distill={"packing": False, "max_length": 60},
        generate={"prompts": prompts, "max_new_tokens": 6, "batch_size": 4, "rows_per_file": 8, **generate},
    )


def go(recipe, **kwargs):
    lines: list[str] = []
    folder = runner.run_recipe(Recipe.from_dict(recipe), show_progress=False, report=lines.append, **kwargs)
    return folder, lines


# ---- Drawing ----


def naive_draws(lengths, probabilities, seed, everything):
    """(corpus, row) of every draw: numpy's choice in blocks of 1,000, and counters."""
    generator, counts, drawn = np.random.default_rng(seed), [0] * len(lengths), []
    while True:
        for which in generator.choice(len(lengths), size=1000, p=probabilities):
            ended = [count >= length for count, length in zip(counts, lengths)]
            if all(ended) if everything else any(ended):
                return drawn
            drawn.append((int(which), counts[which] % lengths[which]))
            counts[which] += 1


@pytest.mark.parametrize("strategy", ["all_exhausted", "first_exhausted"])
def test_rows_are_drawn_by_weight_from_a_stream_as_from_a_table(workshop, tmp_path, strategy):
    found = []
    for streaming in (False, True):
        data = {"streaming": streaming, "stopping_strategy": strategy, "seed": 5}
        run = Run(Recipe.from_dict(values(workshop, tmp_path, data=data)))
        found.append([row["text"] for row in run.dataset("train")])
    corpora = [[row["body" if "body" in row else "text"] for row in map(json.loads, path.open())]
               for path in (workshop / "web.jsonl", workshop / "code.jsonl")]  # fmt: skip
    expected = [corpora[which][row] for which, row in naive_draws([45, 6], [0.75, 0.25], 5, strategy[0] == "a")]
    assert found[0] == expected
    assert found[1][: len(expected)] == expected  # a stream notices its end with the next draw
    assert len(found[1]) <= len(expected) + 20
    assert set(found[1]) == set(expected)
    if strategy == "all_exhausted":
        assert set(expected) == {*corpora[0], *corpora[1]}


def test_several_kinds_of_text_columns_become_one(tmp_path):
    large = Dataset.from_dict({"x": ["a", "b"]}, features=Features({"x": Value("large_string")}))
    small = Dataset.from_dict({"text": ["c", "d"], "other": [1, 2]})
    parts = [Part("one", large[0], "x"), Part("two", small[0], "text")]
    made = blend([large, small], parts, [0.5, 0.5], seed=0, stopping_strategy="all_exhausted")
    assert made.column_names == ["text"]
    assert set(made["text"]) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], "expected at least one corpus"),
        ([{"weight": 2}], "data.train.1: expected either a source or generated"),
        ([{"source": "x", "generated": True}], "data.train.1: expected either"),
        ([{"generated": True}], "no section generate"),
        ([{"source": "x", "weight": 0}], "data.train.1.weight=0: expected more than 0"),
        ([{"source": "x", "weigth": 1}], "data.train.1 has no entry weigth.*weight"),
        ({"source": "x", "weight": "many"}, "data.train.weight='many': expected a number"),
    ],
)
def test_impossible_blends_are_refused_by_name(workshop, tmp_path, train, words):
    with pytest.raises(DataError, match=words):
        Recipe.from_dict(values(workshop, tmp_path, data={"train": train}))


def test_generated_text_that_nothing_reads_is_refused(workshop, tmp_path):
    with pytest.raises(DataError, match="no corpus reads its text"):
        Recipe.from_dict(values(workshop, tmp_path, generate={"num_rows": 3}))


def test_overrides_and_the_written_recipe_keep_the_list(workshop, tmp_path):
    import yaml

    from minitron_hf.recipe.reading import apply_overrides

    given = values(workshop, tmp_path)
    given["data"]["train"][1] = given["data"]["train"][1]["source"]
    changed = Recipe.from_dict(apply_overrides(given, ["data.train.2.weight=2", "data.seed=3"]))
    assert changed.data.probabilities == [0.6, 0.4]
    assert Recipe.from_dict(yaml.safe_load(changed.to_yaml())) == changed


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_and_conversations_in_one_blend_are_refused_before_any_work(workshop, tmp_path, streaming):
    train = [str(workshop / "code.jsonl"), str(workshop / "chat.jsonl")]
    recipe = Recipe.from_dict(values(workshop, tmp_path, data={"train": train, "streaming": streaming}))
    with pytest.raises(DataError, match=r"data\.train\.1 holds texts, and data\.train\.2 holds conversations"):
        check_recipe(recipe)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": {"max_steps": -1}}, "a stream has no length"),
        ({"teacher_cache": {}}, "teacher_cache reads the whole corpus"),
        ({"data": {"streaming": True, "train": {"source": "x", "split": "train[:1%]"}}}, "no slices"),
    ],
)
def test_streams_are_refused_where_their_length_is_needed(workshop, tmp_path, changes, words):
    changes = {"data": {"streaming": True}, **changes}
    with pytest.raises(DataError, match=words):
        check_recipe(Recipe.from_dict(values(workshop, tmp_path, **changes)))


# ---- Training on a blend ----


@pytest.fixture
def rows_seen(monkeypatch):
    """The rows of every optimiser step of the distillations that follow."""
    from minitron_hf import DistillationTrainer

    seen: list[list[list[int]]] = []
    compute = DistillationTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", watched)
    return seen


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_resumed_run_sees_the_rows_of_an_uninterrupted_one(workshop, tmp_path, rows_seen, monkeypatch, streaming):
    from minitron_hf import DistillationTrainer

    given = values(workshop, tmp_path, data={"streaming": streaming})
    whole, _ = go({**given, "output_dir": str(tmp_path / "whole")}, until="distill")
    expected = list(rows_seen)
    assert len(expected) == 6
    rows_seen.clear()
    step = DistillationTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", killed)
        with pytest.raises(Killed):
            go(given, until="distill")
    assert rows_seen == expected[:3]
    rows_seen.clear()
    resumed, _ = go(given, until="distill")
    assert rows_seen == expected[2:]  # from the checkpoint of step 2 on
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_streams_train_candidates_and_correct_the_teacher(workshop, tmp_path, rows_seen):
    """Search, correction and distillation read a stream as they read a table."""
    from minitron_hf.distillation.correction import RECORD_NAME as CORRECTION

    found = []
    for streaming in (False, True):
        given = values(
            workshop,
            tmp_path / str(streaming),
            data={"streaming": streaming, "train": str(workshop / "code.jsonl")},
            prune={},
            search={
                "space": {"intermediate_size": [0.5, 0.75]}, "max_parameters": 1e9, "tolerance": 1.0,
                "num_candidates": 2, "num_rounds": 1, "num_tokens": 64, "max_length": 16,
                "distillation": {"per_device_train_batch_size": 2},
            },
            teacher_correction={
                "original_learning_rate": 1e-3, "num_tokens": 64,
                "arguments": {"max_length": 16, "per_device_train_batch_size": 2, "save_strategy": "no"},
            },
        )  # fmt: skip
        rows_seen.clear()
        folder, _ = go(given, until="distill")
        candidates = read_json(folder / "search.json")["candidates"]
        found.append((len(candidates), len(rows_seen), read_json(folder / CORRECTED_DIR / CORRECTION)["num_tokens"]))
    assert found[0] == found[1]
    assert found[0][2] == 64


def test_a_blend_is_planned_and_recorded(workshop, tmp_path):
    given = values(workshop, tmp_path)
    notes = check_recipe(Recipe.from_dict(given))["notes"]
    rows = len(Run(Recipe.from_dict(given)).dataset("train"))
    [note] = [note for note in notes if note.startswith("data.train")]
    assert "75% of the rows from web.jsonl, read 1." in note
    assert "25% of the rows from code.jsonl, read 2." in note
    folder, _ = go(given)
    data = read_json(folder / "distillation.json")["data"]["train"]
    assert data["num_rows"] == rows
    assert [part["name"] for part in data["parts"]] == ["web.jsonl", "code.jsonl"]
    assert [part["num_rows"] for part in data["parts"]] == [45, 6]
    tokenizer = pocket_tokenizer()
    means = [
        1 + np.mean([len(tokenizer(row[name])["input_ids"]) for row in map(json.loads, (workshop / file).open())])
        for file, name in (("web.jsonl", "body"), ("code.jsonl", "text"))
    ]
    share = 0.75 * means[0] / (0.75 * means[0] + 0.25 * means[1])
    assert data["parts"][0]["token_share"] == pytest.approx(share)
    card = (folder / "README.md").read_text()
    assert "| `web.jsonl` | 45 | 75.0% |" in card
    assert "The teacher wrote" not in card
    given["data"]["train"][0]["weight"] = 4
    with pytest.raises(MismatchError, match="probability"):
        go(given)
    given["data"]["train"][0]["weight"], given["data"]["train"][1]["weight"] = 6, 2  # the same shares
    _, lines = go(given)
    assert all("skipped" in line for line in lines)


# ---- Text of the teacher ----


def test_the_teacher_writes_before_anything_reads(workshop, tmp_path):
    given = generating(workshop, tmp_path)
    recipe = Recipe.from_dict(given)
    cost = estimate_recipe(recipe).stages[0]
    assert cost.stage == "generate"
    assert "at most 12 × 6 new tokens" in cost.formula
    assert cost.disk > 0
    assert "text of the teacher" in str(check_recipe(recipe)["notes"])
    assert not (tmp_path / "run").exists()
    folder, lines = go(given)
    assert [line.split("]")[0][1:] for line in lines] == [
        "generate", "score", "plan", "prune", "distill", "evaluate", "card",
    ]  # fmt: skip
    record = read_json(folder / "generated" / "generation.json")
    assert record["complete"]
    assert record["settings"]["seed"] == 0
    assert record["num_rows"] == 12
    counts = Counter(
        "generated" if row["messages"][0]["content"] in QUESTIONS else "chat" for row in Run(recipe).dataset("train")
    )
    assert counts["generated"] >= 12
    assert counts["chat"] >= 8
    card = (folder / "README.md").read_text()
    assert "The teacher wrote 75% of the training rows (about " in card
    assert not [name for name in uploaded_files(folder) if name.startswith("generated")]
    _, lines = go(given)
    assert all("skipped" in line for line in lines)


def test_changed_prompts_or_settings_repeat_what_reads_the_text(workshop, tmp_path):
    given = generating(workshop, tmp_path)
    before = runner.stage_digests(Recipe.from_dict(given))
    given["generate"]["batch_size"] = 3
    assert runner.stage_digests(Recipe.from_dict(given)) == before
    for name, value in (("seed", 1), ("max_new_tokens", 5), ("num_rows", 4)):
        changed = {**given, "generate": {**given["generate"], name: value}}
        after = runner.stage_digests(Recipe.from_dict(changed))
        assert all(before[stage] != after[stage] for stage in before), name
    # With calibration data of its own, scores do not depend on the text.
    given["data"]["calibration"] = str(workshop / "code.jsonl")
    before = runner.stage_digests(Recipe.from_dict(given))
    given["generate"]["seed"] = 1
    after = runner.stage_digests(Recipe.from_dict(given))
    assert [name for name in before if before[name] == after[name]] == ["score", "plan", "prune"]


def test_digests_of_recipes_with_one_corpus_stay(workshop, tmp_path):
    """A folder of an earlier version is not refused: what is new is not in the digests."""
    from dataclasses import asdict

    from minitron_hf.recipe.identity import dataset_identity, training_identity

    recipe = Recipe.from_dict(values(workshop, tmp_path, data={"train": str(workshop / "code.jsonl")}))
    section = recipe.data.parts[0].dataset("")
    assert training_identity(recipe.data) == dataset_identity(section)
    assert set(training_identity(recipe.data)) == set(asdict(section))


def test_a_killed_generation_goes_on_where_it_stopped(workshop, tmp_path, monkeypatch):
    given = generating(workshop, tmp_path)
    whole, _ = go({**given, "output_dir": str(tmp_path / "whole")}, until="generate")
    written, make = [], corpus_module._Corpus._rows

    def rows(self, prompts):
        if len(written) == 2:
            raise Killed
        written.append(len(prompts))
        return make(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module._Corpus, "_rows", rows)
        with pytest.raises(Killed):
            go(given, until="generate")
    assert sum(written) == 8
    written.clear()
    folder, lines = go(given, until="generate")
    assert "skipped" not in lines[0]
    for name in ("train-00000.jsonl", "train-00001.jsonl"):
        assert (folder / "generated" / name).read_bytes() == (whole / "generated" / name).read_bytes()


@pytest.mark.slow
def test_the_teacher_writes_once_for_all_rounds(workshop, tmp_path):
    given = {**generating(workshop, tmp_path), "prune": {}}
    rounds = [{"prune": {"intermediate_size": 0.75}}, {"prune": {"intermediate_size": 0.5}}]
    given["data"]["train"] = {"generated": True, "num_rows": 9}
    folder, lines = go({**given, "rounds": rounds})
    assert [line.split("]")[0][1:] for line in lines][:2] == ["generate", "1/score"]
    assert "The teacher wrote all of the training text." in (folder / "README.md").read_text()
    record = read_json(folder / "rounds" / "1" / "distillation.json")
    assert [part["generated_by"] for part in record["data"]["train"]["parts"]] == ["teacher"]


@pytest.mark.parametrize(
    ("generate", "words"),
    [
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"prompts": None}, "generate: There are no prompts, so num_rows"),
        ({"max_new_tokens": 64}, "generate: max_new_tokens is 64 and leaves no room"),
        ({"top_p": 1.5}, "generate.top_p=1.5: expected more than 0 and at most 1"),
        ({"prompts": {"source": "{questions}", "text_field": "answer"}}, "generate.prompts: .* no 'answer'"),
        ({"temprature": 1.5}, "generate has no entry temprature.*temperature"),
        ({"chat": False}, "data.train.1 holds conversations, and data.train.2 holds texts"),
    ],
)
def test_text_that_cannot_be_written_is_refused_before_any_work(workshop, tmp_path, generate, words):
    questions = str(workshop / "questions.jsonl")
    generate = json.loads(json.dumps(generate).replace("{questions}", questions))
    with pytest.raises((DataError, MismatchError), match=words):
        check_recipe(Recipe.from_dict(generating(workshop, tmp_path, **generate)))


def test_saved_datasets_are_read_as_streams(workshop, tmp_path):
    saved = Dataset.from_dict({"text": ["one a b", "two c d"]})
    saved.save_to_disk(tmp_path / "saved")
    assert load_from_disk(str(tmp_path / "saved"))["text"] == saved["text"]
    data = {"train": str(tmp_path / "saved"), "streaming": True}
    run = Run(Recipe.from_dict(values(workshop, tmp_path, data=data)))
    assert [row["text"] for row in run.dataset("train")] == saved["text"][:]


@pytest.mark.slow
def test_short_documents_are_named_as_short_rows(workshop, tmp_path):
    """`max_length` reaches far enough, but no document does."""
    data = {"train": str(workshop / "code.jsonl")}
    text = "at most 9 tokens of a context of 64: positions from 9 on are not trained"
    for packing, warns in ((False, True), (True, False)):
        given = values(workshop, tmp_path / str(packing), data=data, distill={"max_length": 48, "packing": packing})
        notes = str(check_recipe(Recipe.from_dict(given))["notes"])
        assert (text in notes) == warns, notes
        assert ("Add longer documents" in notes) == warns
        folder, _ = go(given)
        record = read_json(folder / "distillation.json")
        assert record["data"]["train"]["longest_row"] == (9 if warns else 48)
        assert ("at most 9 tokens of a context of 64" in (folder / "README.md").read_text()) == warns


# ---- Columns of several kinds ----

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
NAMED = [{"content": "hi", "role": "user", "name": "x"}, {"content": "yes", "role": "assistant", "name": None}]


def blended(one, other, streaming):
    """Two corpora of one row each, blended."""
    data = [Dataset.from_list([row]) for row in (one, other)]
    parts = [Part("data.train.1", one, "text"), Part("data.train.2", other, "text")]
    data = [each.to_iterable_dataset() for each in data] if streaming else data
    return list(blend(data, parts, [0.5, 0.5], seed=0, stopping_strategy="all_exhausted"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": TURNS}, {"messages": NAMED}),
        ({"messages": NAMED}, {"messages": TURNS}),
        ({"messages": TURNS, "tools": None}, {"messages": TURNS, "tools": "[]"}),
        ({"messages": TURNS}, {"messages": [{"role": "user", "content": "hi", "tool_calls": [{"f": "a"}]}]}),
    ],
)
def test_columns_that_one_corpus_lacks_are_null_there(one, other, streaming):
    def known(row):
        return [{name: value for name, value in turn.items() if value is not None} for turn in row["messages"]]

    rows = [known(row) for row in blended(one, other, streaming)]
    assert known(one) in rows
    assert known(other) in rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (
            {"messages": TURNS, "tools": "[]"},
            {"messages": TURNS, "tools": [{"f": 1}]},
            "'tools' holds text in data.tr",
        ),
        (
            {"messages": TURNS},
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"'messages\.content' holds text in data\.train\.1, and lists of entries \(type\) in data\.train\.2",
        ),
        ({"input_ids": [1, 2]}, {"input_ids": [1.5]}, "'input_ids' holds int64 .* float64"),
    ],
)
def test_columns_of_other_kinds_are_refused_by_name(one, other, words, streaming):
    with pytest.raises(DataError, match=words):
        blended(one, other, streaming)


def test_columns_of_other_kinds_are_refused_before_any_work(workshop, tmp_path):
    for name, tools in (("one", "[]"), ("two", [{"f": 1}])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": TURNS, "tools": tools}))
    data = {"train": [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]}
    with pytest.raises(DataError, match="'tools' holds text"):
        check_recipe(Recipe.from_dict(values(workshop, tmp_path, data=data, distill={"packing": False})))
