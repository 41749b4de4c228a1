"""Compilers: a kernel runs on PyTorch's own threads whichever built it."""

import os
import shutil
import subprocess
import sys

import pytest

ON_TORCHS_THREADS = """
import os, re
import torch, triton, triton.language as tl
from effc.codegen.cpu import launch, lower

@triton.jit
def add_one_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i) + 1)

torch.set_num_threads(3)
x = torch.ones(1 << 20).add(1)
threads = set(os.listdir("/proc/self/task"))
launch(lower(add_one_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 256}), (1 << 12,), x)
assert bool((x == 3).all())
assert set(os.listdir("/proc/self/task")) == threads, "the kernel started threads of its own"
runtimes = set(re.findall(r"\\S*/lib(?:g|i|)omp[^/\\s]*", open("/proc/self/maps").read()))
assert len(runtimes) == 1, runtimes
"""


@pytest.mark.parametrize("cxx", ["g++", "clang++"])
def test_kernels_run_on_the_threads_of_torch(cxx, tmp_path):
    if not shutil.which(cxx):
        pytest.skip(f"{cxx} is not installed")
    script = tmp_path / "script.py"
    script.write_text(ON_TORCHS_THREADS)
    done = subprocess.run(
        [sys.executable, str(script)], env=dict(os.environ, EFFC_CXX=cxx), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
