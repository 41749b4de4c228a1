"""Random values for what a graph is given: sizes, inputs, states, and weights that no file is read for.

Sizes are small and differ where those of the traced example do. Integers count along their last axis, which suits
tokens, positions and slots of a cache; masks hide the second or third key, those of a model any but the first, so that
no query is left without keys.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .graph import Graph, size_expr
from .rewrite import fake_mode
from .weights import Cast, Constant, Read, Shape, Weight

Sizes = Mapping[sympy.Symbol, int]

SMALL_SIZES = (2, 5, 7, 11, 13, 17)
"""Sizes by their order in the example that was traced; what is larger than all of these keeps its size."""


def size_symbols(graph: Graph) -> list[sympy.Symbol]:
    """The runtime sizes of a graph, in the order of the placeholders that they occur in."""
    found: dict[sympy.Symbol, None] = {}
    for node in graph.placeholders:
        for expression in size_exprs(node.meta["val"]):
            found |= dict.fromkeys(sorted(expression.free_symbols, key=str))
    return list(found)


def size_exprs(value: Any) -> list[sympy.Expr]:
    if isinstance(value, Tensor):
        return [size_expr(size) for size in value.shape]
    return [size_expr(value)] if isinstance(value, torch.SymInt) else []


def traced_sizes(graph: Graph) -> dict[sympy.Symbol, int]:
    """The sizes of the example that the graph was traced with: they meet every condition that it was traced under."""
    found = {}
    for node in graph.placeholders:
        value = node.meta["val"]
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size_expr(size).is_Symbol:
                found[size_expr(size)] = int(size.node.hint)
    return {symbol: found[symbol] for symbol in size_symbols(graph) if symbol in found}


def small_sizes(graph: Graph) -> dict[sympy.Symbol, int]:
    """A small size for each symbol, within its bounds; sizes that are equal or in some order in the example stay so.

    (Dynamo gives keys and values of a cache two symbols, and nothing but their example says that they are one.)
    """
    ranges, traced = fake_mode(graph).shape_env.var_to_range, traced_sizes(graph)
    small = dict(zip(sorted(set(traced.values())), SMALL_SIZES))
    chosen = {}
    for symbol, example in traced.items():
        bounds = ranges.get(symbol)
        low, high = (bounds.lower, bounds.upper) if bounds is not None else (0, example)
        chosen[symbol] = int(min(max(small.get(example, example), low), high))
    return chosen


def shape_at(value: Tensor, sizes: Sizes) -> tuple[int, ...]:
    return tuple(int(size_expr(size).xreplace(dict(sizes))) for size in value.shape)


class Sampler:
    """Random values at given sizes; equal seeds and names give equal values.

    Also a `TensorSource` of the weights that recipes read, whatever file they come from.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.sizes, self.seed = dict(sizes), seed
        self.reads: dict[str, Read] = {}

    def inputs(self, graph: Graph, full: Iterable[str] = ()) -> dict[str, Any]:
        """A value for each input of a graph. full: masks that hide nothing."""
        values = {node.name: self.placeholder(node) for node in graph.placeholders if node.name in graph.inputs}
        return values | {name: torch.ones_like(values[name]) for name in full if name in values}

    def placeholder(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return int(size_expr(value).xreplace(self.sizes))
        if not isinstance(value, Tensor):
            return value.node.hint if isinstance(value, torch.SymFloat) else value
        shape = shape_at(value, self.sizes)
        if value.dtype.is_floating_point:
            return self.floats(node.name, shape, value.dtype)
        places = torch.arange(shape[-1] if shape else 1).expand(shape or (1,)).reshape(shape)
        if value.dtype == torch.bool or "mask" in node.name:
            hidden = 1 + torch.arange(shape[0]) % 2 if len(shape) > 1 else torch.ones(1)
            return (places != hidden.reshape(-1, *(1,) * (len(shape) - 1))).reshape(shape).to(value.dtype)
        return (places % token_limit(node)).to(value.dtype)

    def floats(self, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + zlib.crc32(name.encode()))
        if dtype == torch.bool:
            values = torch.randint(0, 2, shape, generator=generator).bool()
            values[..., :1] = True
            return values
        if not dtype.is_floating_point:
            return torch.randint(0, 100, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    # --- the source of weights ----------------------------------------------------------------------------------

    def learn(self, recipes: Iterable[Weight]) -> Sampler:
        """Be the source of what the recipes read."""
        for recipe in recipes:
            self.reads |= {read.name: read for read in reads_of(recipe)}
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.reads)

    def shape(self, name: str) -> Shape:
        return self.reads[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.reads[name].dtype

    def read(self, name: str) -> Tensor:
        """Weights of a size that keeps activations near one."""
        shape, dtype = self.shape(name), self.dtype(name)
        values = self.floats(name, shape, dtype)
        return values * shape[-1] ** -0.5 if len(shape) > 1 and dtype.is_floating_point else values


def reads_of(recipe: Weight) -> list[Read]:
    if isinstance(recipe, Read):
        return [recipe]
    return [read for part in recipe.inputs for read in reads_of(part)]


def widened(recipe: Weight) -> Weight:
    """A floating-point recipe computed in fp64 from what it reads; a cast to lower precision still rounds."""
    if not recipe.dtype.is_floating_point:
        return recipe
    if isinstance(recipe, Read):
        return Cast(recipe, torch.float64)
    if isinstance(recipe, Constant):
        return Constant.of(recipe.tensor.double())
    if isinstance(recipe, Cast):
        inner = widened(recipe.source)
        loses = recipe.dtype.itemsize < recipe.source.dtype.itemsize
        return Cast(Cast(inner, recipe.dtype), torch.float64) if loses else inner
    parts = {}
    for entry in fields(recipe):
        value = getattr(recipe, entry.name)
        if isinstance(value, Weight):
            parts[entry.name] = widened(value)
        elif isinstance(value, tuple) and any(isinstance(item, Weight) for item in value):
            parts[entry.name] = tuple(widened(item) if isinstance(item, Weight) else item for item in value)
        elif value == recipe.dtype:
            parts[entry.name] = torch.float64
    return replace(recipe, **parts)


def token_limit(node: fx.Node) -> int:
    """How many rows the tables have that an integer input looks things up in, as far as it does so directly."""
    rows = [
        int(user.args[0].meta["val"].shape[0])
        for user in node.users
        if user.target is torch.ops.aten.embedding.default and user.args[1] is node
    ]
    return min(rows, default=1 << 30)
