"""`effc.triton_cpu` from process to process: scripts that know nothing of effc, caches warm and damaged, forks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import triton
import effc.triton_cpu

effc.triton_cpu.enable()
sys.path.insert(0, {folder!r})
import foreign_kernels

{body}
"""


def run_script(body, **environment):
    """What a script prints that enables the CPU and imports tests/foreign_kernels.py, in a process of its own."""
    script = SCRIPT.format(folder=str(Path(__file__).parent), body=body)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FOREIGN = """
def check():
    for rows, columns in ((7, 1000), (3, 1024)):
        x, gate = torch.randn(rows, columns), torch.randn(rows, columns)
        out, count = foreign_kernels.GeGLU(0.5)(x, gate)
        want = torch.nn.functional.gelu(x, approximate="tanh") * gate * 0.5
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        assert count == rows
        value, index = foreign_kernels.row_argmax(x)
        assert torch.equal(value, x.max(1).values) and torch.equal(index, x.argmax(1).int())
    return True

torch.manual_seed(0)
torch.set_num_threads(2)
print(check())
"""


@pytest.fixture(scope="module")
def used_cache(tmp_path_factory):
    """Folders for both caches in which tests/foreign_kernels.py was compiled."""
    folder = tmp_path_factory.mktemp("cache")
    cache = {"EFFC_CACHE_DIR": str(folder / "effc"), "TRITON_CACHE_DIR": str(folder / "triton")}
    script = folder / "script.py"
    script.write_text(f"import sys\nimport torch\nsys.path.append(sys.argv[1])\nimport foreign_kernels\n{FOREIGN}")
    command = [sys.executable, "-m", "effc.triton_cpu", str(script), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **cache}, check=False)
    assert done.stdout == "True\n", f"files that import only triton and torch run unchanged\n{done.stderr}"
    return cache


def test_a_second_process_compiles_nothing_and_a_forked_child_launches(used_cache):
    body = """
import os
triton.compiler.ASTSource.make_ir = None
os.environ["PATH"] = ""
BODY
x = torch.randn(3, 200)
want = x.argmax(1).int()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(foreign_kernels.row_argmax(x)[1], want) else 1)
print(os.waitpid(child, 0)[1])
"""
    body = body.replace("BODY", FOREIGN)
    compiler = shutil.which(os.environ.get("EFFC_CXX", "g++"))
    assert run_script(body, EFFC_CXX=str(compiler), **used_cache) == "True\n0\n"


def test_damaged_and_lost_libraries_are_built_again(used_cache):
    libraries = sorted(Path(used_cache["EFFC_CACHE_DIR"]).rglob("*.so"))
    assert len(libraries) > 2
    for library in libraries[::2]:
        library.write_bytes(library.read_bytes()[:5000])
    for library in libraries[1::2]:
        library.unlink()
    assert run_script(FOREIGN, **used_cache) == "True\n"


def test_the_interpreter_stays_what_it_is():
    body = """
x = torch.randn(70)
print(type(foreign_kernels._negate).__name__, torch.equal(foreign_kernels.negate(x), -x))
"""
    assert run_script(body, TRITON_INTERPRET="1") == "InterpretedFunction True\n"
