"""A student with a cut vocabulary: the teacher's logits at the kept tokens, under new ids everywhere."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from minitron_hf import (
    PrunerConfig,
    PruningPlan,
    apply_plan,
    count_tokens,
    estimate_importance,
    evaluate_models,
    formats,
    make_plan,
    plan_for_target,
    prune_checkpoint,
    prune_model,
    prune_tokenizer,
    prune_with_plan,
    run_recipe,
    save_model,
    search_architectures,
    student_config,
    verify_student,
)
from minitron_hf.cli.app import app
from minitron_hf.errors import DataError, MismatchError, PlanError, UnsupportedModelError
from minitron_hf.families import spec_for
from minitron_hf.models import count_parameters
from minitron_hf.recipe.checking import check_recipe
from minitron_hf.recipe.schema import Recipe
from minitron_hf.recipe.settings import check_settings
from minitron_hf.vocabulary.ids import renumbered_generation_config
from pocket import POCKETS, VOCAB, float64_throughout, logits, pocket_model, pocket_tokenizer

GUIDE = Path(__file__).parents[1] / "docs/guides/vocabulary.md"
LETTERS = "abcdefgh"
#: Tokens that stay in most tests: an odd number, unlike all other sizes.
SIZE = 17


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Pairs and words of eight letters; special tokens first and last, as they are in large models."""
    tokens = ["<unk>", "<pad>", *LETTERS, "_"]
    merges = [(one, other) for one in LETTERS for other in LETTERS[::3]] + [("ab", "cd"), ("ad", "eg"), ("_", "ad")]
    tokens += ["".join(pair) for pair in merges if "".join(pair) not in tokens]
    tokens.insert(20, "cd")
    merges.insert(3, ("c", "d")) if ("c", "d") not in merges else None
    tokens = list(dict.fromkeys(tokens))
    merges = [pair for pair in merges if all(part in tokens for part in pair)]
    model = models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("_", "merged_with_next")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    assert tokenizer.get_vocab_size() < VOCAB
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def texts(number: int = 60) -> list[str]:
    """Words in which some pairs of letters never occur."""
    draw = np.random.default_rng(0)
    words = ["abcd", "_adeg", "_ab", "cdgg", "_ha", "_fdg"]
    return ["".join(draw.choice(words, 9)) for _ in range(number)]


def teacher_of(name: str = "llama", **changes):
    """A pocket whose config names the special tokens of the tokenizer."""
    tokenizer = bpe_tokenizer()
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    model = pocket_model(name, **{**ids, **changes})
    model.generation_config = GenerationConfig(**{**ids, "eos_token_id": [ids["eos_token_id"], 14]})
    return model, tokenizer


def require_teachers_logits(teacher, student, plan) -> None:
    kept = torch.from_numpy(plan.kept["vocab"])
    ids = torch.randint(0, len(kept), (2, 12), generator=torch.Generator().manual_seed(1))
    with float64_throughout(), torch.no_grad():
        expected = teacher(kept[ids], use_cache=False).logits[..., kept]
        found = student(ids, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


PLAIN = ("llama", "gpt2", "phi", "gemma2", "mamba", "opt", "qwen3_moe", "cohere", "granite", "gpt_neox_japanese")


def cut_alone(name: str):
    teacher, tokenizer = teacher_of(name)
    plan = make_plan(teacher, PrunerConfig(vocab_size=SIZE), token_counts=count_tokens(texts(), tokenizer))
    return teacher, tokenizer, plan, apply_plan(teacher, plan)


def test_the_plan_of_another_teacher_is_refused_before_its_tokenizer(tmp_path):
    """A model of the same sizes with other weights and another tokenizer: the weights tell that it is another."""
    teacher, tokenizer = teacher_of()
    counts = count_tokens(texts(), tokenizer)
    request = PrunerConfig(vocab_size=SIZE, intermediate_size=0.5)
    plan = make_plan(teacher, request, estimate_importance(teacher, metric="magnitude"), token_counts=counts)
    teacher_of(seed=1)[0].save_pretrained(tmp_path / "other")
    pocket_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="made for other weights"):
        prune_checkpoint(tmp_path / "other", tmp_path / "student", plan, show_progress=False)


