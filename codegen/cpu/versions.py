"""Tiles that lie inside of their masks as a whole: their nests are printed a second time, without the masks.

where(key <= row, scores, -inf)   -->   if (first + 63 <= row_4) { scores } else { where(key <= row, scores, -inf) }

Only masks that compare affine integers count: the corner of the tile where they are nearest to failing decides.
"""

from collections.abc import Callable

from .affine import Affine, AffineAnalysis, Conjunct, Map, conjuncts, through_view, wrapped
from .ir import Op, Value
from .nest import Nest
from .plan import is_lazy

WORTHWHILE = 16  # vectors in a tile, below which a second nest does not pay
STRICT = {"slt": True, "sle": False, "sgt": True, "sge": False}


class Versioner:
    """The part of RootPrinter that finds masks to do without."""

    def whole_tile(self, value: Value, parts: list[Conjunct]) -> tuple[list[Value], str] | None:
        """Compares printed with `value` that hold on all of its tile under a C condition; None if there are none.

        parts: masks that its loops are cut by, which need no version.
        """
        if value.type.numel < WORTHWHILE * self.kernel.lanes:
            return None
        cut = {(part.dim, part.end) for part in parts}
        shape = value.type.shape
        conditions: dict[Value, str] = {}
        seen: dict[Value, Map] = {}
        for leaf in self.select_masks(value, tuple(range(len(shape)))):
            if seen.setdefault(leaf.leaf, leaf.at) != leaf.at:
                return None
            if leaf.dim is not None and (leaf.dim, leaf.end) in cut:
                continue
            condition = holds_everywhere(leaf, shape, self.analysis)
            if condition is not None:
                conditions[leaf.leaf] = condition
        return (list(conditions), " && ".join(dict.fromkeys(conditions.values()))) if conditions else None

    def select_masks(self, value: Value, at: Map) -> list[Conjunct]:
        """The conjuncts of all masks of selects that are printed with `value`."""
        found: list[Conjunct] = []
        seen: set[tuple[Value, Map]] = set()

        def visit(inner: Value, at: Map, top: bool = False) -> None:
            if not inner.type.is_tensor or (inner, at) in seen or inner.op is None:
                return
            seen.add((inner, at))
            if (inner in self.kernel.storage or inner in self.plan.stored) and not top:
                return
            if (source := through_view(inner, at)) is not None:
                visit(*source)
                return
            if not is_lazy(inner.op) or inner.op.name == "tt.load":
                return
            if inner.op.name == "arith.select" and inner.op.operands[0].type.is_tensor:
                found.extend(conjuncts(inner.op.operands[0], at, self.analysis))
            for operand in inner.op.operands:
                visit(operand, at)

        visit(value, at, True)
        return found

    def take_for_granted(self, nest: Nest, masks: list[Value]) -> None:
        nest.facts |= dict.fromkeys(masks, 0)

    def in_versions(self, found: tuple[list[Value], str] | None, print_nest: Callable[[list[Value]], None]) -> None:
        """print_nest(masks to take for granted), once or under a condition and again without it."""
        if found is not None:
            masks, condition = found
            self.kernel.emit(f"if ({condition}) {{  // all of the tile is inside of its masks")
            self.kernel.indent += 1
            print_nest(masks)
            self.kernel.indent -= 1
            self.kernel.emit("} else {")
            self.kernel.indent += 1
        print_nest([])
        if found is not None:
            self.kernel.indent -= 1
            self.kernel.emit("}")


def holds_everywhere(leaf: Conjunct, shape: tuple[int, ...], analysis: AffineAnalysis) -> str | None:
    """C condition under which a compare holds on a whole tile; None if it is not one of affine integers."""
    op: Op | None = leaf.leaf.op
    if leaf.uniform or op is None or op.name != "arith.cmpi" or op.attrs["words"][0] not in STRICT:
        return None
    predicate = op.attrs["words"][0]
    small, large = (analysis.of(operand, leaf.at) for operand in op.operands)
    if predicate in ("sgt", "sge"):
        small, large = large, small
    if small is None or large is None:
        return None
    reach = 1 if STRICT[predicate] else 0
    for dim, size in enumerate(shape):
        ahead, behind = small.coefficient(dim), large.coefficient(dim)
        if not isinstance(ahead, int) or not isinstance(behind, int):
            return None
        reach += max(0, (ahead - behind) * (size - 1))
    low, high = (wrapped(Affine("", form.terms, form.constant).base()) for form in (small, large))
    within = [text for form, base in ((small, low), (large, high)) for text in no_overflow(form, base, shape)]
    return " && ".join([f"(int64_t){high} - {low} >= {reach}", *within])


def no_overflow(form: Affine, base: str, shape: tuple[int, ...]) -> list[str]:
    """C conditions under which no index of the tile takes an int32 `base` past its range, where it would wrap."""
    if form.is_constant:
        return []
    reaches = [form.coefficient(dim) * (size - 1) for dim, size in enumerate(shape)]
    up, down = sum(max(0, r) for r in reaches), sum(min(0, r) for r in reaches)
    return [f"{base} <= {2**31 - 1 - up}"] * (up > 0) + [f"{base} >= {-(2**31) - down}"] * (down < 0)
