"""Sums of a dot that a loop only adds to what it carries, scaled or not: they are used while they are in registers.

    for ...:                                               for ...:
        d = dot(a, w, 0)                                       multiply_words(a, w, [](i, j, d) {
        acc = acc + d * s[None, :]            -->                acc[i, j] = acc[i, j] + d * s[j]
                                                               })
The dot moves down to the loop's end, where the carried value changes.
"""

from dataclasses import dataclass

from .affine import Map
from .cells import Cell
from .dot import HELPERS, clipped, operands_of_words
from .evaluate import Evaluator
from .ir import Op, Value
from .nest import Body, Nest, indented
from .plan import is_lazy
from .products import constant_of
from .ranges import largest_byte


@dataclass(frozen=True)
class Finish:
    """`total`, carried as `carried`, is yielded as `yielded`, which reads the sums of `dot` once, each at its place."""

    dot: Op
    carried: Value
    yielded: Value
    total: Value


class FinishPrinter:
    """The part of RootPrinter that prints such dots, at the yields of their loops."""

    def puts_off(self, op: Op) -> bool:
        """Whether a dot, of words, is printed where its loop yields."""
        finish = self.finish_of(op)
        if finish is not None:
            self.finishes[finish.yielded] = finish
        return finish is not None

    def finish_of(self, op: Op) -> Finish | None:
        loop = op.parent.parent if op.parent is not None else None
        columns = op.result.type.shape[1]
        if loop is None or loop.name != "scf.for" or columns % self.kernel.lanes or constant_of(op.operands[2]) != 0:
            return None
        yielding = op.parent.ops[-1]
        if self.plan.consumers(op.result) != [yielding] or any(
            op.position < write.position <= loop.end for write in self.plan.writes
        ):
            return None
        carried, values = op.parent.args[1:], yielding.operands
        tensors = [(arg, value) for arg, value in zip(carried, values, strict=True) if value.type.is_tensor]
        readers = [(arg, value) for arg, value in tensors if self.maps_of(value, op.result)]
        identity: Map = (0, 1)
        if len(readers) != 1 or self.maps_of(readers[0][1], op.result) != {identity}:
            return None
        arg, value = readers[0]
        alone = not any(
            self.maps_of(other_value, arg) or self.maps_of(value, other)
            for other, other_value in tensors
            if other is not arg
        )
        if not alone or value in self.plan.stored or not is_lazy(value.op) or self.maps_of(value, arg) != {identity}:
            return None
        if self.plan.consumers(arg) != [yielding] or values.count(value) > 1:
            return None
        return Finish(op, arg, value, loop.results[carried.index(arg)])

    def finish_dots(self, targets: list[Value], values: list[Value]) -> tuple[list[Value], list[Value]]:
        """Print the dots that were put off to this yield; what else it assigns is returned."""
        rest = []
        for target, value in zip(targets, values, strict=True):
            if value in self.finishes:
                self.print_finish(self.finishes[value])
            else:
                rest.append((target, value))
        return [target for target, _ in rest], [value for _, value in rest]

    def print_finish(self, finish: Finish) -> None:
        a, words, _ = finish.dot.operands
        (m, n), k = finish.dot.result.type.shape, a.type.shape[1]
        left, limits = self.dot_operand(a, (0, 2))
        right = self.words_operand(words)
        nest = Nest((m, n), [1, 0], 1, self.kernel.lanes, self.kernel.names)
        ends = limits.get(0, [])
        cut = all(self.unread(finish.total, 0, end, 0) for end in ends)
        nest.facts |= {(0, end): nest.depth for end in ends if cut and m > 1}
        rows, depth = (clipped(limits.get(dim, []), size) or str(size) for dim, size in ((0, m), (2, k)))
        call = f"dot::multiply_words<{self.kernel.lanes}, {m}, {n}, {k}, {largest_byte(words)}>"
        lines = self.columns(finish, nest)
        lines.append(f"{call}({operands_of_words(left, right)}, {rows}, {depth}, dot::finished_by(columns));")
        if not cut:
            lines.append(f"dot::finish_zeros<{self.kernel.lanes}, {m}, {n}>({rows}, columns);")
        self.kernel.helpers[HELPERS] = None
        self.finish(lines)

    def columns(self, finish: Finish, nest: Nest) -> list[str]:
        """A C++ lambda of a first column, which returns one of a row and its sums: that one updates the carried value.

        It has copies of all that it reads, and pointers to arrays: the compiler knows that no store changes those.
        """
        stored, evaluator = self.kernel.storage[finish.carried], Evaluator(self.kernel, nest)
        nest.body = Body()
        at = nest.indices()
        nest.remember((finish.dot.result, at), Cell("vector", "sums", nest.depth))
        cell = evaluator.at(finish.yielded, at)
        for line in evaluator.write(stored, at, cell):
            nest.add(nest.depth, line)
        body, nest.body = nest.body.lines, None
        identity: Map = (0, 1)
        arrays = {self.kernel.storage[read].array for read, _ in self.reads(finish.yielded, identity)
                  if read in self.kernel.storage}  # fmt: skip
        captures = ", ".join(["=", *(f"{array} = &{array}[0]" for array in sorted(arrays | {stored.array}))])
        row = nest.index_name.get(0, "")
        return [
            *nest.levels[0],
            f"const auto columns = [{captures}](int64_t {nest.index_name[1]}) {{",
            *(indented(nest.levels[1]) if nest.depth > 1 else []),
            f"  return [=](int64_t {row}, i32x{nest.width} sums) {{",
            *indented(indented(body)),
            "  };",
            "};",
        ]