@pytest.mark.parametrize("name", PLAIN)
def test_logits_are_the_teachers_at_the_kept_tokens(name):
    teacher, tokenizer, plan, student = cut_alone(name)
    require_teachers_logits(teacher, student, plan)
    assert student.config.vocab_size == SIZE
    assert student.get_output_embeddings().weight.shape[0] == SIZE
    assert plan.student["num_parameters"] == count_parameters(student)
    cut = prune_tokenizer(tokenizer, plan)
    for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(student.config, role) == getattr(cut, role)
    new = plan.new_ids
    assert student.generation_config.eos_token_id == [new[i] for i in (tokenizer.eos_token_id, 14)]


def test_older_versions_refuse_plans_after_the_cut(tmp_path, monkeypatch):
    """They would take the tokens of the earlier round for units; the plan of the cut itself they know."""
    *_, plan, student = cut_alone("llama")
    later = make_plan(student, PrunerConfig(layers_to_drop=[1])).after_cut(plan)
    for one, number in ((plan, 1), (later, 2)):
        path = one.save_pretrained(tmp_path / str(number))
        assert json.loads(path.read_text())["format"] == number
        assert PruningPlan.from_pretrained(path.parent).digest == one.digest
    with monkeypatch.context() as patch:
        patch.setattr(formats, "FORMATS", {**formats.FORMATS, **formats.PLAIN_FORMATS})
        formats.require_readable(tmp_path / "1")
        with pytest.raises(MismatchError, match=r"pruning_plan.json has format 2, .*Install a newer minitron-hf"):
            PruningPlan.from_pretrained(tmp_path / "2")
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))  # as it was written before
    assert PruningPlan.from_pretrained(tmp_path / "2").digest == later.digest


def names_its_images(config) -> bool:
    """Whether a config names tokens of images or sound inside the embeddings, or belongs to a language model alone."""
    text = config.get_text_config()
    ids = [getattr(config, name, None) for name in ("image_token_id", "image_token_index", "audio_token_id")]
    return text is config or any(one is not None and one < text.vocab_size for one in ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(POCKETS) - set(PLAIN)))
def test_every_family_is_cut_or_refused(name):
    teacher, tokenizer = teacher_of(name)
    spec = spec_for(teacher.config)
    if "vocab" in spec.refused or not names_its_images(teacher.config):
        with pytest.raises(PlanError, match=r"vocab_size of this .* cannot be cut"):
            student_config(teacher.config, PrunerConfig(vocab_size=SIZE))
        return
    plan = make_plan(teacher, PrunerConfig(vocab_size=SIZE), token_counts=count_tokens(texts(), tokenizer))
    require_teachers_logits(teacher, apply_plan(teacher, plan), plan)


def test_text_that_splits_alike_has_the_teachers_logits():
    teacher, tokenizer, plan, student = cut_alone("llama")
    cut, kept = prune_tokenizer(tokenizer, plan), plan.kept["vocab"]
    alike = [text for text in texts() if np.isin(tokenizer(text)["input_ids"], kept).all()]
    assert alike
    for text in alike[:3]:
        old, new = (one(text, return_tensors="pt")["input_ids"] for one in (tokenizer, cut))
        with torch.no_grad():
            assert torch.allclose(teacher(old).logits[..., kept], student(new).logits, atol=1e-6)


