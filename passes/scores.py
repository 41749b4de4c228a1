"""Attention scores as models write them, taken apart: from the softmax back to q @ k^T.

    softmax(c * tanh(q @ k^T / sqrt(D) / c) + mask)                        scale and softcap (Gemma 2)
    softmax(where(causal, q @ k^T, -3e38) + mask)                          masks that replace, masks that are added
    softmax(q @ k^T / sqrt(D) * tril + (1 - tril) * -1e4)                  a triangle of numbers (GPT)
    softmax(baddbmm(alibi, q, k^T, alpha).reshape(B, H, S, T) + mask)      heads in the batch (BLOOM)
    softmax(cat([q @ k^T, sinks], -1) - max)[..., :-1]                     one more key per head (gpt-oss)

What stands between and is none of these is named in `Unsupported`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, sizes
from ..compiler.index_algebra import Inference, NotInferred
from ..compiler.mask_form import HIDDEN
from ..compiler.pattern import CASTS, arguments
from ..compiler.rewrite import Match
from ..compiler.weights import Constant

aten = torch.ops.aten


class Unsupported(Exception):
    """Why something that looks like attention is left alone."""


class Mask(NamedTuple):
    """A mask of scores: bool (true may attend) or float (added). rank: that of the scores where it is applied."""

    node: fx.Node
    rank: int


@dataclass
class Scores:
    """softcap * tanh(q @ k^T * scale / softcap), then masks, then a sink per head.

    q [..., S, D] and transposed_k [..., D, T], of rank 3 where batch and heads are one dimension. sinks: the column
    that is appended, [B, H, S, 1]; it is the first one if `sinks_first`.
    """

    q: fx.Node
    transposed_k: fx.Node
    scale: float = 1.0
    softcap: float | None = None
    masks: list[Mask] = field(default_factory=list)
    sinks: fx.Node | None = None
    sinks_first: bool = False

    def scaled(self, factor: float) -> Scores:
        """These scores times a number."""
        if self.masks or self.sinks is not None:
            raise Unsupported("the scores are scaled after the mask is added")
        self.scale *= factor
        if self.softcap is not None:
            self.softcap *= factor
        return self

    def masked(self, mask: fx.Node, rank: int) -> Scores:
        if self.sinks is not None:
            raise Unsupported(f"{mask.name} masks the scores after the sinks are appended")
        if len(sizes(mask)) > 4:
            raise Unsupported(f"the mask {mask.name} has more than four dimensions")
        self.masks.append(Mask(mask, rank))
        return self


def follow_scores(match: Match, node: fx.Node) -> Scores:
    """What a softmax's argument is made of. Raises Unsupported with what is in the way."""
    if node.op != "call_function":
        raise Unsupported(f"the scores come from {node.name}, which is no product of queries and keys")
    if node.target in CASTS:
        return follow_scores(match, node.args[0])
    if node.target in FORMS:
        return FORMS[node.target](match, node)
    raise Unsupported(f"between the softmax and q @ k^T stands {node.name} = {node.target}")


def product(match: Match, node: fx.Node) -> Scores:
    return Scores(*node.args)


def product_and_sum(match: Match, node: fx.Node) -> Scores:
    """baddbmm(added, q, k^T, beta, alpha) = beta * added + alpha * q @ k^T."""
    found = arguments(node)
    if found["beta"] != 1:
        raise Unsupported(f"{node.name} scales what it adds to the scores by {found['beta']}")
    scores = Scores(found["batch1"], found["batch2"], scale=float(found["alpha"]))
    return scores.masked(found["self"], len(sizes(node)))


def scaled(match: Match, node: fx.Node) -> Scores:
    first, second = node.args
    factor = number(match.graph, second)
    if factor is None and node.target == aten.mul.Tensor:
        first, factor = second, number(match.graph, first)
    if factor is None:
        raise Unsupported(f"{node.name} scales the scores by what is no number")
    return follow_scores(match, first).scaled(factor if node.target == aten.mul.Tensor else 1 / factor)


