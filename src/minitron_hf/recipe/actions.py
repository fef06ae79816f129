"""Runs each stage of a recipe."""

from __future__ import annotations

from typing import Any

from ..files import replacing_folder
from ..formats import write_artefact
from ..models import auto_class, load_model
from ..pruning.candidates import best_shape
from ..pruning.iterations import iterate_importance
from ..pruning.plan import PruningPlan
from ..pruning.planning import make_plan
from ..pruning.prune import COUNTED_TOKENS, plan_for_target
from ..pruning.stored_checkpoint import is_streamable
from ..pruning.streaming import prune_checkpoint
from ..pruning.tokenizers import prune_tokenizer
from ..quantization import METHODS
from ..scoring.importance import estimate_importance
from ..scoring.scores import ImportanceScores
from ..sizes.request import PrunerConfig
from ..vocabulary.counts import TokenCounts, count_tokens
from .corpora import with_text_in
from .run import (
    CACHE_DIR,
    CONTROLS_DIR,
    CORRECTED_DIR,
    GENERATED_DIR,
    PRIVATE_RECIPE_NAME,
    PRUNED_DIR,
    QUANTIZED_DIR,
    Run,
    earlier_cut,
    has_images,
    processor_of,
    reader_of,
    repair_arguments,
)
from .schema import CONTROLS, ROUNDS_DIR, Recipe
from .training import _save_student, _train, _training_settings, training_rows


def _generate(run: Run) -> None:
    from ..generation.corpus import generate_corpus

    section = run.recipe.generate
    assert section is not None
    source = run.recipe.teacher
    settings = {name: value for name, value in vars(section).items() if name != "prompts"}
    generate_corpus(
        run.load(source.model, revision=source.revision) if run.narrows_weights else run.teacher,
        None if section.prompts is None else run.dataset("prompts"),
        run.folder / GENERATED_DIR,
        processing_class=run.tokenizer,
        text_field="text" if section.prompts is None else section.prompts.text_field,
        prompts_name=None if section.prompts is None else section.prompts.source,
        show_progress=run.show_progress,
        **settings,
    )


def _score(run: Run) -> None:
    scores = iterate_importance(
        run.teacher,
        run.recipe.pruner_config,
        run.texts("calibration"),
        processing_class=reader_of(run, "calibration"),
        show_progress=run.show_progress,
        **run.recipe.scores,
    )
    scores.save_pretrained(run.folder)


def _search(run: Run) -> None:
    from ..search.architectures import search_architectures

    arguments = search_arguments(run.recipe)
    distillation = {"dataset_text_field": run.text_field("train"), **arguments.pop("distillation")}
    search_architectures(
        run.teacher,
        ImportanceScores.from_pretrained(run.folder),
        calibration_data=run.texts("calibration"),
        train_dataset=run.dataset("train"),
        eval_data=run.texts("eval"),
        processing_class=reader_of(run, "train", "eval", "calibration"),
        output_dir=run.folder,
        base=run.recipe.pruner_config,
        token_counts=_token_counts(run, run.recipe.pruner_config),
        show_progress=run.show_progress,
        distillation=distillation,
        **arguments,
    )


def search_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `search_architectures`: it distils as the run will, but for how long and by which schedule."""
    # The teacher stays loaded, because every shape is pruned from it.
    of_teacher = ("teacher_correction", "teacher_offload", "teacher_model_init_kwargs")
    own = ("max_steps", "num_train_epochs", "max_length", *of_teacher)
    schedules = ("lr_scheduler", "warmup", "eval_", "save_", "logging", "load_best", "metric_for_best", "greater_is")
    shared = {
        name: value for name, value in recipe.distill.items() if name not in own and not name.startswith(schedules)
    }
    arguments = dict(recipe.search or {})
    return {
        "max_length": recipe.distill.get("max_length"),
        **arguments,
        "distillation": {**shared, **arguments.get("distillation", {})},
    }


def _token_counts(run: Run, request: PrunerConfig) -> TokenCounts | None:
    """Counts of the calibration text, where the vocabulary is cut."""
    if request.vocab_size is None:
        return None
    reader, field = reader_of(run, "calibration"), run.text_field("calibration")
    return count_tokens(run.texts("calibration"), reader, text_field=field, max_tokens=COUNTED_TOKENS)


def _planned(run: Run, request: PrunerConfig) -> Any:
    """What plans are made for: the teacher's config, unless its weights decide."""
    return run.teacher if request.hidden_basis else run.teacher_config


