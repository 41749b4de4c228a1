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

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from . import attention_ops, moe_ops, quantize_ops  # noqa: F401  (their rows of the table)
from .graph import sizes
from .vocabulary import LEGAL, OPS, Cost, Op, define, like, numel, op_of, streamed

__all__ = ["ACTIVATIONS", "LEGAL", "OPS", "Cost", "Op", "op_of"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


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
