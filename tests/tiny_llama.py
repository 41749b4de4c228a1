"""A Llama in plain PyTorch behind the interface of a compiled program: what the decoding tests drive."""

from dataclasses import dataclass, field

import torch
from effc.compiler import ops  # noqa: F401  (registers torch.ops.effc)
from effc.passes.stream_attention import Seen
from effc.runtime.kv_cache import Ring, State
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

effc_ops = torch.ops.effc


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random transformers Llama with grouped heads, in eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        | changes
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Facts:
    vocab_size: int
    max_position: int | None
    eos_token_ids: tuple[int, ...]
    cache_layout: list
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids")
    cache_refusal: str | None = None


@dataclass
class TinyProgram:
    """Runs forward, prefill, extend and decode of a `tiny_llama` with the references of effc's ops.

    seen: what a query sees, in a ring of slots with 3 to spare; None for everything.
    """

    model: LlamaForCausalLM
    seen: Seen | None = None
    config: Facts = field(init=False)
    calls: list = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.model.config
        shape = (config.num_key_value_heads, config.head_dim)
        ring = self.seen and Ring(self.seen.kept, self.seen.window, 3)
        layout = [
            State(f"{kind}_cache_{layer}", shape, torch.float32, ring)
            for layer in range(config.num_hidden_layers)
            for kind in ("k", "v")
        ]
        eos = config.eos_token_id
        eos = (eos,) if isinstance(eos, int) else tuple(eos or ())
        self.config = Facts(config.vocab_size, config.max_position_embeddings, eos, layout)

    @torch.no_grad()
    def run(self, kind: str, inputs: dict[str, Tensor], states: dict[str, Tensor], padded: bool) -> Tensor:
        assert padded == bool(inputs["padding"].any())
        assert kind != "decode" or inputs["input_ids"].shape[1] == 1
        self.calls.append((kind, tuple(inputs["input_ids"].shape)))
        body = self.model.model
        x = body.embed_tokens(inputs["input_ids"])
        cos, sin = body.rotary_emb(x, inputs["position_ids"])
        for index, layer in enumerate(body.layers):
            x = x + self.attention(index, layer, x, cos, sin, inputs, states)
            mlp = layer.mlp
            hidden = rms_norm(x, layer.post_attention_layernorm)
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
        if kind == "prefill":
            x = x[:, -1:]
        return self.model.lm_head(rms_norm(x, body.norm))

    def attention(self, index, layer, x, cos, sin, inputs, states) -> Tensor:
        batch, length, _ = x.shape
        projections, size = layer.self_attn, self.model.config.head_dim
        hidden = rms_norm(x, layer.input_layernorm)
        q, k, v = (
            linear(hidden).view(batch, length, -1, size).transpose(1, 2)
            for linear in (projections.q_proj, projections.k_proj, projections.v_proj)
        )
        q, k = (effc_ops.rope(part, cos, sin) for part in (q, k))
        past, ring = inputs["past"], self.seen and self.seen.kept
        k = effc_ops.kv_write(states[f"k_cache_{index}"], k, past, ring)
        v = effc_ops.kv_write(states[f"v_cache_{index}"], v, past, ring)
        seen = {"visible": "k >= t0[b]", "tables": [inputs["padding"]]}
        if self.seen is not None:
            seen = {"visible": self.seen.condition, "ring": ring}
        y = effc_ops.cached_attention(q, k, v, past, size**-0.5, **seen)
        return projections.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


def rms_norm(x: Tensor, norm: torch.nn.Module) -> Tensor:
    return effc_ops.rms_norm(x, norm.weight, norm.variance_epsilon)


@dataclass
class ScriptedProgram:
    """Says a fixed script after every prompt: the t-th new token of row b is script[b][t]."""

    script: Tensor
    vocab_size: int = 32
    eos_token_ids: tuple[int, ...] = ()
    max_position: int | None = 64

    def __post_init__(self) -> None:
        self.config = Facts(self.vocab_size, self.max_position, self.eos_token_ids, [])
        self.step = 0

    def run(self, kind: str, inputs: dict[str, Tensor], states: dict[str, Tensor], padded: bool) -> Tensor:
        self.step = 0 if kind == "prefill" else self.step + 1
        return F.one_hot(self.script[:, self.step], self.vocab_size).float()[:, None]
