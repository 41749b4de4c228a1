"""A tensor value at one point of a loop nest: one element, or `width` neighbours along the nest's vector dimension."""

from dataclasses import dataclass, replace

from .c_types import literal, parse_literal
from .ir import Op, Type

LARGE = 1 << 30


@dataclass(frozen=True)
class Index:
    """Where the nest stands in one dimension of a value: C text of the first index; `level` is the loop setting it."""

    text: str
    level: int = 0
    lanes: bool = False  # index, index + 1, ... one per lane
    divisor: int = LARGE  # a power of two that divides it
    dim: int | None = None  # the nest's dimension

    @property
    def number(self) -> int | None:
        return int(self.text) if self.text.isdigit() else None


ZERO = Index("0")


@dataclass(frozen=True)
class Cell:
    """A value at a point. `level` is the innermost loop that it depends on.

    uniform: `text` is a scalar, the same in every lane
    ramp:    text + stride * lane (integers and pointers; counts elements)
    vector:  `text` is a vector of lanes
    prefix:  a mask that holds in the first `text` lanes, 0 <= text <= width
    """

    kind: str
    text: str
    level: int = 0
    stride: int | str = 0
    constant: int | float | bool | None = None
    divisor: int = 1
    nonnegative: bool = False

    def at_least(self, level: int) -> "Cell":
        return self if self.level >= level else replace(self, level=level)


def number(value: int) -> Cell:
    text = str(value) if abs(value) < 2**31 else f"INT64_C({value})"
    return Cell("uniform", text, 0, 0, value, (value & -value) or LARGE, value >= 0)


TRUE = Cell("uniform", "true", constant=True)
FALSE = Cell("uniform", "false", constant=False)


def constant_cell(op: Op) -> Cell:
    element = op.result.type.element
    value = parse_literal(op.attrs["value"], element)
    if element.startswith("i") and element != "i1":
        return number(value)
    return Cell("uniform", literal(value, element), constant=value)


def constant_zero(element: str) -> Cell:
    if element.startswith("i") and element != "i1":
        return number(0)
    return Cell(
        "uniform", literal(0.0 if element != "i1" else False, element), constant=0.0 if element != "i1" else False
    )


@dataclass
class Stored:
    """A tensor in a local array: element (i, j, ...) is array[offset + i * strides[0] + ...]."""

    array: str
    type: Type
    strides: tuple[int, ...]
    offset: int = 0


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def element_place(stored: Stored, at: tuple[Index, ...]) -> tuple[str, int]:
    """C text of an element's place in its array, and how far apart the lanes' elements are."""
    offset, stride, terms = stored.offset, 0, []
    for index, step in zip(at, stored.strides, strict=True):
        if index.number is not None:
            offset += index.number * step
        else:
            terms.append(index.text if step == 1 else f"{index.text} * {step}")
        if index.lanes:
            stride = step
    if offset or not terms:
        terms.append(str(offset))
    return " + ".join(terms), stride


def closed(text: str) -> str:
    simple = text.replace("_", "").isalnum() or (text.startswith("(") and text.endswith(")") and text.count("(") == 1)
    return text if simple else f"({text})"
