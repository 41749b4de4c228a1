"""Calibration of whole graphs: text, statistics layer by layer, methods, what they cost, and who gets which bits."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from effc import passes
from effc.compiler.errors import InputError, ModelError
from effc.compiler.formats import find
from effc.compiler.graph import Graph
from effc.compiler.interpret import run
from effc.compiler.sources import ModuleSource
from effc.compiler.trace import trace
from effc.passes.calibrate import (
    METHODS,
    Reference,
    calibrate,
    everywhere,
    find_sites,
    inputs_of,
    text_parts,
    token_rows,
)
from effc.passes.calibrate.layers import Walk
from effc.passes.calibrate.parameters import Parameters, parameters
from effc.passes.calibrate.report import report
from effc.passes.calibrate.sensitivity import choose_formats, sensitivities
from effc.passes.calibrate.text import without_repeats
from effc.receipt import kl
from torch import Tensor, nn

from .families import VOCABULARY, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 12


@cache
def llama() -> tuple[nn.Module, Graph]:
    """Two layers and a tied head; copy the graph before changing it."""
    model = tiny_model("Llama", tie_word_embeddings=True)
    return model, passes.run(trace(model), verify=False)[0]


@cache
def untied() -> nn.Module:
    """One layer."""
    return tiny_model("Llama", num_hidden_layers=1)


def texts(rows: int = 6, length: int = 24, seed: int = SEED) -> list[dict[str, Tensor]]:
    """Random token ids, among them often the same few."""
    print(f"text seed {seed}")
    draws = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))
    return inputs_of(llama()[1], (draws.pow(3) * VOCABULARY).long())


# --- text ------------------------------------------------------------------------------------------------------


def test_calibration_and_held_out_text_share_no_paragraph():
    parts = text_parts()
    paragraphs = [
        {" ".join(paragraph.split()) for text in documents for paragraph in text.split("\n\n")}
        for documents in (parts.calibration, parts.held_out)
    ]
    assert not paragraphs[0] & paragraphs[1]
    assert sum(map(len, parts.calibration)) > 200_000
    assert sum(map(len, parts.held_out)) > 40_000
    assert "Python Software Foundation" in parts.source
    assert parts == text_parts()


def test_paragraphs_are_kept_where_they_occur_first():
    assert without_repeats(["a b\n\nc", "c\n\n  \n\na\n  b\n\nd", "c"]) == ["a b\n\nc", "d"]


def test_rows_of_tokens_lie_evenly_and_do_not_overlap():
    rows = token_rows(["abcdefgh", "ijklmnopq"], lambda text: list(map(ord, text)), 3, 4)
    assert ["".join(map(chr, row)) for row in rows.tolist()] == ["abcd", "efgh", "ijkl"]
    rows = token_rows(["abcdefghijklmnopq"], lambda text: list(map(ord, text)), 2, 4)
    assert ["".join(map(chr, row)) for row in rows.tolist()] == ["abcd", "ijkl"]


def test_too_little_text_is_refused():
    with pytest.raises(InputError, match="expected text of 12 tokens, found 3"):
        token_rows(["abc"], lambda text: list(map(ord, text)), 3, 4)
    with pytest.raises(InputError, match="at least one row"):
        token_rows(["abc"], lambda text: list(map(ord, text)), 0, 4)


# --- layer by layer --------------------------------------------------------------------------------------------


def test_a_walk_computes_what_the_graph_computes_and_forgets_what_is_past():
    model, graph = llama()
    walk = Walk(graph, ModuleSource(model), texts())
    alive = []
    for site in find_sites(graph)[0]:
        assert len(list(walk.values(site.x))) == 6
        alive.append(max(map(len, walk.environments)))
    expected = [run(graph, text, ModuleSource(model))[0] for text in texts()]
    for _ in range(2):  # the walk stays where it is
        for logits, truth in zip(walk.outputs(), expected, strict=True):
            assert torch.equal(logits, truth)
    assert max(alive) <= 16  # of a hundred nodes
    assert site.x.name in {node.name for node in walk.environments[0]}


def test_a_site_with_a_weight_that_is_read_elsewhere_is_told():
    sites, misses = find_sites(llama()[1])
    assert [site.shared for site in sites] == [False] * 8 + [True]
    assert misses == []


# --- methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_parts_and_a_graph_that_is_as_good(method):
    model, graph = llama()
    source, told = ModuleSource(model), []
    found = calibrate(
        graph, source, texts(), everywhere(find("int4_g32")), method, lambda *progress: told.append(progress)
    )
    sites = find_sites(found.graph)[0]
    assert set(found.assignments) == {site.name for site in sites if not site.shared}
    for site in sites:
        if site.name in found.assignments:
            shapes = [(tuple(part.shape), part.dtype) for part in found.assignments[site.name].parts]
            assert shapes == list(find("int4_g32").part_shapes(site.rows, site.columns).values())
    assert told[-1][0] == told[-1][1]
    reference = Reference(graph, source, texts(seed=13))
    quality = reference.measure(found.graph, source, found.assignments)
    assert 0 < quality.kl < 0.5
    assert reference.measure(found.graph, source).kl < 1e-6  # what is folded in changes nothing
    assert graph.weights == llama()[1].weights


def test_looking_at_inputs_lessens_the_error_of_every_site():
    model, graph = llama()
    found = {
        method: calibrate(graph, ModuleSource(model), texts(rows=16), everywhere(find("int3_g32")), method)
        for method in ("clip", "gptq")
    }
    assert found["clip"].errors.keys() == found["gptq"].errors.keys()
    better = [found["gptq"].errors[name] < error for name, error in found["clip"].errors.items()]
    assert all(better)


def test_a_tied_matrix_is_rounded_when_it_is_asked_for():
    model, graph = llama()
    found = calibrate(graph, ModuleSource(model), texts(), lambda site: find("int8"), "gptq")
    assert set(found.assignments) == {site.name for site in find_sites(graph)[0]}
    assert "model_embed_tokens_weight" not in found.errors


def test_an_unknown_method_is_refused():
    model, graph = llama()
    with pytest.raises(InputError, match="unknown method 'gtpq'; expected one of rtn, clip"):
        calibrate(graph, ModuleSource(model), texts(), everywhere(find("int8")), "gtpq")


# --- quality, sensitivity, report ------------------------------------------------------------------------------


def test_quality_is_perplexity_divergence_and_agreement():
    model, graph = llama()
    source, held_out = ModuleSource(model), texts(rows=3)
    found = calibrate(graph, source, texts(), everywhere(find("int2_g32")), "rtn")
    quality = Reference(graph, source, held_out).measure(found.graph, source, found.assignments)
    losses, divergences, equal = [], [], []
    for text in held_out:
        expected = run(graph, text, source)[0][0, :-1]
        logits = next(Walk(graph, source, [text], found.assignments).outputs())[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, text["input_ids"][0, 1:], reduction="none"))
        divergences.append(kl(expected, logits))
        equal.append(logits.argmax(-1) == expected.argmax(-1))
    assert quality.tokens == 3 * 23
    assert quality.perplexity == pytest.approx(math.exp(torch.cat(losses).mean().item()), rel=1e-5)
    assert quality.kl == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert quality.agreement == torch.cat(equal).double().mean().item()
    itself = Reference(graph, source, held_out).quality()
    assert (itself.kl, itself.agreement) == (0.0, 1.0)


def test_sensitivity_is_what_one_rounded_matrix_costs():
    model, graph = llama()
    source = ModuleSource(model)
    formats = [find("int2_g32"), find("int4_g32"), find("int8")]
    found = sensitivities(graph, source, texts(rows=2), formats)
    assert len(found) == len(find_sites(graph)[0])
    for entry in found:
        assert entry.kl > 0
        errors = [entry.errors[format.name] for format in formats]
        assert errors == sorted(errors, reverse=True)
        assert entry.estimate("int2_g32") == pytest.approx(entry.kl)
    choice = choose_formats(found, formats, 5.0)
    sites = [entry.site for entry in found]
    bits = sum(choice(site).bits(site.rows, site.columns) * site.numel for site in sites)
    assert bits <= 5.0 * sum(site.numel for site in sites)
    assert len({choice(site).name for site in sites}) > 1
    slow = {sites[0].name: {"int4_g32": 9.0}}
    by_time = choose_formats(
        found, formats, 9.0, lambda site, format: slow.get(site.name, {}).get(format.name, 1), "ms"
    )
    assert by_time(sites[0]).name == "int8"
    with pytest.raises(InputError, match=r"expected a budget of at least 2\.528 bits per weight, found 2"):
        choose_formats(found, formats, 2.0)


def test_the_report_has_a_row_for_each_matrix_and_a_total():
    model, graph = llama()
    source = ModuleSource(model)
    found = calibrate(graph, source, texts(), everywhere(find("int4_g32")), "clip")
    reference = Reference(graph, source, texts(rows=2, seed=13))
    after = reference.measure(found.graph, source, found.assignments)
    first = find_sites(graph)[0][0]
    made = report(found, "clip", reference.quality(), after, {first.name: 0.5}, {first.name: {1: 12.0, 8: 30.0}})
    lines = made.markdown().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 9 + 1
    assert f"| {first.name} | {first.rows} x {first.columns} | int4_g32 | 4.50 |" in lines[2]
    assert lines[2].endswith("| 5.00e-01 | 12.0 | 30.0 |")
    assert "float32 | 32.00 |" in lines[10]
    kept = [part for assignment in found.assignments.values() for part in assignment.parts]
    assert made.nbytes == 4 * VOCABULARY * 32 + sum(part.nbytes for part in kept)
    assert "perplexity" in made.summary
    assert made.to_dict()["quality"]["after"]["kl"] == after.kl


# --- back to parameters ----------------------------------------------------------------------------------------


def with_parameters(model: nn.Module, found: Parameters) -> nn.Module:
    changed = copy.deepcopy(model)
    state = changed.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in found.values.items():
            state[name].copy_(value)
        for name, matrix in found.matrices.items():
            values = matrix.values(torch.float32)
            state[name].copy_(values.t() if name in found.transposed else values)
    return changed


@pytest.mark.parametrize("method", ["gptq", "awq", "rotate+gptq"])
def test_the_calibrated_model_is_one_of_parameters(method):
    model = untied()
    graph, source = passes.run(trace(model), verify=False)[0], ModuleSource(model)
    calibrated = calibrate(graph, source, texts(), everywhere(find("int4_g32")), method)
    found = parameters(graph, calibrated, source)
    assert len(found.matrices) == 7 + 1
    assert (len(found.values) > 0) == (method != "gptq")
    eager = with_parameters(model, found)
    for text in texts(rows=2):
        (logits,) = Walk(calibrated.graph, source, [text], calibrated.assignments).outputs()
        torch.testing.assert_close(eager(**text, use_cache=False).logits, logits, rtol=1e-3, atol=1e-4)


def test_a_parameter_that_became_two_is_told():
    model, graph = llama()
    calibrated = calibrate(graph, ModuleSource(model), texts(), everywhere(find("int4_g32")), "rotate")
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight became two weights"):
        parameters(graph, calibrated, ModuleSource(model))
