"""A tensor value at one point of a loop nest: one element, or `width` neighbours along the nest's vector dimension."""

from dataclasses import dataclass, replace

LARGE = 1 << 30


@dataclass(frozen=True)
class Index:
    """Where the nest stands in one dimension of a value: C text of the (first) index. `level`: the loop that sets it."""

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
