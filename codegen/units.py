"""What is lowered at once: which nodes get memory, which are inlined into others, and which share a kernel."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, is_tensor, returns_tensors, sizes, writes
from . import quantized
from .domain import Domain
from .fusion_cost import MAX_INLINED, Decision, bytes_of, op_cost, recompute
from .pointwise_ops import SIMPLE, is_fusible
from .prologue import joins_product
from .reductions import REDUCTIONS, is_row_reduction, reduces_columns
from .scope import Scope, flat_domain, readers
from .table import TEMPLATES, WRITES
from .target import Target
from .views import SPLITS, is_view, view_source

aten, effc = torch.ops.aten, torch.ops.effc


@dataclass
class Unit:
    """What is lowered at once. stores: realized nodes of a pointwise kernel; node: anything else.

    unstored: those of the stores that nothing outside of the kernel reads.
    """

    node: fx.Node
    stores: list[fx.Node] = field(default_factory=list)
    domain: Domain | None = None
    unstored: set[fx.Node] = field(default_factory=set)


@dataclass(frozen=True)
class Inlined:
    """What computing a value again takes: the tensors that it reads, in bytes, operations an element, and nodes."""

    reads: dict[fx.Node, int]
    ops: int
    nodes: int


# --- what gets memory --------------------------------------------------------------------------------------------


class Plan:
    """Which nodes are units, and which are inlined into them. Holds the nodes that will lie in memory."""

    def __init__(self, graph: Graph, target: Target, realized: set[fx.Node], refused: dict[fx.Node, str]) -> None:
        self.graph, self.target, self.forced, self.refused = graph, target, realized, refused
        self.units: list[Unit] = []
        self.unit_of: dict[fx.Node, Unit] = {}
        self.written = written_inputs(graph)
        self.inlined: dict[fx.Node, Inlined] = {}
        self.decisions: list[Decision] = []
        for node in graph.nodes:
            if node.op != "call_function" or not returns_tensors(node) or is_view(node):
                continue
            if (node.target in SPLITS and node not in refused) or node.target is operator.getitem:
                continue
            if self.is_template(node):
                if not self.joins_write(node):
                    self.new_unit(Unit(node))
            elif self.is_pointwise(node):
                self.inlined[node] = self.inlining(node)
                if self.is_realized(node) and not self.joins_linear(node):
                    self.new_unit(Unit(node, [node], unit_domain(node)))
            else:
                self.refused.setdefault(node, f"{node.target} has no kernel")
                self.new_unit(Unit(node))

    def __contains__(self, node: fx.Node) -> bool:
        """Whether a node will lie in memory: inputs, units, and the results of ops with several."""
        if node.op == "placeholder" or node in self.unit_of:
            return True
        return node.target is operator.getitem and (not is_view(node) or node.args[0] in self.refused)

    def inlining(self, node: fx.Node) -> Inlined:
        """What it takes to compute a node from what lies in memory."""
        reads: dict[fx.Node, int] = {}
        lanes = max(bytes_of(x) // dtype_of(x).itemsize for x in (node, *row_inputs(node)))
        ops, nodes = op_cost(node.target), 1
        for argument in node.all_input_nodes:
            while is_view(argument) and argument not in self:
                argument = view_source(argument)
            if argument in self.inlined and argument not in self.unit_of:
                inner = self.inlined[argument]
                reads |= inner.reads
                ops, nodes = ops + inner.ops, nodes + inner.nodes
            elif is_tensor(argument):
                reads[argument] = min(bytes_of(argument), lanes * dtype_of(argument).itemsize)
        return Inlined(reads, ops, nodes)

    def new_unit(self, unit: Unit) -> None:
        self.units.append(unit)
        self.unit_of[unit.node] = unit

    def is_template(self, node: fx.Node) -> bool:
        return node not in self.refused and (node.target in TEMPLATES or node.target in WRITES)

    def is_pointwise(self, node: fx.Node) -> bool:
        return node not in self.refused and is_fusible(node)

    def joins_write(self, node: fx.Node) -> bool:
        """Whether a rope is computed by the kernel that writes its result to the cache."""
        users = list(node.users)
        return (
            node.target is effc.rope.default
            and len(users) == 1
            and (users[0].target is effc.kv_write.default and users[0] not in self.refused)
        )

    def joins_linear(self, node: fx.Node) -> bool:
        """Whether a norm is computed by the product that reads it: its input lies in memory anyway."""
        if node in self.forced or not joins_product(node) or next(iter(node.users)) in self.refused:
            return False
        source = Scope.base(node.args[0])
        return source in self and source not in self.written

    def is_written_by(self, write: fx.Node, node: fx.Node) -> bool:
        """Whether a write to a cache stores a node's value, which its kernel can compute then."""
        if write.target not in WRITES or write in self.refused:
            return False
        new, positions = WRITES[write.target].operands(write)
        return Scope.base(new) is node and (positions is None or Scope.base(positions) is not node)

    def is_realized(self, node: fx.Node) -> bool:
        """Whether a pointwise node lies in memory; a weight's values do not where who reads it takes its parts."""
        if node in self.forced:
            return True
        if not self.is_update(node) and any(Scope.base(x) in self.written for x in node.all_input_nodes):
            return True
        if is_empty(node) or reduces_columns(node):
            return True
        users = set(readers(node)) - self.part_readers(node)
        if any(not self.is_pointwise(user) and not self.is_written_by(user, node) for user in users):
            return True
        inlined = self.inlined[node]
        if inlined.nodes > MAX_INLINED:
            return True
        if len(users) <= 1:
            return False
        if node.target in REDUCTIONS:
            return True
        again, reason, saved = recompute(node, inlined.reads, inlined.ops, len(users), self.target)
        into = ", ".join(sorted(user.name for user in users))
        self.decisions.append(Decision(node.name, into, again, reason, saved))
        return not again

    def is_update(self, node: fx.Node) -> bool:
        """Whether a value is only stored where its first operand lies, element by element: x += y."""
        users = list(node.users)
        return (
            len(users) == 1
            and users[0].target is aten.copy_.default
            and users[0] not in self.refused
            and node.target in SIMPLE
            and users[0].args[0] is node.args[0]
            and sizes(node) == sizes(node.args[0])
            and not any(Scope.base(x) in self.written for x in node.all_input_nodes[1:])
        )

    def part_readers(self, node: fx.Node) -> set[fx.Node]:
        """Linears that read the parts of a quantized weight, not its values."""
        return set(quantized.readers(node, self.refused)) if node.target is effc.dequantize.default else set()

    @cached_property
    def readers_of(self) -> dict[fx.Node, set[fx.Node]]:
        """Unit -> the units that read it; what leaves the graph is read by its output."""
        found: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for unit in self.units:
            for source in self.sources(unit.node):
                found[source].add(unit.node)
        for node in self.graph.nodes:
            if node.op == "output":
                for source in self.sources(node):
                    found[source].add(node)
        return found

    def sources(self, node: fx.Node) -> set[fx.Node]:
        """The units and placeholders that a unit reads, through views and inlined nodes."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in self.unit_of or current.op == "placeholder":
                found.add(current)
            else:
                stack.extend(current.all_input_nodes)
        return found


def written_inputs(graph: Graph) -> set[fx.Node]:
    """Tensors that a call changes: what reads them before must not be computed behind the change."""
    return {Scope.base(node.args[0]) for node in graph.nodes if writes(node)}


def row_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a reduction runs over."""
    return (node.args[0],) if is_row_reduction(node) else ()


def unit_domain(node: fx.Node) -> Domain:
    """What the kernel of a realized node runs over: its own elements, or its input's if it reduces rows."""
    return flat_domain(node.args[0]) if is_row_reduction(node) else flat_domain(node)


def is_empty(node: fx.Node) -> bool:
    """Whether a tensor is known to have no elements: there is nothing to compute, and nothing to divide by."""
    return any(size == 0 for size in sizes(node))