def test_the_vocabulary_is_cut_together_with_all_else():
    """The student is the masked teacher at the kept tokens; a repair is fitted on the teacher's tokens."""
    teacher, tokenizer = teacher_of()
    scores, counts = estimate_importance(teacher, metric="random"), count_tokens(texts(), tokenizer)
    request = PrunerConfig(hidden_size=0.5, intermediate_size=0.5, num_hidden_layers=3, vocab_size=SIZE)
    plan = make_plan(teacher, request, scores, token_counts=counts)
    student = apply_plan(teacher, plan)
    assert verify_student(teacher, student, plan) < 1e-5
    wrong = apply_plan(teacher, replace(plan, kept={**plan.kept, "vocab": plan.kept["vocab"][::-1].copy()}))
    with pytest.raises(Exception, match="logits differ"):
        verify_student(teacher, wrong, plan)
    whole = make_plan(teacher, replace(request, vocab_size=None, repair="least_squares"), scores)
    both = make_plan(teacher, replace(request, repair="least_squares"), scores, token_counts=counts)
    assert both.with_whole_vocabulary().student["config"] == whole.student["config"]
    one, other = (prune_with_plan(teacher, made, texts(), processing_class=tokenizer) for made in (whole, both))
    kept = torch.from_numpy(plan.kept["vocab"])
    ids = torch.arange(SIZE)[None]
    with torch.no_grad():
        assert torch.allclose(one(kept[ids]).logits[..., kept], other(ids).logits, atol=1e-6)


def test_prune_model_counts_the_calibration_data(tmp_path):
    """In one call; the student and its tokenizer are saved and loaded as stock objects."""
    teacher, tokenizer = teacher_of(dtype=torch.float32)
    request = PrunerConfig(intermediate_size=0.5, vocab_size=SIZE)
    student = prune_model(
        teacher, request, calibration_data=texts(), processing_class=tokenizer, num_rows=4, max_length=16, verify=True
    )
    plan = student.pruning_plan
    with pytest.raises(MismatchError, match="Pass prune_tokenizer"):
        save_model(student, tmp_path / "wrong", tokenizer)
    assert not (tmp_path / "wrong").exists()
    save_model(student, tmp_path, prune_tokenizer(tokenizer, plan))
    assert PruningPlan.from_pretrained(tmp_path).vocabulary is not None
    loaded, cut = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.arange(SIZE)[None]
    assert torch.allclose(logits(student, ids), logits(loaded, ids), atol=1e-6)
    assert cut.get_vocab() == prune_tokenizer(tokenizer, plan).get_vocab()
    assert prune_tokenizer(cut, plan) is cut  # it is the student's already
    ids = cut(texts()[0], return_tensors="pt")
    assert loaded.generate(**ids, max_new_tokens=4).max() < SIZE


def test_a_plan_is_read_again(tmp_path):
    *_, plan, _ = cut_alone("llama")
    plan.save_pretrained(tmp_path)
    read = PruningPlan.from_pretrained(tmp_path)
    assert read.vocabulary == plan.vocabulary
    assert read.new_ids == plan.new_ids
    assert read.digest == plan.digest


def test_the_plan_says_how_many_tokens_the_text_gains():
    """Against counts by hand, on the documents that were held out."""
    _, tokenizer, plan, _ = cut_alone("llama")
    cut, held_out = prune_tokenizer(tokenizer, plan), texts()[9::10]
    decoded = [tokenizer.decode(tokenizer(text)["input_ids"]) for text in held_out]
    num_bytes = sum(len(text.encode()) for text in decoded)
    for name, one in (("teacher", tokenizer), ("student", cut)):
        number = sum(len(one(text, add_special_tokens=False)["input_ids"]) for text in decoded)
        assert plan.vocabulary["tokens_per_byte"][name] == number / num_bytes
    counted = [i for n, text in enumerate(texts()) if n % 10 != 9 for i in tokenizer(text)["input_ids"]]
    assert plan.vocabulary["num_tokens"] == len(counted)
    assert plan.vocabulary["share_kept"] == np.isin(counted, plan.kept["vocab"]).mean()
    assert plan.vocabulary["tokens_per_byte"]["student"] > plan.vocabulary["tokens_per_byte"]["teacher"]
    [note] = [note for note in plan.notes if note.startswith("Vocabulary")]
    assert "Held-out text takes" in note


