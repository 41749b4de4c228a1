"""Print the expression of a tensor value at a point of a nest, down to loads, stored arrays and scalars."""

from .affine import Conjunct, compare_conjunct, through_view
from .c_types import lanes_type, pointee_type, scalar_type
from .cells import FALSE, TRUE, ZERO, Cell, Index, Stored, constant_cell, constant_zero
from .index_arithmetic import IndexArithmetic
from .ir import Op, Type, Value, unsupported
from .memory import MemoryAccess
from .nest import Nest
from .plan import is_lazy
from .spelling import is_elementwise, spell


class Evaluator(MemoryAccess, IndexArithmetic):
    """Evaluates values at points of one nest. `storage` holds the tensors that live in arrays."""

    def __init__(self, kernel, nest: Nest):
        self.kernel, self.nest = kernel, nest
        self.storage: dict[Value, Stored] = kernel.storage
        self.outside: tuple[Index, str] | None = None  # an index past the end of a mask along its dimension, that end

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

    def past_the_mask(self, value: Value, at: tuple[Index, ...], part: Conjunct) -> Cell:
        """`value` where `part`, a mask along one dimension, does not hold; all elements there are known to be equal."""
        beyond = Index("0", 0, False, dim=part.dim)
        self.outside = (beyond, part.end)
        cell = self.at(value, tuple(beyond if index.dim == part.dim else index for index in at))
        self.outside = None
        return cell

    def compute(self, value: Value, at: tuple[Index, ...]) -> Cell:
        past = self.outside is not None and self.outside[0] in at
        if past and self.is_the_mask(value, at):
            return FALSE
        if not past and value.type.element == "i1" and (level := self.known(value, at)) is not None:
            return TRUE.at_least(level)
        if value in self.storage and not (past and value.op is not None and is_lazy(value.op)):
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
        if op.name == "ub.poison":
            return constant_zero(value.type.element)
        if (inner := through_view(value, at)) is not None:
            source, indices = inner
            return self.at(source, tuple(ZERO if index is None else index for index in indices))
        if op.name == "tt.load":
            return self.load(op, at)
        if (cell := self.symbolic(op, at)) is not None:
            return cell
        if is_elementwise(op):
            return self.elementwise(op, [self.at(operand, at) for operand in op.operands])
        raise unsupported(op, "of a block is not supported")

    def is_the_mask(self, value: Value, at: tuple[Index, ...]) -> bool:
        if value.op is None or value.op.name != "arith.cmpi" or not value.type.is_tensor:
            return False
        part = compare_conjunct(value, tuple(index.dim for index in at), self.kernel.analysis)
        return part.dim is not None and (part.dim, part.end) == (self.outside[0].dim, self.outside[1])

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
