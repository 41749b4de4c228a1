"""Print sums of products of bytes with instructions that multiply and add pairs of them.

    tl.sum(w[:, :].to(tl.int32) * x[:, None].to(tl.int32), axis=0)         rows k and k + 1 are a pair
    tl.sum(low * even[:, None] + high * odd[:, None], axis=0)              the terms of a row are

One factor of each product varies along the columns of the tile and is a byte, plus a constant; the other is the same in
a row. The ranges of both decide: where sums of pairs fit into 16 bits for some rows, they are kept in 16 bits as long.
All other sums wrap around like those of int32 that they stand for.
"""

from dataclasses import dataclass
from dataclasses import replace as with_changes
from pathlib import Path

from .affine import Map, conjuncts, through_view
from .c_types import parse_literal
from .cells import ZERO, Index, Stored, element_place
from .evaluate import Evaluator
from .ir import Op, Type, Value
from .nest import Nest
from .plan import is_lazy
from .ranges import Range, value_range

HELPERS = Path(__file__).with_name("pair_sums.h").read_text()
IN_BYTES = frozenset(  # what a byte may be computed with, beside loads, arrays and views
    ["arith.andi", "arith.ori", "arith.xori", "arith.addi", "arith.subi", "arith.shrui", "arith.shrsi", "arith.shli"]
)
LEAST_ROWS = 4  # that sums of 16 bits must hold for, to be worth widening them


@dataclass(frozen=True)
class Factor:
    """sign or zero extension of `value`, within `range`, plus a constant. `at`: how the tile indexes it."""

    value: Value
    at: Map
    signed: bool
    range: Range
    constant: int

    @property
    def scalar(self) -> str:
        return "int8_t" if self.signed else "uint8_t"


@dataclass(frozen=True)
class Product:
    """A column's byte times a row's."""

    column: Factor
    row: Factor

    @property
    def bound(self) -> int:
        """Of its magnitude, with the column's byte as a number from 0 up."""
        low, high = self.row.range
        return (self.column.range[1] - self.column.range[0]) * max(-low, high)


class ProductPrinter:
    """Sums of products of RootPrinter."""

    def sum_of_products(self, op: Op) -> bool:
        """Print a reduction as such a sum; False if it is none."""
        shape, axis = op.operands[0].type.shape, op.attrs["axis"]
        single = self.combining_op(op.blocks[0]) if len(op.operands) == 1 else None
        if single is None or single.name != "arith.addi" or single.result.type.element != "i32":
            return False
        others = [d for d in range(len(shape)) if d != axis]
        if self.kernel.lanes < 8 or shape[axis] == 1 or not others or shape[others[-1]] < 32:
            return False
        products = self.products(op.operands[0], tuple(range(len(shape))), others[-1])
        if not products:
            return False
        nest = self.nest(shape, others[-1], min(self.kernel.lanes * 4, shape[others[-1]]), [*others, axis])
        PairSums(self, op, nest, axis, products).print()
        return True

    def products(self, value: Value, at: Map, vector_dim: int) -> list[Product] | None:
        """The products that `value` is the sum of; None if it is another kind of value."""
        op = value.op
        if op is None or not is_lazy(op) or value in self.kernel.storage:
            return None
        if op.name == "arith.addi":
            left, right = (self.products(operand, at, vector_dim) for operand in op.operands)
            return left + right if left and right else None
        if op.name != "arith.muli":
            return None
        factors = [self.factor(operand, at) for operand in op.operands]
        if None in factors:
            return None
        factors.sort(key=lambda factor: vector_dim not in factor.at)
        column, row = factors
        if vector_dim not in column.at or vector_dim in row.at or row.constant:
            return None
        return [Product(column, row)] if self.in_bytes(column.value, column.at, vector_dim) else None

    def factor(self, value: Value, at: Map) -> Factor | None:
        """The byte that an int32 is made of."""
        constant = 0
        while value.op is not None and value not in self.kernel.storage:
            op = value.op
            if op.name in ("arith.extsi", "arith.extui"):
                inner, signed = op.operands[0], op.name == "arith.extsi"
                if inner.type.element != "i8":
                    return None
                low, high = value_range(inner)
                return Factor(inner, at, signed, (low, high) if signed or low >= 0 else (0, 255), constant)
            if op.name in ("arith.addi", "arith.subi") and (added := constant_of(op.operands[1])) is not None:
                constant += added if op.name == "arith.addi" else -added
                value = op.operands[0]
            elif op.name == "tt.splat":
                value, at = op.operands[0], ()
            elif (inner := through_view(value, at)) is not None:
                value, at = inner
            else:
                return None
        return None

    def in_bytes(self, value: Value, at: Map, vector_dim: int) -> bool:
        """Whether a tensor of bytes can be computed in vectors of them: neighbours in memory, no mask between them."""
        op = value.op
        if not value.type.is_tensor:
            return True
        if value in self.kernel.storage:
            strides = zip(at, self.kernel.storage[value].strides, strict=True)
            return all(dim != vector_dim or stride == 1 for dim, stride in strides)
        if value.type.element != "i8" or op is None or not is_lazy(op):
            return False
        if op.name in ("tt.splat", "arith.constant"):
            return True
        if op.name == "tt.load":
            form = self.analysis.of(op.operands[0], at)
            parts = conjuncts(op.operands[1], at, self.analysis) if len(op.operands) > 1 else []
            in_row = all(part.uniform or part.dim not in (None, vector_dim) for part in parts)
            return form is not None and form.coefficient(vector_dim) in (0, 1) and in_row
        if (inner := through_view(value, at)) is not None:
            return self.in_bytes(*inner, vector_dim)
        return op.name in IN_BYTES and all(self.in_bytes(operand, at, vector_dim) for operand in op.operands)


