"""Triton kernels to C++ text, and a simple way to run one: `lower`, `launch`."""

import ctypes
import functools
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ...compiler.errors import InputError
from .build import PRELUDE, build_library
from .emit import KernelPrinter
from .parse import parse_module
from .spelling import scalar_type
from .target import CpuTarget, host_target
from .ttir import make_ttir

CTYPES = {
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "bool": ctypes.c_bool,
    "int8_t": ctypes.c_int8,
    "int16_t": ctypes.c_int16,
}
CTYPES |= {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64}


@dataclass(frozen=True)
class CppKernel:
    """A kernel as C++. `params`: name and C type, in the Triton signature's order, without the constexprs.

    `cpp` defines `static void NAME(params..., pid_x, pid_y, pid_z, num_x, num_y, num_z)`, the last six int32_t: one
    program of the grid. It needs PRELUDE before it.
    """

    name: str
    params: tuple[tuple[str, str], ...]
    ttir: str
    cpp: str


def lower(
    fn,
    signature: dict[str, str],
    constants: dict[str, object],
    name: str | None = None,
    target: CpuTarget | None = None,
    divisible: Collection[str] = (),
) -> CppKernel:
    """Compile a Triton JITFunction to C++.

    signature: types of the arguments as Triton writes them ("*fp32", "i32"); constants: values of the constexprs.
    divisible: arguments known to be multiples of 16. Raises UnsupportedKernel with the op and its source line.
    """
    target = target or host_target()
    text = make_ttir(fn, signature, constants, divisible)
    function = parse_module(text)
    printer = KernelPrinter(function, name or function.name, target.lanes, frozenset(divisible))
    cpp = printer.print()
    order = [n for n in fn.arg_names if n not in constants]
    types = [scalar_type(arg.type) for arg in function.args]
    return CppKernel(printer.name, tuple(zip(order, types, strict=True)), text, cpp)


LAUNCHER = """
extern "C" __attribute__((visibility("default"))) void launch({params}int32_t num_x, int32_t num_y, int32_t num_z) {{
  const int64_t programs = (int64_t)num_x * num_y * num_z;
#pragma omp parallel for schedule(dynamic)
  for (int64_t p = 0; p < programs; ++p)
    {name}({args}p % num_x, p / num_x % num_y, p / num_x / num_y, num_x, num_y, num_z);
}}
"""


@functools.lru_cache(maxsize=256)
def loaded(kernel: CppKernel, target: CpuTarget, cache_dir: Path):
    params = "".join(f"{type_} {name}, " for name, type_ in kernel.params)
    args = "".join(f"{name}, " for name, _ in kernel.params)
    body = PRELUDE + kernel.cpp + LAUNCHER.format(params=params, args=args, name=kernel.name)
    function = ctypes.CDLL(str(build_library(body, target, cache_dir))).launch
    function.restype = None
    function.argtypes = [CTYPES.get(type_, ctypes.c_void_p) for _, type_ in kernel.params] + [ctypes.c_int32] * 3
    return function


def cache_folder() -> Path:
    """$EFFC_CACHE_DIR, else the user's cache folder."""
    if folder := os.environ.get("EFFC_CACHE_DIR"):
        return Path(folder) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effc" / "kernels"


def launch(kernel: CppKernel, grid: tuple[int, ...], *args, target: CpuTarget | None = None) -> None:
    """Build (cached) and run a kernel over a grid. args: tensors (what has data_ptr) and numbers, ordered as params."""
    if len(args) != len(kernel.params):
        names = ", ".join(name for name, _ in kernel.params)
        raise InputError(f"kernel {kernel.name} takes {len(kernel.params)} arguments ({names}), got {len(args)}")
    function = loaded(kernel, target or host_target(), cache_folder())
    sizes = tuple(grid) + (1,) * (3 - len(grid))
    function(*(arg.data_ptr() if hasattr(arg, "data_ptr") else arg for arg in args), *sizes)
