"""Fuse rotary position embeddings.

    x * cos + cat(-x[..., R/2:], x[..., :R/2]) * sin            -->  rope(x, cos, sin)
    x * cos + reshape(stack(-x[..., 1::2], x[..., ::2])) * sin  -->  rope(x, cos, sin, interleaved=True)
    cat(a * cos - b * sin, b * cos + a * sin), a, b = halves    -->  rope(x, cat(cos, cos), cat(sin, sin))
    cat(rope(x[..., :R], cos, sin), x[..., R:])                 -->  rope(x, cos, sin)
    to(rope(to(x, fp32), cos, sin), dtype of x)                 -->  rope(x, cos, sin), with tables in fp32

x [B, H, S, D]; the tables [B or 1, S, R] are those that the model computes once for all layers.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, sizes
from ..compiler.ops import OPS
from ..compiler.pattern import any_, cast, closed, op, part, tensor
from ..compiler.rewrite import Match, PassResult, Rule, insert, rewrite
from .normalize import PERMUTE, to_one_permute

aten = torch.ops.aten
rope = OPS["rope"].target

X, COS, SIN = tensor("x"), tensor("cos"), tensor("sin")
AXIS, INTERLEAVED = any_("axis"), any_("interleaved")
FIRST, SECOND = part(X, "first"), part(X, "second")  # halves, or entries at even and at odd positions
TURNED = [op(aten.neg.default, SECOND), FIRST]
TURNED_HALVES = op(aten.cat.default, TURNED, AXIS)
TURNED_PAIRS = op(aten.reshape.default, op(aten.stack.default, TURNED, AXIS).named("stacked"), any_("sizes"))
TURN = TURNED_HALVES | TURNED_PAIRS
WHOLE = op(aten.add.Tensor, op(aten.mul.Tensor, X, COS), op(aten.mul.Tensor, TURN, SIN))
BY_HALVES = op(
    aten.cat.default,
    [
        op(aten.sub.Tensor, op(aten.mul.Tensor, FIRST, COS), op(aten.mul.Tensor, SECOND, SIN)),
        op(aten.add.Tensor, op(aten.mul.Tensor, SECOND, COS), op(aten.mul.Tensor, FIRST, SIN)),
    ],
    AXIS,
)
PARTIAL = op(aten.cat.default, [op(rope, part(X, "head"), COS, SIN, INTERLEAVED), part(X, "rest")], AXIS)
SWAP = [0, 2, 1, 3]
TURNED_BEHIND = op(
    aten.permute.default,
    op(rope, op(aten.permute.default, part(X, "head"), SWAP), COS, SIN, INTERLEAVED),
    SWAP,
)
PARTIAL_BEHIND = op(aten.cat.default, [TURNED_BEHIND, part(X, "rest")], AXIS)
NO_REST = op(aten.cat.default, [op(rope, X, COS, SIN, INTERLEAVED).named("rotated"), part(X, "rest")], AXIS)
IN_FP32 = closed(cast(op(rope, cast(X).named("wide"), COS, SIN, INTERLEAVED)))


def halves(match: Match) -> bool:
    size = match["first"].size
    return match["first"][:3] == (0, size // 2, 1) and match["second"][:3] == (size // 2, size, 1)


def pairs(match: Match) -> bool:
    size = match["first"].size
    return match["first"][:3] == (0, size, 2) and match["second"][:3] == (1, size, 2)


def heads_axis(x: fx.Node, table: fx.Node) -> int | None:
    """Which axis of x [B, ., ., D] counts the heads, as the table is broadcast along it; None if no axis is."""
    shape, wanted = sizes(table), sizes(x)
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1):
        candidates = (1,)
    elif len(shape) == 4:
        candidates = (table.args[1] % 4,) if table.target is aten.unsqueeze.default else (1, 2)
    else:
        return None
    shape = (sympy.Integer(1),) * (4 - len(shape)) + shape
    for axis in candidates:
        rows = shape[3 - axis] == wanted[3 - axis] and shape[0] in (sympy.Integer(1), wanted[0])
        if axis in (1, 2) and shape[axis] == 1 and rows:
            return axis
    return None


def table_of(graph: Graph, node: fx.Node, axis: int) -> fx.Node:
    """The table [B or 1, S, R] without the axis of the heads; one node for all that use it."""
    rank = node.meta["val"].ndim
    if rank == 4 and node.target is aten.unsqueeze.default and node.args[1] % 4 == axis:
        return node.args[0]
    if rank == 3:
        return node
    return (
        shared_call(graph, node, aten.squeeze.dim, axis)
        if rank == 4
        else shared_call(graph, node, aten.unsqueeze.default, 0)
    )


def twice(graph: Graph, table: fx.Node) -> fx.Node:
    """A table for half of the entries, repeated for the other half; one node for all that use it."""
    for user in table.users:
        if user.target is aten.cat.default and list(user.args[0]) == [table, table] and user is table.next:
            return user
    return insert(graph, table.next, aten.cat.default, [table, table], 2, origins=(table,))


def shared_call(graph: Graph, node: fx.Node, target: object, *args: object, **kwargs: object) -> fx.Node:
    """`target(node, ...)` right behind `node`, made once."""
    for user in node.users:
        if user.target is target and user.args == (node, *args) and user.kwargs == kwargs and user is node.next:
            return user
    return insert(graph, node.next, target, node, *args, origins=(node,), **kwargs)


def unfit(match: Match) -> str | None:
    """Why the operands are not those of `ops.rope`; None if they are."""
    x, cos, sin = match["x"], match["cos"], match["sin"]
    if x.meta["val"].ndim != 4:
        return f"the input has {x.meta['val'].ndim} dimensions, not [B, H, S, D]"
    if sizes(cos) != sizes(sin) or dtype_of(cos) != dtype_of(sin):
        return "cos and sin differ in shape or dtype"
    if heads_axis(x, cos) is None or heads_axis(x, sin) != heads_axis(x, cos):
        return f"the tables {list(map(str, sizes(cos)))} are not one row per position, equal for all heads"
    if dtype_of(match.root) != dtype_of(x):
        return f"the result is {dtype_of(match.root)}, the input {dtype_of(x)}"
    return None


def rotated(match: Match, interleaved: bool, repeat: bool = False) -> fx.Node:
    """The node that replaces a rotation, heads moved to where `ops.rope` has them."""
    x = match["x"]
    axis = heads_axis(x, match["cos"])
    tables = [table_of(match.graph, match[name], axis) for name in ("cos", "sin")]
    if repeat:
        tables = [twice(match.graph, table) for table in tables]
    if axis == 1:
        return match.call(rope, x, *tables, interleaved)
    turned = match.call(rope, match.call(aten.permute.default, x, SWAP), *tables, interleaved)
    return match.call(aten.permute.default, turned, SWAP)


def to_rope(match: Match) -> fx.Node | None:
    rank = match.value("x").ndim
    interleaved = "stacked" in match
    if not (pairs(match) if interleaved else halves(match)):
        return match.decline(f"it turns {tuple(match['first'])} and {tuple(match['second'])}, neither halves nor pairs")
    if match["axis"] % (rank + interleaved) != rank - 1 + interleaved:
        return match.decline(f"the parts are joined along dimension {match['axis']}, not the last")
    if reason := unfit(match):
        return match.decline(reason)
    if sizes(match["cos"])[-1] != sizes(match["x"])[-1]:
        return match.decline("the tables and the input differ in their last size")
    return rotated(match, interleaved)


def to_rope_by_halves(match: Match) -> fx.Node | None:
    if not halves(match) or match["axis"] % match.value("x").ndim != match.value("x").ndim - 1:
        return match.decline("the parts are not the two halves of the last axis")
    if reason := unfit(match):
        return match.decline(reason)
    if 2 * sizes(match["cos"])[-1] != sizes(match["x"])[-1]:
        return match.decline("the tables are not as long as half of the last axis")
    return rotated(match, False, repeat=True)


def out_of_order(match: Match) -> str | None:
    """Why the rotated head and the rest are not the whole last axis in order; None if they are."""
    head, rest = match["head"], match["rest"]
    if match["axis"] % 4 == 3 and head[:3] == (0, rest.start, 1) and rest[1:3] == (rest.size, 1):
        return None
    return f"the rotated {tuple(head)} and the rest {tuple(rest)} are not the axis in order"


def to_partial_rope(match: Match) -> fx.Node | None:
    if reason := out_of_order(match):
        return match.decline(reason)
    return match.call(rope, match["x"], match["cos"], match["sin"], match["interleaved"])


def to_partial_rope_behind(match: Match) -> fx.Node | None:
    """The same with the heads behind the positions: x [B, S, H, D]."""
    if reason := out_of_order(match):
        return match.decline(reason)
    x = match.call(aten.permute.default, match["x"], SWAP)
    turned = match.call(rope, x, match["cos"], match["sin"], match["interleaved"])
    return match.call(aten.permute.default, turned, SWAP)


def to_rope_alone(match: Match) -> fx.Node | None:
    return match["rotated"] if match["rest"].start == match["rest"].stop and match["axis"] % 4 == 3 else None


def to_rope_of_narrow(match: Match) -> fx.Node | None:
    """Tables in fp32 widen the products anyway, and the op rounds once at the end, as the casts do."""
    x, dtype = match["x"], dtype_of(match["x"])
    if dtype_of(match.root) != dtype:
        return match.decline(f"the result is {dtype_of(match.root)}, the input {dtype}")
    if dtype not in (torch.bfloat16, torch.float16) or dtype_of(match["wide"]) != torch.float32:
        return match.decline(f"it widens {dtype} to {dtype_of(match['wide'])}, not a 16-bit type to fp32")
    tables = [widened(match.graph, match[name]) for name in ("cos", "sin")]
    return match.call(rope, x, *tables, match["interleaved"])


def widened(graph: Graph, table: fx.Node) -> fx.Node:
    if dtype_of(table) == torch.float32:
        return table
    return shared_call(graph, table, aten._to_copy.default, dtype=torch.float32)


RULES = (
    Rule("rope", WHOLE | cast(WHOLE), to_rope),
    Rule("rope by halves", BY_HALVES | cast(BY_HALVES), to_rope_by_halves),
    Rule("partial rope", PARTIAL, to_partial_rope),
    Rule("partial rope, heads behind", PARTIAL_BEHIND, to_partial_rope_behind),
    Rule("permute", PERMUTE, to_one_permute),
    Rule("rope without rest", NO_REST, to_rope_alone),
    Rule("rope in fp32", IN_FP32, to_rope_of_narrow),
)


def fuse_rope(graph: Graph) -> PassResult:
    return rewrite(graph, RULES)
