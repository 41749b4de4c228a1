"""Schedule a graph: decide which nodes share a kernel, in which order kernels run, and where tensors lie.

1. A node is *realized* (gets memory) if something other than a generated kernel reads it, or if computing it again in
   each of its readers would cost more than a load. Every other pointwise node is inlined into its readers.
2. Each realized pointwise node, each op with a template and each op without a kernel is one unit of a dependence
   graph. Pointwise units over the same domain merge where that makes no cycle.
3. Units are lowered in topological order.

A node that turns out to have no kernel is put aside with the reason, and the schedule is made again around it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx
import sympy
import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, is_tensor, size_expr, sizes
from ..compiler.ops import OPS
from ..compiler.weights import Weight
from . import attention, linear, rope
from .kernel import ZERO, Buffer, Fallback, Layout, Schedule, contiguous_strides
from .pointwise import EMITTERS, Domain, NoKernel, Slot, Store
from .pointwise_ops import is_fusible
from .reductions import REDUCTIONS
from .scope import Scope, flat_domain, readers
from .target import Target
from .views import SPLITS, is_view, view_layout, view_source

aten, effc = torch.ops.aten, torch.ops.effc

TEMPLATES: dict[Any, Callable[[Scope, fx.Node], None]] = {
    effc.linear.default: linear.lower,
    effc.gated_linear.default: linear.lower,
    effc.attention.default: attention.lower,
    effc.cached_attention.default: attention.lower,
    effc.rope.default: rope.lower,
}
"""Ops with a kernel of their own; `pointwise.EMITTERS` has the others."""


@dataclass(frozen=True)
class Write:
    """How a kernel writes to a cache. operands: (new values, positions) of a node; slot: where they land."""

    operands: Callable[[fx.Node], tuple[fx.Node, fx.Node]]
    slot: Callable[[fx.Node, Layout], Slot]


WRITES: dict[Any, Write] = {
    effc.kv_write.default: Write(
        lambda node: (node.args[1], node.args[2]),
        lambda node, positions: Slot(axis=2, positions=positions, by=0, adds=True),
    ),
    aten.index_copy_.default: Write(
        lambda node: (node.args[3], node.args[2]),
        lambda node, positions: Slot(
            axis=node.args[1] % len(sizes(node)), positions=positions, by=node.args[1] % len(sizes(node)), adds=False
        ),
    ),
}
"""Writes in place: effc's own, and the one that Hugging Face's static cache is made of."""

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


@dataclass
class Scheduled:
    """A schedule and what fills its weights."""

    schedule: Schedule
    recipes: dict[str, Weight]
    scope: Scope


def schedule(graph: Graph, target: Target, pack: bool = True) -> Scheduled:
    """Lower a fused or stateful graph to launches. With `pack`, weights may be laid out for their kernels."""
    realized: set[fx.Node] = set()
    refused: dict[fx.Node, str] = {}
    while True:
        try:
            return attempt(graph, target, pack, realized, refused)
        except Refusal as refusal:
            if refusal.inlined and refusal.node not in realized:
                realized.add(refusal.node)
            elif refusal.node not in refused:
                refused[refusal.node] = refusal.reason
            else:
                raise AssertionError(f"{refusal.node} has neither a kernel nor a fallback: {refusal.reason}") from None


class Refusal(Exception):
    """A node cannot be lowered as planned: realize it if it was inlined, else run it through ATen."""

    def __init__(self, node: fx.Node, reason: str, inlined: bool) -> None:
        self.node, self.reason, self.inlined = node, reason, inlined


def attempt(graph: Graph, target: Target, pack: bool, realized: set[fx.Node], refused: dict[fx.Node, str]) -> Scheduled:
    plan = Plan(graph, realized, refused)
    scope = Scope(graph, target, size_names(graph), refused)
    result = Schedule(graph.name, symbols=size_symbols(graph))
    place_placeholders(scope, result, pack)
    lower_units(scope, plan, merge_units(plan))
    result.steps = scope.steps
    result.outputs = [scope.layout(node) for node in graph.outputs]
    return Scheduled(result, scope.recipes, scope)


# --- sizes and placeholders --------------------------------------------------------------------------------------


def size_symbols(graph: Graph) -> dict[sympy.Symbol, tuple[str, int | None]]:
    """Which input's axis tells each runtime size; no axis where the input is the size itself."""
    found: dict[sympy.Symbol, tuple[str, int | None]] = {}
    for node in graph.placeholders:
        if isinstance(node.meta.get("val"), torch.SymInt) and size_expr(node).is_Symbol:
            found.setdefault(size_expr(node), (node.name, None))
    for node in graph.placeholders:
        if node.name in graph.weights or not is_tensor(node):
            continue
        for axis, size in enumerate(sizes(node)):
            if size.is_Symbol:
                found.setdefault(size, (node.name, axis))
    return found


