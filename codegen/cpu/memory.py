"""Print loads, gathers and stores of lanes, and reads and writes of local arrays. Masked-off lanes touch no memory."""

from .c_types import SMALL_FLOATS, lanes_type, pointee_type, scalar_type
from .cells import Cell, Index, Stored, closed, constant_zero, element_place
from .ir import Op, Type, Value


class MemoryAccess:
    """The part of Evaluator that goes to memory."""

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
        """Statements that put a cell into an array. Vectors are written whole: rows of arrays are multiples of them."""
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
        small = f"_{element}" if element in SMALL_FLOATS else ""
        if pointer.kind == "uniform":
            text = f"splat<{vector}>({from_memory(element, f'*{closed(pointer.text)}', 1)})"
            if lanes and masks is not None:
                below = f"select(below<i32x{width}>({lanes}), {text}, {other_text})"
                text = f"{lanes_condition(lanes)} ? {below} : {other_text}"
        elif pointer.stride == 1:
            text = f"load{small}<{vector}>({pointer.text})"
            if lanes:
                text = f"load{small}_n<{vector}>({pointer.text}, {lanes}, {other_text})"
        else:
            text = f"load{small}_strided<{vector}>({pointer.text}, {pointer.stride}, {lanes or width}, {other_text})"
        if element == "i1":
            text = f"-({text} & 1)"
        return self.named(level, vector, op.result.name, text, kind="vector")

    def gather(self, op: Op, pointer: Cell, masks: Cell | None, other: Cell, level: int, lanes: str | None) -> Cell:
        type_, width = op.result.type, self.nest.width
        vector = lanes_type(type_.element, width)
        small = f"_{type_.element}" if type_.element in SMALL_FLOATS else ""
        mask_text = self.vector(masks, Type("i1")) if masks else f"~i32x{width}{{}}"
        rest = f"{mask_text}, {lanes or width}, {self.vector(other, type_)}"
        if pointer.kind == "ramp" and pointer.stride == 1:
            text = f"load{small}_where<{vector}>({pointer.text}, {rest})"
        else:
            memory = "" if small else f", {pointee_type(op.operands[0].type)}"
            text = f"gather{small}<{vector}{memory}>({self.vector(pointer, op.operands[0].type)}, {rest})"
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
            line = f"*{closed(pointer.text)} = {to_memory(element, value.text)};"
            return [f"if ({masks.text}) {line}"] if masks else [line]
        text = to_memory(element, self.vector(value, type_))
        lanes = self.nest.lanes
        if masks is not None and masks.kind == "prefix":
            lanes = f"least({lanes}, {masks.text})" if lanes else masks.text
        if (masks is not None and masks.kind == "vector") or pointer.kind != "ramp":
            mask_text = self.vector(masks, Type("i1")) if masks else f"~i32x{width}{{}}"
            if pointer.kind == "ramp" and pointer.stride == 1:
                return [f"store_where({pointer.text}, {mask_text}, {lanes or width}, {text});"]
            memory = pointee_type(Type("ptr", (), element))
            addresses = self.vector(pointer, Type("ptr", (), element))
            return [f"scatter<{memory}>({addresses}, {mask_text}, {lanes or width}, {text});"]
        if pointer.stride == 1:
            line = f"store_n({pointer.text}, {text}, {lanes});" if lanes else f"store({pointer.text}, {text});"
        else:
            line = f"store_strided({pointer.text}, {pointer.stride}, {text}, {lanes or width});"
        return [f"if ({masks.text}) {line}"] if masks is not None and masks.kind == "uniform" else [line]


def lanes_condition(lanes: str) -> str:
    return f"({lanes}) > 0"


def from_memory(element: str, text: str, width: int) -> str:
    if element in SMALL_FLOATS:
        return f"from_{element}<{lanes_type(element, width)}>({text})"
    return f"({text} & 1) != 0" if element == "i1" and width == 1 else text


def to_memory(element: str, text: str) -> str:
    if element in SMALL_FLOATS:
        return f"to_{element}({text})"
    return f"{closed(text)} & 1" if element == "i1" else text
