"""Kernels that several test files launch as Triton does."""

import triton
import triton.language as tl

N = 1000


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr = 128):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    y = tl.load(y_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x + y, mask=i < n)


def tuned(configs, **options):
    return triton.autotune(configs=configs, key=["n"], **options)(
        triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})(tuned_kernel)
    )


@triton.jit
def tuned_kernel(x_ptr, total_ptr, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i) if EVEN else tl.load(x_ptr + i, mask=i < n, other=0)
    tl.atomic_add(total_ptr, tl.sum(x))
    tl.store(x_ptr + i, x + 1, mask=i < n)
