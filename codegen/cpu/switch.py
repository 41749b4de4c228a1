"""Put the CPU backend into Triton, and take it out again.

Without a GPU it becomes Triton's active driver. With one, that stays active: a launch whose tensors all lie in ordinary
host memory, which the GPU's driver would refuse, goes to the CPU.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

from triton.backends import Backend, backends
from triton.compiler import CompiledKernel
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver as active_driver
from triton.runtime.jit import JITFunction

from .driver import CpuBackend, CpuDriver
from .target import CpuTarget

ROUTED = (JITFunction, Autotuner)
"""Triton's classes whose `run` takes a launch's arguments. (Heuristics are inside or around them.)"""


class Router:
    """A driver that is the GPU's, and the CPU's in threads that are inside a launch for it."""

    def __init__(self, gpu: Callable[[], Any], cpu: CpuDriver) -> None:
        self.__dict__.update(make_gpu=gpu, cpu=cpu, local=threading.local())

    @functools.cached_property
    def gpu(self) -> Any:
        return self.make_gpu()

    @property
    def on_cpu(self) -> bool:
        return getattr(self.local, "on_cpu", False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cpu if self.on_cpu else self.gpu, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.cpu if self.on_cpu else self.gpu, name, value)

    def route(self, run: Callable) -> Callable:
        """`run` of a kernel, with the driver that its arguments ask for."""

        @functools.wraps(run)
        def routed(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if self.on_cpu or not belongs_to_cpu((*args, *kwargs.values())):
                return run(kernel, *args, **kwargs)
            self.local.on_cpu = True
            try:
                return run(kernel, *args, **kwargs)
            finally:
                self.local.on_cpu = False

        return routed


def belongs_to_cpu(values: tuple) -> bool:
    """Whether a launch has tensors, all on the CPU, and some in memory that a GPU does not reach."""
    pageable = False
    for tensor in tensors_in(values):
        if tensor.device.type != "cpu":
            return False
        pageable = pageable or not is_pinned(tensor)
    return pageable


def tensors_in(values: Any) -> Any:
    for value in values:
        if isinstance(value, tuple | list):
            yield from tensors_in(value)
        elif hasattr(value, "base") and hasattr(value, "block_shape"):  # a tensor descriptor
            yield value.base
        elif hasattr(value, "data_ptr") and hasattr(value, "device"):
            yield value


def is_pinned(tensor: Any) -> bool:
    return tensor.is_pinned() if hasattr(tensor, "is_pinned") else False


def keep_modules_of_cpu_kernels() -> None:
    """Since 3.9 a kernel that is collected has the active driver unload its module; ours are not that driver's."""
    unload = getattr(CompiledKernel, "__del__", None)
    if unload is None or hasattr(unload, "__wrapped__"):
        return

    @functools.wraps(unload)
    def unload_others(kernel: CompiledKernel) -> None:
        if kernel.metadata.target.backend != "cpu":
            unload(kernel)

    CompiledKernel.__del__ = unload_others


class Switch:
    """Triton with the CPU backend in: `Switch(target).turn_on()`, then `turn_off()`."""

    def __init__(self, target: CpuTarget) -> None:
        self.driver = CpuDriver(target)
        self.previous: Any = None
        self.runs: dict[type, Callable] = {}

    def turn_on(self) -> None:
        keep_modules_of_cpu_kernels()
        self.backend = backends.get("cpu")
        self.previous = active_driver._active
        backends["cpu"] = Backend(CpuBackend, CpuDriver)
        gpus = [backend.driver for backend in backends.values() if backend.driver.is_active()]
        others = self.previous is not None and not isinstance(self.previous, CpuDriver)
        if not others and not gpus:
            active_driver.set_active(self.driver)
            return
        router = Router(lambda: self.previous or active_driver.default, self.driver)
        active_driver.set_active(router)
        for owner in ROUTED:
            self.runs[owner] = owner.run
            owner.run = router.route(owner.run)

    def turn_off(self) -> None:
        for owner, run in self.runs.items():
            owner.run = run
        active_driver.set_active(self.previous)
        if self.backend is None:
            backends.pop("cpu", None)
