"""A matrix times a vector, as in decoding: weights of fp32, bf16, int8 and 4 bits, read from memory once.

The baseline is to read the weights and do nothing with them, in turns with the kernel: memory is not always as fast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from bandwidth import reader
from torch import Tensor
from torch.nn import functional as F

from .case import Case, Goal, Step, call, random
from .matmul import PANEL, packed

BYTES = 128 << 20
"""Of a matrix: far more than caches hold."""
GROUP = 32


@triton.jit
def gemv_kernel(x_ptr, weight_ptr, out_ptr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """weight: [N / BLOCK_N, K, BLOCK_N], of any type; sums in fp32."""
    panel = tl.program_id(0)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    weight = weight_ptr + panel.to(tl.int64) * BLOCK_N * K
    acc = tl.zeros([BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + k + inner).to(tl.float32)
        w = tl.load(weight + (k + inner)[:, None] * BLOCK_N + col[None, :]).to(tl.float32)
        acc += tl.sum(x[:, None] * w, axis=0)
    tl.store(out_ptr + panel * BLOCK_N + col, acc)


@triton.jit
def int8_kernel(x_ptr, weight_ptr, out_ptr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """weight: [N / BLOCK_N, K, BLOCK_N]; weights, activations int8, sums int32."""
    panel = tl.program_id(0)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    weight = weight_ptr + panel.to(tl.int64) * BLOCK_N * K
    acc = tl.zeros([BLOCK_N], tl.int32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + k + inner).to(tl.int32)
        w = tl.load(weight + (k + inner)[:, None] * BLOCK_N + col[None, :]).to(tl.int32)
        acc += tl.sum(x[:, None] * w, axis=0)
    tl.store(out_ptr + panel * BLOCK_N + col, acc)


@triton.jit
def int4_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, out_ptr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Weights are (q - 8) * scale. Row k of weight [N / BLOCK_N, K / 2, BLOCK_N] holds q of 2 k and, above, of 2 k + 1.

    x: [K] int8; scale: [N / BLOCK_N, K / GROUP, BLOCK_N] fp16; x_scale: [K / GROUP] fp32.
    """
    panel = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_N)
    pair = tl.arange(0, GROUP // 2)
    weight = weight_ptr + panel * BLOCK_N * K // 2
    scales = scale_ptr + panel * BLOCK_N * (K // GROUP)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for group in range(K // GROUP):
        rows = group * (GROUP // 2) + pair
        w = tl.load(weight + rows[:, None] * BLOCK_N + col[None, :])
        even = tl.load(x_ptr + 2 * rows).to(tl.int32)[:, None]
        odd = tl.load(x_ptr + 2 * rows + 1).to(tl.int32)[:, None]
        low, high = (w & 15).to(tl.int32) - 8, (w >> 4).to(tl.int32) - 8
        total = tl.sum(low * even + high * odd, axis=0)
        scale = tl.load(scales + group * BLOCK_N + col).to(tl.float32) * tl.load(x_scale_ptr + group)
        acc += total.to(tl.float32) * scale
    tl.store(out_ptr + panel * BLOCK_N + col, acc)


def cases() -> list[Case]:
    return [
        float_case("fp32", random(1024), random(BYTES // 4096, 1024, seed=1)),
        float_case(
            "bf16", random(1024, dtype=torch.bfloat16), random(BYTES // 2048, 1024, dtype=torch.bfloat16, seed=1)
        ),
        int8_case(torch.float32),
        int8_case(torch.int8),
        int4_case(BYTES // 1024, 2048),
    ]


def float_case(name: str, x: Tensor, weight: Tensor) -> Case:
    (n, k), panels, out = weight.shape, packed(weight), x.new_empty(len(weight))
    step = Step(call(gemv_kernel, (n // PANEL,), x, panels, out, K=k, BLOCK_N=PANEL, BLOCK_K=64), result=out)
    return Case(
        f"gemv {name}",
        f"{k} x {n}",
        step,
        {"reading": reader(panels)},
        lambda: weight.double() @ x.double(),
        aside={"linear": lambda: F.linear(x, weight)},
        moved=panels.nbytes,
        flops=2 * n * k,
        goal=Goal(0.8),
    )


def int8_case(activations: torch.dtype) -> Case:
    n, k = BYTES // 1024, 1024
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    panels = packed(weight)
    if activations == torch.int8:
        kernel, x = int8_kernel, torch.randint(-128, 128, (k,), dtype=torch.int8, generator=generator)
        out = torch.empty(n, dtype=torch.int32)
    else:
        kernel, x, out = gemv_kernel, random(k), torch.empty(n)
    step = Step(call(kernel, (n // PANEL,), x, panels, out, K=k, BLOCK_N=PANEL, BLOCK_K=64), result=out)
    return Case(
        "gemv int8" + (", int8 activations" if activations == torch.int8 else ""),
        f"{k} x {n}",
        step,
        {"reading": reader(panels)},
        lambda: weight.double() @ x.double(),
        moved=panels.nbytes,
        flops=2 * n * k,
        goal=Goal(0.8),
    )


def int4_case(n: int, k: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    x = torch.randint(-127, 128, (k,), dtype=torch.int8, generator=generator)
    scale, x_scale = random(n, k // GROUP).half(), random(k // GROUP, seed=1)
    panels, scales, out = packed(weight[:, 0::2] | weight[:, 1::2] << 4), packed(scale), torch.empty(n)
    arguments = (x, x_scale, panels, scales, out)
    step = Step(call(int4_kernel, (n // PANEL,), *arguments, K=k, GROUP=GROUP, BLOCK_N=PANEL), result=out)

    def exact() -> Tensor:
        products = (weight.double() - 8).view(n, -1, GROUP) * x.double().view(-1, GROUP)
        return (products.sum(-1) * scale.double() * x_scale.double()).sum(-1)

    return Case(
        f"gemv int4 in groups of {GROUP}, int8 activations",
        f"{k} x {n}",
        step,
        {"reading": reader(panels, scales)},
        exact,
        moved=panels.nbytes + scales.nbytes,
        flops=2 * n * k,
        goal=Goal(0.8),
    )
