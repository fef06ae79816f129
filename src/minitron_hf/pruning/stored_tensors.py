"""Tensors that stay on disk and read any part of themselves from a safetensors checkpoint.

Code for tensors in memory runs on them unchanged: Transformers renames, stacks and casts the tensors of a checkpoint,
and this package cuts them. Operations are only recorded. Shapes and dtypes are known at once; numbers are read when
they are written elsewhere, and only the kept ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..compat import CAST, UNSAFE_VIEW, is_in_place, tree_map, wrapper_tensor
from ..errors import UnsupportedModelError
from . import stored_reading
from .stored_reading import Index, Stored, take, take_box

#: Names of dtypes in a safetensors header, in the order in which the format sorts tensors (the last come first).
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Computed:
    """Output number `output` of an operation."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: int = 0


class LazyTensor(torch.Tensor):
    """A tensor whose numbers are on disk.

    Attributes:
        meta: its shape, strides and dtype: a tensor without memory that went through the same operations. Two lazy
            tensors whose `meta` share storage would share it in memory.
        recipe: where its numbers come from.
        by_rows: whether any rows of it can be read at a cost in proportion to their number.
    """

    meta: torch.Tensor
    recipe: Stored | Computed
    by_rows: bool

    @staticmethod
    def __new__(cls, meta: torch.Tensor, recipe: Stored | Computed) -> LazyTensor:
        """Make a tensor that claims to be on the CPU and owns no memory."""
        return wrapper_tensor(cls, like=meta, device=torch.device("cpu"))

    def __init__(self, meta: torch.Tensor, recipe: Stored | Computed) -> None:
        """See the attributes of the class."""
        self.meta, self.recipe = meta, recipe
        self.by_rows = isinstance(recipe, Stored) or _keeps_rows(recipe)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Shape and dtype; printing reads nothing."""
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note down an operation instead of doing it."""
        if func in _ANSWERS:
            return _ANSWERS[func](*args)
        if is_in_place(func):
            raise NotImplementedError(f"{func} would change a tensor of a checkpoint in place")
        # Everything stays on the CPU, and memory is of no concern.
        kwargs = {key: value for key, value in (kwargs or {}).items() if key not in ("device", "pin_memory")}
        metas = func(*tree_map(_meta, args), **tree_map(_meta, kwargs))
        if func in (aten.empty_like.default, aten.zeros_like.default):
            return metas  # to be filled with initial values, which no tensor of a checkpoint takes
        if func in _SAME:
            return cls(metas, args[0].recipe)
        if isinstance(metas, torch.Tensor):
            return cls(metas, Computed(func, args, kwargs))
        if isinstance(metas, tuple | list) and all(isinstance(meta, torch.Tensor) for meta in metas):
            return [cls(meta, Computed(func, args, kwargs, output)) for output, meta in enumerate(metas)]
        return metas

    def read(self) -> torch.Tensor:
        """All numbers, as an ordinary tensor."""
        return _read(self, [np.arange(size) for size in self.shape], points=False)

    def blocks(self) -> Iterator[torch.Tensor]:
        """The numbers in row-major order, a block of rows at a time; in one piece where parts of it cost the whole."""
        if not self.by_rows or self.ndim == 0 or self.nbytes <= stored_reading.BLOCK_BYTES:
            yield self.read()
            return
        rest = [np.arange(size) for size in self.shape[1:]]
        rows = max(1, stored_reading.BLOCK_BYTES // (self.nbytes // len(self)))
        for start in range(0, len(self), rows):
            yield _read(self, [np.arange(start, min(start + rows, len(self))), *rest], points=False)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """All numbers, as an array."""
        return self.read().numpy(force=force)


def lazy_tensors(path: str | os.PathLike[str]) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, by name; only its header is read.

    Raises:
        UnsupportedModelError: if the file is damaged, or holds a dtype that is not supported.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt"):  # checks the header against the length of the file
            pass
    except SafetensorError as error:
        raise UnsupportedModelError(
            f"{path} is not a complete safetensors file ({error}). Copy or download it again."
        ) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UnsupportedModelError(
                f"The tensor {name!r} in {path} has the dtype {entry['dtype']}; expected one of {', '.join(DTYPES)}."
            )
        meta = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
        tensors[name] = LazyTensor(meta, Stored(path, 8 + length + entry["data_offsets"][0]))
    return tensors


def on_disk(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> dict[str, torch.Tensor]:
    """Write tensors into a new folder, each as soon as it is there, and return them without their numbers."""
    folder.mkdir()
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:  # not enumerated, which would hold the tensor until there is another
        path = folder / f"{len(found)}.safetensors"
        save_file({name: tensor.cpu().contiguous()}, path)
        del tensor  # before the next one is computed
        found |= lazy_tensors(path)
    return found


def _meta(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return value.meta
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _lazy_inputs(args: Any) -> list[LazyTensor]:
    found = []
    for arg in args:
        found += _lazy_inputs(arg) if isinstance(arg, tuple | list) else [arg] if isinstance(arg, LazyTensor) else []
    return found


def _keeps_rows(recipe: Computed) -> bool:
    """Whether some rows of an operation's output need no more than some rows of its inputs."""
    inputs = _lazy_inputs(recipe.args)
    joins = recipe.operation in (aten.stack.default, aten.cat.default)
    alike = recipe.operation in _ARITHMETIC and len({tensor.shape for tensor in inputs}) == 1
    several = joins or alike or len(inputs) == 1
    return recipe.operation in _BY_ROWS and several and all(tensor.by_rows for tensor in inputs)


def _is_set_to(one: LazyTensor, other: LazyTensor) -> bool:
    return one.recipe is other.recipe


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return all(torch.equal(a, b) for a, b in zip(one.blocks(), other.blocks()))


# Reading. An index names positions per dimension: the box of all their combinations, which gives a tensor with as many
# dimensions (`points=False`), or single points whose coordinates stand side by side, which gives a vector
# (`points=True`). Every operation that only moves numbers translates the index into one of its input.


def _read(tensor: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    recipe = tensor.recipe
    if not all(map(len, index)):
        return torch.empty([0] if points else [len(positions) for positions in index], dtype=tensor.dtype)
    if isinstance(recipe, Stored):
        read = stored_reading.read_points if points else stored_reading.read_box
        return read(recipe, tuple(tensor.shape), tensor.dtype, index)
    if (rule := _RULES.get(recipe.operation)) is not None and (
        found := rule(recipe, tensor, index, points)
    ) is not None:
        return found
    # Any other operation: its inputs in full.
    args, kwargs = tree_map(
        lambda value: value.read() if isinstance(value, LazyTensor) else value, (recipe.args, recipe.kwargs)
    )
    made = recipe.operation(*args, **kwargs)
    made = made[recipe.output] if isinstance(made, tuple | list) else made
    if points:
        return made[tuple(torch.from_numpy(positions) for positions in index)]
    return take_box(made, index)


def _arguments(recipe: Computed, *defaults: Any) -> list[Any]:
    """Arguments of an operation; those that were left out have their defaults."""
    return [*recipe.args, *defaults[len(recipe.args) :]]


Rule = Callable[[Computed, LazyTensor, Index, bool], "torch.Tensor | None"]


def _index_select(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    source, dim, chosen = recipe.args
    index = list(index)
    index[dim] = chosen.numpy()[index[dim]]
    return _read(source, index, points)


def _slice(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    source, dim, start, end, step = _arguments(recipe, None, 0, None, None, 1)
    kept = range(source.shape[dim])[slice(start, end, step)]
    index = list(index)
    index[dim] = kept.start + index[dim] * kept.step
    return _read(source, index, points)


def _split(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    """One of several pieces: of one size, or of given sizes."""
    source, sizes, dim = _arguments(recipe, None, None, 0)
    before = sizes * recipe.output if isinstance(sizes, int) else sum(sizes[: recipe.output])
    index = list(index)
    index[dim] = index[dim] + before
    return _read(source, index, points)


def _at(source: LazyTensor, dim: int, position: int, index: Index, points: bool) -> torch.Tensor:
    """One position of a dimension, which goes."""
    dim %= source.ndim
    number = len(index[0]) if points and index else 1
    index = [*index[:dim], np.full(number, position % source.shape[dim]), *index[dim:]]
    found = _read(source, index, points)
    return found if points else found.select(dim, 0)


def _select(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    source, dim, position = recipe.args
    return _at(source, dim, position, index, points)


def _unbind(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    source, dim = _arguments(recipe, None, 0)
    return _at(source, dim, recipe.output, index, points)


def _squeeze(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    source, dim = recipe.args
    return _at(source, dim, 0, index, points) if made.ndim < source.ndim else _read(source, index, points)


def _unsqueeze(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor | None:
    source, dim = recipe.args
    dim %= made.ndim
    inner = [*index[:dim], *index[dim + 1 :]]
    if points:
        return _read(source, inner, points) if inner else None
    return take(_read(source, inner, points).unsqueeze(dim), dim, index[dim])


def _permute(source: LazyTensor, order: list[int], index: Index, points: bool) -> torch.Tensor:
    inner: Index = [index[0]] * source.ndim
    for position, dim in enumerate(order):
        inner[dim] = index[position]
    found = _read(source, inner, points)
    return found if points else found.permute(order)


def _transpose(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    source, one, other = _arguments(recipe, None, 0, 1)
    order = list(range(source.ndim))
    if not order:
        return _read(source, index, points)
    order[one], order[other] = order[other], order[one]
    return _permute(source, order, index, points)


def _permuted(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    source, order = recipe.args
    return _permute(source, [dim % source.ndim for dim in order], index, points)


def _cast(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    return _read(recipe.args[0], index, points).to(made.dtype)


def _elementwise(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor | None:
    """Arithmetic of tensors of one shape and plain numbers."""
    for arg in recipe.args:
        if not isinstance(arg, int | float) and not (isinstance(arg, LazyTensor) and arg.shape == made.shape):
            return None
    args = [_read(arg, index, points) if isinstance(arg, LazyTensor) else arg for arg in recipe.args]
    return recipe.operation(*args, **recipe.kwargs)


def _view(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    """Another shape: single values keep their place in row-major order. A box need not stay one."""
    source = recipe.args[0]
    if not points and (made.ndim != 1 or source.numel() < 2 * len(index[0])):
        return take_box(source.read().reshape(made.shape), index)
    place = np.ravel_multi_index(tuple(index), tuple(made.shape)) if made.ndim else np.zeros(1, dtype=np.int64)
    return _read(source, list(np.unravel_index(place, tuple(source.shape))) if source.ndim else [], True)


def _join(parts: list[LazyTensor], sizes: list[int], new: bool, dim: int, index: Index, points: bool) -> torch.Tensor:
    """Positions of one dimension belong to different tensors: ask each for its own, and put the answers in place.

    Args:
        parts: the tensors.
        sizes: how many positions each of them has.
        new: whether the dimension is one that they do not have themselves.
        dim: the dimension.
        index: see above.
        points: see above.
    """
    ends = np.cumsum(sizes)
    owners = np.searchsorted(ends, index[dim], side="right")
    answers, places = [], []
    for owner in np.unique(owners):
        place = np.flatnonzero(owners == owner)
        inner = [positions[place] if points or d == dim else positions for d, positions in enumerate(index)]
        inner[dim] = inner[dim] - (ends[owner] - sizes[owner])
        if not new:
            answer = _read(parts[owner], inner, points)
        else:
            repeats = inner.pop(dim)
            if points:
                answer = _read(parts[owner], inner, points) if inner else parts[owner].read().expand(len(repeats))
            else:
                answer = take(_read(parts[owner], inner, points).unsqueeze(dim), dim, repeats)
        answers.append(answer)
        places.append(place)
    if len(answers) == 1:
        return answers[0]
    dim = 0 if points else dim
    return take(torch.cat(answers, dim), dim, np.argsort(np.concatenate(places)))


def _stack(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    parts, dim = _arguments(recipe, None, 0)
    return _join(parts, [1] * len(parts), True, dim % made.ndim, index, points)


def _cat(recipe: Computed, made: LazyTensor, index: Index, points: bool) -> torch.Tensor:
    parts, dim = _arguments(recipe, None, 0)
    return _join(parts, [part.shape[dim] for part in parts], False, dim % made.ndim, index, points)


aten = torch.ops.aten
#: Operations that change neither numbers nor their places.
_SAME = {aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default}
#: Questions that are answered at once.
_ANSWERS: dict[Any, Callable[..., bool]] = {aten.equal.default: _equal, aten.is_set_to.default: _is_set_to}
#: Operations on single numbers.
_ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
#: How to translate an index of an operation's output into one of its inputs.
_RULES: dict[Any, Rule] = {
    aten.index_select.default: _index_select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.squeeze.dim: _squeeze,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.permute.default: _permuted,
    CAST: _cast,
    **dict.fromkeys(_ARITHMETIC, _elementwise),
    aten.view.default: _view,
    UNSAFE_VIEW: _view,
    aten.reshape.default: _view,
    aten.stack.default: _stack,
    aten.cat.default: _cat,
}
#: Those among them that leave rows rows.
_BY_ROWS = _RULES.keys() - {
    aten.transpose.int,
    aten.t.default,
    aten.permute.default,
    aten.view.default,
    UNSAFE_VIEW,
    aten.reshape.default,
}
