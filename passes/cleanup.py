"""Merge equal computations and drop what nothing uses.

a = cos(x); b = cos(x); f(a, b)  -->  a = cos(x); f(a, a)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..compiler.graph import Graph, is_output, writes
from ..compiler.rewrite import PassResult, erase_unused


def cleanup(graph: Graph) -> PassResult:
    """Equal calls become one; unused calls and weights go."""
    return PassResult(merge_equal_weights(graph) + merge_equal_calls(graph) + erase_dead_code(graph))


def merge_equal_calls(graph: Graph) -> int:
    """Common subexpression elimination over calls without side effects; how many calls went.

    Two outputs stay two: the caller may write to one of them.
    """
    first: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_pure(node):
            continue
        earlier = first.setdefault(call_key(node), node)
        if earlier is not node and not (is_output(earlier) and is_output(node)):
            node.replace_all_uses_with(earlier)
            graph.fx.erase_node(node)
            merged += 1
    return merged


def merge_equal_weights(graph: Graph) -> int:
    """Weights with one recipe become one placeholder; how many placeholders went."""
    first: dict[Any, fx.Node] = {}
    merged = 0
    for node in graph.placeholders:
        if node.name in graph.weights:
            earlier = first.setdefault(graph.weights[node.name], node)
            if earlier is not node:
                node.replace_all_uses_with(earlier)
                merged += erase_unused(graph, node)
    return merged


def erase_dead_code(graph: Graph) -> int:
    """Erase calls that nothing uses and that change nothing, users before inputs; how many nodes went."""
    return erase_unused(graph, *graph.nodes)


def is_pure(node: fx.Node) -> bool:
    """Whether equal calls give equal results: no mutation, no random numbers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return not writes(node) and torch.Tag.nondeterministic_seeded not in node.target.tags


def call_key(node: fx.Node) -> Any:
    return (node.target, hashable(node.args), hashable(node.kwargs))


def hashable(value: Any) -> Any:
    """A dictionary key for an argument; numbers of different types (1, 1.0, True) stay apart."""
    if isinstance(value, (list, tuple)):
        return tuple(map(hashable, value))
    if isinstance(value, dict):
        return tuple(sorted((key, hashable(item)) for key, item in value.items()))
    if isinstance(value, slice):
        return (slice, hashable((value.start, value.stop, value.step)))
    if isinstance(value, (bool, int, float)):
        return (type(value), repr(value))
    return value
