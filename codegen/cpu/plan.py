"""Which tensors live in arrays, and when a load may wait for its consumer.

A tensor is a function of its indices, printed into the loops of each consumer, unless it is stored: results of
reductions, dots and control flow are, and so is what is costly and needed more than once, and every load that a write
could overtake on the way to its consumer. All pointers may alias.
"""

from collections.abc import Iterable, Iterator

from .affine import AffineAnalysis, is_trivial_reshape
from .ir import Block, Function, Op, Value
from .spelling import cost, is_elementwise

VIEWS = frozenset(("tt.expand_dims", "tt.broadcast", "tt.trans", "tt.splat", "ttg.convert_layout"))
STORED_RESULTS = frozenset((
    "tt.reduce", "tt.scan", "tt.dot", "tt.gather", "tt.join", "tt.split", "tt.cat", "tt.histogram",
    "tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.map_elementwise",
    "scf.for", "scf.if", "scf.while", "scf.execute_region",
))  # fmt: skip
LAZY = VIEWS | {"tt.load", "tt.make_range", "arith.constant", "ub.poison"}
ATOMICS = frozenset(("tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.atomic_store"))
WRITES = ATOMICS | {"tt.store", "ttg.barrier", "tt.print"}  # what no load may move past
ACCESSES = ATOMICS | {"tt.load", "tt.store"}
COSTLY = 8
LOAD_COST = 2


def is_lazy(op: Op) -> bool:
    """Printed where it is used: its result is a tensor that depends on its operands and, for loads, on memory only."""
    if not op.results or not op.result.type.is_tensor:
        return False
    if op.name == "tt.reshape":
        return is_trivial_reshape(op.operands[0].type.shape, op.result.type.shape)
    return op.name in LAZY or is_elementwise(op)


