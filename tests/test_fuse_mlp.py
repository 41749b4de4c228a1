"""fuse_mlp and fuse_activation: gated MLPs from two linears or one, activations that models write out."""

from __future__ import annotations

import math

import pytest
import torch
from effc.compiler.graph import Graph
from effc.compiler.pattern import arguments
from effc.compiler.rewrite import PassResult
from effc.passes.fuse_activation import fuse_activation
from effc.passes.fuse_linear import fuse_linear
from effc.passes.fuse_mlp import fuse_mlp
from torch import Tensor, nn
from torch.nn import functional as F

from .pass_checks import B, S, check_pass, example, graph_of, randomize

aten = torch.ops.aten
linear, gated_linear = torch.ops.effc.linear.default, torch.ops.effc.gated_linear.default
K, N = 16, 12


class Gated(nn.Module):
    def __init__(self, function, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.gate = nn.Linear(K, N, bias=False, dtype=dtype)
        self.up = nn.Linear(K, N, dtype=dtype)
        self.both = nn.Linear(K, 2 * N, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


def check(function, matches: int, dtype: torch.dtype = torch.float32, **claims) -> Graph:
    """Only fuse_mlp counts: the linears are fused before."""
    module = randomize(Gated(function, dtype))
    x = example(B, S, K, dtype=dtype)
    graph = graph_of(module, x)
    fuse_linear(graph)
    claims["present"] = {gated_linear: matches} | claims.get("present", {})
    return check_pass(fuse_mlp, graph, module, (x,), matches=matches, **claims)


GONE = (linear, aten.mul.Tensor, aten.silu.default, aten.slice.Tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_two_linears(name, dtype):
    graph = check(lambda m, x: getattr(F, name)(m.gate(x)) * m.up(x), 1, dtype, gone=GONE, atol=2**-7)
    (node,) = (node for node in graph.nodes if node.target is gated_linear)
    found = arguments(node)
    assert found["activation"] == name
    assert graph.weights[found["weight"].name].names() == ("gate.weight", "up.weight")
    assert graph.weights[found["bias"].name].shape == (2 * N,)


def test_up_before_gate_in_the_product():
    check(lambda m, x: m.up(x) * F.silu(m.gate(x)), 1, gone=GONE)


@pytest.mark.parametrize(
    "cut", [lambda y: y.chunk(2, -1), lambda y: y.split(N, -1), lambda y: (y[..., :N], y[..., N:])]
)
def test_one_linear_in_two_halves(cut):
    def halves(m, x):
        gate, up = cut(m.both(x))
        return up * F.silu(gate)

    graph = check(halves, 1, gone=GONE, atol=0)
    assert list(graph.weights) == ["both_weight"]


def test_gate_in_the_second_half_is_left_alone():
    def swapped(m, x):
        up, gate = m.both(x).chunk(2, -1)
        return F.silu(gate) * up

    check(swapped, 0, present={linear: 1}, misses=("the gate is the second half",))


def test_uneven_parts_are_left_alone():
    def uneven(m, x):
        y = m.both(x)
        return F.silu(y[..., 1 : N + 1]) * y[..., N:]

    check(uneven, 0, misses=("not the two halves",))


def test_a_product_of_two_inputs_is_left_alone():
    check(lambda m, x: F.silu(m.gate(x)) * m.up(x.neg()), 0, present={linear: 2})


def test_a_gate_used_elsewhere_is_left_alone():
    def shared(m, x):
        gate, up = m.both(x).chunk(2, -1)
        return F.silu(gate) * up, gate

    check(shared, 0, misses=("used elsewhere",))


def test_a_shared_weight_is_left_alone():
    check(
        lambda m, x: (F.silu(m.gate(x)) * m.up(x), m.gate(x.neg())),
        0,
        present={linear: 3},
        misses=("gate_weight is used elsewhere too",),
    )


def test_the_gate_may_stand_beside_other_linears_of_its_input():
    check(lambda m, x: (m.both(x), F.silu(m.gate(x)) * m.up(x)), 1, present={linear: 1})


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def factored_tanh_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


WRITTEN = {
    "silu": (lambda x: x * torch.sigmoid(x), aten.silu.default),
    "gelu": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), aten.gelu.default),
    "gelu by product": (lambda x: 0.5 * (x * (1.0 + torch.erf(x * math.sqrt(0.5)))), aten.gelu.default),
    "tanh gelu": (tanh_gelu, aten.gelu.default),
    "tanh gelu, factored": (factored_tanh_gelu, aten.gelu.default),
}


def check_activation(function, dtype: torch.dtype = torch.float32, **claims) -> Graph:
    module, x = Gated(lambda m, x: function(x), dtype), example(B, S, K, dtype=dtype)
    return check_pass(fuse_activation, graph_of(module, x), module, (x,), **claims)


@pytest.mark.parametrize("name", WRITTEN)
def test_activations_that_are_written_out(name):
    function, target = WRITTEN[name]
    graph = check_activation(function, matches=1, present={target: 1}, gone=(aten.mul.Tensor, aten.tanh.default))
    (node,) = (node for node in graph.nodes if node.target is target)
    assert node.kwargs == ({"approximate": "tanh"} if "tanh" in name else {})


def test_other_constants_are_another_function():
    def other(x):
        return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * torch.pow(x, 3.0))))

    check_activation(other, matches=0, gone=(aten.gelu.default,), misses=("a constant is 0.8",))


def test_low_precision_keeps_its_rounding():
    check_activation(tanh_gelu, torch.bfloat16, matches=0, gone=(aten.gelu.default,), misses=("after every step",))


def test_the_passes_return_results():
    assert isinstance(fuse_mlp(graph_of(Gated(lambda m, x: x.neg()), example(B, S, K))), PassResult)
