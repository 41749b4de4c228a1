"""Check that a graph is what its dialect says: well-formed, legal, and true to every op's shape rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException

from .errors import EffcError
from .graph import DIALECTS, Graph, size_expr, writes
from .ops import LEGAL, op_of
from .rewrite import infer, source_line


class VerificationError(EffcError):
    """A pass left a graph that breaks a rule: names the node, its op, what was expected and what was found."""


def verify(graph: Graph) -> None:
    """Raise VerificationError at the first node that breaks a rule.

    Checked: fx's own lint; only placeholders, calls and one output; placeholders with roles that fit them; effc ops
    that `ops.LEGAL` allows in the dialect, no other op that mutates anything but an input; shape and dtype of every
    node as its op's shape rule gives them for its arguments. A node whose op, arguments and value are those of its
    last verification is not derived again, so verifying after every pass costs what the pass changed.
    """
    if graph.dialect not in DIALECTS:
        raise VerificationError(f"graph {graph.name}: expected a dialect of {DIALECTS}, found {graph.dialect!r}")
    graph.fx.lint()
    check_roles(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            check_legal(graph, node)
            check_value(graph, node)
        elif node.op not in ("placeholder", "output"):
            raise broken(graph, node, "a placeholder, a call of a function or the output", node.op)


def check_roles(graph: Graph) -> None:
    names = {node.name for node in graph.placeholders}
    for name in (*graph.weights, *graph.states):
        if name not in names:
            raise VerificationError(f"graph {graph.name}: expected a placeholder for {name!r}, found none")
    for node in graph.placeholders:
        if "val" not in node.meta:
            raise broken(graph, node, "a value in meta['val']", "none")
        if node.name in graph.weights:
            recipe = graph.weights[node.name]
            expected = describe(node.meta["val"])
            found = f"{recipe.dtype}{list(recipe.shape)}".removeprefix("torch.")
            if expected != found:
                raise broken(graph, node, f"a recipe for {expected}", found)


def check_legal(graph: Graph, node: fx.Node) -> None:
    op = op_of(node)
    if op is not None:
        if op.name not in LEGAL[graph.dialect]:
            legal = ", ".join(sorted(LEGAL[graph.dialect])) or "no effc op"
            raise broken(graph, node, f"in the {graph.dialect} dialect {legal}", f"effc.{op.name}")
        if op.mutates and not is_version(node.args[0]):
            raise broken(graph, node, "a state to write to", node.args[0].name)
    elif writes(node) and not is_version(node.args[0]):
        raise broken(graph, node, "an op that mutates nothing but an input", str(node.target))


def is_version(value: Any) -> bool:
    """Whether a write may go there: a placeholder, or what an earlier write to one returned."""
    if not isinstance(value, fx.Node):
        return False
    return value.op == "placeholder" or (writes(value) and is_version(value.args[0]))


def check_value(graph: Graph, node: fx.Node) -> None:
    recorded = node.meta.get("val")
    facts = [node.target, recorded, *values_of((node.args, node.kwargs))]
    if has_unbacked_sizes(recorded) or same_facts(facts, node.meta.get(CHECKED, ())):
        return
    try:
        derived = infer(graph, node.target, node.args, node.kwargs)
    except DataDependentOutputException:  # only the values of its arguments tell its sizes
        return
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise broken(graph, node, "arguments that its shape rule accepts", reason) from error
    if recorded is None and derived is not None:
        raise broken(graph, node, f"{describe(derived)} in meta['val']", "nothing")
    if not agree(recorded, derived):
        raise broken(graph, node, f"{describe(derived)} by its shape rule", describe(recorded))
    node.meta[CHECKED] = facts


CHECKED = "verified"
"""Key of a node's meta: what was true of it when its value was last derived."""


def values_of(argument: Any) -> Iterator[Any]:
    """What a shape rule sees of arguments: the values of nodes, and everything else as it is, one after another."""
    if isinstance(argument, fx.Node):
        yield argument.meta.get("val")
    elif isinstance(argument, (list, tuple)):
        yield len(argument)
        for item in argument:
            yield from values_of(item)
    elif isinstance(argument, dict):
        for key, item in argument.items():
            yield key
            yield from values_of(item)
    else:
        yield argument


def same_facts(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether all are the same objects, or equal plain values of one type."""
    plain = (int, float, bool, str)
    return len(left) == len(right) and all(
        a is b or (type(a) is type(b) and isinstance(a, plain) and a == b) for a, b in zip(left, right)
    )


def agree(recorded: Any, derived: Any) -> bool:
    """Whether two values have the same type, sizes, dtype and device (strides are nobody's business)."""
    if isinstance(recorded, (list, tuple)) and isinstance(derived, (list, tuple)):
        return len(recorded) == len(derived) and all(map(agree, recorded, derived))
    if isinstance(recorded, torch.Tensor) and isinstance(derived, torch.Tensor):
        return (
            recorded.dtype == derived.dtype
            and recorded.device == derived.device
            and recorded.ndim == derived.ndim
            and all(map(same_size, recorded.shape, derived.shape))
        )
    if isinstance(recorded, (int, torch.SymInt)) and isinstance(derived, (int, torch.SymInt)):
        return same_size(recorded, derived)
    return type(recorded) is type(derived)


def same_size(left: Any, right: Any) -> bool:
    left, right = size_expr(left), size_expr(right)
    return left == right or (left - right).simplify() == 0


def has_unbacked_sizes(value: Any) -> bool:
    """Whether a size depends on data (the number of nonzero elements): each derivation makes a new symbol."""
    if isinstance(value, (list, tuple)):
        return any(map(has_unbacked_sizes, value))
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) and not size.node.has_hint() for size in sizes)


def describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{[str(size) if not isinstance(size, int) else size for size in value.shape]}".replace(
            "'", ""
        ).removeprefix("torch.")
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(describe, value))})"
    return str(value)


def broken(graph: Graph, node: fx.Node, expected: str, found: str) -> VerificationError:
    op = node.op if node.op != "call_function" else str(node.target)
    line = source_line(node)
    where = f"graph {graph.name}, node {node.name} ({op})" + (f" from {line}" if line else "")
    return VerificationError(f"{where}: expected {expected}, found {found}")