def test_a_checkpoint_is_cut_from_folder_to_folder(tmp_path):
    """The same files as in memory; the tokenizer of the teacher is left behind."""
    teacher, tokenizer = teacher_of("qwen3", dtype=torch.float32, tie_word_embeddings=True)
    save_model(teacher, tmp_path / "teacher", tokenizer)
    (tmp_path / "teacher/vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    plan = make_plan(teacher, PrunerConfig(vocab_size=SIZE), token_counts=count_tokens(texts(), tokenizer))
    prune_checkpoint(tmp_path / "teacher", tmp_path / "student", plan, show_progress=False)
    save_model(apply_plan(teacher, plan), tmp_path / "memory", prune_tokenizer(tokenizer, plan))
    names = sorted(path.name for path in (tmp_path / "memory").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "student").iterdir())
    for name in names:
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "student" / name).read_bytes(), name


def test_a_target_counts_the_vocabulary_that_stays():
    teacher, tokenizer = teacher_of()
    request = PrunerConfig(target_parameters=0.75, vocab_size=SIZE, num_hidden_layers=1.0, hidden_size=1.0)
    scores, counts = estimate_importance(teacher, metric="random"), count_tokens(texts(), tokenizer)
    plan = plan_for_target(
        teacher, request, scores, texts(), processing_class=tokenizer, token_counts=counts, tolerance=0.2, num_shapes=2
    )
    student = apply_plan(teacher, plan)
    assert student.config.vocab_size == SIZE
    assert 0.55 <= count_parameters(student) / count_parameters(teacher) <= 0.75
    assert plan.candidates[0]["num_parameters"] == count_parameters(student)


def test_generation_configs_are_renumbered():
    config = GenerationConfig(
        eos_token_id=[5, 6], pad_token_id=4, suppress_tokens=[3, 4], bad_words_ids=[[4, 5], [6]], bos_token_id=None
    )
    new = renumbered_generation_config(config, {4: 0, 5: 1}, 7)
    assert (new.eos_token_id, new.pad_token_id, new.suppress_tokens) == ([1], 0, [0])
    assert new.bad_words_ids == [[0, 1]]
    assert config.eos_token_id == [5, 6]
    assert renumbered_generation_config(GenerationConfig(eos_token_id=5, top_p=0.6), {5: 1}, 7).do_sample
    with pytest.raises(PlanError, match="sequence_bias, whose token ids"):
        renumbered_generation_config(GenerationConfig(sequence_bias=[[[4], 1.0]]), {}, 7)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"vocab_size": 4}, "tokens have to stay"),
        ({"vocab_size": VOCAB + 1}, "larger than the teacher's"),
        ({"vocab_size": 0.999, "multiple_of": 1}, "comes to no change"),
    ],
)
def test_impossible_sizes_are_refused(request_, message):
    teacher, tokenizer = teacher_of()
    with pytest.raises(PlanError, match=message):
        make_plan(teacher, PrunerConfig(**request_), token_counts=count_tokens(texts(), tokenizer))


@pytest.mark.parametrize("size", [True, 0, -3, 1.5, "many"])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(PlanError, match="vocab_size"):
        PrunerConfig(vocab_size=size)


def test_what_is_missing_is_named():
    teacher, tokenizer = teacher_of()
    with pytest.raises(PlanError, match=r"needs counts of tokens. Pass token_counts=count_tokens"):
        make_plan(teacher, PrunerConfig(vocab_size=SIZE))
    with pytest.raises(PlanError, match="needs a corpus, whose tokens are counted"):
        prune_model(teacher, PrunerConfig(vocab_size=SIZE), scores=estimate_importance(teacher, metric="random"))
    with pytest.raises(DataError, match="no tokens"):
        count_tokens([], tokenizer)
    with pytest.raises(DataError, match="a tokenizer is needed"):
        count_tokens(texts(), None)
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        count_tokens(texts(), pocket_tokenizer())
    plan = make_plan(teacher, PrunerConfig(vocab_size=SIZE), token_counts=count_tokens(texts(), tokenizer))
    with pytest.raises(MismatchError, match="chosen with another tokenizer"):
        prune_tokenizer(pocket_tokenizer(), plan)


