"""Random kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `pytest tests/test_cpu_sanitize.py`.

Memory is allocated on the heap, to the byte, so that a read past a buffer's end is seen too. Two checks are off: what
pointer-overflow calls undefined are addresses of lanes that a mask turns off, which nothing reads; alignment is that of
an element, while vectors are loaded from anywhere. The kernels are those for plain vectors: the sanitizers do not look
into masked instructions.
"""

import random
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from effc.codegen.cpu import host_target

from .kernel_fuzz import generate
from .kernel_workers import Failure, Job, Worker

BATCH = 20
SOURCE = """
import triton
import triton.language as tl

@triton.jit
def copy(x, out, n, shift):
    i = tl.arange(0, 64)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0) << shift, mask=i < n)
"""


def library(name: str) -> str:
    """Path of a compiler's own library; skips the test where there is none."""
    command = [host_target().cxx, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not path.startswith("/"):
        pytest.skip(f"{command[0]} has no {name}")
    return path


@pytest.fixture(scope="module")
def sanitized() -> Iterator[Worker]:
    """A worker whose kernels are compiled with both sanitizers, which its process preloads."""
    environment = {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "EFFC_ISA": "generic",
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=77",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    with Worker("sanitized", environment) as worker:
        yield worker


@pytest.mark.slow
@pytest.mark.parametrize(("n", "message"), [(50, None), (51, "ERROR: AddressSanitizer")])
def test_a_read_past_the_end_is_seen(sanitized, n, message):
    memories = [np.zeros(300, np.uint8) for _ in range(2)]
    arguments = [("x", "*i32", (0, 32)), ("out", "*i32", (1, 0)), ("n", "i32", n), ("shift", "i32", 3)]
    (result,) = sanitized.run([Job("copy", SOURCE, arguments, memories, (1, 1, 1), (), ((32, 232), (0, 300)))])
    if message is None:
        assert not isinstance(result, Failure), result.text
    else:
        assert isinstance(result, Failure)
        assert message in result.text


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, BATCH))
def test_random_kernels_are_clean(sanitized, first):
    print(f"seeds {first} to {first + BATCH - 1}")
    kernels = [generate(random.Random(seed), f"k{seed}") for seed in range(first, first + BATCH)]
    for kernel, result in zip(kernels, sanitized.run([kernel.job() for kernel in kernels]), strict=True):
        if isinstance(result, Failure):
            pytest.fail(f"{kernel}\n{result.text}", pytrace=False)
