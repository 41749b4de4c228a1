"""Debug mode: an access outside of its tensor is not made, and is reported with its line; others run as ever."""

import inspect

import pytest
import torch
import triton
import triton.language as tl
from effc import triton_cpu
from effc.codegen.cpu import host_target, launch, lower
from effc.compiler.errors import KernelFailed, OutOfBounds

KIND = {torch.float32: "*fp32", torch.int32: "*i32", torch.bfloat16: "*bf16", torch.int8: "*i8"}
TARGET = host_target(checked=True)


@triton.jit
def places_kernel(x_ptr, out_ptr, index_ptr, shift, n, limit, N: tl.constexpr):
    i = tl.arange(0, N)
    mask = i < limit
    x = tl.load(x_ptr + i + shift, mask=mask, other=0.0)  # contiguous
    x += tl.load(x_ptr + 2 * i, mask=i < n)  # strided
    index = tl.load(index_ptr + i)
    x += tl.load(x_ptr + index, mask=mask)  # gathered
    tl.store(out_ptr + index, x, mask=mask)  # scattered
    tl.atomic_add(out_ptr + index + shift, 1.0, mask=mask)  # atomic
    tl.store(out_ptr + n, 1.0)  # scalar


def line_of(kernel, comment: str) -> str:
    """FILE:LINE of the kernel's line that ends with a comment."""
    lines, start = inspect.getsourcelines(kernel.fn)
    number = next(k for k, line in enumerate(lines) if line.rstrip().endswith(f"# {comment}"))
    return f"{inspect.getsourcefile(kernel.fn)}:{start + number}: "


def run(kernel, *args, grid=(1,), **constants) -> None:
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = (KIND[arg.dtype] if isinstance(arg, torch.Tensor) else "i32" for arg in args)
    launch(lower(kernel, dict(zip(names, kinds, strict=True)), constants, target=TARGET), grid, *args, target=TARGET)


def places(shift=0, n=5, limit=16, wild=None, count=64):
    """x, out and index of 64 elements inside larger memory, which stays as it is, and the kernel's other arguments."""
    x, out = torch.ones(192)[64 : 64 + count], torch.zeros(192)[64 : 64 + count]
    index = torch.arange(16, dtype=torch.int32)
    if wild is not None:
        index[3] = wild
    return x, out, index, shift, n, limit


def test_what_stays_inside_runs_as_without_checks():
    arguments = places()
    run(places_kernel, *arguments, N=16)
    want = torch.cat([torch.full((5,), 4.0), torch.full((11,), 3.0), torch.zeros(48)])
    want[5] = 1
    assert torch.equal(arguments[1], want)


@pytest.mark.parametrize(
    ("changes", "comment", "message"),
    [
        ({"shift": 49}, "contiguous", r"at \[15\]: out of bounds: load of f32 at element 64 of x_ptr, which has 64"),
        ({"shift": -1}, "contiguous", r"at \[0\]: out of bounds: load of f32 at element -1 of x_ptr"),
        ({"n": 16, "count": 24}, "strided", r"at \[12\]: .* element 24 of x_ptr, which has 24 \(byte 96 of 96\)"),
        ({"wild": 64}, "gathered", r"at \[3\]: .* element 64 of x_ptr"),
        ({"wild": -1}, "gathered", r"at \[3\]: .* element -1 of x_ptr"),
        ({"wild": -(2**31)}, "gathered", r"at \[3\]: .* element -2147483648 of x_ptr"),
        ({"n": 64}, "scalar", r"program \(0, 0, 0\): out of bounds: store of f32 at element 64 of out_ptr"),
    ],
)
def test_what_goes_outside_is_caught(changes, comment, message):
    arguments = places(**changes)
    with pytest.raises(OutOfBounds, match=message) as error:
        run(places_kernel, *arguments, N=16)
    assert str(error.value).startswith(line_of(places_kernel, comment))
    if comment != "scalar":
        assert not arguments[1].any()


@triton.jit
def writes_kernel(x_ptr, index_ptr, how, N: tl.constexpr):
    i = tl.arange(0, N)
    index = tl.load(index_ptr + i)
    if how == 0:
        tl.store(x_ptr + index, 1.0)  # scattered
    elif how == 1:
        tl.atomic_add(x_ptr + index, 1.0)  # atomic
    elif how == 2:
        tl.store(x_ptr + i * 5 + tl.program_id(0), 1.0, mask=i != 9)  # strided
    elif how == 3:
        tl.atomic_cas(x_ptr + tl.load(index_ptr + 3), 0.0, 1.0)  # exchanged
    else:
        pointers = x_ptr + i
        for _ in range(3):
            tl.store(pointers, 1.0)  # carried
            pointers += N


