"""What a training run refuses, records and keeps as the best, so that nothing wrong is saved without a word."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, HfArgumentParser, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from minitron_hf.distillation.cache_writer import cache_teacher_logits
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.correction import correct_teacher
from minitron_hf.distillation.teacher_cache import load_teacher_cache
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import DataError, DivergedError, MismatchError, OutputError, UnsupportedModelError
from minitron_hf.files import read_json, write_json
from minitron_hf.models import load_model, load_tokenizer, savable_generation_config
from minitron_hf.pruning.prune import prune_model
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokenizer, pocket_tokens
from test_trainer import (  # noqa: F401 (the fixture)
    Gradients,
    float64,
    make_trainer,
    models,
    naive_sums,
    narrow_student,
    text_dataset,
    token_dataset,
)

# ---- The best checkpoint ----


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        *((name, False) for name in ("loss", "kl", "ce", "divergence", "hidden", "embedding")),
        *((f"eval_{name}", False) for name in ("loss", "kl", "eval_ce", "held_out_kl")),
        *((f"eval_lambada_openai_{name}", False) for name in ("perplexity", "word_perplexity", "bits_per_byte")),
        ("eval_mmlu_brier_score", False),
        *(
            (name, True)
            for name in ("agreement", "eval_agreement", "mean_token_accuracy", "rouge", "eval_lambada_openai_acc")
        ),
    ],
)
def test_less_is_better_of_losses(tmp_path, metric, greater):
    assert DistillationConfig(str(tmp_path), metric_for_best_model=metric).greater_is_better is greater
    stated = DistillationConfig(str(tmp_path), metric_for_best_model=metric, greater_is_better=not greater)
    assert stated.greater_is_better is not greater


# ---- Arguments ----


def test_arguments_on_a_command_line(tmp_path):
    parser = HfArgumentParser((DistillationConfig,))
    given = ["--output_dir", str(tmp_path), "--hidden_loss", "mse", "--hidden_layers", "[[-2, -1], [0, 0]]"]
    [args] = parser.parse_args_into_dataclasses(given)
    assert args.hidden_layers == [[-2, -1], [0, 0]]
    for wrong in ("-2", "[-2, -2]", "[[1.5, 1]]", "[[true, 1]]", "[[]]", "two"):
        with pytest.raises(ValueError, match="expected a list of pairs"):
            DistillationConfig(str(tmp_path), hidden_loss="mse", hidden_layers=wrong)


@pytest.mark.parametrize("kind", [TrainingArguments, SFTConfig])
def test_arguments_of_other_trainers_are_converted(tmp_path, kind):
    student, teacher = models(dtype=torch.float32)
    args = kind(str(tmp_path), report_to="none", bf16=False, learning_rate=3e-4, hub_token="hf_x")
    trainer = DistillationTrainer(
        student, teacher, args, train_dataset=token_dataset(), processing_class=pocket_tokenizer()
    )
    assert isinstance(trainer.args, DistillationConfig)
    assert (trainer.args.learning_rate, trainer.args.hub_token, trainer.args.bf16) == (3e-4, "hf_x", False)
    with pytest.raises(MismatchError, match="args is a dict"):
        DistillationTrainer(student, teacher, {}, train_dataset=token_dataset(), processing_class=pocket_tokenizer())


def test_how_to_load_a_teacher_that_is_loaded_is_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    with pytest.raises(MismatchError, match="teacher_model_init_kwargs say how"):
        make_trainer(tmp_path, student, teacher, token_dataset(), teacher_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(MismatchError, match="how a student is loaded"):
        make_trainer(tmp_path, student, teacher, token_dataset(), model_init_kwargs={"dtype": "float32"})
    args = DistillationConfig(str(tmp_path), teacher_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(MismatchError, match="a cached one is not loaded"):
        cache_teacher_logits(teacher, token_dataset(), tmp_path, args=args, processing_class=pocket_tokenizer())


def test_a_former_teacher_is_trained_or_refused(tmp_path):
    student, teacher = models(dtype=torch.float32)
    make_trainer(tmp_path / "run", student, teacher, token_dataset())  # freezes the teacher
    with pytest.raises(UnsupportedModelError, match="are frozen"):
        make_trainer(tmp_path / "other", teacher, student, token_dataset())


# ---- Folders that hold a model already ----


def test_folders_of_the_models_are_not_overwritten(tmp_path):
    student, teacher = models(dtype=torch.float32)
    for model, name in ((student, "student"), (teacher, "teacher")):
        model.save_pretrained(tmp_path / name)
    before = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    loaded = load_model(tmp_path / "teacher")
    for out, given in (("teacher", str(tmp_path / "teacher")), ("teacher", loaded), ("student", teacher)):
        with pytest.raises(OutputError, match=f"is the {out}'s own"):
            make_trainer(tmp_path / "x" / ".." / out, str(tmp_path / "student"), given, token_dataset())
    with pytest.raises(OutputError, match="is the teacher's own"):
        correct_teacher(
            str(tmp_path / "teacher"), text_dataset(), tmp_path / "teacher", original_learning_rate=1e-3, num_tokens=9
        )
    with pytest.raises(OutputError, match="is the teacher's own"):
        cache_teacher_logits(loaded, text_dataset(), tmp_path / "teacher", processing_class=pocket_tokenizer())
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == before


def test_a_student_has_no_code_of_its_own(tmp_path):
    teacher = pocket_model("llama", dtype=torch.float32)
    teacher.config.auto_map = {"AutoModelForCausalLM": "modeling_custom.MyLlama"}
    student = prune_model(teacher, PrunerConfig(layers_to_drop=[1]))
    student.save_pretrained(tmp_path / "pruned")
    student.config.auto_map = teacher.config.auto_map  # as one that was cut by other means
    trainer = make_trainer(tmp_path / "run", student, teacher, token_dataset())
    trainer.save_model()
    trainer.save_student(tmp_path / "student")
    options = {"original_learning_rate": 1e-3, "num_tokens": 9, "max_length": 9, "bf16": False}
    options["processing_class"] = pocket_tokenizer()
    correct_teacher(copy.deepcopy(teacher), text_dataset(), tmp_path / "corrected", **options)
    for folder in ("pruned", "run", "student", "corrected"):
        assert "auto_map" not in json.loads((tmp_path / folder / "config.json").read_text()), folder
    assert teacher.config.auto_map
    assert student.config.auto_map


# ---- The map to the teacher's width, and its weight ----


def test_an_optimizer_of_ones_own_trains_the_map(tmp_path):
    student, teacher = narrow_student(torch.float32)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    args = {"report_to": "none", "max_steps": 1, "hidden_loss": "mse", "save_strategy": "no", "disable_tqdm": True}
    options = {"train_dataset": token_dataset(), "processing_class": pocket_tokenizer()}

    def trainer(optimizers):
        config = DistillationConfig(str(tmp_path), **args)
        return DistillationTrainer(student, teacher, config, optimizers=optimizers, **options)

    own = trainer((optimizer, None))
    before = own._intermediate.projection.weight.detach().clone()
    own.train()
    assert not torch.equal(own._intermediate.projection.weight, before)
    own.train()  # again, with the map in the optimizer already
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(student.parameters(), lr=0.1), lambda step: 1.0)
    with pytest.raises(MismatchError, match="does not know the projection"):
        trainer((schedule.optimizer, schedule)).train()


@pytest.mark.usefixtures("float64")
def test_evaluations_compare_before_and_after_training(tmp_path):
    """With a dynamic weight the intermediate losses count as much as the divergence, of whatever tokens."""
    student, teacher = narrow_student()
    options = {"hidden_loss": "cosine", "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    options["eval_on_start"] = True
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), token_dataset(seed=9), **options)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 4
    for entry in evaluations:
        assert entry["eval_loss"] == pytest.approx(2 * entry["eval_kl"], rel=1e-12)
        assert entry["eval_alpha"] == pytest.approx(entry["eval_kl"] / entry["eval_hidden"], rel=1e-12)


# ---- Values that are not numbers ----


def test_json_files_are_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": "NaN"}})
    text = (tmp_path / "x.json").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    (tmp_path / "old.json").write_text('{"kl": [NaN, -Infinity, 1]}')
    assert read_json(tmp_path / "old.json") == {"kl": [None, None, 1]}
    assert json.loads(text, parse_constant=refuse) == {"a": [None, [None, 1.5]], "b": {"c": None, "d": "NaN"}}


class Spoil(TrainerCallback):
    """Sets a weight to NaN before a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_run_that_diverges_stops_before_it_saves(tmp_path, logging_steps):
    student, teacher = models(dtype=torch.float32)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": logging_steps}
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), callbacks=[Spoil(3)], **options)
    with pytest.raises(DivergedError, match="not finite at step 4"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(DivergedError, match="holds NaN"):
        trainer.save_student()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_run_that_diverges_says_so_without_logs_and_checkpoints(tmp_path):
    student, teacher = models(dtype=torch.float32)
    options = {"max_steps": 2, "logging_strategy": "no"}
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), callbacks=[Spoil(1)], **options)
    with pytest.raises(DivergedError, match="not finite at step 2"):
        trainer.train()


