"""Where loops may end early: masks that make the rest of a tile neutral, unread or unwritten.

tl.sum(tl.where(c < n, x, 0))           the loop over c ends at n: what is past it adds 0
e = exp(x); store(p, e, mask=c < n)     e's array is filled up to n: nobody reads past it
x = load(p, mask=c < n, other=-inf)
tl.sum(tl.exp(x - m), 0)                the loop ends at n: past it are equal terms, exp(-inf - m), added at once
"""

import math

from .affine import Conjunct, Map, compare_conjunct, conjuncts, through_view
from .c_types import BYTES, parse_literal
from .ir import Op, Value
from .nest import Extent, Nest
from .plan import is_lazy
from .spelling import is_elementwise

Number = float | int | bool
CONVERSIONS = ("arith.extf", "arith.truncf", "arith.extsi", "arith.extui", "arith.sitofp", "arith.uitofp")
TAIL_ADDS = ("arith.addf", "arith.addi")
TAIL_PICKS = ("arith.maxnumf", "arith.maximumf", "arith.minnumf", "arith.minimumf", "arith.maxsi", "arith.minsi")


class Clipper:
    """Mask reasoning of RootPrinter. Conjuncts are compared by the dimension they cut and the text of its end."""

    # -- cutting loops

    def clip(self, nest: Nest, parts: list[Conjunct]) -> list[str]:
        """Let loops end where the mask does; returns conditions under which anything happens at all."""
        guards = []
        by_dim: dict[int, list[Conjunct]] = {}
        for part in parts:
            if part.uniform:
                guards.append(self.kernel.text(part.leaf))
                nest.facts[part.leaf] = 0
            elif part.dim is not None and nest.shape[part.dim] > 1:
                by_dim.setdefault(part.dim, []).append(part)
                nest.facts[part.dim, part.end] = nest.level_of[part.dim]
        for dim, cuts in by_dim.items():
            self.clip_dim(nest, dim, cuts)
        return list(dict.fromkeys(guards))

    def clip_dim(self, nest: Nest, dim: int, cuts: list[Conjunct]) -> None:
        size = nest.shape[dim]
        numbers = [max(0, min(size, cut.constant)) for cut in cuts if cut.constant is not None]
        texts = list(dict.fromkeys(cut.end for cut in cuts if cut.constant is None))
        divisor = min([cut.divisor for cut in cuts] + [size])
        if not texts:
            nest.extents[dim] = Extent(size, str(min(numbers)), min(numbers), divisor)
            return
        name = nest.fresh(f"n_{nest.index_name[dim]}")
        limit = min(numbers, default=size)
        text = f"clip({texts[0]}, {limit})"
        for more in texts[1:]:
            text = f"least({text}, clip({more}, {limit}))"
        nest.add(0, f"const int32_t {name} = {text};")
        nest.extents[dim] = Extent(size, name, None, divisor)

    # -- values that are one number outside of a mask

    def mask_parts(self, value: Value, at: Map) -> list[Conjunct]:
        """Conjuncts of all masks that `value` is printed with, or was."""
        found: dict[tuple, Conjunct] = {}
        seen = set()

        def visit(inner: Value, at: Map) -> None:
            if inner.op is None or not inner.type.is_tensor or (inner, at) in seen:
                return
            seen.add((inner, at))
            if (source := through_view(inner, at)) is not None:
                visit(*source)
                return
            if not is_lazy(inner.op):
                return
            mask = None
            if inner.op.name == "tt.load" and len(inner.op.operands) > 1:
                mask = inner.op.operands[1]
            elif inner.op.name == "arith.select":
                mask = inner.op.operands[0]
            if mask is not None and mask.type.is_tensor:
                for part in conjuncts(mask, at, self.analysis):
                    if part.dim is not None:
                        found.setdefault((part.dim, part.end), part)
            if inner.op.name != "tt.load":
                for operand in inner.op.operands:
                    visit(operand, at)

        visit(value, at)
        return list(found.values())

    def neutral_parts(self, value: Value, identity: Number) -> list[Conjunct]:
        """Conjuncts outside of which `value` is the reduction's identity."""
        at: Map = tuple(range(len(value.type.shape)))
        return [part for part in self.mask_parts(value, at) if self.value_without(value, at, part) == identity]

    def value_without(
        self, value: Value, at: Map, part: Conjunct, known: dict[tuple[Value, Map], Number | None] | None = None
    ) -> Number | None:
        """What `value` is where `part` does not hold, if that is one number. True of stored values as well.

        known: numbers found on the way.
        """
        known = {} if known is None else known
        if (value, at) not in known:
            known[value, at] = self.find_value_without(value, at, part, known)
        return known[value, at]

    def find_value_without(
        self, value: Value, at: Map, part: Conjunct, known: dict[tuple[Value, Map], Number | None]
    ) -> Number | None:
        op = value.op
        if op is None:
            return None
        if op.name == "arith.constant":
            return parse_literal(op.attrs["value"], value.type.element)
        if op.name == "tt.splat":
            return self.value_without(op.operands[0], (), part, known)
        if (source := through_view(value, at)) is not None:
            return self.value_without(*source, part, known)
        if not value.type.is_tensor or not is_lazy(op):
            return None
        if op.name == "arith.cmpi":
            same = any((leaf.dim, leaf.end) == (part.dim, part.end) for leaf in conjuncts(value, at, self.analysis))
            return False if same else None
        if op.name == "tt.load":
            if len(op.operands) < 2 or self.value_without(op.operands[1], at, part, known) is not False:
                return None
            return 0.0 if len(op.operands) < 3 else self.value_without(op.operands[2], at, part, known)
        inner = [self.value_without(operand, at, part, known) for operand in op.operands]
        if op.name == "arith.select" and inner[0] is not None:
            return inner[1] if inner[0] else inner[2]
        if op.name == "arith.andi" and value.type.element == "i1" and any(item is False for item in inner):
            return False
        if not inner or any(item is None for item in inner):
            return None
        if op.name in ("arith.mulf", "arith.muli", "arith.addf", "arith.addi"):
            return combined_number(op, *inner)
        return converted_number(op, inner[0]) if op.name in CONVERSIONS else None

    # -- values that are all the same outside of a mask

    def tail_part(self, op: Op) -> Conjunct | None:
        """The conjunct along a reduction's axis, its last dimension, outside of which all terms are equal.

        Decided once, since arrays are cut by it before the reduction is printed. None where the terms outside of some
        conjunct are neutral.
        """
        if op not in self.tails:
            self.tails[op] = self.find_tail(op)
        return self.tails[op]

    def find_tail(self, op: Op) -> Conjunct | None:
        single, identity = self.combining_op(op.blocks[0]), self.identity(op)
        value, axis = op.operands[0], op.attrs["axis"]
        if len(op.operands) > 1 or identity is None or axis != len(value.type.shape) - 1 or value.type.shape[axis] < 2:
            return None
        exact = value.type.element in ("f32", "f64", "i32", "i64")
        if single.name not in TAIL_PICKS and not (single.name in TAIL_ADDS and exact):
            return None
        at: Map = tuple(range(len(value.type.shape)))
        parts = [part for part in self.mask_parts(value, at) if part.dim == axis]
        if len(parts) != 1 or self.value_without(value, at, parts[0]) == identity:
            return None
        return parts[0] if self.same_without(value, at, parts[0]) else None

    def same_without(self, value: Value, at: Map, part: Conjunct, seen: set[tuple[Value, Map]] | None = None) -> bool:
        """Whether `value` does not change along part.dim where `part` does not hold. Of stored values as well.

        seen: what is looked at elsewhere.
        """
        op = value.op
        seen = set() if seen is None else seen
        if not value.type.is_tensor or part.dim not in at or (value, at) in seen:
            return True
        seen.add((value, at))
        if op is None:
            return False
        if (source := through_view(value, at)) is not None:
            return self.same_without(*source, part, seen)
        if op.name in ("arith.constant", "tt.splat"):
            return True
        if op.name == "arith.cmpi" and value.type.element == "i1":
            leaf = compare_conjunct(value, at, self.analysis)
            if (leaf.dim, leaf.end) == (part.dim, part.end):
                return True
        if op.name == "tt.load":
            if len(op.operands) < 2 or self.value_without(op.operands[1], at, part) is not False:
                return False
            return all(self.same_without(other, at, part, seen) for other in op.operands[2:])
        if op.name == "arith.andi" and value.type.element == "i1" and self.value_without(value, at, part) is False:
            return True
        return is_elementwise(op) and all(self.same_without(operand, at, part, seen) for operand in op.operands)

    # -- values that nobody reads outside of a mask

    def unread_parts(self, value: Value) -> list[Conjunct]:
        """Conjuncts outside of which no consumer of a stored tensor reads it."""
        if not value.type.is_tensor:
            return []
        candidates: dict[tuple, Conjunct] = {}
        identity: Map = tuple(range(len(value.type.shape)))
        if value.op is not None and value.op.name == "tt.reduce":
            axis = value.op.attrs["axis"]
            for operand in value.op.operands:
                at = tuple(None if d == axis else d - (d > axis) for d in range(len(operand.type.shape)))
                for part in self.mask_parts(operand, at):
                    candidates.setdefault((part.dim, part.end), part)
        else:
            candidates = {(part.dim, part.end): part for part in self.mask_parts(value, identity)}
        for part in self.store_masks(value):
            candidates.setdefault((part.dim, part.end), part)
        return [part for part in candidates.values() if self.unread(value, part.dim, part.end, 0)]

    def store_masks(self, value: Value) -> list[Conjunct]:
        found = []
        for op in self.plan.consumers(value):
            if op.name == "tt.store" and len(op.operands) > 2 and op.operands[1].type.shape == value.type.shape:
                at = tuple(range(len(value.type.shape)))
                found += [part for part in conjuncts(op.operands[2], at, self.analysis) if part.dim is not None]
        return found

    def unread(self, value: Value, dim: int, end: str, depth: int) -> bool:
        """Whether every consumer of `value` stays below `end` along `dim`."""
        if depth > 6:
            return False
        return all(self.stays_below(op, value, dim, end, depth) for op in self.plan.consumers(value))

    def stays_below(self, op: Op, value: Value, dim: int, end: str, depth: int) -> bool:
        if op.name == "tt.store" and op.operands[1].type.is_tensor:
            if len(op.operands) < 3 or any(self.maps_of(v, value) for v in (op.operands[0], op.operands[2])):
                return False
            at = tuple(range(len(op.operands[1].type.shape)))
            ends = {(part.dim, part.end) for part in conjuncts(op.operands[2], at, self.analysis)}
            return all((m[dim], end) in ends for m in self.maps_of(op.operands[1], value))
        if op.name == "tt.reduce" and len(op.operands) == 1:
            axis, identity = op.attrs["axis"], self.identity(op)
            neutral = set()
            if identity is not None:
                neutral = {(part.dim, part.end) for part in self.neutral_parts(op.operands[0], identity)}
                if (tail := self.tail_part(op)) is not None:
                    neutral.add((tail.dim, tail.end))
            for m in self.maps_of(op.operands[0], value):
                if m[dim] is None:
                    return False
                if m[dim] == axis:
                    if (axis, end) not in neutral:
                        return False
                elif not op.result.type.is_tensor or not self.unread(
                    op.result, m[dim] - (m[dim] > axis), end, depth + 1
                ):
                    return False
            return True
        if is_lazy(op) and op.result in self.plan.stored:
            maps = self.maps_of(op.result, value, True)
            return all(m[dim] is not None and self.unread(op.result, m[dim], end, depth + 1) for m in maps)
        return False

    def maps_of(self, root: Value, value: Value, inside: bool = False) -> set[Map]:
        """How printing `root` indexes `value`, a stored tensor: the dimensions of root's tile. inside: look into root
        although it is stored itself."""
        found: set[Map] = set()
        seen = set()

        def visit(inner: Value, at: Map, top: bool) -> None:
            if not inner.type.is_tensor or (inner, at) in seen:
                return
            seen.add((inner, at))
            if inner is value and not (top and inside):
                found.add(at)
            elif inner.op is not None and is_lazy(inner.op) and (inner not in self.plan.stored or (top and inside)):
                if (source := through_view(inner, at)) is not None:
                    visit(*source, False)
                elif inner.op.name != "tt.splat":
                    for operand in inner.op.operands:
                        visit(operand, at, False)

        visit(root, tuple(range(len(root.type.shape))) if root.type.is_tensor else (), True)
        return found


def combined_number(op: Op, a: Number, b: Number) -> Number | None:
    """a + b or a * b in op's type; None where that may round."""
    times = op.name.startswith("arith.mul")
    result = a * b if times else a + b
    if not op.result.type.is_float:
        bits = 8 * BYTES[op.result.type.element]
        return (result + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)
    neutral = 1 if times else 0
    exact = neutral in (a, b) or 0 in (a, b) or math.isinf(result) or (result == 0 and not times)
    return result if exact else None


def converted_number(op: Op, number: Number) -> Number | None:
    """`number` as op's type; None where that is another number."""
    signed = op.name in ("arith.extsi", "arith.sitofp")
    if op.operands[0].type.element == "i1":
        return -int(number) if signed else int(number)
    if number < 0 and op.name in ("arith.extui", "arith.uitofp"):
        return None
    rounds = op.name == "arith.truncf" and not math.isinf(number)
    rounds = rounds or (op.name in ("arith.sitofp", "arith.uitofp") and abs(number) > 256)
    return None if rounds and number else number
