"""The shape of the repository: who may import whom, what an import costs, and what is packaged."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import effc
import pytest

ROOT = Path(effc.__file__).parent
FOLDERS = ("compiler", "passes", "codegen", "runtime")
MAY_IMPORT = {
    "compiler": {"compiler"},
    "passes": {"compiler", "passes"},
    "codegen": {"compiler", "codegen"},
    "runtime": {"compiler", "codegen", "runtime"},
}
KNOWN = {"compiler.errors", "compiler.files"}
"""All that Triton's CPU target knows of effc."""

COSTLY = ("transformers", "sympy", "networkx", "gguf", "tokenizers", "platformdirs", "triton", "torch")


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names below effc that a file imports, wherever in the file that is; `*` marks an absolute import."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {f"*{alias.name}" for alias in node.names if alias.name.split(".")[0] == "effc"}
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0:
            found |= {f"*{node.module}"} if node.module.split(".")[0] == "effc" else set()
            continue
        base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
        base = tuple(part for part in base if part)
        names = {".".join((*base, alias.name)) for alias in node.names}
        found |= names if not node.module else {".".join(base)}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_one_way(folder):
    broken = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in sorted(imported(path))
        if name.split(".")[0] not in MAY_IMPORT[folder]
    ]
    assert broken == [], f"{folder} may import {sorted(MAY_IMPORT[folder])}, relatively"


def test_cpu_target_knows_triton_and_not_effc():
    broken = [
        f"{path.name} imports {name}"
        for path in modules("codegen/cpu")
        for name in sorted(imported(path))
        if not name.startswith("codegen.cpu") and name not in KNOWN
    ]
    assert broken == []


def test_import_law_sees_what_it_should(tmp_path, monkeypatch):
    (tmp_path / "codegen").mkdir()
    file = tmp_path / "codegen" / "x.py"
    file.write_text("from ..runtime.decode import stream\nfrom .. import passes\ndef f():\n    import effc.passes\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert imported(file) == {"runtime.decode", "passes", "*effc.passes"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running `code`."""
    script = f"{code}\nimport sys; print('LOADED', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return set(line.split())


def test_importing_effc_imports_nothing_heavy():
    assert loaded_by("import effc, effc.cli").isdisjoint(COSTLY)


def test_decoding_imports_no_compiler():
    loaded = loaded_by("import effc.llm, effc.program, effc.runtime.decode, effc.codegen.executable")
    assert loaded.isdisjoint({"transformers", "sympy", "networkx", "gguf"})


def test_public_names_are_there():
    assert [name for name in effc.__all__ if not hasattr(effc, name)] == []
    assert set(effc.__all__) == {*effc.HOMES, *effc.MODULES}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = effc.nonsense


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_of_code_is_packaged(project):
    code = {path.parent for folder in FOLDERS for path in modules(folder)} | {ROOT}
    names = {".".join(("effc", *folder.relative_to(ROOT).parts)) for folder in code}
    assert set(project["tool"]["setuptools"]["packages"]) == names


def test_every_file_that_is_not_python_is_packaged(project):
    data = project["tool"]["setuptools"]["package-data"]
    globs = [(ROOT.joinpath(*name.split(".")[1:]), glob) for name, patterns in data.items() for glob in patterns]
    packaged = {path for folder, glob in globs for path in folder.glob(glob)}
    found = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {path for path in found if path.suffix not in (".py", ".pyc")} == packaged


def test_entry_points_resolve(project):
    (backend,) = (entry for entry in entry_points(group="torch_dynamo_backends") if entry.name == "effc")
    assert callable(backend.load())
    (command,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "effc")
    assert callable(command.load())
    assert effc.__version__ == project["project"]["version"]
