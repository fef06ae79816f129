"""Local documents of stock tasks: task files that read them instead of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DataError


def local_entries(manager: Any, names: Sequence[str], data: Path, folder: Path) -> dict[str, Any]:
    """Entries for the harness's index, whose tasks read local documents.

    Args:
        manager: the harness's index of tasks.
        names: tasks and groups.
        data: folder of documents, see `TaskSource`.
        folder: where task files are written.

    Raises:
        DataError: if the folder does not exist, or has documents of none of the tasks, or of a part of a group only.
    """
    if not data.is_dir():
        raise DataError(f"task_data: the folder {str(data)!r} does not exist.")
    index: Mapping[str, Any] = manager.task_index
    found: dict[str, Any] = {}
    for name in names:
        leaves = list(dict.fromkeys(_leaves(index, name)))
        if leaves == [name]:
            parts = {name: data}
        else:
            parts = dict.fromkeys(leaves, data)
            if (data / f"{name}.jsonl").is_file():
                parts |= dict.fromkeys(_distribute(data, name, index, leaves, folder), folder)
        missing = [leaf for leaf, where in parts.items() if not (where / f"{leaf}.jsonl").is_file()]
        if missing and len(missing) < len(parts):
            raise DataError(
                f"task_data: {str(data)!r} has no documents of {', '.join(missing[:5])} ({len(missing)} of the "
                f"{len(parts)} tasks of {name}). Add them, or name the tasks that have some instead of {name}."
            )
        found |= {leaf: _entry(index[leaf], parts[leaf], folder) for leaf in set(parts) - set(missing)}
    if not found:
        raise DataError(
            f"task_data: the folder {str(data)!r} has no documents of {', '.join(names)}. Expected TASK.jsonl, one "
            "JSON document a line with the stock task's fields."
        )
    return found


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks of a group or tag; a task itself. None where the harness has no file of it."""
    entry = index.get(name)
    if entry is None:
        return
    members = sorted(entry.tags) if entry.yaml_path is None else (entry.cfg or {}).get("task")
    if isinstance(members, list):
        for member in members:
            inner = member if isinstance(member, str) else member.get("task", member.get("group"))
            if isinstance(inner, str):
                yield from _leaves(index, inner)
    elif entry.yaml_path is not None:
        yield name


def _distribute(data: Path, group: str, index: Mapping[str, Any], leaves: Sequence[str], folder: Path) -> list[str]:
    """Write the documents of a group's file, and its worked examples, into a file for each task.

    A column says by the task's `dataset_name` whose a document is, as `subject` does in MMLU's configuration `all`.

    Returns:
        The tasks that have documents.

    Raises:
        DataError: if no column does.
    """
    task_of = {str((index[leaf].cfg or {}).get("dataset_name")): leaf for leaf in leaves}
    for suffix in ("_fewshot", ""):
        path = data / f"{group}{suffix}.jsonl"
        if not path.is_file():
            continue
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        columns = [name for name in (rows[0] if rows else {}) if all(str(row.get(name)) in task_of for row in rows)]
        if not columns:
            raise DataError(
                f"{path}: no column names the task of every document. Expected one with the tasks' dataset names, "
                f"such as {', '.join(sorted(task_of)[:3])}."
            )
        parts: dict[str, list[str]] = {}
        for row in rows:
            parts.setdefault(task_of[str(row[columns[0]])], []).append(json.dumps(row))
        for task, lines in parts.items():
            (folder / f"{task}{suffix}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return list(parts)


def _entry(entry: Any, data: Path, folder: Path) -> Any:
    """The entry of a task file that includes the stock one, and reads documents of a folder."""
    name = entry.name
    documents = (data / f"{name}.jsonl").resolve()
    shots = documents.with_name(f"{name}_fewshot.jsonl")
    train = "train" if shots.is_file() else None
    files = {"test": str(documents), **({} if train is None else {train: str(shots)})}
    values: dict[str, Any] = {
        "include": str(entry.yaml_path),
        "task": name,
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "validation_split": None,
        "training_split": train,
    }
    if not ((entry.cfg or {}).get("fewshot_config") or {}).get("samples"):
        # From the tested documents the harness draws no worked example that is the document itself.
        values["fewshot_split"] = train or "test"
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return replace(entry, yaml_path=path)
