"""Short dimensions that can be walked as one: those that lie one after the other in all that a nest reads and writes.

    [2, 2, 2, 2, 16] of an array   -->   [1, 1, 1, 1, 256]: index 255 is element [1, 1, 1, 1, 15]

Sorting reshapes its tile to one dimension of 2 after the other: nests of them would have no room for lanes.
"""

import itertools

from .affine import Map, through_view
from .cells import Stored
from .ir import Value
from .plan import is_lazy


class Collapser:
    """The part of RootPrinter that chooses the shape of a nest."""

    def collapsed(
        self, shape: tuple[int, ...], values: list[Value], target: Stored | None = None, apart: int | None = None
    ) -> tuple[int, ...]:
        """`shape` with dimensions merged into their last one, never across dimension `apart`; sizes there become 1."""
        wide = [d for d in range(len(shape)) if shape[d] > 1]
        if len(wide) < 2 or min(shape[d] for d in wide) >= self.kernel.lanes:
            return shape
        merged, into = list(shape), {d: d for d in wide}
        for outer, inner in reversed(list(itertools.pairwise(wide))):
            if apart is not None and outer <= apart <= inner:
                continue
            follows = target is None or target.strides[outer] == shape[inner] * target.strides[inner]
            if follows and all(self.one_after_the_other(value, shape, outer, inner) for value in values):
                into[outer] = into[inner]
                merged[into[outer]] *= merged[outer]
                merged[outer] = 1
        return tuple(merged)

    def one_after_the_other(self, value: Value, shape: tuple[int, ...], outer: int, inner: int) -> bool:
        """Whether all that is read with `value` has element (i + 1, 0) of the two dimensions after its (i, last)."""
        seen: set[tuple[Value, Map]] = set()

        def visit(inner_value: Value, at: Map) -> bool:
            if (outer not in at and inner not in at) or (inner_value, at) in seen:
                return True
            seen.add((inner_value, at))
            if (stored := self.kernel.storage.get(inner_value)) is not None:
                stride = {dim: s for dim, s in zip(at, stored.strides, strict=True) if dim is not None}
                return stride.get(outer, 0) == shape[inner] * stride.get(inner, 0)
            if (source := through_view(inner_value, at)) is not None:
                return visit(*source)
            op = inner_value.op
            if op is None or not is_lazy(op) or op.name == "tt.make_range":
                return False
            if op.name == "tt.load":
                form = self.analysis.of(op.operands[0], at)
                if form is None:
                    return False
                steps = form.coefficient(outer), form.coefficient(inner)
                if not all(isinstance(s, int) for s in steps) or steps[0] != shape[inner] * steps[1]:
                    return False
                return all(visit(operand, at) for operand in op.operands[1:])
            return op.name in ("tt.splat", "arith.constant") or all(visit(operand, at) for operand in op.operands)

        return not value.type.is_tensor or visit(value, tuple(range(len(value.type.shape))))
