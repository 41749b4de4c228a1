"""Linear and gated linear beside eager: vector, narrow and tall; ragged sizes; packed and row-major; every epilogue."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.ops import ACTIVATIONS
from torch import Tensor

from .graphs import Compiled, check, random

effc = torch.ops.effc
ROWS = (300, 17, 16, 15, 2, 1)
"""Both sides of where one kernel hands over to the next."""

pytestmark = pytest.mark.usefixtures("one_thread")


def weight(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return (random(n, k, seed=seed) / k**0.5).to(dtype)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "row-major"])
@pytest.mark.parametrize(("n", "k"), [(128, 64), (70, 100), (96, 33), (1, 1), (257, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_compilation_serves_every_row_count(dtype: torch.dtype, n: int, k: int, pack: bool) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return effc.linear(x, w, b, r)

    def tensors(rows: int, batch: int = 1) -> dict[str, Tensor]:
        x, r = random(batch, rows, k, dtype=dtype, seed=rows), random(batch, rows, n, dtype=dtype, seed=2)
        return {"x": x, "w": w, "b": b, "r": r}

    w, b = weight(n, k, dtype), random(n, dtype=dtype, seed=3)
    compiled = Compiled(function, tensors(5, batch=3), {"x": (0, 1), "r": (0, 1)}, ("w",), pack=pack)
    assert not compiled.fallbacks
    assert len(compiled.scheduled.schedule.kernels) == 3
    for rows in ROWS:
        compiled.check(**tensors(rows))
    compiled.check(**tensors(0))


@pytest.mark.parametrize("rows", ROWS)
def test_fixed_row_counts_choose_while_compiling(rows: int) -> None:
    compiled = check(effc.linear, x=random(rows, 48), weight=weight(64, 48))
    assert len(compiled.scheduled.schedule.kernels) == 1


@pytest.mark.parametrize(
    ("n", "k", "dtype"), [(64, 32, torch.float16), (70, 100, torch.float32), (70, 100, torch.bfloat16)]
)
def test_every_activation(n: int, k: int, dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        plain = tuple(effc.linear(x, w, b, r, name) for name in ACTIVATIONS)
        return *plain, *(effc.gated_linear(x, w, b, name) for name in ACTIVATIONS)

    def tensors(rows: int) -> dict[str, Tensor]:
        return {"x": random(rows, k, dtype=dtype), "w": w, "b": b, "r": random(rows, 2 * n, dtype=dtype, seed=3)}

    # A gated linear halves the rows of the weight, so 2N of them.
    w, b = weight(2 * n, k, dtype), random(2 * n, dtype=dtype, seed=2)
    compiled = Compiled(function, tensors(5), {"x": (0,), "r": (0,)})
    for rows in (100, 3, 1):
        compiled.check(**tensors(rows))


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "row-major"])
@pytest.mark.parametrize("n", [64, 70])
def test_gated_linear_at_every_row_count(n: int, pack: bool) -> None:
    w = weight(2 * n, 100)
    compiled = Compiled(effc.gated_linear, {"x": random(2, 5, 100), "w": w}, {"x": (0, 1)}, ("w",), pack=pack)
    for rows in ROWS:
        compiled.check(x=random(1, rows, 100, seed=rows), w=w)


def test_operands_of_any_rank_and_stride() -> None:
    def function(x: Tensor, w: Tensor, wt: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (
            effc.linear(v, w),
            effc.linear(x.transpose(0, 1), w),
            effc.linear(x[:, 1], w),
            effc.linear(x, wt.t()),
            effc.linear(x.transpose(1, 2), w[:, :5]),
            effc.linear(x * 2, w, None, effc.linear(x, w).transpose(0, 1).transpose(0, 1)),
            effc.linear(x.expand(3, 4, 5, 24), w).sum(-1),
            effc.linear(x, w[::2], w[:16, 0]),
        )

    x, w, wt, v = random(4, 5, 24), weight(32, 24), weight(24, 32, seed=2), random(24, seed=3)
    check(function, x=x, w=w, wt=wt, v=v)


def test_a_row_of_nan_stays_a_row() -> None:
    for rows in (3, 20):
        x = random(rows, 33)
        x[1] = float("nan")
        x[2, 5] = float("inf")
        check(lambda x, w: (effc.linear(x, w, None, None, "relu"), effc.gated_linear(x, w)), x=x, w=weight(34, 33))


def test_a_residual_of_another_shape_runs_through_aten() -> None:
    check(lambda x, w, r: effc.linear(x, w, None, r), x=random(3, 8), w=weight(16, 8), r=random(16), fallbacks=1)


def test_mixed_dtypes_run_through_aten() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return effc.linear(x, w)

    check(function, x=random(3, 8).double(), w=weight(16, 8).double(), fallbacks=1)
