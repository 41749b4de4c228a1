"""Kernels compile for NVIDIA and AMD without a device: every template, at its default and extreme configurations."""

from __future__ import annotations

import pytest
import torch
import triton
from effc.codegen.build import jit_function
from effc.codegen.kernel import Kernel
from effc.codegen.schedule import schedule
from effc.codegen.target import CUDA
from effc.compiler.formats import find
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .graphs import Axes, Function, graph_of, random

aten, effc = torch.ops.aten, torch.ops.effc

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def kernels(
    function: Function,
    dynamic: Axes | None = None,
    states: tuple[str, ...] = (),
    weights: tuple[str, ...] = (),
    **tensors: Tensor,
) -> list[Kernel]:
    """The kernels of a function, with CUDA's tiles."""
    scheduled = schedule(graph_of(function, tensors, dynamic, weights, states), CUDA)
    assert not scheduled.schedule.fallbacks
    return scheduled.schedule.kernels


def compile_for(kernel: Kernel, target: GPUTarget) -> None:
    source = ASTSource(jit_function(kernel), dict(kernel.signature), dict(kernel.constants))
    binary = triton.compile(source, target=target)
    assert binary.asm["cubin" if target.backend == "cuda" else "hsaco"]


def linears(n: int, k: int, dtype: torch.dtype) -> list[Kernel]:
    def function(x: Tensor, w: Tensor, b: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (
            effc.linear(x, w, b, r, "gelu"),
            effc.gated_linear(x, w),
            effc.linear(effc.rms_norm(x, g, 1e-6), w, None, None, "gelu_tanh"),
            effc.gated_linear(aten.layer_norm.default(x, (k,), g, g), w),
        )

    g = random(k, dtype=dtype)
    x, r = random(2, 5, k, dtype=dtype), random(2, 5, 2 * n, dtype=dtype)
    w, b = random(2 * n, k, dtype=dtype), random(2 * n, dtype=dtype)
    return kernels(function, {"x": (0, 1), "r": (0, 1)}, x=x, w=w, b=b, r=r, g=g, weights=("w",))


def attentions(heads: int, groups: int, size: int, value_size: int, dtype: torch.dtype) -> list[Kernel]:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: Tensor, h: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return (
            effc.attention(q, k, v, 0.2, True, h),
            effc.attention(q, k, v, 0.2, False, None, m),
            effc.attention(q, k, v, 0.2, True, None, f),
            effc.cached_attention(q, k, v, p, 0.2, visible="t0[b, k] != 0", tables=[h]),
            effc.cached_attention(q[:, :, :1], k, v, p, 0.2, visible="t0[b, k] != 0", tables=[h]),
        )

    return kernels(
        function,
        dynamic={"q": (0, 2), "k": (0, 2), "v": (0, 2), "m": (0, 2, 3), "f": (0, 2, 3), "h": (0, 1), "p": (0,)},
        q=random(2, heads, 5, size, dtype=dtype),
        k=random(2, groups, 7, size, dtype=dtype),
        v=random(2, groups, 7, value_size, dtype=dtype),
        m=random(2, 1, 5, 7) > 0,
        f=random(2, 1, 5, 7, dtype=dtype),
        h=torch.ones(2, 7, dtype=torch.int64),
        p=torch.tensor([1, 2]),
    )


def experts(d: int, n: int, count: int, per_token: int, dtype: torch.dtype) -> list[Kernel]:
    clamped = "minimum(gate, 7.0) * sigmoid(gate) * (up + 1)"
    corrected = ("sigmoid(logits)", "values + correction", "chosen / (sum(chosen) + 1e-20) * 2.5")

    def function(x: Tensor, s: Tensor, r: Tensor, c: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        chosen = effc.top_k(s, per_token)
        scores = s[..., :per_token].float()
        return (
            effc.experts(x, chosen, scores, u, w, b, None, clamped),
            effc.experts(x, chosen, scores, u[:, 1:], w, None, None, "gelu_tanh(up)"),
            effc.moe(effc.rms_norm(x, None, 1e-5), r, u, w, per_token, c, c, b, None, x, *corrected, clamped),
            effc.moe(x, r, u, w, per_token, None, None, None, None, None, "logits", "values", "softmax(chosen)"),
        )

    tensors = {"x": random(2, 5, d, dtype=dtype), "s": random(2, 5, count, dtype=dtype)}
    tensors |= {"r": random(count, d, dtype=dtype), "c": random(count, dtype=dtype)}
    tensors |= {"u": random(count, 2, n, d, dtype=dtype), "w": random(count, d, n, dtype=dtype)}
    tensors["b"] = random(count, 2, n, dtype=dtype)
    return kernels(function, {"x": (0, 1), "s": (0, 1)}, weights=("r", "u", "w"), **tensors)


def scores(heads: int, groups: int, size: int, dtype: torch.dtype) -> list[Kernel]:
    """Attention with everything that changes its scores."""

    def function(q: Tensor, k: Tensor, v: Tensor, s: Tensor, t0: Tensor, t1: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        biased = {"bias": "t0[h] * (k - q)", "visible": "(t1[b, q] == t1[b, k]) | (k // 3 < 2)", "tables": [t0, t1]}
        capped = {"window": 6, "softcap": 30.0, "sinks": s}
        chunks = {"visible": "(k < 4) | ((k - t0[b]) // 8 == (q - t0[b]) // 8)", "tables": [p]}
        return (
            effc.attention(q, k, v, 0.2, True, **biased, sinks=s),
            effc.attention(q, k, v, 0.2, True, **capped),
            effc.cached_attention(q, k, v, p, 0.2, **capped, **chunks),
            effc.cached_attention(q[:, :, :1], k, v, p, 0.2, **chunks),
            effc.cached_attention(q[:, :, :1], k, v, p, 0.2, **biased),
            effc.cached_attention(q[:, :, :1], k, v, p, 0.2, **capped),
            effc.cached_attention(q, k, v, p, 0.2, ring=2, visible="(k < 2) | (q - k < 3)"),
            effc.cached_attention(q[:, :, :1], k, v, p, 0.2, ring=0, window=6),
        )

    return kernels(
        function,
        dynamic={"q": (0, 2), "k": (0, 2), "v": (0, 2), "t1": (0, 1), "p": (0,)},
        q=random(2, heads, 5, size, dtype=dtype),
        k=random(2, groups, 7, size, dtype=dtype),
        v=random(2, groups, 7, size, dtype=dtype),
        s=random(heads, dtype=dtype),
        t0=random(heads, dtype=dtype),
        t1=torch.zeros(2, 7, dtype=torch.int64),
        p=torch.tensor([1, 2]),
    )


def ropes(size: int, rotated: int, dtype: torch.dtype) -> list[Kernel]:
    def function(x: Tensor, c: Tensor, s: Tensor, k: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        k = effc.kv_write(effc.kv_write(k, effc.rope(x, c, s, True), p), effc.rope(x, c, s), p, ring=2)
        return effc.rope(x * 2, c, s), effc.kv_write(k, x * 2, p, ring=2)

    tables = random(2, 5, rotated, dtype=dtype)
    tensors = {"x": random(2, 3, 5, size, dtype=dtype), "c": tables, "s": tables.clone()}
    return kernels(function, None, ("k",), **tensors, k=random(2, 3, 9, size, dtype=dtype), p=torch.tensor([1, 2]))


def pointwise(size: int, dtype: torch.dtype) -> list[Kernel]:
    def function(x: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.softmax(x, -1),
            F.layer_norm(x, (size,), w, w),
            effc.rms_norm(x, w, 1e-5),
            x.amax(-1),
            torch.cat((-x[..., 1:], x.tanh()), -1),
            F.embedding(ids, x[0]) * w,
            F.gelu(x) + torch.arange(size) * w.sum(-1),
            x.transpose(0, 1) + 1,
            (x > 0) | ~(x < -1),
        )

    x, w = random(3, 5, size, dtype=dtype), random(size, dtype=dtype)
    return kernels(function, {"x": (0, 1)}, x=x, w=w, ids=torch.tensor([[0, 1]]))


def quantized(name: str, activation: str | None, n: int, k: int, dtype: torch.dtype) -> list[Kernel]:
    format = find(name)

    def function(x: Tensor, r: Tensor, b: Tensor, g: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        weight = effc.dequantize(list(parts), name, dtype)
        x = effc.rms_norm(x, g, 1e-6)
        x = x if activation is None else effc.fake_quantize(x, activation)
        return effc.linear(x, weight, b, r, "gelu"), effc.gated_linear(x, weight)

    tensors = {"x": random(2, 5, k, dtype=dtype), "r": random(2, 5, 2 * n, dtype=dtype)}
    weights = {"b": random(2 * n, dtype=dtype), "g": random(k, dtype=dtype)}
    weights |= dict(zip((f"p_{part}" for part in format.part_names), format.quantize(random(2 * n, k))))
    return kernels(function, {"x": (0, 1), "r": (0, 1)}, weights=tuple(weights), **tensors, **weights)


QUICK = {
    "linear": lambda: linears(64, 128, BF16),
    "linear, ragged": lambda: linears(35, 100, FP32),
    "attention": lambda: attentions(9, 3, 64, 64, BF16),
    "scores": lambda: scores(9, 3, 64, BF16),
    "rope": lambda: ropes(64, 64, BF16),
    "pointwise": lambda: pointwise(100, BF16),
    "experts": lambda: experts(128, 64, 8, 2, BF16),
    "quantized": lambda: quantized("q4_1", "int8_g32", 64, 128, BF16),
}
SWEEP = {
    "linear, one element": lambda: linears(1, 1, FP16),
    "linear, fp32": lambda: linears(256, 1024, FP32),
    "attention, 8 wide": lambda: attentions(3, 1, 8, 4, FP16),
    "attention, ragged": lambda: attentions(2, 2, 80, 100, FP32),
    "attention, 256 wide": lambda: attentions(16, 1, 256, 256, BF16),
    "scores, ragged": lambda: scores(2, 2, 80, FP16),
    "scores, 256 wide": lambda: scores(16, 1, 256, BF16),
    "rope, partial": lambda: ropes(80, 20, FP32),
    "rope, one pair": lambda: ropes(2, 2, FP16),
    "experts, ragged": lambda: experts(100, 35, 60, 4, FP32),
    "experts, many": lambda: experts(256, 128, 256, 8, FP16),
    "quantized, ragged": lambda: quantized("int3_g64", "int8_g32", 48, 104, FP32),
    "quantized, groups of 16": lambda: quantized("q6_k", "int8_g32", 64, 256, FP16),
    "quantized, by row": lambda: quantized("int8a", "int8", 16, 100, FP32),
    "quantized, weights only": lambda: quantized("q5_k", None, 64, 256, BF16),
    "pointwise, one column": lambda: pointwise(1, FP32),
    "pointwise, 4096 columns": lambda: pointwise(4096, FP16),
}


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_templates_compile(target: str, name: str) -> None:
    for kernel in QUICK[name]():
        compile_for(kernel, TARGETS[target])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *SWEEP])
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles(target: str, name: str) -> None:
    for kernel in {**QUICK, **SWEEP}[name]():
        compile_for(kernel, TARGETS[target])
