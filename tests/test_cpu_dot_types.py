"""tl.dot on the CPU target: every type of operand and result, batches, accumulators."""

import pytest
import torch
import triton
import triton.language as tl

from .on_cpu import randint, randn, run

RESULTS = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.int32: tl.int32}
M, N, K = 16, 32, 64


@triton.jit
def product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i, j, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(a_ptr + i * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + j)
    c = tl.dot(a, b, tl.load(c_ptr + i * N + j), PRECISION, out_dtype=R, max_num_imprecise_acc=16)
    tl.store(c_ptr + i * N + j, c)
    tl.store(c_ptr + M * N + i * N + j, tl.dot(a, b, out_dtype=R))


@pytest.mark.parametrize(
    ("operands", "result", "precision"),
    [
        (torch.float32, torch.float32, "ieee"),
        (torch.float32, torch.float32, "tf32"),
        (torch.float32, torch.float32, "tf32x3"),
        (torch.bfloat16, torch.float32, None),
        (torch.float16, torch.float32, None),
        (torch.float8_e4m3fn, torch.float32, None),
        (torch.float8_e5m2, torch.float32, None),
        (torch.float64, torch.float64, None),
        (torch.float16, torch.float16, None),
        (torch.int8, torch.int32, None),
    ],
)
def test_products_of_every_type(operands, result, precision, isa):
    if operands is torch.int8:
        a, b = randint(-128, 128, (M, K), dtype=operands), randint(-128, 128, (K, N), dtype=operands, seed=1)
        c = randint(-1000, 1000, (2, M, N), dtype=result, seed=2)
    else:
        a, b, c = randn(M, K).to(operands), randn(K, N, seed=1).to(operands), randn(2, M, N, seed=2).to(result)
    exact = a.double() @ b.double()
    want = torch.stack([exact + c[0].double(), exact]).to(result)
    run(product_kernel, (1,), a, b, c, M=M, N=N, K=K, R=RESULTS[result], PRECISION=precision)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-13, torch.float16: 1e-3, torch.int32: 0}[result]
    torch.testing.assert_close(c, want, rtol=tolerance, atol=tolerance)


@triton.jit
def batch_kernel(a_ptr, b_ptr, c_ptr, n, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    z, k = tl.arange(0, B)[:, None, None], tl.arange(0, K)
    i, j = tl.arange(0, M)[None, :, None], tl.arange(0, N)[None, None, :]
    a = tl.load(a_ptr + z * M * K + i * K + k[None, None, :])
    b = tl.load(b_ptr + z * K * N + k[None, :, None] * N + j)
    total = tl.zeros([B, M, N], c_ptr.dtype.element_ty)
    for _ in range(n):
        total = tl.dot(a, b, total, out_dtype=c_ptr.dtype.element_ty)
    tl.store(c_ptr + z * M * N + i * N + j, total)


@pytest.mark.parametrize(
    ("operands", "result", "shape"),
    [
        (torch.float32, torch.float32, (4, 16, 16, 32)),
        (torch.bfloat16, torch.float32, (2, 16, 8, 16)),
        (torch.int8, torch.int32, (2, 2, 2, 16)),
        (torch.float64, torch.float64, (2, 4, 4, 8)),
    ],
)
def test_batches_of_products(operands, result, shape, isa):
    b, m, n, k = shape
    x, y = randint(-9, 9, (b, m, k), dtype=operands), randint(-9, 9, (b, k, n), dtype=operands, seed=1)
    out = torch.zeros(b, m, n, dtype=result)
    run(batch_kernel, (1,), x, y, out, 3, B=b, M=m, N=n, K=k)
    assert torch.equal(out, (3 * (x.double() @ y.double())).to(result))
