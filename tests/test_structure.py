"""How the package is put together: layers of modules, lazy imports, and architecture names in family files only."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitron_hf
from minitron_hf.families import NOT_TABLES, ArchSpec, families

PACKAGE = Path(minitron_hf.__file__).parent
#: Dotted name below the package → file; `evaluation/metrics/` holds scripts that the `evaluate` library loads alone.
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py" and "metrics" not in path.relative_to(PACKAGE).parts
}
ROOMS = sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")})
FAMILY_FILES = sorted(
    path for path in (PACKAGE / "families").glob("*.py") if path.stem not in {"__init__", *NOT_TABLES}
)
TABLES = {f"families.{path.stem}" for path in FAMILY_FILES}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def own_imports(name: str) -> Iterator[tuple[str, int]]:
    """Modules of this package that a module imports anywhere, and the line."""
    for node in ast.walk(parsed(MODULES[name])):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*name.split(".")[: -node.level], *(node.module or "").split(".")]).strip(".")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "minitron_hf":
            base = (node.module or "").partition(".")[2]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("minitron_hf."):
                    yield alias.name.partition(".")[2], node.lineno
            continue
        else:
            continue
        for alias in node.names:
            inside = f"{base}.{alias.name}".strip(".")
            yield (inside if inside in MODULES else base if base in MODULES else f"{base}.__init__"), node.lineno


def room_of(module: str) -> str:
    return module.partition(".")[0]


def room_order() -> list[str]:
    """Rooms and top modules in the order of the table in CONTRIBUTING.md; `_version` comes before all."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return ["_version", *re.findall(r"`(\w+)(?:\.py|/)`", " ".join(rows))]


def test_every_room_has_its_place():
    assert sorted(set(map(room_of, MODULES))) == sorted(room_order())


@pytest.mark.parametrize("name", sorted(set(MODULES) - TABLES))
def test_modules_import_only_from_rooms_above(name: str):
    """Imports inside functions and for type checkers included."""
    order = room_order()
    for imported, line in own_imports(name):
        here, there = room_of(name), room_of(imported)
        assert here == there or order.index(there) < order.index(here), f"{name}:{line} imports {imported}"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {imported for imported, _ in own_imports(name)} for name in MODULES}
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(MODULES)  # raises CycleError


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_say_what_belongs_there(room: str):
    text = ast.get_docstring(parsed(PACKAGE / room / "__init__.py")) or ""
    assert room == "families" or "May import" in text


#: Longest file, function and class that need no reason; a longer one says it in its docstring ("… lines: …").
MOST_LINES, MOST_FUNCTION_LINES, MOST_METHODS = 450, 60, 25


@pytest.mark.parametrize("name", sorted(set(MODULES) - TABLES))
def test_files_stay_short(name: str):
    text = MODULES[name].read_text(encoding="utf-8")
    reason = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) <= MOST_LINES or "Long because" in reason


def functions_and_classes() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for name in sorted(set(MODULES) - TABLES):
        for node in ast.walk(parsed(MODULES[name])):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield name, node


def test_functions_stay_short():
    long = {
        f"{name}.{node.name}": lines
        for name, node in functions_and_classes()
        if not isinstance(node, ast.ClassDef) and (lines := node.end_lineno - node.lineno + 1) > MOST_FUNCTION_LINES
        if "Long because" not in (ast.get_docstring(node) or "")
    }
    assert not long


def test_classes_have_few_methods():
    large = {
        f"{name}.{node.name}": methods
        for name, node in functions_and_classes()
        if isinstance(node, ast.ClassDef)
        and (methods := sum(isinstance(inner, ast.FunctionDef) for inner in node.body)) > MOST_METHODS
        if "Large because" not in (ast.get_docstring(node) or "")
    }
    assert not large


HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "evaluate", "accelerate", "matplotlib"}


@pytest.mark.parametrize(
    "name", ["_version", "errors", "files", "families.axes", "data.rows", "data.documents", "recipe.schema", "cli.app"]
)
def test_light_modules_import_nothing_heavy_at_the_top(name: str):
    for node in parsed(MODULES[name]).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        assert HEAVY.isdisjoint(name.partition(".")[0] for name in names), f"line {node.lineno}"


