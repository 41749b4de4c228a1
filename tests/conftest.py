"""What all tests share: a cache of their own, the default model, threads, and random input with a printed seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import effc.triton_cpu
import platformdirs
import pytest
import torch
from effc.codegen.cpu import target
from effc.codegen.cpu.target import available_isas, best_isa
from effc.runtime import store

from .kernel_workers import SANITIZERS

TEST_CACHE = "EFFC_TEST_CACHE_DIR"
SANITIZE = "EFFC_TEST_SANITIZE"
"""Set by `make sanitize`, which preloads the sanitizers: every kernel that a test launches is compiled with them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what is found into the data that tests expect")


def pytest_configure() -> None:
    """Tests keep out of the user's models and programs; what they compile serves the next run. Passes are verified."""
    os.environ.setdefault("EFFC_VERIFY", "1")
    folder = os.environ.get(TEST_CACHE) or platformdirs.user_cache_path("effc-tests", appauthor=False)
    os.environ["EFFC_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
    if os.environ.get(SANITIZE):
        target.COMMON_FLAGS += SANITIZERS


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The file of the default model, fetched once."""
    return store.pull("smollm2")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def triton_on_cpu(one_thread: None) -> Iterator[None]:
    """Triton's own launches take CPU tensors."""
    with effc.triton_cpu.enable():
        yield


@pytest.fixture(params=[isa for isa in available_isas() if isa != best_isa() or "+" not in available_isas()[0]])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that this CPU has, then each lesser instruction set down to plain vector types."""
    monkeypatch.setenv("EFFC_ISA", request.param)
    return request.param


PLAIN_ISAS = [isa for isa in available_isas() if "+" not in isa]


@pytest.fixture(
    params=[isa if isa in PLAIN_ISAS[::2] else pytest.param(isa, marks=pytest.mark.slow) for isa in PLAIN_ISAS]
)
def outer_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `isa`, for tests that compile much: what lies between the best instruction set and the least is slow."""
    monkeypatch.setenv("EFFC_ISA", request.param)
    return request.param


@pytest.fixture(params=available_isas())
def every_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `isa`, and this CPU's instruction set without its extra features: for what they change, products."""
    monkeypatch.setenv("EFFC_ISA", request.param)
    return request.param


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers that differ from test to test and not from run to run."""
    seed = sum(map(ord, request.node.name))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
