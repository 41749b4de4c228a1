"""How files get to disk whole, and stay so: locks, writes under a temporary name, seals.

Every file is written under a temporary name and renamed, so a process that dies leaves nothing half-written that
another would read; a lock per key lets one process work while the others wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from .errors import CacheError


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path` among all processes of this machine; others wait. The lock is the file `path`.lock."""
    lock = path.with_name(path.name + ".lock")
    with refusals(lock):
        lock.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with refusals(lock):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Make `path` hold `content` (bytes, text, or what a function writes to a binary file), whole or not at all.

    Raises CacheError where the folder cannot be written to or is full; an earlier file stays as it was.
    """
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the file system refuses, as one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "the disk is full: make room or choose a folder on another disk (EFFC_CACHE_DIR is the cache)"
        else:
            advice = f"{error.strerror or error}: choose a folder that you can write to (EFFC_CACHE_DIR is the cache)"
        raise CacheError(f"cannot write {path}: {advice}") from error


# --- seals -------------------------------------------------------------------------------------------------------


def sealed(content: bytes) -> bytes:
    """Content with its hash behind it. (A shared library may have bytes behind its end.)"""
    return content + hashlib.sha256(content).digest()


def read_sealed(path: Path) -> bytes | None:
    """What was sealed in a file; None if there is none or its hash does not fit, which is said."""
    content = unsealed(path)
    if content is None and path.exists():
        print(f"effc: {path} is damaged and will be made again", file=sys.stderr)
    return content


def unsealed(path: Path) -> bytes | None:
    """What was sealed in a file, or None."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    content, seal = whole[:-32], whole[-32:]
    return content if hashlib.sha256(content).digest() == seal else None
