"""Rows of text and images for calibration, distillation and evaluation, against the stock model on each row alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from minitron_hf.data import padded_batches, token_rows, tokenize_once
from minitron_hf.data.images import has_images, holds_images, placeholder_ids
from minitron_hf.distillation.config import DistillationConfig
from minitron_hf.distillation.trainer import DistillationTrainer
from minitron_hf.errors import DataError
from minitron_hf.evaluation.evaluate import evaluate_models
from minitron_hf.pruning.prune import prune_model
from minitron_hf.scoring.importance import estimate_importance
from minitron_hf.search import budget
from minitron_hf.search.architectures import search_architectures
from minitron_hf.sizes.request import PrunerConfig
from pocket import pocket_model, pocket_tokenizer, starting_tokenizer
from pocket_images import (
    IMAGE_LENGTH,
    TEMPLATE,
    image_dataset,
    image_rows,
    images,
    pocket_image_model,
    pocket_processor,
)

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "images.md"
QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def teacher():
    return pocket_image_model(torch.float32)


@pytest.fixture
def processor():
    return pocket_processor()


def stock_inputs(processor: Any, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the processor makes of one row, with the image put into its message."""
    [user, assistant] = row["messages"]
    image, text = user["content"]
    filled = {**user, "content": [{**image, "image": row["images"][0]}, text]}
    return processor.apply_chat_template([filled, assistant], tokenize=True, return_dict=True, return_tensors="pt")


