"""Mixture of experts in the op vocabulary: the choice of experts, and the experts' MLPs.

Shapes: T tokens (any leading axes), K experts per token, E experts, D model size, N hidden size of an expert.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .gate_expressions import evaluate, has_gate
from .graph import sizes
from .vocabulary import Cost, define, nbytes, numel, read_bytes, streamed


def top_k_shape(x: Tensor, k: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], k), dtype=torch.int64)


@define("top_k(Tensor x, int k) -> Tensor", shape=top_k_shape, cost=lambda node: streamed(node, numel(node.args[0])))
def top_k(x: Tensor, k: int) -> Tensor:
    """Where the k largest entries of each row are, the largest first: [..., N] -> [..., k] int64.

    NaN counts as the largest. Of equal entries the first comes first; torch.topk leaves their order open.
    """
    return (
        torch.sort(x, dim=-1, descending=True, stable=True)
        .indices[..., :k]
        .clone(memory_format=torch.contiguous_format)
    )


def moe_shape(x: Tensor, *rest: object, **named: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def moe_cost(node: fx.Node) -> Cost:
    """Each token's products with its experts; the weights of those experts are read, at most once each."""
    weights = [argument for argument in node.args[3:] if isinstance(argument, fx.Node)]
    pairs, experts = numel(node.args[1]), sizes(weights[0])[0]
    share = sympy.Min(pairs / experts, sympy.Integer(1))
    tokens = nbytes(node) + sum(nbytes(argument) for argument in node.args[:3])
    flops = 2 * pairs * sum(sympy.prod(sizes(weight)[1:]) for weight in weights[:2])
    return Cost(flops, tokens + share * sum(read_bytes(weight) for weight in weights))


@define(
    "moe(Tensor x, Tensor experts, Tensor scores, Tensor up, Tensor down, Tensor? up_bias=None, "
    "Tensor? down_bias=None, str activation='silu(gate) * up') -> Tensor",
    shape=moe_shape,
    cost=moe_cost,
)
def moe(
    x: Tensor,
    experts: Tensor,
    scores: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu(gate) * up",
) -> Tensor:
    """The MLPs of the experts that each token chose, weighted and summed (Shazeer et al., 2017).

    x [..., D], experts [..., K] int64 below E and scores [..., K] -> [..., D] in x's dtype:

        sum over k of scores[k] * (down[e] @ activation(gate[e] @ x, up[e] @ x)), e = experts[k]

    up [E, 2N, D] holds the rows of gate, then those of up ([E, N, D] if `activation`, an expression as in
    `gate_expressions`, has no gate), down [E, D, N], up_bias [E, 2N], down_bias [E, D]. Rounds to x's dtype after
    each product, each bias and each op of the activation; the weighted values round to what their product with the
    scores promotes to, are summed in fp32 and round to that and to x's dtype.
    """
    tokens, pairs = x.reshape(-1, x.shape[-1]), experts.reshape(-1)
    results = tokens.new_zeros(pairs.shape[0], down.shape[1])
    for expert in pairs.unique().tolist():
        (chosen,) = (pairs == expert).nonzero(as_tuple=True)
        hidden = F.linear(tokens[chosen // experts.shape[-1]], up[expert])
        if up_bias is not None:
            hidden = hidden + up_bias[expert]
        parts = hidden.chunk(2, dim=-1) if has_gate(activation) else (hidden,)
        hidden = evaluate(activation, dict(zip(("gate", "up") if len(parts) == 2 else ("up",), parts)))
        result = F.linear(hidden, down[expert])
        results[chosen] = result if down_bias is None else result + down_bias[expert]
    weighted = results.unflatten(0, (-1, experts.shape[-1])) * scores.reshape(-1, experts.shape[-1], 1)
    return weighted.sum(1).to(x.dtype).reshape(x.shape)
