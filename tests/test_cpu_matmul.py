"""The CPU target against PyTorch: matrix-vector and tiled products, attention, in the shapes of language models."""

import ctypes
import math
import mmap

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def run(fn, grid, *args, **constants):
    names = [name for name in fn.arg_names if name not in constants]
    pairs = zip(names, args, strict=True)
    signature = {
        n: TYPES[a.dtype] if isinstance(a, torch.Tensor) else "fp32" if isinstance(a, float) else "i32"
        for n, a in pairs
    }
    kernel = lower(fn, signature, constants)
    launch(kernel, grid, *args)
    return kernel


def random(*shape, seed=0, dtype=torch.float32, scale=1.0):
    print(f"seed {seed}")
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(got, want, dtype=torch.float32):
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@triton.jit
def gemv_packed_kernel(x_ptr, w_ptr, out_ptr, K, BN: tl.constexpr, BK: tl.constexpr):
    pid = tl.program_id(0)
    n = tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + pid * BN * K + k[:, None] * BN + n[None, :], mask=k[:, None] < K, other=0.0).to(tl.float32)
        acc += tl.sum(x[:, None] * w, 0)
    tl.store(out_ptr + pid * BN + n, acc)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("k", [1, 64, 100])
def test_matrix_times_vector_packed(dtype, k, isa):
    w, x = random(128, k, dtype=dtype, scale=0.2), random(k, seed=1, dtype=dtype)
    packed = w.view(2, 64, k).transpose(1, 2).contiguous()
    out = torch.zeros(128, dtype=dtype)
    run(gemv_packed_kernel, (2,), x, packed, out, k, BN=64, BK=32)
    close(out, w.double() @ x.double(), dtype)


@triton.jit
def gemv_rows_kernel(x_ptr, w_ptr, out_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        mask = (n[:, None] < N) & (k[None, :] < K)
        w = tl.load(w_ptr + n[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(w * x[None, :], 1)
    tl.store(out_ptr + n, acc, mask=n < N)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1), (13, 100), (64, 256)])
def test_matrix_times_vector_rows(dtype, shape, isa):
    n, k = shape
    w, x = random(n, k, dtype=dtype, scale=0.2), random(k, seed=1, dtype=dtype)
    out = torch.zeros(n, dtype=dtype)
    run(gemv_rows_kernel, (triton.cdiv(n, 8),), x, w, out, n, k, BN=8, BK=64)
    close(out, w.double() @ x.double(), dtype)


@triton.jit
def gemv_batch_kernel(x_ptr, w_ptr, out_ptr, K, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    pid = tl.program_id(0)
    n, m = tl.arange(0, BN), tl.arange(0, M)
    acc = tl.zeros([M, BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        w = tl.load(w_ptr + pid * BN * K + k[:, None] * BN + n[None, :], mask=k[:, None] < K, other=0.0)
        acc += tl.sum(x[:, :, None] * w[None, :, :], 1)
    tl.store(out_ptr + m[:, None] * (tl.num_programs(0) * BN) + pid * BN + n[None, :], acc)


def test_several_vectors_times_a_matrix(isa):
    w, x = random(128, 70, scale=0.2), random(4, 70, seed=1)
    packed = w.view(2, 64, 70).transpose(1, 2).contiguous()
    out = torch.zeros(4, 128)
    run(gemv_batch_kernel, (2,), x, packed, out, 70, M=4, BN=64, BK=32)
    close(out, x.double() @ w.double().T)


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, M, N, K,
    PACKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pid_n = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        if PACKED:
            lane = tl.arange(0, BN)
            w = tl.load(w_ptr + pid_n * BN * K + k[:, None] * BN + lane[None, :], mask=k[:, None] < K, other=0.0)
        else:
            w = tl.load(w_ptr + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    mask = (m[:, None] < M) & (n[None, :] < N)
    offsets = m[:, None] * N + n[None, :]
    acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = acc * tl.sigmoid(acc) + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, acc, mask=mask)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 40), (33, 128, 100)])
def test_tiled_linear_with_epilogue(dtype, packed, shape, isa):
    m, n, k = shape
    x, w = random(m, k, dtype=dtype), random(n, k, seed=1, dtype=dtype, scale=0.1)
    bias, residual = random(n, seed=2, dtype=dtype), random(m, n, seed=3, dtype=dtype)
    weights = w.view(n // 32, 32, k).transpose(1, 2).contiguous() if packed else w
    out = torch.zeros(m, n, dtype=dtype)
    grid = (triton.cdiv(m, 16), triton.cdiv(n, 32))
    run(linear_kernel, grid, x, weights, bias, residual, out, m, n, k, PACKED=packed, BM=16, BN=32, BK=32)
    want = torch.nn.functional.silu(x.double() @ w.double().T + bias.double()) + residual.double()
    close(out, want, dtype)


def test_linear_writes_onto_its_residual_in_place(isa):
    x, w, bias, residual = random(20, 64), random(64, 64, seed=1, scale=0.1), random(64, seed=2), random(20, 64, seed=3)
    want = torch.nn.functional.silu(x @ w.T + bias) + residual
    grid = (2, 2)
    run(linear_kernel, grid, x, w, bias, residual, residual, 20, 64, 64, PACKED=False, BM=16, BN=32, BK=32)
    close(residual, want)


@triton.jit
def int8_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i[:, None] * N + i[None, :])
    b = tl.load(b_ptr + i[None, :] * N + i[:, None])
    tl.store(out_ptr + i[:, None] * N + i[None, :], tl.dot(a, b))