def _plan(run: Run) -> None:
    request = run.recipe.pruner_config if run.recipe.search is None else best_shape(run.folder)
    scores = ImportanceScores.from_pretrained(run.folder)
    counts = _token_counts(run, request)
    if not request.targets:
        plan = make_plan(_planned(run, request), request, scores, token_counts=counts)
    else:
        plan = plan_for_target(
            run.teacher,
            request,
            scores,
            run.texts("calibration"),
            processing_class=reader_of(run, "calibration"),
            token_counts=counts,
            max_length=run.recipe.scores.get("max_length"),
            output_dir=run.folder,
            show_progress=run.show_progress,
        )
    _with_earlier_cut(run, plan).save_pretrained(run.folder, with_request=True)


def _with_earlier_cut(run: Run, plan: PruningPlan) -> PruningPlan:
    """A plan that says which of the recipe's teacher's tokens its student has."""
    cut = earlier_cut(run)
    return plan if cut is None else plan.after_cut(cut)


def _prune(run: Run) -> None:
    section, plan = run.recipe.teacher, run.plan
    computes = bool(plan.repair) or plan.basis is not None
    in_memory = run.recipe.verify or (computes and not run.recipe.stream_weights)
    if not in_memory and (run.recipe.stream_weights or is_streamable(section.model, revision=section.revision)):
        repair = repair_arguments(run, plan)
        if computes:
            run.release_teachers()
            repair["dtype"] = None if run.narrows_weights else section.dtype
        prune_checkpoint(
            section.model,
            run.folder / PRUNED_DIR,
            plan,
            revision=section.revision,
            overwrite=True,
            show_progress=run.show_progress,
            **repair,
        )
        noted = PruningPlan.from_pretrained(run.folder / PRUNED_DIR)
    else:
        student = run.prune_with_plan(plan, verify=run.recipe.verify)
        noted = student.pruning_plan
        _save_student(student, _students_reader(run, plan), run.folder / PRUNED_DIR, run.teacher_config)
    if noted.notes != plan.notes:  # of a verification, or a repair
        noted.save_pretrained(run.folder)
    if run.number > 1:
        run.release("teacher")  # whoever needs it still loads it again


def _students_reader(run: Run, plan: PruningPlan) -> Any:
    """What is saved beside a student: the processor of a run with images, else its tokenizer."""
    if has_images(run, "train", "eval", "calibration"):
        return prune_tokenizer(processor_of(run), plan)
    return prune_tokenizer(run.tokenizer, plan)


def _correct(run: Run) -> None:
    if run.starts_processes:
        run.start_processes("stage", "correct", run.folder / PRIVATE_RECIPE_NAME)
    else:
        correct(run)


def correct(run: Run) -> None:
    """Let the teacher learn the corpus, in all the processes that call this."""
    from ..distillation.correction import correct_teacher

    section = run.recipe.teacher_correction
    assert section is not None
    run.release("teacher")
    correct_teacher(
        load_model(run.recipe.teacher.model, revision=run.recipe.teacher.revision),
        run.dataset("train"),
        run.folder / CORRECTED_DIR,
        original_learning_rate=section.original_learning_rate,
        num_tokens=section.num_tokens,
        method=section.method,
        processing_class=reader_of(run, "train"),
        eval_dataset=training_rows(run, "eval"),
        **{
            "dataset_text_field": run.text_field("train"),
            "disable_tqdm": not run.show_progress,
            **section.arguments,
        },
    )


