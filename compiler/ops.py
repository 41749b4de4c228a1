"""The op vocabulary: what the fused and stateful dialects may say beyond ATen.

Each op has one row in `OPS`: its schema, shape rule, eager reference and cost. The reference makes every stage of
every graph runnable in `torch.fx.Interpreter`, which is the oracle for passes and kernels. The kernel of each op is
in `codegen` (a test crosses the tables). References round where eager PyTorch rounds, which is the contract that
kernels keep.

Shapes: B batch, S query length, T key length or cache capacity, H query heads, G key/value heads (H a multiple of
G), D head size, R rotated size, K and N the inner and outer sizes of a linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .graph import dtype_of, is_tensor, sizes

LIBRARY = torch.library.Library("effc", "DEF")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Cost:
    """Work of one op: floating-point operations and bytes moved to and from memory, in symbolic sizes."""

    flops: sympy.Expr
    bytes: sympy.Expr


@dataclass(frozen=True)
class Op:
    """One row of the vocabulary."""

    name: str
    schema: str
    reference: Callable[..., Tensor]
    shape: Callable[..., Tensor]
    cost: Callable[[fx.Node], Cost]
    mutates: bool = False

    @property
    def target(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.effc, self.name).default


OPS: dict[str, Op] = {}


def define(schema: str, *, shape: Callable[..., Tensor], cost: Callable[[fx.Node], Cost]) -> Callable:
    """Register a reference implementation as `torch.ops.effc.<name>` and add its row to `OPS`."""

    def register(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"effc::{name}", shape, lib=LIBRARY)
        OPS[name] = Op(name, schema, reference, shape, cost, mutates="(a!)" in schema)
        return reference

    return register


def numel(node: fx.Node) -> sympy.Expr:
    return sympy.prod(sizes(node))


def nbytes(node: fx.Node) -> sympy.Expr:
    return numel(node) * dtype_of(node).itemsize


def streamed(node: fx.Node, flops: sympy.Expr) -> Cost:
    """The cost of an op that reads each tensor argument once and writes its result once."""
    arguments = [argument for argument in node.all_input_nodes if is_tensor(argument)]
    return Cost(flops, nbytes(node) + sum(nbytes(argument) for argument in arguments))


def like(x: Tensor, *rest: object, **named: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- normalization ---------------------------------------------------------------------------------------------


@define(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool scale_in_fp32=False) -> Tensor",
    shape=like,
    cost=lambda node: streamed(node, 4 * numel(node)),
)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, scale_in_fp32: bool = False) -> Tensor:
    """Root mean square norm over the last axis (Zhang and Sennrich, 2019), computed in fp32 (fp64 for fp64).

    x [..., K], weight [K] or None -> [..., K] in x's dtype. The normalized value is rounded to x's dtype before it
    is scaled, as Llama does, unless `scale_in_fp32`, as Gemma does.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normalized.to(x.dtype)
    if scale_in_fp32:
        return (normalized * weight.to(wide.dtype)).to(x.dtype)
    return (weight * normalized.to(x.dtype)).to(x.dtype)


# --- positions -------------------------------------------------------------------------------------------------


@define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor",
    shape=like,
    cost=lambda node: streamed(node, 3 * numel(node)),
)
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of the first R entries of each head; the rest pass through.

    x [B, H, S, D], cos and sin [B or 1, S, R] -> [B, H, S, D]. Pairs are (i, i + R/2), or (2i, 2i + 1) if
    `interleaved`. Each product and the sum round to x's dtype.
    """
    rotated_size = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    head, rest = x[..., :rotated_size], x[..., rotated_size:]
    if interleaved:
        partner = torch.stack((-head[..., 1::2], head[..., ::2]), dim=-1).flatten(-2)
    else:
        low, high = head.chunk(2, dim=-1)
        partner = torch.cat((-high, low), dim=-1)
    return torch.cat((head * cos + partner * sin, rest), dim=-1).to(x.dtype)


# --- linear ----------------------------------------------------------------------------------------------------


def linear_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_cost(node: fx.Node) -> Cost:
    x, weight = node.args[:2]
    return streamed(node, 2 * numel(x) * sizes(weight)[0])


@define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, str activation='none') -> Tensor",
    shape=linear_shape,
    cost=linear_cost,
)
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Linear with an epilogue: `residual + activation(x @ weight.T + bias)`.

    x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N]. Rounds to x's dtype after the product and
    bias, after the activation, and after the residual.
    """
    y = ACTIVATIONS[activation](F.linear(x, weight, bias))
    return y if residual is None else residual + y