class PairSums:
    """The nest of one sum: for each turn of the innermost loop, over rows, pairs of products of every column."""

    def __init__(self, roots: ProductPrinter, op: Op, nest: Nest, axis: int, products: list[Product]):
        self.roots, self.op, self.nest, self.axis, self.products = roots, op, nest, axis, products
        self.evaluator = Evaluator(roots.kernel, nest)
        self.in_row = len(products) % 2 == 0
        nest.row_step = 1 if self.in_row else 2
        self.pairs = len(products) // 2 if self.in_row else len(products)  # in a turn
        self.narrow_turns = 32767 // max(1, 2 * self.pairs * max(product.bound for product in products))
        signed = all(product.row.range[0] >= -128 and product.row.range[1] <= 127 for product in products)
        self.narrow = signed and self.narrow_turns * nest.row_step >= LEAST_ROWS
        kind = "BytePairs" if self.narrow else "ShortPairs"
        name = op.result.name
        self.sums = [nest.fresh(f"{name}_sums") for _ in range(nest.chunks_per_turn)]
        self.places = [""] * len(self.sums)
        self.level = nest.level_of[axis] - 1
        for sums in self.sums:
            nest.add(self.level, f"pairs::{kind}<{nest.width}> {sums};")
        self.more = nest.fresh(f"{name}_more") if any(map(self.shift, products)) else "0"
        if self.more != "0":
            nest.add(self.level, f"int32_t {self.more} = 0;")

    def print(self) -> None:
        roots = self.roots
        roots.kernel.helpers[HELPERS] = None
        self.target: Stored = roots.reduce_target(self.op.result)
        roots.finish(self.nest.render(self.body, 1, self.after))
        roots.kernel.storage[self.op.result] = self.target

    def offset(self, product: Product) -> int:
        """What is subtracted from the column's bytes to bring them into the instruction's range."""
        low, high = product.column.range
        return low if self.narrow else 0 if low >= -128 and high <= 127 else 128

    def shift(self, product: Product) -> int:
        """What the column's bytes are too small by, times the row's."""
        return self.offset(product) + product.column.constant

    def body(self, copy: int) -> None:
        nest, evaluator = self.nest, self.evaluator
        at = nest.indices()
        following = tuple(
            with_changes(index, text=f"({index.text} + 1)") if index.dim == self.axis else index for index in at
        )
        points = [(product, place) for product in self.products for place in ([at] if self.in_row else [at, following])]
        self.places[copy] = element_place(self.target, at[: self.axis] + at[self.axis + 1 :])[0]
        for first, second in zip(points[::2], points[1::2], strict=True):
            columns = [self.column(*first), self.column(*second)]
            rows = [
                f"({product.row.scalar}){evaluator.at(product.row.value, taken(place, product.row.at)).text}"
                for product, place in (first, second)
            ]
            nest.add(nest.depth, f"{self.sums[copy]}.add({', '.join([*columns, *rows])});")
            if self.more != "0" and copy == 0:
                shifts = [self.shift(product) for product, _ in (first, second)]
                nest.add(nest.depth, f"{self.more} += {shifts[0]} * {rows[0]} + {shifts[1]} * {rows[1]};")
        if copy == len(self.sums) - 1:
            self.widen()

    def column(self, product: Product, place: tuple[Index, ...]) -> str:
        """A vector of the column's bytes."""
        cell = self.evaluator.at(product.column.value, taken(place, product.column.at))
        text = self.evaluator.vector(cell, Type("i8"))
        offset = self.offset(product)
        return f"{text} - splat<i8x{self.nest.width}>((int8_t){offset})" if offset else text

    def widen(self) -> None:
        """Empty sums of 16 bits before they may overflow."""
        nest = self.nest
        turns = 1 << (self.narrow_turns.bit_length() - 1) if self.narrow else 0
        if self.narrow and turns < nest.shape[self.axis] // nest.row_step:
            index = nest.index_name[self.axis]
            calls = " ".join(f"{sums}.widen();" for sums in self.sums)
            nest.add(nest.depth, f"if ((({index} + {nest.row_step}) & {turns * nest.row_step - 1}) == 0) {{ {calls} }}")

    def after(self, level: int) -> list[str]:
        if level != self.level:
            return []
        array = self.target.array
        return [
            f"{sums}.store_to({array} + {place}, {self.more});"
            for sums, place in zip(self.sums, self.places, strict=True)
        ]


def taken(place: tuple[Index, ...], at: Map) -> tuple[Index, ...]:
    """The indices of a value that the tile indexes as `at`."""
    return tuple(ZERO if dim is None else place[dim] for dim in at)


def constant_of(value: Value) -> int | None:
    """The number that a constant, or a tensor of one, is."""
    while value.op is not None and value.op.name in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
        value = value.op.operands[0]
    if value.op is None or value.op.name != "arith.constant":
        return None
    return int(parse_literal(value.op.attrs["value"], value.type.element))
