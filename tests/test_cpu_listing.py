"""Listings: Triton source, Triton IR and C++ beside each other, and the loop that matters in the assembly."""

import re

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import host_target, lower
from effc.codegen.cpu.assembly import assemble, basic_blocks, hot_loop, innermost_loops, instructions
from effc.codegen.cpu.listing import listing
from effc.report import dump_schedule

from .graphs import Compiled


@triton.jit
def softmax_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * n + at, mask=at < n, other=-float("inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + tl.program_id(0) * n + at, e / tl.sum(e, axis=0), mask=at < n)


@pytest.fixture(scope="module")
def kernel():
    return lower(softmax_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}, {"BLOCK": 1024})


def test_a_listing_has_source_ir_and_cpp_by_line_and_the_loop_of_exp(kernel):
    text = listing(kernel, host_target())
    parts = re.split(r"\n {0,3}\d+ \| ", text)
    (line,) = (part for part in parts if part.startswith("e = tl.exp(x - tl.max(x, axis=0))"))
    assert "ttir  %e_" in line
    assert "math.exp" in line
    assert re.search(r"c\+\+ .*exponential<", line)
    assert "tt.store" not in line
    loop = text.split("hot loop:\n")[1]
    assert "r = x - n * 0.693" in loop, "the C++ that exp is made of"
    assert "tt.func" not in text


def test_the_hot_loop_is_one_loop(kernel, isa):
    target = host_target()
    lowered = lower(softmax_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}, {"BLOCK": 1024}, target=target)
    lines = [line.split(" #")[0].rstrip() for line in hot_loop(lowered, target).splitlines()]  # clang comments labels
    lines = [line for line in lines if line and not line.lstrip().startswith("//")]
    labels = [line for line in lines if line.endswith(":")]
    assert len(lines) > 15
    assert sum(line.split()[-1] == labels[0][:-1] for line in lines) == 1, "one jump back"


def test_a_dump_has_listings(tmp_path, generator):
    def function(x, w):
        return torch.softmax(x * w, -1)

    x, w = torch.randn(4, 96, generator=generator), torch.randn(96, generator=generator)
    scheduled = Compiled(function, {"x": x, "w": w}).scheduled
    dump_schedule(scheduled, tmp_path, host_target())
    (kernel,) = scheduled.schedule.kernels
    files = {path.suffix: path.read_text() for path in (tmp_path / "kernels").iterdir()}
    assert set(files) == {".py", ".ttir", ".cpp", ".txt"}
    assert files[".txt"].startswith(f"{kernel.symbol} for ")
    assert "tl.load(" in files[".txt"]
    assert "hot loop:" in files[".txt"]


NESTED = """
kernel:
\tjmp .L4
.L2:
\tvaddps %ymm0, %ymm1, %ymm1
.L3:
\tvmulps %ymm0, %ymm0, %ymm0
\tjne .L3
\tje .L9
.L4:
\tcmpl %eax, %ebx
\tjl .L2
\tret
.L9:
\txorl %eax, %eax
\tjmp .L4
"""


def test_loops_are_found_by_where_code_jumps_not_by_where_it_lies():
    (loop,) = innermost_loops(basic_blocks(instructions(NESTED)))
    assert [instruction.text.split()[0] for instruction in loop] == [".L3:", "vmulps", "jne"]


def test_code_without_loops_has_no_hot_one():
    target = host_target()
    code = instructions(assemble("int twice(int x) { return 2 * x; }", target))
    assert code
    assert innermost_loops(basic_blocks(code)) == []
