"""Triton's launches on CPU tensors from several Python threads, and from threads with little stack."""

import threading

import pytest
import torch
import triton
import triton.language as tl
from effc.compiler.errors import KernelFailed

from .on_cpu import randn
from .triton_kernels import N, add_kernel

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@triton.jit
def running_sum_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0))


def test_large_blocks_run_on_threads_with_little_stack():
    x = torch.arange(1 << 16, dtype=torch.float64)
    here, there = torch.empty_like(x), torch.empty_like(x)
    running_sum_kernel[(1,)](x, here, SIZE=1 << 16)
    usual = threading.stack_size(256 << 10)
    try:
        thread = threading.Thread(target=lambda: running_sum_kernel[(1,)](x, there, SIZE=1 << 16))
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    assert torch.equal(here, x.cumsum(0))
    assert torch.equal(there, here)


def run_at_once(work, arguments):
    """work(argument) for each, every one in a thread of its own."""
    threads = [threading.Thread(target=work, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_python_threads_launch_at_once():
    failures = []

    def work(seed):
        x, out = randn(N, seed=seed), torch.empty(N)
        for n in (N, N // 2) * 20:
            out.zero_()
            add_kernel[(triton.cdiv(n, 64),)](x, x, out, n, BLOCK=64)
            if not torch.equal(out[:n], 2 * x[:n]):
                failures.append(seed)

    run_at_once(work, range(4))
    assert failures == []


def test_each_thread_is_told_the_failures_of_its_own_launches():
    @triton.jit
    def kernel(x_ptr, out_ptr, n, LIMIT: tl.constexpr):
        at = tl.program_id(0)
        total = 0.0
        for k in range(n):
            total += tl.load(x_ptr + k)
        tl.device_assert(total < LIMIT, "too large")
        tl.store(out_ptr + at, total)

    wrong = []

    def work(fill):
        x, out = torch.full((50000,), float(fill)), torch.empty(16)
        for _ in range(20):
            out.fill_(-1)
            try:
                kernel[(16,)](x, out, len(x), LIMIT=100.0, debug=True)
                failed = False
            except KernelFailed:
                failed = True
            if failed != bool(fill) or (not fill and out.count_nonzero()):
                wrong.append(fill)

    run_at_once(work, (0, 1, 0, 1))
    assert wrong == []
