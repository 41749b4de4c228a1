"""The graph that every stage reads and writes: a `torch.fx` graph whose placeholders have roles.

A graph holds no tensors of its own. Each placeholder is an *input* (given at every call), a *weight* (a lazy
recipe, see `weights.py`) or a *state* (a KV cache buffer that a run updates in place). Every node carries its
shape and dtype as a fake tensor in `node.meta["val"]`; sizes may be symbolic.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from .weights import Weight, substitute

DIALECTS = ("traced", "fused", "stateful")


@dataclass
class Graph:
    """One fx graph with the roles of its placeholders.

    name: "forward", "prefill", "extend" or "decode" (or what torch.compile calls it).
    dialect: which of `DIALECTS` its operations come from; `verify` holds it.
    weights: placeholder name -> recipe. states: names of the placeholders that a run updates in place.
    notes: what passes want a reader to know (near-misses, refusals), in order.
    rings: state -> (kept, window) where slots are used in turn: the first tokens that it keeps, and a window of others.
    max_length: the most tokens per row that the graph computes rightly, where the model bounds them.
    files: what stands for the names that the recipes read, over the tensors of the model's file; empty where the names
    are the file's own.
    """

    module: fx.GraphModule
    name: str = "forward"
    dialect: str = "traced"
    weights: dict[str, Weight] = field(default_factory=dict)
    states: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    rings: dict[str, tuple[int, int]] = field(default_factory=dict)
    max_length: int | None = None
    files: Mapping[str, Weight] = field(default_factory=dict, repr=False)

    @property
    def fx(self) -> fx.Graph:
        return self.module.graph

    @property
    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.module.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.nodes if node.op == "placeholder"]

    @property
    def inputs(self) -> list[str]:
        """Names of the placeholders that a caller fills at every call, in order."""
        return [
            node.name for node in self.placeholders if node.name not in self.weights and node.name not in self.states
        ]

    @property
    def outputs(self) -> list[fx.Node]:
        (output,) = (node for node in self.nodes if node.op == "output")
        return list(output.args[0])

    def placeholder(self, name: str) -> fx.Node:
        for node in self.placeholders:
            if node.name == name:
                return node
        raise KeyError(f"graph {self.name!r} has no placeholder {name!r}")

    def stored_as(self, weight: fx.Node) -> Weight:
        """The recipe of a weight over the tensors of the model's file."""
        return substitute(self.weights[weight.name], self.files)

    def limit_length(self, length: int, reason: str) -> None:
        """Bound the tokens per row, and say why."""
        if self.max_length is None or length < self.max_length:
            self.max_length = length
        note = f"texts may have at most {length} tokens: {reason}"
        if note not in self.notes:
            self.notes.append(note)

    def copy(self, **changes: Any) -> Graph:
        """A copy whose nodes can be rewritten without touching this graph. Fake tensors and recipes are shared."""
        nodes = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = nodes.graph_copy(self.fx, mapping)
        nodes.output(output)
        for old, new in mapping.items():
            new.meta = copy.copy(old.meta)
        module = fx.GraphModule(torch.nn.Module(), nodes)
        duplicate = replace(
            self, module=module, weights=dict(self.weights), notes=list(self.notes), rings=dict(self.rings)
        )
        return replace(duplicate, **changes)

    def __str__(self) -> str:
        from .show import show

        return show(self)

    def count(self, target: Any) -> int:
        return sum(node.op == "call_function" and node.target == target for node in self.nodes)


def sizes(value: Any) -> tuple[sympy.Expr, ...]:
    """The shape of a node or fake tensor as sympy expressions; symbols are the graph's runtime sizes."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return tuple(size_expr(dim) for dim in value.shape)


def size_expr(dim: Any) -> sympy.Expr:
    """A size (int, SymInt, or a node that computes one) as a sympy expression."""
    if isinstance(dim, fx.Node):
        dim = dim.meta["val"]
    if isinstance(dim, torch.SymInt):
        return dim.node.expr
    return sympy.Integer(operator.index(dim))


def dtype_of(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def returns_tensors(node: fx.Node) -> bool:
    """Whether a call gives a tensor, or several."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value)
    )


def writes(node: fx.Node) -> bool:
    """Whether a call updates one of its arguments in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_view(node: fx.Node) -> bool:
    """Whether the result of a call may lie in the memory of its first argument, which it does not change."""
    if not isinstance(node.target, torch._ops.OpOverload) or not is_tensor(next(iter(node.args), None)):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def is_output(node: fx.Node) -> bool:
    """Whether the caller gets the value of the node."""
    return any(user.op == "output" for user in node.users)
