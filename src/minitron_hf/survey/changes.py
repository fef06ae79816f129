"""What changed in the installed libraries since the tables were last checked: `make survey`.

It lists decoders and wrappers without a table, families whose modelling file changed, and private names of other
libraries that moved. The record holds a digest of every modelling file at the time of the last check.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compat import INHERITED, WRAPPED, decoder_types, image_text_types
from ..families import REFUSED, families, wrapped_families
from ..files import digest, read_json, write_json


@dataclass(frozen=True)
class Survey:
    """What differs from the record.

    Attributes:
        version: the installed Transformers.
        modelling_files: family, or model around one → digest of its modelling file.
        without_table: types of decoders, and of models around one, that no table describes and that are named neither
            in the record nor among the wrappers that are refused.
        changed: families whose modelling file changed.
        missing: private names of other libraries that are not where they were.
    """

    version: str
    modelling_files: Mapping[str, str]
    without_table: tuple[str, ...]
    changed: tuple[str, ...]
    missing: tuple[str, ...]

    def lines(self) -> list[str]:
        """What to look at, a line each; empty if there is nothing."""
        said = {
            "no table for the decoder or wrapper": self.without_table,
            "read the modelling file again, it changed": self.changed,
            "find the private name, it moved": self.missing,
        }
        return [f"{what}: {name}" for what, names in said.items() for name in names]


def survey(record: Mapping[str, Any]) -> Survey:
    """Compare the installed libraries with a record.

    Args:
        record: what `to_record` wrote, or an empty mapping.
    """
    described = {*families(), *(outer for outer, _ in wrapped_families())}
    files = {name: code for name in sorted(described) if (code := modelling_digest(name)) is not None}
    known = {*record.get("without_table", ()), *described, *REFUSED}
    before = record.get("modelling_files", {})
    return Survey(
        importlib.metadata.version("transformers"),
        files,
        tuple(sorted({*decoder_types(), *image_text_types()} - known)),
        tuple(name for name, code in files.items() if name in before and before[name] != code),
        tuple(f"{name.path} ({name.read_in})" for name in (*INHERITED, *WRAPPED) if not exists(name.path)),
    )


def to_record(found: Survey, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record after somebody has looked at what was found.

    Args:
        found: the survey.
        record: the one before.
    """
    described = {*families(), *(outer for outer, _ in wrapped_families()), *REFUSED}
    known = {*record.get("without_table", ()), *found.without_table} - described
    return {
        "transformers": found.version,
        "without_table": sorted(known),
        "modelling_files": dict(found.modelling_files),
    }


@functools.cache
def modelling_digest(model_type: str) -> str | None:
    """Digest of the code of the modelling file of a family, without comments and docstrings; None if it has none."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    config_file = Path(inspect.getfile(CONFIG_MAPPING[model_type]))
    file = config_file.with_name(config_file.name.replace("configuration_", "modeling_"))
    return code_digest(file.read_text(encoding="utf-8")) if file.is_file() else None


def code_digest(source: str) -> str:
    """Digest of Python code, the same for other comments, docstrings and line breaks.

    >>> code_digest("x = 1  # one") == code_digest("x=1"), code_digest("x = 1") == code_digest("x = 2")
    (True, False)
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:]  # type: ignore[attr-defined]
    return digest(ast.dump(tree)).removeprefix("sha256:")[:16]


@functools.cache
def exists(path: str) -> bool:
    """Whether a name is there: as an attribute, or, if it is one of instances, keys or parameters, in the source.

    Args:
        path: module, class where there is one, and the name.
    """
    importlib.import_module("transformers.integrations.moe")  # registers operators
    found, rest = _lookup(path)
    if not rest:
        return True
    sources = [base for base in getattr(found, "__mro__", [found]) if base is not object]
    return len(rest) == 1 and any(re.search(rf"\b{rest[0]}\b", inspect.getsource(source)) for source in sources)


def _lookup(path: str) -> tuple[Any, list[str]]:
    """The deepest object on a path that can be had, and the rest of the path."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts.pop(0))
    while parts:
        if not hasattr(found, parts[0]):
            try:
                found = importlib.import_module(f"{found.__name__}.{parts[0]}")
            except (ImportError, AttributeError):
                break
        else:
            found = getattr(found, parts[0])
        parts.pop(0)
    return found, parts


def main(arguments: list[str] | None = None) -> int:
    """Print what changed; 1 if something did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("record", type=Path, help="JSON file with the digests of the last check")
    parser.add_argument("--write", action="store_true", help="write the record: everything listed was looked at")
    options = parser.parse_args(arguments)
    record = read_json(options.record) if options.record.is_file() else {}
    found = survey(record)
    for line in found.lines():
        print(line)
    last = record.get("transformers", "no version")
    print(f"Transformers {found.version}, last checked with {last}: {len(found.lines())} to look at.")
    if options.write:
        write_json(options.record, to_record(found, record))
        return 0
    return int(bool(found.lines()))


if __name__ == "__main__":
    raise SystemExit(main())
