"""minitron-hf: make large causal language models small.

Score what matters, prune width and depth, recover by distillation, measure, publish. The student is always a stock
Transformers checkpoint. Names are imported on first use, so `import minitron_hf` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

#: Public name → module that defines it.
_MODULE_OF = {
    "MinitronError": "errors",
    "load_text_dataset": "data.loading",
    "token_rows": "data.rows",
    "load_model": "models",
    "load_tokenizer": "models",
    "save_model": "saving",
    "count_active_parameters": "sizes.counts",
    "count_parameters": "models",
    "register_family": "families",
    "register_wrapper": "families",
    "ImportanceScores": "scoring.scores",
    "estimate_importance": "scoring.importance",
    "register_divergence": "losses.divergences",
    "register_metric": "scoring.metrics",
    "PrunerConfig": "sizes.request",
    "PruningPlan": "pruning.plan",
    "make_plan": "pruning.planning",
    "student_config": "sizes.student",
    "verify_student": "pruning.verification",
    "apply_plan": "pruning.surgery",
    "prune_with_plan": "pruning.prune",
    "iterate_importance": "pruning.iterations",
    "plan_for_target": "pruning.prune",
    "prune_model": "pruning.prune",
    "count_tokens": "vocabulary.counts",
    "prune_tokenizer": "pruning.tokenizers",
    "repaired_weights": "pruning.repair",
    "prune_checkpoint": "pruning.streaming",
    "quantize_checkpoint": "quantization",
    "DistillationConfig": "distillation.config",
    "estimate_capacity": "distillation.capacity",
    "correct_teacher": "distillation.correction",
    "cache_teacher_logits": "distillation.cache_writer",
    "cache_served_teacher": "distillation.server_cache",
    "load_teacher_cache": "distillation.teacher_cache",
    "TeacherCache": "distillation.teacher_cache",
    "DistillationTrainer": "distillation.trainer",
    "search_architectures": "search.architectures",
    "generate_corpus": "generation.corpus",
    "evaluate_models": "evaluation.evaluate",
    "MeasurementCallback": "evaluation.callback",
    "measure_benchmarks": "evaluation.benchmarks",
    "measure_draft": "evaluation.draft",
    "generate_samples": "evaluation.samples",
    "render_model_card": "publishing.card",
    "push_student_to_hub": "publishing.hub",
    "Recipe": "recipe.schema",
    "recommend": "recipe.recommendations",
    "run_recipe": "recipe.runner",
}

#: Old public name → new one; the old ones go with the next release.
_RENAMED = {"carry_out": "prune_with_plan"}

__all__ = ["__version__", *_MODULE_OF]

if TYPE_CHECKING:
    from .data.loading import load_text_dataset as load_text_dataset
    from .data.rows import token_rows as token_rows
    from .distillation.cache_writer import cache_teacher_logits as cache_teacher_logits
    from .distillation.capacity import estimate_capacity as estimate_capacity
    from .distillation.config import DistillationConfig as DistillationConfig
    from .distillation.correction import correct_teacher as correct_teacher
    from .distillation.server_cache import cache_served_teacher as cache_served_teacher
    from .distillation.teacher_cache import TeacherCache as TeacherCache
    from .distillation.teacher_cache import load_teacher_cache as load_teacher_cache
    from .distillation.trainer import DistillationTrainer as DistillationTrainer
    from .errors import MinitronError as MinitronError
    from .evaluation.benchmarks import measure_benchmarks as measure_benchmarks
    from .evaluation.callback import MeasurementCallback as MeasurementCallback
    from .evaluation.draft import measure_draft as measure_draft
    from .evaluation.evaluate import evaluate_models as evaluate_models
    from .evaluation.samples import generate_samples as generate_samples
    from .families import register_family as register_family
    from .families import register_wrapper as register_wrapper
    from .generation.corpus import generate_corpus as generate_corpus
    from .losses.divergences import register_divergence as register_divergence
    from .models import count_parameters as count_parameters
    from .models import load_model as load_model
    from .models import load_tokenizer as load_tokenizer
    from .pruning.iterations import iterate_importance as iterate_importance
    from .pruning.plan import PruningPlan as PruningPlan
    from .pruning.planning import make_plan as make_plan
    from .pruning.prune import plan_for_target as plan_for_target
    from .pruning.prune import prune_model as prune_model
    from .pruning.prune import prune_with_plan as prune_with_plan
    from .pruning.repair import repaired_weights as repaired_weights
    from .pruning.streaming import prune_checkpoint as prune_checkpoint
    from .pruning.surgery import apply_plan as apply_plan
    from .pruning.tokenizers import prune_tokenizer as prune_tokenizer
    from .pruning.verification import verify_student as verify_student
    from .publishing.card import render_model_card as render_model_card
    from .publishing.hub import push_student_to_hub as push_student_to_hub
    from .quantization import quantize_checkpoint as quantize_checkpoint
    from .recipe.recommendations import recommend as recommend
    from .recipe.runner import run_recipe as run_recipe
    from .recipe.schema import Recipe as Recipe
    from .saving import save_model as save_model
    from .scoring.importance import estimate_importance as estimate_importance
    from .scoring.metrics import register_metric as register_metric
    from .scoring.scores import ImportanceScores as ImportanceScores
    from .search.architectures import search_architectures as search_architectures
    from .sizes.counts import count_active_parameters as count_active_parameters
    from .sizes.request import PrunerConfig as PrunerConfig
    from .sizes.student import student_config as student_config
    from .vocabulary.counts import count_tokens as count_tokens


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        importlib.import_module(".errors", __name__).warn_renamed(f"minitron_hf.{name}", _RENAMED[name])
        return globals().get(_RENAMED[name]) or __getattr__(_RENAMED[name])
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    except AttributeError as error:
        # `from minitron_hf import …` would take it for a name that is not there.
        raise RuntimeError(f"minitron_hf.{_MODULE_OF[name]} cannot be imported: {error}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
