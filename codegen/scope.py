"""What is known while a graph is lowered: where each tensor lies, and the launches so far."""

from __future__ import annotations

import math
from collections.abc import Container

import sympy
import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, sizes, writes
from ..compiler.weights import Pack, Reshape, Weight
from .domain import Domain, Store
from .kernel import ZERO, Buffer, Choice, Launch, Layout, Packed, PackedWords, Rounded, Step, contiguous_strides
from .pointwise import RowKernel
from .target import Target
from .views import SPLITS, is_view, view_source

ONE = sympy.Integer(1)


class Scope:
    """The state of one lowering.

    layouts: node -> where it lies (for nodes in memory only). recipes: weight placeholder -> the recipe that fills
    its buffer. steps: what has been lowered. names: runtime size -> the name that kernels give it. rounded: where
    activations lie that are kept as codes.
    """

    def __init__(
        self, graph: Graph, target: Target, names: dict[sympy.Symbol, str], refused: Container[fx.Node]
    ) -> None:
        self.graph, self.target, self.names, self.refused = graph, target, names, refused
        self.layouts: dict[fx.Node, Layout | Packed | PackedWords] = {}
        self.recipes: dict[str, Weight] = {}
        self.steps: list[Step] = []
        self.copies: dict[fx.Node, Layout] = {}
        self.rounded: dict[fx.Node, Rounded] = {}
        self.written = {self.base(node.args[0]) for node in graph.nodes if writes(node)}
        self.outputs = {
            seen
            for node in graph.outputs
            if isinstance(node, fx.Node)
            for seen in (node, self.base(node), self.memory(node))
        }

    @staticmethod
    def base(node: fx.Node) -> fx.Node:
        while is_view(node):
            node = view_source(node)
        return node

    @staticmethod
    def memory(node: fx.Node) -> fx.Node:
        """The tensor whose memory holds a value: what a view looks at, and what a write returns."""
        while is_view(node) or writes(node):
            node = view_source(node) if is_view(node) else node.args[0]
        return node

    # --- memory ------------------------------------------------------------------------------------------------

    def temporary(self, name: str, elements: sympy.Expr, dtype: torch.dtype) -> Buffer:
        return Buffer(name, elements, dtype, "temporary")

    def result(self, node: fx.Node, order: tuple[sympy.Expr, ...] | None = None) -> Layout:
        """A new buffer for a node's value, contiguous in its own sizes, or in `order` (the caller permutes)."""
        shape = sizes(node) if order is None else order
        buffer = Buffer(node.name, sympy.prod(shape), dtype_of(node), self.kind(node))
        layout = Layout(buffer, ZERO, shape, contiguous_strides(shape))
        if order is None:
            self.layouts[node] = layout
        return layout

    def layout(self, node: fx.Node) -> Layout:
        """Where a tensor lies; a view that strides cannot express is copied."""
        if node not in self.layouts:
            return self.copy(node)
        layout = self.layouts[node]
        return layout if isinstance(layout, Layout) else self.copy(node)

    def kind(self, node: fx.Node) -> str:
        """Whether a result leaves the run, is shared with an op that runs through ATen, or is only in the arena."""
        if node in self.outputs:
            return "output"
        found = readers(node)
        for reader in found:  # what a write to it returns lies there too
            if writes(reader) and self.memory(reader) is node:
                found.extend(readers(reader))
        return "shared" if any(reader in self.refused for reader in found) else "temporary"

    def rows(self, node: fx.Node) -> Layout:
        """The layout of a tensor whose last axis is contiguous, copied if it is not."""
        layout = self.layout(node)
        return layout if layout.strides[-1] == 1 or layout.sizes[-1] == 1 else self.copy(node)

    def contiguous(self, node: fx.Node) -> Layout:
        layout = self.layout(node)
        wanted = contiguous_strides(layout.sizes)
        if all(size == 1 or a == b for size, a, b in zip(layout.sizes, layout.strides, wanted)):
            return layout
        return self.copy(node)

    def copy(self, node: fx.Node) -> Layout:
        """A contiguous copy of a tensor, made by a pointwise kernel; one for all that read what nothing writes to."""
        if node in self.copies:
            return self.copies[node]
        shape = sizes(node)
        name = f"{node.name}.copy{len(self.steps)}"
        buffer = Buffer(name, sympy.prod(shape), dtype_of(node), self.kind(node))
        layout = Layout(buffer, ZERO, shape, contiguous_strides(shape))
        if not any(size == 0 for size in shape):
            self.add(self.pointwise([Store(node, layout)], name="copy"))
        if self.base(node) not in self.written:
            self.copies[node] = layout
        return layout

    def weight(self, node: fx.Node) -> Layout | Packed:
        layout = self.layouts.get(node)
        return (
            layout
            if layout is not None
            and layout.buffer.kind == "weight"
            and (isinstance(layout, Packed) or layout.is_contiguous)
            else self.contiguous(node)
        )

    def pack(self, node: fx.Node, block: int) -> None:
        """Lay a weight [N, K], or [E, N, K] as [E * N, K], out in panels of `block` rows."""
        recipe = self.recipes[node.name]
        *rows, depth = recipe.shape
        matrix = recipe if len(rows) == 1 else Reshape(recipe, (math.prod(rows), depth))
        recipe = Pack(matrix, block)
        self.recipes[node.name] = recipe
        elements = sympy.Integer(recipe.numel)
        shape = tuple(map(sympy.Integer, matrix.shape))
        self.layouts[node] = Packed(Buffer(node.name, elements, dtype_of(node), "weight"), shape, block)

    # --- launches ----------------------------------------------------------------------------------------------

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def choose(self, cases: list[tuple[sympy.Basic, tuple[Launch, ...]]]) -> None:
        """Add the first case that can hold; conditions that the sizes already decide leave no choice."""
        possible = []
        for condition, launches in cases:
            if condition == sympy.false:
                continue
            possible.append((condition, launches))
            if condition == sympy.true:
                break
        if len(possible) == 1:
            self.steps.extend(possible[0][1])
        else:
            self.add(Choice(tuple(possible)))

    def pointwise(self, stores: list[Store], domain: Domain | None = None, name: str | None = None) -> Launch:
        """One kernel that makes the values of `stores`; raises NoKernel or Misaligned."""
        domain = domain or flat_domain(stores[0].node)
        kernel = RowKernel(domain, self.layouts, stores, self.names)
        return kernel.launch(name or kernel_name(stores))


def flat_domain(node: fx.Node) -> Domain:
    shape = sizes(node)
    return Domain(shape[:-1], shape[-1]) if shape else Domain((), ONE)


def kernel_name(stores: list[Store]) -> str:
    """The kernel is named after the ops that it computes, the last ones if they are many."""
    ops = []
    for store in stores:
        target = store.node.target
        op = target._schema.name.split("::")[1] if hasattr(target, "_schema") else "copy"
        ops.append(op.strip("_"))
    return "_".join(dict.fromkeys(ops[-3:]))


def readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, seen through views."""
    found: list[fx.Node] = []
    for user in node.users:
        found.extend(readers(user) if is_view(user) or user.target in SPLITS else [user])
    return found
