"""What users get wrong, and what they see: one clear line, nothing half-written, and a next run that works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import effc
import pytest
import torch
from effc import cli

from .families import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def program() -> effc.Program:
    return effc.compile(tiny_model("Llama"))


# --- token ids and masks -----------------------------------------------------------------------------------------


def test_ids_of_another_integer_type_give_the_same_logits(program: effc.Program, generator: torch.Generator) -> None:
    ids = torch.randint(0, 97, (2, 7), generator=generator)
    assert torch.equal(program(ids.int()), program(ids))


@pytest.mark.parametrize("hidden", [0.0, False])
def test_masks_of_any_type_hide_where_they_are_zero(program: effc.Program, hidden: float) -> None:
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    other = mask.bool() if hidden is False else mask * 0.5
    assert torch.equal(program(ids, other), program(ids, mask))


def test_a_padded_row_equals_the_row_alone(generator: torch.Generator) -> None:
    """Also where positions are learned and not relative."""
    program = effc.compile(tiny_model("GPT2"))
    ids = torch.randint(3, 97, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    torch.testing.assert_close(program(ids, mask)[:1, 4:], program(ids[:1, 4:]), rtol=1e-4, atol=1e-4)


def test_a_buffer_of_the_wrong_type_never_reaches_a_kernel(program: effc.Program) -> None:
    ids = torch.ones(1, 3, dtype=torch.int32)
    with pytest.raises(effc.InputError, match=r"input_ids must be torch\.int64, found torch\.int32"):
        program.run("forward", {"input_ids": ids, "position_ids": ids.long()}, {}, False)


# --- torch.compile -----------------------------------------------------------------------------------------------


def test_a_graph_that_is_refused_runs_eagerly_and_is_listed() -> None:
    @torch.compile(backend="effc", fullgraph=True)
    def table() -> torch.Tensor:
        return torch.arange(4) * 2

    with pytest.warns(UserWarning, match="runs in eager PyTorch: .*it has no tensors among its inputs"):
        assert table().tolist() == [0, 2, 4, 6]
    assert "runs in eager PyTorch" in str(effc.explain())


def test_an_input_with_strides_of_its_own_is_read_right(generator: torch.Generator) -> None:
    """A slice of a growing cache, as sliding windows make it: its strides follow from none of its sizes."""

    def tail(cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([cache, new], dim=2) * 2 + 1

    compiled = torch.compile(tail, backend="effc", fullgraph=True)
    for capacity in (5, 6, 9, 12):
        cache = torch.randn(2, 3, capacity, 8, generator=generator)[:, :, -3:]
        new = torch.randn(2, 3, 1, 8, generator=generator)
        assert torch.equal(compiled(cache, new), tail(cache, new))


@pytest.mark.parametrize("wrapped", [False, True])
def test_any_module_in_training_mode_is_refused(wrapped: bool) -> None:
    module = torch.nn.Linear(2, 2).train()
    module = torch.nn.Sequential(module).train() if wrapped else module
    with pytest.raises(Exception, match=r"found a model in training mode: call model\.eval\(\) first"):
        torch.compile(module, backend="effc")(torch.ones(1, 2))


# --- compilers and cache folders ---------------------------------------------------------------------------------

FAKE_COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "fake c++ 1.0"; exit 0;; esac
while [ "$1" != -o ]; do shift; done
%s
"""

FAULTS = {
    "exit 1": "refused generated code: exit status 1",
    "echo 'kernels.cpp:1:1: fatal error: no' >&2; exit 1": "fatal error: no",
    "kill -9 $$": "was killed by signal 9: is there enough memory? try again",
    "exit 0": "succeeded and wrote no library: set EFFC_CXX",
    "echo junk > $2": "cannot load what the C++ compiler made",
    "echo 'ld: final link failed: No space left on device' >&2; exit 1": "the disk is full: make room",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny model."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("Llama").save_pretrained(path)
    return path


def compiler_that(does: str, path: Path) -> str:
    path.write_text(FAKE_COMPILER % does)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def one_line_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What a failing command prints: one line."""
    assert cli.run(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("effc: ")
    assert printed.err.count("\n") == 1
    assert "internal error" not in printed.err
    return printed.err.strip()


@pytest.mark.parametrize("does", FAULTS)
def test_a_compiler_that_fails_is_one_line_and_leaves_nothing(
    does: str, folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("EFFC_CXX", compiler_that(does, tmp_path / "c++"))
    assert FAULTS[does] in one_line_of(capsys, "profile", str(folder), "--tokens", "4")
    assert not list(cache.rglob(".*"))
    if does != "echo junk > $2":
        assert not list(cache.rglob("*.so"))


def test_the_run_after_a_failing_compiler_is_fine(folder: Path, cache: Path, tmp_path: Path, monkeypatch) -> None:
    ids = torch.arange(5)[None]
    monkeypatch.setenv("EFFC_CXX", compiler_that("exit 1", tmp_path / "c++"))
    with pytest.raises(effc.ToolchainError):
        effc.compile(folder)(ids)
    monkeypatch.delenv("EFFC_CXX")
    assert effc.compile(folder)(ids).shape == (1, 5, 97)


@pytest.mark.parametrize("variables", [{"PATH": "/nowhere"}, {"EFFC_CXX": "/nowhere/c++"}, {"EFFC_CXX": "false"}])
def test_no_compiler_is_one_line(variables: dict, folder: Path, cache: Path, monkeypatch, capsys) -> None:
    for name in ("EFFC_CXX", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = one_line_of(capsys, "explain", str(folder))
    assert "C++ compiler" in line
    assert "set EFFC_CXX to" in line


def test_a_cache_folder_under_a_file_is_one_line(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert "choose a folder that you can write to" in one_line_of(capsys, "explain", str(folder))


LOGITS = """
import sys, effc, torch
torch.set_num_threads(1)
print(effc.compile(sys.argv[1])(torch.arange(5)[None]).sum().item())
"""


def test_two_processes_that_compile_one_model_at_once_agree(folder: Path, cache: Path) -> None:
    command = [sys.executable, "-c", LOGITS, str(folder)]
    started = [
        subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert said[0] == said[1]
    assert not list(cache.rglob(".*"))
