"""Graphs of small functions whose sizes are symbolic, and their inputs."""

from __future__ import annotations

import torch
from effc.compiler.graph import Graph
from effc.compiler.weights import Constant
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

LOWEST = torch.finfo(torch.float32).min
SEED = 3


def graph_of(function, *inputs: Tensor, symbolic: bool = True, **buffers: Tensor) -> Graph:
    """The graph of a function of small tensors: inputs a, b, c, whose sizes are symbolic or not, and buffers."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kind = DimDynamic.DYNAMIC if symbolic else DimDynamic.STATIC
    fakes = [
        mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[kind] * x.ndim)) for x in inputs
    ]
    fakes += [mode.from_tensor(x, static_shapes=True) for x in buffers.values()]
    with mode:
        graph = Graph(make_fx(lambda *args: tuple_of(function(*args)), pre_dispatch=True)(*fakes))
    for node, name in zip(graph.placeholders, (*"abc"[: len(inputs)], *buffers)):
        node._rename(name)
        node.target = node.name
    graph.weights |= {name: Constant.of(tensor) for name, tensor in buffers.items()}
    return graph


def numbers(*shape: int, low: int = 0, high: int = 2) -> Tensor:
    print(f"seed {SEED}")
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(SEED))


def tuple_of(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