def test_refused_families_say_why():
    with pytest.raises(PlanError, match="vocab_size of this 'gemma3n_text' model cannot be cut: every layer"):
        student_config(POCKETS["gemma3n_text"].config, PrunerConfig(vocab_size=SIZE))


def test_the_command_line_plans_and_prunes(tmp_path):
    teacher, tokenizer = teacher_of(dtype=torch.float32)
    save_model(teacher, tmp_path / "teacher", tokenizer)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    run = CliRunner()
    plan = ["plan", tmp_path / "teacher", "--vocab-size", SIZE, "--data", tmp_path / "text.jsonl"]
    for line in ([*plan, "-o", tmp_path / "plan"], ["plan", tmp_path / "teacher", "--vocab-size", SIZE]):
        done = run.invoke(app, list(map(str, line)))
        assert done.exit_code == 0, done.output
        assert "vocab" in done.output
    for name, options in (("streamed", []), ("loaded", ["--verify"])):
        line = ["prune", tmp_path / "teacher", "--plan", tmp_path / "plan", "-o", tmp_path / name, *options]
        done = run.invoke(app, list(map(str, line)))
        assert done.exit_code == 0, done.output
        student, cut = (kind.from_pretrained(tmp_path / name) for kind in (AutoModelForCausalLM, AutoTokenizer))
        assert student.config.vocab_size == len(cut) == SIZE
    line = ["distill", tmp_path / "loaded", "--teacher", tmp_path / "teacher", "--train-data", tmp_path / "text.jsonl"]
    settings = ("max_steps=1", "max_length=16", "per_device_train_batch_size=2", "use_cpu=true", "bf16=false")
    line += ["-o", tmp_path / "out", *(f"--set={one}" for one in settings)]
    done = run.invoke(app, list(map(str, line)))
    assert done.exit_code == 0, done.output
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == SIZE


def test_the_block_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, tokenizer = teacher_of(dtype=torch.float32)
    [block] = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(block.replace("0.5", str(SIZE)), {"teacher": teacher, "tokenizer": tokenizer, "texts": texts()})
    assert len(AutoTokenizer.from_pretrained("student")) == SIZE


def test_what_cannot_read_other_tokens_refuses_a_cut_vocabulary(tmp_path):
    """Recipes and evaluation: by name, before anything is computed."""
    teacher, _, _, student = cut_alone("llama")
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4})
    bare = copy.deepcopy(student)
    del bare.pruning_plan  # which tokens it has is not known
    with pytest.raises(MismatchError, match="vocabulary of 17 tokens"):
        evaluate_models({"teacher": teacher, "student": bare}, rows, processing_class=bpe_tokenizer(), speed=False)
    recipe = {"teacher": "x", "data": {"train": "x", "eval": "x"}, "output_dir": str(tmp_path)}
    cut, width = {"vocab_size": 9}, {"hidden_size": 8}
    for words, section in (
        (
            "prune.vocab_size with teacher_cache.server: a server gives",
            {"prune": cut, "teacher_cache": {"top_k": 4, "server": "http://localhost:1"}},
        ),
        ("prune.vocab_size in the rounds 1 and 2", {"prune": cut, "rounds": [{"prune": width}] * 2}),
    ):
        with pytest.raises(DataError, match=words):
            check_settings(Recipe.from_dict({**recipe, **section}))


@pytest.fixture
def tokenizer_of_recipe():
    return bpe_tokenizer()