@pytest.mark.parametrize(
    "code",
    [
        "import minitron_hf; minitron_hf.__version__; dir(minitron_hf)",
        "import minitron_hf.errors, minitron_hf.files, minitron_hf.families.axes, minitron_hf.data",
        "import minitron_hf.families; minitron_hf.families.families()",
        "import minitron_hf.publishing.hub, minitron_hf.publishing.card, minitron_hf.publishing.uploads",
        "import sys, minitron_hf.cli; sys.argv = ['minitron-hf', '--help']; minitron_hf.cli.main()",
        "import sys, minitron_hf.cli; sys.argv = ['minitron-hf', 'run', '--help']; minitron_hf.cli.main()",
    ],
)
def test_light_imports_leave_heavy_libraries_alone(code: str):
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('\\nheavy:', sorted(set(sys.modules) & {HEAVY!r})))\n"
        f"{code}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout


def test_public_names_are_defined_where_they_are_said_to_be():
    """`__init__` names each public object, its module, and the same once more for type checkers."""
    tree = parsed(PACKAGE / "__init__.py")
    for_checkers = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module != "_version"
        for alias in node.names
    }
    assert for_checkers == minitron_hf._MODULE_OF
    assert set(minitron_hf.__all__) == {"__version__", *for_checkers}
    for name, module in for_checkers.items():
        defined = {
            target
            for node in parsed(MODULES.get(module) or MODULES[f"{module}.__init__"]).body
            for target in (
                [node.name]
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                else [t.id for t in node.targets if isinstance(t, ast.Name)]
                if isinstance(node, ast.Assign)
                else []
            )
        }
        assert name in defined, f"{module}.py does not define {name}"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = minitron_hf.frobnicate
    assert minitron_hf.MinitronError.__name__ == "MinitronError"


# Architecture names

#: What tables are made of.
PARTS = {f"families.{name}" for name in NOT_TABLES}


def architecture_names() -> set[str]:
    """Parts of parameter names in the tables; single words, such as `mixer` or `embeddings`, may mean anything."""
    ordinary = {"act_fn", *ArchSpec.__dataclass_fields__}  # a function that any code may have; words of the tables
    layouts = [layout for spec in families().values() for layout in spec.layouts()]
    names = {part for spec in layouts for name in spec.dimensions for part in name.split(".")}
    return {name for name in names if re.search(r"[a-z](_|\d)", name)} - ordinary


def code_words(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Identifiers, and the parts of strings that are (dotted) names themselves, not prose."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg, node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.*]+", node.value):
            yield from ((part, node.lineno) for part in node.value.split("."))


def test_there_are_architecture_names():
    assert {"q_proj", "c_attn", "query_key_value", "gate_up_proj", "fc1", "lm_head"} <= architecture_names()


@pytest.mark.parametrize(
    "path", [path for name, path in MODULES.items() if name not in {*TABLES, *PARTS}], ids=lambda path: path.stem
)
def test_architecture_names_stay_in_family_files(path: Path):
    forbidden = architecture_names()
    if path.stem == "experts":  # speaks Transformers' interface of stacked experts, which fixes these names
        forbidden -= {"gate_up_proj", "up_proj", "down_proj"}
    if path.stem == "draft_source":  # writes tables with the helper of this name
        forbidden -= {"conv1d"}
    found = [f"{path.name}:{line}: {word}" for word, line in code_words(parsed(path)) if word in forbidden]
    assert not found


def test_families_are_found_by_their_files():
    assert [path.stem for path in FAMILY_FILES] == sorted(name.replace("-", "_") for name in families())


SOURCES_OF_TABLES = {
    (1, "base"),
    (1, "rules"),
    (1, "spec"),
    (1, "state_space"),
    (1, "axes"),
    (0, "dataclasses"),
    (0, "__future__"),
}


@pytest.mark.parametrize("path", FAMILY_FILES, ids=lambda path: path.stem)
def test_family_files_hold_a_table_and_nothing_else(path: Path):
    docstring, *body = parsed(path).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    for node in body:
        if isinstance(node, ast.ImportFrom):
            assert (node.level, node.module) in SOURCES_OF_TABLES, ast.unparse(node)
        else:
            assert isinstance(node, ast.Assign), ast.unparse(node)
            assert all(isinstance(target, ast.Name) and target.id.isupper() for target in node.targets)
            assert not any(isinstance(part, ast.Lambda | ast.comprehension | ast.IfExp) for part in ast.walk(node))
    [spec] = [spec for name, spec in families().items() if name.replace("-", "_") == path.stem]
    assert type(spec) is ArchSpec
    assert spec.model_type.replace("-", "_") == path.stem
