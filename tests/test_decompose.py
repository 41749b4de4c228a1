"""Ops without a kernel become ops that have one where all of them do; otherwise one call of ATen stays one."""

from __future__ import annotations

import pytest
import torch
from effc.codegen.decompose import decompose
from torch import Tensor
from torch.nn import functional as F

from .graphs import check, graph_of, random

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("one_thread")


def targets(function: object, **tensors: Tensor) -> list[str]:
    graph = decompose(graph_of(function, tensors))
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_an_op_becomes_ops_with_kernels() -> None:
    found = targets(lambda x: F.leaky_relu(x, 0.1) + 1, x=random(3, 5))
    assert "aten.leaky_relu.default" not in found
    assert {"aten.where.self", "aten.gt.Scalar", "aten.add.Tensor"} <= set(found)


def test_a_second_run_changes_nothing() -> None:
    once = decompose(graph_of(lambda x: F.softplus(x), {"x": random(3, 5)}))
    assert decompose(once) is once


def test_a_graph_that_has_all_kernels_is_left_alone() -> None:
    graph = graph_of(lambda x: x.sin() + 1, {"x": random(3)})
    assert decompose(graph) is graph


def test_what_would_become_several_calls_of_aten_stays_one() -> None:
    assert "aten.einsum.default" in targets(lambda x: torch.einsum("ij,kj->ik", x, x), x=random(3, 5))
    assert "aten.cumprod.default" in targets(lambda x: x.cumprod(0), x=random(3, 5))


def test_rows_of_runtime_length_stay_one_call() -> None:
    compiled = check(lambda x: x.var(-1), x=random(3, 5), dynamic={"x": (1,)}, fallbacks=1)
    compiled.check(x=random(3, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decomposed_ops_round_where_eager_does(dtype: torch.dtype) -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.lerp(x, y, 0.3),
            torch.addcmul(x, y, y, value=0.3),
            F.elu(x),
            F.softplus(x),
            F.mish(x),
            F.hardswish(x),
            x.var(-1),
            x.std(-1, keepdim=True),
            torch.logsumexp(x, -1),
            x.nan_to_num(),
            x.sum(),
            x.abs().max(),
        )

    check(function, x=random(9, 33, dtype=dtype), y=random(9, 33, dtype=dtype, seed=1))


def test_shapes_decompose_to_views() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return torch.kron(x, y), torch.outer(y, y), x.repeat(2, 2), x.tril(), torch.broadcast_to(y, (3, 5)) + 1

    check(function, x=random(3, 5), y=random(5))
