"""fuse_moe: routers, experts and what is around them become one op; what only looks like a router stays."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from effc.compiler.graph import Graph
from effc.compiler.pattern import arguments
from effc.passes.fuse_experts import fuse_experts
from effc.passes.fuse_moe import fuse_moe
from torch import Tensor, nn
from torch.nn import functional as F

from .pass_checks import B, S, check_pass, example, graph_of, randomize

aten, effc = torch.ops.aten, torch.ops.effc
moe, experts, top_k = effc.moe.default, effc.experts.default, effc.top_k.default
D, N, EXPERTS, PER_TOKEN = 16, 8, 6, 2

Choice = tuple[Tensor, Tensor]
"""The scores of the chosen experts, and which they are."""


class Mixture(nn.Module):
    """A residual and a mixture of experts. route: makes a Choice of logits, and may read the module."""

    def __init__(self, route: Callable[[Mixture, Tensor], Choice], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.route = route
        self.router = nn.Linear(D, EXPERTS, dtype=dtype)
        self.correction = nn.Parameter(torch.empty(EXPERTS))
        self.up = nn.Parameter(torch.empty(EXPERTS, 2 * N, D, dtype=dtype))
        self.down = nn.Parameter(torch.empty(EXPERTS, D, N, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        tokens = x.reshape(-1, D)
        scores, chosen = self.route(self, self.router(tokens))[:2]
        chosen = chosen.reshape(-1)
        gate, up = (
            torch.bmm(self.up[chosen], tokens.repeat_interleave(PER_TOKEN, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        )
        rows = torch.bmm(self.down[chosen], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        y = (rows * scores.reshape(-1).unsqueeze(-1)).view(-1, PER_TOKEN, D).sum(1)
        y = y if y.dtype == x.dtype else y.to(x.dtype)
        return x + y.reshape(x.shape)


def softmax_first(module: Mixture, logits: Tensor) -> Choice:
    return tuple(logits.softmax(-1, dtype=torch.float32).topk(PER_TOKEN, dim=-1))


def normalized(module: Mixture, logits: Tensor) -> Choice:
    scores, chosen = logits.float().softmax(-1).topk(PER_TOKEN, dim=-1)
    return (scores / scores.sum(-1, keepdim=True)).to(logits.dtype), chosen


def softmax_last(module: Mixture, logits: Tensor) -> Choice:
    scores, chosen = logits.topk(PER_TOKEN, dim=-1)
    return scores.softmax(-1, dtype=scores.dtype), chosen


def corrected(module: Mixture, logits: Tensor) -> Choice:
    scores = logits.float().sigmoid()
    chosen = (scores + module.correction.unsqueeze(0)).topk(PER_TOKEN, dim=-1, sorted=False)[1]
    scores = scores.gather(1, chosen)
    return scores / (scores.sum(-1, keepdim=True) + 1e-20) * 2.5, chosen


def of_best_groups(module: Mixture, logits: Tensor) -> Choice:
    """The best two of three groups of experts."""
    scores = logits.sigmoid()
    ranks = scores + module.correction
    sums = ranks.view(-1, 3, EXPERTS // 3).topk(2, dim=-1)[0].sum(dim=-1)
    kept = torch.zeros_like(sums).scatter(1, sums.topk(2, dim=-1, sorted=False)[1], 1)
    mask = kept.unsqueeze(-1).expand(-1, 3, EXPERTS // 3).reshape(-1, EXPERTS)
    chosen = ranks.masked_fill(~mask.bool(), float("-inf")).topk(PER_TOKEN, dim=-1, sorted=False)[1]
    return scores.gather(1, chosen), chosen


def ranked_by_logits(module: Mixture, logits: Tensor) -> Choice:
    scores, chosen = (logits + module.correction).topk(PER_TOKEN, dim=-1)
    return scores.sigmoid(), chosen


ROUTERS = {
    softmax_first: ("softmax(logits)", "values", "chosen"),
    normalized: ("softmax(logits)", "values", "chosen / sum(chosen)"),
    softmax_last: ("logits", "values", "softmax(chosen)"),
    corrected: ("sigmoid(logits)", "values + correction", "chosen / (sum(chosen) + 1e-20) * 2.5"),
    of_best_groups: ("sigmoid(logits)", "of_best_groups(values + correction, 3, 2, 2)", "chosen"),
    ranked_by_logits: ("logits + correction", "values", "sigmoid(chosen)"),
}
"""How a router chooses, and what the op says of it."""

IN_BF16 = {
    softmax_first: ("softmax(float32(logits))", "values", "chosen"),
    normalized: ("softmax(float32(logits))", "values", "bfloat16(chosen / sum(chosen))"),
    softmax_last: ("logits", "values", "softmax(chosen)"),
}


def graph_with_experts(module: nn.Module, x: Tensor) -> Graph:
    graph = graph_of(module, x)
    assert fuse_experts(graph).matches == 1
    return graph


def check(route: Callable[[Mixture, Tensor], Choice], matches: int, dtype: torch.dtype = torch.float32, **claims):
    module = randomize(Mixture(route, dtype))
    x = example(B, S, D, dtype=dtype)
    graph = graph_with_experts(module, x)
    return check_pass(fuse_moe, graph, module, (x,), matches=matches, **claims)


def texts(graph: Graph) -> tuple[str, ...]:
    (node,) = (node for node in graph.nodes if node.target is moe)
    return tuple(arguments(node)[name] for name in ("values", "ranks", "weights"))


@pytest.mark.parametrize("route", ROUTERS, ids=lambda route: route.__name__)
def test_a_router_its_experts_and_the_residual_are_one_op(route):
    """Both parts of a topk, the mixture, the reshapes around it and the residual."""
    gone = (experts, top_k, aten.topk.default, aten.gather.default, aten.linear.default, aten.reshape.default)
    parts = {corrected: 1, of_best_groups: 3}.get(route, 2)
    graph = check(route, parts + 3, present={moe: 1}, gone=(*gone, aten.add.Tensor), atol=1e-5)
    assert texts(graph) == ROUTERS[route]


@pytest.mark.parametrize("route", IN_BF16, ids=lambda route: route.__name__)
def test_casts_are_kept(route):
    graph = check(route, 5, torch.bfloat16, present={moe: 1}, gone=(experts,), atol=2**-6)
    assert texts(graph) == IN_BF16[route]


def scores_of_others(module: Mixture, logits: Tensor) -> Choice:
    scores = logits.softmax(-1)
    return scores[:, :PER_TOKEN] * 1.0, scores.topk(PER_TOKEN, dim=-1)[1]


def along_another_axis(module: Mixture, logits: Tensor) -> Choice:
    return tuple(logits.softmax(0).topk(PER_TOKEN, dim=-1))


def of_a_cosine(module: Mixture, logits: Tensor) -> Choice:
    return tuple(logits.cos().topk(PER_TOKEN, dim=-1))


def of_a_second_product(module: Mixture, logits: Tensor) -> Choice:
    return tuple((logits + F.linear(logits, module.router.weight[:, :EXPERTS])).topk(PER_TOKEN, dim=-1))


def with_a_scale_of_its_own(module: Mixture, logits: Tensor) -> Choice:
    return tuple((logits * module.correction[:1]).topk(PER_TOKEN, dim=-1))


NEAR_MISSES = {
    scores_of_others: "the scores are made by aten.slice.Tensor",
    along_another_axis: "does not run over the last axis alone",
    of_a_cosine: "made by aten.cos.default",
    of_a_second_product: "made by aten.linear.default",
    with_a_scale_of_its_own: "has not one entry for each expert",
}


@pytest.mark.parametrize("route", NEAR_MISSES, ids=lambda route: route.__name__)
def test_what_is_no_router_stays_beside_its_experts(route):
    parts = 1 if route is scores_of_others else 2
    check(route, parts, present={experts: 1, moe: 0}, misses=(NEAR_MISSES[route],), atol=1e-5)


class ReturnsLogits(Mixture):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x), self.logits


def test_logits_that_are_an_output_too_stay():
    def keep(module: Mixture, logits: Tensor) -> Choice:
        module.logits = logits
        return normalized(module, logits)

    module, x = randomize(ReturnsLogits(keep)), example(B, S, D)
    graph = graph_with_experts(module, x)
    check_pass(fuse_moe, graph, module, (x,), matches=2, misses=("is used elsewhere too",), atol=1e-5)


# --- what is around it -----------------------------------------------------------------------------------------------


class Wider(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:1]) + x


def test_a_residual_of_another_shape_is_left_alone():
    module, x = randomize(Wider(normalized)), example(B, S, D)
    graph = graph_with_experts(module, x)
    check_pass(fuse_moe, graph, module, (x,), matches=5, present={moe: 1, aten.add.Tensor: 1}, atol=1e-5)


# --- top_k -----------------------------------------------------------------------------------------------------------


class TopK(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "misses"),
    [
        (lambda x: tuple(x.topk(3, dim=1)), ("another axis",) * 2),
        (lambda x: tuple(x.topk(3, largest=False)), ("smallest",) * 2),
        (lambda x: tuple(torch.cat((x, x), -1).topk(17)), ("17 entries",) * 2),
    ],
    ids=["another axis", "the smallest", "too many"],
)
def test_a_topk_that_has_no_kernel_stays(function, misses):
    x = example(B, S, D)
    graph = graph_of(module := TopK(function), x)
    present = {aten.topk.default: 1, operator.getitem: 2}
    check_pass(fuse_moe, graph, module, (x,), matches=0, present=present, misses=misses)


def test_values_alone_need_no_second_choice():
    x = example(B, S, D)
    graph = graph_of(module := TopK(lambda x: (x.topk(3).values,)), x)
    present = {top_k: 1, aten.gather.default: 1}
    check_pass(fuse_moe, graph, module, (x,), matches=1, present=present, gone=(aten.topk.default,))
