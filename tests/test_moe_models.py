"""Whole models with mixtures of experts: every route, equal to eager, nothing through ATen."""

from __future__ import annotations

import effc
import pytest
import torch
from effc.backend import COMPILED
from effc.compiler.graph import Graph
from effc.compiler.interpret import run
from effc.compiler.sources import ModuleSource
from effc.compiler.trace import trace
from effc.passes import pipeline
from torch import Tensor, nn

from .families import FAMILIES, Family, example_inputs, tiny_model

moe = torch.ops.effc.moe.default
LEFT = {"sort", "topk", "histc", "cumsum", "index_put", "_grouped_mm", "grouped_mm_fallback", "bmm", "top_k", "gather"}

SMALL = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 0}
"""One expert more than any of a few tokens needs to have several without a token."""

OTHERS = {
    "Qwen2Moe": Family("Qwen2Moe", {**SMALL, "shared_expert_intermediate_size": 40}),
    "Qwen3Moe": Family("Qwen3Moe", {**SMALL, "head_dim": 8, "norm_topk_prob": True}),
    "Olmoe": Family("Olmoe", SMALL),
    "GraniteMoe": Family("GraniteMoe", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "Glm4Moe": Family("Glm4Moe", {**ROUTED, "head_dim": 8, "n_group": 2, "topk_group": 1}),
}
"""Beside those of `families`: a shared expert, a softmax before or after the choice, sigmoids and groups of experts."""

FAMILIES_OF_EXPERTS = {name: FAMILIES.get(name) or OTHERS[name] for name in ("Mixtral", "GptOss", *OTHERS)}


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    if name in FAMILIES:
        return tiny_model(name, num_hidden_layers=1).to(dtype)
    torch.manual_seed(0)
    return OTHERS[name].make(num_hidden_layers=1).to(dtype).eval().requires_grad_(False)


def tokens(batch: int, length: int) -> Tensor:
    return example_inputs(batch, length)["input_ids"]


def assert_fused(graph: Graph) -> None:
    assert graph.count(moe) == 1
    left = {node.name for node in graph.nodes if node.op == "call_function" and node.name.rstrip("_0123456789") in LEFT}
    assert not left


def fused_text(graph: Graph) -> str:
    """All that the mixture says, but for the names of what it reads."""
    (node,) = (node for node in graph.nodes if node.target is moe)
    weights = [str(graph.weights[x.name]) for x in node.all_input_nodes if x.name in graph.weights]
    return f"{[value for value in node.args if isinstance(value, str | int)]} {weights}"


def all_but_slow(quick: str) -> list:
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES_OF_EXPERTS]


@pytest.mark.parametrize("name", all_but_slow("GptOss"))
def test_traced_experts_are_one_op_that_changes_nothing(name):
    """In bf16, where the grouped product is ATen's; generation is in fp32, where it is transformers' own."""
    model = model_of(name, torch.bfloat16)
    before = trace(model)
    after, report = pipeline.run(before)
    assert_fused(after)
    assert not [miss for miss in report.misses if miss.rule in ("experts", "moe", "top_k")]
    inputs = {key: value for key, value in example_inputs(3, 20).items() if key in before.inputs}
    source, visible = ModuleSource(model), example_inputs(3, 20)["attention_mask"].bool()
    (truth,) = run(after, inputs, source, dtype=torch.float64)
    error, eager_error = ((run(graph, inputs, source)[0] - truth)[visible].abs().max() for graph in (after, before))
    assert error <= 2 * eager_error + torch.finfo(torch.bfloat16).eps * truth.abs().max()


@pytest.mark.parametrize("name", all_but_slow("Mixtral"))
def test_generation_is_that_of_eager_without_aten(name):
    model = model_of(name)
    program = effc.compile(model)
    for kind in ("prefill", "decode"):
        assert not program.built(kind).summary.fallbacks, kind
    ids = tokens(2, 9)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2
    )
    assert torch.equal(program.generate(ids, max_new_tokens=8), expected)
    for batch, length in ((1, 1), (3, 20)):
        ids = tokens(batch, length)
        torch.testing.assert_close(program(ids), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_torch_compile_reads_the_experts_where_they_are(name):
    """Only the biases of gpt-oss, whose gate and up lie in turns, are copied, and that is said."""
    model = model_of(name)
    expected = {length: model(tokens(2, length), use_cache=False).logits for length in (7, 12)}
    compiled = torch.compile(model, backend="effc")
    with torch.no_grad():
        for length, logits in expected.items():
            torch.testing.assert_close(
                compiled(tokens(2, length), use_cache=False).logits, logits, atol=1e-4, rtol=1e-4
            )
    notes = COMPILED[-1].explanation.notes
    assert [note.rsplit("_experts_parameters_")[-1] for note in notes] == ["gate_up_proj_bias_"] * (name == "GptOss")


@pytest.mark.parametrize("name", ["Mixtral", pytest.param("GptOss", marks=pytest.mark.slow)])
def test_the_weights_of_every_pair_become_the_same_op(name):
    model = model_of(name)
    sorting, _ = pipeline.run(trace(model))
    model.set_experts_implementation("batched_mm")
    batched, report = pipeline.run(trace(model))
    assert_fused(batched)
    assert not report.misses
    assert fused_text(batched) == fused_text(sorting)