def test_int8_dot_is_exact():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (32, 32), generator=generator, dtype=torch.int8) for _ in range(2))
    out = torch.zeros(32, 32, dtype=torch.int32)
    run(int8_kernel, (1,), a, b, out, N=32)
    assert torch.equal(out, a.int() @ b.int().T)


@triton.jit
def flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lens_ptr, S, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Causal attention of GROUP query heads per key head; keys of a sequence end at lens[head]."""
    head = tl.program_id(1)
    length = tl.load(lens_ptr + head)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + head * S * D + m[:, None] * D + d[None, :], mask=m[:, None] < S, other=0.0)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    kv = (head // GROUP) * S * D
    end = tl.minimum(length, tl.program_id(0) * BM + BM)
    for start in range(0, end, BN):
        n = start + tl.arange(0, BN)
        k = tl.load(k_ptr + kv + n[:, None] * D + d[None, :], mask=n[:, None] < S, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if start + BN > tl.program_id(0) * BM or start + BN > length:
            s = tl.where((n[None, :] <= m[:, None]) & (n[None, :] < length), s, float("-inf"))
        new_best = tl.maximum(best, tl.max(s, 1))
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
        p = tl.exp2(s - safe[:, None])
        alpha = tl.exp2(best - safe)
        total = total * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + kv + n[:, None] * D + d[None, :], mask=n[:, None] < S, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        best = new_best
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + head * S * D + m[:, None] * D + d[None, :], out, mask=m[:, None] < S)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("size", [1, 50, 100])
def test_flash_attention(dtype, size, isa):
    q = random(4, size, 64, dtype=dtype)
    k, v = random(2, size, 64, seed=1, dtype=dtype), random(2, size, 64, seed=2, dtype=dtype)
    lens = torch.tensor([size, max(1, size // 2), size, 0], dtype=torch.int32)
    out = torch.full_like(q, math.nan)
    scale = 0.125 * math.log2(math.e)
    run(flash_kernel, (triton.cdiv(size, 32), 4), q, k, v, out, lens, size, scale, GROUP=2, D=64, BM=32, BN=32)
    i = torch.arange(size)
    for head in range(4):
        mask = (i[None, :] <= i[:, None]) & (i[None, :] < lens[head])
        scores = (q[head].double() @ k[head // 2].double().T * 0.125).masked_fill(~mask, -math.inf)
        want = scores.softmax(-1).nan_to_num(0.0) @ v[head // 2].double()
        close(out[head], want, dtype)


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, acc_ptr, best_ptr, total_ptr, length, chunk, G: tl.constexpr, D: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """One chunk of keys for G query heads: unnormalized output, maximum and sum. Broadcast sums, no dot."""
    part = tl.program_id(0)
    g, d = tl.arange(0, G), tl.arange(0, D)
    q = tl.load(q_ptr + g[:, None] * D + d[None, :]).to(tl.float32)
    best = tl.full([G], float("-inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    acc = tl.zeros([G, D], tl.float32)
    stop = tl.minimum(length, (part + 1) * chunk)
    for start in range(part * chunk, stop, BN):
        n = start + tl.arange(0, BN)
        k = tl.load(k_ptr + n[:, None] * D + d[None, :], mask=n[:, None] < stop, other=0.0).to(tl.float32)
        s = tl.where(n[None, :] < stop, tl.sum(q[:, None, :] * k[None, :, :], 2), float("-inf"))
        new_best = tl.maximum(best, tl.max(s, 1))
        p = tl.exp(s - new_best[:, None])
        alpha = tl.exp(best - new_best)
        v = tl.load(v_ptr + n[:, None] * D + d[None, :], mask=n[:, None] < stop, other=0.0).to(tl.float32)
        acc = acc * alpha[:, None] + tl.sum(p[:, :, None] * v[None, :, :], 1)
        total = total * alpha + tl.sum(p, 1)
        best = new_best
    tl.store(acc_ptr + (part * G + g)[:, None] * D + d[None, :], acc)
    tl.store(best_ptr + part * G + g, best)
    tl.store(total_ptr + part * G + g, total)


@triton.jit
def combine_kernel(acc_ptr, best_ptr, total_ptr, out_ptr, PARTS, G: tl.constexpr, D: tl.constexpr, BP: tl.constexpr):
    g = tl.program_id(0)
    p, d = tl.arange(0, BP), tl.arange(0, D)
    best = tl.load(best_ptr + p * G + g, mask=p < PARTS, other=float("-inf"))
    weight = tl.exp(best - tl.max(best, 0))
    total = tl.sum(weight * tl.load(total_ptr + p * G + g, mask=p < PARTS, other=0.0), 0)
    acc = tl.load(acc_ptr + (p * G + g)[:, None] * D + d[None, :], mask=p[:, None] < PARTS, other=0.0)
    tl.store(out_ptr + g * D + d, tl.sum(acc * weight[:, None], 0) / total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 77, 256])
def test_split_decode_attention(dtype, length, isa):
    q, k, v = random(4, 64, dtype=dtype), random(256, 64, seed=1, dtype=dtype), random(256, 64, seed=2, dtype=dtype)
    chunk = 64
    parts = triton.cdiv(length, chunk)
    acc, best, total, out = torch.zeros(parts, 4, 64), torch.zeros(parts, 4), torch.zeros(parts, 4), torch.zeros(4, 64)
    run(decode_kernel, (parts,), q, k, v, acc, best, total, length, chunk, G=4, D=64, BN=32)
    run(combine_kernel, (4,), acc, best, total, out, parts, G=4, D=64, BP=4)
    want = (q.double() @ k[:length].double().T).softmax(-1) @ v[:length].double()
    close(out, want)


def before_a_guard_page(tensor):
    """A copy of `tensor` that ends where the next byte may not be touched."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = triton.cdiv(size, page)
    region = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), ctypes.c_size_t(page), 0) == 0
    start = pages * page - size
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    copy.copy_(tensor)
    return copy


