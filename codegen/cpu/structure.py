"""Branches between blocks, and calls of functions, made into nested regions.

    ^bb0: cf.cond_br %c, ^bb1, ^bb2                    scf.if %c { A; tt.return } else { B }
    ^bb1: A; tt.return                         -->     C
    ^bb2: B; cf.br ^bb3      ^bb3: C

    %r = tt.call @f(%x)                        -->     the ops of f, where it returns in one place;
                                                       else %r = scf.execute_region { ...; tt.return %y }

Triton's front end makes blocks only for `return` inside of `if`: they never form a loop. The region of a
tt.map_elementwise has them too, and keeps their labels in `attrs` until they are nested. `tt.return` ends the innermost
scf.execute_region around it, else the program.
"""

from dataclasses import dataclass, field

from ...compiler.errors import UnsupportedKernel
from .ir import Block, Op, Value

LABELS = "labels"  # attribute of an op whose region has several blocks


@dataclass(eq=False)
class FlatFunction:
    """A function as Triton IR has it: blocks by label, the first is its entry."""

    name: str
    args: list[Value]
    blocks: dict[str, Block] = field(default_factory=dict)


def inlined(functions: dict[str, FlatFunction], kernel: FlatFunction) -> Block:
    """The kernel's body as one block of nested regions. Raises UnsupportedKernel where functions call themselves."""
    entry = next(iter(kernel.blocks.values()))
    if len(functions) == 1 and len(kernel.blocks) == 1 and not any(LABELS in op.attrs for op in entry.walk()):
        return entry
    return Inliner(functions).nested(kernel.blocks, {arg: arg for arg in kernel.args})


class Inliner:
    """Copies ops while it nests them: a block that two branches share, or a function called twice, appears twice."""

    def __init__(self, functions: dict[str, FlatFunction]):
        self.functions = functions
        self.calls: list[str] = []
        self.names: set[str] = {arg.name for function in functions.values() for arg in function.args}

    def value(self, value: Value, op: Op | None = None) -> Value:
        name, count = value.name, 1
        while name in self.names:
            count += 1
            name = f"{value.name}_c{count}"
        self.names.add(name)
        return Value(name, value.type, op)

    def copy(self, ops: list[Op], known: dict[Value, Value]) -> list[Op]:
        copies: list[Op] = []
        for op in ops:
            copies += self.call(op, known) if op.name == "tt.call" else [self.copy_op(op, known)]
        return copies

    def copy_op(self, op: Op, known: dict[Value, Value]) -> Op:
        attrs = {key: value for key, value in op.attrs.items() if key != LABELS}
        made = Op(op.name, [known.get(v, v) for v in op.operands], attrs=attrs, location=op.location)
        if LABELS in op.attrs:
            made.blocks = [self.nested(dict(zip(op.attrs[LABELS], op.blocks, strict=True)), known)]
        else:
            made.blocks = [Block(self.copy_args(block, known), self.copy(block.ops, known)) for block in op.blocks]
        made.results = [self.value(result, made) for result in op.results]
        known.update(zip(op.results, made.results, strict=True))
        return made

    def copy_args(self, block: Block, known: dict[Value, Value]) -> list[Value]:
        args = [self.value(arg) for arg in block.args]
        known.update(zip(block.args, args, strict=True))
        return args

    def nested(self, blocks: dict[str, Block], known: dict[Value, Value]) -> Block:
        """The blocks of a function or region, by label, as one: a copy. known: what is outside of them in the copy."""
        label, entry = next(iter(blocks.items()))
        made = Block(self.copy_args(entry, known))
        Nesting(self, blocks, known).add(label, None, made.ops)
        return made

    def call(self, op: Op, known: dict[Value, Value]) -> list[Op]:
        name = op.attrs["callee"]
        if name in self.calls:
            raise UnsupportedKernel(f"{name} calls itself: recursion is not supported on CPU")
        callee = self.functions[name]
        self.calls.append(name)
        args = dict(zip(callee.args, (known.get(v, v) for v in op.operands), strict=True))
        ops = self.nested(callee.blocks, args).ops
        self.calls.pop()
        if sum(inner.name == "tt.return" for inner in Block(ops=ops).walk()) == 1 and ops[-1].name == "tt.return":
            known.update(zip(op.results, ops[-1].operands, strict=True))
            return ops[:-1]
        region = Op("scf.execute_region", blocks=[Block(ops=ops)], location=op.location)
        region.results = [self.value(result, region) for result in op.results]
        known.update(zip(op.results, region.results, strict=True))
        return [region]


class Nesting:
    """The blocks of one function, nested. `known`: what values of the function are in the copy."""

    def __init__(self, inliner: Inliner, blocks: dict[str, Block], known: dict[Value, Value]):
        self.inliner, self.blocks, self.known = inliner, blocks, known

    def add(self, label: str, join: str | None, ops: list[Op]) -> None:
        """Append block `label` and what follows it to `ops`, up to a return or a branch to `join`, which yields."""
        block = self.blocks[label]
        last = block.ops[-1]
        ops += self.inliner.copy(block.ops[:-1], self.known)
        operands = [self.known.get(v, v) for v in last.operands]
        if last.name == "cf.br":
            self.branch(last.attrs["targets"][0], operands, join, ops)
        elif last.name == "cf.cond_br":
            self.fork(last, operands, join, ops)
        else:
            ops.append(self.inliner.copy_op(last, self.known))

    def branch(self, target: str, operands: list[Value], join: str | None, ops: list[Op]) -> None:
        if target == join:
            ops.append(Op("scf.yield", operands))
            return
        self.known.update(zip(self.blocks[target].args, operands, strict=True))
        self.add(target, join, ops)

    def fork(self, last: Op, operands: list[Value], join: str | None, ops: list[Op]) -> None:
        yes, no = last.attrs["targets"]
        count = len(self.blocks[yes].args)
        meeting = self.meeting(yes, no, join)
        arms = []
        for target, passed in ((yes, operands[1 : 1 + count]), (no, operands[1 + count :])):
            arm: list[Op] = []
            self.branch(target, passed, meeting, arm)
            arms.append(Block(ops=arm))
        choice = Op("scf.if", operands[:1], blocks=arms, location=last.location)
        ops.append(choice)
        if meeting is None:
            return
        args = self.blocks[meeting].args
        choice.results = [self.inliner.value(arg, choice) for arg in args]
        if meeting == join:
            ops.append(Op("scf.yield", list(choice.results)))
            return
        self.known.update(zip(args, choice.results, strict=True))
        self.add(meeting, join, ops)

    def meeting(self, yes: str, no: str, join: str | None) -> str | None:
        """Where both branches go on together: every way from them leads there, or returns."""
        both = self.reached(yes) & self.reached(no)
        for label in self.in_order(both):
            if join is None or join not in self.reached(yes, label) | self.reached(no, label) or label == join:
                return label
        return join

    def reached(self, start: str, barrier: str | None = None) -> set[str]:
        """Labels on the ways from `start`, itself included, none of which goes through `barrier`."""
        found: set[str] = set()
        open_ = [] if start == barrier else [start]
        while open_:
            label = open_.pop()
            if label not in found:
                found.add(label)
                open_ += [t for t in self.blocks[label].ops[-1].attrs.get("targets", ()) if t != barrier]
        return found

    def in_order(self, labels: set[str]) -> list[str]:
        """Each label before those that it reaches."""
        return sorted(labels, key=lambda label: -len(self.reached(label)))
