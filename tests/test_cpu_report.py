"""device_print, device_assert, static_print and static_assert on the CPU target."""

import re

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower
from effc.compiler.errors import KernelFailed, UnsupportedKernel


@triton.jit
def print_kernel(x_ptr, h_ptr, u_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.device_print('"quoted" {braces} 100% : \\ ', x, n)
    print("bits", tl.load(h_ptr + i), tl.load(u_ptr + i), hex=True)
    tl.device_print("unsigned", tl.load(u_ptr + i))
    tl.device_print("truth", tl.reshape(x > 0, (2, N // 2)))
    tl.device_print("only text")
    tl.static_print("compiling for", N)


def test_device_print_writes_a_line_for_each_element(capfd):
    x = torch.tensor([1.5, -2.0, 0.0, float("inf")])
    u = torch.tensor([0, 1, 2**31, 2**32 - 1], dtype=torch.uint32)
    signature = {"x_ptr": "*fp32", "h_ptr": "*fp16", "u_ptr": "*u32", "n": "i32"}
    kernel = lower(print_kernel, signature, {"N": 4})
    assert capfd.readouterr().out == "compiling for 4\n"
    launch(kernel, (1, 2), x, x.half(), u, -7)
    lines = capfd.readouterr().out.splitlines()
    assert all(line.startswith(("pid (0, 0, 0) ", "pid (0, 1, 0) ")) for line in lines)
    texts = [line.removeprefix("pid (0, 1, 0) ") for line in lines if line.startswith("pid (0, 1, 0)")]
    assert len(lines) == 2 * len(texts)
    quoted = ' "quoted" {braces} 100% : \\: '
    assert texts[:5] == [f"idx ({k}){quoted}(operand 0) {v:f}" for k, v in enumerate(x.tolist())] + [
        f"idx (){quoted}(operand 1) -7"
    ]
    bits = [f"idx ({k}) bits: (operand 0) 0x{v:04x}" for k, v in enumerate(x.half().view(torch.uint16).tolist())]
    bits += [f"idx ({k}) bits: (operand 1) 0x{v:08x}" for k, v in enumerate(u.tolist())]
    assert texts[5:13] == bits
    assert texts[13:17] == [f"idx ({k}) unsigned: {v}" for k, v in enumerate(u.tolist())]
    truth = [f"idx ({k // 2}, {k % 2}) truth: {int(v > 0)}" for k, v in enumerate(x.tolist())]
    assert texts[17:] == [*truth, "only text"]


@triton.jit
def many_lines_kernel(N: tl.constexpr):
    tl.device_print("line", tl.arange(0, N))


def test_lines_of_programs_that_run_together_stay_whole(capfd):
    launch(lower(many_lines_kernel, {}, {"N": 64}), (50,))
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 50 * 64
    found = [re.fullmatch(r"pid \((\d+), 0, 0\) idx \( ?(\d+)\) line: (\d+)", line) for line in lines]
    assert all(f is not None and f[2] == f[3] for f in found)
    assert len({(f[1], f[2]) for f in found}) == len(lines)


@triton.jit
def checked_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.device_assert(x >= 0, 'x "must" be 100% >= 0', mask=i < n)
    assert n < 100, "n is large"
    tl.store(out_ptr + i, tl.sqrt(x), mask=i < n)


def line_of(fn, text: str) -> int:
    lines, first = fn.raw_src if isinstance(fn.raw_src, list) else fn.raw_src.splitlines(), fn.starting_line_number
    return first + next(k for k, line in enumerate(lines) if text in line)


def test_a_failed_device_assert_raises_with_its_line(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    kernel = lower(checked_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}, {"N": 16})
    x, out = torch.ones(60), torch.zeros(60)
    launch(kernel, (4,), x, out, 60)
    assert torch.equal(out, x)
    x[37], out = -1.0, torch.zeros(60)
    with pytest.raises(KernelFailed, match=re.escape('device_assert failed: x "must" be 100% >= 0')) as error:
        launch(kernel, (4,), x, out, 60)
    place = f"{__file__}:{line_of(checked_kernel, 'device_assert')}: checked_kernel: program (2, 0, 0) at [5]"
    assert str(error.value).startswith(place)
    assert not out[32:48].any(), "the program that failed went on"
    with pytest.raises(KernelFailed, match="n is large"):
        launch(kernel, (1,), torch.ones(100), torch.zeros(100), 100)
    launch(kernel, (4,), torch.ones(60), out, 60)  # a failure does not outlive its launch
    assert torch.equal(out, torch.ones(60))


def test_device_assert_does_nothing_unless_debugging(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "debug", False)
    kernel = lower(checked_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}, {"N": 16})
    assert "report::" not in kernel.cpp
    launch(kernel, (1,), -torch.ones(16), torch.zeros(16), 16)


@triton.jit
def overflow_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(x_ptr))


def test_integer_overflow_is_found_when_debugging(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    kernel = lower(overflow_kernel, {"x_ptr": "*i32", "out_ptr": "*i32"}, {})
    out = torch.zeros(1, dtype=torch.int32)
    launch(kernel, (1,), torch.tensor([7], dtype=torch.int32), out)
    assert out.item() == 14
    with pytest.raises(KernelFailed, match="int32 overflow detected for operation add"):
        launch(kernel, (1,), torch.tensor([2**30], dtype=torch.int32), out)


@triton.jit
def static_kernel(out_ptr, N: tl.constexpr):
    tl.static_assert(N % 2 == 0, "N must be even")
    for k in tl.static_range(0, N, 2):
        tl.store(out_ptr + k, k)


def test_static_assert_refuses_to_compile_and_static_range_unrolls():
    out = torch.zeros(6, dtype=torch.int32)
    launch(lower(static_kernel, {"out_ptr": "*i32"}, {"N": 6}), (1,), out)
    assert out.tolist() == [0, 0, 2, 0, 4, 0]
    with pytest.raises(UnsupportedKernel, match="N must be even"):
        lower(static_kernel, {"out_ptr": "*i32"}, {"N": 5})
