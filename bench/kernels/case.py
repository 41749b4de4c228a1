"""What a row of the table of kernels is measured from, and how Triton kernels run as a step of an effc program does."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
from effc.codegen.cpu import CppKernel, build_library, host_target, lower, with_prelude
from effc.codegen.emit import StepPrinter, run_buffers
from effc.codegen.kernel import TRITON_TYPES, Buffer, Kernel, Launch, Pointer, Schedule
from effc.codegen.memory import plan_memory
from torch import Tensor

Function = Callable[[], Any]


@dataclass(frozen=True)
class Goal:
    """At least `value` times the best of a case's baselines, or that share of "bandwidth", or at most that many
    "seconds"."""

    value: float
    of: str = "baseline"


@dataclass
class Case:
    """One row. Functions take nothing and return what they computed (a tensor), or None.

    baselines: the same work by others, by name; the fastest one counts. aside: ways that are shown and do not count.
    exact: the result in fp64, for the receipt beside the first baseline. moved, flops: bytes and multiply-adds (as two)
    of one call. per: launches in one call. measure: replaces timing by seconds of its own. notes: what a reader has to
    know.
    """

    kernel: str
    shape: str
    effc: Function
    baselines: dict[str, Function] = field(default_factory=dict)
    exact: Function | None = None
    moved: int = 0
    flops: int = 0
    goal: Goal | None = None
    per: int = 1
    measure: Callable[[], float] | None = None
    notes: str = ""
    aside: dict[str, Function] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A launch of a Triton kernel on these arguments, specialized as Triton's own launcher would."""

    fn: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int]
    constants: dict[str, Any]

    @property
    def signature(self) -> dict[str, str]:
        return {
            name: "*" + TRITON_TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            for name, value in self.arguments.items()
        }

    @property
    def divisible(self) -> list[str]:
        return [
            name
            for name, value in self.arguments.items()
            if (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0
        ]

    @property
    def kernel(self) -> Kernel:
        constants = (*self.constants.items(), ("divisible", tuple(self.divisible)))
        return Kernel(self.fn.__name__, self.fn.src, tuple(self.signature.items()), constants)

    def lowered(self) -> CppKernel:
        return lower(
            self.fn, self.signature, self.constants, self.kernel.symbol, host_target(), divisible=self.divisible
        )


def call(fn: Any, grid: tuple[int, ...], *arguments: Tensor | int, **constants: Any) -> Call:
    """`fn[grid](*arguments, **constants)`, to be run by a `Step`."""
    names = [name for name in fn.arg_names if name not in constants]
    return Call(fn, grid, dict(zip(names, arguments, strict=True)), constants)


class Step:
    """Launches as one native function with one parallel region, as programs of effc run them; returns `result`."""

    def __init__(self, *calls: Call, result: Tensor | None = None) -> None:
        self.result, self.tensors = result, {}
        self.threads = torch.get_num_threads()
        schedule = Schedule("step", [self.launch(call) for call in calls])
        kernels = {call.kernel.symbol: call for call in calls}
        lowered = {symbol: call.lowered() for symbol, call in kernels.items()}
        steps = StepPrinter(schedule, plan_memory(schedule), lowered, {}).functions()
        self.source = with_prelude("\n\n".join([*(kernel.cpp for kernel in lowered.values()), steps]))
        self.library = build_library(self.source, host_target(), cache_folder())
        self.function = ctypes.CDLL(str(self.library)).run_0
        self.function.restype = None
        self.function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
        held = [self.tensors[buffer.name] for buffer in run_buffers(schedule)]
        self.pointers = (ctypes.c_void_p * max(1, len(held)))(*(tensor.data_ptr() for tensor in held))

    def launch(self, call: Call) -> Launch:
        arguments = [
            Pointer(self.buffer(value)) if isinstance(value, Tensor) else sympy.Integer(value)
            for value in call.arguments.values()
        ]
        grid = (*call.grid, 1, 1)[:3]
        return Launch(call.kernel, tuple(map(sympy.Integer, grid)), tuple(arguments), (call.fn.__name__,))

    def buffer(self, tensor: Tensor) -> Buffer:
        name = next((name for name, held in self.tensors.items() if held is tensor), f"tensor_{len(self.tensors)}")
        self.tensors[name] = tensor
        return Buffer(name, sympy.Integer(tensor.numel()), tensor.dtype, "input")

    def __call__(self) -> Tensor | None:
        self.function(self.pointers, None, None, self.threads)
        return self.result


def cache_folder() -> Path:
    """$EFFC_CACHE_DIR, else the user's cache folder."""
    folder = Path(os.environ.get("EFFC_CACHE_DIR") or Path.home() / ".cache" / "effc") / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
