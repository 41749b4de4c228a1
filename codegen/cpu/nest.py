"""A loop nest over one tile: which loops there are, what stands at each level, and the C++ text.

Statements go to the outermost loop whose indices they use. The innermost loop runs along `vector_dim`, `width` elements
at a time; where the trip count is ragged its body is printed again for the last few lanes, and where the dimension is
short it is unrolled, so that small arrays indexed by constants stay in registers.

    for (int32_t i = 0; i < rows; ++i) {       level 1
      for (int32_t j = 0; j < columns; j += 16) {    level 2: one Body for full vectors, one for the rest
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .cells import LARGE, ZERO, Cell, Index
from .ir import Value

INDEX_NAMES = "ijklmnopqrstuvwxyzabcdefgh"
UNROLL = 8  # vectors of a short dimension that are printed one by one
PrintBody = Callable[[int], None]


@dataclass
class Extent:
    """How far a dimension goes: `text` elements of `size`; `number` where known; `divisor` a power of two in it."""

    size: int
    text: str = ""
    number: int | None = None
    divisor: int = 1

    @staticmethod
    def whole(size: int) -> "Extent":
        return Extent(size, str(size), size, size & -size)


@dataclass
class Body:
    """One copy of the innermost level. `lanes`: C text of how many lanes count, None for all."""

    lanes: str | None = None
    chunk: str = ""
    lines: list[str] = field(default_factory=list)
    cells: dict[tuple, Cell] = field(default_factory=dict)


class Nest:
    """The loops over a tile of `shape`, outermost first as `order` says. `names` are taken names of the function."""

    def __init__(self, shape: tuple[int, ...], order: list[int], vector_dim: int | None, width: int, names: set[str]):
        self.shape, self.width, self.names = shape, width, names
        self.vector_dim = vector_dim if width > 1 else None
        self.extents = [Extent.whole(size) for size in shape]
        self.order = [d for d in order if shape[d] > 1]
        self.level_of = {d: k + 1 for k, d in enumerate(self.order)}
        self.depth = len(self.order)
        self.taken: set[str] = set()
        self.index_name = {d: self.fresh(INDEX_NAMES[d]) for d in self.order}
        self.levels: list[list[str]] = [[] for _ in range(self.depth + 1)]
        self.cells: dict[tuple, Cell] = {}
        self.body: Body | None = None
        self.reverse: int | None = None  # a dimension whose loop counts down the indices
        self.row_step = 1  # how far the innermost loop goes in a turn, where it is not along the vector dimension
        self.facts: dict[Value | tuple[int, str], int] = {}  # scalars, and `index[dim] < end`, known to hold at a level

    # -- names and statements

    def fresh(self, name: str) -> str:
        unique, count = name, 1
        while unique in self.taken or unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.taken.add(unique)
        return unique

    @property
    def lanes(self) -> str | None:
        return self.body.lanes if self.body else None

    def add(self, level: int, line: str) -> None:
        if level >= self.depth and self.body is not None:
            self.body.lines.append(line)
        else:
            self.levels[level].append(line)

    def let(self, level: int, type_: str, hint: str, expression: str) -> str:
        """Name `expression` at `level`; returns the name."""
        name = self.fresh(hint)
        self.add(
            level, f"{type_}{name} = {expression};" if type_.endswith("*") else f"const {type_} {name} = {expression};"
        )
        return name

    def remember(self, key: tuple, cell: Cell) -> Cell:
        cells = self.body.cells if cell.level >= self.depth and self.body is not None else self.cells
        cells[key] = cell
        return cell

    def recall(self, key: tuple) -> Cell | None:
        if self.body is not None and key in self.body.cells:
            return self.body.cells[key]
        return self.cells.get(key)

    # -- indices

    def index(self, dim: int | None) -> Index:
        if dim is None or self.shape[dim] == 1:
            return ZERO
        level = self.level_of[dim]
        if dim == self.vector_dim:
            text = (self.body.chunk if self.body else "") or self.index_name[dim]
            return Index(text, level, True, (int(text) & -int(text)) or LARGE if text.isdigit() else self.width, dim)
        name = self.index_name[dim]
        return Index(f"({self.shape[dim] - 1} - {name})" if dim == self.reverse else name, level, False, 1, dim)

    def indices(self) -> tuple[Index, ...]:
        return tuple(self.index(d) for d in range(len(self.shape)))

    # -- printing

    def render(
        self, print_body: PrintBody, copies: int = 1, after: Callable[[int], list[str]] | None = None
    ) -> list[str]:
        """All lines of the nest. print_body(copy) prints one copy of the innermost level with `add`; the vector loop
        takes `copies` of them a turn. `after` gives lines that follow the loops inside level k."""
        if not self.depth:
            return self.levels[0] + self.body_lines(print_body) + (after(0) if after else [])
        last = self.order[-1]
        if last == self.vector_dim:
            inner = self.render_vector_loop(print_body, copies)
        elif self.vector_dim is not None:
            inner = self.render_columns(print_body)
        else:
            inner = self.loop(last, self.body_lines(print_body))
        for level in range(self.depth - 1, 0, -1):
            body = self.levels[level] + inner + (after(level) if after else [])
            dim = self.order[level - 1]
            step = self.width * self.chunks_per_turn if dim == self.vector_dim else 1
            inner = [*body] if dim == self.vector_dim and step >= self.shape[dim] else self.loop(dim, body, step)
        return self.levels[0] + inner + (after(0) if after else [])

    def loop(self, dim: int, body: list[str], step: int = 1) -> list[str]:
        name = self.index_name[dim]
        forward = f"++{name}" if step == 1 else f"{name} += {step}"
        return [f"for (int32_t {name} = 0; {name} < {self.extents[dim].text}; {forward}) {{", *indented(body), "}"]

    def body_lines(self, print_body: PrintBody, lanes: str | None = None, chunks: list[str] | None = None) -> list[str]:
        self.body = Body(lanes)
        for copy, chunk in enumerate(chunks or [""]):
            self.body.chunk = chunk
            print_body(copy)
        lines, self.body = self.body.lines, None
        return lines

    @property
    def chunks_per_turn(self) -> int:
        """In a nest whose vector dimension is not innermost: how many vectors stand side by side in the body."""
        return min(UNROLL, self.shape[self.vector_dim] // self.width)

    def render_columns(self, print_body: PrintBody) -> list[str]:
        """The innermost loop is not the vector dimension's: several vectors side by side in its body."""
        name = self.index_name[self.vector_dim]
        only = self.chunks_per_turn * self.width >= self.shape[self.vector_dim]
        chunks = [str(k * self.width) if only else f"({name} + {k * self.width})" for k in range(self.chunks_per_turn)]
        return self.loop(self.order[-1], self.body_lines(print_body, None, chunks), self.row_step)

    def render_vector_loop(self, print_body: PrintBody, copies: int) -> list[str]:
        dim, width = self.vector_dim, self.width
        name, extent = self.index_name[dim], self.extents[dim]
        others = math.prod(self.shape) // self.shape[dim]
        if extent.number == extent.size <= UNROLL * width and (others == 1 or extent.size == width):
            return self.body_lines(print_body, None, [str(k) for k in range(0, extent.size, width)])
        divisor = extent.number & -extent.number if extent.number else extent.divisor
        steps = [copies * width] if copies > 1 and (extent.number is None or extent.number >= copies * width) else []
        if not steps or divisor % (copies * width) != 0:
            steps.append(width)
        if extent.number is not None and extent.number < width:
            steps = []
        lines = [f"int32_t {name} = 0;"]
        for step in steps:
            chunks = [f"({name} + {k})" if k else name for k in range(0, step, width)]
            body = self.body_lines(print_body, None, chunks)
            lines += [f"for (; {name} + {step} <= {extent.text}; {name} += {step}) {{", *indented(body), "}"]
        if divisor % width != 0 or not steps:
            lanes = self.fresh("lanes")
            rest = self.body_lines(print_body, lanes)
            lines += [
                f"if ({name} < {extent.text}) {{",
                f"  const int32_t {lanes} = {extent.text} - {name};",
                *indented(rest),
                "}",
            ]
        return lines


def indented(lines: list[str]) -> list[str]:
    return ["  " + line for line in lines]
