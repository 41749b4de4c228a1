"""Reductions over other axes than the last: a lane for each result, a loop over what it reduces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .graphs import check, random

pytestmark = pytest.mark.usefixtures("one_thread")


def reductions(x: Tensor) -> tuple[Tensor, ...]:
    return (
        x.sum(0),
        x.mean(1),
        x.mean((0, 1), keepdim=True),
        x.amax((0, 1)),
        x.amin(1, keepdim=True),
        (x > 0).any(0),
        (x > -1).all((0, 1), keepdim=True),
        x.var(0),
        x.std((0, 1), keepdim=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_agree_with_eager_at_any_length(dtype: torch.dtype) -> None:
    compiled = check(reductions, x=random(40, 3, 17, dtype=dtype), dynamic={"x": (0, 1)})
    for batch, length in ((2, 5), (7, 30), (3, 2)):
        compiled.check(luck=2, x=random(batch, length, 17, dtype=dtype, seed=length))


def test_of_integers_and_booleans() -> None:
    def function(i: Tensor) -> tuple[Tensor, ...]:
        return i.sum(0), (i > 0).sum(1), i.amax(0), i.amin((0, 1)), i.any(0), i.all(1)

    for dtype in (torch.int64, torch.int32):
        check(function, i=torch.arange(-30, 30, dtype=dtype).reshape(3, 4, 5))


def test_what_is_reduced_and_what_follows_share_the_kernel() -> None:
    compiled = check(lambda x, y: ((x * 2 + y).sin().sum(1) + 1).exp(), x=random(4, 3, 9), y=random(9))
    assert len(compiled.scheduled.schedule.steps) == 1
    assert compiled.source.count("for k in range(3)") == 1


def test_it_is_not_computed_again_for_each_row_that_reads_it() -> None:
    compiled = check(lambda x: x - x.mean(0), x=random(100, 9))
    assert len(compiled.scheduled.schedule.steps) == 2


def test_special_values_stay_in_their_column() -> None:
    x = random(4, 8)
    x[1, 2], x[2, 3], x[3, 4], x[0, 4] = float("nan"), float("inf"), float("-inf"), float("inf")
    check(lambda x: (x.sum(0), x.mean(0), x.amax(0), x.amin(0)), x=x)


def test_sums_of_many_are_as_close_as_eagers() -> None:
    check(lambda x: x.sum(0), x=random(3000, 16) + 1)


def test_all_axes_at_once_are_one_row() -> None:
    check(lambda x: (x.sum((0, 1)), x.mean((0, 1), keepdim=True), x.amax(), x.var()), x=random(4, 6))


def test_other_dtypes_are_left_to_aten() -> None:
    check(lambda i: i.amax(0), i=torch.ones(3, 4, dtype=torch.int8), fallbacks=1)
