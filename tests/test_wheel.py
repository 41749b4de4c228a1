"""effc as users get it: a wheel, and an editable install, each imported from another folder than the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import effc
import pytest

ROOT = Path(effc.__file__).parent

PROBE = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
import effc
assert effc.__version__ == importlib.metadata.version("effc")
for name in ("compiler.ops", "passes.pipeline", "codegen.schedule", "codegen.cpu", "runtime.decode", "program", "llm"):
    importlib.import_module(f"effc.{name}")
from effc.codegen.cpu import PRELUDE
assert "#include" in PRELUDE
from importlib.metadata import entry_points
(backend,) = entry_points(group="torch_dynamo_backends", name="effc")
assert callable(backend.load())
print(pathlib.Path(effc.__file__).parent)
"""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files that git knows, in a folder of their own: building writes into its folder."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return folder


def probe(python: Path, folder: Path) -> str:
    """Import effc and its parts in a fresh interpreter that runs in `folder`; returns where effc lies."""
    done = subprocess.run([str(python), "-c", PROBE], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def virtual_environment(folder: Path) -> Path:
    """The interpreter of a new environment, in which effc is missing and what it needs is there."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    needed = Path(next(path for path in sys.path if path.endswith("site-packages")))
    for entry in needed.iterdir():
        if "effc" not in entry.name and entry.suffix != ".pth" and entry.name != "__pycache__":
            (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_wheel(checkout, tmp_path):
    listed = {path.relative_to(checkout) for path in checkout.rglob("*") if path.suffix in (".py", ".h")}
    pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(checkout))
    (wheel,) = tmp_path.glob("effc-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if not name.startswith(f"effc-{effc.__version__}.dist-info/")}
    outside = {"tests", "bench", "examples"}
    assert inside == {f"effc/{path}" for path in listed if path.parts[0] not in outside}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    python = virtual_environment(tmp_path / "venv")
    pip("--python", str(python), "install", "--no-deps", str(wheel))
    assert probe(python, tmp_path).startswith(str(tmp_path / "venv"))
    assert (tmp_path / "venv" / "bin" / "effc").is_file()


@pytest.mark.slow
def test_editable_install(checkout, tmp_path):
    python = virtual_environment(tmp_path / "venv")
    pip("--python", str(python), "install", "--no-deps", "--editable", str(checkout))
    for folder in (tmp_path, checkout):
        assert probe(python, folder) == str(checkout)
