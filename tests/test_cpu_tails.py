"""Reductions over blocks longer than their rows: the lanes past a mask count, although no loop visits them."""

import math

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower
from effc.codegen.cpu.target import LANES, best_isa

ISAS = [isa for isa in LANES if list(LANES).index(isa) >= list(LANES).index(best_isa())]
BLOCK = 64


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("EFFC_ISA", request.param)
    return request.param


@triton.jit
def tails_kernel(x_ptr, i_ptr, out_ptr, sums_ptr, n, m, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * BLOCK + c, mask=c < n, other=OTHER)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * BLOCK + c, e / tl.sum(e, 0), mask=c < n)
    bounded = tl.where(c < m, x * 2 + row, 5.0)
    i = tl.load(i_ptr + row * BLOCK + c, mask=c < n, other=3)
    tl.store(sums_ptr + row * 6, tl.sum(e, 0))
    tl.store(sums_ptr + row * 6 + 1, tl.sum(x * x + 1.0, 0))
    tl.store(sums_ptr + row * 6 + 2, tl.min(x + c, 0))
    tl.store(sums_ptr + row * 6 + 3, tl.max(bounded, 0))
    tl.store(sums_ptr + row * 6 + 4, tl.sum(i * 2 + row, 0).to(tl.float32))
    tl.store(sums_ptr + row * 6 + 5, tl.max(-i, 0).to(tl.float32))


@triton.jit
def rows_kernel(x_ptr, out_ptr, rows, n, OTHER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    mask = (r[:, None] < rows) & (c[None, :] < n)
    x = tl.load(x_ptr + r[:, None] * BLOCK + c[None, :], mask=mask, other=OTHER)
    e = tl.exp(x - tl.max(x, 1)[:, None])
    tl.store(out_ptr + r[:, None] * BLOCK + c[None, :], e / tl.sum(e, 1)[:, None], mask=mask)


def inputs(rows: int, seed: int = 5) -> torch.Tensor:
    print(f"seed {seed}")
    x = torch.randn(rows, BLOCK, generator=torch.Generator().manual_seed(seed)) * 3
    x[0] = -math.inf
    x[1, 2] = math.inf
    x[2, 0] = math.nan
    x[3] -= 200
    return x


def padded(x: torch.Tensor, n: int, other: float) -> torch.Tensor:
    return torch.where(torch.arange(x.shape[1]) < n, x, torch.tensor(other, dtype=x.dtype))


def largest(x: torch.Tensor) -> torch.Tensor:
    """The maximum as tl.max takes it: NaN only where there is nothing else."""
    most = torch.where(x.isnan(), -math.inf, x).amax(-1, keepdim=True)
    return torch.where(x.isnan().all(-1, keepdim=True), math.nan, most)


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("other", [-math.inf, 0.0, math.nan], ids=str)
def test_equal_terms_past_a_mask_are_counted(other, isa):
    x = inputs(6)
    i = torch.arange(x.numel(), dtype=torch.int32).view(x.shape) % 37
    types = {"x_ptr": "*fp32", "i_ptr": "*i32", "out_ptr": "*fp32", "sums_ptr": "*fp32", "n": "i32", "m": "i32"}
    kernel = lower(tails_kernel, types, {"OTHER": other, "BLOCK": BLOCK})
    for n, m in ((0, 5), (1, 64), (33, 20), (40, 63), (64, 64), (100, -3)):
        out, sums = torch.full_like(x, 7.0), torch.zeros(6, 6)
        launch(kernel, (6,), x, i, out, sums, n, m)
        p, ip, c = padded(x.double(), n, other), padded(i, n, 3), torch.arange(BLOCK)
        e = (p - largest(p)).exp()
        near(sums[:, 0], e.sum(-1))
        near(sums[:, 1], (p * p + 1).sum(-1))
        rows = torch.arange(6)[:, None]
        near(sums[:, 3], largest(torch.where(c < m, p * 2 + rows, 5.0))[:, 0])
        assert torch.equal(sums[:, 4], (ip * 2 + rows).sum(-1).float())
        assert torch.equal(sums[:, 5], (-ip).amax(-1).float())
        lowest = -largest(-(p + c))[:, 0]
        near(sums[:, 2], lowest)
        want = (e / e.sum(-1, keepdim=True))[:, : max(n, 0)]
        near(out[:, : max(n, 0)], want)
        assert (out[:, min(n, BLOCK) :] == 7).all()


@pytest.mark.parametrize("other", [-math.inf, 1.0], ids=str)
def test_rows_of_a_block_have_tails_of_their_own(other, isa):
    x = inputs(8)
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32", "n": "i32"}
    kernel = lower(rows_kernel, types, {"OTHER": other, "ROWS": 8, "BLOCK": BLOCK})
    for rows, n in ((8, 64), (5, 33), (8, 7), (3, 0)):
        out = torch.full_like(x, 7.0)
        launch(kernel, (1,), x, out, rows, n)
        p = padded(x.double(), n, other)
        e = (p - largest(p)).exp()
        near(out[:rows, :n], (e / e.sum(-1, keepdim=True))[:rows, :n])
        assert (out[rows:] == 7).all()
        assert (out[:, n:] == 7).all()
