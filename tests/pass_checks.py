"""What every pass test does: make a graph from a small module, run the pass, check the four claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from effc.compiler import interpret
from effc.compiler.graph import Graph
from effc.compiler.rewrite import PassResult
from effc.compiler.sources import ModuleSource
from effc.compiler.trace import trace
from effc.compiler.verify import verify
from effc.compiler.weights import Read
from effc.passes.normalize import normalize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

SEED = 20
B, S = 2, 5


def example(*shape: int, dtype: torch.dtype = torch.float32, seed: int = SEED) -> Tensor:
    print(f"input seed {seed}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def randomize(module: nn.Module, seed: int = SEED) -> nn.Module:
    """Every parameter drawn anew, norm scales included, so that a lost weight shows."""
    print(f"weight seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5)
    return module.eval()


def graph_of(module: nn.Module, *inputs: Tensor, normalized: bool = True) -> Graph:
    """The (normalized) graph of a module: inputs x, y, z, the first two sizes of those of rank 3 or more symbolic."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for x in inputs:
        free = min(2, x.ndim) if x.ndim >= 3 else 0
        sizes = [DimDynamic.DYNAMIC] * free + [DimDynamic.STATIC] * (x.ndim - free)
        fakes.append(mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    parameters = {name: mode.from_tensor(tensor.detach(), static_shapes=True) for name, tensor in tensors.items()}

    def call(parameters: dict[str, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        result = torch.func.functional_call(module, parameters, inputs)
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad(), mode:
        traced = make_fx(call, pre_dispatch=True)(parameters, *fakes)
    graph = Graph(traced)
    for node, name in zip(graph.placeholders, (*tensors, *"xyz")):
        node._rename(name.replace(".", "_"))
        node.target = node.name
        if name in tensors:
            graph.weights[node.name] = Read(name, tensors[name].shape, tensors[name].dtype)
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0]),)
    if normalized:
        normalize(graph)
    return graph


def traced(model: nn.Module) -> Graph:
    """The normalized graph of a transformers model."""
    graph = trace(model)
    normalize(graph)
    return graph


def token_inputs(graph: Graph, vocabulary: int) -> dict[str, Tensor]:
    """Two rows, the first with two tokens of left padding."""
    ids = torch.randint(0, vocabulary, (B, S), generator=torch.Generator().manual_seed(SEED))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return {name: given[name] for name in graph.inputs}


def check_pass(
    function: Callable[[Graph], PassResult],
    graph: Graph,
    module: nn.Module,
    inputs: Mapping[str, Any] | tuple[Tensor, ...],
    *,
    matches: int,
    present: Mapping[Any, int] | None = None,
    gone: tuple[Any, ...] = (),
    misses: tuple[str, ...] = (),
    atol: float = 1e-6,
) -> Graph:
    """Run a pass on `graph` and hold it to its claims; returns the graph after it.

    matches: how often it applies. present: op -> count afterwards. gone: ops that are not there any more.
    misses: a part of the reason of each near-miss, in order. atol: how far the outputs may move.
    """
    if not isinstance(inputs, Mapping):
        inputs = dict(zip(graph.inputs, inputs, strict=True))
    source = ModuleSource(module)
    expected = interpret.run(graph, inputs, source)
    result = function(graph)
    verify(graph)
    assert result.matches == matches, (result, str(graph.fx))
    for target, count in (present or {}).items():
        assert graph.count(target) == count, (target, str(graph.fx))
    for target in gone:
        assert graph.count(target) == 0, (target, str(graph.fx))
    assert len(result.misses) == len(misses), result.misses
    for miss, reason in zip(result.misses, misses, strict=True):
        assert reason in miss.reason, miss
    for before, after in zip(expected, interpret.run(graph, inputs, source), strict=True):
        assert before.dtype == after.dtype
        torch.testing.assert_close(after, before, atol=atol, rtol=0)
    assert function(graph).matches == 0, "a second run matches again"
    return graph
