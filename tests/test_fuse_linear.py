"""fuse_linear: spellings of a linear, epilogues, merging, and what must stay as it is."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.pattern import arguments
from effc.compiler.weights import Concat, Transpose
from effc.passes.fuse_linear import fuse_linear, merged_name
from torch import Tensor, nn
from torch.nn import functional as F

from .pass_checks import B, S, check_pass, example, graph_of, randomize

aten = torch.ops.aten
linear = torch.ops.effc.linear.default
K, N = 16, 12


class Layer(nn.Module):
    """Three projections of x [B, S, K], a bias and a matrix that is stored the other way, and a function of them."""

    def __init__(self, function, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.q = nn.Linear(K, N, dtype=dtype)
        self.k = nn.Linear(K, N // 2, bias=False, dtype=dtype)
        self.o = nn.Linear(K, K, dtype=dtype)
        self.bias = nn.Parameter(torch.ones(N // 2, dtype=dtype))
        self.columns = nn.Parameter(torch.ones(K, N, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, x)


def check(function, matches: int, linears: int = 1, dtype: torch.dtype = torch.float32, **claims):
    module = randomize(Layer(function, dtype))
    x = example(B, S, K, dtype=dtype)
    claims["present"] = {linear: linears} | claims.get("present", {})
    return check_pass(fuse_linear, graph_of(module, x), module, (x,), matches=matches, **claims)


def the_linear(graph) -> dict:
    (node,) = (node for node in graph.nodes if node.target is linear)
    return arguments(node)


def test_linear_with_and_without_bias():
    assert the_linear(check(lambda m, x: m.q(x), 1, gone=(aten.linear.default,), atol=0))["bias"].name == "q_bias"
    assert the_linear(check(lambda m, x: m.k(x), 1, atol=0))["bias"] is None


def test_a_matrix_that_is_stored_the_other_way_is_transposed_in_its_recipe():
    for function in (lambda m, x: x @ m.columns, lambda m, x: torch.addmm(m.q.bias, x[0], m.columns)):
        graph = check(function, 1, gone=(aten.matmul.default, aten.addmm.default))
        assert isinstance(graph.weights[the_linear(graph)["weight"].name], Transpose)


def test_a_transposed_weight_is_the_weight_itself():
    graph = check(lambda m, x: x @ m.q.weight.t(), 1, gone=(aten.permute.default, aten.matmul.default))
    assert the_linear(graph)["weight"].name == "q_weight"


def test_reshapes_around_rows_vanish():
    def rows(m, x):
        flat = torch.addmm(m.q.bias, x.view(-1, K), m.columns)
        return flat.view(x.shape[0], x.shape[1], N)

    check(rows, 2, gone=(aten.reshape.default, aten.addmm.default))


def test_a_bias_that_is_added_later():
    graph = check(lambda m, x: m.k(x) + m.bias, 2, gone=(aten.add.Tensor,))
    assert the_linear(graph)["bias"].name == "bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
    ],
)
def test_activation(name, function, dtype):
    gone = (aten.silu.default, aten.gelu.default, aten.relu.default)
    graph = check(lambda m, x: function(m.q(x)), 2, dtype=dtype, gone=gone, atol=0)
    assert the_linear(graph)["activation"] == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_after_activation(dtype):
    graph = check(lambda m, x: F.relu(m.o(x)) + x, 3, dtype=dtype, gone=(aten.add.Tensor, aten.relu.default), atol=0)
    found = the_linear(graph)
    assert (found["activation"], found["residual"].name) == ("relu", "x")


def test_a_sum_of_two_linears_has_one_with_a_residual():
    check(lambda m, x: m.o(x) + m.o(x.neg()), 3, linears=2, gone=(aten.add.Tensor,))


def test_linears_of_one_input_are_merged():
    graph = check(lambda m, x: (m.q(x), m.k(x), m.o(x)), 4, present={aten.slice.Tensor: 3})
    found = the_linear(graph)
    weight, bias = graph.weights[found["weight"].name], graph.weights[found["bias"].name]
    assert isinstance(weight, Concat)
    assert weight.shape == (N + N // 2 + K, K)
    assert weight.names() == ("q.weight", "k.weight", "o.weight")
    assert bias.shape == (N + N // 2 + K,)
    assert sorted(graph.weights) == sorted((found["weight"].name, found["bias"].name))


def test_merged_linears_keep_their_rounding():
    check(lambda m, x: (m.q(x), m.k(x)), 3, dtype=torch.bfloat16, atol=2**-7)


def test_an_activated_linear_is_not_merged():
    graph = check(lambda m, x: (m.q(x), F.gelu(m.k(x)), m.o(x)), 5, linears=2)
    assert graph.count(aten.slice.Tensor) == 2


def test_linears_of_different_inputs_are_not_merged():
    check(lambda m, x: (m.q(x), m.k(x.neg())), 2, linears=2, gone=(aten.slice.Tensor,))


def test_a_weight_used_twice_is_not_merged():
    reasons = ("k_weight is used elsewhere too",)
    check(lambda m, x: (m.q(x), m.k(x), m.k(x.neg())), 3, linears=3, misses=reasons)


def test_a_tied_matrix_is_not_transposed():
    def tied(m, x):
        ids = x[..., 0].long().clamp(0, K - 1)
        return torch.addmm(m.q.bias, x[0], m.columns), F.embedding(ids, m.columns)

    check(tied, 0, linears=0, misses=("would keep it twice",))


def test_a_linear_with_two_users_keeps_its_activation_apart():
    def twice(m, x):
        y = m.q(x)
        return F.silu(y) + y

    check(twice, 1, present={aten.silu.default: 1}, misses=("is used elsewhere too",) * 2)


def test_a_scaled_or_broadcast_residual_is_left_alone():
    check(lambda m, x: torch.add(x, m.o(x), alpha=2), 1, present={aten.add.Tensor: 1})
    check(lambda m, x: m.o(x) + x[:, :, :1], 1, present={aten.add.Tensor: 1}, misses=("differ in shape",))


def test_a_bias_after_rounding_is_left_alone():
    misses = ("before the bias is added", "differ in shape")
    check(lambda m, x: m.k(x) + m.bias, 1, dtype=torch.bfloat16, present={aten.add.Tensor: 1}, misses=misses)


def test_a_weight_computed_at_run_time_is_left_alone():
    check(lambda m, x: F.linear(x, x[0]), 0, linears=0, misses=("computed at run time",))


def test_merged_names_say_what_was_merged():
    assert merged_name(["a_q_proj_w", "a_k_proj_w", "a_v_proj_w"]) == "a_q_k_v_proj_w"
    assert merged_name(["mlp_gate_w", "mlp_up_w"]) == "mlp_gate_up_w"
    assert merged_name(["a", "b"]) == "a_b"
