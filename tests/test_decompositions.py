"""Reductions in forms that have kernels: other axes, long rows, no axes, places of extremes; beside eager."""

from __future__ import annotations

import pytest
import torch
from effc.codegen.decompose import decompose
from torch import Tensor

from .graphs import Compiled, check, graph_of, random

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)


def places(x: Tensor) -> tuple[Tensor, ...]:
    """x [B, 7, 5]"""
    largest, at = x.max(1)
    smallest, where = x.min(-1, keepdim=True)
    return (
        x.argmax(-1),
        x.argmin(1, keepdim=True),
        x[0].argmax(),
        (x + 1).argmin(-1, keepdim=True),
        at,
        largest + 1,
        smallest,
        where * 2,
        *torch.aminmax(x, dim=-1),
        *torch.aminmax(x[0]),
    )


@DTYPES
def test_places_of_extremes_equal_eagers_the_first_of_equals(dtype: torch.dtype) -> None:
    def values(batch: int) -> Tensor:
        return (random(batch, 7, 5, seed=batch) * 2).round().to(dtype)  # with many equals

    compiled = Compiled(places, {"x": values(3)}, {"x": (0,)})
    assert not compiled.fallbacks
    for batch in (3, 1, 40):
        compiled.check(x=values(batch))


def test_the_first_nan_is_the_extreme() -> None:
    x = random(4, 9)
    x[0, 3], x[1, 8], x[1, 0], x[2, :] = float("nan"), float("nan"), float("inf"), float("-inf")
    check(lambda x: (x.argmax(-1), x.argmin(-1), x.argmax(0), *x.max(1)), x=x)


def axes(x: Tensor) -> tuple[Tensor, ...]:
    """x [B, 4, 6]"""
    return (
        x.sum((1, 2)),
        x.amax((1, -1), keepdim=True),
        x[0].float().mean((0, 1)),
        torch.amin(x, (2, 1)) * 2,
        aten.sum.dim_IntList(x[0, 0, 0], []),
    )


@DTYPES
def test_reductions_of_several_axes_with_the_last(dtype: torch.dtype) -> None:
    compiled = Compiled(axes, {"x": (random(3, 4, 6) * 9).to(dtype)}, {"x": (0,)})
    assert not compiled.fallbacks
    for batch in (3, 1, 20):
        compiled.check(luck=2, x=(random(batch, 4, 6, seed=batch) * 9).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmaxes_along_other_axes(dtype: torch.dtype) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.softmax(1), (x * 2).softmax(-2).sum(-1), x.log_softmax(1), aten._softmax(x, -2, False)

    compiled = check(function, x=random(3, 7, 5, dtype=dtype), dynamic={"x": (0,)})
    compiled.check(x=random(9, 7, 5, dtype=dtype, seed=1))


def long_rows(x: Tensor) -> tuple[Tensor, ...]:
    """x [B, 20000]"""
    return x.sum(-1), x.mean(-1, keepdim=True), x.amax(-1), x.amin(-1), x.softmax(-1), x.log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_no_tile_holds_are_reduced_in_parts(dtype: torch.dtype) -> None:
    compiled = check(long_rows, x=random(2, 20_000, dtype=dtype), dynamic={"x": (0,)})
    compiled.check(x=random(3, 20_000, dtype=dtype, seed=1))


def test_what_cannot_be_cut_or_is_known_only_at_run_time_is_left_to_aten() -> None:
    check(lambda x: (x.sum(-1), x.argmax(-1)), x=random(2, 16_411), fallbacks=2)  # a prime
    check(lambda x: (x.softmax(1), x.sum((1, 2))), x=random(3, 4, 5), dynamic={"x": (1,)}, fallbacks=2)


def test_a_second_run_changes_nothing() -> None:
    once = decompose(graph_of(lambda x: (*x.max(0), x.sum((0, 1)), x.softmax(0)), {"x": random(3, 5)}))
    assert decompose(once) is once
