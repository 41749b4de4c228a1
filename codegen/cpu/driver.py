"""The CPU as a backend of Triton's own: what `triton.compile` and `kernel[grid](...)` ask a device for.

    JITFunction.run --> CpuBackend: Triton IR -> C++ -> library   (once a specialization; Triton keeps the results)
                    --> CpuDriver.launcher_cls, `make_launcher`: arguments -> native call

Triton's machinery does the rest: specialization, its cache on disk, autotuning, hooks. `switch` puts this backend in.
"""

import functools
import hashlib
import os
import time
from types import ModuleType, SimpleNamespace

from triton.backends.compiler import BaseBackend, GPUTarget, Language
from triton.backends.driver import DriverBase
from triton.runtime.errors import OutOfResources

from ...compiler.errors import TooLargeKernel, UnsupportedKernel
from .arguments import make_launcher
from .build import FOLDER, build_library, with_prelude
from .emit import SCRATCH_LIMIT
from .launch import cache_folder, launcher, print_kernel
from .target import CpuTarget, host_target
from .ttir import OPTIONS, codegen_functions, module_map, optimize

GPU_OPTIONS = frozenset(
    (
        *("num_warps", "num_stages", "num_ctas", "maxnreg", "ptx_version", "ptx_options", "enable_reflect_ftz"),
        *("launch_pdl", "sched4reg", "clc", "cluster_dims", "min_shared_mem", "waves_per_eu", "matrix_instr_nonkdim"),
        *("kpack", "allow_flush_denorm", "schedule_hint", "llvm_fn_attrs", "wgp_cu_mode", "fpsan_homomorphic_casts"),
    )
)
"""Options of Triton's GPU backends: taken, so that kernels tuned for GPUs run as they are, and without effect here."""

L3_IF_UNKNOWN = 32 << 20
MOST_CLEARED = 64 << 20
"""Bytes that are overwritten between timed calls at most: a server's L3 is shared by many cores."""


class CpuOptions(SimpleNamespace):
    """Options of one compilation: those of Triton's front end (`ttir.OPTIONS`) and what the launch gave."""

    def hash(self) -> str:
        return hashlib.sha256(repr(sorted(vars(self).items())).encode()).hexdigest()


class CpuBackend(BaseBackend):
    """Stages ttir, cpp and so; `kernel.asm` of what a launch returns holds them."""

    binary_ext = "so"

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.cpu = host_target(target.arch, checked=False) if target.arch else host_target()

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return f"{self.cpu}-{source_digest()}"

    def parse_options(self, options: dict) -> CpuOptions:
        known = {key: value for key, value in options.items() if key in vars(OPTIONS) or key in GPU_OPTIONS}
        parsed = CpuOptions(**{**vars(OPTIONS), "arch": self.cpu.name, **known})
        if "sanitize_overflow" not in options:  # Triton parses what this returned once more
            parsed.sanitize_overflow = parsed.debug
        parsed.debug = parsed.debug or self.cpu.checked
        if parsed.launch_cooperative_grid:
            raise UnsupportedKernel("launch_cooperative_grid is not supported on CPU: programs run one after another")
        return parsed

    def load_dialects(self, context) -> None:
        pass

    def get_codegen_implementation(self, options: CpuOptions) -> dict:
        return codegen_functions()

    def get_module_map(self) -> dict[str, ModuleType]:
        return module_map()

    def pack_metadata(self, metadata) -> None:
        return None

    def add_stages(self, stages: dict, options: CpuOptions, language: Language = Language.TRITON) -> None:
        if language is not Language.TRITON:
            raise UnsupportedKernel(
                f"expected a kernel of triton.jit, found one of {language.name.lower()}.jit, which lays tensors out for"
                " the threads of a GPU: write it in triton.language to run it on a CPU"
            )
        stages["ttir"] = lambda module, metadata: optimize(module, module.context)
        stages["cpp"] = self.print_cpp
        stages["so"] = self.build

    def print_cpp(self, ttir: str, metadata: dict) -> str:
        try:
            kernel = print_kernel(ttir if isinstance(ttir, str) else optimize(ttir, ttir.context), self.cpu)
        except TooLargeKernel as error:  # the autotuner goes on with the next configuration
            raise OutOfResources(error.needed, error.limit, "scratch memory") from error
        metadata["name"] = kernel.name
        metadata["params"] = [type_ for _, type_ in kernel.params]
        metadata["shared"] = max(1, kernel.scratch_bytes)
        return kernel.cpp + launcher(kernel)

    def build(self, cpp: str, metadata: dict) -> bytes:
        return build_library(with_prelude(cpp), self.cpu, cache_folder()).read_bytes()


@functools.cache
def source_digest() -> str:
    """A hash of this folder: kernels that an older version of it compiled are compiled again."""
    files = sorted(path for path in FOLDER.iterdir() if path.suffix in (".py", ".h"))
    return hashlib.sha256(b"\0".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


class CpuUtils:
    """Properties by which kernels for GPUs size their grids; `shared` is the memory that a program's arrays take."""

    def __init__(self, target: CpuTarget) -> None:
        self.registers = 16 if target.isa == "avx2" else 32

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {
            "multiprocessor_count": os.cpu_count() or 1,
            "max_shared_mem": SCRATCH_LIMIT,
            "max_num_regs": 64 * self.registers,
            "warpSize": 1,
            "sm_clock_rate": 0,
            "mem_clock_rate": 0,
            "mem_bus_width": 0,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: object) -> tuple:
        """Module, function, registers, spills and most warps. The module is but a name: `make_launcher` loads it."""
        return name, None, self.registers, 0, 1 << 30


class CpuDriver(DriverBase):
    """One CPU. `device` names it in Triton's caches of compiled kernels."""

    launcher_cls = staticmethod(make_launcher)

    def __init__(self, target: CpuTarget) -> None:
        self.target = target
        self.device = f"cpu-{target.name}"
        self.utils = CpuUtils(target)

    @classmethod
    def is_active(cls) -> bool:
        """Triton never chooses this driver by itself: `switch.enable` does."""
        return False

    def get_current_device(self) -> str:
        return self.device

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", self.target.name, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void *" if ty.startswith("*") else ty

    # -- benchmarks

    def get_benchmarker(self):
        from triton.testing import do_bench

        return do_bench

    def get_device_interface(self):
        return CpuClock

    def get_empty_cache_for_benchmark(self):
        """Memory that `clear_cache` overwrites between timed calls: as much as the last level of cache holds, twice."""
        import torch

        return torch.empty(min(2 * last_level_cache(), MOST_CLEARED) // 4, dtype=torch.int32)

    def clear_cache(self, cache) -> None:
        cache.zero_()


def last_level_cache() -> int:
    """Bytes of the L3 cache; a guess where the system does not tell."""
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or L3_IF_UNKNOWN
    except (ValueError, OSError):
        return L3_IF_UNKNOWN


class CpuClock:
    """What `triton.testing.do_bench` times with, as torch.cuda is elsewhere. A launch on a CPU is over on return."""

    class Event:
        def __init__(self, enable_timing: bool = True) -> None:
            self.time = 0

        def record(self) -> None:
            self.time = time.perf_counter_ns()

        def elapsed_time(self, later: "CpuClock.Event") -> float:
            """Milliseconds."""
            return (later.time - self.time) / 1e6

    @staticmethod
    def synchronize() -> None:
        pass
