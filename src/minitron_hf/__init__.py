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
    "PrunerConfig": "planning",
    "PruningPlan": "planning",
    "make_plan": "planning",
    "student_config": "planning",
    "apply_plan": "surgery",
    "prune_model": "surgery",
    "DistillationConfig": "trainer",
    "DistillationTrainer": "trainer",
    "evaluate_models": "evaluation",
    "generate_samples": "evaluation",
    "render_model_card": "hub",
    "push_student_to_hub": "hub",
    "Recipe": "recipe",
    "run_recipe": "recipe",
}

__all__ = ["__version__", *_MODULE_OF]

if TYPE_CHECKING:
    from .data import load_text_dataset, token_rows
    from .errors import MinitronError
    from .evaluation import evaluate_models, generate_samples
    from .hub import push_student_to_hub, render_model_card
    from .importance import ImportanceScores, estimate_importance
    from .models import count_parameters, load_model, load_tokenizer
    from .planning import PrunerConfig, PruningPlan, make_plan, student_config
    from .recipe import Recipe, run_recipe
    from .surgery import apply_plan, prune_model
    from .trainer import DistillationConfig, DistillationTrainer


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
