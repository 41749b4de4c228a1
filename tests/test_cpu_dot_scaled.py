"""tl.dot_scaled on the CPU target: blocks of small floats that share scales, against tables of their values."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from .on_cpu import randint, randn, run

M, N, K, GROUP = 16, 32, 64, 32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@triton.jit
def scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, AM: tl.constexpr, AK: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    G: tl.constexpr, A: tl.constexpr, B: tl.constexpr, A_PACKED: tl.constexpr, B_PACKED: tl.constexpr,
    A_SCALED: tl.constexpr, B_SCALED: tl.constexpr,
):  # fmt: skip
    i, j, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, G)
    a = tl.load(a_ptr + tl.arange(0, AM)[:, None] * AK + tl.arange(0, AK)[None, :])
    b = tl.load(b_ptr + tl.arange(0, BK)[:, None] * BN + tl.arange(0, BN)[None, :])
    a_scale = None
    b_scale = None
    if A_SCALED:
        a_scale = tl.load(a_scale_ptr + i[:, None] * G + g[None, :])
    if B_SCALED:
        b_scale = tl.load(b_scale_ptr + j[:, None] * G + g[None, :])
    c = tl.load(c_ptr + i[:, None] * N + j[None, :])
    c = tl.dot_scaled(a, a_scale, A, b, b_scale, B, c, lhs_k_pack=A_PACKED, rhs_k_pack=B_PACKED)
    tl.store(out_ptr + i[:, None] * N + j[None, :], c)


def operand(kind: str, rows: int, columns: int, axis: int, seed: int) -> tuple[Tensor, Tensor]:
    """What a kernel is given for [rows, columns] in a format, e2m1 packed along `axis`; and its values in fp64."""
    if kind == "e2m1":
        shape = (rows // 2, columns) if axis == 0 else (rows, columns // 2)
        given = randint(0, 256, shape, dtype=torch.uint8, seed=seed)
        return given, torch.stack((E2M1[(given & 15).long()], E2M1[(given >> 4).long()]), axis + 1).reshape(
            rows, columns
        )
    if kind in FP8:
        values = randn(rows, columns, seed=seed).to(FP8[kind])
        return values.view(torch.uint8), values.double()
    values = randn(rows, columns, seed=seed).to(torch.bfloat16 if kind == "bf16" else torch.float16)
    return values, values.double()


def scales(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    given = randint(117, 137, (rows, K // GROUP), dtype=torch.uint8, seed=seed)
    return given, (2.0 ** (given.double() - 127)).repeat_interleave(GROUP, dim=1)


@pytest.mark.parametrize(
    ("kinds", "scaled", "packed"),
    [
        (("e2m1", "e2m1"), (True, True), (True, True)),
        (("e2m1", "e2m1"), (True, True), (False, False)),
        (("e4m3", "e5m2"), (True, True), (True, True)),
        (("bf16", "e2m1"), (False, True), (True, True)),
        (("e5m2", "bf16"), (True, False), (True, True)),
        (("fp16", "e4m3"), (False, True), (True, True)),
    ],
)
def test_products_of_scaled_blocks(kinds, scaled, packed, isa):
    a, a_values = operand(kinds[0], M, K, 1 if packed[0] else 0, seed=1)
    b, b_values = operand(kinds[1], K, N, 0 if packed[1] else 1, seed=2)
    (a_scale, a_factors), (b_scale, b_factors) = scales(M, 3), scales(N, 4)
    c, out = randn(M, N, seed=5), torch.zeros(M, N)
    a_wide = a_values * a_factors if scaled[0] else a_values
    b_wide = b_values * b_factors.T if scaled[1] else b_values
    run(
        scaled_kernel, (1,), a, a_scale, b, b_scale, c, out,
        M=M, N=N, AM=a.shape[0], AK=a.shape[1], BK=b.shape[0], BN=b.shape[1],
        G=K // GROUP, A=kinds[0], B=kinds[1], A_PACKED=packed[0], B_PACKED=packed[1],
        A_SCALED=scaled[0], B_SCALED=scaled[1],
    )  # fmt: skip
    magnitude = a_wide.abs() @ b_wide.abs() + c.abs()
    assert ((out - (a_wide @ b_wide + c)).abs() <= 2e-6 * magnitude).all()


def test_scales_at_the_ends_of_their_range():
    """0 is 2^-127, and 255 is NaN in its row only."""
    a, a_values = operand("e4m3", M, K, 1, seed=1)
    a_scale = torch.full((M, K // GROUP), 127, dtype=torch.uint8)
    a_scale[0], a_scale[1], a_scale[2, 1] = 0, 250, 255
    b = torch.zeros(K, N, dtype=torch.bfloat16)
    b[0] = 0.5
    out = torch.zeros(M, N)
    run(
        scaled_kernel, (1,), a, a_scale, b, a_scale, torch.zeros(M, N), out,
        M=M, N=N, AM=M, AK=K, BK=K, BN=N, G=K // GROUP, A="e4m3", B="bf16", A_PACKED=True, B_PACKED=True,
        A_SCALED=True, B_SCALED=False,
    )  # fmt: skip
    factor = 2.0 ** (a_scale[:, 0].double() - 127)
    want = (a_values[:, 0] * factor / 2).float()[:, None].expand(M, N)
    assert out[2].isnan().all()
    keep = [row for row in range(M) if row != 2]
    assert torch.equal(out[keep], want[keep])