def other(model: Any, by: float = 0.02) -> Any:
    """The same model with slightly different weights in its language model."""
    changed = pocket_image_model(model.dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.model.language_model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return changed


def predictions(model: Any, processor: Any, row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the stock model where text is predicted, and the tokens predicted there."""
    given = stock_inputs(processor, row)
    ids = given["input_ids"][0]
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits[0]
    places = [place for place in range(1, len(ids)) if ids[place] != processor.tokenizer.image_token_id]
    return logits.log_softmax(-1)[[place - 1 for place in places]], ids[places]


# Rows


def test_rows_are_the_tokens_of_the_processor(processor):
    data = image_dataset()
    rows = token_rows(data, processor, max_length=64)
    expected = [tuple(stock_inputs(processor, row)["input_ids"][0].tolist()) for row in image_rows()]
    assert list(rows.rows) == expected
    assert rows.rows[0].count(processor.tokenizer.image_token_id) == IMAGE_LENGTH
    assert placeholder_ids(processor) == (processor.tokenizer.image_token_id,)
    assert rows.num_predicted == rows.num_tokens - len(rows) * (1 + IMAGE_LENGTH)
    assert tokenize_once(data, processor) is data
    assert has_images(data[0])


def test_batches_hold_the_pixels_of_their_rows(processor):
    rows = token_rows(image_rows(), processor, max_length=64).select([4, 1, 2])
    batches = list(padded_batches(rows, 2))
    for number, row in enumerate((4, 1, 2)):
        given, batch = stock_inputs(processor, image_rows()[row]), batches[number // 2]
        length = given["input_ids"].shape[1]
        assert torch.equal(batch["pixel_values"][number % 2], given["pixel_values"][0])
        assert torch.equal(batch["token_type_ids"][number % 2, :length], given["token_type_ids"][0])
        assert batch["attention_mask"][number % 2].sum() == length


def test_the_digest_tells_images_apart(processor):
    one, same, changed = (token_rows(image_rows(seed=seed), processor, max_length=64) for seed in (0, 0, 1))
    assert one.rows == changed.rows
    assert one.digest == same.digest != changed.digest


def test_long_rows_lose_text_and_never_a_part_of_an_image(processor):
    rows = token_rows(image_rows(), processor, max_length=12)
    assert [len(row) for row in rows.rows] == [12] * 6
    [batch] = padded_batches(rows, 6)
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (6, 12)
    with pytest.raises(DataError, match=r"Row 0 .*The images of a row end at token 9, .* at most 7 .*max_length=9"):
        token_rows(image_rows(), processor, max_length=7)


def test_rows_of_text_alone_stand_among_the_others(teacher, processor):
    rows = image_rows()
    [user, assistant] = rows[1]["messages"]
    rows[1] = {"messages": [{**user, "content": user["content"][1:]}, assistant], "images": []}
    [batch] = padded_batches(token_rows(rows, processor, max_length=64), 6)
    assert len(batch["pixel_values"]) == 5
    one, six = (
        estimate_importance(teacher, rows, processing_class=processor, max_length=64, batch_size=size, **QUIET)
        for size in (1, 6)
    )
    torch.testing.assert_close(one.axes["ffn"], six.axes["ffn"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_images_may_begin_in_a_later_row(tmp_path, teacher, processor, kind):
    """Rows without a list of images are those with an empty one, in calibration and in training."""
    rows = image_rows()
    for row in rows[:2]:
        row["messages"][0]["content"], row["images"] = [{"type": "text", "text": "What?"}], []
    empty = token_rows(rows, processor, max_length=64)
    data = kind([{**row, "images": row["images"] or None} for row in rows])
    found = token_rows(data, processor, max_length=64)
    assert found.rows == empty.rows
    assert found.digest == empty.digest
    assert not holds_images(data[:2] if kind is list else data.select([0, 1]))
    if kind is list:
        with pytest.raises(DataError, match=r"every one has a list 'images', empty where there is none"):
            token_rows(iter(data[2:]), processor, max_length=64)
    else:
        losses = [
            make_trainer(tmp_path, other(teacher), teacher, given, processor).evaluate()["eval_kl"]
            for given in (data, Dataset.from_list(rows))
        ]
        assert losses[0] == losses[1] > 0


def test_texts_hold_the_marks_of_their_images(processor):
    texts = [{"text": f"See <boi>: a cat {index}", "image": image} for index, image in enumerate(images(2))]
    rows = token_rows(texts, processor, max_length=64)
    assert [row.count(processor.tokenizer.image_token_id) for row in rows.rows] == [IMAGE_LENGTH] * 2
    with pytest.raises(DataError, match=r"Row 1 .*The processor cannot read the row"):
        token_rows([texts[0], {"text": "No mark", "image": images(1)[0]}], processor, max_length=64)


def test_texts_begin_and_completions_end_as_without_images(processor):
    """A tokenizer that adds a token in front of texts does so beside images, too."""
    starting = pocket_processor()
    starting.tokenizer = starting_tokenizer(
        extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    )
    [image] = images(1)
    [row] = token_rows([{"text": "<boi>abcd", "image": image}], starting, max_length=64).rows
    [plain] = token_rows([{"text": "abcd", "images": []}], starting, max_length=64).rows
    begin = starting.tokenizer.bos_token_id
    assert row[0] == plain[0] == begin
    assert (*row, *plain).count(begin) == 2
    [row] = token_rows([{"prompt": "<boi>ab", "completion": "cd", "images": [image]}], starting, max_length=64).rows
    assert (row[0], row[-1]) == (begin, starting.tokenizer.eos_token_id)


def test_prompts_are_context(processor):
    prompts = [
        {"prompt": row["messages"][:1], "completion": row["messages"][1:], "images": row["images"]}
        for row in image_rows()
    ]
    rows = token_rows(prompts, processor, max_length=64)
    text = processor.tokenizer.decode([rows.rows[2][place] for place in rows.predicted(2)])
    assert text == "a:A cat and a dog and a dog</s>"


def test_marked_turns_of_the_assistant_count_alone():
    marked = TEMPLATE.replace("{% for part in", "{% generation %}{% for part in").replace(
        "{% endif %}</s>", "{% endgeneration %}{% endif %}</s>"
    )
    assert "generation" in marked
    rows = token_rows(image_rows(), pocket_processor(marked), max_length=64, assistant_only=True)
    assert rows.num_predicted < rows.num_tokens
    with pytest.raises(DataError, match="can be found only by"):
        token_rows(image_rows(), pocket_processor(), max_length=64, assistant_only=True)


# Calibration


def test_scores_see_the_images_of_every_row(teacher, processor):
    """Mean absolute activations of the MLP over all tokens and rows, by hooks on stock forward passes."""
    seen = []
    down = teacher.model.language_model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].abs().mean(0)))
    with torch.no_grad():
        for row in image_rows():
            teacher(**stock_inputs(processor, row), use_cache=False)
    handle.remove()
    settings = {"batch_reduction": "mean", "max_length": 64, "batch_size": 4, **QUIET}
    scores = estimate_importance(teacher, image_dataset(), processing_class=processor, **settings)
    torch.testing.assert_close(scores.axes["ffn"][1], torch.stack(seen).mean(0), rtol=1e-4, atol=1e-6)
    assert scores.settings["num_rows"] == 6
    assert scores.settings["packing"] is False

    blind = estimate_importance(teacher, image_dataset(seed=1), processing_class=processor, **settings)
    assert not torch.allclose(scores.axes["ffn"], blind.axes["ffn"])
    same = estimate_importance(teacher, image_rows(), processing_class=processor, **{**settings, "batch_size": 2})
    assert scores.digests["data"] == same.digests["data"] != blind.digests["data"]


def test_a_loader_with_a_collator_gives_the_same_scores(teacher, processor):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collator = DataCollatorForVisionLanguageModeling(processor)
    loader = DataLoader(image_rows(), batch_size=3, collate_fn=lambda rows: collator([dict(row) for row in rows]))
    names = ["activation", "taylor"]
    found = estimate_importance(teacher, loader, metric=names, depth_metric="perplexity", block_length=1, **QUIET)
    same = estimate_importance(
        teacher,
        image_rows(),
        processing_class=processor,
        metric=names,
        depth_metric="perplexity",
        block_length=1,
        batch_size=4,
        max_length=64,
        **QUIET,
    )
    for name in names:
        for axis in ("ffn", "heads", "hidden"):
            torch.testing.assert_close(found[name].axes[axis], same[name].axes[axis], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found["taylor"].blocks, same["taylor"].blocks, rtol=1e-3, atol=1e-4, equal_nan=True)

    logs = [predictions(teacher, processor, row) for row in image_rows()]
    losses = torch.cat([-log.gather(1, ids[:, None])[:, 0] for log, ids in logs])
    assert same["taylor"].settings["depth_baseline"] == pytest.approx(losses.mean().exp().item(), rel=1e-4)


def test_a_model_is_pruned_and_searched_by_images(teacher, processor):
    request = PrunerConfig(intermediate_size=31, hidden_size=24, multiple_of=1, repair="least_squares")
    settings = {"calibration_data": image_dataset(), "processing_class": processor, "max_length": 64, **QUIET}
    student = prune_model(teacher, request, verify=True, **settings)
    assert "Verified" in student.pruning_plan.notes[-1]
    scores = estimate_importance(teacher, image_rows(), processing_class=processor, max_length=64, **QUIET)
    found = search_architectures(
        teacher,
        scores,
        space={"intermediate_size": [0.5, 1.0]},
        max_parameters=90_000,
        tolerance=0.5,
        **settings,
    )
    assert found.candidates


def test_times_are_measured_on_text_alone(teacher):
    changed = copy.deepcopy(teacher)
    changed.config.image_token_index = 3
    rows = budget._any_rows(changed.config)
    assert len(rows.rows[0]) == 64
    assert set(rows.rows[0]) == {*range(65)} - {3}
    assert budget.seconds_per_token(changed, changed.config) > 0


# Evaluation


def test_losses_are_those_of_the_stock_models(teacher, processor):
    student = other(teacher)
    models = {"teacher": teacher, "student": student}
    found = evaluate_models(
        models, image_dataset(), processing_class=processor, max_length=64, batch_size=4, rounds=1, **QUIET
    )
    reference = [predictions(teacher, processor, row) for row in image_rows()]
    learned = [predictions(student, processor, row) for row in image_rows()]
    log_p, log_q = (torch.cat([log for log, _ in found]) for found in (reference, learned))
    targets = torch.cat([ids for _, ids in reference])
    metrics = found["models"]["student"]["metrics"]
    assert metrics["loss"]["value"] == pytest.approx(-log_q.gather(1, targets[:, None]).mean().item(), rel=1e-4)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert metrics["kl_divergence"]["value"] == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-3
    assert found["data"]["num_tokens"] == len(targets)


# Distillation


def make_trainer(folder: Any, student: Any, teacher: Any, data: Any, processor: Any, **settings: Any):
    arguments = {"report_to": "none", "bf16": False, "max_length": 64, "per_device_train_batch_size": 2} | settings
    args = DistillationConfig(str(folder), **arguments)
    return DistillationTrainer(
        student, teacher, args, train_dataset=data, eval_dataset=data, processing_class=processor
    )


def test_both_models_see_the_images_in_training(tmp_path, teacher, processor):
    """The KL of an evaluation is that of the stock models, over predictions of text alone."""
    student = other(teacher)
    trainer = make_trainer(tmp_path, student, teacher, image_dataset(), processor, max_steps=6, learning_rate=1e-3)
    log_p, log_q = (
        torch.cat([predictions(model, processor, row)[0] for row in image_rows()]) for model in (teacher, student)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kl, rel=1e-3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < kl
    trained = {name for name, value in student.state_dict().items() if not torch.equal(before[name], value)}
    assert any("vision_tower" in name for name in trained)
    trainer.save_student(tmp_path / "student")
    assert (tmp_path / "student" / "processor_config.json").is_file()


def test_the_blocks_of_the_guide_run(tmp_path, monkeypatch, teacher, processor):
    monkeypatch.chdir(tmp_path)
    teacher.config.text_config.max_position_embeddings = 2048
    names = {
        "teacher": teacher,
        "processor": processor,
        "train": image_dataset(),
        "held_out": image_dataset(3, seed=1),
    }
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(block, names)
    assert names["measured"]["models"]["student"]["metrics"]["kl_divergence"]["value"] > 0
    assert names["cache"].manifest["num_rows"] == len(names["train"])


# Refusals


def other_images(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": images(2)}


def no_list(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": images(1)[0]}


def no_image(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": [None]}


def no_file(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "images": ["/nowhere/cat.png"]}


def as_llava(row: dict[str, Any]) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is 2?"}, {"from": "gpt", "value": "A cat"}]
    return {"conversations": turns, "image": row["images"][0]}


def with_tools(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "tools": [{"name": "look"}]}


BAD_ROWS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (other_images, r"2 image\(s\) and 1 part\(s\) of type 'image' in the messages of the row \{.*…\. Give"),
    (no_list, "expected a list of images"),
    (no_image, "expected a list of images"),
    (no_file, r"The processor cannot read the row \{'messages': .*What is 2.*…: "),
    (with_tools, r"has images and tools, which TRL does not give to the chat template"),
    (as_llava, r"'conversations' \(ShareGPT's and LLaVA's format\), .* Write them as 'messages'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_bad_rows_are_refused_by_number(teacher, processor, change, message):
    rows = image_rows()
    rows[2] = change(rows[2])
    with pytest.raises(DataError, match=rf"Row 2 .*{message}"):
        estimate_importance(teacher, rows, processing_class=processor, max_length=64, **QUIET)
    with pytest.raises(DataError, match=rf"Row 2 .*{message}"):
        evaluate_models({"teacher": teacher}, rows, processing_class=processor, max_length=64, **QUIET)


def test_bad_rows_are_refused_before_training(tmp_path, teacher, processor):
    rows = [other_images(row) for row in image_rows(2)]
    with pytest.raises(DataError, match=r"Row 0 .* of the train dataset: There are 2 image"):
        make_trainer(tmp_path, other(teacher), teacher, Dataset.from_list(rows), processor)
    rows = [as_llava(row) for row in image_rows(2)]
    with pytest.raises(DataError, match=r"Row 0 .* of the train dataset: .* Write them as 'messages'"):
        make_trainer(tmp_path, other(teacher), teacher, Dataset.from_list(rows), processor)


def test_images_need_a_processor_and_models_that_see(tmp_path, teacher, processor):
    tokenizer, text_model = pocket_tokenizer(chat_template=TEMPLATE), pocket_model("llama", dtype=torch.float32)
    data = image_dataset()
    for given in (tokenizer, None):
        with pytest.raises(DataError, match=r"holds images, and processing_class is .*which reads text alone"):
            estimate_importance(teacher, data, processing_class=given, **QUIET)
    with pytest.raises(DataError, match=r"processing_class is a .*, which reads text alone"):
        make_trainer(tmp_path, other(teacher), teacher, data, tokenizer)
    with pytest.raises(DataError, match=r"holds images, and the model \(llama\) reads text alone"):
        estimate_importance(text_model, data, processing_class=processor, **QUIET)
    batch = next(iter(padded_batches(token_rows(data, processor, max_length=64), 2)))
    with pytest.raises(DataError, match=r"holds images, and the model \(llama\) reads text alone"):
        estimate_importance(text_model, DataLoader([batch], batch_size=None), **QUIET)
    with pytest.raises(DataError, match=r"the model 'student' \(llama\) reads text alone"):
        evaluate_models({"teacher": teacher, "student": text_model}, data, processing_class=processor, **QUIET)
    with pytest.raises(DataError, match=r"holds images, and the student \(llama\) reads text alone"):
        make_trainer(tmp_path, text_model, pocket_model("llama"), data, processor)


def test_images_without_their_column_are_refused(tmp_path, teacher, processor):
    rows = [{"messages": row["messages"]} for row in image_rows()]
    with pytest.raises(DataError, match="parts of type 'image', and the row has no column of images"):
        estimate_importance(teacher, rows, processing_class=processor, max_length=64, **QUIET)
    with pytest.raises(DataError, match="parts of type 'image', and the row has no column of images"):
        make_trainer(tmp_path, other(teacher), teacher, Dataset.from_list(rows), processor)
    with pytest.raises(DataError, match="read one at a time"):
        estimate_importance(teacher, iter(image_rows()), processing_class=processor, max_length=64, **QUIET)


def test_turns_that_nothing_marks_are_refused_in_training(tmp_path, teacher, processor):
    with pytest.raises(DataError, match="can be found only by"):
        make_trainer(tmp_path, other(teacher), teacher, image_dataset(), processor, assistant_only_loss=True)
