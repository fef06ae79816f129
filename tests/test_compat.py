"""Private and version-dependent names of other libraries: all in `compat`, and all still there."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

import minitron_hf
from minitron_hf import compat
from minitron_hf.compat import INHERITED, WRAPPED, ForeignName
from minitron_hf.survey.changes import exists

PACKAGE = Path(minitron_hf.__file__).parent
LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "torch", "huggingface_hub")
#: Modules below a library's first level that its documentation names; all others may move.
DOCUMENTED = {
    "accelerate.utils",
    "datasets.exceptions",
    "huggingface_hub.constants",
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "peft.tuners.tuners_utils",
    "peft.utils",
    "transformers.trainer_utils",
    "transformers.utils",
}
#: Public in spite of the underscore: the method of a named tuple.
PUBLIC = {"_replace"}
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "compat.py"]
ON_ITSELF = {name.path.rpartition(".")[2] for name in INHERITED}
LISTED = {name.path.rpartition(".")[2] for name in (*INHERITED, *WRAPPED)}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def members(tree: ast.AST) -> Iterator[str]:
    """Private names that classes of a file define for themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield part.name
                for target in getattr(part, "targets", [getattr(part, "target", None)]):
                    if isinstance(target, ast.Name):
                        yield target.id
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names of others that a file uses, and modules of others that their documentation does not name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if not (node.attr in ON_ITSELF and re.match(r"self\b|super\(|SFTConfig\b", ast.unparse(node.value))):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.keyword) and is_private(node.arg or "") and node.arg not in own | ON_ITSELF:
            yield f"line {node.value.lineno}: {node.arg}="
        elif isinstance(node, ast.Constant) and is_private(str(node.value)) and node.value in LISTED - ON_ITSELF:
            yield f"line {node.lineno}: {node.value!r}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("attr", "patch.object")):
            target, *words = [ast.unparse(argument) for argument in node.args[:2]]
            for word in map(ast.literal_eval, [word for word in words if is_private(word[1:-1])]):
                if word not in own and not (word in ON_ITSELF and target == "self"):
                    yield f"line {node.lineno}: {word!r}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"line {node.lineno}: {module}" for module in imported(node) if is_unsafe(module))


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level else [f"{node.module}.{alias.name}" for alias in node.names]


def is_unsafe(name: str) -> bool:
    library, *parts = name.split(".")
    if library not in LIBRARIES:
        return False
    below = ".".join([library, *parts[:-1]]) not in {library, *DOCUMENTED}
    return any(map(is_private, parts)) or (below and library != "torch")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_others_are_used_in_one_file(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert list(foreign_names(tree, PUBLIC | OWN)) == []


OWN = {name for path in SOURCES for name in members(ast.parse(path.read_text(encoding="utf-8")))} - LISTED


def test_the_scan_finds_every_way_to_use_a_name():
    code = """
        from torch._dynamo import list_backends
        from transformers.integrations import moe
        import trl.models.utils
        getattr(config, "_secret", None)
        mock.patch.object(moe, "_secret", no)
        state["_data_files"]
        super()._secret()
        trainer._tr_loss
        load(_secret=True)
        self._ours, tensor.public
    """
    found = list(foreign_names(ast.parse(textwrap.dedent(code)), {"_ours"}))
    assert {line.partition(":")[0] for line in found} == {f"line {number}" for number in range(2, 11)}


def test_compat_lists_the_names_that_it_uses():
    """Operators of PyTorch, which are constants of the file, are looked up when it is imported."""
    tree = ast.parse(inspect.getsource(compat))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_private(node.attr)}
    operators = {name for name in used if hasattr(importlib.import_module("torch").ops.aten, name)}
    assert used - operators <= LISTED


# Inherited names


def classes_of_ours() -> Iterator[type]:
    for module in pkgutil.walk_packages(minitron_hf.__path__, "minitron_hf."):
        if ".metrics." not in module.name:
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, type) and value.__module__ == module.name:
                    yield value


def written(cls: type) -> set[str]:
    """Private names that the source of a class defines, or uses on itself."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # of C
        return set()
    used = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    return {name for name in {*used, *members(tree)} if is_private(name)}


def test_inherited_private_names_are_listed():
    """What our subclasses override, or use on themselves, though a library has defined it."""
    found: dict[str, set[str]] = {}
    for cls in classes_of_ours():
        ours = [base for base in cls.__mro__ if base.__module__.startswith("minitron_hf.")]
        theirs = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
        shared = set().union(*map(written, ours)) & {name for base in theirs for name in {*vars(base), *written(base)}}
        for name in shared - ON_ITSELF:
            found.setdefault(cls.__qualname__, set()).add(name)
    assert found == {}


# Names that have moved


@pytest.mark.ranges
@pytest.mark.parametrize("name", dict.fromkeys((*INHERITED, *WRAPPED)), ids=lambda name: name.path)
def test_listed_names_are_still_there(name: ForeignName):
    library, version = name.read_in.split()
    if Version(importlib.metadata.version(library)) < Version(version):
        pytest.skip(f"{library} is older than the one that was read")
    assert exists(name.path), f"{name.path} ({name.read_in}) has moved; {name.why} needs it: {name.path}"


def test_a_name_that_has_moved_is_missed():
    assert not exists("transformers.Trainer._frobnicate")
    assert not exists("transformers.integrations.frobnicate.name")
