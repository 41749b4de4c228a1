"""Print what tensors are computed for: stores, arrays, reductions, dots; each as one loop nest."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from .affine import Affine, Conjunct, Map, conjuncts, step, through_view
from .atomics import AtomicPrinter
from .c_types import BYTES
from .cells import Stored, closed, row_major
from .check import CheckPrinter
from .clip import Clipper
from .collapse import Collapser
from .dots import DotPrinter
from .elementwise import MapPrinter
from .evaluate import Evaluator
from .ir import Op, Type, Value
from .nest import Nest, indented
from .plan import is_lazy
from .products import ProductPrinter
from .reduce import ReducePrinter
from .report import ReportPrinter
from .versions import Versioner


class RootPrinter(
    AtomicPrinter,
    ReducePrinter,
    ProductPrinter,
    DotPrinter,
    ReportPrinter,
    MapPrinter,
    Clipper,
    Collapser,
    CheckPrinter,
    Versioner,
):
    """Prints roots of one kernel through `kernel.emit`."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.plan, self.analysis = kernel.plan, kernel.analysis
        self.tails: dict[Op, Conjunct | None] = {}

    # -- what a value reads

    def reads(self, value: Value, at: Map) -> Iterator[tuple[Value, Map]]:
        """Loads and stored tensors printed with `value`, and how the tile indexes them."""
        seen: set[tuple[Value, Map]] = set()

        def visit(inner: Value, at: Map) -> Iterator[tuple[Value, Map]]:
            if (inner, at) in seen or not inner.type.is_tensor:
                return
            seen.add((inner, at))
            if inner in self.kernel.storage or inner.op.name == "tt.load":
                yield inner, at
                if inner in self.kernel.storage:
                    return
            if (source := through_view(inner, at)) is not None:
                yield from visit(*source)
            elif is_lazy(inner.op) and inner.op.name != "tt.splat":
                for operand in inner.op.operands:
                    yield from visit(operand, at)

        yield from visit(value, at)

    def vector_dim(
        self, shape: tuple[int, ...], values: list[Value], pointer: Value | None = None
    ) -> tuple[int | None, int]:
        """The dimension along which most memory is contiguous, and how many lanes to take of it."""
        identity = tuple(range(len(shape)))
        votes = [0.0] * len(shape)
        pointers = [] if pointer is None else [(pointer, identity)]
        for value in values:
            for read, at in self.reads(value, identity):
                if read in self.kernel.storage:
                    for dim, stride in zip(at, self.kernel.storage[read].strides, strict=True):
                        if dim is not None and stride == 1:
                            votes[dim] += 0.5
                else:
                    pointers.append((read.op.operands[0], at))
        for found, at in pointers:
            for dim in identity:
                if step(found, at, dim) == 1:
                    votes[dim] += 1
        wide = [d for d in identity if shape[d] > 1]
        if not wide:
            return None, 1
        best = max(wide, key=lambda d: (votes[d] * (1 if shape[d] >= 4 else 0.1), shape[d] >= self.kernel.lanes, d))
        return best, self.width(shape, best, values)

    def width(self, shape: tuple[int, ...], dim: int, values: list[Value]) -> int:
        """How many lanes to take of a dimension: half as many where elements of 8 bytes are computed along it.

        gcc 12 compares and selects vectors larger than a register lane by lane, 30 times slower.
        """
        identity = tuple(range(len(shape)))
        reads = (read for value in values for read, at in self.reads(value, identity) if dim in at)
        wide = self.kernel.has_doubles or any(BYTES.get(read.type.element) == 8 for read in reads)
        return min(self.kernel.lanes // 2 if wide else self.kernel.lanes, shape[dim] & -shape[dim])

    def nest(self, shape: tuple[int, ...], vector_dim: int | None, width: int, order: list[int] | None = None) -> Nest:
        if order is None:
            order = [d for d in range(len(shape)) if d != vector_dim] + ([] if vector_dim is None else [vector_dim])
        return Nest(shape, order, vector_dim, width, self.kernel.names)

    def finish(self, lines: list[str], guards: list[str] = ()) -> None:
        for guard in guards:
            lines = [f"if ({guard}) {{", *indented(lines), "}"]
        self.kernel.emit("{")
        self.kernel.emit_all(indented(lines))
        self.kernel.emit("}")

    # -- arrays

    def materialize(self, value: Value, hint: str | None = None) -> Stored:
        """Compute a lazy tensor into an array of its own."""
        stored = self.kernel.array(value.type, hint or value.name + "_a")
        self.assign(stored, value, self.unread_parts(value) if value in self.plan.stored else [])
        self.kernel.storage[value] = stored
        return stored

    def assign(self, stored: Stored, value: Value, parts: Sequence[Conjunct] = ()) -> None:
        """stored = value, element by element, where `parts` hold; `value` may read `stored` at the same element."""
        shape = value.type.shape if parts else self.collapsed(value.type.shape, [value], stored)
        vector_dim, width = self.vector_dim(shape, [value])
        if vector_dim is not None and stored.strides[vector_dim] != 1 and 1 in stored.strides:
            better = stored.strides.index(1)
            if shape[better] >= min(self.kernel.lanes, 4):
                vector_dim, width = better, self.width(shape, better, [value])

        def assign_nest(granted: list[Value]) -> None:
            nest = self.nest(shape, vector_dim, width)
            self.clip(nest, parts)
            self.take_for_granted(nest, granted)
            evaluator = Evaluator(self.kernel, nest)

            def body(_copy: int) -> None:
                at = nest.indices()
                cell = evaluator.at(value, at)
                for line in evaluator.write(stored, at, cell):
                    nest.add(nest.depth, line)

            self.finish(nest.render(body))

        self.in_versions(self.whole_tile(value, parts), assign_nest)

    def assign_all(self, targets: list[Value], values: list[Value]) -> None:
        """targets = values at once, as a yield means it."""
        pending = []
        for target, value in zip(targets, values, strict=True):
            if target.type.is_tensor and self.kernel.storage.get(value) is not self.kernel.storage[target]:
                pending.append((self.kernel.storage[target], value))
        replaced: dict[Value, Stored | None] = {}

        def set_aside(value: Value) -> None:
            replaced.setdefault(value, self.kernel.storage.get(value))
            self.copy_out(value)

        while pending:
            for k, (stored, value) in enumerate(pending):
                others = [other for j, (_, other) in enumerate(pending) if j != k]
                if not any(self.reads_array(other, stored.array) for other in others):
                    if self.reads_array(value, stored.array, moved=True):
                        set_aside(value)
                    self.assign(stored, value)
                    pending.pop(k)
                    break
            else:  # a cycle: one value goes through an array of its own
                set_aside(next(value for _, value in pending if value not in replaced))
        for value, stored in replaced.items():
            if stored is not None:
                self.kernel.storage[value] = stored
        scalars = [(t, v) for t, v in zip(targets, values, strict=True) if not t.type.is_tensor and t is not v]
        moving = {t.name for t, _ in scalars}
        texts = []
        for target, value in scalars:
            text = self.kernel.text(value)
            if text in moving and len(scalars) > 1:
                name = self.kernel.fresh(f"next_{target.name}")
                self.kernel.emit(f"const auto {name} = {text};")
                text = name
            texts.append((target.name, text))
        for name, text in texts:
            self.kernel.emit(f"{name} = {text};")

    def copy_out(self, value: Value, parts: Sequence[Conjunct] = ()) -> None:
        copy = self.kernel.array(value.type, value.name + "_next")
        self.assign(copy, value, parts)
        self.kernel.storage[value] = copy

    def reads_array(self, value: Value, array: str, moved: bool = False) -> bool:
        """Whether printing `value` reads `array`; with `moved`, only reads of other elements than its own count."""
        identity = tuple(range(len(value.type.shape))) if value.type.is_tensor else ()
        if not value.type.is_tensor:
            return False
        for read, at in self.reads(value, identity):
            stored = self.kernel.storage.get(read)
            if stored is not None and stored.array == array:
                same = at == identity and stored.strides == row_major(value.type.shape) and stored.offset == 0
                if not (moved and same):
                    return True
        return False

    # -- stores

    def store(self, op: Op) -> None:
        pointer, value = op.operands[:2]
        if not pointer.type.is_tensor:
            self.kernel.scalar_store(op)
            return
        identity = tuple(range(len(pointer.type.shape)))
        hazards = self.hazards(op)
        target = self.analysis.of(pointer, identity)
        shape = pointer.type.shape
        vector_dim, width = self.vector_dim(shape, [value], pointer)
        contiguous = target is not None and vector_dim is not None and target.coefficient(vector_dim) == 1 and width > 1
        if hazards and (None in hazards or not contiguous):
            parts = conjuncts(op.operands[2], identity, self.analysis) if len(op.operands) > 2 else []
            self.copy_out(value, [part for part in parts if part.dim is not None])  # past them, indices may be unset
            hazards = []
        if not hazards:
            self.store_nest(op, value, vector_dim, width, None)
            return
        self.kernel.emit("{")
        self.kernel.indent += 1
        shared = self.kernel.fresh("shared")
        checks = " || ".join(dict.fromkeys(hazards))
        self.kernel.emit(f"const bool {shared} = {checks};  // what is stored may be read again: go through an array")
        aside = self.kernel.array(Type(value.type.element, shape), value.name + "_aside")
        aside = replace(aside, type=Type(value.type.element, shape))
        self.store_nest(op, value, vector_dim, width, (shared, aside))
        saved = self.kernel.storage.get(value)
        self.kernel.storage[value] = aside
        self.kernel.emit(f"if ({shared}) {{")
        self.kernel.indent += 1
        self.store_nest(op, value, vector_dim, width, None)
        self.kernel.indent -= 1
        self.kernel.emit("}")
        if saved is None:
            del self.kernel.storage[value]
        else:
            self.kernel.storage[value] = saved
        self.kernel.indent -= 1
        self.kernel.emit("}")

    def hazards(self, op: Op) -> list[str | None]:
        """When the store itself may overtake a load inside its value: C++ conditions, None for one that is unknown.

        Where both address the same elements, that is when several lanes do: all of them read before any writes.
        """
        pointer, value = op.operands[:2]
        shape = pointer.type.shape
        identity = tuple(range(len(shape)))
        found: list[str | None] = []
        target = self.analysis.of(pointer, identity)
        for read, at in self.reads(value, identity):
            if read in self.kernel.storage:
                continue
            form = self.analysis.of(read.op.operands[0], at)
            if form is None or target is None:
                found.append(None)
            elif form == target:
                check = meeting_check(target, shape)
                found += [check] if check != "false" else []
            else:
                found.append(overlap_check(form, read.op, target, op, shape))
        return [None if check == "true" else check for check in found]

    def store_nest(
        self, op: Op, value: Value, vector_dim: int | None, width: int, aside: tuple[str, Stored] | None
    ) -> None:
        pointer, _, *masks = op.operands
        shape = pointer.type.shape
        nest = self.nest(shape, vector_dim, width)
        identity = tuple(range(len(shape)))
        guards = self.clip(nest, conjuncts(masks[0], identity, self.analysis)) if masks else []
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            mask = evaluator.at(masks[0], at) if masks else None
            cell = evaluator.at(value, at)
            to = evaluator.at(pointer, at)
            lines = evaluator.store(to, cell, mask, value.type)
            if aside is not None:
                shared, stored = aside
                lines = [f"if ({shared}) {line}" for line in evaluator.write(stored, at, cell)] + [
                    f"else {line}" for line in lines
                ]
            for line in lines:
                nest.add(nest.depth, line)

        self.finish(nest.render(body), guards)

    # -- views

    def reshape(self, op: Op) -> None:
        source = self.kernel.storage[op.operands[0]]
        if source.strides != row_major(source.type.shape):
            packed = self.kernel.array(source.type, op.operands[0].name + "_packed")
            self.assign(packed, op.operands[0])
            source = packed
        shape = op.result.type.shape
        self.kernel.storage[op.result] = Stored(source.array, op.result.type, row_major(shape), source.offset)

    def join(self, op: Op) -> None:
        result = self.kernel.array(op.result.type, op.result.name + "_a")
        for k, operand in enumerate(op.operands):
            self.assign(Stored(result.array, operand.type, result.strides[:-1], k), operand)
        self.kernel.storage[op.result] = result

    def split(self, op: Op) -> None:
        source = self.kernel.storage[op.operands[0]]
        for k, result in enumerate(op.results):
            if result.type.is_tensor:
                self.kernel.storage[result] = Stored(
                    source.array, result.type, source.strides[:-1], source.offset + k * source.strides[-1]
                )
            else:
                self.kernel.let(result, f"{source.array}[{source.offset + k * source.strides[-1]}]")

    def cat(self, op: Op) -> None:
        result = self.kernel.array(op.result.type, op.result.name + "_a")
        offset = 0
        for operand in op.operands:
            self.assign(Stored(result.array, operand.type, row_major(operand.type.shape), offset), operand)
            offset += operand.type.numel
        self.kernel.storage[op.result] = result

    def unsplat(self, op: Op) -> None:
        source = op.operands[0]
        stored = self.kernel.storage.get(source) or self.materialize(source)
        self.kernel.let(op.result, f"{stored.array}[{stored.offset}]")

    def gather(self, op: Op) -> None:
        """result[i, j] = source[index[i, j], j] along the axis."""
        source, index = op.operands
        axis = op.attrs["axis"]
        stored = self.kernel.storage[source]
        result = self.kernel.array(op.result.type, op.result.name + "_a")
        nest = self.nest(op.result.type.shape, None, 1)
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            place = evaluator.at(index, at)
            inside = f"(uint64_t)({place.text}) < {source.type.shape[axis]}"  # elsewhere any element will do
            text = f"({inside} ? (int32_t)({place.text}) : 0)"
            moved = tuple(replace(i, text=text, level=nest.depth) if d == axis else i for d, i in enumerate(at))
            for line in evaluator.write(result, at, evaluator.read(stored, moved, source)):
                nest.add(nest.depth, line)

        self.finish(nest.render(body))
        self.kernel.storage[op.result] = result

    def histogram(self, op: Op) -> None:
        """How often each of 0 .. bins - 1 occurs; other values are not counted."""
        values, *masks = op.operands
        result = self.kernel.array(op.result.type, op.result.name + "_a")
        self.kernel.emit(f"for (int32_t bin = 0; bin < {op.result.type.numel}; ++bin) {result.array}[bin] = 0;")
        nest = self.nest(values.type.shape, None, 1)
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            value = closed(evaluator.at(values, at).text)
            counted = [f"(uint64_t){value} < {op.result.type.numel}"]
            counted += [closed(evaluator.at(mask, at).text) for mask in masks]
            nest.add(nest.depth, f"if ({' && '.join(counted)}) ++{result.array}[{value}];")

        self.finish(nest.render(body))
        self.kernel.storage[op.result] = result

    PRINTERS: ClassVar[dict[str, Callable]] = {
        "tt.store": store,
        "tt.reshape": reshape,
        "tt.join": join,
        "tt.split": split,
        "tt.cat": cat,
        "tt.unsplat": unsplat,
        "tt.gather": gather,
        "tt.histogram": histogram,
        "tt.atomic_rmw": AtomicPrinter.atomic,
        "tt.atomic_cas": AtomicPrinter.atomic,
        "tt.atomic_load": AtomicPrinter.atomic,
        "tt.atomic_store": AtomicPrinter.atomic,
        "tt.reduce": ReducePrinter.reduce,
        "tt.scan": ReducePrinter.scan,
        "tt.dot": DotPrinter.dot,
        "tt.map_elementwise": MapPrinter.map_elementwise,
        "tt.print": ReportPrinter.device_print,
        "tt.assert": ReportPrinter.device_assert,
        "check.bounds": CheckPrinter.bounds,
        "check.index": CheckPrinter.index,
    }


def overlap_check(form: Affine, load: Op, target: Affine, store: Op, shape: tuple[int, ...]) -> str:
    """C++: whether the bytes of a load and of a store meet, other than element on element."""
    source_pointer, target_pointer = load.operands[0].type, store.operands[0].type
    check = f"overlap({span(form, shape)}, {span(target, shape)})"
    same_size = BYTES.get(source_pointer.pointee) == BYTES.get(target_pointer.pointee)
    if same_size and form.coefficients == target.coefficients:
        differ = f"(const void *)({form.base()}) != (const void *)({target.base()})"
        meet = meeting_check(target, shape)
        return f"(({differ}{'' if meet == 'false' else f' || {meet}'}) && {check})"
    return check


def meeting_check(form: Affine, shape: tuple[int, ...]) -> str:
    """C++: whether two elements of a tile may have one address."""
    wide = [(form.coefficient(dim), size) for dim, size in enumerate(shape) if size > 1]
    if all(isinstance(coefficient, int) for coefficient, _ in wide):
        reach = 0
        for coefficient, size in sorted((abs(coefficient), size) for coefficient, size in wide):
            if coefficient <= reach:
                return "true"
            reach += coefficient * (size - 1)
        return "false"
    strides, sizes = zip(*wide, strict=True)
    return f"lanes_meet<{len(wide)}>({{{', '.join(map(str, strides))}}}, {{{', '.join(map(str, sizes))}}})"


def span(form: Affine, shape: tuple[int, ...]) -> str:
    reaches = []
    for dim, coefficient in form.coefficients:
        steps = shape[dim] - 1
        reaches.append(
            str(coefficient * steps) if isinstance(coefficient, int) else f"(int64_t)({coefficient}) * {steps}"
        )
    return f"span({', '.join([form.base(), *reaches])})"
