"""Kernels of our own after the ideas of Triton's public tutorials. Like those, it imports only triton and torch."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

DEVICE = triton.runtime.driver.active.get_active_torch_device()


# --- softmax: persistent programs, as many as the device runs at once ---------------------------------------------


@triton.jit
def softmax_kernel(
    out_ptr, in_ptr, in_stride, out_stride, rows, columns, BLOCK: tl.constexpr, num_stages: tl.constexpr
):
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=num_stages):
        at = tl.arange(0, BLOCK)
        x = tl.load(in_ptr + row * in_stride + at, mask=at < columns, other=-float("inf"))
        e = tl.exp(x - tl.max(x, axis=0))
        tl.store(out_ptr + row * out_stride + at, e / tl.sum(e, axis=0), mask=at < columns)


def softmax(x):
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    out = torch.empty_like(x)
    device = triton.runtime.driver.active.utils.get_device_properties(DEVICE.index)
    kernel = softmax_kernel.warmup(
        out, x, x.stride(0), out.stride(0), rows, columns, BLOCK=block, num_stages=2, num_warps=8, grid=(1,)
    )
    kernel._init_handles()
    occupancy = device["max_num_regs"] // (kernel.n_regs * device["warpSize"] * 8)
    occupancy = min(occupancy, device["max_shared_mem"] // kernel.metadata.shared)
    programs = min(device["multiprocessor_count"] * occupancy, rows)
    kernel[(programs, 1, 1)](out, x, x.stride(0), out.stride(0), rows, columns, block, 2)
    return out


# --- matmul: groups of rows of tiles share what is in the cache ---------------------------------------------------


@triton.jit
def leaky_relu(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.autotune(
    configs=[
        triton.Config({"BM": 64, "BN": 64, "BK": 32, "GROUP": 4}, num_stages=3, num_warps=8),
        triton.Config({"BM": 32, "BN": 128, "BK": 64, "GROUP": 8}, num_stages=4, num_warps=4),
    ],
    key=["M", "N", "K"],
)
@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(axis=0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    pid_m = group * GROUP + (pid % (GROUP * tiles_n)) % height
    pid_n = (pid % (GROUP * tiles_n)) // height
    tl.assume(pid_m >= 0)
    m = (pid_m * BM + tl.arange(0, BM)) % M
    n = (pid_n * BN + tl.arange(0, BN)) % N
    k = tl.arange(0, BK)
    a_ptrs = a_ptr + m[:, None] * stride_am + k[None, :] * stride_ak
    b_ptrs = b_ptr + k[:, None] * stride_bk + n[None, :] * stride_bn
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BK)):
        a = tl.load(a_ptrs, mask=k[None, :] < K - step * BK, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - step * BK, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BK * stride_ak
        b_ptrs += BK * stride_bk
    if ACTIVATION == "leaky_relu":
        acc = leaky_relu(acc)
    m = pid_m * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(c_ptr + stride_cm * m[:, None] + stride_cn * n[None, :], acc.to(c_ptr.dtype.element_ty), mask=mask)


def matmul(a, b, activation=""):
    M, K = a.shape
    N = b.shape[1]
    c = torch.empty((M, N), device=a.device, dtype=a.dtype)

    def grid(meta):
        return (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)

    matmul_kernel[grid](a, b, c, M, N, K, *a.stride(), *b.stride(), *c.stride(), ACTIVATION=activation)
    return c


# --- dropout: one seed instead of a mask ---------------------------------------------------------------------------


@triton.jit
def seeded_dropout_kernel(x_ptr, out_ptr, n, p, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    keep = tl.rand(seed, i) > p
    tl.store(out_ptr + i, tl.where(keep, x / (1 - p), 0.0), mask=i < n)


def seeded_dropout(x, p, seed, block=1024):
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), block),)
    seeded_dropout_kernel[grid](x, out, x.numel(), p, seed, BLOCK=block)
    return out


# --- layer norm: a backward pass that adds up partial sums behind locks --------------------------------------------


@triton.jit
def layer_norm_forward(x_ptr, y_ptr, w_ptr, b_ptr, mean_ptr, rstd_ptr, stride, N, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x_ptr += row * stride
    y_ptr += row * stride
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / N
    square = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        centred = tl.where(at < N, x - mean, 0.0)
        square += centred * centred
    rstd = 1 / tl.sqrt(tl.sum(square, axis=0) / N + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + at, mask=at < N)
        b = tl.load(b_ptr + at, mask=at < N)
        x = tl.load(x_ptr + at, mask=at < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, (x - mean) * rstd * w + b, mask=at < N)


@triton.jit
def layer_norm_backward_x(
    dx_ptr, dy_ptr, dw_ptr, db_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, lock_ptr, stride, N,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < N
    group = row % GROUPS
    lock_ptr += group
    count_ptr = lock_ptr + GROUPS
    dw_ptr = dw_ptr + group * N + at
    db_ptr = db_ptr + group * N + at
    x = tl.load(x_ptr + row * stride + at, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride + at, mask=mask, other=0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=mask).to(tl.float32)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    normal = tl.where(mask, (x - mean) * rstd, 0.0)
    scaled = tl.where(mask, w * dy, 0.0)
    c1, c2 = tl.sum(normal * scaled, axis=0) / N, tl.sum(scaled, axis=0) / N
    tl.store(dx_ptr + row * stride + at, (scaled - (normal * c1 + c2)) * rstd, mask=mask)
    partial_w = (dy * normal).to(w.dtype)
    partial_b = dy.to(w.dtype)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    count = tl.load(count_ptr)
    if count == 0:
        tl.atomic_xchg(count_ptr, 1)
    else:
        partial_w += tl.load(dw_ptr, mask=mask)
        partial_b += tl.load(db_ptr, mask=mask)
    tl.store(dw_ptr, partial_w, mask=mask)
    tl.store(db_ptr, partial_b, mask=mask)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def layer_norm_backward_weight(dw_ptr, db_ptr, out_w_ptr, out_b_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    dw = tl.zeros((BM, BN), dtype=tl.float32)
    db = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, M, BM):
        rows = start + tl.arange(0, BM)
        mask = (rows[:, None] < M) & (columns[None, :] < N)
        offsets = rows[:, None] * N + columns[None, :]
        dw += tl.load(dw_ptr + offsets, mask=mask, other=0.0)
        db += tl.load(db_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_w_ptr + columns, tl.sum(dw, axis=0), mask=columns < N)
    tl.store(out_b_ptr + columns, tl.sum(db, axis=0), mask=columns < N)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        M, N = x.shape
        y = torch.empty_like(x)
        mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
        layer_norm_forward[(M,)](x, y, weight, bias, mean, rstd, x.stride(0), N, eps, BLOCK=64, num_warps=4)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        M, N = x.shape
        groups = 4
        locks = torch.zeros(2 * groups, dtype=torch.int32, device=x.device)
        partial_w, partial_b = (torch.zeros((groups, N), dtype=torch.float32, device=x.device) for _ in range(2))
        dx, dw, db = torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(weight)
        layer_norm_backward_x[(M,)](
            dx, dy, partial_w, partial_b, x, weight, mean, rstd, locks, x.stride(0), N,
            GROUPS=groups, BLOCK=triton.next_power_of_2(N), num_warps=8,
        )  # fmt: skip
        layer_norm_backward_weight[(triton.cdiv(N, 64),)](partial_w, partial_b, dw, db, min(groups, M), N, BM=4, BN=64)
        return dx, dw, db, None


# --- libdevice -----------------------------------------------------------------------------------------------------


@triton.jit
def asin_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(axis=0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, libdevice.asin(tl.load(x_ptr + i, mask=i < n)), mask=i < n)


# --- grouped matmul: problems of different sizes in one launch, addresses in memory --------------------------------


@triton.jit
def grouped_matmul_kernel(
    a_addresses, b_addresses, c_addresses, sizes_ptr, strides_ptr, groups,
    PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    before = 0
    for g in range(groups):
        m, n, k = tl.load(sizes_ptr + g * 3), tl.load(sizes_ptr + g * 3 + 1), tl.load(sizes_ptr + g * 3 + 2)
        tiles_n = tl.cdiv(n, BN)
        tiles = tl.cdiv(m, BM) * tiles_n
        while tile >= before and tile < before + tiles:
            a_ptr = tl.load(a_addresses + g).to(tl.pointer_type(tl.float32))
            b_ptr = tl.load(b_addresses + g).to(tl.pointer_type(tl.float32))
            c_ptr = tl.load(c_addresses + g).to(tl.pointer_type(tl.float32))
            stride_a, stride_b = tl.load(strides_ptr + g * 3), tl.load(strides_ptr + g * 3 + 1)
            stride_c = tl.load(strides_ptr + g * 3 + 2)
            rows = (tile - before) // tiles_n * BM + tl.arange(0, BM)
            columns = (tile - before) % tiles_n * BN + tl.arange(0, BN)
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(0, k, BK):
                depth = start + tl.arange(0, BK)
                a_mask = (rows[:, None] < m) & (depth[None, :] < k)
                b_mask = (depth[:, None] < k) & (columns[None, :] < n)
                a = tl.load(a_ptr + rows[:, None] * stride_a + depth[None, :], mask=a_mask, other=0.0)
                b = tl.load(b_ptr + depth[:, None] * stride_b + columns[None, :], mask=b_mask, other=0.0)
                acc += tl.dot(a, b, input_precision="ieee")
            c_mask = (rows[:, None] < m) & (columns[None, :] < n)
            tl.store(c_ptr + rows[:, None] * stride_c + columns[None, :], acc, mask=c_mask)
            tile += PROGRAMS
        before += tiles


def grouped_matmul(pairs):
    outs = [torch.empty(a.shape[0], b.shape[1], device=a.device) for a, b in pairs]
    addresses = [torch.tensor([t.data_ptr() for t in ts]) for ts in (*zip(*pairs, strict=True), outs)]
    sizes = torch.tensor([[*a.shape, b.shape[1]] for a, b in pairs], dtype=torch.int32)[:, [0, 2, 1]].contiguous()
    strides = [[a.stride(0), b.stride(0), c.stride(0)] for (a, b), c in zip(pairs, outs, strict=True)]
    strides = torch.tensor(strides, dtype=torch.int32)
    grouped_matmul_kernel[(3,)](*addresses, sizes, strides, len(pairs), PROGRAMS=3, BM=16, BN=32, BK=16)
    return outs


# --- persistent matmul: descriptors made in the kernel -------------------------------------------------------------


@triton.jit
def persistent_matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    a_desc = tl.make_tensor_descriptor(a_ptr, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    b_desc = tl.make_tensor_descriptor(b_ptr, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    c_desc = tl.make_tensor_descriptor(c_ptr, shape=[M, N], strides=[N, 1], block_shape=[BM, BN])
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tiles_n, PROGRAMS, flatten=True):
        row, column = tile // tiles_n * BM, tile % tiles_n * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(tl.cdiv(K, BK)):
            a = a_desc.load([row, k * BK])
            b = b_desc.load([column, k * BK])
            acc = tl.dot(a, b.T, acc)
        c_desc.store([row, column], acc.to(c_ptr.dtype.element_ty))


def persistent_matmul(a, b):
    """a [M, K] times b [N, K]^T."""
    c = torch.empty(a.shape[0], b.shape[0], dtype=a.dtype, device=a.device)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=a.device))
    persistent_matmul_kernel[(2,)](a, b, c, a.shape[0], b.shape[0], a.shape[1], PROGRAMS=2, BM=32, BN=32, BK=32)
    return c
