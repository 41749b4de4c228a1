"""Matrix products x @ weight.T of fp32, bf16 and int8, with weights in panels of 64 columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from effc.codegen.cpu import host_target
from torch import Tensor
from torch.nn import functional as F

from .case import Case, Goal, Step, call, random

PANEL = 64
SIZES = ((576, 1536), (1536, 576), (576, 49152))
"""K and N of a small model's linear layers and of its vocabulary."""
ROWS = (512, 64, 7)
NATIVE_BF16 = "the goal is for AVX2; here both sides multiply with AVX512_BF16, whose peak is twice fp32's"


@triton.jit
def linear_kernel(
    x_ptr, weight_ptr, out_ptr, M, N: tl.constexpr, K: tl.constexpr, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x: [M, K]; weight: [N / BLOCK_N, K, BLOCK_N]; sums in fp32, or in int32 for int8."""
    panel = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_rows = row[:, None] < M
    x_rows = x_ptr + row[:, None] * K
    weight = weight_ptr + panel.to(tl.int64) * BLOCK_N * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_rows + k + inner[None, :], mask=in_rows & (k + inner[None, :] < K), other=0)
        w = tl.load(weight + (k + inner)[:, None] * BLOCK_N + col[None, :], mask=(k + inner)[:, None] < K, other=0)
        acc = tl.dot(x, w, acc, out_dtype=SUM, input_precision="ieee")
    out = out_ptr + row[:, None] * N + panel * BLOCK_N + col[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_rows)


def packed(weight: Tensor) -> Tensor:
    """[N, K] as panels [N / PANEL, K, PANEL]."""
    n, k = weight.shape
    return weight.view(n // PANEL, PANEL, k).transpose(1, 2).contiguous()


def linear(x: Tensor, weight: Tensor, out: Tensor, block_k: int = 64) -> Step:
    (m, k), n = x.shape, weight.shape[0]
    block_m = 16 if m <= 16 else 64 if m <= 64 else 256
    total = tl.float32 if x.is_floating_point() else tl.int32
    grid = (n // PANEL, triton.cdiv(m, block_m))
    blocks = {"BLOCK_M": block_m, "BLOCK_N": PANEL, "BLOCK_K": block_k}
    return Step(call(linear_kernel, grid, x, packed(weight), out, m, N=n, K=k, SUM=total, **blocks), result=out)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def cases() -> list[Case]:
    found = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for k, n in SIZES:
            weight = random(n, k, dtype=dtype, seed=1)
            for m in ROWS:
                found.append(float_case(name, random(m, k, dtype=dtype), weight))
    return [*found, int8_case(512, 576, 1536)]


def float_case(name: str, x: Tensor, weight: Tensor) -> Case:
    (m, k), n = x.shape, weight.shape[0]
    goal = 1.5 if name == "bf16" else 1.1 if m <= 16 else 0.95
    columns = weight.T.contiguous()
    return Case(
        f"matmul {name}",
        f"{m} x {k} x {n}",
        linear(x, weight, x.new_empty(m, n)),
        {"linear": lambda: F.linear(x, weight), "mm": lambda: torch.mm(x, columns)},
        lambda: exact(x, weight),
        flops=2 * m * k * n,
        goal=Goal(goal),
        notes=NATIVE_BF16 if name == "bf16" and "avx512_bf16" in host_target().features else "",
    )


def int8_case(m: int, k: int, n: int) -> Case:
    """Beside the same product in fp32, as effc does it."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator) for rows in (m, n))
    as_floats = linear(x.float(), weight.float(), torch.empty(m, n))
    columns = weight.T.contiguous()
    return Case(
        "matmul int8",
        f"{m} x {k} x {n}",
        linear(x, weight, torch.empty(m, n, dtype=torch.int32), block_k=256),
        {"effc fp32": as_floats},
        lambda: exact(x, weight),
        aside={"_int_mm": lambda: torch._int_mm(x, columns)},
        flops=2 * m * k * n,
        goal=Goal(1.4),
    )