WRITES = ((0, 40, "scattered", 40), (0, -7, "scattered", -7), (1, 40, "atomic", 40), (3, 41, "exchanged", 41))
WRITES += ((2, 0, "strided", 40), (4, 0, "carried", 40))


@pytest.mark.parametrize(("how", "wild", "comment", "element"), WRITES)
def test_writes_outside_are_caught_and_not_made(how, wild, comment, element):
    memory = torch.zeros(200)
    index = torch.arange(16, dtype=torch.int32)
    index[3] = wild
    with pytest.raises(OutOfBounds, match=rf"element {element} of x_ptr, which has 40") as error:
        run(writes_kernel, memory[80:120], index, how, N=16)
    assert str(error.value).startswith(line_of(writes_kernel, comment))
    assert not memory[:80].any()
    assert not memory[120:].any()


def test_the_program_is_named_and_others_of_the_grid_stop_too():
    memory = torch.zeros(200)
    with pytest.raises(OutOfBounds, match=r"program \(3, 0, 0\) at \[15\]: .* element 78 of x_ptr"):
        run(writes_kernel, memory[:78], torch.arange(16, dtype=torch.int32), 2, grid=(4,), N=16)


@triton.jit
def properly_masked_kernel(x_ptr, index_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    index = tl.load(index_ptr + i, mask=i < n, other=-(2**30))
    x = tl.load(x_ptr + index, mask=(i < n) & (index >= 0))
    tl.store(out_ptr + i * 3, x, mask=i < n)


def test_masked_lanes_may_point_anywhere():
    x, index = torch.arange(30.0), torch.arange(29, -1, -1, dtype=torch.int32)
    out = torch.zeros(30, 3)[:, 0]
    run(properly_masked_kernel, x, index, out, 30, grid=(2,), N=32)
    assert torch.equal(out, x.flip(0))


@triton.jit
def either_kernel(x_ptr, y_ptr, which, i):
    pointer = x_ptr
    if which > 0:
        pointer = y_ptr
    tl.store(pointer + i, 1)  # either


def test_a_pointer_of_unknown_origin_must_lie_in_some_tensor():
    memory = torch.zeros(100, dtype=torch.int8)
    run(either_kernel, memory[:10], memory[20:30], 1, 9)
    run(either_kernel, memory[:10], memory[20:30], 0, 25)
    assert memory.nonzero().flatten().tolist() == [25, 29]
    with pytest.raises(
        OutOfBounds, match=r"store of i8 at address 0x\w+, outside of all the launch's tensors"
    ) as error:
        run(either_kernel, memory[:10], memory[20:30], 1, 10)
    assert str(error.value).startswith(line_of(either_kernel, "either"))


@triton.jit
def pick_kernel(x_ptr, index_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.gather(tl.load(x_ptr + i), tl.load(index_ptr + i), 0))  # picked


def test_gathering_from_a_tile_stays_inside_of_it():
    x, index = torch.arange(8, dtype=torch.int32), torch.tensor([7, 0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    out = torch.zeros_like(x)
    run(pick_kernel, x, index, out, N=8)
    assert torch.equal(out, index)
    index[2] = 8
    with pytest.raises(OutOfBounds, match=r"at \[2\]: .* tl.gather of element 8 along an axis of 8") as error:
        run(pick_kernel, x, index, out, N=8)
    assert str(error.value).startswith(line_of(pick_kernel, "picked"))


@triton.jit
def asserting_kernel(x_ptr, n):
    tl.device_assert(n > 3, "n is small")
    tl.store(x_ptr, n)


def test_device_assert_is_on():
    x = torch.zeros(1, dtype=torch.int32)
    run(asserting_kernel, x, 4)
    assert x.item() == 4
    with pytest.raises(KernelFailed, match="n is small"):
        run(asserting_kernel, x, 3)


def test_the_backend_checks_where_the_environment_asks_for_it(monkeypatch):
    monkeypatch.setenv("EFFC_TRITON_CHECK", "1")
    memory = torch.zeros(200)
    index = torch.arange(16, dtype=torch.int32)
    with triton_cpu.enable():
        writes_kernel[(1,)](memory[80:], index, 0, N=16)
        index[3] = 120
        with pytest.raises(OutOfBounds, match="element 120 of x_ptr, which has 120"):
            writes_kernel[(1,)](memory[80:], index, 0, N=16)
    assert memory.sum() == 16


def test_it_costs_nothing_when_off():
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "index_ptr": "*i32", "shift": "i32", "n": "i32", "limit": "i32"}
    kernel = lower(places_kernel, signature, {"N": 16}, target=host_target(checked=False))
    assert "check::" not in kernel.cpp
    assert "report::" not in kernel.cpp