def not_below(match: Match, node: fx.Node) -> Scores:
    """maximum(scores, lowest): what is hidden stays hidden."""
    first, second = node.args
    source, bound = (first, second) if number(match.graph, first) is None else (second, first)
    value = number(match.graph, bound)
    if value is None or value > HIDDEN:
        raise Unsupported(f"{node.name} raises scores to {bound}, which does not hide them")
    return follow_scores(match, source)


def capped(match: Match, node: fx.Node) -> Scores:
    scores = follow_scores(match, node.args[0])
    if scores.softcap is not None or scores.masks or scores.sinks is not None:
        raise Unsupported(f"{node.name} caps scores that are capped or masked before")
    scores.softcap = 1.0
    return scores


def replaced(match: Match, node: fx.Node) -> Scores:
    """where(condition, scores, lowest), where(condition, lowest, scores) and masked_fill(scores, condition, lowest)."""
    given = list(node.args)
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        condition, kept, hidden, hidden_is_true = given[1], given[0], given[2], True
    else:
        hidden_is_true = number(match.graph, given[1]) is not None
        condition = given[0]
        hidden, kept = given[1:] if hidden_is_true else reversed(given[1:])
    value = number(match.graph, hidden)
    if value is None or value > HIDDEN:
        raise Unsupported(f"{node.name} replaces scores by {hidden}, which does not hide them")
    scores = follow_scores(match, kept)
    if hidden_is_true:
        condition = match.call(aten.bitwise_not.default, condition)
    return scores.masked(condition, len(sizes(node)))


def added(match: Match, node: fx.Node) -> Scores:
    """scores + mask, in either order."""
    if node.kwargs.get("alpha", 1) != 1:
        raise Unsupported(f"{node.name} adds a multiple of a mask to the scores")
    if (scores := multiplied(match, node)) is not None:
        return scores
    reasons = []
    for source, mask in (node.args, reversed(node.args)):
        if not isinstance(source, fx.Node) or sizes(source) != sizes(node):
            continue
        try:
            scores = follow_scores(match, source)
        except Unsupported as reason:
            reasons.append(reason)
            continue
        return scores.masked(mask, len(sizes(node))) if isinstance(mask, fx.Node) else scores
    raise reasons[0] if reasons else Unsupported(f"{node.name} adds tensors that are not the scores")


def multiplied(match: Match, node: fx.Node) -> Scores | None:
    """scores * m + (1 - m) * lowest with m of ones and zeros: where m is zero, the score is replaced."""
    for kept, rest in (node.args, reversed(node.args)):
        if not all(isinstance(part, fx.Node) and part.target == aten.mul.Tensor for part in (kept, rest)):
            continue
        lowest = number(match.graph, rest.args[1])
        complement = arguments(rest.args[0])
        for source, m in (kept.args, reversed(kept.args)):
            ones = complement.get("self") is m and complement.get("other") == 1 and complement.get("alpha") == 1
            if rest.args[0].target != aten.rsub.Scalar or not ones or lowest is None or lowest > HIDDEN:
                continue
            if is_zero_or_one(match.graph, m):
                shown = m.args[0] if is_number_of_bool(m) else match.call(aten._to_copy.default, m, dtype=torch.bool)
                return follow_scores(match, source).masked(shown, len(sizes(node)))
    return None


def less_maximum(match: Match, node: fx.Node) -> Scores:
    """scores - max(scores): the softmax does not see it."""
    scores, largest = node.args
    if isinstance(largest, fx.Node) and largest.target == operator.getitem and largest.args[1] == 0:
        largest = largest.args[0]
    found = arguments(largest) if isinstance(largest, fx.Node) and largest.op == "call_function" else {}
    dims = found.get("dim")
    last = [len(sizes(node)) - 1] if isinstance(dims, list) else len(sizes(node)) - 1
    is_largest = found and largest.target in (aten.max.dim, aten.amax.default) and found["self"] is scores
    if not is_largest or dims != last or not found["keepdim"]:
        raise Unsupported(f"{node.name} subtracts from the scores what is not their maximum")
    return follow_scores(match, scores)


