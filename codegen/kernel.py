"""What a scheduled graph is made of: kernels, the buffers they touch, and the launches in order.

Sizes, strides, offsets and grids are sympy expressions over the graph's runtime sizes; nothing here is evaluated
before a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

TRITON_TYPES: dict[torch.dtype, str] = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
"""Dtypes that kernels may touch, as Triton's signatures spell them."""

TL_TYPES: dict[torch.dtype, str] = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
"""The same dtypes as Triton code spells them."""


ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Kernel:
    """One generated Triton kernel. Equal sources are one kernel, whichever layer they come from.

    source: text of the `@triton.jit` function. signature: parameter -> Triton type, in order. constants: values of
    its `tl.constexpr` parameters.
    """

    name: str
    source: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...] = ()

    @property
    def key(self) -> str:
        text = "\n".join((self.source, repr(self.signature), repr(self.constants)))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def symbol(self) -> str:
        """A name that is unique among kernels: the function's own and the head of its content hash."""
        return f"{self.name}_{self.key[:8]}"


@dataclass(frozen=True)
class Buffer:
    """Contiguous memory of a run.

    kind: "input", "weight", "state", "output", "temporary" (in the arena), "shared" (a kernel's result that an op
    without a kernel reads) or "fallback" (what such an op returns).
    """

    name: str
    elements: sympy.Expr
    dtype: torch.dtype
    kind: str

    @property
    def bytes(self) -> sympy.Expr:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies: element (i, j, ...) of it is `buffer[offset + i * strides[0] + j * strides[1] + ...]`."""

    buffer: Buffer
    offset: sympy.Expr
    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]

    @property
    def pointer(self) -> Pointer:
        return Pointer(self.buffer, self.offset)

    def element(self, index: tuple[sympy.Expr, ...]) -> sympy.Expr:
        """How far the element at `index` lies behind `pointer`."""
        return sum((a * b for a, b in zip(index, self.strides, strict=True)), ZERO)

    @property
    def is_contiguous(self) -> bool:
        return self.strides == contiguous_strides(self.sizes)


@dataclass(frozen=True)
class Packed:
    """A weight [N, K] packed in panels of `block` rows, [ceil(N / block), K, block]; see `weights.Pack`."""

    buffer: Buffer
    sizes: tuple[sympy.Expr, ...]
    block: int
    offset: sympy.Expr = ZERO

    @property
    def pointer(self) -> Pointer:
        return Pointer(self.buffer, self.offset)

    def element(self, index: tuple[sympy.Expr, ...]) -> sympy.Expr:
        row, column = index
        return FloorDiv(row, self.block) * (self.block * self.sizes[1]) + column * self.block + Mod(row, self.block)


@dataclass(frozen=True)
class PackedWords:
    """A plane of codes of `width` bits of a matrix [N, K], packed in words; see `packed_words.PackWords`.

    Its elements are bytes, of which a row has as many as the plane's: `place` says where a weight lies among them.
    """

    buffer: Buffer
    sizes: tuple[sympy.Expr, ...]
    width: int
    group: int
    block: int
    offset: sympy.Expr = ZERO

    @property
    def pointer(self) -> Pointer:
        return Pointer(self.buffer, self.offset)

    @property
    def words(self) -> int:
        """Words of a row in a step of `group` weights."""
        return self.group * self.width // 32

    @property
    def steps(self) -> int:
        """Groups of a row."""
        return -(-int(self.sizes[1]) // self.group)

    def place(self, k: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """The byte of a row that holds weight k, and its lowest bit there."""
        quad = FloorDiv(Mod(k, self.group), 4)
        byte = FloorDiv(k, self.group) * (4 * self.words) + Mod(quad, self.words) * 4 + Mod(k, 4)
        return (k, ZERO) if self.width == 8 else (byte, FloorDiv(quad, self.words) * self.width)

    def element(self, index: tuple[sympy.Expr, ...]) -> sympy.Expr:
        row, byte = index
        panel = FloorDiv(row, self.block) * (self.block * self.steps * self.words * 4)
        return panel + FloorDiv(byte, 4) * (4 * self.block) + Mod(row, self.block) * 4 + Mod(byte, 4)


@dataclass(frozen=True)
class Rounded:
    """An activation in memory as its readers take it.

    codes: int8 [M, K or more]; scales: fp32 [M, groups]; sums: fp32 [M, runs], each scale times the sum of the codes of
    `run` elements; None where no reader needs them.
    """

    codes: Layout
    scales: Layout
    sums: Layout | None
    run: int


@dataclass(frozen=True)
class Pointer:
    """An argument of a launch: the address of an element of a buffer."""

    buffer: Buffer
    offset: sympy.Expr = ZERO


@dataclass(frozen=True)
class Launch:
    """Run a kernel over a grid. nodes: the graph's nodes that it stands for. writes: the buffers that it writes to,
    for small kernels that may share a launch (see `horizontal`).
    """

    kernel: Kernel
    grid: tuple[sympy.Expr, ...]
    arguments: tuple[Pointer | sympy.Expr, ...]
    nodes: tuple[str, ...]
    writes: tuple[Buffer, ...] | None = None

    @property
    def launches(self) -> tuple[Launch, ...]:
        return (self,)

    def launches_of(self, one_row: bool) -> tuple[Launch, ...]:
        return (self,)

    @property
    def buffers(self) -> Iterator[Buffer]:
        return (argument.buffer for argument in self.arguments if isinstance(argument, Pointer))


@dataclass(frozen=True)
class Choice:
    """The first launch list whose condition on the runtime sizes holds; the last one's condition is true.

    The conditions bound the rows from above: the first holds for one row, the last for many.
    """

    cases: tuple[tuple[sympy.Basic, tuple[Launch, ...]], ...]

    def launches_of(self, one_row: bool) -> tuple[Launch, ...]:
        return self.cases[0 if one_row else -1][1]

    @property
    def launches(self) -> tuple[Launch, ...]:
        return tuple(launch for _, launches in self.cases for launch in launches)

    @property
    def buffers(self) -> Iterator[Buffer]:
        return (buffer for launch in self.launches for buffer in launch.buffers)


@dataclass(frozen=True)
class Fallback:
    """An op without a kernel: it runs through ATen, between two segments of launches."""

    node: fx.Node
    reason: str
    arguments: tuple[Layout, ...]
    results: tuple[Layout, ...]
    launches: tuple[Launch, ...] = ()

    def launches_of(self, one_row: bool) -> tuple[Launch, ...]:
        return ()

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node.name,)

    @property
    def buffers(self) -> Iterator[Buffer]:
        return (layout.buffer for layout in (*self.arguments, *self.results))


Step = Launch | Choice | Fallback


@dataclass
class Schedule:
    """A graph as kernels: what runs, in order, and over which memory."""

    name: str
    steps: list[Step] = field(default_factory=list)
    symbols: dict[sympy.Symbol, tuple[str, int]] = field(default_factory=dict)
    inputs: dict[str, Layout] = field(default_factory=dict)
    outputs: list[Layout] = field(default_factory=list)

    @property
    def kernels(self) -> list[Kernel]:
        """The distinct kernels, in order of first use."""
        return list(dict.fromkeys(launch.kernel for step in self.steps for launch in step.launches))

    def launch_count(self, one_row: bool) -> int:
        """How much is launched for one row, which is a token decoded, or for many."""
        return sum(len(step.launches_of(one_row)) for step in self.steps)

    @property
    def fallbacks(self) -> list[Fallback]:
        return [step for step in self.steps if isinstance(step, Fallback)]


def contiguous_strides(sizes: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, ...]:
    strides: list[sympy.Expr] = []
    step: sympy.Expr = sympy.Integer(1)
    for size in reversed(sizes):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))
