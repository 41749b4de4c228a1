"""Building and refusing: compilers that are missing or fail, the library cache, kernels the target does not take."""

import ctypes
import dataclasses
import os
import stat
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import PRELUDE, build_library, host_target, kernel_from_source, launch, lower
from effc.compiler.errors import CacheError, InputError, ToolchainError, UnsupportedKernel

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)
"""
SIGNATURE = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text.strip(), text
    return text


def test_kernel_from_source_text_runs():
    kernel = lower(kernel_from_source(SOURCE, "double_kernel"), SIGNATURE, {"BLOCK": 64}, name="twice")
    assert kernel.name == "twice"
    assert kernel.params == (("x_ptr", "float *"), ("out_ptr", "float *"), ("n", "int32_t"))
    x, out = torch.arange(100.0), torch.zeros(100)
    launch(kernel, (2,), x, out, 100)
    assert torch.equal(out, x * 2)


def test_generated_code_names_variables_and_quotes_the_source():
    kernel = lower(kernel_from_source(SOURCE, "double_kernel"), SIGNATURE, {"BLOCK": 64})
    assert "tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * 2, mask=i < n)" in kernel.cpp
    assert "float *x_ptr" in kernel.cpp
    assert "__restrict" not in kernel.cpp


def test_lowering_is_deterministic():
    texts = {lower(kernel_from_source(SOURCE, "double_kernel"), SIGNATURE, {"BLOCK": 64}).cpp for _ in range(3)}
    assert len(texts) == 1


def test_known_multiples_of_16_need_no_ragged_end():
    plain = lower(kernel_from_source(SOURCE, "double_kernel"), SIGNATURE, {"BLOCK": 256})
    even = lower(kernel_from_source(SOURCE, "double_kernel"), SIGNATURE, {"BLOCK": 256}, divisible=["n"])
    assert "store_n" in plain.cpp
    assert "store_n" not in even.cpp


def test_missing_kernel_name_is_refused():
    with pytest.raises(UnsupportedKernel, match="defines no kernel named nothing"):
        kernel_from_source(SOURCE, "nothing")


def test_missing_argument_type_is_refused():
    with pytest.raises(UnsupportedKernel, match="no type and no constant given for n"):
        lower(kernel_from_source(SOURCE, "double_kernel"), {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {"BLOCK": 64})


@triton.jit
def assembly_kernel(x_ptr):
    x = tl.load(x_ptr + tl.arange(0, 64))
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x_ptr + tl.arange(0, 64), y)


def test_unsupported_op_names_op_and_line():
    with pytest.raises(UnsupportedKernel, match=r"test_cpu_build\.py:\d+: tt\.elementwise_inline_asm") as error:
        lower(assembly_kernel, {"x_ptr": "*i32"}, {})
    one_line(error.value)


def test_a_defect_of_the_compiler_names_the_kernel(monkeypatch):
    monkeypatch.setattr("effc.codegen.cpu.emit.KernelPrinter.print", lambda self: self.nothing)
    with pytest.raises(AttributeError) as error:
        lower(assembly_kernel, {"x_ptr": "*i32"}, {})
    assert "assembly_kernel" in error.value.__notes__[0]


def test_wrong_number_of_arguments_is_refused():
    kernel = lower(kernel_from_source(SOURCE, "double_kernel"), SIGNATURE, {"BLOCK": 64})
    with pytest.raises(InputError, match="takes 3 arguments"):
        launch(kernel, (1,), torch.zeros(4))


def test_no_compiler_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.delenv("EFFC_CXX", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler found") as error:
        host_target()
    one_line(error.value)


def test_compiler_named_by_the_environment_must_exist(monkeypatch):
    monkeypatch.setenv("EFFC_CXX", "/nowhere/c++")
    with pytest.raises(ToolchainError, match="EFFC_CXX"):
        host_target()


def test_compiler_error_is_the_first_error_line(tmp_path):
    with pytest.raises(ToolchainError, match=r"refused generated code.*error") as error:
        build_library("int x = ;\nint y = ;\n", host_target(), tmp_path)
    one_line(error.value)
    assert not list(tmp_path.glob("*.so"))
    assert not list(tmp_path.glob(".build-*"))


CRASHING = """#!/bin/sh
case "$*" in
  *-O1*) exec {cxx} "$@" ;;
  *) echo "kernels.cpp:7:1: internal compiler error: in a loop pass" >&2; exit 1 ;;
esac
"""


def test_a_compiler_that_crashes_is_tried_with_less_optimization(tmp_path, capsys):
    target = host_target()
    wrapper = tmp_path / "crashing"
    wrapper.write_text(CRASHING.format(cxx=target.cxx))
    wrapper.chmod(0o700)
    body = PRELUDE + 'extern "C" __attribute__((visibility("default"))) int nine() { return 9; }\n'
    library = build_library(body, dataclasses.replace(target, cxx=str(wrapper)), tmp_path)
    assert "crashed and is tried with -O1: kernels.cpp:7:1: internal compiler error" in capsys.readouterr().err
    assert ctypes.CDLL(str(library)).nine() == 9


def test_library_is_built_once_and_the_folder_is_private(tmp_path):
    folder = tmp_path / "kernels"
    body = PRELUDE + 'extern "C" int seven() { return 7; }\n'
    first = build_library(body, host_target(), folder)
    stamp = first.stat().st_mtime_ns
    assert build_library(body, host_target(), folder) == first
    assert first.stat().st_mtime_ns == stamp
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert build_library(body + "\n", host_target(), folder) != first


def test_a_damaged_library_is_said_and_made_again(tmp_path, capsys):
    body = PRELUDE + 'extern "C" __attribute__((visibility("default"))) int eight() { return 8; }\n'
    library = build_library(body, host_target(), tmp_path)
    library.write_bytes(library.read_bytes()[:5000])
    assert build_library(body, host_target(), tmp_path) == library
    assert capsys.readouterr().err == f"effc: {library} is damaged and will be made again\n"
    assert ctypes.CDLL(str(library)).eight() == 8


def test_cache_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(CacheError, match="EFFC_CACHE_DIR") as error:
        build_library(PRELUDE, host_target(), blocker / "kernels")
    one_line(error.value)


def test_two_processes_at_once_both_succeed(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from effc.codegen.cpu import PRELUDE, build_library, host_target\n"
        "print(build_library(PRELUDE + 'extern \"C\" int f() { return 1; }', host_target(), Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(2)]
    answers = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(answers) == 1
    assert len(list(tmp_path.glob("*.so"))) == 1


INTERPRETED = """
import torch
from effc.codegen.cpu import kernel_from_source
kernel = kernel_from_source({source!r}, "double_kernel")
x, out = torch.arange(100.0), torch.zeros(100)
kernel[(2,)](x, out, 100, BLOCK=64)
assert torch.equal(out, x * 2)
"""


def test_kernel_from_source_runs_under_tritons_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET="1")
    command = [sys.executable, "-c", INTERPRETED.format(source=SOURCE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