def test_masked_lanes_touch_no_memory(isa):
    x, w = before_a_guard_page(random(13, 37)), before_a_guard_page(random(21, 37, seed=1))
    bias, residual = before_a_guard_page(random(21, seed=2)), before_a_guard_page(random(13, 21, seed=3))
    out = before_a_guard_page(torch.zeros(13, 21))
    run(linear_kernel, (1, 1), x, w, bias, residual, out, 13, 21, 37, PACKED=False, BM=16, BN=32, BK=64)
    close(out, torch.nn.functional.silu(x.double() @ w.double().T + bias.double()) + residual.double())
    vector, product = before_a_guard_page(random(37, seed=4)), before_a_guard_page(torch.zeros(21))
    run(gemv_rows_kernel, (3,), vector, w, product, 21, 37, BN=8, BK=64)
    close(product, w.double() @ vector.double())
    half = before_a_guard_page(w.bfloat16())
    halves = before_a_guard_page(torch.zeros(21, dtype=torch.bfloat16))
    run(gemv_rows_kernel, (3,), vector.bfloat16(), half, halves, 21, 37, BN=8, BK=64)
    close(halves, half.double() @ vector.bfloat16().double(), torch.bfloat16)


@triton.jit
def tutorial_matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_bk, stride_cm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """As in Triton's tutorial: row indices wrap around, pointers are carried and advanced."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)) % M
    columns = (tl.program_id(1) * BN + tl.arange(0, BN)) % N
    k = tl.arange(0, BK)
    a_ptrs = a_ptr + rows[:, None] * stride_am + k[None, :]
    b_ptrs = b_ptr + k[:, None] * stride_bk + columns[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(0, tl.cdiv(K, BK)):
        a = tl.load(a_ptrs, mask=k[None, :] < K - step * BK, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - step * BK, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BK
        b_ptrs += BK * stride_bk
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c_ptr + stride_cm * m[:, None] + n[None, :], acc, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_carried_pointers_and_wrapped_indices(dtype, isa):
    a, b = random(50, 90, dtype=dtype), random(90, 70, seed=1, dtype=dtype)
    c = torch.zeros(50, 70)
    run(tutorial_matmul_kernel, (2, 3), a, b, c, 50, 70, 90, 90, 70, 70, BM=32, BN=32, BK=32)
    close(c, a.double() @ b.double())


@triton.jit
def uneven_steps_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    p = x_ptr + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in range(n):
        acc += tl.load(p)
        if k % 2 == 0:
            p += BLOCK
        else:
            p += tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), acc)


def test_carried_pointers_that_do_not_advance_alike(isa):
    x, out = random(1000), torch.zeros(32)
    run(uneven_steps_kernel, (1,), x, out, 5, BLOCK=32)
    place, want = torch.arange(32), torch.zeros(32)
    for k in range(5):
        want += x[place]
        place = place + (32 if k % 2 == 0 else torch.arange(32))
    close(out, want)
