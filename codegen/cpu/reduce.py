"""Print reductions and scans."""

import math
from dataclasses import replace

from .c_types import lanes_type, literal
from .cells import Cell, Stored, closed, constant_cell
from .clip import TAIL_ADDS
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
CHAINS = 4  # independent accumulators, to hide the latency of an addition
CHEAP = 24  # bodies above this cost are not worth unrolling


class ReducePrinter:
    """Reductions and scans of RootPrinter."""

    # -- combining

    def combiner(self, block: Block) -> Op | None:
        """The one binary op of a reduction's region, where it is that simple."""
        if (
            len(block.ops) == 2
            and block.ops[1].operands == block.ops[0].results
            and set(block.ops[0].operands) == set(block.args)
        ):
            return block.ops[0] if len(block.args) == 2 else None
        return None

    def identity(self, op: Op) -> int | float | bool | None:
        single = self.combiner(op.blocks[0])
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
        if has_control_flow(op):
            return self.combined_by_statements(evaluator.nest, op, left, right, first)
        single = self.combiner(op.blocks[0])
        width = evaluator.nest.width
        if single is not None:
            type_ = single.result.type
            return [spell(single, [left[0].text, evaluator.vector(right[0], type_)], width)]
        results = self.combine(evaluator, op.blocks[0], left, right)
        return [evaluator.vector(cell, operand.type) for cell, operand in zip(results, op.operands, strict=True)]

    def combined_by_statements(self, nest: Nest, op: Op, left: list[Cell], right: list[Cell], first: str) -> list[str]:
        """A region with branches or loops, printed as it stands: one element at a time. Returns what it yields."""
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

    # -- reductions

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
        if has_control_flow(op):
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
        single, extent = self.combiner(op.blocks[0]), nest.extents[axis]
        if single is None or single.name not in ("arith.maxnumf", "arith.minnumf") or (cut and extent.number == 0):
            return text
        nan = literal(math.nan, element)
        return f"({extent.text} < {nest.shape[axis]} ? {text} : {nan})" if cut else nan

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
        axis, single = op.attrs["axis"], self.combiner(op.blocks[0])
        place, extent = self.reduced_place(nest, results[0], axis), nest.extents[axis]
        rest = past.text
        if single.name in TAIL_ADDS:
            kind = lanes_type(op.operands[0].type.element, 1)
            rest = f"{closed(rest)} * ({kind})({extent.size} - {extent.text})"
        return [f"if ({extent.text} < {extent.size}) {place} = {spell(single, [place, closed(rest)], 1)};"]

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

    # -- scans

    def scan(self, op: Op) -> None:
        """Running combinations along an axis. Where the lanes lie along it, each vector is scanned in itself first."""
        shape, axis = op.operands[0].type.shape, op.attrs["axis"]
        if shape[axis] == 1:
            for operand, result in zip(op.operands, op.results, strict=True):
                self.kernel.storage[result] = self.kernel.storage.get(operand) or self.materialize(operand)
            return
        vector_dim, width = self.vector_dim(shape, op.operands)
        along = vector_dim == axis
        if has_control_flow(op) or (along and op.attrs["reverse"]):
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


def has_control_flow(op: Op) -> bool:
    """Whether a reduction's or scan's region has branches or loops."""
    return any(inner.blocks for inner in op.blocks[0].ops)


def accumulated(nest: Nest, names: list[str]) -> list[Cell]:
    return [Cell("vector" if nest.width > 1 else "uniform", name, nest.depth) for name in names]
