"""quantize: which weights are rounded or kept in blocks, what linears then compute, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import pytest
import torch
from effc.compiler import interpret
from effc.compiler.activation_formats import dequantize_rows, find_activation, quantize_rows
from effc.compiler.errors import InputError
from effc.compiler.evaluate import evaluate
from effc.compiler.formats import find
from effc.compiler.gguf_blocks import split
from effc.compiler.graph import Graph
from effc.compiler.quantized_weights import Dequantize, NotStored, stored_parts
from effc.compiler.rewrite import PassResult
from effc.compiler.schemes import Scheme, scheme_of
from effc.compiler.sources import ModuleSource
from effc.compiler.verify import verify
from effc.compiler.weights import Cast, Concat, Constant, Multiply, Reshape, Slice, Transpose, Weight
from effc.passes import pipeline
from effc.passes.quantize import quantize
from torch import Tensor, nn
from torch.nn import functional as F

from .pass_checks import B, S, example, graph_of, randomize

aten, effc = torch.ops.aten, torch.ops.effc
K, N, WORDS = 64, 24, 40


class Block(nn.Module):
    """Three linears that share an input or a weight with something else, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, K)
        self.q, self.o = nn.Linear(K, N), nn.Linear(N, K, bias=False)
        self.odd = nn.Linear(3, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])
        hidden = self.embed(ids) + x
        hidden = hidden + self.o(torch.tanh(self.q(hidden))) + self.odd(x[..., :3])
        return F.linear(hidden, self.embed.weight)


def prepared(module: nn.Module, *inputs: Tensor) -> Graph:
    """The graph with its linears fused, as `quantize` gets it."""
    return pipeline.run(graph_of(module, *inputs), ["normalize", "fuse_linear"])[0]


def rounded(weight: Tensor, name: str) -> Tensor:
    return find(name).dequantize(find(name).quantize(weight))


def fake(x: Tensor, name: str) -> Tensor:
    return dequantize_rows(*quantize_rows(x, find_activation(name)), find_activation(name))


def by_hand(block: Block, x: Tensor, weights: str, head: str, act: Callable[[Tensor], Tensor]) -> Tensor:
    table = rounded(block.embed.weight, head)
    hidden = table[: x.shape[1]] + x
    middle = torch.tanh(F.linear(act(hidden), rounded(block.q.weight, weights), block.q.bias))
    odd = F.linear(act(x[..., :3]), rounded(block.odd.weight, weights)) if weights == "int8" else block.odd(x[..., :3])
    hidden = hidden + F.linear(act(middle), rounded(block.o.weight, weights)) + odd
    return F.linear(act(hidden), table)


@pytest.mark.parametrize(
    ("name", "matches", "calls"), [("w4", 3, 0), ("w8", 4, 0), ("w8a8", 4, 4), ("w4a8", 3, 3), ("nf4_g64", 3, 0)]
)
def test_linears_and_the_embedding_compute_with_what_the_scheme_rounds_to(name: str, matches: int, calls: int):
    """Rows of three weights cannot be kept in fewer than 8 bits."""
    block, x, scheme = randomize(Block()), example(B, S, K), scheme_of(name)
    graph = prepared(block, x)
    result = quantize(graph, scheme)
    verify(graph)
    assert result.matches == matches
    assert result.inexact
    assert graph.count(effc.dequantize.default) == matches
    assert graph.count(effc.fake_quantize.default) == calls
    assert len(result.misses) == 4 - matches
    assert all("odd_weight" in miss.reason and "found 3" in miss.reason for miss in result.misses)
    assert not {"q_weight", "o_weight", "embed_weight"} & set(graph.weights)
    assert all(dtype != torch.float32 for dtype in codes_of(graph))

    def act(x: Tensor) -> Tensor:
        return x if scheme.activations is None else fake(x, scheme.activations)

    (found,) = interpret.run(graph, {"x": x}, ModuleSource(block))
    torch.testing.assert_close(found, by_hand(block, x, scheme.weights, scheme.head, act), atol=1e-5, rtol=1e-5)
    assert quantize(graph, scheme) == PassResult(misses=result.misses, inexact=result.inexact), "a second run"


def codes_of(graph: Graph) -> list[torch.dtype]:
    return [recipe.dtype for name, recipe in graph.weights.items() if name.endswith("_codes")]


def test_linears_of_one_input_share_what_it_is_rounded_to():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, N), nn.Linear(K, K)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), torch.tanh(x) + self.b(x)

    graph = pipeline.run(graph_of(randomize(Two()), example(B, S, K)), ["normalize"])[0]
    graph, _ = pipeline.run(graph, ["fuse_linear"])
    quantize(graph, scheme_of("w8a8"))
    verify(graph)
    assert graph.count(effc.fake_quantize.default) == 1


def test_a_weight_that_something_else_reads_stays_as_it_is():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.a.weight.sum(1)

    graph = prepared(randomize(Shared()), example(B, S, K))
    result = quantize(graph, scheme_of("w8"))
    assert result.matches == 0
    assert [miss.reason for miss in result.misses] == ["a_weight: sum_1 (aten.sum.dim_IntList) reads it too"]