def test_scores_of_weights_that_are_no_numbers_are_refused():
    model = pocket_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    rows = pocket_tokens(4, 9).tolist()
    for metric in ("activation", "taylor", "magnitude"):
        with pytest.raises(UnsupportedModelError, match="not finite"):
            estimate_importance(model, rows, metric=metric, max_length=9, show_progress=False)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_that_a_bias_rules_out_count_for_nothing(tmp_path, temperature):
    """Models with a padded vocabulary set the bias of the rest to -inf: KL and gradient are those of the others."""
    student, teacher = models("phi", vocab_size=97)
    data = token_dataset()
    data = Dataset.from_dict({"input_ids": [[token % 90 for token in row["input_ids"]] for row in data]})

    def kl_of(rows):
        """Over the first 90 tokens alone."""
        total = count = 0
        for row in rows:
            tokens = torch.tensor(row["input_ids"])[None]
            z_s, z_t = (m(tokens, use_cache=False).logits[0, :-1, :90] / temperature for m in (student, teacher))
            log_p, log_q = z_t.detach().log_softmax(-1), z_s.log_softmax(-1)
            total = total + (log_p.exp() * (log_p - log_q)).sum()
            count += tokens.shape[1] - 1
        return temperature**2 * total / count

    for model in (student, teacher):
        with torch.no_grad():
            model.get_output_embeddings().bias[90:] = -torch.inf
    expected = kl_of(data)
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(expected, weights)
    seen = Gradients()
    options = {"max_steps": 1, "max_grad_norm": 0, "temperature": temperature, "bf16": False}
    trainer = make_trainer(tmp_path, student, teacher, data, callbacks=[seen], **options)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(expected.item() / temperature**2, rel=1e-9)
    for found, gradient in zip(seen.values.values(), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-10)


