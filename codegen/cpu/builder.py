"""Make ops, with names that no other value has: for rewrites of a function that is not numbered yet."""

from .ir import Block, Op, Type, Value


class Builder:
    """Makes ops at one place of the source; what it makes is in `ops`, in order, until `take` hands it over."""

    def __init__(self, body: Block):
        self.names = {value.name for value in body.values()}
        self.names |= {value.name for op in body.walk() for value in op.operands}
        self.location: tuple[str, int] | None = None
        self.ops: list[Op] = []

    def value(self, hint: str, type_: Type, op: Op | None = None) -> Value:
        name, count = hint, 1
        while name in self.names:
            count += 1
            name = f"{hint}_{count}"
        self.names.add(name)
        return Value(name, type_, op)

    def make(self, name: str, operands: list[Value], type_: Type, hint: str, **attrs: object) -> Value:
        op = Op(name, operands, attrs=attrs, location=self.location)
        op.results = [self.value(hint, type_, op)]
        self.ops.append(op)
        return op.result

    def constant(self, literal: str, type_: Type, hint: str) -> Value:
        return self.make("arith.constant", [], type_, hint, value=literal)

    def take(self) -> list[Op]:
        taken, self.ops = self.ops, []
        return taken


def replace_uses(body: Block, old: Value, new: Value, keep: Op | None = None) -> None:
    """Let every op but `keep` read `new` where it read `old`."""
    for op in body.walk():
        if op is not keep:
            op.operands = [new if operand is old else operand for operand in op.operands]