@pytest.fixture
def recipe_of(tmp_path, tokenizer_of_recipe):
    teacher, _ = teacher_of(dtype=torch.float32)
    save_model(teacher, tmp_path / "teacher", tokenizer_of_recipe)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts()))
    settings = {"max_steps": 3, "max_length": 16, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False}
    return {
        "teacher": str(tmp_path / "teacher"),
        "data": {"train": str(text), "eval": str(text)},
        "output_dir": str(tmp_path / "run"),
        "scores": {"num_rows": 8, "max_length": 16},
        "distill": settings,
        "evaluate": {"num_rows": 6, "speed": True},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"verify": True, "prune": {"vocab_size": SIZE, "repair": "least_squares"}},
        {
            "controls": ["random_pruning", "random_init", "cross_entropy"],
            "teacher_cache": {"top_k": 6},
            "evaluate": {"num_rows": 6, "speed": False, "prompts": ["ab"], "draft_prompts": 2},
        },
    ],
)
def test_a_recipe_cuts_the_vocabulary(tmp_path, recipe_of, tokenizer_of_recipe, changes):
    """All stages: the student that is distilled and measured has its own tokenizer."""
    recipe = {**recipe_of, **changes}
    recipe["prune"] = {"vocab_size": SIZE, "intermediate_size": 0.5, **changes.get("prune", {})}
    if "verify" in changes:  # prompts in a column of another name
        (tmp_path / "prompts.jsonl").write_text('{"question": "ab", "text": 1}\n')
        prompts = {"source": str(tmp_path / "prompts.jsonl"), "text_field": "question"}
        recipe["evaluate"] = {"num_rows": 6, "speed": False, "chat": {"prompts": prompts, "max_new_tokens": 4}}
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        (Path(recipe["teacher"]) / "chat_template.jinja").write_text(template)
    tokenizer = tokenizer_of_recipe
    checked = check_recipe(Recipe.from_dict(recipe))
    assert checked["sizes"]["vocab"] == {"teacher": VOCAB, "student": SIZE}
    run_recipe(Recipe.from_dict(recipe))
    run = tmp_path / "run"
    plan = PruningPlan.from_pretrained(run)
    for folder in (run, run / "pruned"):
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == prune_tokenizer(tokenizer, plan).get_vocab()
        assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == SIZE
    models = json.loads((run / "evaluation.json").read_text())["models"]
    assert all(models[name]["metrics"]["kl_divergence"]["value"] > 0 for name in ("pruned", "student"))
    assert "tokens per byte instead of" in (run / "README.md").read_text()
    assert ("chat" in models["student"]) == ("verify" in changes)
    for name in changes.get("controls", ()):
        assert len(AutoTokenizer.from_pretrained(run / "controls" / name)) == SIZE
        assert models[name]["metrics"]["kl_divergence"]["value"] > 0
        assert models["student"]["draft"]["identical_outputs"]["value"] == 1
        assert "draft" not in models[name]


@pytest.mark.slow
def test_the_last_of_several_rounds_cuts_the_vocabulary(recipe_of, tokenizer_of_recipe):
    recipe = {**recipe_of, "prune": {}}
    recipe["rounds"] = [{"prune": {"intermediate_size": 0.75}}, {"prune": {"vocab_size": SIZE}}]
    run = run_recipe(Recipe.from_dict(recipe))
    assert AutoModelForCausalLM.from_pretrained(run / "rounds" / "1").config.vocab_size == VOCAB
    plan = PruningPlan.from_pretrained(run)
    assert AutoTokenizer.from_pretrained(run).get_vocab() == prune_tokenizer(tokenizer_of_recipe, plan).get_vocab()
    models = json.loads((run / "evaluation.json").read_text())["models"]
    assert all(models[name]["metrics"]["kl_divergence"]["value"] > 0 for name in ("round_1", "pruned", "student"))