def _cache(run: Run) -> None:
    from ..distillation.cache_writer import cache_teacher_logits
    from ..distillation.config import DistillationConfig
    from ..distillation.server_cache import cache_served_teacher

    section = run.recipe.teacher_cache
    assert section is not None
    for which in ("train", "eval"):
        args = DistillationConfig(str(run.folder), **_training_settings(run))
        if which == "eval" and args.eval_packing is not None:
            args.packing = args.eval_packing
        corpus, folder = training_rows(run, which), run.folder / CACHE_DIR / which
        shared: dict[str, Any] = {
            "top_k": section.top_k,
            "dtype": section.dtype,
            "num_rows": args.max_eval_rows if which == "eval" else None,
            "args": args,
            "processing_class": reader_of(run, "train"),
            "show_progress": run.show_progress,
        }
        if section.server is None:
            shared |= {"num_draws": section.num_draws}
            shared |= {} if run.recipe.pruner_config.vocab_size is None else {"pruning_plan": run.plan}
            cache_teacher_logits(run.distillation_teacher, corpus, folder, **shared)
        else:
            shared["server_model"] = section.server_model
            cache_served_teacher(section.server, run.teacher_config, corpus, folder, **shared)
    run.release("teacher")
    run.release("distillation_teacher")


def cached_arguments() -> tuple[str, ...]:
    """Fields of `DistillationConfig` that shape what the teacher is asked, and so its cache."""
    from ..distillation.teacher_cache import ROW_ARGUMENTS

    names = ("temperature", "hidden_loss", "hidden_layers", "embedding_loss", "bf16", "fp16", "eval_packing")
    return (*names, "shuffle_dataset", "seed", "max_eval_rows", *ROW_ARGUMENTS)


def _distill(run: Run) -> None:
    _train(run, run.folder / PRUNED_DIR, run.folder)


def _controls(run: Run) -> None:
    import torch
    from transformers import set_seed

    if run.recipe.rounds:
        run = run.in_round(len(run.recipe.rounds))
    seed = int(run.recipe.distill.get("seed", 42))
    for name in run.recipe.controls:
        folder = run.folder / CONTROLS_DIR / name
        if (folder / "config.json").is_file():
            continue  # finished before an interruption
        if name == "random_pruning":
            scores = estimate_importance(run.teacher, metric="random", seed=seed)
            request = PrunerConfig.from_dict(run.plan.pruner_config)
            counts = _token_counts(run, request)
            plan = make_plan(_planned(run, request), request, scores, token_counts=counts)
            student = run.prune_with_plan(_with_earlier_cut(run, plan))
        elif name == "random_init":
            set_seed(seed)
            config = run.plan.build_student_config()
            student = auto_class(config).from_config(config, dtype=torch.float32)
            student.pruning_plan = run.plan  # its tokens
        else:
            nothing_compared = {"kd_weight": 0.0, **dict.fromkeys(("hidden_loss", "hidden_layers", "embedding_loss"))}
            _train(run, run.folder / PRUNED_DIR, folder, ce_weight=1.0, **nothing_compared)
            continue
        _save_student(student, _students_reader(run, run.plan), folder / PRUNED_DIR, run.teacher_config)
        # Random embeddings that are not trained would make the control worse than it is.
        _train(run, folder / PRUNED_DIR, folder, **({"freeze_embeddings": False} if name == "random_init" else {}))


def _quantize(run: Run) -> None:
    from ..quantization import quantize_checkpoint

    run.release("teacher")
    run.release("distillation_teacher")
    with replacing_folder(run.folder / QUANTIZED_DIR) as folder:
        for name in run.recipe.quantize:
            quantize_checkpoint(run.folder, folder / name, name)


def timed_models(recipe: Recipe) -> list[str]:
    """Names of the models that are timed, and tried as drafts: the others are as fast as one of them."""
    return ["teacher", *recipe.earlier_students(), "student", *recipe.quantised_students()]


