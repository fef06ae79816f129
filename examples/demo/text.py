"""English text that every Python machine has: the standard library's own documentation.

The texts are the language reference's topics (`pydoc_data.topics`, what `help("with")` prints), and the docstrings and
block comments of the standard library's modules, read from their sources without importing them. They are cleaned to
paragraphs of prose; a paragraph that occurs twice is kept once. Nothing is downloaded and nothing is copied into this
repository. The text is the Python Software Foundation's and its contributors', under the PSF licence.

    python examples/demo/text.py OUT_DIR

writes `train.jsonl`, `calibration.jsonl` and `validation.jsonl`, one `{"text": …}` a line.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from minitron_hf.errors import DataError, MinitronError
from minitron_hf.files import digest, replacing_file, require_writable

#: Per cent of the sources (modules and topics, by name) in each split. Earlier splits keep a paragraph that several
#: sources share, so text of a later split never repeats text of an earlier one.
SPLITS = {"validation": 6, "calibration": 4, "train": 90}

#: Longest document, in characters. Sources longer than that become several documents, cut between paragraphs.
MAX_CHARACTERS = 3000

#: Folders inside the standard library that are not documentation of it: its tests, and packages of others.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "_bundled", "site-packages", "dist-packages", "__pycache__"}

_TYPEWRITER = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "–": "-", "—": "-", "\xa0": " "})


def documents(split: str) -> list[str]:
    """Documents of one split of this Python's own text.

    A source (a module or a topic) belongs to a split by a hash of its name, so that another Python version splits its
    text in the same way. The order is that of the texts' hashes: shuffled, but always the same.

    Args:
        split: `"train"`, `"calibration"` or `"validation"`.

    Raises:
        DataError: if there is no such split, or this Python has no sources of its standard library.
    """
    if split not in SPLITS:
        raise DataError(f"There is no split {split!r}. Expected one of {', '.join(SPLITS)}.")
    return list(_all_documents()[split])


def text_digest() -> str:
    """Digest of all documents of all splits, in order."""
    return digest({split: documents(split) for split in SPLITS})


def split_of(name: str) -> str:
    """The split that a module (`"json.decoder"`) or topic (`"topics.with"`) belongs to."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    for split, per_cent in SPLITS.items():
        if bucket < per_cent:
            return split
        bucket -= per_cent
    raise AssertionError("SPLITS do not add up to 100")


@lru_cache(maxsize=1)
def _all_documents() -> dict[str, tuple[str, ...]]:
    sources = {**_topics(), **_modules()}
    seen: set[str] = set()
    found = {}
    for split in SPLITS:
        texts = []
        for name in sorted(name for name in sources if split_of(name) == split):
            entries = [_entry(heading, text, seen) for heading, text in sources[name]]
            texts += _cut(name, list(filter(None, entries)))
        found[split] = tuple(sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()))
    if sum(map(len, found["train"])) < 500_000:
        raise DataError(
            f"The standard library in {sysconfig.get_path('stdlib')} holds hardly any text "
            f"({sum(map(len, found['train'])):,} characters; a full one has over 2 million). "
            "Use a Python that comes with its .py sources."
        )
    return found


def _topics() -> dict[str, list[tuple[str, str]]]:
    """Name → entries (heading, text) of every topic of the language reference."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "This Python has no module pydoc_data.topics. Install its full standard library (on Debian the package "
            "libpython3-stdlib), or use another Python."
        ) from error
    return {f"topics.{name}": [("", text)] for name, text in topics.items()}


def _modules() -> dict[str, list[tuple[str, str]]]:
    """Name → entries (heading, text) of every module of the standard library that has a source."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not EXCLUDED_FOLDERS.intersection(parts):
            name = ".".join(parts).removesuffix(".__init__")
            found[name] = _module_entries(name, path)
    return found


def _module_entries(name: str, path: Path) -> list[tuple[str, str]]:
    """Docstrings and block comments of one source file, in the order of its lines."""
    with tokenize.open(path) as file:
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        tree = ast.parse(source)
    entries, inside = [], set()
    for line, end, heading, text in _docstrings(tree, name):
        entries.append((line, heading, text))
        inside.update(range(line, end + 1))
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in inside:
            block.append(stripped.lstrip("#").removeprefix(" ").rstrip("#-=~* "))
        else:
            if len(block) > 1:
                entries.append((number, "", "\n".join(block)))
            block = []
    return [(heading, text) for _, heading, text in sorted(entries, key=lambda entry: entry[0])]


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[int, int, str, str]]:
    """Yield (first line, last line, heading, text) of every docstring in and below a module, class or function."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and (text := ast.get_docstring(node)):
        string = node.body[0]
        heading = name
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            heading += f"({', '.join(argument.arg for argument in arguments)})"
        yield string.lineno, string.end_lineno or string.lineno, heading, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, documented):
            yield from _docstrings(child, child.name if isinstance(node, ast.Module) else f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):  # definitions that depend on the platform
            yield from _docstrings(child, name)


def _entry(heading: str, text: str, seen: set[str]) -> str:
    """The paragraphs of prose of a text that were not seen before, below their heading; "" when none is left."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", inspect.cleandoc(text.translate(_TYPEWRITER))):
        lines = [re.sub(r"(?<=\S)\s+", " ", line.expandtabs(4).rstrip()) for line in paragraph.split("\n")]
        lines = [line for line in lines if re.search(r"\w", line)]
        key = " ".join(" ".join(lines).split())
        if _is_prose(key) and key not in seen:
            seen.add(key)
            kept.append("\n".join(lines))
    return "\n".join(filter(None, [heading, "\n\n".join(kept)])) if kept else ""


def _is_prose(text: str) -> bool:
    """Whether a paragraph is mostly English words: no grammar productions, interactive sessions, tables or code."""
    if ">>>" in text or "::=" in text or len(text) < 20:
        return False
    letters = sum(character.isascii() and (character.isalpha() or character == " ") for character in text)
    return letters >= 0.8 * len(text)


def _cut(name: str, entries: list[str]) -> list[str]:
    """Documents of at most `MAX_CHARACTERS` (unless one paragraph is longer), each headed by its source's name."""
    title = f"Help on {name.removeprefix('topics.')}:\n\n"
    texts: list[str] = []
    for paragraph in "\n\n".join(entries).split("\n\n") if entries else []:
        if texts and len(texts[-1]) + len(paragraph) + 2 <= MAX_CHARACTERS:
            texts[-1] += "\n\n" + paragraph
        else:
            texts.append(title + paragraph)
    return texts


def write_splits(folder: Path) -> dict[str, dict[str, int]]:
    """Write one `.jsonl` file per split, each at once or not at all; return its number of documents and bytes."""
    require_writable(folder)
    counts = {}
    for split in SPLITS:
        texts = documents(split)
        with replacing_file(folder / f"{split}.jsonl") as temporary:
            temporary.write_text(
                "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
            )
        counts[split] = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
    return counts


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the standard library's documentation as JSON lines.")
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    try:
        for split, count in write_splits(parser.parse_args().folder).items():
            print(f"{split}.jsonl: {count['documents']:,} documents, {count['bytes']:,} bytes of text")
        print(f"digest of the texts: {text_digest()}")
    except MinitronError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
