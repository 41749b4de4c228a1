"""What the host's CPU and compiler are: resolved once, spelled out, never the word `native`."""

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

from ...compiler.errors import InputError, ToolchainError

LANES = {"avx512": 16, "avx2": 8, "generic": 4}
AVX2_FLAGS = ("avx2", "fma", "f16c", "bmi", "bmi2", "popcnt")
AVX512_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
KERNEL_NAMES = {"bmi": "bmi1"}  # /proc/cpuinfo's word for a compiler's flag
COMMON_FLAGS = (
    "-O2", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fwrapv", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas",
)  # fmt: skip


@dataclass(frozen=True)
class CpuTarget:
    """A CPU to compile for: instruction set, its fp32 lanes, and the compiler with its full command line."""

    isa: str  # "avx512", "avx2" or "generic"
    lanes: int
    cxx: str
    cxx_version: str
    flags: tuple[str, ...]


@functools.cache
def cpu_features() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("flags"):
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def best_isa() -> str:
    def has(flags: tuple[str, ...]) -> bool:
        return all(KERNEL_NAMES.get(flag, flag) in cpu_features() for flag in flags)

    if platform.machine() not in ("x86_64", "AMD64") or not has(AVX2_FLAGS):
        return "generic"
    return "avx512" if has(AVX512_FLAGS) else "avx2"


def find_compiler() -> str:
    """Path of the C++ compiler: $EFFC_CXX, else $CXX, else g++ or clang++ on the path. Raises ToolchainError."""
    for variable in ("EFFC_CXX", "CXX"):
        if name := os.environ.get(variable, "").strip():
            if path := shutil.which(name):
                return path
            raise ToolchainError(
                f"${variable} names the C++ compiler {name!r}, which is not an executable on this machine:"
                " install it, or set EFFC_CXX to g++ or clang++"
            )
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise ToolchainError("no C++ compiler found: install g++ or clang++, or set EFFC_CXX to one")


@functools.lru_cache(maxsize=8)
def compiler_version(cxx: str) -> str:
    try:
        done = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"the C++ compiler {cxx} does not run: {error}") from error
    if done.returncode or not done.stdout.strip():
        raise ToolchainError(
            f"the C++ compiler {cxx} does not answer --version: {(done.stderr.strip() or 'no output').splitlines()[0]};"
            " set EFFC_CXX to g++ or clang++"
        )
    return done.stdout.splitlines()[0]


def host_target(isa: str | None = None) -> CpuTarget:
    """The host as a target. `isa`, else $EFFC_ISA, may ask for less than it has. Raises ToolchainError, InputError."""
    isa = isa or os.environ.get("EFFC_ISA") or best_isa()
    if isa not in LANES:
        raise InputError(
            f"unknown instruction set {isa!r}: expected one of {', '.join(LANES)} (argument isa or $EFFC_ISA)"
        )
    if list(LANES).index(isa) < list(LANES).index(best_isa()):
        raise InputError(f"instruction set {isa} is more than this CPU has ({best_isa()})")
    cxx = find_compiler()
    machine = {"generic": (), "avx2": AVX2_FLAGS, "avx512": AVX2_FLAGS + AVX512_FLAGS}[isa]
    flags = COMMON_FLAGS + tuple(f"-m{flag}" for flag in machine)
    if isa == "avx512":
        flags += ("-mprefer-vector-width=512",)
    return CpuTarget(isa, LANES[isa], cxx, compiler_version(cxx), flags)