def gated_linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu") -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@define(
    "gated_linear(Tensor x, Tensor weight, Tensor? bias=None, str activation='silu') -> Tensor",
    shape=gated_linear_shape,
    cost=linear_cost,
)
def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu") -> Tensor:
    """The first half of a gated MLP (Shazeer, 2020): `activation(x @ gate.T) * (x @ up.T)`.

    x [..., K], weight [2N, K] with the rows of gate, then those of up, bias [2N] -> [..., N]. Rounds to x's dtype
    after each product, after the activation and after the multiplication.
    """
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


# --- attention -------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention in fp32 (fp64 for fp64); a row that may attend to nothing gives zeros.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, D'], allowed bool and bias float, broadcast to [B, H, S, T].
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(ratio, dim=1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.to(wide)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
        reachable = allowed.any(-1, keepdim=True)
        weights = torch.where(reachable, scores, 0.0).softmax(-1) * reachable
        v = torch.where(allowed.expand(scores.shape).any(-2).unsqueeze(-1), v, 0.0)
    else:
        weights = scores.softmax(-1)
    return (weights @ v).to(q.dtype)


def attention_shape(q: Tensor, k: Tensor, v: Tensor, *rest: object, **named: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def attention_cost(node: fx.Node) -> Cost:
    q, k, v = node.args[:3]
    return streamed(node, 2 * numel(q) * sizes(k)[2] + 2 * numel(node) * sizes(v)[2])


@define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? key_mask=None, Tensor? mask=None)"
    " -> Tensor",
    shape=attention_shape,
    cost=attention_cost,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Scaled dot product attention with grouped heads, over all keys given.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, D'] -> [B, H, S, D']. `causal`: query i sees keys 0..i.
    key_mask [B, T]: keys whose entry is zero are hidden from every query (left padding). mask, broadcast to
    [B, H, S, T]: bool (true may attend) or float (added to the scaled scores): what could not be inferred.
    """
    allowed = None
    if causal:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    if key_mask is not None:
        visible = (key_mask != 0)[:, None, None, :]
        allowed = visible if allowed is None else allowed & visible
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask if allowed is None else allowed & mask
    elif mask is not None:
        bias = mask
    return attend(q, k, v, allowed, bias, scale)


# --- KV cache --------------------------------------------------------------------------------------------------


@define(
    "kv_write(Tensor(a!) cache, Tensor new, Tensor past) -> Tensor(a!)",
    shape=lambda cache, new, past: cache,
    cost=lambda node: Cost(sympy.Integer(0), 2 * nbytes(node.args[1])),
)
def kv_write(cache: Tensor, new: Tensor, past: Tensor) -> Tensor:
    """Write the keys or values of S new tokens behind those already cached; returns the cache.

    cache [B, G, T, D], new [B, G, S, D], past [B] int64: row b's tokens go to slots past[b] .. past[b] + S - 1.
    """
    slots = past[:, None] + torch.arange(new.shape[2], device=past.device)  # [B, S]
    rows = torch.arange(cache.shape[0], device=past.device)[:, None]
    cache[rows, :, slots] = new.transpose(1, 2).to(cache.dtype)
    return cache


def cached_attention_cost(node: fx.Node) -> Cost:
    """At a full cache: what a run costs grows with the tokens cached, up to this."""
    return attention_cost(node)


@define(
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor past, float scale, Tensor? key_mask=None)"
    " -> Tensor",
    shape=attention_shape,
    cost=cached_attention_cost,
)
def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """Causal attention of S new queries over a cache that already holds their keys and values.

    q [B, H, S, D], k_cache [B, G, T, D], v_cache [B, G, T, D'], past [B] int64 -> [B, H, S, D']. Query i of row b
    sees slots 0 .. past[b] + i. key_mask [B, T]: slots whose entry is zero are hidden (left padding).
    """
    last = past[:, None] + torch.arange(q.shape[2], device=past.device)  # [B, S]
    allowed = torch.arange(k_cache.shape[2], device=past.device) <= last[:, :, None]
    if key_mask is not None:
        allowed = allowed & (key_mask != 0)[:, None, :]
    return attend(q, k_cache, v_cache, allowed[:, None], None, scale)


# --- what each dialect may say -----------------------------------------------------------------------------------

STATE_OPS = frozenset({"kv_write", "cached_attention"})

LEGAL: dict[str, frozenset[str]] = {
    "traced": frozenset(),
    "fused": frozenset(OPS) - STATE_OPS,
    "stateful": frozenset(OPS),
}
"""Names of effc ops that a dialect may hold beside functional ATen."""


def op_of(node: fx.Node) -> Op | None:
    """The vocabulary row of a node that calls an effc op, else None."""
    if node.op == "call_function" and getattr(node.target, "namespace", None) == "effc":
        return OPS[node.target._schema.name.split("::")[1]]
    return None
