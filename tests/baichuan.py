"""Baichuan-2 after its architecture (arXiv:2309.10305), as plain modules: transformers does not have it.

Both sizes: pre-norm with RMSNorm, one projection W_pack for q, k and v, SwiGLU, and a head whose rows are normalized
(NormHead). 7B turns queries and keys by rope, with tables of all positions in buffers; 13B adds ALiBi, from a buffer
that holds bias and causal mask of the longest text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.epsilon)
        return self.weight * x.to(self.weight.dtype)


class NormHead(nn.Module):
    """The output layer: cosines with the rows of its weight, not products."""

    def __init__(self, size: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight))


class MLP(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, size // heads
        self.W_pack = nn.Linear(size, 3 * size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] --> q, k, v [B, H, S, D / H]"""
        batch, length, size = x.shape
        packed = self.W_pack(x).unflatten(-1, (3, size)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        q, k, v = (part.view(batch, length, self.heads, self.head_dim).transpose(1, 2) for part in packed)
        return q, k, v

    def output(self, x: Tensor) -> Tensor:
        """[B, H, S, D / H] --> [B, S, D]"""
        batch, _, length, _ = x.shape
        return self.o_proj(x.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    def __init__(self, attention: Attention, size: int, inner: int) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = MLP(size, inner)
        self.input_layernorm = RMSNorm(size)
        self.post_attention_layernorm = RMSNorm(size)

    def forward(self, x: Tensor, *attention_inputs: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Baichuan(nn.Module):
    """What the two sizes share. Takes the names of a transformers config; what it does not know it ignores."""

    def __init__(self, attention: type[Attention], **options: Any) -> None:
        super().__init__()
        size, heads, inner = (options[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size"))
        self.embed_tokens = nn.Embedding(options["vocab_size"], size)
        self.layers = nn.ModuleList(
            Layer(attention(size, heads), size, inner) for _ in range(options["num_hidden_layers"])
        )
        self.norm = RMSNorm(size)
        self.lm_head = NormHead(size, options["vocab_size"])
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=options["initializer_range"])

    def run(self, input_ids: Tensor, *attention_inputs: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, *attention_inputs)
        return self.lm_head(self.norm(x))


# --- 7B: rope ------------------------------------------------------------------------------------------------------


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class RopeAttention(Attention):
    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q, k = ((part.float() * cos + rotate_half(part.float()) * sin).to(part.dtype) for part in (q, k))
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)))


class Baichuan7B(Baichuan):
    def __init__(self, **options: Any) -> None:
        super().__init__(RopeAttention, **options)
        size = options["hidden_size"] // options["num_attention_heads"]
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(options["max_position_embeddings"]).float(), frequencies)
        self.register_buffer("cos_cached", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin_cached", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        batch, length = input_ids.shape
        lowest = max(torch.finfo(dtype).min for dtype in (self.norm.weight.dtype, torch.float32))
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        places = torch.arange(length, device=input_ids.device)
        mask = torch.full((length, length), lowest, device=input_ids.device)
        mask = mask.masked_fill(places < (places + 1).view(length, 1), 0)[None, None].expand(batch, 1, length, length)
        inverted = 1.0 - attention_mask[:, None, None, :].expand(batch, 1, length, length).float()
        padding = inverted.masked_fill(inverted.bool(), lowest)
        cos, sin = (table[:length][position_ids][:, None] for table in (self.cos_cached, self.sin_cached))
        return self.run(input_ids, (mask + padding).clamp(min=lowest), cos, sin)


# --- 13B: ALiBi ----------------------------------------------------------------------------------------------------


def alibi_slopes(heads: int) -> Tensor:
    """The geometric series of arXiv:2108.12409; heads: a power of two."""
    ratio = 2.0 ** (-8.0 / heads)
    return torch.tensor([ratio ** (head + 1) for head in range(heads)])


def alibi_and_causal_mask(heads: int, length: int) -> Tensor:
    """[H, L, L]: slope * (k - q) where key k is at or before query q, -inf elsewhere."""
    places = torch.arange(length)
    distance = places[None, :] - places[:, None]
    future = torch.full((length, length), -math.inf).triu(1)
    return future + alibi_slopes(heads)[:, None, None] * distance


class AlibiAttention(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.project(x)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim) + mask
        scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min, device=scores.device))
        return self.output(torch.matmul(torch.softmax(scores, dim=-1), v))


class Baichuan13B(Baichuan):
    def __init__(self, **options: Any) -> None:
        super().__init__(AlibiAttention, **options)
        mask = alibi_and_causal_mask(options["num_attention_heads"], options["max_position_embeddings"])
        self.register_buffer("future_mask", mask, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        length = input_ids.shape[1]
        mask = self.future_mask[:, :length, :length]
        if attention_mask is None:
            return self.run(input_ids, mask)
        seen = attention_mask.to(mask.dtype)
        both = (seen[:, :, None] * seen[:, None, :] > 0) * (seen[:, :, None] - seen[:, None, :] == 0)
        inverted = 1.0 - torch.tril(both)[:, None].to(mask.dtype)
        padding = inverted.masked_fill(inverted.bool(), torch.finfo(mask.dtype).min)
        return self.run(input_ids, padding + mask[None])
