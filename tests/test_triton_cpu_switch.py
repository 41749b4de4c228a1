"""`effc.triton_cpu.enable()` and `disable()`: what Triton does before, between and after, with a GPU and without."""

import effc.triton_cpu
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from .on_cpu import randn
from .triton_kernels import N, add_kernel, tuned

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


def test_off_means_as_before():
    driver = triton.runtime.driver
    inside = driver.active
    with effc.triton_cpu.enable("generic"):
        assert driver.active.get_current_target() == GPUTarget("cpu", "generic", 1)
        out = torch.zeros(N)
        assert add_kernel[(8,)](out, out, out, N).metadata.arch == "generic"
    assert driver.active is inside
    effc.triton_cpu.disable()
    assert not effc.triton_cpu.is_enabled()
    assert "cpu" not in triton.backends.backends
    with pytest.raises(RuntimeError):
        add_kernel[(8,)](out, out, out, N)


class OnDevice:
    """As much of a tensor on a GPU as Triton asks for."""

    dtype, device, is_cpu = torch.float32, torch.device("cuda", 0), False

    def data_ptr(self):
        return 4096


class FakeGpu:
    """A GPU's driver; it compiles as for a CPU, and runs nothing."""

    launches: list = []  # noqa: RUF012

    def __init__(self):
        from effc.codegen.cpu.driver import CpuUtils
        from effc.codegen.cpu.target import host_target

        self.utils = CpuUtils(host_target())

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cpu", "generic", 1)

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launches.append(arguments[9:])


def test_a_gpu_keeps_its_launches():
    effc.triton_cpu.disable()
    gpu = FakeGpu()
    triton.runtime.driver.set_active(gpu)
    run = triton.JITFunction.run
    try:
        with effc.triton_cpu.enable():
            tensor, x, out = OnDevice(), randn(N), torch.zeros(N)
            add_kernel[(8,)](tensor, tensor, tensor, N)
            add_kernel[(8,)](tensor, x, tensor, N)
            assert [arguments[1] is x for arguments in gpu.launches] == [False, True], "all of it, mixed or not"
            add_kernel[(8,)](x, x, out, N)
            assert torch.equal(out, 2 * x)
            assert len(gpu.launches) == 2
            configs = [triton.Config({"BLOCK": block}) for block in (64, 128)]
            total = torch.zeros(1, dtype=torch.int64)
            tuned(configs, reset_to_zero=["total_ptr"])[lambda meta: (triton.cdiv(500, meta["BLOCK"]),)](
                torch.zeros(500, dtype=torch.int64), total, 500
            )
            assert len(gpu.launches) == 2, "tuning on the CPU, too"
            assert triton.runtime.driver.active.get_current_stream(0) == 7
        assert triton.runtime.driver.active is gpu
        assert triton.JITFunction.run is run
    finally:
        triton.runtime.driver.set_active(None)
