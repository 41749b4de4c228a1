"""Divide the inputs of linears by a scale per channel, where the op before can take it into its weights.

    linear(norm(x, g), W)                        -->  linear(norm(x, g / s), W * s)
    linear(gated_linear(x, [gate; up]), W)       -->  linear(gated_linear(x, [gate; up / s]), W * s)
    linear(relu(linear(x, V)), W)                -->  linear(relu(linear(x, V / s)), W * s)
    linear(heads(attention(q, k, V x)), W)       -->  linear(heads(attention(q, k, V / s x)), W * s)

Rows of V are divided, and what is added to them; the function that the graph computes stays what it was. Heads that
share a V share its scales. Everything happens in the weights' recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...compiler.graph import Graph, sizes
from ...compiler.ops import OPS
from ...compiler.pattern import arguments
from ...compiler.rewrite import Miss
from ...compiler.weights import Cast, Constant, Multiply, Weight
from .sites import Site, find_sites

aten = torch.ops.aten
HOMOGENEOUS = ("none", "relu")
"""Activations with f(x / s) = f(x) / s for s > 0."""


@dataclass(frozen=True)
class Fold:
    """Linears that read one input, and the weights that produce it.

    sites: all that read `x`. sources: placeholders of weights whose rows from `start` on are divided by the scales.
    channels [K]: the row (less start) that channel k of x comes from; channels of one row have one scale.
    """

    x: fx.Node
    sites: tuple[Site, ...]
    sources: tuple[str, ...]
    start: int
    channels: Tensor

    def tied(self, scale: Tensor) -> Tensor:
        """scale [K] with its geometric mean over the channels that share a row."""
        rows = int(self.channels.max()) + 1
        total = torch.zeros(rows, dtype=scale.dtype).index_add_(0, self.channels, scale.log())
        count = torch.zeros(rows, dtype=scale.dtype).index_add_(0, self.channels, torch.ones_like(scale))
        return (total / count).exp()[self.channels]


def find_folds(graph: Graph) -> tuple[list[Fold], list[Miss]]:
    """The inputs of linears that can be scaled, in the order of the graph, and those that cannot, with the reason."""
    by_input: dict[fx.Node, list[Site]] = {}
    for site in find_sites(graph)[0]:
        by_input.setdefault(site.x, []).append(site)
    folds, misses = [], []
    for x, sites in by_input.items():
        found = fold_of(graph, x, tuple(sites))
        if isinstance(found, Fold):
            folds.append(found)
        else:
            misses.append(Miss.at(sites[0].node, "scale the input", found))
    return folds, misses


def fold_of(graph: Graph, x: fx.Node, sites: tuple[Site, ...]) -> Fold | str:
    """How the input `x` of `sites` can be scaled, or why it cannot."""
    linears = {site.node for site in sites}
    for user in x.users:
        if user not in linears or list(user.args).count(x) > 1:
            return f"{user.name} reads {x.name} too"
    for site in sites:
        if site.shared:
            return f"the weight {site.name} is used elsewhere too"
    for producer in (norm_rows, gated_rows, linear_rows, value_rows):
        found = producer(graph, x)
        if found is None:
            continue
        if isinstance(found, str):
            return found
        sources, start, channels = found
        for source in sources:
            if source not in graph.weights:
                return f"{source} is no weight but computed at run time"
            if len(graph.placeholder(source).users) > 1:
                return f"{source} is used elsewhere too"
        return Fold(x, sites, sources, start, channels)
    return f"{x.name} is neither a norm, nor a linear, nor an attention over one"


Rows = tuple[tuple[str, ...], int, Tensor]
"""Sources, first row and channels of a Fold."""


def norm_rows(graph: Graph, x: fx.Node) -> Rows | str | None:
    if x.target not in (OPS["rms_norm"].target, aten.layer_norm.default):
        return None
    given = arguments(x)
    scale, bias = given["weight"], given.get("bias")
    if scale is None:
        return f"the norm {x.name} has no scale"
    names = tuple(node.name for node in (scale, bias) if node is not None)
    return names, 0, torch.arange(int(sizes(x)[-1]))


def gated_rows(graph: Graph, x: fx.Node) -> Rows | str | None:
    if x.target != OPS["gated_linear"].target:
        return None
    size = int(sizes(x)[-1])
    return operands(x), size, torch.arange(size)


def linear_rows(graph: Graph, x: fx.Node) -> Rows | str | None:
    if x.target != OPS["linear"].target:
        return None
    given = arguments(x)
    if given["activation"] not in HOMOGENEOUS:
        return f"{given['activation']} stands between {x.name}'s weight and its output"
    if given["residual"] is not None:
        return f"{x.name} adds a residual"
    return operands(x), 0, torch.arange(int(sizes(x)[-1]))


def operands(linear: fx.Node) -> tuple[str, ...]:
    given = arguments(linear)
    return tuple(given[name].name for name in ("weight", "bias") if given[name] is not None)


def value_rows(graph: Graph, x: fx.Node) -> Rows | str | None:
    """x = reshape(permute(attention(q, k, v))) [.., S, H * D], v = permute(reshape(rows of a linear)) [.., G, S, D]."""
    chain = upwards(x, (aten.reshape.default, aten.permute.default))
    attention = chain[-1]
    if attention.target != OPS["attention"].target:
        return None
    if [tuple(node.args[1]) for node in chain[1:-1]] != [(0, 2, 1, 3)]:
        return f"the heads of {attention.name} are laid out otherwise"
    value = arguments(attention)["v"]
    path = upwards(value, (aten.permute.default, aten.reshape.default, aten.slice.Tensor))
    linear = path[-1]
    if [node.target for node in path[:2]] != [aten.permute.default, aten.reshape.default] or len(path) > 4:
        return f"the values of {attention.name} do not come straight from a linear"
    if tuple(path[0].args[1]) != (0, 2, 1, 3) or linear.target != OPS["linear"].target:
        return f"the values of {attention.name} do not come straight from a linear"
    for node in (*chain[1:], *path[:-1]):
        if len(node.users) > 1:
            return f"{node.name} is used elsewhere too"
    rows = linear_rows(graph, linear)
    if isinstance(rows, str):
        return rows
    (_, groups, _, size), heads = value.meta["val"].shape, attention.meta["val"].shape[1]
    start = 0
    if len(path) == 4:
        start = slice_of(path[2])[0]
        if reason := overlap(linear, path[2]):
            return reason
    elif len(linear.users) > 1:
        return f"{linear.name} is used elsewhere too"
    head = torch.arange(heads)[:, None] // (heads // groups)  # [H, 1] -> its value head
    return rows[0], start, (head * size + torch.arange(size)).flatten()


def upwards(node: fx.Node, targets: tuple[Callable, ...]) -> list[fx.Node]:
    """`node` and what it is made from, through calls of `targets`; the last is the first that calls something else."""
    chain = [node]
    while chain[-1].target in targets:
        chain.append(chain[-1].args[0])
    return chain


def slice_of(node: fx.Node) -> tuple[int, int]:
    """First and last row (exclusive) of a slice of the last axis."""
    given = arguments(node)
    start, stop, _ = slice(given["start"], given["end"]).indices(int(sizes(node.args[0])[-1]))
    return start, stop


def overlap(linear: fx.Node, part: fx.Node) -> str | None:
    """Why the rows of `part`, a slice of `linear`, are not its own; None if they are."""
    rank = len(sizes(linear))
    start, stop = slice_of(part)
    for user in linear.users:
        if user.target is not aten.slice.Tensor or arguments(user)["dim"] not in (rank - 1, -1):
            return f"{user.name} reads all of {linear.name}"
        first, last = slice_of(user)
        if user is not part and first < stop and start < last:
            return f"{user.name} reads rows of {part.name} too"
    return None


def apply_fold(graph: Graph, fold: Fold, scale: Tensor) -> None:
    """Divide the input of the fold's sites by scale [K] > 0, channels of one row alike, and multiply their columns."""
    for site in fold.sites:
        graph.weights[site.name] = multiplied(graph.weights[site.name], scale[None])
    rows = int(fold.channels.max()) + 1
    of_row = torch.ones(rows, dtype=scale.dtype)
    of_row[fold.channels] = 1 / scale
    for name in fold.sources:
        recipe = graph.weights[name]
        factor = torch.ones(recipe.shape[0], dtype=scale.dtype)
        factor[fold.start : fold.start + rows] = of_row
        graph.weights[name] = multiplied(recipe, factor.view(-1, *[1] * (len(recipe.shape) - 1)))


def multiplied(recipe: Weight, factor: Tensor) -> Weight:
    """recipe * factor in fp32 or wider, in the dtype of the recipe."""
    wide = torch.promote_types(recipe.dtype, torch.float32)
    product = Multiply(as_dtype(recipe, wide), Constant.of(factor.to(wide)))
    return as_dtype(product, recipe.dtype)


def as_dtype(recipe: Weight, dtype: torch.dtype) -> Weight:
    return recipe if recipe.dtype == dtype else Cast(recipe, dtype)