def _evaluate(run: Run) -> None:
    from ..evaluation.evaluate import evaluate_models
    from ..evaluation.samples import generate_samples

    section, source, last = run.recipe.evaluate, run.recipe.teacher, len(run.recipe.rounds)
    models: dict[str, Any] = {
        # By path if possible, so that the size of a checkpoint is the size of its files.
        "teacher": source.model if source.revision is None else run.load(source.model, revision=source.revision),
        "pruned": run.folder / PRUNED_DIR,
        **({"corrected_teacher": run.folder / CORRECTED_DIR} if run.recipe.teacher_correction else {}),
        **{f"round_{number}": run.folder / ROUNDS_DIR / str(number) for number in range(1, last)},
        "student": run.folder,
        **{name: run.folder / QUANTIZED_DIR / method for name, method in run.recipe.quantised_students().items()},
        **{name: run.folder / CONTROLS_DIR / name for name in run.recipe.controls},
    }
    run.release("teacher")
    run.release("distillation_teacher")
    evaluate_models(
        models,
        **_held_out_texts(run),
        processing_class=reader_of(run, "eval"),
        max_length=section.max_length,
        num_rows=section.num_rows,
        batch_size=section.batch_size,
        assistant_only=run.recipe.measures_turns,
        dataset_name=run.dataset_section("eval").source,
        descriptions=_descriptions(run.recipe),
        checkpoints={"teacher": source.model},
        dtype=None if run.recipe.teacher.dtype == "auto" else run.recipe.teacher.dtype,
        speed=section.speed,
        speed_models=timed_models(run.recipe),
        speed_batch_sizes=section.speed_batch_sizes,
        speed_prompt_tokens=section.speed_prompt_tokens,
        draft_prompts=section.draft_prompts,
        draft_tokens=section.draft_tokens,
        **_task_arguments(run.recipe),
        output_path=run.folder,
        show_progress=run.show_progress,
    )
    if section.prompts:
        compared = {"teacher": run.load(source.model, revision=source.revision), "student": run.load(run.folder)}
        samples = generate_samples(compared, run.tokenizer, section.prompts)
        write_artefact(run.folder / "samples.json", {"samples": samples})


def _held_out_texts(run: Run) -> dict[str, Any]:
    """Arguments of `evaluate_models` for the text and the chat prompts, whose columns may have different names."""
    text, chat = _held_out_text(run), _chat_arguments(run)
    if "text_field" in text and chat:
        chat["chat_prompts"] = with_text_in(chat["chat_prompts"], chat.pop("text_field"), text["text_field"])
    return {**text, **chat}


def _held_out_text(run: Run) -> dict[str, Any]:
    """Arguments of `evaluate_models` for the text: its tokens, or the text, where the student splits it anew."""
    if all(one.pruner_config.vocab_size is None for one in run.recipe.each_round()):
        return {"dataset": run.texts("eval")}
    return {"dataset": run.dataset("eval"), "text_field": run.text_field("eval")}


def _task_arguments(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `evaluate_models` for the tasks of the recipe."""
    section = recipe.evaluate
    if not section.tasks:
        return {}
    names = ("tasks", "task_limit", "num_fewshot", "include_path", "task_data")
    given = {name: getattr(section, name) for name in (*names, "apply_chat_template", "confirm_run_unsafe_code")}
    return {**given, "task_models": section.task_models or ["teacher", "student", *recipe.quantised_students()]}


def _descriptions(recipe: Recipe) -> dict[str, str]:
    """Descriptions of the models for the card."""
    last = len(recipe.rounds)
    last_round = " in the last round" if last > 1 else ""
    start = f", cut from the student of round {last - 1}" if last > 1 else ""
    return {
        "pruned": f"the student before distillation{last_round}",
        "corrected_teacher": "the teacher after fine-tuning on the corpus, from which the student learnt",
        **{f"round_{number}": f"the student of round {number} of {last}, distilled" for number in range(1, last)},
        **{
            name: f"the student, quantised: {METHODS[method].help}"
            for name, method in recipe.quantised_students().items()
        },
        **{
            name: f"control: {CONTROLS[name]}{start if name == 'random_pruning' else ''}; "
            f"trained on the same tokens{last_round}"
            for name in recipe.controls
        },
    }


def _chat_arguments(run: Run) -> dict[str, Any]:
    """Arguments of `evaluate_models` for the chat prompts of the recipe."""
    section = run.recipe.evaluate.chat
    if section is None:
        return {}
    return {
        "chat_prompts": run.dataset("chat"),
        "chat_max_new_tokens": section.max_new_tokens,
        "num_chat_prompts": section.num_prompts,
        "text_field": section.prompts.text_field,
    }


def _card(run: Run) -> None:
    from ..publishing.card import write_model_card
    from ..publishing.hub import write_teacher_metadata

    write_teacher_metadata(run.folder, run.recipe.teacher.model, revision=run.recipe.teacher.revision)
    write_model_card(run.folder)


def _publish(run: Run) -> None:
    from ..publishing.hub import push_student_to_hub

    section = run.recipe.publish
    assert section is not None
    push_student_to_hub(run.folder, **section.given())
