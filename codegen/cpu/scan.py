"""Print scans: running combinations of the elements along an axis.

    total = first ? x : total + x; sums[i] = total;

Where lanes lie along the axis, each vector is scanned in itself first, in log2(lanes) steps.
"""

from .c_types import lanes_type
from .cells import Cell
from .combine import accumulated, needs_statements
from .evaluate import Evaluator
from .ir import Op


class ScanPrinter:
    """Scans of RootPrinter."""

    def scan(self, op: Op) -> None:
        """Running combinations along an axis. Where the lanes lie along it, each vector is scanned in itself first."""
        shape, axis = op.operands[0].type.shape, op.attrs["axis"]
        if shape[axis] == 1:
            for operand, result in zip(op.operands, op.results, strict=True):
                self.kernel.storage[result] = self.kernel.storage.get(operand) or self.materialize(operand)
            return
        vector_dim, width = self.vector_dim(shape, op.operands)
        along = vector_dim == axis
        if needs_statements(op) or (along and op.attrs["reverse"]):
            vector_dim, width, along = None, 1, False
        others = [d for d in range(len(shape)) if d not in (axis, vector_dim)]
        nest = self.nest(
            shape, vector_dim, width, others + [d for d in (vector_dim, axis) if d not in (None, axis)] + [axis]
        )
        if op.attrs["reverse"]:
            nest.reverse = axis
        targets = [self.kernel.array(result.type, result.name + "_a") for result in op.results]
        evaluator = Evaluator(self.kernel, nest)
        level = nest.level_of[axis] - 1
        copies = nest.chunks_per_turn if nest.vector_dim is not None and not along else 1
        names = self.declare_accumulators(op, nest, copies, level, None)

        def body(copy: int) -> None:
            at, mine = nest.indices(), names[0 if along else copy]
            cells = [evaluator.at(operand, at) for operand in op.operands]
            if along:
                cells = self.scan_lanes(op, evaluator, cells)
            totals = accumulated(nest, mine)
            first = self.first_turn(nest, axis) if along else f"{nest.index_name[axis]} == 0"
            texts = self.combined(evaluator, op, totals, cells, first)
            running = []
            for operand, cell, text in zip(op.operands, cells, texts, strict=True):
                choice = f"{first} ? {evaluator.vector(cell, operand.type)} : {text}"
                kind = lanes_type(operand.type.element, nest.width)
                running.append((kind, nest.let(nest.depth, kind, f"{op.result.name}_so_far", choice)))
            for (kind, name), total, target in zip(running, mine, targets, strict=True):
                nest.add(nest.depth, f"{total} = {f'splat<{kind}>({name}[{nest.width - 1}])' if along else name};")
                for line in evaluator.write(target, at, accumulated(nest, [name])[0]):
                    nest.add(nest.depth, line)

        self.finish(nest.render(body))
        for result, target in zip(op.results, targets, strict=True):
            self.kernel.storage[result] = target

    def scan_lanes(self, op: Op, evaluator: Evaluator, cells: list[Cell]) -> list[Cell]:
        """Combine every lane with all lanes before it, in log2(width) steps."""
        nest = evaluator.nest
        width, step = nest.width, 1
        types = [operand.type for operand in op.operands]
        while step < width:
            kinds = [lanes_type(type_.element, width) for type_ in types]
            now = [evaluator.vector(cell, type_) for cell, type_ in zip(cells, types, strict=True)]
            moved = [
                nest.let(nest.depth, kind, f"{op.result.name}_before", f"rotate<{width - step}>({text})")
                for kind, text in zip(kinds, now, strict=True)
            ]
            texts = self.combined(evaluator, op, [Cell("vector", name, nest.depth) for name in moved], cells)
            reached = f"iota<i32x{width}>() >= {step}"
            cells = [
                Cell(
                    "vector",
                    nest.let(nest.depth, kind, f"{op.result.name}_lanes", f"select(mask({reached}), {text}, {own})"),
                    nest.depth,
                )
                for kind, text, own in zip(kinds, texts, now, strict=True)
            ]
            step *= 2
        return cells
