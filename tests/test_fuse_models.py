"""The fusing passes in their order on small random models of several families: counts, numerics, what is left."""

from __future__ import annotations

import pytest
import torch
import transformers
from effc.compiler import interpret
from effc.compiler.sources import ModuleSource
from effc.compiler.verify import verify
from effc.passes.fuse_activation import fuse_activation
from effc.passes.fuse_linear import fuse_linear
from effc.passes.fuse_mlp import fuse_mlp
from effc.passes.fuse_norm import fuse_norm
from effc.passes.fuse_rope import fuse_rope

from .pass_checks import randomize, token_inputs, traced

aten, effc = torch.ops.aten, torch.ops.effc
PASSES = (fuse_norm, fuse_rope, fuse_activation, fuse_linear, fuse_mlp)
LAYERS = 2
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {effc.rms_norm.default: 2 * LAYERS + 1, effc.rope.default: 2 * LAYERS, effc.gated_linear.default: LAYERS}
LINEARS = {effc.linear.default: 3 * LAYERS + 1, aten.linear.default: 0, aten.silu.default: 0, aten.gelu.default: 0}
PLAIN = {effc.linear.default: 4 * LAYERS + 1, aten.linear.default: 0, aten.addmm.default: 0, aten.gelu.default: 0}
EXPECTED = {
    "Llama": GATED | LINEARS,
    "Mistral": GATED | LINEARS,
    "Qwen2": GATED | LINEARS,
    "Gemma": GATED | LINEARS,
    "Phi3": GATED | LINEARS,
    "Glm": GATED | LINEARS,
    "StableLm": LINEARS | {effc.rope.default: 2 * LAYERS, effc.gated_linear.default: LAYERS},
    "Qwen3": GATED | LINEARS | {effc.rms_norm.default: 4 * LAYERS + 1},
    "Olmo2": GATED | LINEARS | {effc.rms_norm.default: 4 * LAYERS + 1},
    "Gemma2": GATED | LINEARS | {effc.rms_norm.default: 4 * LAYERS + 1},
    "GPTNeoX": PLAIN | {effc.rope.default: 2 * LAYERS},
    "Phi": PLAIN | {effc.rope.default: 2 * LAYERS, aten.tanh.default: 0},
    "GPT2": PLAIN | {aten.tanh.default: 0},
    "Bloom": PLAIN | {aten.layer_norm.default: 2 * LAYERS + 2, aten.tanh.default: 0},
    "Falcon": PLAIN | {effc.rope.default: 2 * LAYERS, aten.index.Tensor: 1},  # of the padding
    "Cohere": LINEARS | {aten.layer_norm.default: LAYERS + 1, effc.rope.default: 2 * LAYERS, aten.mean.dim: 0},
    "Granite": GATED | LINEARS,
    "OPT": PLAIN | {aten.relu.default: 0},
}
QUICK = ("Llama", "Qwen2", "GPT2")
SLOW = pytest.mark.slow
CASES = [
    ("Llama", torch.float32),
    ("Gemma", torch.bfloat16),
    ("Qwen2", torch.float32),
    ("GPT2", torch.float32),
    *(pytest.param(*case, marks=SLOW) for case in [("Llama", torch.bfloat16), ("Gemma", torch.float32)]),
    *(
        pytest.param(family, torch.float32, marks=SLOW)
        for family in EXPECTED
        if family not in ("Llama", "Qwen2", "GPT2")
    ),
]


def tiny(family: str, dtype: torch.dtype) -> torch.nn.Module:
    options = dict(TINY)
    if family in ("Gemma", "Gemma2", "Qwen3", "Glm"):
        options["head_dim"] = 8
    if family == "OPT":
        options |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    config = getattr(transformers, f"{family}Config")(**options)
    return randomize(transformers.AutoModelForCausalLM.from_config(config).to(dtype))


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=str)
def test_the_passes_fuse_a_model_whole(family, dtype):
    model = tiny(family, dtype)
    graph = traced(model)
    inputs, source = token_inputs(graph, TINY["vocab_size"]), ModuleSource(model)
    (expected,) = interpret.run(graph, inputs, source)
    for function in PASSES:
        function(graph)
        verify(graph)
        (logits,) = interpret.run(graph, inputs, source)
        atol = 2e-6 * expected.abs().max().item() if dtype == torch.float32 else 0
        torch.testing.assert_close(logits, expected, atol=atol, rtol=0)
    assert {op: graph.count(op) for op in EXPECTED[family]} == EXPECTED[family]
    assert graph.dialect == "fused"
    assert [function(graph).matches for function in PASSES] == [0] * len(PASSES)


def test_rope_tables_are_computed_once_for_all_layers():
    graph = traced(tiny("Llama", torch.float32))
    fuse_rope(graph)
    tables = {node.args[1:3] for node in graph.nodes if node.target is effc.rope.default}
    assert len(tables) == 1
    assert graph.count(aten.cos.default) == graph.count(aten.sin.default) == 1
