"""Triton kernels to C++ text, and how native code is called: `lower`, `launch`."""

import ctypes
import functools
import os
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from ...compiler.errors import InputError, KernelFailed, OutOfBounds, ToolchainError, UnsupportedKernel
from .build import build_library, with_prelude
from .c_types import scalar_type
from .check import extent, insert_checks
from .emit import KernelPrinter
from .parse import kernel_name, parse_module
from .target import CpuTarget, host_target
from .ttir import make_ttir

STRUCT_CODES = {"float": "f", "double": "d", "bool": "?", "int8_t": "b", "int16_t": "h", "int32_t": "i", "int64_t": "q"}
"""C type -> code of Python's struct module; pointers are "P"."""

GRID_CODES = "4i"  # programs along x, y, z, and threads
REPORTS = "report::"
"""What C++ that may fail, or prints, has in it."""

EXTENT_CODES = "qq"  # where a tensor begins and ends, for each pointer in debug mode


@dataclass(frozen=True)
class CppKernel:
    """A kernel as C++. `params`: name and C type, in the Triton signature's order, without the constexprs.

    `cpp` defines `static void NAME(params..., pid_x, pid_y, pid_z, num_x, num_y, num_z)`, the last six int32_t: one
    program of the grid. It goes through `with_prelude`. scratch_bytes: memory that one program takes for its arrays.
    """

    name: str
    params: tuple[tuple[str, str], ...]
    ttir: str
    cpp: str
    scratch_bytes: int = 0
    checked: bool = False


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
    return print_kernel(make_ttir(fn, signature, constants, divisible, target.checked), target, name)


def print_kernel(ttir: str, target: CpuTarget, name: str | None = None) -> CppKernel:
    """Triton IR text, optimized and with locations, to C++."""
    try:
        function = parse_module(ttir)
        if target.checked:
            insert_checks(function)
        printer = KernelPrinter(function, name or function.name, target.lanes, target.checked)
        cpp = printer.print()
    except UnsupportedKernel as error:
        error.args = (f"kernel {name or kernel_name(ttir)}: {error}", *error.args[1:])
        raise
    except Exception as error:  # a defect of ours, which its reporter should be able to name
        error.add_note(f"effc was compiling kernel {name or kernel_name(ttir)} for {target.name}")
        raise
    params = tuple((arg.name, scalar_type(arg.type)) for arg in function.args)
    return CppKernel(printer.name, params, ttir, cpp, printer.scratch_bytes, target.checked)


LAUNCHER = """
struct Launch {{
  int32_t num_x, num_y, num_z, threads;
{fields}}};

extern "C" __attribute__((visibility("default"))) void launch(const Launch *launch) {{
  const int32_t num_x = launch->num_x, num_y = launch->num_y, num_z = launch->num_z, threads = launch->threads;
  const int64_t programs = (int64_t)num_x * num_y * num_z;
{outcome}  for_each(programs, threads, [=](int64_t p) {{
{told}    {name}({args}{extents}p % num_x, p / num_x % num_y, p / num_x / num_y, num_x, num_y, num_z);
  }});
}}
"""


def launcher(kernel: CppKernel) -> str:
    """C++ of `void launch(const Launch *)`: a kernel over a grid. The struct is laid out as `packer` packs it."""
    fields = "".join(f"  {type_} arg{k};\n" for k, (_, type_) in enumerate(kernel.params))
    args = "".join(f"launch->arg{k}, " for k in range(len(kernel.params)))
    extents = ""
    if kernel.checked:
        fields += f"  check::Extent extents[{max(1, pointers(kernel))}];\n"
        extents = "launch->extents, "
    outcome = told = ""
    if REPORTS in kernel.cpp:
        outcome = "  report::Outcome *const outcome = &report::own;\n"
        told = "    report::launched = outcome;\n"
    return LAUNCHER.format(fields=fields, args=args, extents=extents, name=kernel.name, outcome=outcome, told=told)


def pointers(kernel: CppKernel) -> int:
    return sum(type_.endswith("*") for _, type_ in kernel.params)


def packer(codes: Iterable[str]) -> Callable[..., bytes]:
    """Packs num_x, num_y, num_z, threads and the arguments; `codes` are the arguments' (see STRUCT_CODES)."""
    return struct.Struct(GRID_CODES + "".join(codes)).pack


def struct_code(c_type: str) -> str:
    return "P" if c_type.endswith("*") else STRUCT_CODES[c_type]


@functools.lru_cache(maxsize=256)
def load_launcher(cpp: str, target: CpuTarget, cache_dir: Path) -> Callable[[bytes], None]:
    """The `launch` of C++ text (without a prelude), built where it is not in the cache: takes what `packer` packs.

    Other Python threads run meanwhile. Raises KernelFailed after a launch in which a device_assert failed.
    """
    library = build_library(with_prelude(cpp), target, cache_dir)
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise ToolchainError(
            f"cannot load {library} ({error}): remove it, and set EFFC_CXX to g++ or clang++"
        ) from None
    function = loaded.launch
    function.restype = None
    function.argtypes = [ctypes.c_char_p]
    return raising(function, loaded.take_failure) if REPORTS in cpp else function


def raising(function: Callable[[bytes], None], take_failure) -> Callable[[bytes], None]:
    """`function`, raising what a kernel reports as a failure."""
    take_failure.restype = ctypes.c_char_p

    def launch_and_ask(packed: bytes) -> None:
        function(packed)
        if (failure := take_failure()) is not None:
            text = failure.decode(errors="replace")
            raise (OutOfBounds if ": out of bounds: " in text else KernelFailed)(text)

    return launch_and_ask


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
    function = load_launcher(kernel.cpp + launcher(kernel), target or host_target(), cache_folder())
    sizes = tuple(grid) + (1,) * (3 - len(grid))
    values = [arg.data_ptr() if hasattr(arg, "data_ptr") else arg for arg in args]
    codes = [struct_code(type_) for _, type_ in kernel.params]
    if kernel.checked:
        spans = [extent(arg) for arg, (_, type_) in zip(args, kernel.params, strict=True) if type_.endswith("*")]
        values += [end for span in spans for end in span]
        codes += [EXTENT_CODES] * len(spans)
    function(packer(codes)(*sizes, available_threads(), *values))


def available_threads() -> int:
    """How many threads run a launch: as many as PyTorch's own operators take, one in a forked child."""
    import torch

    return 1 if FORKED else torch.get_num_threads()


FORKED: list[bool] = []
"""Not empty in a child of a process that had imported this: OpenMP's threads stay behind in the parent."""
os.register_at_fork(after_in_child=lambda: FORKED.append(True))
