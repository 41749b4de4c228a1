"""Rewrite carried addresses into what they are: a start and a distance.

    for ...: x = load(p); p += step        -->    for ...: x = load(p0 + d); d += step

A tensor of pointers or integers that a loop only advances by the same amount everywhere needs no array, and its affine
form stays known.
"""

from .ir import Block, Function, Op, Type, Value


def normalize(function: Function) -> None:
    """Rewrite in place. The function must not be numbered yet."""
    names = {value.name for op in function.body.walk() for value in op.results}
    visit(function.body, names)


def visit(block: Block, names: set[str]) -> None:
    for op in list(block.ops):
        for inner in op.blocks:
            visit(inner, names)
        if op.name == "scf.for":
            for k in reversed(range(len(op.results))):
                advance(block, op, k, names)


def uniform_step(value: Value, arg: Value) -> Value | None:
    """The scalar, or the constant tensor, by which `value` is ahead of `arg`; None if it is not just that."""
    op = value.op
    if (
        op is None
        or op.name not in ("tt.addptr", "arith.addi")
        or not value.type.is_tensor
        or op.operands[0] is not arg
    ):
        return None
    step = op.operands[1].op
    if step is None or step.name not in ("tt.splat", "arith.constant"):
        return None
    return step.operands[0] if step.name == "tt.splat" else op.operands[1]


def advance(block: Block, loop: Op, k: int, names: set[str]) -> None:
    """Replace carried tensor k of `loop` by a scalar distance, if its yield only adds a uniform step."""
    body = loop.blocks[0]
    arg, result, init = body.args[k + 1], loop.results[k], loop.operands[k + 3]
    terminator = body.ops[-1]
    yielded = terminator.operands[k]
    step = uniform_step(yielded, arg)
    if step is None or arg.type.element not in ("ptr", "i32", "i64"):
        return
    scalar = Type(step.type.element)

    def value(hint: str, type_: Type, op: Op | None = None) -> Value:
        name, count = hint, 1
        while name in names:
            count += 1
            name = f"{hint}_{count}"
        names.add(name)
        made = Value(name, type_, op)
        if op is not None:
            op.results = [made]
        return made

    def make(name: str, operands: list[Value], type_: Type, hint: str, attrs: dict[str, object] | None = None) -> Op:
        op = Op(name, operands, attrs=attrs or {}, location=loop.location)
        value(hint, type_, op)
        return op

    literal = step.op.attrs["value"] if step.type.is_tensor else None
    zero = make("arith.constant", [], scalar, f"{arg.name}_start", {"value": "0"})
    distance = value(f"{arg.name}_distance", scalar)
    add = yielded.op.name
    wide = Type(scalar.element, arg.type.shape)
    spread = make("tt.splat", [distance], wide, f"{arg.name}_ahead")
    moved = make(add, [init, spread.result], arg.type, f"{arg.name}_now")
    before: list[Op] = []
    if literal is not None:
        constant = make("arith.constant", [], scalar, f"{arg.name}_step", {"value": literal})
        before, step = [constant], constant.result
    following = make("arith.addi", [distance, step], scalar, f"{arg.name}_next")
    end = value(f"{result.name}_distance", scalar, None)
    end.op = loop
    spread_end = make("tt.splat", [end], wide, f"{result.name}_ahead")
    last = make(add, [init, spread_end.result], result.type, f"{result.name}_end")
    block.ops.insert(block.ops.index(loop), zero)
    at = block.ops.index(loop) + 1
    block.ops[at:at] = [spread_end, last]
    body.args[k + 1], loop.results[k], loop.operands[k + 3] = distance, end, zero.result
    terminator.operands[k] = following.result
    body.ops[-1:] = [*before, following, terminator]
    body.ops[0:0] = [spread, moved]
    replace(body, arg, moved.result, keep=moved)
    replace(block, result, last.result, keep=last)


def replace(block: Block, old: Value, new: Value, keep: Op) -> None:
    for op in block.walk():
        if op is not keep:
            op.operands = [new if operand is old else operand for operand in op.operands]
