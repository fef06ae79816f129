"""`minitron-hf doctor`: what this machine has, and what a run could lack."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import typer

from ..publishing.markdown import byte_size
from .output import given, say

#: Extra → the module that it installs.
EXTRAS = {"eval": "lm_eval", "quantize": "torchao", "deepspeed": "deepspeed"}
#: Free space below which a warning is printed: a model of 8B parameters in bfloat16, and a little more.
LITTLE_SPACE = 20e9


def doctor() -> None:
    """Print versions, devices, extras, cache, token and free space, and what is wrong with them.

    Of a token, only whether there is one. The exit code is 1 if something is wrong. Little free space is a warning
    (exit code 0): whether it is too little depends on the model.
    """
    found = examine()
    if not given("doctor", found):
        _print(found)
    if found["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """What `doctor` prints."""
    versions, wrong = _versions()
    cache = _cache()
    problems = [*wrong]
    if not cache["writable"]:
        problems.append(f"The Hub's cache {cache['folder']} cannot be written. Set HF_HOME to a folder that can.")
    warnings = []
    if cache["free_bytes"] is not None and cache["free_bytes"] < LITTLE_SPACE:
        warnings.append(
            f"The disk of the Hub's cache has {byte_size(cache['free_bytes'])} left; a model of 8B parameters "
            "alone takes 16 GB. For large models, free space or set HF_HOME to a folder on another disk."
        )
    return {
        "versions": versions,
        "devices": _devices(),
        "extras": {extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()},
        "hub": {"token": _has_token(), "offline": _is_offline(), "endpoint": _endpoint()},
        "cache": cache,
        "problems": problems,
        "warnings": warnings,
    }


def _versions() -> tuple[dict[str, str], list[str]]:
    """Versions of the dependencies, and those that are missing or out of range."""
    from packaging.requirements import Requirement

    from ..files import versions

    found, wrong = versions(), []
    for line in importlib.metadata.requires("minitron-hf") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found[needed.name] = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is not installed. Run pip install '{needed}'.")
            continue
        if not needed.specifier.contains(found[needed.name], prereleases=True):
            wrong.append(f"{needed.name} {found[needed.name]} is installed, expected {needed.specifier}.")
    return found, wrong


def _devices() -> list[dict[str, Any]]:
    """The processor and every accelerator: name, memory, dtypes that are fast."""
    import psutil
    import torch

    from ..hardware import has_fast_bf16

    processor = {
        "device": "cpu",
        "name": f"{os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()}",
        "memory_bytes": psutil.virtual_memory().total,
        "free_bytes": psutil.virtual_memory().available,
        "fast_bfloat16": has_fast_bf16("cpu"),
    }
    found = [processor]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": total,
                "free_bytes": free,
                "fast_bfloat16": has_fast_bf16(f"cuda:{index}"),
            }
        )
    if torch.backends.mps.is_available():
        found.append({**processor, "device": "mps", "name": "Metal", "fast_bfloat16": has_fast_bf16("mps")})
    return found


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _cache() -> dict[str, Any]:
    """Folder of the Hub's cache, and the free space of its disk."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next((path for path in (folder, *folder.parents) if path.is_dir()), None)
    free = None if there is None else shutil.disk_usage(there).free
    writable = there is not None and os.access(there, os.W_OK)
    return {"folder": str(folder), "exists": folder.is_dir(), "writable": writable, "free_bytes": free}


def _print(found: dict[str, Any]) -> None:
    def line(name: str, text: str) -> None:
        say(f"{name:<10} {text}")

    for number, (name, version) in enumerate(found["versions"].items()):
        line("versions" if not number else "", f"{name} {version}")
    for number, one in enumerate(found["devices"]):
        bf16 = "fast" if one["fast_bfloat16"] else "slow or none"
        line("devices" if not number else "", f"{one['device']}: {one['name']}")
        line("", f"  {byte_size(one['free_bytes'])} free of {byte_size(one['memory_bytes'])}; bfloat16: {bf16}")
    for number, (name, installed) in enumerate(found["extras"].items()):
        missing = "installed" if installed else f"not installed (pip install 'minitron-hf[{name}]')"
        line("extras" if not number else "", f"{name}: {missing}")
    hub = found["hub"]
    line("Hub", f"{hub['endpoint']}{', switched off (HF_HUB_OFFLINE)' if hub['offline'] else ''}")
    line("", "a token is there" if hub["token"] else "no token: public repositories only (`hf auth login`)")
    cache = found["cache"]
    free = "unknown" if cache["free_bytes"] is None else byte_size(cache["free_bytes"])
    line("cache", f"{cache['folder']}{'' if cache['writable'] else ' (cannot be written)'}")
    line("", f"{free} free")
    for problem in found["problems"]:
        say(f"Problem: {problem}")
    for warning in found["warnings"]:
        say(f"Warning: {warning}")
    if not found["problems"]:
        say("No problems found.")
