"""What a near-miss costs: bytes and launches per decoded token that the rewrite would have saved.

Sizes are those of one step of decoding: batch 1, one new token, 512 in the cache. A graph without a cache counts its
tokens twice where they meet each other: in a size that has S squared, one S is the new token and the other the 512.
Calls that compute element by element share a launch with their neighbours, views cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from .graph import Graph, is_tensor, is_view
from .vocabulary import nbytes, op_of, read_bytes

CONTEXT = 512
"""Tokens in the cache."""


@dataclass(frozen=True)
class Estimate:
    """What is lost per decoded token. share: the bytes as a part of all that a step moves, once that is known."""

    bytes: int
    launches: int
    share: float | None = None

    def __str__(self) -> str:
        if not self.bytes and not self.launches:
            return "about nothing"
        part = "" if self.share is None else f", {self.share:.1%} of the step"
        launches = "1 launch" if self.launches == 1 else f"{self.launches} launches"
        return f"about {readable(self.bytes)} and {launches} a token{part}"


def readable(count: int) -> str:
    for unit, size in (("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def per_token(expression: sympy.Expr) -> int:
    """A number of bytes in one step of decoding: the highest power of a runtime size is one token and its context."""
    total = sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(expression)):
        powers = term.as_powers_dict()
        degree = max((power for base, power in powers.items() if base.free_symbols and power.is_Integer), default=0)
        total += term.subs(dict.fromkeys(term.free_symbols, 1)) * CONTEXT ** max(int(degree) - 1, 0)
    return int(total)


def of_fusing(nodes: Iterable[fx.Node], root: fx.Node) -> Estimate:
    """What it costs that `nodes`, with the result `root`, are not one call: their values in between go to memory."""
    covered = {node for node in nodes if node.op == "call_function" and not is_free(node)}
    launches = sum(not is_pointwise(node) for node in covered) + any(map(is_pointwise, covered))
    total = 0
    for node in covered - {root}:
        readers = {user for user in users_behind_views(node) if user in covered}
        apart = [user for user in readers if not (is_pointwise(node) and is_pointwise(user))]
        if apart and is_tensor(node):
            total += (1 + len(apart)) * per_token(nbytes(node))
    return Estimate(total, max(launches - 1, 0))


def step_bytes(graph: Graph) -> int:
    """Bytes that one step of decoding moves through the calls of a graph, each weight once."""
    weights = sum(recipe.nbytes for recipe in graph.weights.values())
    values = [node for node in graph.nodes if node.op == "call_function" and is_tensor(node) and not is_free(node)]
    return weights + sum(2 * per_token(read_bytes(node)) for node in values)


def is_free(node: fx.Node) -> bool:
    """Whether a call only looks at memory in another way, parts of a quantized weight too, or computes a size."""
    if not is_tensor(node) or not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target is torch.ops.effc.dequantize.default or is_view(node)


def is_pointwise(node: fx.Node) -> bool:
    return op_of(node) is None and torch.Tag.pointwise in node.target.tags


def users_behind_views(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user.op == "call_function" and is_free(user):
            pending.extend(user.users)
        else:
            found.add(user)
    return found
