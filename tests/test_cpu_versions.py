"""Nests that are printed with and without their masks: each tile takes the one that fits."""

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower
from effc.codegen.cpu.target import LANES, best_isa

ISAS = [isa for isa in LANES if list(LANES).index(isa) >= list(LANES).index(best_isa())]
GRANTED = "inside of its masks"


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("EFFC_ISA", request.param)
    return request.param


@triton.jit
def causal_kernel(x_ptr, out_ptr, rows, columns, shift, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each row as far as its own number plus `shift`: softmax over what is seen."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, columns, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = (r[:, None] < rows) & (c[None, :] < columns)
        x = tl.load(x_ptr + r[:, None] * columns + c[None, :], mask=inside, other=0.0)
        seen = (c[None, :] < columns) & (c[None, :] <= r[:, None] + shift)
        e = tl.where(seen, tl.exp(x) + 1.0, 0.25)
        total += tl.sum(e, 1) - tl.min(e, 1)
        tl.store(out_ptr + r[:, None] * columns + c[None, :], e, mask=inside)
    tl.store(out_ptr + rows * columns + r, total, mask=r < rows)


@pytest.mark.parametrize("shift", [0, 31, 32, -40, 1000, 2**31 - 40])
def test_tiles_on_both_sides_of_a_diagonal(shift, isa):
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32", "columns": "i32", "shift": "i32"}
    kernel = lower(causal_kernel, types, {"ROWS": 32, "COLUMNS": 32})
    assert GRANTED in kernel.cpp
    for rows, columns in ((64, 96), (70, 33), (5, 100)):
        print(f"seed {rows}")
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        out = torch.zeros(rows * columns + rows)
        launch(kernel, (triton.cdiv(rows, 32),), x, out, rows, columns, shift)
        r, c = torch.arange(rows)[:, None], torch.arange(triton.cdiv(columns, 32) * 32)[None, :]
        bound = r + shift
        bound = torch.where(bound >= 2**31, bound - 2**32, bound)  # as int32 wraps
        padded = torch.nn.functional.pad(x, (0, c.shape[1] - columns))
        e = torch.where((c < columns) & (c <= bound), padded.exp() + 1, 0.25)
        torch.testing.assert_close(out[: rows * columns].view(rows, columns), e[:, :columns])
        tiles = e.view(rows, -1, 32)
        torch.testing.assert_close(out[rows * columns :], (tiles.sum(-1) - tiles.amin(-1)).sum(-1))