def size_names(graph: Graph) -> dict[sympy.Symbol, str]:
    """Names that kernels give to runtime sizes: B and S of the first input, T of a cache, n0, n1, ... for others."""
    names: dict[sympy.Symbol, str] = {}
    for symbol, (name, axis) in size_symbols(graph).items():
        wanted = "T" if name in graph.states else ("B", "S", "n")[min(axis, 2) if axis is not None else 2]
        while wanted in names.values():
            wanted = f"n{len(names)}"
        names[symbol] = wanted
    return names


def place_placeholders(scope: Scope, result: Schedule, pack: bool) -> None:
    graph = scope.graph
    for node in graph.placeholders:
        if not is_tensor(node):
            continue
        shape = sizes(node)
        kind = "weight" if node.name in graph.weights else "state" if node.name in graph.states else "input"
        buffer = Buffer(node.name, sympy.prod(shape), dtype_of(node), kind)
        strides = tuple(size_expr(stride) for stride in node.meta["val"].stride())
        scope.layouts[node] = Layout(buffer, ZERO, shape, contiguous_strides(shape) if kind == "weight" else strides)
        if kind == "weight":
            scope.recipes[node.name] = graph.weights[node.name]
            if pack and (block := panel_width(node, scope.target)):
                scope.pack(node, block)
        else:
            result.inputs[node.name] = scope.layouts[node]


def panel_width(weight: fx.Node, target: Target) -> int | None:
    """The panel width to pack a weight in, or None if one of its readers needs it row-major."""
    linears = {effc.linear.default, effc.gated_linear.default}
    users = list(weight.users)
    if not any(user.target in linears for user in users) or dtype_of(weight) not in linear.DTYPES:
        return None
    for user in users:
        reads_weight = user.target in linears and user.args[1] is weight and user.args[0] is not weight
        reads_table = user.target is aten.embedding.default and user.args[0] is weight
        if not (reads_weight or reads_table):
            return None
    rows = int(sizes(weight)[0])
    if any(user.target is effc.gated_linear.default for user in users):
        rows //= 2
    block = target.linear_large.n
    while block >= 16 and rows % block:
        block //= 2
    return block if block >= 16 else None


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


