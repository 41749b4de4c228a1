"""Lazy weights: a parameter of a graph is a recipe over the tensors of a source, evaluated once by the loader.

    Pack(Concat((Read("q"), Read("k"), Read("v")), dim=0), block=64)    # a merged and packed QKV projection

A recipe is a frozen tree: passes extend it, nothing is read until `evaluate.py` evaluates it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Shape = tuple[int, ...]


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that can be read one at a time: a GGUF file, a folder of safetensors, a module in memory."""

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor:
        """The tensor `name`; it may share storage with the source, so it is not to be written to."""
        ...


class Weight:
    """A recipe for one tensor. Equal recipes are equal, hash alike and have equal keys."""

    shape: Shape
    dtype: torch.dtype

    @property
    def inputs(self) -> tuple[Weight, ...]:
        """The recipes that this one is made of, in order."""
        return ()

    def key(self) -> str:
        """Stable text of the whole recipe, the same in every process: fit for cache keys and dumps."""
        raise NotImplementedError

    def names(self) -> tuple[str, ...]:
        """The source tensors that the recipe reads, each once, in order of first use."""
        return tuple(dict.fromkeys(name for weight in self.inputs for name in weight.names()))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __repr__(self) -> str:
        return self.key()


@dataclass(frozen=True, repr=False)
class Read(Weight):
    """A tensor of the source, as it is."""

    name: str
    shape: Shape
    dtype: torch.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))

    def key(self) -> str:
        return f"read({json.dumps(self.name)}, {type_text(self)})"

    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True, repr=False)
class Constant(Weight):
    """A tensor held by the recipe itself; identified by its content. Make one with `Constant.of(tensor)`."""

    digest: str
    shape: Shape
    dtype: torch.dtype
    tensor: Tensor = field(compare=False)

    @classmethod
    def of(cls, tensor: Tensor) -> Constant:
        tensor = tensor.detach().contiguous().cpu()
        content = tensor.reshape(-1).view(torch.uint8).numpy()
        return cls(hashlib.sha256(content).hexdigest(), tuple(tensor.shape), tensor.dtype, tensor)

    def key(self) -> str:
        return f"constant({self.digest[:32]}, {type_text(self)})"


@dataclass(frozen=True, repr=False)
class Cast(Weight):
    """`source` in another dtype, rounded to nearest even."""

    source: Weight
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def inputs(self) -> tuple[Weight, ...]:
        return (self.source,)

    def key(self) -> str:
        return f"cast({self.source.key()}, {_text(self.dtype)})"


class _SameDtype(Weight):
    """A recipe that moves the elements of `source` without changing them."""

    source: Weight

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def inputs(self) -> tuple[Weight, ...]:
        return (self.source,)


@dataclass(frozen=True, repr=False)
class Reshape(_SameDtype):
    """`source` in row-major order under another shape (all sizes given)."""

    source: Weight
    shape: Shape

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if math.prod(self.shape) != self.source.numel:
            raise ValueError(f"cannot reshape {list(self.source.shape)} to {list(self.shape)}")

    def key(self) -> str:
        return f"reshape({self.source.key()}, {_text(self.shape)})"


@dataclass(frozen=True, repr=False)
class Transpose(_SameDtype):
    """`source` with its dimensions in the order `dims` (torch.permute)."""

    source: Weight
    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        rank = len(self.source.shape)
        object.__setattr__(self, "dims", tuple(dim % rank for dim in self.dims))
        if sorted(self.dims) != list(range(rank)):
            raise ValueError(f"expected a permutation of {rank} dimensions, found {list(self.dims)}")

    @property
    def shape(self) -> Shape:
        return tuple(self.source.shape[dim] for dim in self.dims)

    def key(self) -> str:
        return f"transpose({self.source.key()}, {_text(self.dims)})"


@dataclass(frozen=True, repr=False)
class Slice(_SameDtype):
    """`source[start:stop]` along dimension `dim`."""

    source: Weight
    dim: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", self.dim % len(self.source.shape))
        if not 0 <= self.start <= self.stop <= self.source.shape[self.dim]:
            raise ValueError(f"cannot slice {self.start}:{self.stop} of {list(self.source.shape)} along {self.dim}")

    @property
    def shape(self) -> Shape:
        sizes = list(self.source.shape)
        sizes[self.dim] = self.stop - self.start
        return tuple(sizes)

    def key(self) -> str:
        return f"slice({self.source.key()}, dim={self.dim}, {self.start}:{self.stop})"


