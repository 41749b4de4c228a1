"""Graphs as text that people read: one line per node, with shapes, weights' recipes and the model's source lines.

graph forward (traced), 151 nodes, 20 weights of 0.1 MB
input   input_ids: i64[B, S]
weight  model_norm_weight: f32[576] = read("model.norm.weight", float32[576])
embedding: f32[B, S, 576] = embedding(model_embed_tokens_weight, input_ids)  # modeling_llama.py:387: ...
return linear_14
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from .graph import Graph, is_tensor, size_expr
from .rewrite import source_line

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}

SIZE_NAMES = {("input_ids", 0): "B", ("input_ids", 1): "S", ("k_cache_0", 2): "T"}
"""The letters by which the sizes of these placeholders are known, where they are symbolic."""


def show(graph: Graph, source: bool = True) -> str:
    """The whole graph as text; without `source`, no lines of the model."""
    printer = Printer(graph)
    megabytes = sum(weight.nbytes for weight in graph.weights.values()) / 1e6
    calls = sum(node.op == "call_function" for node in graph.nodes)
    lines = [f"graph {graph.name} ({graph.dialect}), {calls} nodes, {len(graph.weights)} weights of {megabytes:.1f} MB"]
    lines += [f"note    {note}" for note in graph.notes]
    lines += [f"{role:7} {printer.placeholder(node, role)}" for node, role in placeholders(graph)]
    for node in graph.nodes:
        if node.op == "call_function":
            line = source_line(node) if source else ""
            lines.append(printer.call(node) + (f"  # {line}" if line else ""))
        elif node.op == "output":
            lines.append(f"return {printer.argument(node.args[0]).strip('()[]')}")
    return "\n".join(lines) + "\n"


def placeholders(graph: Graph) -> list[tuple[fx.Node, str]]:
    """Inputs, then states, then weights, each with its role."""

    def role(node: fx.Node) -> str:
        return "weight" if node.name in graph.weights else "state" if node.name in graph.states else "input"

    order = ("input", "state", "weight")
    return sorted(((node, role(node)) for node in graph.placeholders), key=lambda pair: order.index(pair[1]))


class Printer:
    """Spells nodes and values of one graph, with its sizes by their letters."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.letters: dict[sympy.Expr, sympy.Symbol] = {}
        for node in graph.placeholders:
            if is_tensor(node):
                for dim, size in enumerate(node.meta["val"].shape):
                    expression = size_expr(size)
                    letter = SIZE_NAMES.get((node.name, dim))
                    if letter and expression.is_Symbol:
                        self.letters.setdefault(expression, sympy.Symbol(letter))

    def placeholder(self, node: fx.Node, role: str) -> str:
        text = f"{node.name}: {self.value(node.meta['val'])}"
        return f"{text} = {self.graph.weights[node.name]}" if role == "weight" else text

    def call(self, node: fx.Node) -> str:
        args = [self.argument(argument) for argument in node.args]
        args += [f"{name}={self.argument(argument)}" for name, argument in node.kwargs.items()]
        name = self.argument(node)
        value = node.meta.get("val")
        kind = "" if isinstance(value, torch.SymInt) else f": {self.value(value)}"
        return f"{name}{kind} = {op_name(node)}({', '.join(args)})"

    def value(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            dtype = DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
            return f"{dtype}[{', '.join(self.size(size) for size in value.shape)}]"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(map(self.value, value))})"
        if isinstance(value, torch.SymInt):
            return f"size {self.size(value)}"
        return type(value).__name__

    def size(self, size: int | torch.SymInt) -> str:
        return str(size_expr(size).xreplace(self.letters))

    def argument(self, value: Any) -> str:
        """An argument as it would be written; a size by its letter, a node by its name."""
        if isinstance(value, fx.Node):
            number = value.meta.get("val")
            return self.size(number) if isinstance(number, torch.SymInt) else value.name
        if isinstance(value, list):
            return f"[{', '.join(map(self.argument, value))}]"
        if isinstance(value, tuple):
            return f"({', '.join(map(self.argument, value))})"
        if isinstance(value, torch.dtype):
            return DTYPES.get(value, str(value).removeprefix("torch."))
        if isinstance(value, (torch.device, torch.memory_format, torch.layout)):
            return str(value).removeprefix("torch.")
        return repr(value)


def op_name(node: fx.Node) -> str:
    """`linear` for aten.linear.default, `effc.linear` for our own, `getitem` for operators."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target)) if target is not operator.getitem else "getitem"


def count_ops(graph: Graph) -> Counter[str]:
    """How often each op is called."""
    return Counter(op_name(node) for node in graph.nodes if node.op == "call_function")


def differences(before: Graph | Mapping[str, int], after: Graph | Mapping[str, int]) -> dict[str, int]:
    """How many calls of each op came (positive) or went (negative); ops whose number did not change are left out."""
    old, new = (count_ops(ops) if isinstance(ops, Graph) else Counter(ops) for ops in (before, after))
    changes = {name: new[name] - old[name] for name in sorted({*old, *new})}
    return {name: change for name, change in sorted(changes.items(), key=lambda item: item[1]) if change}


def show_differences(changes: Mapping[str, int]) -> str:
    """`-5 pow, -5 rsqrt, +5 effc.rms_norm`, or `nothing`."""
    return ", ".join(f"{change:+} {name}" for name, change in changes.items()) or "nothing"
