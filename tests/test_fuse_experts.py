"""fuse_experts: experts become one op, however tokens get to them and back; what only looks like it stays."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.graph import Graph
from effc.compiler.pattern import arguments
from effc.compiler.weights import Read, Reshape
from effc.passes.fuse_experts import fuse_experts
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe as integration  # noqa: F401  (registers its grouped product)

from .pass_checks import B, S, check_pass, example, graph_of, randomize

aten, effc = torch.ops.aten, torch.ops.effc
experts = effc.experts.default
D, N, EXPERTS, PER_TOKEN = 16, 8, 4, 2

DISPATCH = (aten.sort.default, aten.histc.default, aten.cumsum.default, aten.index.Tensor, aten.index_put.default)
GONE = (*DISPATCH, aten._grouped_mm.default, aten.bmm.default, aten.repeat_interleave.self_int)
SWIGLU = "silu(gate) * up"


class Experts(nn.Module):
    """A mixture of experts as transformers writes it; `changes` replace the steps by name."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        bias: bool = False,
        batched: bool = False,
        **changes,
    ) -> None:
        super().__init__()
        self.router = nn.Linear(D, EXPERTS, bias=False, dtype=dtype)
        shapes = {"up": (EXPERTS, 2 * N, D), "down": (EXPERTS, D, N)}
        self.transposed, self.bias, self.batched, self.changes = transposed, bias, batched, changes
        for name, (experts, rows, depth) in shapes.items():
            shape = (experts, depth, rows) if transposed else (experts, rows, depth)
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype)))
            setattr(self, f"{name}_bias", nn.Parameter(torch.empty(experts, rows, dtype=dtype)))

    def step(self, name: str, default):
        return self.changes.get(name, default)

    def product(self, rows: Tensor, name: str, ends: Tensor | None, chosen: Tensor) -> Tensor:
        weight = getattr(self, name)
        if self.batched:
            result = self.product_of_pairs(rows, weight[chosen])
            return result + getattr(self, f"{name}_bias")[chosen] if self.bias else result
        multiply = aten._grouped_mm if weight.dtype == torch.bfloat16 else torch.ops.transformers.grouped_mm_fallback
        result = multiply(rows, weight if self.transposed else weight.transpose(-2, -1), offs=ends)
        return result + getattr(self, f"{name}_bias")[chosen] if self.bias else result

    def product_of_pairs(self, rows: Tensor, weights: Tensor) -> Tensor:
        if self.transposed:
            return torch.bmm(rows.unsqueeze(1), weights).squeeze(1)
        return torch.bmm(weights, rows.unsqueeze(-1)).squeeze(-1)

    def activation(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up

    def weighted(self, rows: Tensor, ends: Tensor | None, chosen: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.step("activation", self.activation)(self.product(rows, "up", ends, chosen))
        rows = self.step("rows", lambda rows: rows)(self.product(hidden, "down", ends, chosen))
        return rows * scores.unsqueeze(-1), hidden

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        tokens = x.reshape(-1, D)
        weights, experts = self.router(tokens).float().softmax(-1).topk(PER_TOKEN, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.batched:
            rows, chosen, scores = tokens.repeat_interleave(PER_TOKEN, dim=0), experts.reshape(-1), weights.reshape(-1)
            summed = self.weighted(rows, None, chosen, scores)[0].view(-1, PER_TOKEN, D).sum(dim=1)
            return summed.to(x.dtype).reshape(x.shape)
        chosen, perm = torch.sort(experts.reshape(-1))
        rows, scores = tokens[perm // PER_TOKEN], weights.reshape(-1)[perm]
        counts = torch.histc(chosen.float(), bins=EXPERTS, min=0, max=self.step("last", EXPERTS - 1))
        ends = counts.cumsum(0, dtype=torch.int32)
        rows, hidden = self.weighted(rows, ends, chosen, scores)
        inverse = torch.empty_like(perm).index_put([perm], torch.arange(perm.shape[0]))
        summed = rows[inverse].view(tokens.shape[0], PER_TOKEN, D).sum(dim=1)
        result = self.step("result", lambda summed: summed.to(x.dtype))(summed).reshape(x.shape)
        return (result, hidden) if self.step("returns_hidden", False) else result


def check(matches: int, dtype: torch.dtype = torch.float32, atol: float = 1e-5, **claims) -> Graph:
    names = ("misses", "gone")
    module = randomize(Experts(dtype, **{name: claim for name, claim in claims.items() if name not in names}))
    x = example(B, S, D, dtype=dtype)
    graph = graph_of(module, x)
    return check_pass(
        fuse_experts,
        graph,
        module,
        (x,),
        matches=matches,
        present={experts: matches, aten.topk.default: 1},
        gone=GONE if matches else (),
        misses=claims.get("misses", ()),
        atol=atol,
    )


def fused(graph: Graph) -> dict:
    (node,) = (node for node in graph.nodes if node.target is experts)
    return arguments(node)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_become_one_op(dtype):
    graph = check(1, dtype, atol=2**-7)
    found = fused(graph)
    assert found["activation"] == SWIGLU
    assert found["down"] is graph.placeholder("down")
    assert graph.weights[found["up"].name] == Reshape(Read("up", (EXPERTS, 2 * N, D), dtype), (EXPERTS, 2, N, D))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_a_product_with_the_weights_of_every_pair_is_the_same_op(transposed):
    found = fused(check(1, batched=True, transposed=transposed, bias=transposed))
    assert found["activation"] == SWIGLU


def test_transposed_weights_and_biases_are_laid_out_by_recipes():
    graph = check(1, transposed=True, bias=True)
    found = fused(graph)
    shapes = {name: graph.weights[found[name].name].shape for name in ("up", "down", "up_bias", "down_bias")}
    assert shapes == {
        "up": (EXPERTS, 2, N, D),
        "down": (EXPERTS, D, N),
        "up_bias": (EXPERTS, 2, N),
        "down_bias": (EXPERTS, D),
    }
    assert set(graph.weights) & {"up", "down"} == set(), "a weight is held in two layouts"


def clamped(hidden: Tensor) -> Tensor:
    gate, up = hidden[..., ::2].clamp(max=1.0), hidden[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_gate_and_up_in_turns_with_an_activation_of_its_own(bias):
    found = fused(check(1, transposed=True, bias=bias, activation=clamped))
    gate = "minimum(gate, 1.0)"
    assert found["activation"] == f"(minimum(maximum(up, -1.0), 1.0) + 1) * ({gate} * sigmoid({gate} * 1.702))"


def test_the_gate_may_be_the_second_half():
    found = fused(check(1, activation=lambda hidden: hidden[:, :N] * F.gelu(hidden[:, N:], approximate="tanh")))
    assert found["activation"] == "gate * gelu_tanh(up)"


class WithoutGate(Experts):
    def __init__(self) -> None:
        super().__init__(activation=F.relu)
        self.up = nn.Parameter(torch.empty(EXPERTS, N, D))
        self.down = nn.Parameter(torch.empty(EXPERTS, D, N))


def test_experts_without_a_gate():
    module = randomize(WithoutGate())
    x = example(B, S, D)
    graph = check_pass(fuse_experts, graph_of(module, x), module, (x,), matches=1, gone=GONE, atol=1e-5)
    assert fused(graph)["activation"] == "relu(up)"


NEAR_MISSES = {
    "a norm after the products of pairs": (
        {"rows": lambda rows: F.layer_norm(rows, (D,)), "batched": True},
        ("the known way",) * 2,
    ),
    "a norm after the experts": ({"rows": lambda rows: F.layer_norm(rows, (D,))}, ("the known way",) * 2),
    "an activation that mixes columns": (
        {"activation": lambda hidden: hidden[:, :N].softmax(-1) * hidden[:, N:]},
        ("made by aten.softmax.int",),
    ),
    "one half alone": ({"activation": lambda hidden: F.silu(hidden[:, :N])}, ("read the first half columns",)),
    "halves that overlap": (
        {"activation": lambda hidden: hidden[:, :N] * hidden[:, 1 : N + 1]},
        ("columns 1:9:1 of 16 are neither a half nor every other one",),
    ),
    "hidden values that are an output too": ({"returns_hidden": True}, ("is used elsewhere too",)),
    "fewer experts counted than there are": ({"last": EXPERTS}, ("as if each chose 2 of 4 experts",)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_only_looks_like_it_is_left_alone(name):
    changes, misses = NEAR_MISSES[name]
    check(0, misses=misses, **changes)


def test_a_sum_that_stays_in_fp32_is_left_alone():
    check(0, torch.bfloat16, atol=2**-7, result=lambda summed: summed * 2, misses=("differ in dtype",))


def test_weights_used_elsewhere_in_another_layout_are_not_kept_twice():
    class Shared(Experts):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.up.sum()

    module = randomize(Shared(transposed=True))
    x = example(B, S, D)
    check_pass(fuse_experts, graph_of(module, x), module, (x,), matches=0, misses=("would keep it twice",), atol=1e-5)