class Plan:
    """`stored`: the tensors that get arrays, and `why`. Decided once, before printing, from last op to first."""

    def __init__(self, function: Function):
        self.function = function
        self.stored: set[Value] = set()
        self.why: dict[Value, str] = {}
        self.analysis = AffineAnalysis(self.stored)
        self.ops = list(function.body.walk())
        self.writes = [op for op in self.ops if op.name in WRITES]
        self.costs: dict[Value, int] = {}
        self.consumers_of: dict[Value, list[Op]] = {}
        self.addresses = self.address_values()
        for op in self.ops:
            if op.name in STORED_RESULTS or (op.name == "tt.reshape" and not is_lazy(op)):
                self.store(op.results, f"what {op.name} makes")
            for block in op.blocks:
                self.store(block.args, f"carried by {op.name}")
            if op.name in ("tt.split", "tt.gather", "tt.reshape") and not is_lazy(op):
                self.store(op.operands[:1], f"what {op.name} reads")
            if op.name == "tt.store":
                addresses = op.operands[:1] + op.operands[2:3]
                self.store([load for value in addresses for load in self.loads_in(value)], "loaded for an address")
        for op in reversed(self.ops):
            if is_lazy(op) and op.result not in self.stored and (why := self.why_array(op)):
                self.store([op.result], why)
        self.print_again_what_became_cheap()

    def store(self, values: Iterable[Value], why: str) -> None:
        for value in values:
            if value.type.is_tensor:
                self.stored.add(value)
                self.why.setdefault(value, why)

    def address_values(self) -> set[Value]:
        """What addresses and masks of memory are computed from."""
        found: set[Value] = set()
        for op in reversed(self.ops):
            if op.name in ACCESSES:
                found |= {v for v in op.operands if v.type.element in ("ptr", "i1")}
            elif op.results and op.result in found and is_lazy(op):
                found |= {v for v in op.operands if not v.type.is_float}
        return found

    def print_again_what_became_cheap(self) -> None:
        """Give up the arrays of values whose operands turned out to have arrays, as the bits of a costly x.

        What depends on loads keeps its array: without it they would wait for its consumers.
        """
        for op in self.ops:
            if not is_lazy(op) or not self.why.get(op.result, "").startswith("costs"):
                continue
            if op.name == "tt.load" or any(list(self.loads_in(operand)) for operand in op.operands):
                continue
            value = op.result
            self.stored.remove(value)
            self.costs.clear()
            if self.inline_cost(value) < LOAD_COST:
                del self.why[value]
                self.consumers_of.clear()
            else:
                self.stored.add(value)

    # -- walking lazy values

    def loads_in(self, value: Value) -> Iterator[Value]:
        """Tensor loads printed with `value`, itself included."""
        seen: set[Value] = set()

        def visit(inner: Value) -> Iterator[Value]:
            if (
                inner in seen
                or not inner.type.is_tensor
                or inner in self.stored
                or inner.op is None
                or not is_lazy(inner.op)
            ):
                return
            seen.add(inner)
            if inner.op.name == "tt.load":
                yield inner
            for operand in inner.op.operands:
                yield from visit(operand)

        yield from visit(value)

    def consumers(self, value: Value) -> list[Op]:
        """The ops whose printing prints `value`, in program order: stores, reductions, dots, yields, stored tensors."""
        if value not in self.consumers_of:
            found: dict[Op, None] = {}
            for use in value.uses:
                if is_lazy(use) and use.result not in self.stored:
                    found.update(dict.fromkeys(self.consumers(use.result)))
                else:
                    found[use] = None
            self.consumers_of[value] = sorted(found, key=lambda op: op.position)
        return self.consumers_of[value]

    def inline_cost(self, value: Value) -> int:
        """Simple instructions per element to print `value` once more."""
        op = value.op
        if value in self.stored or not value.type.is_tensor or op is None or not is_lazy(op):
            return 0
        if value not in self.costs:
            if op.name == "tt.load":
                self.costs[value] = LOAD_COST + sum(map(self.inline_cost, op.operands[1:]))
            else:
                own = cost(op) if is_elementwise(op) else 0
                self.costs[value] = min(own + sum(map(self.inline_cost, op.operands)), 1000)
        return self.costs[value]

    # -- decisions

    def why_array(self, op: Op) -> str | None:
        """Why the result of a lazy op gets an array; None if it is printed where it is used."""
        value = op.result
        consumers = self.consumers(value)
        if not consumers:
            return None
        if op.name == "tt.load" and any(self.overtaken(op, consumer) for consumer in consumers):
            return "loaded before a write that comes before its use"
        if (
            op.name in VIEWS
            or op.name in ("arith.constant", "tt.make_range", "tt.reshape")
            or value.type.element in ("ptr", "i1")
        ):
            return None
        self.costs.clear()
        spent = self.inline_cost(value)
        if cost(op) < COSTLY and (value in self.addresses or self.is_affine(value)):
            return None
        if spent >= COSTLY and len(consumers) > 1:
            return f"costs {spent} and is used {len(consumers)} times"
        if spent >= COSTLY and self.broadcast_over_rows(value):
            return f"costs {spent} and is used in every row"
        deeper = any(loops_between(consumer, op) for consumer in consumers)
        if deeper and op.name != "tt.load" and spent >= LOAD_COST + 1:
            return "computed outside of the loop that uses it"
        return None

    def is_affine(self, value: Value) -> bool:
        return self.analysis.of(value, tuple(range(len(value.type.shape)))) is not None

    def overtaken(self, load: Op, consumer: Op) -> bool:
        """Whether a write may happen after the load and before its consumer reads, the consumer itself aside."""
        loops = loops_between(consumer, load)
        for write in self.writes:
            if load.position < write.position < consumer.position:
                return True
            if any(loop.position < write.position <= loop.end for loop in loops):
                return True
        return False

    def broadcast_over_rows(self, value: Value) -> bool:
        """Whether some consumer repeats `value` along a dimension outside its own, as in f(column)[None, :]."""
        for use in value.uses:
            if not is_lazy(use) or use.result in self.stored:
                continue
            if use.name == "tt.broadcast":
                before, after = use.operands[0].type.shape, use.result.type.shape
                grown = [d for d in range(len(after)) if before[d] != after[d]]
                if any(before[d] > 1 for d in range(grown[0] + 1, len(after))):
                    return True
            elif use.name in VIEWS and self.broadcast_over_rows(use.result):
                return True
        return False


def enclosing_loops(block: Block | None) -> list[Op]:
    loops = []
    while block is not None and block.parent is not None:
        if block.parent.name in ("scf.for", "scf.while"):
            loops.append(block.parent)
        block = block.parent.parent
    return loops


def loops_between(inner: Op, outer: Op) -> list[Op]:
    """Loops around `inner` that are not around `outer`."""
    around = set(enclosing_loops(outer.parent))
    return [loop for loop in enclosing_loops(inner.parent) if loop not in around]
