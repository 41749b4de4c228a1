"""What the host's CPU and compiler are: resolved once, spelled out, never the word `native`."""

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

from ...compiler.errors import InputError, ToolchainError

LANES = {"avx512": 16, "avx2": 8, "generic": 4}
# What every CPU of an instruction set has, and what some have besides: words of /proc/cpuinfo.
BASE = {
    "avx512": ("avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt"),
    "generic": (),
}
EXTRAS = {"avx512": ("avx512_vnni", "avx512_bf16"), "avx2": ("avx_vnni",), "generic": ()}
COMMON_FLAGS = (
    "-O2", "-std=c++17", "-shared", "-fPIC", "-fwrapv", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip

# Kernels are vectors already; clang 14 takes the stride of x[i * 3 % 64] to be 3 throughout and vectorizes it wrongly.
CLANG_FLAGS = ("-fno-vectorize",)


CHECKED = "checked"


@dataclass(frozen=True)
class CpuTarget:
    """A CPU to compile for: instruction set, its fp32 lanes, and the compiler with its full command line."""

    isa: str  # "avx512", "avx2" or "generic"
    features: tuple[str, ...]  # those of EXTRAS[isa] that may be used
    lanes: int
    cxx: str
    cxx_version: str
    flags: tuple[str, ...]
    checked: bool = False  # kernels look at every access to memory first

    @property
    def name(self) -> str:
        """What $EFFC_ISA would have to say to get it: avx512+avx512_vnni, and +checked for debug mode."""
        return "+".join([self.isa, *self.features, *([CHECKED] if self.checked else [])])


@functools.cache
def cpu_features() -> frozenset[str]:
    """What /proc/cpuinfo, where there is one, says of the first CPU: what it has and the system saves."""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith(("flags", "Features")):  # x86, Arm
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def best_isa() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        return "generic"
    return next(isa for isa in LANES if cpu_features().issuperset(BASE[isa]))


def available_isas() -> list[str]:
    """What $EFFC_ISA may say on this CPU: everything it has, then less and less."""
    isas = list(LANES)[list(LANES).index(best_isa()) :]
    everything = "+".join([best_isa(), *extras(best_isa())])
    return list(dict.fromkeys([everything, *isas]))


def extras(isa: str) -> tuple[str, ...]:
    return tuple(feature for feature in EXTRAS[isa] if feature in cpu_features())


def chosen_isa(isa: str | None) -> tuple[str, tuple[str, ...]]:
    """Instruction set and features of `isa`, else of $EFFC_ISA, else all that the CPU has. Raises InputError."""
    text = isa or os.environ.get("EFFC_ISA", "").strip()
    if not text:
        return best_isa(), extras(best_isa())
    isa, *features = text.split("+")
    if isa not in LANES:
        raise InputError(
            f"unknown instruction set {isa!r}: expected one of {', '.join(LANES)} (argument isa or $EFFC_ISA)"
        )
    if unknown := [feature for feature in features if feature not in EXTRAS[isa]]:
        raise InputError(
            f"unknown feature {unknown[0]!r} of instruction set {isa}:"
            f" expected one of {', '.join(EXTRAS[isa]) or 'none'} (argument isa or $EFFC_ISA)"
        )
    if list(LANES).index(isa) < list(LANES).index(best_isa()) or not cpu_features().issuperset(features):
        raise InputError(f"instruction set {text} is more than this CPU has ({available_isas()[0]})")
    return isa, tuple(feature for feature in EXTRAS[isa] if feature in features)


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


def machine_flags(isa: str, features: tuple[str, ...]) -> tuple[str, ...]:
    """-mavx512vnni for avx512_vnni: a compiler's words for those of /proc/cpuinfo."""
    words = {"bmi1": "bmi"}
    flags = tuple(f"-m{words.get(word, word).replace('_', '')}" for word in BASE[isa] + features)
    return (*flags, "-mprefer-vector-width=512") if isa == "avx512" else flags


def host_target(isa: str | None = None, checked: bool | None = None) -> CpuTarget:
    """The host as a target, with all that its CPU has. Raises ToolchainError, InputError.

    `isa`, else $EFFC_ISA, asks for exactly an instruction set and its features: avx512+avx512_vnni, avx2, generic.
    checked: debug mode; by default where $EFFC_TRITON_CHECK is set to anything but 0, or `isa` ends with +checked.
    """
    if isa and isa.endswith(f"+{CHECKED}"):
        isa, checked = isa.removesuffix(f"+{CHECKED}"), True
    if checked is None:
        checked = os.environ.get("EFFC_TRITON_CHECK", "0") not in ("", "0")
    isa, features = chosen_isa(isa)
    cxx = find_compiler()
    version = compiler_version(cxx)
    flags = COMMON_FLAGS + (CLANG_FLAGS if "clang" in version else ()) + machine_flags(isa, features)
    return CpuTarget(isa, features, LANES[isa], cxx, version, flags, checked)
