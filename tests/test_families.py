"""Every family: what the compiler finds in it, and both ways in beside eager.

What is found lies in families.json; `pytest tests/test_families.py --update-golden` writes it anew, and
`python bench/families.py` prints it as a table.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import effc
import pytest
import torch
from effc.anatomy import anatomy
from effc.backend import COMPILED
from effc.compiler.errors import ModelError
from torch import Tensor, nn

from .families import ATTENTION, FAMILIES, eager_logits, example_inputs, tiny_model, verify_unless_told
from .tolerance import assert_close_to_reference

GOLDEN = Path(__file__).with_name("families.json")
QUICK = ("Llama", "Gemma2")
GENERATE = ("Llama", "GPT2", "Mistral", "Gemma2", "GPTNeoX", "Falcon", "Phi3", "Qwen2")
"""Families whose `generate` is run through torch.compile too."""

PROMPT, NEW = 9, 8
"""Past any window that a family has."""


def each(names: tuple[str, ...], quick: tuple[str, ...] = ()) -> list:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def fresh_dynamo(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    verify_unless_told(request, monkeypatch)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", each(tuple(FAMILIES), QUICK))
def test_what_is_found_in_a_family_is_what_the_table_says(family: str, request: pytest.FixtureRequest) -> None:
    program = effc.compile(tiny_model(family))
    found = anatomy(program).to_dict()
    table = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--update-golden"):
        table[family] = found
        rows = [f"{json.dumps(name)}: {json.dumps(table[name])}" for name in FAMILIES if name in table]
        GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        return
    differences = {key: (table[family][key], value) for key, value in found.items() if table[family][key] != value}
    misses = [str(miss) for report in program.stages.reports.values() for miss in report.misses]
    told = [f"{key}: expected {before}, found {after}" for key, (before, after) in differences.items()]
    assert not told, "\n".join([f"{family} has changed:", *told, "near-misses:", *dict.fromkeys(misses)])


def test_every_family_with_attention_decodes_in_kernels_and_the_others_are_refused_by_name() -> None:
    table = json.loads(GOLDEN.read_text())
    assert list(table) == list(FAMILIES)
    for family, row in table.items():
        if family in ATTENTION:
            assert row["refusal"] is None, family
            assert row["through_aten"]["decode"] == [], family
            assert not row["left"], family
            assert sum(row["attention"].values()) == 2, family
            assert row["bytes_per_token"] > 0, family
        else:
            assert "tokens are mixed by" in row["refusal"], family
            assert "modeling_" in row["refusal"], family


# --- effc.compile ----------------------------------------------------------------------------------------------------


def double(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).double()
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # the grouped product takes no fp64
    return twin


def greedy(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """What eager writes without a cache."""
    for _ in range(count):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions(ids)}
        ids = torch.cat((ids, eager_logits(model, inputs)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(ids.shape[0], -1)


@pytest.mark.parametrize("family", each(ATTENTION, ("Gemma2",)))
def test_a_compiled_family_equals_eager(family: str) -> None:
    model = tiny_model(family)
    program, exact = effc.compile(model), double(model)
    eager_error = 0.0
    for batch, length in ((3, 20), (2, 2)):
        ids = example_inputs(batch, length, seed=length)["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions(ids)}
        results = (program(ids), eager_logits(model, inputs), eager_logits(exact, inputs))
        eager_error = assert_close_to_reference(*results, label=f"{batch} x {length}", eager_error=eager_error)
    ids = example_inputs(2, PROMPT, seed=5)["input_ids"]
    assert program.generate(ids, max_new_tokens=NEW, ignore_eos=True).tolist() == greedy(model, ids, NEW).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ATTENTION])
def test_what_is_no_attention_model_is_refused_with_the_op_and_its_line(family: str) -> None:
    with pytest.raises(
        ModelError, match=r"tokens are mixed by \w+ \(aten\.[\w.]+\) from modeling_\w+\.py:\d+: "
    ) as error:
        effc.compile(tiny_model(family)).generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "longest"), [("Llama-dynamic", 63), ("Phi3-longrope", 32)])
def test_a_text_longer_than_rope_scaling_is_exact_for_is_refused_in_one_line(family: str, longest: int) -> None:
    """Beyond it, frequencies depend on the length: the keys of a text that grows past it would have to change."""
    model = tiny_model(family, num_hidden_layers=1)
    program, exact = effc.compile(model), double(model)
    ids = example_inputs(2, longest, seed=3)["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions(ids)}
    results = (program(ids), eager_logits(model, inputs), eager_logits(exact, inputs))
    assert_close_to_reference(*results, label=f"{longest} tokens")
    notes = program.stages.graph("forward", True).notes
    assert any(f"at most {longest} tokens: longer ones take another branch at modeling_" in note for note in notes)
    for prompt, count in ((longest - 3, 20), (longest + 1, 1)):
        with pytest.raises(effc.InputError, match=str(longest)) as error:
            program.generate(torch.ones(1, prompt, dtype=torch.int64), max_new_tokens=count)
        assert "\n" not in str(error.value)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", each(ATTENTION, ("GPTNeoX",)))
def test_a_family_through_torch_compile_equals_eager(family: str) -> None:
    model = tiny_model(family)
    eager, exact = copy.deepcopy(model), double(model)
    before = len(COMPILED)
    model.forward = torch.compile(model.forward, backend="effc")
    eager_error = 0.0
    for batch, length in ((2, 20), (2, 7), (2, 11)):
        inputs = example_inputs(batch, length, seed=length)
        inputs["attention_mask"].fill_(1)
        del inputs["position_ids"]
        results = (eager_logits(module, inputs) for module in (model, eager, exact))
        eager_error = assert_close_to_reference(*results, label=f"{batch} x {length}", eager_error=eager_error)
    graphs = [graph.explanation for graph in COMPILED[before:]]
    assert graphs
    assert not any("runs in eager" in note for graph in graphs for note in graph.notes), graphs
    if family not in GENERATE:
        return
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = example_inputs(2, PROMPT, seed=5)["input_ids"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert model.generate(**given, **options).tolist() == eager.generate(**given, **options).tolist()
