"""effc.compile: models in memory, what the cache keeps, and what a Program tells about itself."""

from __future__ import annotations

import copy
from pathlib import Path

import effc
import pytest
import torch
from effc.program import read_record, write_record
from torch import nn
from torch._subclasses import FakeTensorMode

from .families import tiny_model
from .tolerance import assert_close_to_reference


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def program(model: nn.Module) -> effc.Program:
    return effc.compile(model)


def test_logits_of_a_model_in_memory(program: effc.Program, model: nn.Module, generator: torch.Generator) -> None:
    exact = copy.deepcopy(model).double()
    eager_error = 0.0
    for shape in ((8, 64), (3, 33), (1, 1), (2, 17)):  # the largest first: it tells how far eager is off
        ids = torch.randint(0, program.config.vocab_size, shape, generator=generator)
        with torch.no_grad():
            results = program(ids), model(ids).logits, exact(ids).logits
        eager_error = assert_close_to_reference(*results, label=str(shape), eager_error=eager_error)


def test_generate_continues_as_transformers_does(
    program: effc.Program, model: nn.Module, generator: torch.Generator
) -> None:
    ids = torch.randint(3, program.config.vocab_size, (2, 9), generator=generator)
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert program.generate(ids, max_new_tokens=10, ignore_eos=True).tolist() == expected.tolist()


def test_a_program_prints_its_graphs_and_keeps_them(program: effc.Program) -> None:
    text = str(program)
    assert all(kind in text for kind in ("forward", "prefill", "extend", "decode", "fuse_attention"))
    assert program.graphs["decode"].dialect == "stateful"
    assert any("@triton.jit" in source for source in program.kernels.values())
    explained = str(program.explain())
    assert "decode_attention" in explained
    assert "through ATen" not in explained


def test_a_pass_left_out_is_left_out(model: nn.Module) -> None:
    program = effc.compile(model, skip="fuse_mlp")
    assert "fuse_mlp" not in {step.name for step in program.stages.steps("forward", True)}
    ids = torch.arange(6)[None]
    torch.testing.assert_close(program(ids), effc.compile(model)(ids), rtol=1e-5, atol=1e-6)


def test_a_model_elsewhere_is_refused() -> None:
    module = nn.Linear(2, 2).eval()
    with FakeTensorMode():
        module.weight = nn.Parameter(torch.empty(2, 2, device="cuda"), requires_grad=False)
    with pytest.raises(effc.InputError, match="found parameters on cuda:0: move the model"):
        effc.compile(module)


def test_what_is_no_model_or_cannot_be_copied_is_one_line(program: effc.Program) -> None:
    with pytest.raises(effc.InputError, match="expected the name or path of a model, or a model, found NoneType"):
        effc.compile(None)
    with pytest.raises(TypeError, match="cannot be copied or pickled: compile again"):
        copy.deepcopy(program)


def test_a_damaged_record_is_said_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "folder" / "record.pickle"
    assert read_record(path) is None
    write_record(path, {"a": 1})
    assert read_record(path) == {"a": 1}
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert read_record(path) is None
    assert "is damaged and will be made again" in capsys.readouterr().err


def test_the_key_tells_models_options_and_compilers_apart(smollm2_path: Path, monkeypatch) -> None:
    first = effc.compile(smollm2_path)
    assert first.key == effc.compile(smollm2_path).key
    monkeypatch.setenv("EFFC_ISA", "generic")
    others = [
        effc.compile(smollm2_path).key,
        effc.compile(smollm2_path, torch.bfloat16).key,
        effc.compile(smollm2_path, skip=["fuse_mlp"]).key,
    ]
    monkeypatch.setattr("effc.program.version", lambda package: f"another {package}")
    others.append(effc.compile(smollm2_path).key)
    assert len({first.key, *others}) == 5
