"""Print reductions: accumulators for the lanes or for the columns of a tile, combined at the end of their loop.

float8 total = 0; for (j ...) total = total + x[j];     -->   lanes folded by halves: total + rotate<4>(total), ...
"""

import math
from dataclasses import replace

from .c_types import lanes_type, literal
from .cells import Cell, Stored, closed
from .clip import TAIL_ADDS
from .combine import accumulated, needs_statements
from .evaluate import Evaluator
from .ir import Op, Value
from .nest import Nest
from .spelling import spell

CHAINS = 4  # independent accumulators, to hide the latency of an addition
CHEAP = 24  # bodies above this cost are not worth unrolling


class ReducePrinter:
    """Reductions of RootPrinter."""

    def reduce(self, op: Op) -> None:
        if self.sum_of_products(op):
            return
        shape, axis = op.operands[0].type.shape, op.attrs["axis"]
        tail, unread = self.tail_part(op), self.unread_parts(op.result) if len(op.results) == 1 else []
        if tail is None and not unread:
            shape = self.collapsed(shape, op.operands, apart=axis)
        vector_dim, width = self.vector_dim(shape, op.operands)
        if tail is not None:
            vector_dim, width = axis, self.width(shape, axis, op.operands)
        if needs_statements(op):
            vector_dim, width = None, 1
        others = [d for d in range(len(shape)) if d not in (axis, vector_dim)]
        along = vector_dim is None or vector_dim == axis
        order = [*others, axis] if along else [*others, vector_dim, axis]
        nest = self.nest(shape, vector_dim, width, order)
        if nest.depth == 0 or shape[axis] == 1:
            self.reduce_nothing(op)
            return
        identity = self.identity(op)
        parts = []
        if identity is not None and len(op.operands) == 1:
            parts = [part for part in self.neutral_parts(op.operands[0], identity) if part.dim == axis]
            parts += [tail] if tail is not None else []
        for part in unread:
            dim = part.dim + (part.dim >= axis)
            if dim != vector_dim:
                parts.append(replace(part, dim=dim))
        self.clip(nest, parts)
        results = [self.reduce_target(result) for result in op.results]
        evaluator = Evaluator(self.kernel, nest)
        whole = along and vector_dim is not None
        cheap = sum(self.plan.inline_cost(operand) for operand in op.operands) <= CHEAP
        chains = CHAINS if whole and cheap and identity is not None else 1
        if whole:
            chains = max(1, min(chains, shape[axis] // width))
        copies = nest.chunks_per_turn if not along and vector_dim is not None else chains
        level = nest.level_of[axis] - 1
        cut = any(part.dim == axis and part is not tail for part in parts)
        names = self.declare_accumulators(op, nest, copies, level, self.start(op, nest, identity, cut))
        past = None if tail is None else evaluator.past_the_mask(op.operands[0], nest.indices(), tail)

        def body(copy: int) -> None:
            at = nest.indices()
            cells = [evaluator.at(operand, at) for operand in op.operands]
            accumulators = accumulated(nest, names[copy % copies])
            first = self.first_turn(nest, axis)
            texts = self.combined(evaluator, op, accumulators, cells, first)
            if len(texts) > 1:  # one may be another's accumulator
                texts = [
                    nest.let(nest.depth, lanes_type(operand.type.element, width), f"{operand.name}_next", text)
                    for operand, text in zip(op.operands, texts, strict=True)
                ]
            for accumulator, text, cell, operand in zip(accumulators, texts, cells, op.operands, strict=True):
                if identity is None:
                    text = (
                        f"{first} ? {evaluator.vector(cell, operand.type)} : {text}"
                        if width == 1 or first == "true"
                        else (f"select({first}, {evaluator.vector(cell, operand.type)}, {text})")
                    )
                elif nest.lanes and whole:
                    text = f"select(below<i32x{width}>({nest.lanes}), {text}, {accumulator.text})"
                nest.add(nest.depth, f"{accumulator.text} = {text};")

        def after(at_level: int) -> list[str]:
            if at_level != level:
                return []
            if whole:
                return self.fold_lanes(op, evaluator, names, results) + self.add_tail(op, nest, results, past)
            return self.write_columns(nest, names, results)

        self.finish(nest.render(body, chains, after))
        for result, target in zip(op.results, results, strict=True):
            if isinstance(target, Stored):
                self.kernel.storage[result] = target

    def reduce_target(self, result: Value) -> Stored | str:
        if result.type.is_tensor:
            return self.kernel.array(result.type, result.name + "_a")
        self.kernel.emit(f"{lanes_type(result.type.element, 1)} {result.name};")
        return result.name

    def reduce_nothing(self, op: Op) -> None:
        """An axis of one element: the result is the operand."""
        for operand, result in zip(op.operands, op.results, strict=True):
            stored = self.kernel.storage.get(operand) or self.materialize(operand)
            axis = op.attrs["axis"]
            if result.type.is_tensor:
                strides = stored.strides[:axis] + stored.strides[axis + 1 :]
                self.kernel.storage[result] = Stored(stored.array, result.type, strides, stored.offset)
            else:
                self.kernel.let(result, f"{stored.array}[{stored.offset}]")

    def start(self, op: Op, nest: Nest, identity: int | float | bool | None, cut: bool) -> str | None:
        """C++ of what accumulators start with. The maximum of numbers drops NaN, yet of nothing but NaN it is NaN: it
        starts with that, unless the loop is `cut` short by a mask past which the identity stands."""
        if identity is None:
            return None
        element, axis = op.results[0].type.element, op.attrs["axis"]
        text = literal(identity, element)
        single, extent = self.combining_op(op.blocks[0]), nest.extents[axis]
        if single is None or single.name not in ("arith.maxnumf", "arith.minnumf") or (cut and extent.number == 0):
            return text
        nan = literal(math.nan, element)
        return f"({extent.text} < {nest.shape[axis]} ? {text} : {nan})" if cut else nan

    def fold_lanes(self, op: Op, evaluator: Evaluator, names: list[list[str]], results: list) -> list[str]:
        """Combine the chains, then the lanes, then write the result."""
        nest = evaluator.nest

        def fold(_copy: int) -> None:
            total = names[0]
            for more in names[1:]:
                self.combine_into(op, evaluator, total, more)
            step = nest.width // 2
            while step:
                rotated = []
                for name, operand in zip(total, op.operands, strict=True):
                    kind = lanes_type(operand.type.element, nest.width)
                    rotated.append(nest.let(nest.depth, kind, f"{name}_{step}", f"rotate<{step}>({name})"))
                self.combine_into(op, evaluator, total, rotated)
                step //= 2
            for name, target, operand in zip(total, results, op.operands, strict=True):
                text = f"{name}[0]" + (" != 0" if operand.type.element == "i1" else "")
                nest.add(nest.depth, f"{self.reduced_place(nest, target, op.attrs['axis'])} = {text};")

        return nest.body_lines(fold)

    def add_tail(self, op: Op, nest: Nest, results: list, past: Cell | None) -> list[str]:
        """Combine a result with the equal terms past the end of the loop."""
        if past is None:
            return []
        axis, single = op.attrs["axis"], self.combining_op(op.blocks[0])
        place, extent = self.reduced_place(nest, results[0], axis), nest.extents[axis]
        rest = past.text
        if single.name in TAIL_ADDS:
            kind = lanes_type(op.operands[0].type.element, 1)
            rest = f"{closed(rest)} * ({kind})({extent.size} - {extent.text})"
        return [f"if ({extent.text} < {extent.size}) {place} = {spell(single, [place, closed(rest)], 1)};"]

    def reduced_place(self, nest: Nest, target: Stored | str, axis: int) -> str:
        if isinstance(target, str):
            return target
        indices = [nest.index(d) for d in range(len(nest.shape)) if d != axis]
        terms = [
            i.text if s == 1 else f"{i.text} * {s}"
            for i, s in zip(indices, target.strides, strict=True)
            if i.text != "0"
        ]
        return f"{target.array}[{' + '.join(terms) or '0'}]"

    def write_columns(self, nest: Nest, names: list[list[str]], results: list) -> list[str]:
        """Write accumulators that hold one result per lane (or, in a nest of width 1, one result)."""
        axis = next(d for d in nest.order if nest.level_of[d] == nest.depth)
        lines = []
        for copy, row in enumerate(names):
            for name, target in zip(row, results, strict=True):
                if nest.vector_dim is None:
                    lines.append(f"{self.reduced_place(nest, target, axis)} = {name};")
                    continue
                offset = copy * nest.width
                only = nest.chunks_per_turn * nest.width >= nest.shape[nest.vector_dim]
                place = self.reduced_place(nest, target, axis)
                index = nest.index_name[nest.vector_dim]
                text = place[place.index("[") + 1 : -1].split(" + ")
                stride = target.strides[nest.vector_dim - (1 if axis < nest.vector_dim else 0)]
                mine = index if stride == 1 else f"{index} * {stride}"
                others = [term for term in text if term != mine] + ([] if only else [mine])
                spot = " + ".join([target.array, *[t for t in others if t != "0"], str(offset * stride)])
                value = f"-{name}" if target.type.element == "i1" else name
                line = (
                    f"store({spot}, {value});"
                    if stride == 1
                    else f"store_strided({spot}, {stride}, {value}, {nest.width});"
                )
                lines.append(line)
        return lines
