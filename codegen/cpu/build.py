"""C++ text to a shared library, compiled once per machine: content-hashed, locked, renamed into place."""

import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ...compiler.errors import CacheError, ToolchainError
from .target import CpuTarget

FOLDER = Path(__file__).parent


def strip_guards(name: str) -> str:
    return (FOLDER / name).read_text()


PRELUDE: str = strip_guards("prelude.h") + strip_guards("math.h")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, which stays behind empty. Where locks do not exist, do without."""
    with open(path, "w") as handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def build_library(body: str, target: CpuTarget, cache_dir: Path, threads_hint: int | None = None) -> Path:
    """Compile `body` (which starts with PRELUDE) to a shared library in `cache_dir`; returns its path.

    The name is a hash of the text, the flags and the compiler. Raises ToolchainError with the compiler's first error,
    CacheError where the folder cannot be used. threads_hint is accepted for callers that plan builds; one file is one
    process.
    """
    key = hashlib.sha256("\0".join([body, *target.flags, target.cxx, target.cxx_version]).encode()).hexdigest()[:32]
    cache_dir = Path(cache_dir)
    library = cache_dir / f"{key}.so"
    if library.exists():
        return library
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(cache_dir / f"{key}.lock"):
            if not library.exists():
                compile_to(body, target, cache_dir, library)
    except OSError as error:
        raise CacheError(
            f"cannot write the kernel cache {cache_dir}: {error.strerror or error}; set EFFC_CACHE_DIR elsewhere"
        ) from error
    return library


def compile_to(body: str, target: CpuTarget, cache_dir: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".build-") as scratch:
        source, output = Path(scratch) / "kernels.cpp", Path(scratch) / "kernels.so"
        source.write_text(body)
        command = [target.cxx, *target.flags, str(source), "-o", str(output), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ToolchainError(f"the C++ compiler {target.cxx} does not run: {error.strerror}") from error
        if done.returncode:
            lines = done.stderr.splitlines()
            first = next(
                (line for line in lines if "error" in line), lines[0] if lines else f"exit status {done.returncode}"
            )
            raise ToolchainError(f"{target.cxx} refused generated code: {first.strip()}")
        os.replace(output, library)
