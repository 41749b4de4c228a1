"""Print the expression of a tensor value at a point of a nest, down to loads, stored arrays and scalars."""

from dataclasses import dataclass, replace

from .affine import compare_conjunct, through_view
from .cells import LARGE, TRUE, ZERO, Cell, Index, number
from .ir import Op, Type, Value
from .nest import Nest
from .spelling import (
    HALF,
    is_elementwise,
    lanes_type,
    literal,
    parse_literal,
    pointee_type,
    scalar_type,
    spell,
    unsupported,
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


class Evaluator:
    """Evaluates values at points of one nest. `storage` holds the tensors that live in arrays."""

    def __init__(self, kernel, nest: Nest):
        self.kernel, self.nest = kernel, nest
        self.storage: dict[Value, Stored] = kernel.storage

    # -- cells as C++ text

    def vector(self, cell: Cell, type_: Type) -> str:
        """The cell as lanes of `type_` (as a scalar in a nest of width 1)."""
        width = self.nest.width
        kind = lanes_type(type_.element, width)
        if width == 1 or cell.kind == "vector":
            return cell.text
        if cell.kind == "prefix":
            return f"below<{kind}>({cell.text})"
        if type_.element == "ptr":
            size = f"sizeof({pointee_type(type_)})"
            stride = f"(int64_t){cell.stride if isinstance(cell.stride, int) else f'({cell.stride})'} * {size}"
            if cell.kind == "uniform":
                return f"splat<{kind}>((int64_t)({cell.text}))"
            return f"ramp<{kind}>((int64_t)({cell.text}), {stride})"
        if cell.kind == "uniform":
            if type_.element == "i1":
                return f"splat<{kind}>(-(int32_t)({cell.text}))"
            return f"splat<{kind}>({cell.text})"
        if cell.stride == 1:
            return (
                f"(splat<{kind}>({cell.text}) + iota<{kind}>())"
                if type_.element == "i32"
                else f"ramp<{kind}>({cell.text}, 1)"
            )
        return f"ramp<{kind}>({cell.text}, {cell.stride})"

    def named(self, level: int, type_: str, hint: str, text: str, **facts) -> Cell:
        return Cell(facts.pop("kind", "uniform"), self.nest.let(level, type_, hint, text), level, **facts)

    # -- evaluation

    def at(self, value: Value, at: tuple[Index, ...]) -> Cell:
        key = (value, at)
        if (cell := self.nest.recall(key)) is not None:
            return cell
        return self.nest.remember(key, self.compute(value, at))

    def compute(self, value: Value, at: tuple[Index, ...]) -> Cell:
        if value.type.element == "i1" and (level := self.known(value, at)) is not None:
            return TRUE.at_least(level)
        if value in self.storage:
            return self.read(self.storage[value], at, value)
        if not value.type.is_tensor:
            return self.kernel.scalar_cell(value)
        op = value.op
        if op is None:
            raise AssertionError(f"tensor argument {value} without storage")
        if op.name == "tt.splat":
            return self.at(op.operands[0], ())
        if op.name == "arith.constant":
            return constant_cell(op)
        if op.name == "tt.make_range":
            return self.range(op, at[0])
        if (inner := through_view(value, at)) is not None:
            source, indices = inner
            return self.at(source, tuple(ZERO if index is None else index for index in indices))
        if op.name == "tt.load":
            return self.load(op, at)
        if op.name in (
            "tt.addptr",
            "arith.addi",
            "arith.subi",
            "arith.muli",
            "arith.extsi",
            "arith.divsi",
            "arith.remsi",
        ):
            if (cell := self.integer(op, at)) is not None:
                return cell
        if op.name == "arith.cmpi":
            if (cell := self.compare(op, at)) is not None:
                return cell
        if op.name == "arith.andi" and value.type.element == "i1":
            if (cell := self.conjunction(op, at)) is not None:
                return cell
        if op.name in ("tt.bitcast", "tt.int_to_ptr", "tt.ptr_to_int") and "ptr" in (
            value.type.element,
            op.operands[0].type.element,
        ):
            return self.recast(op, at)
        if is_elementwise(op):
            return self.elementwise(op, [self.at(operand, at) for operand in op.operands])
        raise unsupported(op, "of a block is not supported")

    def known(self, value: Value, at: tuple[Index, ...]) -> int | None:
        """The level at which the nest's own bounds make a mask true; None if they do not."""
        facts = self.nest.facts
        if value in facts:
            return facts[value]
        if facts and value.op is not None and value.op.name == "arith.cmpi" and value.type.is_tensor:
            part = compare_conjunct(value, tuple(index.dim for index in at), self.kernel.analysis)
            return facts.get((part.dim, part.end))
        return None

    def elementwise(self, op: Op, cells: list[Cell]) -> Cell:
        level = max((cell.level for cell in cells), default=0)
        name = op.result.name
        if op.name == "arith.select" and cells[0].constant is not None:
            return (cells[1] if cells[0].constant else cells[2]).at_least(level)
        if all(cell.kind == "uniform" for cell in cells):
            text = spell(op, [cell.text for cell in cells], 1)
            return self.named(level, scalar_type(op.result.type.with_shape(())), name, text)
        if op.name == "tt.addptr":
            size = f"sizeof({pointee_type(op.result.type)})"
            wide = f"i64x{self.nest.width}"
            offset = self.vector(cells[1], op.operands[1].type)
            text = f"{self.vector(cells[0], op.operands[0].type)} + convert<{wide}>({offset}) * (int64_t){size}"
            return self.named(level, wide, name, text, kind="vector")
        args = [self.argument(op, k, cell) for k, cell in enumerate(cells)]
        text = spell(op, args, self.nest.width)
        return self.named(level, lanes_type(op.result.type.element, self.nest.width), name, text, kind="vector")

    def argument(self, op: Op, k: int, cell: Cell) -> str:
        """An operand of an elementwise op as text: scalars stay scalars where C++ splats them itself."""
        type_ = op.operands[k].type
        if cell.kind == "uniform":
            if op.name == "arith.select" and k == 0:
                return cell.text
            others_vector = any(other is not op.operands[k] for other in op.operands)
            plain = op.name in ("arith.addf", "arith.subf", "arith.mulf", "arith.divf") and type_.element in (
                "f32",
                "f16",
                "bf16",
                "f64",
            )
            if plain and others_vector:
                return cell.text
        text = self.vector(cell, type_)
        return text if text.isidentifier() or text.endswith(")") else f"({text})"

    # -- integers that are linear in the lane

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
            return replace(a, text=text)
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
            if abs(value[op.name]) < 2**31:
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
        if not text.replace("_", "").isalnum() and kind == "uniform":
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

    # -- memory

    def read(self, stored: Stored, at: tuple[Index, ...], value: Value) -> Cell:
        place, stride = element_place(stored, at)
        level = max((index.level for index in at), default=0)
        vector = lanes_type(stored.type.element, self.nest.width)
        hint = f"{value.name}_v"
        if stride == 0:
            type_ = scalar_type(stored.type.with_shape(()))
            cast = f"({type_})" if type_.endswith("*") else ""
            return self.named(level, type_, hint, f"{cast}{stored.array}[{place}]")
        if stored.type.element == "i1":
            whole = f"load<{vector}>({stored.array} + {place})" if stride == 1 else None
            text = (
                whole or f"load_strided<{vector}>({stored.array} + {place}, {stride}, {self.nest.width}, {vector}{{}})"
            )
            return self.named(level, vector, hint, f"-({text})", kind="vector")
        if stride == 1:
            return self.named(level, vector, hint, f"load<{vector}>({stored.array} + {place})", kind="vector")
        text = f"load_strided<{vector}>({stored.array} + {place}, {stride}, {self.nest.width}, {vector}{{}})"
        return self.named(level, vector, hint, text, kind="vector")

    def write(self, stored: Stored, at: tuple[Index, ...], cell: Cell) -> list[str]:
        """Statements that put a cell into an array. Vectors are written whole: arrays reach to the end of their rows."""
        place, stride = element_place(stored, at)
        type_ = stored.type
        if self.nest.width == 1 or stride == 0:
            cast = "(int64_t)" if type_.element == "ptr" else ""
            return [f"{stored.array}[{place}] = {cast}{closed(cell.text) if cast else cell.text};"]
        text = self.vector(cell, type_)
        if type_.element == "i1":
            text = f"{closed(text)} & 1"
        if stride == 1:
            return [f"store({stored.array} + {place}, {text});"]
        return [f"store_strided({stored.array} + {place}, {stride}, {text}, {self.nest.width});"]

    def load(self, op: Op, at: tuple[Index, ...]) -> Cell:
        pointer, masks = self.at(op.operands[0], at), None
        if len(op.operands) > 1:
            masks = self.at(op.operands[1], at)
        type_, width = op.result.type, self.nest.width
        element = type_.element
        vector = lanes_type(element, width)
        other = self.at(op.operands[2], at) if len(op.operands) > 2 else constant_zero(element)
        level = max(pointer.level, masks.level if masks else 0, other.level)
        mask_constant = masks.constant if masks else True
        if mask_constant is False:
            return other.at_least(level)
        if pointer.kind == "uniform" and (masks is None or masks.kind == "uniform") and other.kind == "uniform":
            text = from_memory(element, f"*{closed(pointer.text)}", 1)
            if mask_constant is not True:
                text = f"{closed(masks.text)} ? {text} : {other.text}"
            return self.named(level, scalar_type(type_.with_shape(())), op.result.name, text)
        guard = ""
        lanes = self.nest.lanes
        if masks is not None and mask_constant is not True:
            if masks.kind == "prefix":
                lanes = f"least({lanes}, {masks.text})" if lanes else masks.text
            elif masks.kind == "uniform":
                guard = f"{closed(masks.text)} ? {lanes or width} : 0"
                lanes = guard
            else:
                return self.gather(op, pointer, masks, other, level, lanes)
        if pointer.kind == "vector":
            return self.gather(op, pointer, None, other, level, lanes)
        other_text = self.vector(other, type_)
        half = f"_{element}" if element in HALF else ""
        if pointer.kind == "uniform":
            text = f"splat<{vector}>({from_memory(element, f'*{closed(pointer.text)}', 1)})"
            if lanes and masks is not None:
                text = f"{lanes_condition(lanes)} ? select(below<i32x{width}>({lanes}), {text}, {other_text}) : {other_text}"
        elif pointer.stride == 1:
            text = f"load{half}<{vector}>({pointer.text})"
            if lanes:
                text = f"load{half}_n<{vector}>({pointer.text}, {lanes}, {other_text})"
        else:
            text = f"load{half}_strided<{vector}>({pointer.text}, {pointer.stride}, {lanes or width}, {other_text})"
        if element == "i1":
            text = f"-({text} & 1)"
        return self.named(level, vector, op.result.name, text, kind="vector")

    def gather(self, op: Op, pointer: Cell, masks: Cell | None, other: Cell, level: int, lanes: str | None) -> Cell:
        type_, width = op.result.type, self.nest.width
        vector = lanes_type(type_.element, width)
        half = f"_{type_.element}" if type_.element in HALF else ""
        addresses = self.vector(pointer, op.operands[0].type)
        mask_text = self.vector(masks, Type("i1")) if masks else f"~i32x{width}{{}}"
        memory = "" if half else f", {pointee_type(op.operands[0].type)}"
        text = (
            f"gather{half}<{vector}{memory}>({addresses}, {mask_text}, {lanes or width}, {self.vector(other, type_)})"
        )
        if type_.element == "i1":
            text = f"-({text} & 1)"
        return self.named(level, vector, op.result.name, text, kind="vector")

    def store(self, pointer: Cell, value: Cell, masks: Cell | None, type_: Type) -> list[str]:
        """Statements that store `value` of `type_` through `pointer`, as far as mask and lanes of the body allow."""
        width, element = self.nest.width, type_.element
        if masks is not None and masks.constant is False:
            return []
        if masks is not None and masks.constant is True:
            masks = None
        if width == 1 or (
            pointer.kind == "uniform" and value.kind == "uniform" and (masks is None or masks.kind == "uniform")
        ):
            line = f"*{closed(pointer.text)} = {to_memory(element, value.text, 1)};"
            return [f"if ({masks.text}) {line}"] if masks else [line]
        text = to_memory(element, self.vector(value, type_), width)
        lanes = self.nest.lanes
        if masks is not None and masks.kind == "prefix":
            lanes = f"least({lanes}, {masks.text})" if lanes else masks.text
        if (masks is not None and masks.kind == "vector") or pointer.kind != "ramp":
            mask_text = self.vector(masks, Type("i1")) if masks else f"~i32x{width}{{}}"
            memory = pointee_type(Type("ptr", (), element))
            addresses = self.vector(pointer, Type("ptr", (), element))
            return [f"scatter<{memory}>({addresses}, {mask_text}, {lanes or width}, {text});"]
        if pointer.stride == 1:
            line = f"store_n({pointer.text}, {text}, {lanes});" if lanes else f"store({pointer.text}, {text});"
        else:
            line = f"store_strided({pointer.text}, {pointer.stride}, {text}, {lanes or width});"
        return [f"if ({masks.text}) {line}"] if masks is not None and masks.kind == "uniform" else [line]


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


def lanes_condition(lanes: str) -> str:
    return f"({lanes}) > 0"


def from_memory(element: str, text: str, width: int) -> str:
    if element in HALF:
        return f"from_{element}<{lanes_type(element, width)}>({text})"
    return f"({text} & 1) != 0" if element == "i1" and width == 1 else text


def to_memory(element: str, text: str, width: int) -> str:
    if element in HALF:
        return f"to_{element}({text})"
    return f"{closed(text)} & 1" if element == "i1" else text


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
