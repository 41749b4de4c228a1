"""Print what tensors are computed for: stores, arrays, reductions, dots; each as one loop nest."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

from .affine import Conjunct, Map, step, through_view
from .atomics import AtomicPrinter
from .c_types import BYTES
from .cells import Stored, row_major
from .check import CheckPrinter
from .clip import Clipper
from .collapse import Collapser
from .combine import Combiner
from .dots import DotPrinter
from .elementwise import MapPrinter
from .evaluate import Evaluator
from .finish import Finish, FinishPrinter
from .ir import Op, Value
from .nest import Nest, indented
from .plan import is_lazy
from .products import ProductPrinter
from .reduce import ReducePrinter
from .report import ReportPrinter
from .scan import ScanPrinter
from .shapes import ShapePrinter
from .stores import StorePrinter
from .versions import Versioner


class RootPrinter(
    StorePrinter,
    ShapePrinter,
    AtomicPrinter,
    Combiner,
    ReducePrinter,
    ScanPrinter,
    ProductPrinter,
    DotPrinter,
    FinishPrinter,
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
        self.finishes: dict[Value, Finish] = {}

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
        """The dimension along which most memory is contiguous, and how many lanes to take of it.

        A read has as many votes as elements: in x[:, None] * w[:, :] those of w count.
        """
        identity = tuple(range(len(shape)))
        votes = [0.0] * len(shape)
        pointers = [] if pointer is None else [(pointer, identity)]
        for value in values:
            for read, at in self.reads(value, identity):
                if read in self.kernel.storage:
                    for dim, stride in zip(at, self.kernel.storage[read].strides, strict=True):
                        if dim is not None and stride == 1:
                            votes[dim] += 0.5 * share(shape, at)
                else:
                    pointers.append((read.op.operands[0], at))
        for found, at in pointers:
            for dim in identity:
                if step(found, at, dim) == 1:
                    votes[dim] += share(shape, [d for d in at if d is not None and step(found, at, d) != 0])
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

    PRINTERS: ClassVar[dict[str, Callable]] = {
        "tt.store": StorePrinter.store,
        "tt.reshape": ShapePrinter.reshape,
        "tt.join": ShapePrinter.join,
        "tt.split": ShapePrinter.split,
        "tt.cat": ShapePrinter.cat,
        "tt.unsplat": ShapePrinter.unsplat,
        "tt.gather": ShapePrinter.gather,
        "tt.histogram": ShapePrinter.histogram,
        "tt.atomic_rmw": AtomicPrinter.atomic,
        "tt.atomic_cas": AtomicPrinter.atomic,
        "tt.atomic_load": AtomicPrinter.atomic,
        "tt.atomic_store": AtomicPrinter.atomic,
        "tt.reduce": ReducePrinter.reduce,
        "tt.scan": ScanPrinter.scan,
        "tt.dot": DotPrinter.dot,
        "tt.map_elementwise": MapPrinter.map_elementwise,
        "tt.print": ReportPrinter.device_print,
        "tt.assert": ReportPrinter.device_assert,
        "check.bounds": CheckPrinter.bounds,
        "check.index": CheckPrinter.index,
    }


def share(shape: tuple[int, ...], dims: Iterable[int | None]) -> float:
    """How many of a tile's elements what varies along `dims` has, as a part of all."""
    return math.prod(shape[dim] for dim in {*dims} - {None}) / math.prod(shape)
