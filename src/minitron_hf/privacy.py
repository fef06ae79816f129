"""Decides what may be published: names without paths, settings on an allow-list, files inside their folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import digest
from .names import public_name

#: Settings that decide where results are published and reported, and by whom, but not what the results are.
PUBLISHING = frozenset(
    {
        "push_to_hub", "hub_token", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push",
        "hub_revision", "token", "use_auth_token", "report_to", "run_name", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id",
    }
)  # fmt: skip
#: Settings whose text is published. Numbers, booleans and nulls always are; the text of any other setting never is: it
#: may be a token, a path or a name of somebody.
PUBLIC_TEXT = frozenset(
    {
        # The recipe's own sections.
        "config",
        "controls",
        "method",
        "model",
        "name",
        "output_dir",
        "quantize",
        "repo_id",
        "revision",
        "source",
        "split",
        "stopping_strategy",
        "task_models",
        "tasks",
        "teacher",
        "text_field",
        "collection",
        "tag",
        # What is cut and how it is scored.
        "batch_reduction",
        "depth_metric",
        "metric",
        "model_type",
        "repair",
        "sequence_reduction",
        "nonuniform_sizes",
        # How the student is trained.
        "attn_implementation",
        "dataset_text_field",
        "divergence",
        "dtype",
        "embedding_loss",
        "eval_strategy",
        "eval_tasks",
        "hidden_loss",
        "intermediate_weight",
        "log_level",
        "logging_strategy",
        "loss_type",
        "lr_scheduler_type",
        "metric_for_best_model",
        "optim",
        "packing_strategy",
        "quant_method",
        "report_to",
        "save_strategy",
        "fake_quantization",
        "teacher_correction",
        "torch_dtype",
        "truncation_mode",
        # Adapters.
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "modules_to_save",
        "peft_type",
        "target_modules",
        "target_parameters",
        "task_type",
    }
)

#: Settings whose text is published as it is, paths included: it is written for readers.
FREE_TEXT = frozenset({"prompts"})

#: What access tokens look like (Hugging Face, OpenAI, GitHub, Slack, AWS, Google, JSON Web Tokens), and private keys.
SECRET = re.compile(
    r"\b(?:hf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
    r"|xox[abpr]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def public_text(text: str) -> str | None:
    """The publishable form of a text: the last part of a path; None if it looks like a secret.

    >>> public_text("cosine"), public_text("owner/model"), public_text("/home/me/data.jsonl"), public_text("~/x/y")
    ('cosine', 'owner/model', 'data.jsonl', 'y')
    >>> public_text("https://me:word@example.org/data.jsonl?key=1"), public_text("hf_abcdefghijklmnopqr")
    ('data.jsonl', None)
    """
    if SECRET.search(text):
        return None
    if re.match(r"\w+://", text):
        address = re.split(r"[?#]", text)[0].rstrip("/")
        return address.rsplit("/", 1)[-1] if address.count("/") > 2 else None
    if re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return public_name(text)


def public_texts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, with the publishable form of those that are texts.

    >>> public_texts({"server_model": "/home/me/llama", "top_k": 64})
    {'server_model': 'llama', 'top_k': 64}
    """
    return {name: public_text(value) if isinstance(value, str) else value for name, value in settings.items()}


def public_settings(value: Any, name: str | None = None) -> Any:
    """The publishable settings: numbers and booleans, and text under the names in `PUBLIC_TEXT`.

    Args:
        value: settings, or the value of one.
        name: of which setting `value` is the value; None for a whole mapping.

    Returns:
        The same without whatever is not to be published.

    >>> public_settings({"optim": "adamw", "hub_token": "x", "seed": 1, "teacher_model_init_kwargs": {"token": "x"}})
    {'optim': 'adamw', 'seed': 1, 'teacher_model_init_kwargs': {}}
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        kept = {key: public_settings(inner, str(key)) for key, inner in value.items() if not SECRET.search(str(key))}
        return {key: inner for key, inner in kept.items() if inner is not None or value[key] is None}
    if isinstance(value, list | tuple | set | frozenset):
        given = sorted(value) if isinstance(value, set | frozenset) else list(value)
        inner = [public_settings(one, name) for one in given]
        return [one for one, before in zip(inner, given, strict=True) if one is not None or before is None]
    if name in FREE_TEXT:
        return None if SECRET.search(str(value)) else str(value)
    return public_text(str(value)) if name in PUBLIC_TEXT else None


def recorded_settings(value: Any, name: str | None = None) -> Any:
    """Settings for a record that shows changes; values that must not be published are replaced by their digests.

    >>> recorded_settings({"hub_token": "x", "seed": 1, "weights": "sha256:0af1"})
    {'hub_token': 'sha256:cae25fbba83d', 'seed': 1, 'weights': 'sha256:0af1'}
    """
    if isinstance(value, Mapping):
        return {str(key): recorded_settings(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [recorded_settings(one, name) for one in value]
    is_digest = isinstance(value, str) and re.fullmatch(r"sha256:[0-9a-f]+", value)
    return value if is_digest or public_settings(value, name) == value else digest(value)[:19]


def is_outside_folder(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path leads out of a folder, through a link or by its name.

    The snapshots of the Hub's cache are folders of links into the `blobs` beside them, and count as whole.
    """
    folder = Path(folder).resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    target = Path(path).resolve()
    return not any(target.is_relative_to(home) for home in homes)


def without_publishing(settings: Any) -> Any:
    """Settings, nested ones too, without secrets and without those that only publish or report.

    >>> without_publishing({"distill": {"max_steps": 4, "hub_token": "x"}, "push_to_hub": True})
    {'distill': {'max_steps': 4}}
    """
    if isinstance(settings, Mapping):
        return {name: without_publishing(value) for name, value in settings.items() if name not in PUBLISHING}
    return [without_publishing(one) for one in settings] if isinstance(settings, list) else settings