# ---- Adapters ----


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_learn_intermediate_losses(tmp_path, task_type, name):
    student, teacher = models(name, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules="all-linear", task_type=task_type)
    options = {"hidden_loss": "cosine", "embedding_loss": "mse", "max_steps": 1, "peft_config": config}
    trainer = make_trainer(tmp_path, student, teacher, token_dataset(), token_dataset(), **options)
    trainer.train()
    assert trainer.state.log_history[0]["hidden"] > 0
    assert trainer.evaluate()["eval_hidden"] > 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_teacher_with_an_adapter_teaches_as_merged(tmp_path, task_type):
    student, teacher = models()
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type=task_type)
    adapted = get_peft_model(teacher, config)
    data = token_dataset()
    kl, _, _, count = naive_sums(student, adapted, data)
    args = DistillationConfig(str(tmp_path / "cache"), report_to="none", hidden_loss="mse", bf16=False, max_length=64)
    options = {"top_k": 97, "args": args, "processing_class": pocket_tokenizer(), "dtype": "float32"}
    cache = load_teacher_cache(cache_teacher_logits(adapted, data, tmp_path / "cache", **options))
    trainer = make_trainer(tmp_path / "run", student, adapted, data, data, hidden_loss="mse", max_steps=1, bf16=False)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kl.item() / count, rel=1e-9)
    assert trainer.evaluate(cache)["eval_kl"] == pytest.approx(kl.item() / count, rel=1e-3)
    trainer.train()
    assert trainer.distillation_record()["teacher"]["adapter"] == "LORA"


# ---- Tokenizers with more tokens than the models ----


def larger_tokenizer():
    tokenizer = pocket_tokenizer()
    tokenizer.add_tokens([f"<{index}>" for index in range(len(tokenizer), 97)])
    tokenizer.add_tokens(["<new>"])
    assert len(tokenizer) == 98
    return tokenizer


def trainer_with(folder, tokenizer, data, student=None, teacher=None, **args):
    pair = models(dtype=torch.float32) if student is None else (student, teacher)
    config = DistillationConfig(str(folder), report_to="none", disable_tqdm=True, max_steps=1, bf16=False, **args)
    return DistillationTrainer(*pair, config, train_dataset=data, processing_class=tokenizer)


def test_tokens_without_an_embedding_are_refused_with_the_remedy(tmp_path):
    tokenizer = larger_tokenizer()
    size = len(tokenizer)
    data = Dataset.from_dict({"text": ["abc<new>def"] * 4})
    with pytest.raises(MismatchError, match=rf"'<new>'.*Resize both: student.resize_token_embeddings\({size}\)"):
        trainer_with(tmp_path, tokenizer, data)
    trainer_with(tmp_path, tokenizer, Dataset.from_dict({"text": ["abcdef"] * 4})).train()  # no text has it
    student, teacher = models(dtype=torch.float32)
    for model in (student, teacher):
        model.resize_token_embeddings(size)
    trainer_with(tmp_path, tokenizer, data, student, teacher).train()
    foreign = Dataset.from_dict({"input_ids": [[1, 2, 3], [1, 97, 2]]})
    with pytest.raises(DataError, match="token 97"):
        trainer_with(tmp_path, pocket_tokenizer(), foreign).train()


