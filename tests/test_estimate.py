"""What near-misses cost: worked out by hand for small graphs, and told where they are told of."""

from __future__ import annotations

import pytest
import sympy
import torch
from effc.compiler.estimate import CONTEXT, Estimate, of_fusing, per_token, step_bytes
from effc.compiler.graph import Graph
from effc.passes import run
from effc.passes.fuse_norm import fuse_norm
from torch import Tensor, nn

from .pass_checks import example, graph_of

aten = torch.ops.aten
B, S = sympy.symbols("B S", integer=True, positive=True)


def test_sizes_are_those_of_one_token_and_its_context():
    assert per_token(B * S * 64) == 64
    assert per_token(4 * B * S**2 * 8) == 32 * CONTEXT
    assert per_token(10 * S + 3) == 13


class Norm(nn.Module):
    """x [..., 16] over its root mean square, whose inner cast is used again."""

    def __init__(self, dims: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(self.dims, keepdim=True) + 1e-6)


def calls(graph: Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def test_values_between_launches_count_and_those_within_one_do_not():
    graph = graph_of(Norm(), example(2, 5, 16))
    nodes = calls(graph)
    assert [node.target for node in nodes][:2] == [aten.pow.Tensor_Scalar, aten.mean.dim]
    # pow -> mean crosses (16 floats, written and read), and so does mean -> add (one float); the rest shares a launch
    assert of_fusing(nodes, nodes[-1]) == Estimate(2 * 16 * 4 + 2 * 4, 1)


def test_attention_counts_its_scores_over_the_context():
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(-1, -2)).softmax(-1)

    nodes = [node for node in calls(graph_of(Scores(), example(2, 5, 8))) if node.target is not aten.sym_size.int]
    assert [node.target for node in nodes] == [aten.permute.default, aten.matmul.default, aten.softmax.int]
    assert of_fusing(nodes, nodes[-1]) == Estimate(2 * CONTEXT * 4, 1)


def test_a_miss_tells_what_it_costs_and_as_a_part_of_the_step():
    class OverTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = Norm((-2, -1)), nn.Linear(16, 100, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    graph = graph_of(OverTwo(), example(2, 5, 16))
    _, report = run(graph, [fuse_norm])
    (miss,) = report.misses
    assert (miss.during, miss.cost.launches) == ("fuse_norm", 1)
    assert miss.cost.share == pytest.approx(miss.cost.bytes / step_bytes(graph))
    assert "the mean is over dimensions [1, 2] of 3, not over the last; costs about " in str(miss)
    assert " and 1 launch a token, " in str(miss)
    assert str(miss).endswith("% of the step")
    assert step_bytes(graph) > 16 * 100 * 4


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0, 0), "about nothing"),
        (Estimate(12_345, 3), "about 12.3 kB and 3 launches a token"),
        (Estimate(2_000_000, 1, 0.25), "about 2.0 MB and 1 launch a token, 25.0% of the step"),
    ],
)
def test_estimates_are_short_texts(estimate, text):
    assert str(estimate) == text