@dataclass(frozen=True, repr=False)
class Concat(Weight):
    """The `sources` one after another along dimension `dim`; all of one dtype and equal in the other sizes."""

    sources: tuple[Weight, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise ValueError("expected at least one weight to concatenate, found none")
        first = self.sources[0]
        object.__setattr__(self, "dim", self.dim % len(first.shape))
        for source in self.sources:
            others = [_without(weight.shape, self.dim) for weight in (first, source)]
            if others[0] != others[1] or len(source.shape) != len(first.shape) or source.dtype != first.dtype:
                found = ", ".join(type_text(weight) for weight in self.sources)
                raise ValueError(f"expected equal dtypes and shapes besides dimension {self.dim}, found {found}")

    @property
    def shape(self) -> Shape:
        sizes = list(self.sources[0].shape)
        sizes[self.dim] = sum(source.shape[self.dim] for source in self.sources)
        return tuple(sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    @property
    def inputs(self) -> tuple[Weight, ...]:
        return self.sources

    def key(self) -> str:
        return f"concat({', '.join(source.key() for source in self.sources)}, dim={self.dim})"


class _Elementwise(Weight):
    """Two weights of one dtype combined element by element, with broadcasting."""

    left: Weight
    right: Weight

    def __post_init__(self) -> None:
        if self.left.dtype != self.right.dtype:
            raise ValueError(f"expected equal dtypes, found {_text(self.left.dtype)} and {_text(self.right.dtype)}")
        torch.broadcast_shapes(self.left.shape, self.right.shape)

    @property
    def shape(self) -> Shape:
        return tuple(torch.broadcast_shapes(self.left.shape, self.right.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def inputs(self) -> tuple[Weight, ...]:
        return (self.left, self.right)


@dataclass(frozen=True, repr=False)
class Add(_Elementwise):
    """`left + right`: an offset that the source keeps in the weight (Gemma's norms), or one that a pass folds in."""

    left: Weight
    right: Weight

    def key(self) -> str:
        return f"add({self.left.key()}, {self.right.key()})"


@dataclass(frozen=True, repr=False)
class Multiply(_Elementwise):
    """`left * right`: a scale folded into a weight."""

    left: Weight
    right: Weight

    def key(self) -> str:
        return f"multiply({self.left.key()}, {self.right.key()})"


@dataclass(frozen=True, repr=False)
class Call(Weight):
    """What an ATen op makes of weights and plain values; evaluated with all of its inputs at once.

    op: as `torch.ops` spells it, "aten.linalg_vector_norm.default". args: in the order of its schema, recipes among
    them.
    """

    op: str
    args: tuple[Any, ...]
    shape: Shape
    dtype: torch.dtype

    @property
    def inputs(self) -> tuple[Weight, ...]:
        return tuple(argument for argument in self.args if isinstance(argument, Weight))

    def key(self) -> str:
        return f"call({self.op}, {', '.join(map(repr, self.args))})"


@dataclass(frozen=True, repr=False)
class Pack(_SameDtype):
    """Panels for the linear kernels: [N, K] --> [ceil(N / block), K, block], the rows beyond N zero.

    packed[p, k, i] == source[p * block + i, k]
    """

    source: Weight
    block: int

    def __post_init__(self) -> None:
        if len(self.source.shape) != 2 or self.block < 1:
            raise ValueError(
                f"expected a matrix and a block of at least 1, found {_text(self.source.shape)}, {self.block}"
            )

    @property
    def shape(self) -> Shape:
        rows, columns = self.source.shape
        return (-(-rows // self.block), columns, self.block)

    def key(self) -> str:
        return f"pack({self.source.key()}, {self.block})"


def read(source: TensorSource, name: str) -> Read:
    """The recipe that reads `name` as `source` has it."""
    return Read(name, source.shape(name), source.dtype(name))


def transposed(source: Weight, dims: tuple[int, ...]) -> Weight:
    """`source` permuted; two permutations that undo each other vanish."""
    if isinstance(source, Transpose):
        source, dims = source.source, tuple(source.dims[dim] for dim in dims)
    return source if dims == tuple(range(len(dims))) else Transpose(source, dims)


def substitute(weight: Weight, recipes: Mapping[str, Weight]) -> Weight:
    """`weight` with each Read of a name in `recipes` replaced by that recipe."""
    if isinstance(weight, Read):
        return recipes.get(weight.name, weight)
    changes: dict[str, Weight | tuple[Weight, ...]] = {}
    for field_ in fields(weight):
        value = getattr(weight, field_.name)
        if isinstance(value, Weight):
            changes[field_.name] = substitute(value, recipes)
        elif isinstance(value, tuple) and any(isinstance(part, Weight) for part in value):
            changes[field_.name] = tuple(substitute(x, recipes) if isinstance(x, Weight) else x for x in value)
    return replace(weight, **changes) if changes else weight


def type_text(value: Weight | Tensor) -> str:
    """Dtype and shape: `float32[10, 6]`."""
    return _text(value.dtype) + _text(tuple(value.shape))


def _text(value: torch.dtype | Sequence[int]) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return f"[{', '.join(map(str, value))}]"


def _without(shape: Shape, dim: int) -> Shape:
    return shape[:dim] + shape[dim + 1 :]
