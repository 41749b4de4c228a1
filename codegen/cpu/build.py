"""C++ text to a shared library, compiled once per machine: content-hashed, locked, renamed into place."""

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ...compiler.errors import ToolchainError
from ...compiler.files import locked, read_sealed, refusals, sealed, unsealed, write_atomically
from .target import CpuTarget

FOLDER = Path(__file__).parent
HEADERS = ("vectors.h", "lanes_generic.h", "lanes_avx2.h", "lanes_avx512.h", "prelude.h", "math.h", "threads.h")
PRELUDE: str = "".join((FOLDER / header).read_text() for header in HEADERS)
# By what C++ that needs them says:
RARE_HEADERS = {
    "f8E": "fp8.h",
    "report::": "report.h",
    "check::": "check.h",
    "plain_product": "plain_product.h",
    "libdevice::": "libdevice.h",
}
NO_SPACE = os.strerror(errno.ENOSPC)
GENTLE = ("-O1", "-fexpensive-optimizations")  # the second fuses products with sums, which math.h counts on
CRASH = "internal compiler error"  # g++ 12 has one in its loop passes; a random kernel in some thousands meets it


def with_prelude(body: str) -> str:
    """`body` after the prelude and the headers it needs."""
    rare = [(FOLDER / header).read_text() for word, header in RARE_HEADERS.items() if word in body]
    return "\n".join([PRELUDE, *rare, body])


def build_library(body: str, target: CpuTarget, cache_dir: Path) -> Path:
    """Compile `body` (which has its prelude) to a shared library in `cache_dir`; returns its path.

    The name is a hash of the text, the flags and the compiler; a library that is damaged is made again. Raises
    ToolchainError with the compiler's first error, CacheError where the folder cannot be used.
    """
    key = hashlib.sha256("\0".join([body, *target.flags, target.cxx, target.cxx_version]).encode()).hexdigest()[:32]
    library = Path(cache_dir) / f"{key}.so"
    if unsealed(library) is None:
        with locked(library):
            if read_sealed(library) is None:
                compile_to(body, target, library)
    return library


def compile_to(body: str, target: CpuTarget, library: Path) -> None:
    """Run the compiler; the library appears whole and sealed, or not at all."""
    with refusals(library), tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as scratch:
        source, output = Path(scratch) / "kernels.cpp", Path(scratch) / "kernels.so"
        source.write_text(body)
        done = run_compiler(target.cxx, *target.flags, str(source), "-o", str(output), "-lm")
        if CRASH in done.stderr:
            print(f"effc: {target.cxx} crashed and is tried with -O1: {first_error(done)}", file=sys.stderr)
            done = run_compiler(target.cxx, *target.flags, *GENTLE, str(source), "-o", str(output), "-lm")
        if NO_SPACE in done.stderr:
            raise OSError(errno.ENOSPC, NO_SPACE)
        if done.returncode < 0:
            raise ToolchainError(
                f"{target.cxx} was killed by signal {-done.returncode}: is there enough memory? try again"
            )
        if done.returncode:
            raise ToolchainError(f"{target.cxx} refused generated code: {first_error(done)}")
        if not output.is_file():
            raise ToolchainError(f"{target.cxx} succeeded and wrote no library: set EFFC_CXX to g++ or clang++")
        write_atomically(library, sealed(output.read_bytes()))


def run_compiler(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ToolchainError(f"the C++ compiler {command[0]} does not run: {error.strerror}") from error


def first_error(done: subprocess.CompletedProcess[str]) -> str:
    """The line that tells most of what a compiler printed."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else f"exit status {done.returncode}")