def test_weights_in_floating_point_stay_where_the_scheme_keeps_what_is_stored():
    graph = prepared(randomize(Block()), example(B, S, K))
    result = quantize(graph, scheme_of("stored"))
    assert (result.matches, result.misses) == (0, [])
    assert graph.count(effc.fake_quantize.default) == 0


@pytest.mark.parametrize("name", ["w5", "", "Q4_0", "int4_g31"])
def test_an_unknown_scheme_is_one_line(name: str):
    with pytest.raises(InputError, match="expected a scheme") as error:
        scheme_of(name)
    assert "\n" not in str(error.value)
    assert "w4a8" in str(error.value)


# --- stored blocks ---------------------------------------------------------------------------------------------------


def stored(seed: int, rows: int, name: str = "q4_1") -> Dequantize:
    parts = find(name).quantize(example(rows, K, seed=seed))
    return Dequantize(tuple(map(Constant.of, parts)), name, (rows, K), torch.float32)


A, C = stored(1, 16), stored(2, 8)
KEPT: dict[str, Weight] = {
    "as it is": A,
    "cast": Cast(A, torch.bfloat16),
    "joined": Concat((A, C)),
    "cut": Slice(A, 0, 3, 9),
    "rows permuted": Reshape(Transpose(Reshape(A, (2, 4, 2, K)), (0, 2, 1, 3)), (16, K)),
    "transposed twice": Transpose(Transpose(A, (1, 0)), (1, 0)),
    "permuted and joined": Concat((Reshape(Transpose(Reshape(A, (4, 4, K)), (1, 0, 2)), (16, K)), Slice(C, 0, 0, 4))),
}
SPLIT: dict[str, tuple[Weight, str]] = {
    "transposed": (Transpose(A, (1, 0)), "takes the stored rows apart"),
    "cut along K": (Slice(A, 1, 0, 32), "takes the stored rows apart"),
    "joined along K": (Concat((A, A), 1), "takes the stored rows apart"),
    "rows halved": (Reshape(A, (32, 32)), "takes the stored rows apart"),
    "scaled": (Multiply(A, A), "computes with their values"),
    "two formats": (Concat((A, stored(3, 8, "q8_0"))), "several formats (q4_1, q8_0)"),
    "partly stored": (Concat((A, Constant.of(example(4, K)))), "not stored in a quantized format"),
    "not stored": (Constant.of(example(4, K)), "not stored in a quantized format"),
}


@pytest.mark.parametrize("weight", KEPT.values(), ids=KEPT)
def test_what_moves_rows_moves_them_in_each_part(weight: Weight):
    name, parts = stored_parts(weight)
    source = ModuleSource(nn.Module())
    values = find(name).dequantize([evaluate(part, source) for part in parts], weight.dtype)
    assert name == "q4_1"
    assert torch.equal(values, evaluate(weight, source))


@pytest.mark.parametrize(("weight", "reason"), SPLIT.values(), ids=SPLIT)
def test_what_takes_rows_apart_is_not_kept_in_blocks(weight: Weight, reason: str):
    with pytest.raises(NotStored) as error:
        stored_parts(weight)
    assert reason in str(error.value)


def test_blocks_of_a_file_come_into_the_graph_as_they_are():
    """Rows that are joined by fuse_linear are joined in each part; those of two formats are not joined at all."""
    kinds = {"a": "q4_0", "b": "q4_0", "c": "q8_0"}

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(K, N, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.a(x), self.b(x), self.c(x)

    module, x = randomize(Three()), example(B, S, K)
    files = {}
    for name, kind in kinds.items():
        parts = find(kind).quantize(module.get_submodule(name).weight.detach())
        files[f"{name}.weight"] = Dequantize(tuple(map(Constant.of, parts)), kind, (N, K), torch.float32)
    graph = graph_of(module, x)
    graph.files = files
    graph, report = pipeline.run(graph, pipeline.quantized(["normalize", "fuse_linear"], Scheme(None, None)))
    assert report.matches["quantize"] == 2
    assert [node.args[1] for node in graph.nodes if node.target is effc.dequantize.default] == ["q4_0", "q8_0"]
    assert any("q8_0" in miss.reason for miss in report.misses)
    found = interpret.run(graph, {"x": x}, ModuleSource(module))
    for ours, name in zip(found, kinds, strict=True):
        expected = F.linear(x, rounded(module.get_submodule(name).weight.detach(), kinds[name]))
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_row_of_a_gguf_block_is_a_row_of_each_part():
    values = example(8, 64).numpy()
    kind = gguf.GGMLQuantizationType.Q5_1
    raw = torch.from_numpy(gguf.quantize(values, kind))
    whole, part = split(raw, find("q5_1")), split(raw[2:5], find("q5_1"))
    assert all(torch.equal(a[2:5], b) for a, b in zip(whole, part, strict=True))
