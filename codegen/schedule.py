"""Schedule a graph: decide which nodes share a kernel, in which order kernels run, and where tensors lie.

1. A node is *realized* (gets memory) if something other than a generated kernel reads it, or if computing it again in
   each of its readers would cost more than a load. Every other pointwise node is inlined into its readers.
2. Each realized pointwise node, each op with a template and each op without a kernel is one unit. Pointwise units
   over the same domain become one kernel where that pays (`grouping.py`, `fusion_cost.py`).
3. Units are lowered in topological order; small launches that do not depend on each other share one (`horizontal`).

Nodes that turn out to have no kernel are put aside with the reason, and the schedule is made again around them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, is_tensor, size_expr, sizes
from ..compiler.pattern import arguments
from ..compiler.weights import Read, Reshape, Transpose, Weight
from . import linear, quantized, rope
from .decompose import decompose
from .domain import NoKernel, Store
from .fusion_cost import Decision
from .grouping import group_units
from .horizontal import merge_launches
from .in_place import write_by_kernels
from .kernel import ZERO, Buffer, Fallback, Layout, Schedule, contiguous_strides
from .rounding import in_fp32
from .scope import Scope
from .table import TEMPLATES, WRITES
from .target import Target
from .units import Plan, Unit, is_empty
from .views import is_view, reshape_strides, view_layout, view_source

aten, effc = torch.ops.aten, torch.ops.effc


@dataclass
class Scheduled:
    """A schedule, what fills its weights, and what was decided about sharing kernels."""

    schedule: Schedule
    recipes: dict[str, Weight]
    scope: Scope
    decisions: tuple[Decision, ...] = ()


def schedule(graph: Graph, target: Target, pack: bool = True, rounding: str = "eager") -> Scheduled:
    """Lower a fused or stateful graph to launches. With `pack`, weights may be laid out for their kernels.

    rounding: of 16-bit values within a kernel: where eager rounds, or "fp32" (see `rounding.py`).
    """
    graph = decompose(write_by_kernels(graph))
    realized: set[fx.Node] = set()
    refused: dict[fx.Node, str] = {}
    while True:
        try:
            scheduled = attempt(graph, target, pack, realized, refused)
            if rounding == "fp32":
                scheduled.schedule.steps = list(map(in_fp32, scheduled.schedule.steps))
            return scheduled
        except Refusals as refusals:
            for refusal in refusals.found:
                if refusal.inlined and refusal.node not in realized:
                    realized.add(refusal.node)
                elif refusal.node not in refused:
                    refused[refusal.node] = refusal.reason
                else:
                    reason = f"{refusal.node} has neither a kernel nor a fallback: {refusal.reason}"
                    raise AssertionError(reason) from None


class Refusal(Exception):
    """A node cannot be lowered as planned: realize it if it was inlined, else run it through ATen."""

    def __init__(self, node: fx.Node, reason: str, inlined: bool) -> None:
        self.node, self.reason, self.inlined = node, reason, inlined


class Refusals(Exception):
    """All refusals of one attempt, one a node."""

    def __init__(self, found: Iterable[Refusal]) -> None:
        self.found = tuple(found)


def attempt(graph: Graph, target: Target, pack: bool, realized: set[fx.Node], refused: dict[fx.Node, str]) -> Scheduled:
    plan = Plan(graph, target, realized, refused)
    scope = Scope(graph, target, size_names(graph), refused)
    result = Schedule(graph.name, symbols=size_symbols(graph))
    place_placeholders(scope, result, pack)
    units, decisions = group_units(plan, target)
    lower_units(scope, plan, units)
    result.outputs = [scope.layout(node) for node in graph.outputs if is_tensor(node)]
    result.steps = merge_launches(scope.steps)
    return Scheduled(result, scope.recipes, scope, tuple(decisions))


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
    for node in graph.placeholders:  # an input that is a slice may have strides that no size tells
        if node.name in graph.weights or not is_tensor(node):
            continue
        strides = [size_expr(stride) for stride in node.meta["val"].stride()]
        for axis, stride in enumerate(strides):
            if stride.is_Symbol:
                found.setdefault(stride, (node.name, axis - len(strides)))
    return found


def size_names(graph: Graph) -> dict[sympy.Symbol, str]:
    """Names that kernels give to runtime sizes: B and S of the first input, T of a cache, n0, n1, ... for others."""
    names: dict[sympy.Symbol, str] = {}
    for symbol, (name, axis) in size_symbols(graph).items():
        is_size = axis is not None and axis >= 0
        wanted = "T" if name in graph.states else ("B", "S", "n")[min(axis, 2) if is_size else 2]
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
            if not pack:
                read_in_place(scope, node)
            elif block := panel_width(node, scope.target):
                scope.pack(node, block)
        else:
            result.inputs[node.name] = scope.layouts[node]
    for node in graph.nodes:
        if node.target is effc.dequantize.default:
            quantized.place_parts(scope, node)


def panel_width(weight: fx.Node, target: Target) -> int | None:
    """The panel width to pack a weight in, or None if one of its readers needs it row-major."""
    found = []
    for user in weight.users:
        rows = packed_rows(user, weight)
        if rows is not None:
            found.append(rows)
        elif not (user.target is aten.embedding.default and user.args[0] is weight):
            return None
    if not found or dtype_of(weight) not in linear.DTYPES:
        return None
    block = target.linear_large.n
    while block >= 16 and min(found) % block:
        block //= 2
    return block if block >= 16 else None


def packed_rows(user: fx.Node, weight: fx.Node) -> int | None:
    """How many rows of a weight its reader multiplies with at a time; None where that does not take panels."""
    named = arguments(user)
    gated = user.target is effc.gated_linear.default
    names = READ_IN_PANELS.get(user.target, ())
    if not any(named[name] is weight for name in names) or list(named.values()).count(weight) > 1:
        return None
    rows = int(sizes(weight)[-2])
    return rows // 2 if gated else rows


def read_in_place(scope: Scope, weight: fx.Node) -> None:
    """Where a weight is a stored tensor seen in another way, and its readers take strides, they read that tensor."""
    seen = strides_in_file(scope.recipes[weight.name])
    if seen is None:
        return
    stored, strides = seen
    layout = scope.layouts[weight]
    if strides == layout.strides or all(takes_strides(user, weight) for user in weight.users):
        scope.recipes[weight.name] = stored
        scope.layouts[weight] = replace(layout, strides=strides)


def strides_in_file(recipe: Weight) -> tuple[Read, tuple[sympy.Expr, ...]] | None:
    """The stored tensor that holds the numbers of a recipe, and their strides in it; None if it computes or joins."""
    if isinstance(recipe, Read):
        return recipe, contiguous_strides(tuple(map(sympy.Integer, recipe.shape)))
    if not isinstance(recipe, Transpose | Reshape) or (seen := strides_in_file(recipe.source)) is None:
        return None
    stored, strides = seen
    if isinstance(recipe, Transpose):
        return stored, tuple(strides[dim] for dim in recipe.dims)
    shapes = (tuple(map(sympy.Integer, shape)) for shape in (recipe.source.shape, recipe.shape))
    old, new = shapes
    found = reshape_strides(old, strides, new)
    return None if found is None else (stored, tuple(map(sympy.sympify, found)))


def takes_strides(user: fx.Node, weight: fx.Node) -> bool:
    named = arguments(user)
    places = [name for name, value in named.items() if value is weight]
    return user.target in (effc.experts.default, effc.moe.default) and places in (["up"], ["down"])


READ_IN_PANELS: dict[object, tuple[str, ...]] = {
    effc.linear.default: ("weight",),
    effc.gated_linear.default: ("weight",),
    effc.experts.default: ("up", "down"),
    effc.moe.default: ("router", "up", "down"),
}
"""Products, and the weights that they read row by row: in panels of rows too."""


# --- lowering ----------------------------------------------------------------------------------------------------


def lower_units(scope: Scope, plan: Plan, units: list[Unit]) -> None:
    """Lower unit by unit. After a refusal the rest is lowered too, for what else there is to refuse."""
    views = [node for node in scope.graph.nodes if is_view(node)]
    views_of: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for view in views:
        views_of[view_source(view)].append(view)
    refusals: dict[fx.Node, Refusal] = {}
    placed: set[fx.Node] = set()
    place_views(scope, views_of, placed)
    for unit in units:
        try:
            lower_unit(scope, plan, unit)
        except Refusal as refusal:
            refusals.setdefault(refusal.node, refusal)
            if unit.node not in scope.layouts and is_tensor(unit.node):
                scope.result(unit.node)
        place_views(scope, views_of, placed)
    if refusals:
        raise Refusals(refusals.values())


def lower_unit(scope: Scope, plan: Plan, unit: Unit) -> None:
    if unit.node in plan.refused:
        lower_fallback(scope, plan, unit.node)
    elif unit.stores:
        lower_pointwise(scope, plan, unit)
    else:
        lower_template(scope, plan, unit.node)


def place_views(scope: Scope, views_of: Mapping[fx.Node, list[fx.Node]], placed: set[fx.Node]) -> None:
    """Give every view of a tensor that is new in memory its layout, where strides can express it."""
    new = [node for node in scope.layouts if node not in placed]
    while new:
        source = new.pop()
        placed.add(source)
        layout = scope.layouts[source]
        for view in views_of.get(source, ()) if isinstance(layout, Layout) else ():
            if view not in scope.layouts and (found := view_layout(view, layout)) is not None:
                scope.layouts[view] = found
                new.append(view)


def lower_pointwise(scope: Scope, plan: Plan, unit: Unit) -> None:
    stores = [Store(node, None if node in unit.unstored else scope.result(node)) for node in unit.stores]
    if is_empty(unit.node):
        return
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
    """Store values where a write says; what comes straight from a rope is computed by the same kernel."""
    cache, write = node.args[0], WRITES[node.target]
    new, positions = write.operands(node)
    cache_layout = scope.layouts.get(cache)
    if not isinstance(cache_layout, Layout):
        raise NoKernel("the tensor that it writes to does not lie in memory")
    if plan.is_template(new) and plan.joins_write(new):
        try:
            rope.lower(scope, new, cache_layout, scope.layout(positions), arguments(node)["ring"])
        except NoKernel as problem:
            problem.node = problem.node or new
            raise
    elif not is_empty(new):
        slot = None if positions is None else write.slot(node, scope.layout(positions))
        if slot is not None and slot.axis == len(sizes(new)) - 1:
            raise NoKernel("a write along the last axis has no kernel")
        scope.add(scope.pointwise([Store(new, cache_layout, slot)], name=write.name))
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
        results.append(fallback_result(node.name, value))
        scope.layouts[node] = results[0]
    else:
        for position, part in enumerate(value):
            layout = fallback_result(f"{node.name}.{position}", part)
            results.append(layout)
            for user in node.users:
                if user.args[1] == position:
                    scope.layouts[user] = layout
    scope.add(Fallback(node, plan.refused[node], tuple(arguments), tuple(results)))


def fallback_result(name: str, value: torch.Tensor) -> Layout:
    shape = sizes(value)
    buffer = Buffer(name, sympy.prod(shape), value.dtype, "fallback")
    return Layout(buffer, ZERO, shape, contiguous_strides(shape))
