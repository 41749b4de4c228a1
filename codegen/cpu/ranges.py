"""Which values an integer may have: the least and the largest, as signed numbers of its type.

w & 15              0 .. 15
w >> 4 (unsigned)   0 .. 15     where w is 8 bits wide
extsi(w) + 1        -127 .. 128
"""

from .c_types import parse_literal
from .ir import Op, Value
from .plan import VIEWS

Range = tuple[int, int]
BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64}
DEPTH = 16  # of an expression that is looked into


def value_range(value: Value, depth: int = DEPTH) -> Range:
    """Bounds of every element of an integer value."""
    bits = BITS[value.type.element]
    everything = (-(1 << bits - 1), (1 << bits - 1) - 1)
    if value.op is None or depth == 0:
        return everything
    found = op_range(value.op, bits, depth - 1)
    fits = found is not None and everything[0] <= found[0] and found[1] <= everything[1]
    return found if fits else everything


def op_range(op: Op, bits: int, depth: int) -> Range | None:
    """What an op's result may be if it does not overflow; None where that is not known."""
    if op.name in VIEWS or op.name == "tt.reshape":
        return value_range(op.operands[0], depth)
    if op.name == "arith.constant":
        number = int(parse_literal(op.attrs["value"], op.result.type.element))
        return number, number
    if op.name == "tt.make_range":
        return int(op.attrs["start"]), int(op.attrs["end"]) - 1
    if op.name in ("arith.extsi", "arith.extui", "arith.trunci"):
        low, high = value_range(op.operands[0], depth)
        return (0, 2 ** BITS[op.operands[0].type.element] - 1) if op.name == "arith.extui" and low < 0 else (low, high)
    if op.name not in INTERVALS:
        return None
    operands = op.operands[1:] if op.name == "arith.select" else op.operands
    return INTERVALS[op.name](bits, *(value_range(operand, depth) for operand in operands))


def both(_bits: int, a: Range, b: Range) -> Range:
    return min(a[0], b[0]), max(a[1], b[1])


def bitwise_and(_bits: int, a: Range, b: Range) -> Range | None:
    above = [high for low, high in (a, b) if low >= 0]
    return (0, min(above)) if above else None


def bitwise_or(_bits: int, a: Range, b: Range) -> Range | None:
    return (0, (1 << max(a[1], b[1]).bit_length()) - 1) if min(a[0], b[0]) >= 0 else None


def product(_bits: int, a: Range, b: Range) -> Range:
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


def shift_right(_bits: int, a: Range, b: Range) -> Range | None:
    return (a[0] >> b[0], a[1] >> b[0]) if b[0] == b[1] and b[0] >= 0 else None


def shift_right_unsigned(bits: int, a: Range, b: Range) -> Range | None:
    if a[0] < 0:
        a = (0, (1 << bits) - 1)
    return shift_right(bits, a, b)


def set_bits(value: Value, depth: int = DEPTH) -> int:
    """The bits that may be set in some element of an integer value, as a mask of its width."""
    width = BITS[value.type.element]
    everything = (1 << width) - 1
    op = value.op
    if op is None or depth == 0:
        return everything
    if op.name in VIEWS or op.name == "tt.reshape":
        return set_bits(op.operands[0], depth - 1)
    if op.name == "arith.constant":
        return int(parse_literal(op.attrs["value"], value.type.element)) & everything
    if op.name in ("arith.andi", "arith.ori"):
        left, right = (set_bits(operand, depth - 1) for operand in op.operands)
        return left & right if op.name == "arith.andi" else left | right
    if op.name in ("arith.shli", "arith.shrui"):
        low, high = value_range(op.operands[1], depth - 1)
        if low == high and 0 <= low < width:
            bits = set_bits(op.operands[0], depth - 1)
            return (bits << low if op.name == "arith.shli" else bits >> low) & everything
    return everything


def largest_byte(words: Value) -> int:
    """What each byte of an int32 value is at most, from 0 up; 255 where one may have its highest bit set."""
    largest = max(set_bits(words).to_bytes(4, "little"))
    return largest if largest < 128 else 255


INTERVALS = {
    "arith.addi": lambda _, a, b: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda _, a, b: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": product,
    "arith.andi": bitwise_and,
    "arith.ori": bitwise_or,
    "arith.xori": bitwise_or,
    "arith.shrsi": shift_right,
    "arith.shrui": shift_right_unsigned,
    "arith.minsi": lambda _, a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "arith.maxsi": lambda _, a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "arith.select": both,
}