def writes_in_place(node: fx.Node) -> bool:
    """Whether a call changes its first argument."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.arguments:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def written_inputs(graph: Graph) -> set[fx.Node]:
    """Tensors that a call changes: what reads them before must not be computed behind the change."""
    return {Scope.base(node.args[0]) for node in graph.nodes if writes_in_place(node)}


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
    for write in plan.units:
        if not writes_in_place(write.node):
            continue
        changed = Scope.base(write.node.args[0])
        for unit in plan.units:
            if unit.order < write.order and any(changed in plan.sources(node) for node in unit.stores or [unit.node]):
                yield unit.node, write.node


def mergeable(dependence: networkx.DiGraph, first: fx.Node, second: fx.Node) -> bool:
    """Neither reads the other, at once or through a third: values at other indices would not be there yet."""
    return not networkx.has_path(dependence, first, second) and not networkx.has_path(dependence, second, first)


# --- lowering ----------------------------------------------------------------------------------------------------


def lower_units(scope: Scope, plan: Plan, units: list[Unit]) -> None:
    place_views(scope)
    for unit in units:
        if unit.node in plan.refused:
            lower_fallback(scope, plan, unit.node)
        elif unit.stores:
            lower_pointwise(scope, plan, unit)
        else:
            lower_template(scope, plan, unit.node)
        place_views(scope)


def place_views(scope: Scope) -> None:
    """Give every view of a tensor in memory its layout, where strides can express it."""
    for node in scope.graph.nodes:
        if is_view(node) and node not in scope.layouts:
            source = scope.layouts.get(view_source(node))
            layout = view_layout(node, source) if isinstance(source, Layout) else None
            if layout is not None:
                scope.layouts[node] = layout


def lower_pointwise(scope: Scope, plan: Plan, unit: Unit) -> None:
    stores = [Store(node, scope.result(node)) for node in unit.stores]
    try:
        scope.add(scope.pointwise(stores, unit.domain))
    except NoKernel as problem:
        culprit = problem.node or unit.node
        raise Refusal(culprit, str(problem), inlined=culprit not in plan.unit_of) from None


def lower_template(scope: Scope, plan: Plan, node: fx.Node) -> None:
    try:
        if node.target in WRITES:
            lower_write(scope, plan, node)
        else:
            TEMPLATES[node.target](scope, node)
    except NoKernel as problem:
        culprit = problem.node or node
        raise Refusal(culprit, str(problem), inlined=plan.is_pointwise(culprit)) from None


def lower_write(scope: Scope, plan: Plan, node: fx.Node) -> None:
    """Store new keys or values into a cache; what comes straight from a rope is computed by the same kernel."""
    cache, write = node.args[0], WRITES[node.target]
    new, positions = write.operands(node)
    cache_layout = scope.layouts.get(cache)
    if not isinstance(cache_layout, Layout):
        raise NoKernel("the tensor that it writes to does not lie in memory")
    if plan.is_template(new) and plan.joins_write(new):
        try:
            rope.lower(scope, new, cache_layout, scope.layout(positions))
        except NoKernel as problem:
            problem.node = problem.node or new
            raise
    else:
        slot = write.slot(node, scope.layout(positions))
        if slot.axis == len(sizes(new)) - 1:
            raise NoKernel("a write along the last axis has no kernel")
        scope.add(scope.pointwise([Store(new, cache_layout, slot)], name="write_to_cache"))
    scope.layouts[node] = cache_layout


def lower_fallback(scope: Scope, plan: Plan, node: fx.Node) -> None:
    """Run a node through ATen: its tensor arguments must lie in memory, its results get buffers of their own."""
    arguments = []
    for argument in node.all_input_nodes:
        if is_tensor(argument):
            if argument not in scope.layouts and argument.op == "call_function" and not is_view(argument):
                raise Refusal(argument, "an op without a kernel reads it", inlined=True)
            arguments.append(scope.layout(argument))
    value = node.meta["val"]
    results = []
    if isinstance(value, torch.Tensor):
        results.append(fallback_result(scope, node, node.name, value))
        scope.layouts[node] = results[0]
    else:
        for position, part in enumerate(value):
            layout = fallback_result(scope, node, f"{node.name}_{position}", part)
            results.append(layout)
            for user in node.users:
                if user.args[1] == position:
                    scope.layouts[user] = layout
    scope.add(Fallback(node, plan.refused[node], tuple(arguments), tuple(results)))


def fallback_result(scope: Scope, node: fx.Node, name: str, value: torch.Tensor) -> Layout:
    shape = sizes(value)
    buffer = Buffer(name, sympy.prod(shape), value.dtype, "fallback")
    return Layout(buffer, ZERO, shape, contiguous_strides(shape))


def has_kernel(op: str) -> bool:
    """Whether an op of the vocabulary has a kernel; a test holds that each has."""
    target = OPS[op].target
    return target in TEMPLATES or target in EMITTERS or target in WRITES
