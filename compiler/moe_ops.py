"""Mixture of experts in the op vocabulary: the choice of experts, the experts' MLPs, and both as one op.

Shapes: T tokens (any leading axes), K experts per token, E experts, D model size, N hidden size of an expert,
P products of the input: 2 where there is a gate, else 1.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .expressions import evaluate
from .graph import sizes
from .pattern import arguments
from .vocabulary import Cost, define, like, nbytes, numel, read_bytes, streamed


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


WEIGHTS = ("up", "down", "up_bias", "down_bias")


def experts_cost(node: fx.Node) -> Cost:
    """Each token's products with its experts; the weights of those experts are read, at most once each."""
    named = arguments(node)
    weights = [named[name] for name in WEIGHTS if named[name] is not None]
    others = [value for name, value in named.items() if isinstance(value, fx.Node) and name not in WEIGHTS]
    chosen = named["k"] if "k" in named else sizes(named["experts"])[-1]
    pairs, count = sympy.prod(sizes(named["x"])[:-1]) * chosen, sizes(named["up"])[0]
    share = sympy.Min(pairs / count, sympy.Integer(1))
    flops = 2 * pairs * sum(sympy.prod(sizes(weight)[1:]) for weight in weights[:2])
    return Cost(flops, nbytes(node) + sum(map(read_bytes, others)) + share * sum(map(read_bytes, weights)))


@define(
    "experts(Tensor x, Tensor experts, Tensor scores, Tensor up, Tensor down, Tensor? up_bias=None, "
    "Tensor? down_bias=None, str activation='silu(gate) * up') -> Tensor",
    shape=like,
    cost=experts_cost,
)
def experts(
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

    up [E, 2, N, D] holds gate, then up ([E, 1, N, D] if `activation`, one of `expressions` over gate and up, has no
    gate), down [E, D, N], up_bias [E, P, N], down_bias [E, D]. Rounds to x's dtype after each product, each bias and
    each op of the activation; the weighted values round to what their product with the scores promotes to, are summed
    in fp32 and round to that and to x's dtype.
    """
    tokens, pairs = x.reshape(-1, x.shape[-1]), experts.reshape(-1)
    results = tokens.new_zeros(pairs.shape[0], down.shape[1])
    for expert in pairs.unique().tolist():
        (chosen,) = (pairs == expert).nonzero(as_tuple=True)
        hidden = F.linear(tokens[chosen // experts.shape[-1]], up[expert].flatten(0, 1))
        if up_bias is not None:
            hidden = hidden + up_bias[expert].flatten()
        parts = hidden.chunk(up.shape[1], dim=-1)
        hidden = evaluate(activation, dict(zip(("gate", "up")[-len(parts) :], parts)))
        result = F.linear(hidden, down[expert])
        results[chosen] = result if down_bias is None else result + down_bias[expert]
    weighted = results.unflatten(0, (-1, experts.shape[-1])) * scores.reshape(-1, experts.shape[-1], 1)
    return weighted.sum(1).to(x.dtype).reshape(x.shape)


def moe_cost(node: fx.Node) -> Cost:
    """That of `experts`, and the product with the router."""
    named, rest = arguments(node), experts_cost(node)
    return Cost(rest.flops + 2 * numel(named["x"]) * sizes(named["router"])[0], rest.bytes)


@define(
    "moe(Tensor x, Tensor router, Tensor up, Tensor down, int k, Tensor? router_bias=None, Tensor? correction=None, "
    "Tensor? up_bias=None, Tensor? down_bias=None, Tensor? residual=None, str values='softmax(logits)', "
    "str ranks='values', str weights='chosen', str activation='silu(gate) * up') -> Tensor",
    shape=like,
    cost=moe_cost,
)
def moe(
    x: Tensor,
    router: Tensor,
    up: Tensor,
    down: Tensor,
    k: int,
    router_bias: Tensor | None = None,
    correction: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    values: str = "softmax(logits)",
    ranks: str = "values",
    weights: str = "chosen",
    activation: str = "silu(gate) * up",
) -> Tensor:
    """A mixture of experts: the router, the `k` experts that it chooses for each token, and a residual.

    x and residual [..., D], router [E, D], router_bias and correction [E], the experts' weights as `experts` has them
    -> [..., D] in x's dtype. Three of `expressions` say how a router chooses:

        logits = router @ x + router_bias         in router's dtype
        values                                    over logits and correction, one an expert
        ranks                                     over logits, values and correction; the k largest are chosen
        weights                                   over chosen, the k largest's values, as scores of `experts`

    Of equal ranks the first is chosen. Each op rounds to the dtype that PyTorch gives its result, and then as `experts`
    does; the sum with the residual rounds once more.
    """
    logits = F.linear(x.to(router.dtype), router, router_bias)
    known = {"logits": logits, "correction": correction}
    known["values"] = evaluate(values, known)
    chosen = top_k(evaluate(ranks, known), k)
    scores = evaluate(weights, {"chosen": known["values"].gather(-1, chosen)})
    y = experts(x, chosen, scores, up, down, up_bias, down_bias, activation)
    return y if residual is None else residual + y
