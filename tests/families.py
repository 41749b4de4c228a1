"""Tiny random models of every family that is tested, and what tests feed them and expect.

A family is a name, the configuration that makes a model of it tiny, and where its model comes from: transformers, or
a module of the test tree. Two layers, a hidden size of 32, ratios of heads, biases and tied heads as the family has
them, sliding windows and original rope lengths shorter than the texts of the tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from effc.compiler.graph import Graph
from effc.compiler.interpret import run
from effc.compiler.sources import ModuleSource
from effc.compiler.trace import trace
from effc.passes import pipeline
from torch import Tensor, nn

from .baichuan import Baichuan7B, Baichuan13B

VOCABULARY = 97
WINDOW = 6
LENGTHS = 128
"""How many positions the models have."""

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTHS,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTHS}
FALCON = {"max_position_embeddings": LENGTHS, "ffn_hidden_size": 48}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """One architecture.

    prefix: what its classes in transformers are called. options: beside those of `SMALL`. module: what makes a model
    that transformers does not have.
    """

    prefix: str
    options: Mapping[str, Any] = field(default_factory=dict)
    module: Callable[..., nn.Module] | None = None

    def make(self, **changes: Any) -> nn.Module:
        options = {**SMALL, **self.options, **changes}
        if self.module is not None:
            return self.module(**options)
        head = "ForCausalLM" if hasattr(transformers, f"{self.prefix}ForCausalLM") else "LMHeadModel"
        config = getattr(transformers, CONFIGS.get(self.prefix, f"{self.prefix}Config"))
        return getattr(transformers, f"{self.prefix}{head}")(config(**options))


CONFIGS = {"Gemma3": "Gemma3TextConfig"}
"""Where the config is not called after the model."""


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **parameters}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ORIGINAL = {"original_max_position_embeddings": 32}
LONGROPE = {
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
    **ORIGINAL,
}

FAMILIES = {
    # the survey's
    "OpenAIGPT": Family("OpenAIGPT", GPT),
    "GPT2": Family("GPT2", GPT),
    "OPT": Family("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "OPT-350m": Family("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "Llama": Family("Llama"),
    "Llama-linear": Family("Llama", rope("linear")),
    "Llama-llama3": Family("Llama", rope("llama3", **LLAMA3)),
    "Llama-yarn": Family("Llama", rope("yarn", original_max_position_embeddings=32)),
    "Llama-dynamic": Family("Llama", {**rope("dynamic"), "max_position_embeddings": 64}),
    "Baichuan-7B": Family("Baichuan", module=Baichuan7B),
    "Baichuan-13B": Family("Baichuan", module=Baichuan13B),
    "Bloom": Family("Bloom", {"n_layer": 2, "n_head": 4}),
    "Falcon": Family("Falcon", {**FALCON, "multi_query": True}),
    "Falcon-alibi": Family(
        "Falcon", {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    ),
    "Falcon-new": Family("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Glm": Family("Glm", {"head_dim": 8, "attention_bias": True}),
    "Glm4": Family("Glm4", {"head_dim": 8, "attention_bias": True}),
    "Mistral": Family("Mistral", {"sliding_window": WINDOW, "num_key_value_heads": 1}),
    # beyond it
    "Qwen2": Family("Qwen2", {"tie_word_embeddings": True}),
    "Qwen3": Family("Qwen3", {"head_dim": 16}),
    "Gemma": Family("Gemma", {"head_dim": 8, "num_key_value_heads": 1}),
    "Gemma2": Family(
        "Gemma2",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    ),
    "Gemma3": Family(
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "GPTNeo": Family(
        "GPTNeo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    "GPTNeoX": Family("GPTNeoX", {"rotary_pct": 0.25, "num_attention_heads": 2}),
    "GPTJ": Family("GPTJ", {**GPT, "rotary_dim": 4, "tie_word_embeddings": False}),
    "Phi": Family("Phi", {"num_key_value_heads": 4}),
    "Phi3": Family("Phi3", {"sliding_window": WINDOW}),
    "Phi3-longrope": Family("Phi3", {**rope("longrope", **LONGROPE), "sliding_window": None, **ORIGINAL}),
    "StableLm": Family("StableLm"),
    "Starcoder2": Family("Starcoder2", {"sliding_window": WINDOW}),
    "Olmo2": Family("Olmo2"),
    "Cohere": Family("Cohere", {"layer_norm_eps": 1e-5}),
    "Granite": Family(
        "Granite",
        {
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
    ),
    "Mixtral": Family("Mixtral", EXPERTS),
    "GptOss": Family("GptOss", {**EXPERTS, "head_dim": 8, "sliding_window": WINDOW}),
    "Mamba": Family("Mamba", {"state_size": 4}),
    "Rwkv": Family("Rwkv", {"attention_hidden_size": 32, "context_length": LENGTHS}),
}

ATTENTION = tuple(name for name in FAMILIES if name not in ("Mamba", "Rwkv"))
"""The families whose only mixing of tokens is attention: those that can have a KV cache."""

SIZES = ((1, 1), (2, 2), (3, 20))
"""Batch and length, with ones and with a length beyond the traced example."""


def tiny_model(family: str = "Llama", seed: int = 0, **changes: object) -> nn.Module:
    """A random causal language model in eval mode, with weights large enough for logits to differ.

    Scales, biases, sinks and other vectors, which are born as ones and zeros, are moved off them, so that one that is
    lost or taken for another shows.
    """
    torch.manual_seed(seed)
    model = FAMILIES[family].make(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


UNVERIFIED = {"Baichuan-13B": "tokens of padding see no key: eager gives them the mean of all values, effc zeros"}
"""Families for which EFFC_VERIFY finds a difference in what nothing reads."""


def verify_unless_told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a fixture of tests over a family: EFFC_VERIFY is off for those in UNVERIFIED."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("family") in UNVERIFIED:
        monkeypatch.setenv("EFFC_VERIFY", "0")


@cache
def traced(family: str = "Llama") -> tuple[nn.Module, Graph]:
    """A tiny model and its trace, made once; copy the graph before changing it."""
    model = tiny_model(family)
    return model, trace(model)


def without_padding(graph: Graph) -> Graph:
    """The form of a fused graph for calls without padding, as the compiler makes it."""
    return pipeline.run(graph, pipeline.UNPADDED, verify=False)[0]


def example_inputs(batch: int, length: int, seed: int = 0, vocab_size: int = VOCABULARY) -> dict[str, Tensor]:
    """Random tokens; the first row is padded on the left by a third of its length."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (batch, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, : length // 3] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def eager_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model itself computes, without a cache. Inputs that it has no name for are left out."""
    accepted = inspect.signature(model.forward).parameters
    given = {name: value for name, value in inputs.items() if name in accepted}
    options = {"use_cache": False} if "use_cache" in accepted else {}
    with torch.no_grad():
        output = model(**given, **options)
    return output if isinstance(output, Tensor) else output.logits


def worst_error(graph: Graph, model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """The largest difference between the graph's logits and eager's, where eager attends to something."""
    expected = eager_logits(model, inputs)
    (found,) = run(graph, {name: inputs[name] for name in graph.inputs}, ModuleSource(model))
    assert found.shape == expected.shape
    visible = inputs["attention_mask"].bool()
    return (found - expected)[visible].abs().max().item()
