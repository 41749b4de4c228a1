"""The same kernels give the same results on every instruction set, by every compiler and on Arm.

All cases are one C++ program that maps its input, the bytes of all tensors, to its output. It is built for each target
and runs as a process of its own: under an emulator for a machine that this is not.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import PRELUDE, CpuTarget, host_target, lower
from effc.codegen.cpu.build import with_prelude
from effc.codegen.cpu.target import COMMON_FLAGS, LANES, available_isas, best_isa

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
TYPES |= {torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"}
GAP = 64  # bytes between tensors that must stay as they are
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")


@dataclass
class Case:
    """A kernel over a grid of one dimension; what torch makes of its inputs, by argument, and how near it must be."""

    kernel: triton.JITFunction
    grid: int
    args: dict[str, torch.Tensor | int]
    constants: dict[str, int]
    want: dict[str, torch.Tensor]
    tolerance: float = 0.0


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, dtype=torch.int32, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@triton.jit
def functions_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, tl.exp(x) + tl.log(tl.abs(x)) + tl.sin(x) + tl.sqrt(tl.abs(x)), mask=i < n)
    tl.store(out_ptr + n + i, tl.floor(x * 9) + tl.ceil(x * 5) * 64 + tl.erf(x) * 0.25, mask=i < n)


def functions():
    x = 3 * random(1001)
    first = x.exp() + x.abs().log() + x.sin() + x.abs().sqrt()
    second = (x * 9).floor() + (x * 5).ceil() * 64 + x.erf() * 0.25
    args = {"x_ptr": x, "out_ptr": torch.zeros(2002), "n": 1001}
    return Case(functions_kernel, 8, args, {"BLOCK": 128}, {"out_ptr": torch.cat([first, second])}, 3e-6)


@triton.jit
def narrow_kernel(a_ptr, b_ptr, c_ptr, x_ptr, sum_ptr, low_ptr, short_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < n, other=1)
    b = tl.load(b_ptr + i, mask=i < n, other=2)
    c = tl.load(c_ptr + i, mask=(i < n) & (b > 20), other=3)
    tl.store(sum_ptr + i, a.to(tl.int32) * 1000 + b.to(tl.int32) * 3 + c, mask=i < n)
    tl.store(low_ptr + i, (a.to(tl.int32) * 77 + c).to(tl.int8), mask=i < n)
    tl.store(short_ptr + i, tl.load(x_ptr + i, mask=i < n).to(tl.int16), mask=(i < n) & (a > 0))


def narrow():
    n = 203
    a = integers(-128, 128, n, dtype=torch.int8)
    b = integers(0, 256, n, dtype=torch.uint8, seed=1)
    c = integers(-30000, 30000, n, dtype=torch.int16, seed=2)
    x = 100 * random(n, seed=3)
    wide = torch.where(b > 20, c, 3).int()
    args = {"a_ptr": a, "b_ptr": b, "c_ptr": c, "x_ptr": x, "sum_ptr": torch.zeros(n, dtype=torch.int32)}
    args |= {"low_ptr": torch.zeros(n, dtype=torch.int8), "short_ptr": torch.zeros(n, dtype=torch.int16), "n": n}
    want = {"sum_ptr": a.int() * 1000 + b.int() * 3 + wide, "low_ptr": (a.int() * 77 + wide).to(torch.int8)}
    want |= {"short_ptr": torch.where(a > 0, x.to(torch.int16), 0)}
    return Case(narrow_kernel, 4, args, {"BLOCK": 64}, want)


@triton.jit
def halves_kernel(h_ptr, b_ptr, h_out_ptr, b_out_ptr, wide_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(h_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(wide_ptr + i, h + b, mask=i < n)
    tl.store(h_out_ptr + i, b * 1.2345678, mask=i < n)
    tl.store(b_out_ptr + i, h * 1.2345678, mask=i < n)


def halves():
    n = 65536 - 3
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)[:n]
    h, b = every.view(torch.float16), every.view(torch.bfloat16)
    h, b = (torch.where(x.isnan(), 1.0, x).to(x.dtype) for x in (h, b))
    args = {"h_ptr": h, "b_ptr": b, "h_out_ptr": torch.zeros_like(h), "b_out_ptr": torch.zeros_like(b)}
    want = {"h_out_ptr": (b.float() * 1.2345678).half(), "b_out_ptr": (h.float() * 1.2345678).bfloat16()}
    want |= {"wide_ptr": h.float() + b.float()}
    return Case(halves_kernel, 16, args | {"wide_ptr": torch.zeros(n), "n": n}, {"BLOCK": 4096}, want)


@triton.jit
def rows_kernel(x_ptr, softmax_ptr, best_ptr, sum_ptr, sorted_ptr, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + i, mask=i < columns, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(softmax_ptr + row * columns + i, e / tl.sum(e, 0), mask=i < columns)
    tl.store(best_ptr + row, tl.argmax(x, 0))
    tl.store(sum_ptr + row * columns + i, tl.cumsum(tl.where(i < columns, x, 0.0), 0), mask=i < columns)
    tl.store(sorted_ptr + row * BLOCK + i, tl.sort(x))


def rows():
    x = random(5, 53)
    padded = torch.nn.functional.pad(x, (0, 11), value=float("-inf"))
    args = {"x_ptr": x, "softmax_ptr": torch.zeros_like(x), "best_ptr": torch.zeros(5, dtype=torch.int32)}
    args |= {"sum_ptr": torch.zeros_like(x), "sorted_ptr": torch.zeros(5, 64), "columns": 53}
    want = {"softmax_ptr": x.softmax(1), "best_ptr": x.argmax(1).int(), "sum_ptr": x.cumsum(1)}
    return Case(rows_kernel, 5, args, {"BLOCK": 64}, want | {"sorted_ptr": padded.sort(1).values}, 3e-6)


@triton.jit
def products_kernel(a_ptr, b_ptr, c_ptr, i_ptr, j_ptr, k_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n)
    tl.store(c_ptr + m * N + n, tl.dot(a, b))
    i, j = tl.load(i_ptr + m * K + k[None, :]), tl.load(j_ptr + n * K + k[:, None])
    tl.store(k_ptr + m * N + n, tl.dot(i, j))


def products():
    a, b = random(16, 64).bfloat16(), random(64, 32, seed=1).bfloat16()
    i, j = (integers(-128, 128, *shape, dtype=torch.int8, seed=2) for shape in ((16, 64), (32, 64)))
    args = {"a_ptr": a, "b_ptr": b, "c_ptr": torch.zeros(16, 32), "i_ptr": i, "j_ptr": j}
    want = {"c_ptr": a.float() @ b.float(), "k_ptr": i.int() @ j.int().T}
    args |= {"k_ptr": torch.zeros(16, 32, dtype=torch.int32)}
    return Case(products_kernel, 1, args, {"M": 16, "N": 32, "K": 64}, want, 3e-5)


@triton.jit
def scattered_kernel(index_ptr, x_ptr, out_ptr, count_ptr, wide_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i, mask=i < n, other=0)
    x = tl.load(x_ptr + index, mask=(i < n) & (index % 3 != 0), other=-1.0)
    tl.store(out_ptr + i, x + tl.load(x_ptr + 2 * i, mask=2 * i < n, other=0.0), mask=i < n)
    tl.atomic_add(count_ptr + index % 7, 1, mask=i < n)
    wide = tl.umulhi(index * 123456789, i + 98765).to(tl.int64) * index
    tl.store(wide_ptr + (n - 1 - i), wide, mask=(i < n) & (index > 5))


def scattered():
    n = 101
    i, index = torch.arange(n), integers(0, n, n, dtype=torch.int32, seed=5)
    x, long = random(n), index.long()
    strided = torch.where(2 * i < n, x[2 * i % (2 * n) % n], 0.0)
    high = (((long * 123456789) & 0xFFFFFFFF) * (i + 98765) >> 32).int().long()
    args = {"index_ptr": index, "x_ptr": x, "out_ptr": torch.zeros(n), "count_ptr": torch.zeros(7, dtype=torch.int32)}
    args |= {"wide_ptr": torch.zeros(n, dtype=torch.int64), "n": n}
    want = {"out_ptr": torch.where(index % 3 != 0, x[long], -1.0) + strided}
    want |= {"count_ptr": torch.bincount(long % 7, minlength=7).int()}
    want |= {"wide_ptr": torch.where(index > 5, high * long, 0).flip(0)}
    return Case(scattered_kernel, 2, args, {"BLOCK": 64}, want)


CASES = [functions(), narrow(), halves(), rows(), products(), scattered()]
MAIN = """
#include <stdio.h>
alignas(64) static char memory[{bytes}];
int main() {{
  if (fread(memory, 1, sizeof(memory), stdin) != sizeof(memory)) return 1;
{calls}
  return fwrite(memory, 1, sizeof(memory), stdout) != sizeof(memory);
}}
"""


def layout():
    """Where each tensor lies in the program's memory, by case and argument, and how large that is."""
    places, end = {}, GAP
    for number, case in enumerate(CASES):
        for name, arg in case.args.items():
            if isinstance(arg, torch.Tensor):
                places[number, name] = end
                end += -(-arg.nbytes // 64) * 64 + GAP
    return places, end


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def program(target: CpuTarget) -> str:
    """The C++ of all cases."""
    places, end = layout()
    kernels, calls = [], []
    for number, case in enumerate(CASES):
        types = {n: TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for n, a in case.args.items()}
        kernel = lower(case.kernel, types, case.constants, target=target)
        kernels.append(kernel.cpp)
        args = "".join(
            f"({c_type})(memory + {places[number, name]}), " if c_type.endswith("*") else f"{case.args[name]}, "
            for name, c_type in kernel.params
        )
        calls.append(f"  for (int p = 0; p < {case.grid}; ++p) {kernel.name}({args}p, 0, 0, {case.grid}, 1, 1);")
    return with_prelude("\n".join([*kernels, MAIN.format(bytes=end, calls="\n".join(calls))]))


def compile_program(text: str, target: CpuTarget, folder: Path, more: tuple[str, ...] = ()) -> list[str]:
    """Build C++ text with a `main`; returns the command that runs it."""
    source, binary = folder / "program.cpp", folder / "program"
    source.write_text(text)
    flags = [flag for flag in target.flags if flag != "-shared"]
    subprocess.run([target.cxx, *flags, "-Werror", *more, str(source), "-o", str(binary), "-lm"], check=True)
    return [str(binary)]


def results(target: CpuTarget, folder: Path, link: tuple[str, ...] = (), run: tuple[str, ...] = ()) -> list[dict]:
    """Build and run all cases; every argument's tensor after it, by case. Nothing between tensors may have changed."""
    places, end = layout()
    before = torch.full((end,), 0xAB, dtype=torch.uint8)
    untouched = torch.ones(end, dtype=torch.bool)
    for (number, name), place in places.items():
        tensor = bytes_of(CASES[number].args[name])
        before[place : place + len(tensor)] = tensor
        untouched[place : place + len(tensor)] = False
    binary = compile_program(program(target), target, folder, link)
    done = subprocess.run([*run, *binary], input=before.numpy().tobytes(), capture_output=True, check=True)
    after = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
    assert torch.equal(after[untouched], before[untouched]), "memory between tensors was written"
    found: list[dict] = [{} for _ in CASES]
    for (number, name), place in places.items():
        tensor = CASES[number].args[name]
        found[number][name] = after[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return found


def check(found: list[dict]) -> None:
    for case, tensors in zip(CASES, found, strict=True):
        for name, want in case.want.items():
            what = f"{case.kernel.__name__}, {name}"
            tolerance = case.tolerance if want.is_floating_point() else 0.0
            got = tensors[name]
            torch.testing.assert_close(
                got, want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, what=what: f"{what}: {text}"
            )


def check_lanes(target: CpuTarget, folder: Path, link: tuple[str, ...] = (), run: tuple[str, ...] = ()) -> None:
    checks = (Path(__file__).parent / "lanes_check.cpp").read_text()
    counts = (f"-DLANES={target.lanes}", f"-DHALF={target.lanes // 2}")
    command = compile_program(PRELUDE + checks, target, folder, link + counts)
    done = subprocess.run([*run, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(params=["g++", "clang++"])
def compiler(request, monkeypatch):
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setenv("EFFC_CXX", request.param)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("asked", available_isas())
def test_all_instruction_sets_and_compilers(asked, tmp_path):
    check(results(host_target(asked), tmp_path))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("asked", list(LANES)[list(LANES).index(best_isa()) :])
def test_lane_operations_are_those_of_single_elements(asked, tmp_path):
    check_lanes(host_target(asked), tmp_path)


def test_arm_under_an_emulator(tmp_path):
    if missing := [tool for tool in ARM if not shutil.which(tool)]:
        pytest.skip(f"{' and '.join(missing)} not installed")
    target = CpuTarget("generic", (), 4, ARM[0], "", COMMON_FLAGS)
    check(results(target, tmp_path, link=("-static",), run=(ARM[1],)))
    check_lanes(target, tmp_path, link=("-static",), run=(ARM[1],))
