"""The matrix family × axis, made from the family tables, for the terminal and the documentation.

`python -m minitron_hf.survey.matrix docs/families.md` rewrites the matrix of that page.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING

from ..compat import decoder_types
from ..errors import DataError, UnsupportedModelError, did_you_mean
from ..families import FIELD_OF_AXIS, REFUSED, WITHOUT_TABLE, ArchSpec, families, wrapped_families
from ..families.axes import Axis, dimension_axes, parse_dimensions
from ..families.releases import FIRST_RELEASE
from ..files import replacing_file

BEGIN, END = "<!-- families -->", "<!-- /families -->"
WRAPPERS_TITLE = (
    "Models around a language model. Their language model is cut as its own row above says, and the rest stays as it "
    "is, but for what a projector writes to the language model:"
)
LEGEND = (
    "✓ can be cut, ✗ cannot, empty: the family has no such size; numbers refer to the remarks. The sizes are those of "
    "`PrunerConfig`: {names}."
)


@dataclass(frozen=True)
class Cut:
    """Whether an axis can be cut in a family.

    Attributes:
        allowed: whether it can at all.
        remarks: why not, or on which refused_variants.
    """

    allowed: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """Family × axis.

    Attributes:
        axes: the columns.
        rows: families with equal cells, and these: axis → mark with the numbers of its remarks.
        remarks: the remarks, numbered from 1.
        wrappers: rows of models around a language model: their names, what they may hold, and what can be cut.
    """

    axes: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], Mapping[str, str]], ...]
    remarks: tuple[str, ...]
    wrappers: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = ()

    @property
    def legend(self) -> str:
        """The meaning of the marks and columns."""
        return LEGEND.format(names=", ".join(f"{axis} is `{FIELD_OF_AXIS[axis]}`" for axis in self.axes))


def cuttable_axes(spec: ArchSpec) -> dict[str, Cut]:
    """Every size of a family that users can name, and whether it can be cut: axis → `Cut`.

    Args:
        spec: the family's table; differences of its variants become remarks.
    """
    own = _own_cuts(spec)
    found = dict(own)
    for name, value, variant in spec.variants:
        where = f"with `{name}={value!r}`: "
        for axis, cut in cuttable_axes(variant).items():
            if axis not in own:
                found.setdefault(axis, Cut(cut.allowed, ()))
                said = (f"only {where.removesuffix(': ')}", *cut.remarks)
            elif cut.allowed != own[axis].allowed:
                said = (f"{where}{'yes' if cut.allowed else 'no'}", *cut.remarks)
            else:
                said = tuple(remark for remark in cut.remarks if remark not in own[axis].remarks)
                said = tuple(where + remark for remark in said)
            remarks = dict.fromkeys((*found[axis].remarks, *said))
            found[axis] = Cut(found[axis].allowed, tuple(remarks))
    return {axis: found[axis] for axis in FIELD_OF_AXIS if axis in found}


def _own_cuts(spec: ArchSpec) -> dict[str, Cut]:
    remarks: dict[str, list[str]] = {axis: [] for axis in FIELD_OF_AXIS if axis in spec.axis}
    for left, right in spec.equal:
        together = f"only together, so that {_in_user_names(right, spec)} = {_in_user_names(left, spec)}"
        moving = {axis for side in (left, right) for axis in dimension_axes(parse_dimensions(side)[0])}
        if "projector" in moving:  # follows by itself
            continue
        for axis in moving & remarks.keys():
            remarks[axis].append(together)
    for multiple, divisor in spec.multiples:
        if multiple in remarks:
            others = " or ".join(f'`model_type="{other}"`' for other, *_ in spec.equivalent_classes)
            unless = f", or any size with {others}" if others else ""
            remarks[multiple].append(f"only multiples of {_in_user_names(divisor, spec)}{unless}")
    for inner, outer in spec.groups:
        if inner in remarks:
            remarks[inner].append(f"the same number for every kept unit of {_in_user_names(outer, spec)}")
    for axis, expression in spec.least:
        if axis in remarks:
            remarks[axis].append(f"at least {_in_user_names(expression, spec)}")
    for names in spec.layer_rules.sparse_ranges:
        remarks["layers"].append(f"only to an order of layers that {', '.join(names)} can describe")
    for _, rule in spec.layer_rules.derived_kinds:
        remarks["layers"].append(f"only to an order of layers that {rule} can describe")
    for layer in spec.layer_rules.fixed_ends:
        remarks["layers"].append(
            f"all but the {'last' if layer < 0 else 'first'}, which the stock classes treat differently"
        )
    for name, kinds in spec.needed_kinds:
        remarks["layers"].append(f"at least one kept layer needs `{name}` {' or '.join(map(repr, kinds))}")
    for name, value, axis, why in spec.refused_if:
        if axis in remarks:
            remarks[axis].append(f"not with `{name}={value!r}`: {why}")
    fixed = {axis: "the stock classes have no field for it" for axis in remarks if not spec.axis[axis].prunable}
    refused = {**fixed, **spec.refused}
    return {
        axis: Cut(False, (refused[axis],)) if axis in refused else Cut(True, tuple(found))
        for axis, found in remarks.items()
    }


def refused_variants(spec: ArchSpec) -> tuple[str, ...]:
    """Variants of a family that cannot be pruned at all, with the reason."""
    return tuple(f"not with `{name}={value!r}`: {why}" for name, value, axis, why in spec.refused_if if axis == "*")


def missing_from_transformers(*model_types: str) -> tuple[str, ...]:
    """A remark where the installed Transformers lacks one of the model types that a family needs.

    Types from outside this package are not looked for: their code may come with the model.
    """
    if any(name in FIRST_RELEASE for name in model_types) and set(model_types) - set(CONFIG_MAPPING):
        return (f"not in Transformers {transformers.__version__}, which is installed; update it",)
    return ()


def only_inside(model_type: str) -> tuple[str, ...]:
    """A remark where Transformers has a language model only as a part of larger ones."""
    if model_type not in CONFIG_MAPPING or model_type in decoder_types():
        return ()
    return ("only inside a larger model: Transformers has no class for the language model alone",)


def support_matrix(specs: Sequence[ArchSpec] | None = None) -> Matrix:
    """The matrix of some families; those with equal cells share a row.

    Args:
        specs: their tables (default: all, and the models around them).
    """
    tables = list(families().values()) if specs is None else specs
    numbers: dict[str, int] = {}

    def marked(mark: str, remarks: Sequence[str]) -> str:
        return mark + _superscript([numbers.setdefault(remark, len(numbers) + 1) for remark in remarks])

    grouped: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for spec in tables:
        cells = {axis: marked("✓" if cut.allowed else "✗", cut.remarks) for axis, cut in cuttable_axes(spec).items()}
        missing = missing_from_transformers(spec.model_type)
        remarks = (*refused_variants(spec), *missing, *only_inside(spec.model_type))
        grouped.setdefault(tuple(cells.items()), []).append(marked(spec.model_type, remarks))
    used = tuple(axis for axis in FIELD_OF_AXIS if any(axis in dict(cells) for cells in grouped))
    rows = tuple((tuple(names), dict(cells)) for cells, names in grouped.items())
    return Matrix(used, rows, tuple(numbers), tuple(_wrapper_rows()) if specs is None else ())


def _wrapper_rows() -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """Rows of models around a language model; those that say the same share one."""
    held: dict[str, list[str]] = {}
    for outer, text in wrapped_families():
        held.setdefault(outer, []).append(text)
    grouped: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for outer, inside in sorted(held.items()):
        spec, own = wrapped_families()[outer, inside[0]], families()[inside[0]].refused
        refused = [f"not `{FIELD_OF_AXIS[axis]}`: {why}" for axis, why in spec.refused.items() if axis not in own]
        refused += ["not the first layers, which images are added to"] if spec.deep_inputs or spec.image_layers else []
        said = "; ".join(["✓", *refused])
        grouped.setdefault((tuple(inside), said), []).append(outer)
    for outer, reason in sorted(REFUSED.items(), key=lambda row: (row[0] in WITHOUT_TABLE, row[0])):
        texts = tuple(WITHOUT_TABLE[name] for name in [outer] if name in WITHOUT_TABLE)
        grouped.setdefault((texts, f"✗ {reason}"), []).append(outer)
    for (texts, said), names in grouped.items():
        yield tuple(names), texts, said


def to_markdown(matrix: Matrix) -> str:
    """The matrix as it stands in the documentation: a table, its legend, and the remarks as a numbered list."""
    head = ["families", *matrix.axes]
    lines = [f"| {' | '.join(head)} |", f"|---|{':-:|' * len(matrix.axes)}"]
    for names, cells in matrix.rows:
        listed = ", ".join(re.sub(r"[a-zA-Z0-9_-]+", r"`\g<0>`", name) for name in names)
        lines.append(f"| {listed} | {' | '.join(cells.get(axis, '') for axis in matrix.axes)} |")
    remarks = [f"{number}. {remark}" for number, remark in enumerate(matrix.remarks, 1)]
    lines += ["", matrix.legend, "", *remarks]
    if matrix.wrappers:
        lines += ["", WRAPPERS_TITLE, "", "| models | language model inside | what can be cut |", "|---|---|---|"]
        for names, texts, said in matrix.wrappers:
            listed, inside = (", ".join(f"`{name}`" for name in group) for group in (names, texts))
            lines.append(f"| {listed} | {inside} | {said} |")
    return "\n".join(lines)


def describe_family(model_type: str) -> list[tuple[str, ArchSpec]]:
    """The description and the table of a family; several where a wrapper of that type holds one of several families.

    Raises:
        UnsupportedModelError: if there is no such family.
    """
    if model_type in families():
        return [(_docstring_of(model_type), families()[model_type])]
    inside = [(text, spec) for (outer, text), spec in wrapped_families().items() if outer == model_type]
    if model_type in REFUSED:
        raise UnsupportedModelError(f"'{model_type}' models cannot be pruned: {REFUSED[model_type]}.")
    if not inside:
        known = dict.fromkeys((*families(), *sorted(outer for outer, _ in wrapped_families())))
        raise UnsupportedModelError(
            f"No family table for '{model_type}'.{did_you_mean(model_type, known)} There are {', '.join(known)}."
        )
    return [
        (f"A model that holds a language model of type '{text}'. {_docstring_of(text)}", spec) for text, spec in inside
    ]


def _docstring_of(model_type: str) -> str:
    name = f"minitron_hf.families.{model_type.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        return "A table from outside this package."
    return (importlib.import_module(name).__doc__ or "").strip()


def insert_matrix(text: str) -> str:
    """A text with the current matrix between its markers.

    Raises:
        DataError: if it has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"Expected a text with {BEGIN} and {END}, between which the matrix stands.")
    return f"{before}{BEGIN}\n{to_markdown(support_matrix())}\n{END}{after}"


def _in_user_names(text: str, spec: ArchSpec) -> str:
    """An expression of axes in the names that users know, else those of the config.

    >>> _in_user_names("heads*head_dim", families()["gpt2"])
    '`num_attention_heads` × head_dim'
    """

    def known(found: re.Match[str]) -> str:
        axis = spec.axis.get(found[0])
        return (
            f"`{FIELD_OF_AXIS[found[0]]}`" if found[0] in FIELD_OF_AXIS else (*(axis or Axis("")).fields, found[0])[0]
        )

    return re.sub(r"\b[a-z_]\w*", known, text).replace("*", " × ").replace("+", " + ").replace("/", " / ")


def _superscript(numbers: Sequence[int]) -> str:
    """References to remarks.

    >>> _superscript([1, 12])
    '¹ ¹²'
    """
    return " ".join(str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")) for number in numbers)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        with replacing_file(path) as temporary:
            temporary.write_text(insert_matrix(path.read_text(encoding="utf-8")), encoding="utf-8")
