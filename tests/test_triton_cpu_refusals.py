"""What `kernel[grid](...)` on CPU tensors refuses, and what it raises where an assertion or an access fails."""

import effc.triton_cpu
import pytest
import torch
import triton
import triton.language as tl
from effc.compiler.errors import InputError, KernelFailed, OutOfBounds, UnsupportedKernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .on_cpu import randn
from .triton_kernels import N, add_kernel

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


def test_a_tensor_elsewhere_is_refused_by_name():
    x, out = randn(N), torch.empty(N, device="meta")
    with pytest.raises(InputError, match="kernel add_kernel: argument out_ptr is on meta") as error:
        add_kernel[(8,)](x, x, out, N)
    assert "\n" not in str(error.value)


def test_a_number_of_the_wrong_type_is_refused_by_name():
    @triton.jit
    def kernel(out_ptr, n: tl.int32):
        tl.store(out_ptr, n)

    out = torch.zeros(1)
    kernel[(1,)](out, 7)
    assert out.item() == 7
    for bad in (2**31, 0.5):
        with pytest.raises(InputError, match=f"kernel kernel: argument n is {bad}, expected a number of type i32"):
            kernel[(1,)](out, bad)


def test_what_a_cpu_cannot_do_is_refused_with_the_line():
    @triton.jit
    def kernel(x_ptr):
        i = tl.arange(0, 16)
        x = tl.load(x_ptr + i)
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
        tl.store(x_ptr + i, y)

    @triton.jit
    def clock_kernel(x_ptr):
        tl.store(x_ptr, tl.extra.cuda.globaltimer())

    x = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(UnsupportedKernel, match=r"^kernel kernel: .*refusals\.py:\d+: tt\.elementwise_inline_asm"):
        kernel[(1,)](x)
    with pytest.raises(
        UnsupportedKernel, match=r"^kernel clock_kernel: .*refusals\.py:\d+: tt\.elementwise_inline_asm"
    ):
        clock_kernel[(1,)](x)
    with pytest.raises(UnsupportedKernel, match="launch_cooperative_grid"):
        add_kernel[(8,)](*[torch.zeros(N)] * 3, N, launch_cooperative_grid=True)
    with pytest.raises(KeyError, match="nonsense"):
        add_kernel[(8,)](*[torch.zeros(N)] * 3, N, nonsense=1)


@triton.jit
def positive_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.device_assert(x > 0, "not positive")
    tl.store(out_ptr + i, tl.log(x))


@gluon.jit
def gluon_kernel(x_ptr, BLOCK: gl.constexpr):
    i = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(x_ptr + i, gl.load(x_ptr + i) + 1)


def test_a_kernel_for_the_threads_of_a_gpu_is_refused():
    x = torch.zeros(128)
    with pytest.raises(UnsupportedKernel, match=r"expected a kernel of triton\.jit, found one of gluon\.jit"):
        gluon_kernel[(1,)](x, BLOCK=128)
    assert not x.any()


def test_assertions_hold_where_debugging_asks_for_them(monkeypatch):
    x, out = torch.ones(16), torch.zeros(16)
    positive_kernel[(1,)](x, out, BLOCK=16, debug=True)
    x[3] = -1
    positive_kernel[(1,)](x, out, BLOCK=16)
    with pytest.raises(KernelFailed, match=r"refusals\.py:\d+.*not positive"):
        positive_kernel[(1,)](x, out, BLOCK=16, debug=True)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.debug = True
        with pytest.raises(KernelFailed):
            positive_kernel[(1,)](x, out, BLOCK=16)


def test_checked_kernels_raise_at_the_line_that_leaves_a_tensor():
    x, out = randn(N), torch.zeros(N)
    with effc.triton_cpu.enable(checked=True):
        add_kernel[(8,)](x, x, out, N)
        assert torch.equal(out, 2 * x)
        with pytest.raises(OutOfBounds, match=r"triton_kernels\.py:\d+.*add_kernel"):
            add_kernel[(9,)](x, x, out, N + 1)
    add_kernel[(8,)](x, x, out, N)


@triton.jit
def totals_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.cumsum(x, 0))
    tl.store(out_ptr + BLOCK, tl.sum(x, 0))


def test_sums_of_integers_may_overflow_but_where_debugging_asks():
    x, out = torch.full((16,), 1 << 27, dtype=torch.int32), torch.zeros(17, dtype=torch.int32)
    want = x.cumsum(0).to(torch.int32)
    for checked in (False, True):
        with effc.triton_cpu.enable(checked=checked):
            totals_kernel[(1,)](x, out.zero_(), BLOCK=16)
            assert torch.equal(out[:16], want)
            assert out[16] == want[-1]
            with pytest.raises(KernelFailed, match="overflow"):
                totals_kernel[(1,)](x, out, BLOCK=16, debug=True)
    totals_kernel[(1,)](x // 2, out, BLOCK=16, debug=True)
    assert torch.equal(out[:16], (x // 2).cumsum(0).to(torch.int32))
