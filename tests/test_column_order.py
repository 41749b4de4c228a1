"""Matrices whose columns are stored in another order: inputs come in that order, so that blocks stay whole."""

from __future__ import annotations

import pytest
import torch
from effc.compiler import interpret
from effc.compiler.column_order import as_stored, columns_back
from effc.compiler.evaluate import evaluate
from effc.compiler.formats import find
from effc.compiler.graph import Graph
from effc.compiler.quantized_weights import Dequantize, NotStored, stored_parts
from effc.compiler.rewrite import PassResult
from effc.compiler.schemes import Scheme
from effc.compiler.sources import ModuleSource
from effc.compiler.verify import verify
from effc.compiler.weights import Cast, Concat, Constant, Slice, Weight
from effc.passes import pipeline
from effc.passes.quantize import quantize
from torch import Tensor, nn
from torch.nn import functional as F

from .pass_checks import B, S, example, graph_of, randomize

aten, effc = torch.ops.aten, torch.ops.effc
K, N, FORMAT = 64, 16, "int4_g32"
NOTHING = ModuleSource(nn.Module())


def order(seed: int) -> Tensor:
    return torch.randperm(K, generator=torch.Generator().manual_seed(seed))


def in_order(weight: Tensor, order: Tensor | None) -> Weight:
    """The recipe of a matrix that a checkpoint stores with its columns in that order, rounded there."""
    stored = weight.detach() if order is None else weight.detach()[:, order]
    values = Dequantize(
        tuple(map(Constant.of, find(FORMAT).quantize(stored))), FORMAT, tuple(weight.shape), torch.float32
    )
    return values if order is None else columns_back(values, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recipe_and_its_order_are_the_matrix(dtype: torch.dtype):
    a, b = (in_order(example(N, K, seed=seed), order(0)) for seed in (1, 2))
    recipe = Concat((Cast(a, dtype), Slice(Cast(b, dtype), 0, 3, 9)))
    stored, found = as_stored(recipe)
    name, parts = stored_parts(stored)
    values = find(name).dequantize([evaluate(part, NOTHING) for part in parts], dtype)
    assert torch.equal(found.tensor, order(0))
    assert torch.equal(values, evaluate(recipe, NOTHING)[:, found.tensor])


def test_a_recipe_without_an_order_is_itself():
    recipe = Concat((in_order(example(N, K), None), in_order(example(N, K, seed=1), None)))
    assert as_stored(recipe) == (recipe, None)


@pytest.mark.parametrize("other", [order(1), None], ids=["two orders", "one has none"])
def test_rows_in_several_orders_have_none(other: Tensor | None):
    recipe = Concat((in_order(example(N, K), order(0)), in_order(example(N, K, seed=1), other)))
    with pytest.raises(NotStored, match="its rows have their columns in several orders"):
        as_stored(recipe)


class Three(nn.Module):
    """Linears of one input, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K, bias=False)
        self.head = nn.Linear(K, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.o(torch.tanh(self.q(x)) * torch.tanh(self.k(x))))


def prepared(module: Three, orders: dict[str, Tensor | None]) -> Graph:
    graph = graph_of(module, example(B, S, K))
    graph.files = {f"{name}.weight": in_order(getattr(module, name).weight, found) for name, found in orders.items()}
    return pipeline.run(graph, ["normalize", "fuse_linear"])[0]


@pytest.mark.parametrize("activations", [None, "int8_g32"])
def test_inputs_come_in_the_order_that_is_stored(activations: str | None):
    module, x = randomize(Three()), example(B, S, K)
    orders = {"q": order(0), "k": order(0), "head": order(1)}
    graph = prepared(module, orders)
    result = quantize(graph, Scheme(None, None, activations))
    verify(graph)
    assert result.matches == 2, "q with k, and the head; o is not quantized"
    assert graph.count(aten.index_select.default) == 2
    assert graph.count(effc.dequantize.default) == 2
    assert graph.count(effc.fake_quantize.default) == (2 if activations else 0)

    def rounded(name: str) -> Tensor:
        return evaluate(in_order(getattr(module, name).weight, orders[name]), NOTHING)

    def act(x: Tensor, order: Tensor) -> Tensor:
        if activations is None:
            return x
        return torch.empty_like(x).index_copy_(-1, order, effc.fake_quantize(x[..., order], activations))

    inputs = act(x, order(0))
    q, k = (torch.tanh(F.linear(inputs, rounded(name), getattr(module, name).bias)) for name in ("q", "k"))
    expected = F.linear(act(x + module.o(q * k), order(1)), rounded("head"))
    (found,) = interpret.run(graph, {"x": x}, ModuleSource(module))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    again = quantize(graph, Scheme(None, None, activations))
    assert again == PassResult(misses=again.misses, inexact=result.inexact), "a second run"


def test_merged_rows_in_several_orders_stay_as_they_are():
    graph = prepared(randomize(Three()), {"q": order(0), "k": order(1)})
    result = quantize(graph, Scheme(None, None))
    assert result.matches == 0
    assert any("in several orders" in miss.reason for miss in result.misses)
    assert graph.count(aten.index_select.default) == 0


def test_a_table_in_another_order_is_left_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(N, K)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.table(torch.arange(x.shape[1])) + x, self.table.weight)

    module = randomize(Tied())
    graph = graph_of(module, example(B, S, K))
    graph.files = {"table.weight": in_order(module.table.weight, order(0))}
    graph = pipeline.run(graph, ["normalize", "fuse_linear"])[0]
    result = quantize(graph, Scheme(None, None))
    assert result.matches == 0
    assert "its columns are stored in another order, and its rows are looked up" in result.misses[0].reason
