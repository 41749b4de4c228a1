"""Branches that model code takes on the values of its inputs, such as "is this text longer than the original length".

    if torch.max(position_ids) + 1 > 64: ...              -->  the branch of short texts, and a largest length of 64
    where(torch.max(position_ids) + 1 > 64, long, short)  -->  short, and the same

A trace follows the branch that its example takes; the exporter leaves an assertion of what that branch assumed. For
texts without padding, whose positions count from 0, the assumption is a condition on the length alone. Here it becomes
the largest length that a graph holds for; a branch that does not depend on the length in this way is refused.

A `where` on one such condition holds both branches. No cache can: a text that grows past the length would change the
keys of its first tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .errors import ModelError
from .graph import Graph, size_expr
from .rewrite import replace, source_line
from .weights import Constant

aten = torch.ops.aten

LONGEST = 2**20
"""An assumption that holds for this many tokens is taken to hold for all."""

READS = frozenset({aten.item.default, aten._local_scalar_dense.default})


def bound_by_branches(graph: Graph, positions: dict[str, Any]) -> None:
    """Turn what branches assumed into `graph.max_length`; the assertions, and what only they need, go.

    positions: input -> a function from a length to its tensor for one row without padding, for those of the inputs
    that a branch may depend on. Raises ModelError where an assumption cannot be evaluated, or not even one token
    meets it.
    """
    assertions = [node for node in graph.nodes if node.target == aten._assert_scalar.default and reads_values(node)]
    choices = {node: found for node in graph.nodes if (found := choice_by_length(graph, node, positions)) is not None}
    limits = {node: longest_text(graph, node, positions) for node in (*assertions, *choices)}
    tightest = min(limits, key=limits.__getitem__, default=None)
    if tightest is not None and limits[tightest] < LONGEST:
        graph.limit_length(limits[tightest], f"longer ones take another branch at {source_line(tightest)}")
    for node, chosen in choices.items():
        replace(graph, node, chosen)
    for node in reversed(list(graph.nodes)):
        if node in assertions or (reads_values(node) and not node.users):
            graph.fx.erase_node(node)


def choice_by_length(graph: Graph, node: fx.Node, positions: dict[str, Any]) -> fx.Node | None:
    """What one `where` of whole tensors gives for a text of one token, if its condition is one on the length."""
    if node.target != aten.where.self or node.args[0].meta["val"].ndim or node.args[0].op == "placeholder":
        return None
    try:
        chosen = node.args[1 if holds(graph, node, positions, 1) else 2]
    except ModelError:  # it depends on something else, and stays what it is
        return None
    same = chosen.meta["val"].shape == node.meta["val"].shape and chosen.meta["val"].dtype == node.meta["val"].dtype
    return chosen if same else None


def reads_values(node: fx.Node) -> bool:
    """Whether a scalar is, or is computed from, an element of a tensor."""
    if node.target in READS:
        return True
    return any(reads_values(source) for source in node.all_input_nodes if not is_tensor_or_input(source))


def is_tensor_or_input(node: fx.Node) -> bool:
    return node.op != "call_function" or isinstance(node.meta.get("val"), torch.Tensor)


def longest_text(graph: Graph, node: fx.Node, positions: dict[str, Any]) -> int:
    """The largest length up to which an assertion holds, or a `where` chooses what it does for one token."""

    def same_branch(length: int) -> bool:
        return holds(graph, node, positions, length) == (node.target != aten.where.self or first)

    first = holds(graph, node, positions, 1)
    if not same_branch(1):
        raise refused(node, "one token alone takes another branch than the example")
    low, high = 1, 2
    while high <= LONGEST and same_branch(high):
        low, high = high, 2 * high
    if high > LONGEST:
        return LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if same_branch(middle) else (low, middle)
    return low


def holds(graph: Graph, assertion: fx.Node, positions: dict[str, Any], length: int) -> bool:
    """Whether the condition of an assertion is true for one row of `length` tokens."""
    known: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node not in known:
            known[node] = compute(node)
        return known[node]

    def compute(node: fx.Node) -> Any:
        found = node.meta.get("val")
        if node.op == "placeholder":
            if node.name in positions:
                return positions[node.name](length)
            if isinstance(graph.weights.get(node.name), Constant):
                return graph.weights[node.name].tensor
        elif isinstance(found, torch.SymInt) and not reads_values(node):
            return size_of(node)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
            return node.target(*args, **kwargs)
        raise refused(assertion, f"it depends on {node.name}")

    def size_of(node: fx.Node) -> int:
        """A size in terms of the length: of one row, of `length` tokens."""
        expr = size_expr(node)
        for name in positions:
            rows, tokens = (size_expr(size) for size in graph.placeholder(name).meta["val"].shape)
            expr = expr.subs({rows: 1, tokens: length})
        if not expr.is_Integer:
            raise refused(assertion, f"it depends on the size {expr}")
        return int(expr)

    return bool(value(assertion.args[0]))


def refused(node: fx.Node, reason: str) -> ModelError:
    return ModelError(f"a branch on values at {source_line(node)} cannot be followed for every length: {reason}")
