"""Print what reductions and scans do with two elements: the region that combines them, on lanes or as statements.

    ^bb0(%a, %b): tt.reduce.return (arith.addf %a, %b)     -->   total + x
    ^bb0(%a, %b): scf.if ... tt.reduce.return %r           -->   float x_next = x; { if (...) ...; x_next = r; }

A region with branches, loops or assertions is printed as it stands, one element at a time.
"""

from .c_types import lanes_type
from .cells import Cell, constant_cell
from .evaluate import Evaluator
from .ir import Block, Op, Value
from .nest import Nest
from .spelling import spell

INFINITY = float("inf")
IDENTITY = {
    "arith.addf": 0.0, "arith.mulf": 1.0, "arith.maxnumf": -INFINITY, "arith.maximumf": -INFINITY,
    "arith.minnumf": INFINITY, "arith.minimumf": INFINITY, "arith.addi": 0, "arith.muli": 1, "arith.ori": 0,
    "arith.xori": 0, "arith.andi": -1, "arith.maxui": 0, "arith.minui": -1,
}  # fmt: skip


class Combiner:
    """The part of RootPrinter that combines elements, and keeps what is combined so far in accumulators."""

    def combining_op(self, block: Block) -> Op | None:
        """The one binary op of a reduction's region, where it is that simple."""
        if len(block.ops) != 2 or len(block.args) != 2:
            return None
        op, last = block.ops
        return op if last.operands == op.results and set(op.operands) == set(block.args) else None

    def identity(self, op: Op) -> int | float | bool | None:
        """What changes nothing when it is combined; None where that is not known."""
        single = self.combining_op(op.blocks[0])
        if single is None:
            return None
        element = single.result.type.element
        if element == "i1":
            return {"arith.ori": False, "arith.xori": False, "arith.andi": True}.get(single.name)
        bits = {"i8": 8, "i16": 16, "i32": 32, "i64": 64}.get(element, 0)
        if single.name == "arith.maxsi":
            return -(2 ** (bits - 1))
        if single.name == "arith.minsi":
            return 2 ** (bits - 1) - 1
        return IDENTITY.get(single.name)

    def combine(self, evaluator: Evaluator, block: Block, left: list[Cell], right: list[Cell]) -> list[Cell]:
        """Print a region's ops on cells (accumulators first)."""
        cells: dict[Value, Cell] = dict(zip(block.args, left + right, strict=True))

        def cell(value: Value) -> Cell:
            if value not in cells:
                if value.op is not None and value.op.name == "arith.constant":
                    return constant_cell(value.op)
                return self.kernel.scalar_cell(value)
            return cells[value]

        for inner in block.ops[:-1]:
            if inner.name != "arith.constant":
                cells[inner.result] = evaluator.elementwise(inner, [cell(operand) for operand in inner.operands])
        return [cell(operand) for operand in block.ops[-1].operands]

    def combined(
        self, evaluator: Evaluator, op: Op, left: list[Cell], right: list[Cell], first: str = "false"
    ) -> list[str]:
        """The combined values as expressions. first: C++ that holds where there is nothing on the left yet."""
        if needs_statements(op):
            return self.combined_by_statements(evaluator.nest, op, left, right, first)
        single = self.combining_op(op.blocks[0])
        width = evaluator.nest.width
        if single is not None:
            type_ = single.result.type
            return [spell(single, [left[0].text, evaluator.vector(right[0], type_)], width)]
        results = self.combine(evaluator, op.blocks[0], left, right)
        return [evaluator.vector(cell, operand.type) for cell, operand in zip(results, op.operands, strict=True)]

    def combined_by_statements(self, nest: Nest, op: Op, left: list[Cell], right: list[Cell], first: str) -> list[str]:
        """The region printed as it stands, for one element at a time. Returns the names of what it yields."""
        kernel, block = self.kernel, op.blocks[0]
        names = [nest.fresh(f"{operand.name}_next") for operand in op.operands]
        for name, operand, cell in zip(names, op.operands, right, strict=True):
            nest.add(nest.depth, f"{lanes_type(operand.type.element, 1)} {name} = {cell.text};")
        with kernel.lines_aside() as lines:
            kernel.emit(f"if (!({first})) {{")
            with kernel.braces():
                for arg, cell in zip(block.args, left + right, strict=True):
                    kernel.let(arg, cell.text)
                kernel.block(block)
                for name, value in zip(names, block.ops[-1].operands, strict=True):
                    kernel.emit(f"{name} = {kernel.text(value)};")
            kernel.emit("}")
        for line in lines:
            nest.add(nest.depth, line)
        return names

    def combine_into(self, op: Op, evaluator: Evaluator, total: list[str], more: list[str]) -> None:
        nest = evaluator.nest
        left = [Cell("vector", name, nest.depth) for name in total]
        right = [Cell("vector", name, nest.depth) for name in more]
        texts = self.combined(evaluator, op, left, right)
        temporaries = texts
        if len(texts) > 1:
            temporaries = [nest.let(nest.depth, "auto", name, text) for name, text in zip(total, texts, strict=True)]
        for name, text in zip(total, temporaries, strict=True):
            nest.add(nest.depth, f"{name} = {text};")

    # -- accumulators

    def declare_accumulators(self, op: Op, nest: Nest, copies: int, level: int, start: str | None) -> list[list[str]]:
        names = []
        for _ in range(copies):
            row = []
            for result in op.results:
                name = nest.fresh(result.name)
                kind = lanes_type(result.type.element, nest.width)
                text = start
                if start is not None and nest.width > 1:
                    text = f"splat<{kind}>({'-(int32_t)' if result.type.element == 'i1' else ''}{start})"
                nest.add(level, f"{kind} {name}{{}};" if text is None else f"{kind} {name} = {text};")
                row.append(name)
            names.append(row)
        return names

    def first_turn(self, nest: Nest, axis: int) -> str:
        index = nest.index(axis)
        return {"0": "true"}.get(index.text, "false") if index.text.isdigit() else f"{index.text} == 0"


def needs_statements(op: Op) -> bool:
    """Whether a reduction's or scan's region has branches, loops or assertions."""
    return any(inner.blocks or not inner.results for inner in op.blocks[0].ops[:-1])


def accumulated(nest: Nest, names: list[str]) -> list[Cell]:
    return [Cell("vector" if nest.width > 1 else "uniform", name, nest.depth) for name in names]
