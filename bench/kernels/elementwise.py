"""Vector addition, activations, softmax and norms: Triton kernels in the style of its tutorials, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from .case import Case, Goal, Step, call, random

SHAPES = ((512, 576), (512, 1536), (512, 1024))
EPSILON = 1e-5


@triton.jit
def add_kernel(x_ptr, y_ptr, output_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(axis=0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(output_ptr + offsets, x + y, mask=mask)


@triton.jit
def silu_mul_kernel(x_ptr, y_ptr, output_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(axis=0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(output_ptr + offsets, x * tl.sigmoid(x) * y, mask=mask)


@triton.jit
def gelu_kernel(x_ptr, output_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(axis=0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(output_ptr + offsets, 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476)), mask=mask)


@triton.jit
def gelu_tanh_kernel(x_ptr, output_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(axis=0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    tl.store(output_ptr + offsets, x * tl.sigmoid(2.0 * inner), mask=mask)


@triton.jit
def softmax_kernel(output_ptr, input_ptr, input_row_stride, output_row_stride, n_cols, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0)
    col_offsets = tl.arange(0, BLOCK_SIZE)
    mask = col_offsets < n_cols
    x = tl.load(input_ptr + row * input_row_stride + col_offsets, mask=mask, other=-float("inf"))
    numerator = tl.exp(x - tl.max(x, axis=0))
    denominator = tl.sum(numerator, axis=0)
    tl.store(output_ptr + row * output_row_stride + col_offsets, numerator / denominator, mask=mask)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, output_ptr, n_cols, eps: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_SIZE)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * n_cols + cols, mask=mask, other=0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=mask)
    tl.store(output_ptr + row * n_cols + cols, x * scale * weight, mask=mask)


@triton.jit
def layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, output_ptr, n_cols, eps: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_SIZE)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * n_cols + cols, mask=mask, other=0.0)
    mean = tl.sum(x, axis=0) / n_cols
    centered = tl.where(mask, x - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centered * centered, axis=0) / n_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=mask)
    bias = tl.load(bias_ptr + cols, mask=mask)
    tl.store(output_ptr + row * n_cols + cols, centered * scale * weight + bias, mask=mask)


def cases() -> list[Case]:
    found = [vector_add()]
    for make in (silu_mul, softmax, rms_norm, layer_norm, gelu, gelu_tanh):
        found += [make(*shape) for shape in SHAPES]
    return found


def pointwise(name: str, fn, shape: tuple[int, ...], inputs: list, baselines: dict, exact, block: int = 4096) -> Case:
    out = torch.empty_like(inputs[0])
    step = Step(call(fn, (triton.cdiv(out.numel(), block),), *inputs, out, out.numel(), BLOCK_SIZE=block), result=out)
    moved = out.nbytes * (len(inputs) + 1)
    return Case(name, " x ".join(map(str, shape)), step, baselines, exact, moved, goal=Goal(1.3))


def vector_add(n: int = 2**24) -> Case:
    x, y, theirs = random(n, seed=1), random(n, seed=2), torch.empty(n)
    baselines = {"x + y": lambda: x + y, "add(out=)": lambda: torch.add(x, y, out=theirs)}
    case = pointwise("add, out of cache", add_kernel, (n,), [x, y], baselines, lambda: x.double() + y.double())
    case.goal = Goal(0.95)
    return case


def silu_mul(rows: int, columns: int) -> Case:
    x, y, theirs = random(rows, columns, seed=1), random(rows, columns, seed=2), torch.empty(rows, columns)
    baselines = {
        "silu(x) * y": lambda: F.silu(x) * y,
        "in place": lambda: F.silu(x).mul_(y),
        "out=": lambda: torch.mul(torch.ops.aten.silu.out(x, out=theirs), y, out=theirs),
    }
    return pointwise(
        "silu(x) * y", silu_mul_kernel, (rows, columns), [x, y], baselines, lambda: F.silu(x.double()) * y.double()
    )


def gelu(rows: int, columns: int) -> Case:
    x, theirs = random(rows, columns, seed=1), torch.empty(rows, columns)
    baselines = {"F.gelu": lambda: F.gelu(x), "out=": lambda: torch.ops.aten.gelu.out(x, out=theirs)}
    return pointwise("gelu (erf)", gelu_kernel, (rows, columns), [x], baselines, lambda: F.gelu(x.double()))


def gelu_tanh(rows: int, columns: int) -> Case:
    x, theirs = random(rows, columns, seed=1), torch.empty(rows, columns)
    baselines = {
        "F.gelu": lambda: F.gelu(x, approximate="tanh"),
        "out=": lambda: torch.ops.aten.gelu.out(x, approximate="tanh", out=theirs),
    }
    exact = lambda: F.gelu(x.double(), approximate="tanh")  # noqa: E731
    return pointwise("gelu (tanh)", gelu_tanh_kernel, (rows, columns), [x], baselines, exact)


def softmax(rows: int, columns: int) -> Case:
    x, out, theirs = random(rows, columns, seed=1), torch.empty(rows, columns), torch.empty(rows, columns)
    step = Step(
        call(softmax_kernel, (rows,), out, x, columns, columns, columns, BLOCK_SIZE=triton.next_power_of_2(columns)),
        result=out,
    )
    baselines = {"F.softmax": lambda: F.softmax(x, -1), "out=": lambda: torch.softmax(x, -1, out=theirs)}
    exact = lambda: F.softmax(x.double(), -1)  # noqa: E731
    return Case("softmax", f"{rows} x {columns}", step, baselines, exact, 2 * x.nbytes, goal=Goal(1.3))


def rms_norm(rows: int, columns: int) -> Case:
    x, weight, out = random(rows, columns, seed=1), random(columns, seed=2), torch.empty(rows, columns)
    block = triton.next_power_of_2(columns)
    step = Step(
        call(rms_norm_kernel, (rows,), x, weight, out, columns, eps=EPSILON, BLOCK_SIZE=block),
        result=out,
    )
    baselines = {
        "F.rms_norm": lambda: F.rms_norm(x, (columns,), weight, EPSILON),
        "by hand": lambda: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight,
        "by hand, in place": lambda: (
            x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / columns + EPSILON)
        ).mul_(weight),
    }
    exact = lambda: F.rms_norm(x.double(), (columns,), weight.double(), EPSILON)  # noqa: E731
    return Case("rms norm", f"{rows} x {columns}", step, baselines, exact, 2 * x.nbytes, goal=Goal(1.3))


def layer_norm(rows: int, columns: int) -> Case:
    x, out = random(rows, columns, seed=1), torch.empty(rows, columns)
    weight, bias = random(columns, seed=2), random(columns, seed=3)
    block = triton.next_power_of_2(columns)
    step = Step(
        call(layer_norm_kernel, (rows,), x, weight, bias, out, columns, eps=EPSILON, BLOCK_SIZE=block), result=out
    )
    baselines = {"F.layer_norm": lambda: F.layer_norm(x, (columns,), weight, bias, EPSILON)}
    exact = lambda: F.layer_norm(x.double(), (columns,), weight.double(), bias.double(), EPSILON)  # noqa: E731
    return Case("layer norm", f"{rows} x {columns}", step, baselines, exact, 2 * x.nbytes, goal=Goal(1.3))