def appended(match: Match, node: fx.Node) -> Scores:
    """cat([scores, column]) or cat([column, scores]), over the keys."""
    found = arguments(node)
    if len(found["tensors"]) != 2 or found["dim"] not in (-1, len(sizes(node)) - 1):
        raise Unsupported(f"{node.name} joins scores, but not with one column of sinks")
    first, second = found["tensors"]
    sinks_first = sizes(first)[-1] == 1 and sizes(second)[-1] != 1
    column, source = (first, second) if sinks_first else (second, first)
    if sizes(column)[-1] != 1:
        raise Unsupported(f"{node.name} joins the scores with {sizes(column)[-1]} columns, not with one of sinks")
    scores = follow_scores(match, source)
    if scores.sinks is not None:
        raise Unsupported(f"{node.name} appends a second column of sinks to the scores")
    scores.sinks, scores.sinks_first = column, sinks_first
    return scores


def reshaped(match: Match, node: fx.Node) -> Scores:
    """Batch and heads made one dimension, or two."""
    before, after = sizes(node.args[0]), sizes(node)
    if before[-2:] != after[-2:] or {len(before), len(after)} - {3, 4}:
        raise Unsupported(f"{node.name} gives the scores of shape {before} the shape {after}")
    return follow_scores(match, node.args[0])


FORMS = {
    aten.matmul.default: product,
    aten.bmm.default: product,
    aten.baddbmm.default: product_and_sum,
    aten.mul.Tensor: scaled,
    aten.div.Tensor: scaled,
    aten.maximum.default: not_below,
    aten.max.other: not_below,
    aten.clamp_min.default: not_below,
    aten.tanh.default: capped,
    aten.where.self: replaced,
    aten.where.ScalarOther: replaced,
    aten.where.ScalarSelf: replaced,
    aten.masked_fill.Scalar: replaced,
    aten.masked_fill.Tensor: replaced,
    aten.add.Tensor: added,
    aten.sub.Tensor: less_maximum,
    aten.cat.default: appended,
    aten.reshape.default: reshaped,
}


def number(graph: Graph, value: Any) -> float | None:
    """The number that an argument is: given as one, or as a tensor of one element that is known; else None."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    constant = graph.weights.get(value.name) if value.op == "placeholder" else None
    if isinstance(constant, Constant) and constant.tensor.numel() == 1:
        return constant.tensor.item()
    if value.target in (aten.full.default, aten.scalar_tensor.default):
        filled = arguments(value).get("fill_value", value.args[0])
        return float(filled) if isinstance(filled, int | float) and not sizes(value) else None
    return None


def is_zero_or_one(graph: Graph, value: fx.Node) -> bool:
    """Whether a tensor is known to hold nothing else: a slice of a constant that does, or a bool as a number."""
    while value.op == "call_function" and value.target in (aten.slice.Tensor, *CASTS):
        if is_number_of_bool(value):
            return True
        value = value.args[0]
    constant = graph.weights.get(value.name)
    return isinstance(constant, Constant) and bool(((constant.tensor == 0) | (constant.tensor == 1)).all())


def is_number_of_bool(value: fx.Node) -> bool:
    return value.target in CASTS and dtype_of(value.args[0]) == torch.bool


def sink_of_each_head(column: fx.Node) -> fx.Node:
    """The vector [H] that a column [B, H, S, 1] repeats. Raises Unsupported where it is none."""
    source = column
    while source.op == "call_function" and source.target in (
        aten.expand.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        *CASTS,
    ):
        source = source.args[0]
    reason = Unsupported(f"the column {column.name} that is appended to the scores is not one number per head")
    if len(sizes(column)) != 4 or sizes(source) != (sizes(column)[1],):
        raise reason
    inference = Inference(opaque=(source,))
    b, h, q, k = (inference.index(name, size) for name, size in zip("bhqk", sizes(column)))
    try:
        element = inference.infer(column).at(b, h, q, k)
    except NotInferred:
        raise reason from None
    if getattr(element, "args", None) != (h,):
        raise reason
    return source
