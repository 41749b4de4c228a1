"""What is lowered at once: which nodes get memory, which are inlined into others, and which share a kernel."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import networkx
import torch
from torch import fx

from ..compiler.graph import Graph, writes
from .pointwise import Domain
from .pointwise_ops import is_fusible
from .reductions import REDUCTIONS
from .scope import Scope, flat_domain, readers
from .table import TEMPLATES, WRITES
from .views import SPLITS, is_view

aten, effc = torch.ops.aten, torch.ops.effc

CHEAP = frozenset(
    {
        aten._to_copy.default,
        aten.to.dtype,
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.full.default,
        aten.clone.default,
        aten.neg.default,
        aten.bitwise_not.default,
        aten.logical_not.default,
    }
)
"""Ops that are computed again in each reader rather than stored."""


@dataclass
class Unit:
    """What is lowered at once. stores: realized nodes of a pointwise kernel; node: anything else."""

    order: int
    node: fx.Node
    stores: list[fx.Node] = field(default_factory=list)
    domain: Domain | None = None


# --- what gets memory --------------------------------------------------------------------------------------------


class Plan:
    """Which nodes are units, and which are inlined into them."""

    def __init__(self, graph: Graph, realized: set[fx.Node], refused: dict[fx.Node, str]) -> None:
        self.graph, self.forced, self.refused = graph, realized, refused
        self.units: list[Unit] = []
        self.unit_of: dict[fx.Node, Unit] = {}
        self.written = written_inputs(graph)
        for order, node in enumerate(graph.nodes):
            if node.op != "call_function" or not returns_tensors(node) or is_view(node):
                continue
            if (node.target in SPLITS and node not in refused) or node.target is operator.getitem:
                continue
            if self.is_template(node):
                if not self.joins_write(node):
                    self.new_unit(Unit(order, node))
            elif self.is_pointwise(node):
                if self.is_realized(node):
                    self.new_unit(Unit(order, node, [node], unit_domain(node)))
            else:
                self.refused.setdefault(node, f"{node.target} has no kernel")
                self.new_unit(Unit(order, node))

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

    def is_written_by(self, write: fx.Node, node: fx.Node) -> bool:
        """Whether a write to a cache stores a node's value, which its kernel can compute then."""
        if write.target not in WRITES or write in self.refused:
            return False
        new, positions = WRITES[write.target].operands(write)
        return Scope.base(new) is node and Scope.base(positions) is not node

    def is_realized(self, node: fx.Node) -> bool:
        if node in self.forced or any(argument in self.written for argument in node.all_input_nodes):
            return True
        users = readers(node)
        if any(not self.is_pointwise(user) and not self.is_written_by(user, node) for user in users):
            return True
        if len(set(users)) <= 1:
            return False
        return node.target not in CHEAP

    def inputs(self, node: fx.Node) -> set[fx.Node]:
        """The units whose results a unit reads, through views and inlined nodes."""
        return {source for source in self.sources(node) if source in self.unit_of}

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


def returns_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value)
    )


def unit_domain(node: fx.Node) -> Domain:
    """What the kernel of a realized node runs over: its own elements, or its input's if it reduces rows."""
    return flat_domain(node.args[0]) if node.target in REDUCTIONS else flat_domain(node)


# --- merging -----------------------------------------------------------------------------------------------------


def merge_units(plan: Plan) -> list[Unit]:
    """Merge pointwise units over one domain where no other unit lies between them; in topological order."""
    dependence = networkx.DiGraph()
    dependence.add_nodes_from(unit.node for unit in plan.units)
    for unit in plan.units:
        dependence.add_edges_from((source, unit.node) for source in plan.inputs(unit.node))
    dependence.add_edges_from(reads_before_writes(plan))
    for unit in plan.units:
        if not unit.stores or unit.node not in dependence:
            continue
        for other in plan.units:
            if other.order <= unit.order or not other.stores or other.node not in dependence:
                continue
            if other.domain == unit.domain and mergeable(dependence, unit.node, other.node):
                unit.stores.extend(other.stores)
                networkx.contracted_nodes(dependence, unit.node, other.node, self_loops=False, copy=False)
    order = {unit.node: unit.order for unit in plan.units}
    return [
        plan.unit_of[node] for node in networkx.lexicographical_topological_sort(dependence, key=lambda n: order[n])
    ]


def reads_before_writes(plan: Plan) -> Iterator[tuple[fx.Node, fx.Node]]:
    """A unit that reads an input before another one changes it has to run before that one."""
    sources = {unit.node: plan.sources(unit.node) for unit in plan.units}
    for write in plan.units:
        if writes(write.node):
            changed = Scope.base(write.node.args[0])
            for unit in plan.units:
                if unit.order < write.order and changed in sources[unit.node]:
                    yield unit.node, write.node


def mergeable(dependence: networkx.DiGraph, first: fx.Node, second: fx.Node) -> bool:
    """Neither reads the other, at once or through a third: values at other indices would not be there yet."""
    return not networkx.has_path(dependence, first, second) and not networkx.has_path(dependence, second, first)
