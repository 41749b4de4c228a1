"""Random kernels give on the CPU target what Triton's interpreter gives; memory around every buffer stays as it was."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .kernel_fuzz import generate
from .kernel_text import Kernel
from .kernel_workers import Failure, Worker

BATCH = 25  # kernels in one translation unit
SETTINGS = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[Worker, Worker]]:
    with Worker("interpreter") as reference, Worker("native") as native:
        yield reference, native


def check(kernels: list[Kernel], reference: Worker, native: Worker) -> None:
    """Fails with the source of the first kernel whose results differ, ready to be pasted."""
    jobs = [kernel.job() for kernel in kernels]
    reference.send(jobs)
    got, want = native.run(jobs), reference.finish(jobs)
    for kernel, found, expected in zip(kernels, got, want, strict=True):
        for side in (expected, found):
            if isinstance(side, Failure):
                pytest.fail(f"{kernel}\n{side.text}", pytrace=False)
        if message := kernel.mismatch(found, expected):
            pytest.fail(f"{kernel}\n{message}", pytrace=False)


def draw_kernels(data: st.DataObject) -> list[Kernel]:
    numbers = data.draw(st.randoms(use_true_random=False))
    return [generate(numbers, f"k{number}") for number in range(data.draw(st.just(BATCH) | st.integers(1, BATCH - 1)))]


@settings(SETTINGS, max_examples=16)
@given(st.data())
def test_300_random_kernels(workers: tuple[Worker, Worker], data: st.DataObject) -> None:
    check(draw_kernels(data), *workers)


@settings(SETTINGS, max_examples=2)
@given(st.data())
def test_random_kernels_in_debug_mode(data: st.DataObject) -> None:
    """Every element that a kernel may touch lies inside, so that no check may fail."""
    with Worker("interpreter") as reference, Worker("checked") as native:
        check(draw_kernels(data), reference, native)


@pytest.mark.slow
@settings(SETTINGS, max_examples=300)
@given(st.data())
def test_5000_random_kernels(workers: tuple[Worker, Worker], data: st.DataObject) -> None:
    check(draw_kernels(data), *workers)