def dead_in_half(teacher):
    """The model with half of its neurons dead, so that cutting them changes nothing."""
    with torch.no_grad():
        for name, weight in teacher.named_parameters():
            if name.endswith("down_proj.weight"):
                weight[:, weight.shape[1] // 2 :] = 0
            if name.endswith("gate_proj.weight"):
                weight[weight.shape[0] // 2 :] = 0
    return teacher


@pytest.mark.parametrize("learns_from", ["original", pytest.param("previous", marks=pytest.mark.slow)])
def test_an_earlier_round_cuts_the_vocabulary(recipe_of, tokenizer_of_recipe, learns_from):
    """The round after it cuts dead neurons alone, and training changes nothing: no student differs from the teacher.

    The models are compared on the student's tokens, with the recipe's teacher as the reference.
    """
    teacher = dead_in_half(teacher_of(dtype=torch.float32)[0])
    save_model(teacher, recipe_of["teacher"], tokenizer_of_recipe)
    recipe = {**recipe_of, "prune": {"multiple_of": 1}, "evaluate": {"num_rows": 6, "speed": False}}
    recipe["distill"] = {**recipe_of["distill"], "learning_rate": 1e-30, "max_steps": 2}
    last = {"prune": {"intermediate_size": 0.5}, "teacher": learns_from}
    run = run_recipe(Recipe.from_dict({**recipe, "rounds": [{"prune": {"vocab_size": SIZE}}, last]}))
    first, plan = PruningPlan.from_pretrained(run / "rounds" / "1"), PruningPlan.from_pretrained(run)
    assert "vocab" not in plan.kept
    assert plan.teacher_tokens.tolist() == first.kept["vocab"].tolist()
    tokenizers = (prune_tokenizer(tokenizer_of_recipe, one) for one in (first, plan))
    for one in (*tokenizers, AutoTokenizer.from_pretrained(run / "rounds" / "1")):
        assert one.get_vocab() == AutoTokenizer.from_pretrained(run).get_vocab()
    student = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float64)
    assert student.config.intermediate_size == teacher.config.intermediate_size // 2
    kept = torch.from_numpy(first.kept["vocab"])
    ids = torch.randint(0, SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = teacher.double()(kept[ids]).logits[..., kept]
        torch.testing.assert_close(student(ids).logits, expected, rtol=1e-5, atol=1e-5)
    models = json.loads((run / "evaluation.json").read_text())["models"]
    for name in ("round_1", "pruned", "student"):
        assert models[name]["metrics"]["kl_divergence"]["value"] == pytest.approx(0, abs=1e-6)


def test_a_search_counts_the_vocabulary_that_stays_and_compares_with_all_of_it():
    """The divergences are those of the same shapes with the whole vocabulary."""
    teacher, tokenizer = teacher_of(dtype=torch.float32)
    scores = estimate_importance(teacher, metric="random")
    arguments = {
        "space": {"intermediate_size": [0.5, 0.75]}, "calibration_data": texts()[:8], "processing_class": tokenizer,
        "max_parameters": 1e9, "tolerance": 0.9999, "max_length": 16, "show_progress": False,
    }  # fmt: skip
    arguments["max_parameters"] = count_parameters(teacher)
    whole, cut = (
        search_architectures(teacher, scores, base=PrunerConfig(**base), **arguments).candidates
        for base in ({}, {"vocab_size": SIZE})
    )
    rows = VOCAB - SIZE
    lost = 2 * rows * teacher.config.hidden_size  # embeddings and head
    assert [one.pruned_kl for one in cut] == [one.pruned_kl for one in whole]
    assert [one.num_parameters for one in cut] == [one.num_parameters - lost for one in whole]
    assert {one.request.vocab_size for one in cut} == {SIZE}


def test_counts_of_another_tokenizer_are_refused():
    teacher, tokenizer = teacher_of(dtype=torch.float32)
    other = bpe_tokenizer()
    other.add_tokens(["<other>"])
    counts = count_tokens(texts(), other)
    with pytest.raises(MismatchError, match="token_counts were made with another tokenizer"):
        prune_model(
            teacher,
            PrunerConfig(vocab_size=SIZE),
            calibration_data=texts(),
            processing_class=tokenizer,
            token_counts=counts,
            show_progress=False,
        )
