"""Tiny random models of several families, and what tracing tests feed and expect."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from effc.compiler.graph import Graph
from effc.compiler.interpret import run
from effc.compiler.sources import ModuleSource
from effc.compiler.trace import trace
from torch import Tensor, nn

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Mistral": {},
    "Gemma": {"head_dim": 8},
    "Phi3": {},
    "GPT2": GPT,
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "GPTNeoX": {},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "Mamba": {},
}
"""Family -> what its config needs beside SMALL."""

SIZES = ((1, 1), (2, 2), (3, 20))
"""Batch and length, with ones and with a length beyond the traced example."""


def tiny_model(family: str = "Llama", seed: int = 0, **changes: object) -> nn.Module:
    """A random causal language model in eval mode, with weights large enough for logits to differ."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family], **changes})
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{family}{head}")(config).eval()


@cache
def traced(family: str = "Llama") -> tuple[nn.Module, Graph]:
    """A tiny model and its trace, made once; copy the graph before changing it."""
    model = tiny_model(family)
    return model, trace(model)


def example_inputs(batch: int, length: int, seed: int = 0, vocab_size: int = 97) -> dict[str, Tensor]:
    """Random tokens; the first row is padded on the left by a third of its length."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, : length // 3] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def worst_error(graph: Graph, model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """The largest difference between the graph's logits and eager's, where eager attends to something."""
    inputs = {name: value for name, value in inputs.items() if name in graph.inputs}
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
    (found,) = run(graph, inputs, ModuleSource(model))
    assert found.shape == expected.shape
    visible = inputs["attention_mask"].bool()
    return (found - expected)[visible].abs().max().item()
