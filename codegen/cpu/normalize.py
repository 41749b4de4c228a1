"""Rewrites before anything is decided: each to fewer kinds of things that later steps must know.

    for ...: x = load(p); p += step        -->    for ...: x = load(p0 + d); d += step

A tensor of pointers or integers that a loop only advances by the same amount everywhere needs no array, and its affine
form stays known.

    dot(a, b, c): f16                      -->    truncf(dot(a, b, extf(c)): f32)
    dot_scaled(a, s, b, t, c)              -->    dot(a * 2^(s - 127), b * 2^(t - 127), c)   (`scaled`)
    dot(a, bytes of w, c)                  -->    dot(a, w, c), of words                     (`byte_words`)
"""

from .builder import Builder, replace_uses
from .byte_words import multiply_words
from .ir import Block, Function, Op, Type, Value
from .scaled import unscale


def normalize(function: Function) -> None:
    """Rewrite in place. The function must not be numbered yet."""
    builder = Builder(function.body)
    visit(function.body, builder, function.body)
    multiply_words(function.body)


def visit(block: Block, builder: Builder, body: Block) -> None:
    for op in list(block.ops):
        builder.location = op.location
        for inner in op.blocks:
            visit(inner, builder, body)
        if op.name == "scf.for":
            for k in reversed(range(len(op.results))):
                advance(block, op, k, builder)
        elif op.name == "tt.dot" and op.result.type.element == "f16":
            widen(block, op, builder, body)
        elif op.name == "tt.dot_scaled":
            unscale(block, op, builder, body)


def widen(block: Block, dot: Op, builder: Builder, body: Block) -> None:
    """Accumulate in f32 and round once."""
    c, result = dot.operands[2], dot.result
    wide = Type("f32", result.type.shape)
    before = builder.make("arith.extf", [c], wide, f"{c.name}_wide")
    ops = builder.take()
    total = builder.value(f"{result.name}_wide", wide, dot)
    rounded = builder.make("arith.truncf", [total], result.type, f"{result.name}_rounded")
    replace_uses(body, result, rounded)
    dot.operands[2], dot.results = before, [total]
    at = block.ops.index(dot)
    block.ops[at : at + 1] = [*ops, dot, *builder.take()]


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


def advance(block: Block, loop: Op, k: int, builder: Builder) -> None:
    """Replace carried tensor k of `loop` by a scalar distance, if its yield only adds a uniform step."""
    body = loop.blocks[0]
    arg, result, init = body.args[k + 1], loop.results[k], loop.operands[k + 3]
    terminator = body.ops[-1]
    yielded = terminator.operands[k]
    step = uniform_step(yielded, arg)
    if step is None or arg.type.element not in ("ptr", "i32", "i64"):
        return
    element = "i64" if arg.type.element == "ptr" else step.type.element  # distances of pointers may pass 32 bits
    scalar, wide = Type(element), Type(element, arg.type.shape)
    add = yielded.op.name
    zero = builder.constant("0", scalar, f"{arg.name}_start")
    before = builder.take()
    distance = builder.value(f"{arg.name}_distance", scalar)
    spread = builder.make("tt.splat", [distance], wide, f"{arg.name}_ahead")
    moved = builder.make(add, [init, spread], arg.type, f"{arg.name}_now")
    inside = builder.take()
    if step.type.is_tensor:
        step = builder.constant(step.op.attrs["value"], scalar, f"{arg.name}_step")
    elif step.type != scalar:
        step = builder.make("arith.extsi", [step], scalar, f"{arg.name}_step")
    following = builder.make("arith.addi", [distance, step], scalar, f"{arg.name}_next")
    body.ops[-1:] = [*builder.take(), terminator]
    end = builder.value(f"{result.name}_distance", scalar, loop)
    spread = builder.make("tt.splat", [end], wide, f"{result.name}_ahead")
    last = builder.make(add, [init, spread], result.type, f"{result.name}_end")
    at = block.ops.index(loop)
    block.ops[at : at + 1] = [*before, loop, *builder.take()]
    body.args[k + 1], loop.results[k], loop.operands[k + 3] = distance, end, zero
    terminator.operands[k] = following
    body.ops[0:0] = inside
    replace_uses(body, arg, moved, keep=moved.op)
    replace_uses(block, result, last, keep=last.op)
