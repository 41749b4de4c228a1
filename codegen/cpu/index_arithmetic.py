"""Integers and pointers that are linear in the lane, and masks of the first lanes: kept symbolic while they can be.

row * n + column + lane      a ramp: contiguous memory
column + lane < n            a prefix: the first n - column lanes
"""

from dataclasses import replace

from .c_types import BYTES, scalar_type
from .cells import LARGE, Cell, Index, closed, number
from .ir import Op, Type
from .spelling import spell

LONG = 200  # characters of an expression that gets a name of its own
LINEAR = ("tt.addptr", "arith.addi", "arith.subi", "arith.muli", "arith.extsi", "arith.divsi", "arith.remsi")


class IndexArithmetic:
    """The part of Evaluator that needs no vectors of integers. Methods return None where they do not apply."""

    def symbolic(self, op: Op, at: tuple[Index, ...]) -> Cell | None:
        """The result of `op` without vectors, if it has such a form."""
        element = op.result.type.element
        if op.name in LINEAR and element != "i1":
            return self.integer(op, at)
        if op.name == "arith.cmpi":
            return self.compare(op, at)
        if op.name == "arith.andi" and element == "i1":
            return self.conjunction(op, at)
        if op.name in ("tt.bitcast", "tt.int_to_ptr", "tt.ptr_to_int"):
            return self.recast(op, at) if "ptr" in (element, op.operands[0].type.element) else None
        return None

    def range(self, op: Op, index: Index) -> Cell:
        start = int(op.attrs["start"])
        if index.number is not None:
            first = number(start + index.number)
            return replace(first, kind="ramp", stride=1, constant=None, level=index.level) if index.lanes else first
        text = f"{index.text} + {start}" if start else index.text
        divisor = min(index.divisor, (start & -start) or LARGE)
        kind, stride = ("ramp", 1) if index.lanes else ("uniform", 0)
        return Cell(kind, text, index.level, stride, None, divisor, start >= 0)

    def integer(self, op: Op, at: tuple[Index, ...]) -> Cell | None:
        cells = [self.at(operand, at) for operand in op.operands]
        if any(cell.kind == "vector" for cell in cells):
            return None
        level = max(cell.level for cell in cells)
        a = cells[0]
        if op.name == "arith.extsi":
            if op.operands[0].type.element == "i1":
                return None
            text = a.text if a.constant is not None else f"(int64_t)({a.text})"
            stride = a.stride if isinstance(a.stride, int) else f"(int64_t)({a.stride})"
            return replace(a, text=text, stride=stride)
        b = cells[1]
        ramps = [cell for cell in cells if cell.kind == "ramp"]
        element = op.result.type.element
        if op.name in ("arith.divsi", "arith.remsi"):
            return self.division(op, a, b, level)
        if a.constant is not None and b.constant is not None and not ramps and element != "ptr":
            value = {
                "arith.addi": a.constant + b.constant,
                "arith.subi": a.constant - b.constant,
                "arith.muli": a.constant * b.constant,
            }
            if abs(value[op.name]) < 2 ** (8 * min(BYTES[element], 4) - 1):
                return replace(number(value[op.name]), level=level)
        if op.name == "arith.muli":
            if len(ramps) == 2:
                return None
            text, stride = scale(a, b) if a.kind == "ramp" or not ramps else scale(b, a)
            divisor = min(a.divisor * b.divisor, LARGE)
        elif op.name == "arith.subi":
            text = f"{a.text} - {closed(b.text)}" if b.constant != 0 else a.text
            stride = combine(a.stride, b.stride, "-")
            divisor = min(a.divisor, b.divisor)
        else:
            text = (
                " + ".join(
                    cell.text for cell in cells if cell.constant != 0 or (cell.kind == "ramp" and cell.text != "0")
                )
                or "0"
            )
            stride = combine(a.stride, b.stride, "+")
            divisor = min(a.divisor, b.divisor)
        nonnegative = a.nonnegative and b.nonnegative and op.name != "arith.subi"
        kind = "ramp" if ramps and stride != 0 else "uniform"
        if element == "ptr":
            type_ = scalar_type(op.result.type.with_shape(()))
            if (at and level < self.nest.depth) or kind == "uniform":
                text = self.nest.let(level, type_, op.result.name, text)
            return Cell(kind, text, level, stride, None, divisor)
        if (not text.replace("_", "").isalnum() and kind == "uniform") or len(text) > LONG:
            text = self.nest.let(level, scalar_type(Type(element)), op.result.name, text)
        return Cell(kind, text, level, stride, None, divisor, nonnegative)

    def division(self, op: Op, a: Cell, b: Cell, level: int) -> Cell | None:
        """i // b and i % b of consecutive i: where no multiple of b falls inside the lanes, one scalar division."""
        if b.kind != "uniform":
            return None
        text = spell(op, [closed(a.text), closed(b.text)], 1)
        c_type = scalar_type(Type(op.result.type.element))
        if b.constant is not None and b.constant > 0:
            text = f"{closed(a.text)} {'/' if op.name == 'arith.divsi' else '%'} {b.text}"
        if a.kind == "uniform":
            nonnegative = a.nonnegative and b.nonnegative
            divisor = min(a.divisor, b.divisor) if op.name == "arith.remsi" else 1
            return self.named(level, c_type, op.result.name, text, nonnegative=nonnegative, divisor=divisor)
        width = self.nest.width
        if a.stride == 1 and a.nonnegative and b.nonnegative and a.divisor % width == 0 and b.divisor % width == 0:
            base = self.nest.let(level, c_type, op.result.name, text)
            if op.name == "arith.divsi":
                return Cell("uniform", base, level, nonnegative=True)
            return Cell("ramp", base, level, 1, None, width, True)
        return None

    def compare(self, op: Op, at: tuple[Index, ...]) -> Cell | None:
        """i < n for consecutive i: the mask of the first n - i lanes."""
        predicate = op.attrs["words"][0]
        a, b = (self.at(operand, at) for operand in op.operands)
        if predicate in ("sgt", "sge"):
            a, b = b, a
        if predicate not in ("slt", "sle", "sgt", "sge") or a.kind != "ramp" or a.stride != 1 or b.kind != "uniform":
            return None
        more = " + 1" if predicate in ("sle", "sge") else ""
        level = max(a.level, b.level)
        text = f"clip((int64_t){closed(b.text)} - {closed(a.text)}{more}, {self.nest.width})"
        return self.named(level, "int32_t", op.result.name, text, kind="prefix")

    def conjunction(self, op: Op, at: tuple[Index, ...]) -> Cell | None:
        a, b = (self.at(operand, at) for operand in op.operands)
        level = max(a.level, b.level)
        for one, other in ((a, b), (b, a)):
            if one.constant is True:
                return other.at_least(level)
            if one.constant is False:
                return one.at_least(level)
        if a.kind == "prefix" and b.kind == "prefix":
            return self.named(level, "int32_t", op.result.name, f"least({a.text}, {b.text})", kind="prefix")
        for one, other in ((a, b), (b, a)):
            if one.kind == "prefix" and other.kind == "uniform":
                return self.named(
                    level, "int32_t", op.result.name, f"{closed(other.text)} ? {one.text} : 0", kind="prefix"
                )
        return None

    def recast(self, op: Op, at: tuple[Index, ...]) -> Cell:
        cell = self.at(op.operands[0], at)
        if cell.kind == "uniform":
            return self.elementwise(op, [cell])
        if cell.kind == "ramp" and op.name == "tt.bitcast":
            return replace(cell, text=f"(({scalar_type(op.result.type.with_shape(()))})({cell.text}))")
        return (
            cell
            if cell.kind == "vector"
            else self.named(
                cell.level,
                f"i64x{self.nest.width}",
                op.result.name,
                self.vector(cell, op.operands[0].type),
                kind="vector",
            )
        )


def scale(ramp: Cell, factor: Cell) -> tuple[str, int | str]:
    text = (
        "0"
        if ramp.constant == 0 or factor.constant == 0 or (ramp.text == "0")
        else f"{closed(ramp.text)} * {closed(factor.text)}"
    )
    if factor.constant == 1:
        text = ramp.text
    if factor.constant is not None and isinstance(ramp.stride, int):
        return text, ramp.stride * factor.constant
    if ramp.stride == 0:
        return text, 0
    return text, factor.text if ramp.stride == 1 else f"{closed(str(ramp.stride))} * {closed(factor.text)}"


def combine(a: int | str, b: int | str, sign: str) -> int | str:
    if isinstance(a, int) and isinstance(b, int):
        return a + b if sign == "+" else a - b
    if b == 0:
        return a
    if a == 0 and sign == "+":
        return b
    return f"{closed(str(a))} {sign} {closed(str(b))}"
