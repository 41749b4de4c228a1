"""Fold what a graph computes from weights alone into the weights' recipes.

    permute(W, [1, 0])  -->  a weight with the recipe Transpose(W)

The loader then does the work once, one tensor at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .graph import Graph, is_tensor
from .pattern import CASTS, arguments
from .rewrite import add_weight
from .weights import Add, Call, Cast, Concat, Constant, Multiply, Reshape, Slice, Weight, transposed

aten = torch.ops.aten

RESHAPES = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
COPIES = frozenset({aten.alias.default, aten.clone.default, aten.detach.default, aten.contiguous.default})
PERMUTES = frozenset({aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default})


def weight_of(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The weight placeholder that stands for `node`: itself, or a new one with what is computed folded in.

    None if the node depends on anything but weights, or uses an operation that recipes do not have.
    """
    if node.name in graph.weights:
        return node
    recipe = recipe_of(graph, node)
    if recipe is None:
        return None
    name = base_weights(graph, node)[0].name
    return add_weight(graph, f"{name}_{type(recipe).__name__.lower()}", recipe)


def base_weights(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """The weight placeholders that `node` is computed from."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop(0)
        if current.name in graph.weights:
            found[current] = None
        pending.extend(current.all_input_nodes)
    return list(found)


def used_elsewhere(base: fx.Node, node: fx.Node) -> bool:
    """Whether a weight has users besides the computation of `node`, or `node` itself more than one."""
    if base is node:
        return len(base.users) > 1
    inside, pending = {node}, [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in inside:
                inside.add(source)
                pending.append(source)
    pending = [base]
    while pending:
        for user in pending.pop().users:
            if user not in inside:
                return True
            if user is not node:
                pending.append(user)
    return False


def recipe_of(graph: Graph, node: fx.Node) -> Weight | None:
    """The recipe of a tensor that is computed from weights alone, exactly as eager computes it; else None."""
    if node.name in graph.weights:
        return graph.weights[node.name]
    if node.op != "call_function" or not is_tensor(node) or not static(node):
        return None
    value = node.meta["val"]
    if node.target in (aten.add.Tensor, aten.mul.Tensor):
        return elementwise(graph, node) or called(graph, node)
    if node.target is aten.cat.default:
        sources = [recipe_of(graph, source) for source in node.args[0]]
        if None in sources or len({source.dtype for source in sources}) > 1:
            return None
        return Concat(tuple(sources), arguments(node)["dim"])
    if not node.args or not isinstance(node.args[0], fx.Node):
        return called(graph, node)
    source = recipe_of(graph, node.args[0])
    if source is None:
        return None
    if node.target in CASTS:
        same_device = node.args[0].meta["val"].device == value.device
        return cast_to(source, value.dtype) if same_device else None
    if node.target in COPIES:
        return source
    if node.target in RESHAPES:
        return Reshape(source, tuple(value.shape))
    if node.target in PERMUTES:
        return transposed(source, permutation(node))
    if node.target is aten.slice.Tensor:
        return part_of(source, arguments(node))
    return called(graph, node)


def called(graph: Graph, node: fx.Node) -> Weight | None:
    """Any other function of weights (a head whose rows are normalized), where the result is no larger than they are."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    args = []
    for argument in node.target._schema.arguments:
        value = arguments(node)[argument.name]
        if isinstance(value, fx.Node):
            value = recipe_of(graph, value)
            if value is None:
                return None
        elif isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
            value = tuple(value)
        elif argument.kwarg_only and value == argument.default_value:
            continue
        elif argument.kwarg_only or not isinstance(value, int | float | str | None):
            return None
        args.append(value)
    value = node.meta["val"]
    recipe = Call(str(node.target), tuple(args), tuple(value.shape), value.dtype)
    return recipe if recipe.numel <= max((source.numel for source in recipe.inputs), default=0) else None


def static(node: fx.Node) -> bool:
    return all(isinstance(size, int) for size in node.meta["val"].shape)


def cast_to(source: Weight, dtype: torch.dtype) -> Weight:
    return source if source.dtype == dtype else Cast(source, dtype)


def permutation(node: fx.Node) -> tuple[int, ...]:
    rank = len(node.meta["val"].shape)
    if node.target is aten.permute.default:
        return tuple(dim % rank for dim in node.args[1])
    dims = list(range(rank))
    if node.target is aten.transpose.int:
        first, second = node.args[1:]
        dims[first], dims[second] = dims[second], dims[first]
        return tuple(dims)
    return tuple(reversed(dims))


def part_of(source: Weight, found: dict[str, Any]) -> Weight | None:
    dim = found["dim"] % len(source.shape)
    if isinstance(found["start"], fx.Node) or isinstance(found["end"], fx.Node):
        return None
    start, stop, step = slice(found["start"], found["end"], found["step"]).indices(source.shape[dim])
    return Slice(source, dim, start, max(start, stop)) if step == 1 else None


def elementwise(graph: Graph, node: fx.Node) -> Weight | None:
    """A sum or product of two weights, or of a weight and a number, where no rounding differs from eager's."""
    dtype = node.meta["val"].dtype
    if node.kwargs:
        return None
    sides = []
    for argument in node.args:
        if isinstance(argument, fx.Node):
            side = recipe_of(graph, argument)
        else:
            number = torch.tensor(argument, dtype=dtype)
            side = Constant.of(number) if number.item() == argument else None
        if side is None or side.dtype != dtype:
            return None
        sides.append(side)
    return Add(*sides) if node.target is aten.add.Tensor else Multiply(*sides)
