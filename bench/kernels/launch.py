"""What it costs to launch a small kernel, and to compile ten."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import torch
from effc.codegen.cpu import build_library, host_target, with_prelude

from . import attention, elementwise
from .case import Call, Case, Goal, Step, call, random

COUNT = 100
ELEMENTS = 1024


def cases() -> list[Case]:
    return [small_launches(), compile_ten()]


def small_launches() -> Case:
    """A chain of additions: each launch has two programs and reads what the one before wrote."""
    x, y, z = random(ELEMENTS, seed=1), torch.ones(ELEMENTS), torch.empty(ELEMENTS)
    block = ELEMENTS // 2
    calls = [
        call(elementwise.add_kernel, (2,), *pair, ELEMENTS, BLOCK_SIZE=block)
        for k in range(COUNT)
        for pair in [(x if k == 0 else (z, y)[(k + 1) % 2], x, (z, y)[k % 2])]
    ]

    def eager() -> torch.Tensor:
        total = x
        for _ in range(COUNT):
            total = total + x
        return total

    result = (z, y)[(COUNT - 1) % 2]
    exact = lambda: x.double() * (COUNT + 1)  # noqa: E731
    return Case(
        "launch",
        f"{COUNT} in one step",
        Step(*calls, result=result),
        {"eager": eager},
        exact,
        goal=Goal(0.6e-6, "seconds"),
        per=COUNT,
    )


def ten_kernels() -> list[Call]:
    """Ten different kernels of everyday shapes."""
    x, w, out = torch.empty(64, 576), torch.empty(576), torch.empty(64, 576)
    flat = (x, x, out, x.numel())
    row = {"eps": 1e-5, "BLOCK_SIZE": 1024}
    half = x.bfloat16()
    q, k = torch.empty(9, attention.SIZE), torch.empty(9, 64, attention.SIZE)
    return [
        attention.decode_calls(q, k[:3], k[:3], q)[0],
        attention.prefill_call(k, k, k, k),
        call(elementwise.add_kernel, (9,), *flat, BLOCK_SIZE=4096),
        call(elementwise.add_kernel, (9,), half, half, half, x.numel(), BLOCK_SIZE=4096),
        call(elementwise.silu_mul_kernel, (9,), *flat, BLOCK_SIZE=4096),
        call(elementwise.gelu_kernel, (9,), x, out, x.numel(), BLOCK_SIZE=4096),
        call(elementwise.gelu_tanh_kernel, (9,), x, out, x.numel(), BLOCK_SIZE=4096),
        call(elementwise.softmax_kernel, (64,), out, x, 576, 576, 576, BLOCK_SIZE=1024),
        call(elementwise.rms_norm_kernel, (64,), x, w, out, 576, **row),
        call(elementwise.layer_norm_kernel, (64,), x, w, w, out, 576, **row),
    ]


def compile_ten() -> Case:
    def measure() -> float:
        start = cpu_seconds()
        kernels = [call.lowered() for call in ten_kernels()]
        anchors = "\n".join(f"extern void* const use_{k.name} = (void*)&{k.name};" for k in kernels)
        with tempfile.TemporaryDirectory(prefix="effc-bench-") as cache:
            build_library(with_prelude("\n".join([*(k.cpp for k in kernels), anchors])), host_target(), Path(cache))
        return cpu_seconds() - start

    return Case(
        "compile",
        f"{len(ten_kernels())} kernels, cold",
        lambda: None,
        goal=Goal(5.0, "seconds"),
        measure=measure,
        notes="CPU seconds of Triton's front end, of the lowering and of the C++ compiler",
    )


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
