"""Running sums along any axis, of any length, beside eager."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .graphs import Compiled, check, random

pytestmark = pytest.mark.usefixtures("one_thread")


def sums(x: Tensor) -> tuple[Tensor, ...]:
    """x [B, S, 5]"""
    return x.cumsum(0), x.cumsum(1) * 2, (x + 1).cumsum(-1), x.mT.cumsum(-1), x.flatten(1).cumsum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.float64], ids=str)
def test_they_equal_eagers_along_every_axis_and_length(dtype: torch.dtype) -> None:
    def values(batch: int, length: int) -> Tensor:
        return (random(batch, length, 5, seed=length) * 9).to(dtype)

    compiled = Compiled(sums, {"x": values(3, 700)}, {"x": (0, 1)})
    assert not compiled.fallbacks
    for batch, length in ((3, 700), (1, 1), (40, 17), (2, 257), (2, 0)):
        compiled.check(x=values(batch, length))


def test_of_truth_and_small_integers() -> None:
    def function(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return (x > 0).cumsum(-1), i.cumsum(0), i.cumsum(0, dtype=torch.int32), (x > 1).int().cumsum(0)

    check(function, x=random(30, 40), i=torch.arange(90, dtype=torch.int32) * 10**8)


def test_special_values_stay_behind_their_place() -> None:
    x = random(4, 300)
    x[0, 5], x[1, 280], x[2, 0], x[3, 20], x[3, 270] = (float(value) for value in ("nan", "inf", "-inf", "inf", "-inf"))
    check(lambda x: x.cumsum(-1), x=x)


def test_other_dtypes_are_left_to_aten() -> None:
    def function(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return x.cumsum(0, dtype=torch.float64), i.cumsum(0, dtype=torch.int8)

    check(function, x=random(9), i=torch.ones(9, dtype=torch.int8), fallbacks=2)
