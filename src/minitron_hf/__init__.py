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
    "load_text_dataset": "data",
    "token_rows": "data",
    "load_model": "models",
    "load_tokenizer": "models",
    "count_parameters": "models",
    "ImportanceScores": "importance",
    "estimate_importance": "importance",
    "PrunerConfig": "sizes",
    "PruningPlan": "planning",
    "make_plan": "planning",
    "student_config": "sizes",
    "verify_student": "verification",
    "apply_plan": "surgery",
    "carry_out": "surgery",
    "iterate_importance": "surgery",
    "plan_for_target": "surgery",
    "prune_model": "surgery",
    "repaired_weights": "repair",
    "prune_checkpoint": "streaming",
    "DistillationConfig": "distillation_config",
    "estimate_capacity": "capacity",
    "correct_teacher": "teacher",
    "cache_teacher_logits": "teacher_cache",
    "load_teacher_cache": "teacher_cache",
    "TeacherCache": "teacher_cache",
    "DistillationTrainer": "trainer",
    "search_architectures": "search",
    "evaluate_models": "evaluation",
    "generate_samples": "samples",
    "render_model_card": "card",
    "push_student_to_hub": "hub",
    "Recipe": "recipe",
    "recommend": "recommendations",
    "run_recipe": "runner",
}

__all__ = ["__version__", *_MODULE_OF]

if TYPE_CHECKING:
    from .capacity import estimate_capacity as estimate_capacity
    from .card import render_model_card as render_model_card
    from .data import load_text_dataset as load_text_dataset
    from .data import token_rows as token_rows
    from .distillation_config import DistillationConfig as DistillationConfig
    from .errors import MinitronError as MinitronError
    from .evaluation import evaluate_models as evaluate_models
    from .hub import push_student_to_hub as push_student_to_hub
    from .importance import ImportanceScores as ImportanceScores
    from .importance import estimate_importance as estimate_importance
    from .models import count_parameters as count_parameters
    from .models import load_model as load_model
    from .models import load_tokenizer as load_tokenizer
    from .planning import PruningPlan as PruningPlan
    from .planning import make_plan as make_plan
    from .recipe import Recipe as Recipe
    from .recommendations import recommend as recommend
    from .repair import repaired_weights as repaired_weights
    from .runner import run_recipe as run_recipe
    from .samples import generate_samples as generate_samples
    from .search import search_architectures as search_architectures
    from .sizes import PrunerConfig as PrunerConfig
    from .sizes import student_config as student_config
    from .streaming import prune_checkpoint as prune_checkpoint
    from .surgery import apply_plan as apply_plan
    from .surgery import carry_out as carry_out
    from .surgery import iterate_importance as iterate_importance
    from .surgery import plan_for_target as plan_for_target
    from .surgery import prune_model as prune_model
    from .teacher import correct_teacher as correct_teacher
    from .teacher_cache import TeacherCache as TeacherCache
    from .teacher_cache import cache_teacher_logits as cache_teacher_logits
    from .teacher_cache import load_teacher_cache as load_teacher_cache
    from .trainer import DistillationTrainer as DistillationTrainer
    from .verification import verify_student as verify_student


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