def test_a_chat_template_that_resizes_the_student_is_refused_with_the_remedy(tmp_path):
    tokenizer = larger_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    data = Dataset.from_dict({"messages": [[{"role": "user", "content": "abc"}]] * 4})
    path = str(tmp_path / "chat")
    student, teacher = models(dtype=torch.float32)
    with pytest.raises(MismatchError, match=r"chat_template_path brings a tokenizer.+Resize both") as refused:
        trainer_with(tmp_path / "run", pocket_tokenizer(), data, student, teacher, chat_template_path=path)
    size = student.config.vocab_size
    assert f"teacher.resize_token_embeddings({size})" in str(refused.value)
    for model in (student, teacher):
        model.resize_token_embeddings(size)
    trainer_with(tmp_path / "run", pocket_tokenizer(), data, student, teacher, chat_template_path=path).train()


def test_processors_stand_for_their_tokenizers():
    class Processor:
        tokenizer = pocket_tokenizer()

    assert load_tokenizer(Processor()) is Processor.tokenizer


# ---- Dtypes by name ----


def test_a_student_is_saved_in_a_dtype_by_its_usual_name(tmp_path):
    student, teacher = models(dtype=torch.float32)
    trainer = make_trainer(tmp_path / "run", student, teacher, token_dataset())
    for name in ("bf16", "bfloat16", "torch.bfloat16"):
        trainer.save_student(tmp_path / name, dtype=name)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(DataError, match="dtype='int8': expected"):
        trainer.save_student(tmp_path / "x", dtype="int8")
    assert not (tmp_path / "x").exists()


# ---- What TRL's trainer logs ----


@pytest.mark.usefixtures("float64")
def test_logs_hold_what_supervised_training_logs(tmp_path):
    student, teacher = models()
    data = token_dataset(labels=True)
    args = SFTConfig(str(tmp_path), report_to="none", max_steps=1, logging_steps=1, bf16=False, disable_tqdm=True)
    options = {"train_dataset": data, "eval_dataset": data, "processing_class": pocket_tokenizer()}
    supervised = SFTTrainer(copy.deepcopy(student), args, **options)
    supervised.train()
    expected, evaluated = supervised.state.log_history[0], supervised.evaluate()
    options = {"max_steps": 1, "ce_weight": 1.0, "kd_weight": 0.0, "bf16": False}
    trainer = make_trainer(tmp_path, student, teacher, data, data, **options)
    trainer.train()
    found = trainer.state.log_history[0]
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    trainer.model.load_state_dict(supervised.model.state_dict())
    ours = trainer.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert ours[name] == pytest.approx(evaluated[name], rel=1e-5), name
    assert "trl" in trainer.model.model_tags


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ({"story": ["a b c"]}, {}, "train dataset has no column 'text'; its columns are 'story'"),
        ({"text": ["a b c"]}, {"dataset_text_field": "story"}, "no column 'story'"),
        ({"prompt": ["a b c"]}, {}, "no column 'completion'"),
        ({"text": [7]}, {}, "column 'text' of the train dataset holds a int, expected text"),
        ({"text": ["", " \n"]}, {}, "column 'text' of the train dataset holds no text in any row"),
        ({"text": ["a b c", None]}, {}, "column 'text' of the train dataset is empty in 1 rows"),
    ],
)
def test_rows_without_their_text_are_refused_by_name(tmp_path, rows, arguments, message):
    with pytest.raises(DataError, match=message):
        make_trainer(tmp_path, *models("llama"), Dataset.from_dict(rows), **arguments)


def test_nothing_of_ours_warns_of_a_deprecated_attribute(tmp_path):
    """PEFT reads `is_gradient_checkpointing` of each model that it is put on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning)
        trainer = make_trainer(tmp_path, *models("llama"), token_dataset(), peft_config=LoraConfig(), max_steps=1)
        trainer.train()
        trainer.save_student()


def test_sampling_values_without_do_sample_end_no_training(tmp_path):
    """Transformers saves them as they were loaded, but not once the trainer has added the tokenizer's ids."""
    student, teacher = models(dtype=torch.float32)
    student.generation_config = GenerationConfig(temperature=0.9, top_p=0.6)
    trainer = make_trainer(
        tmp_path, student, teacher, token_dataset(), max_steps=1, save_strategy="steps", save_steps=1, bf16=False
    )
    trainer.train()
    trainer.save_student(tmp_path / "student")
    saved = GenerationConfig.from_pretrained(tmp_path / "student")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)

    greedy = savable_generation_config(GenerationConfig(do_sample=False, temperature=0.9, max_new_tokens=7))
    assert (greedy.do_sample, greedy.temperature, greedy.max_new_tokens) == (False, None, 7)
    student.generation_config = GenerationConfig(num_beams=1, early_stopping=True, top_p=0.6)
    with pytest.raises(DataError, match=r"(?s)cannot be saved: .*Mend its generation_config.json"):
        make_trainer(tmp_path / "other", student, teacher, token_dataset(), bf16=False)
