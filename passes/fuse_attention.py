"""Fuse attention, with its grouped heads and what its mask means.

    scaled_dot_product_attention(q, repeat(k), repeat(v), k_pos <= q_pos & attention_mask[b, k_pos])
    softmax(q @ repeat(k)^T * scale + where(k_pos <= q_pos & ..., 0, min)) @ repeat(v)

        -->  attention(q, k, v, scale, causal=True, key_mask=attention_mask)

Masks are inferred (`compiler/masks.py`), not pattern-listed. What is not causal, a window or padding stays an explicit
operand, and a miss says why. Repeats of key and value heads are recognized by the same index algebra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import sympy
import torch
from torch import fx

from ..compiler import ops  # noqa: F401  (registers the vocabulary)
from ..compiler.graph import Graph, dtype_of, sizes
from ..compiler.index_algebra import Inference, NotInferred
from ..compiler.masks import HIDDEN, Masks
from ..compiler.pattern import CASTS, any_, maybe_cast, op, tensor
from ..compiler.rewrite import Match, PassResult, Rule, erase_unused, rewrite

aten = torch.ops.aten
attention = torch.ops.effc.attention.default

REPEATS = frozenset({aten.expand.default, aten.repeat_interleave.self_int})
VIEWS = REPEATS | {aten.permute.default, aten.reshape.default, aten.slice.Tensor, aten.unsqueeze.default}

SDPA = op(
    aten.scaled_dot_product_attention.default,
    tensor("q"),
    tensor("k"),
    tensor("v"),
    any_("mask"),
    any_("dropout"),
    any_("causal"),
    scale=any_("scale"),
    enable_gqa=any_("grouped"),
)

SOFTMAX = op(aten.softmax.int, tensor("scores"), any_("dim"), any_("dtype"))
WEIGHTS = maybe_cast(SOFTMAX | op(aten.slice.Tensor, SOFTMAX, any_("sliced"), any_("start"), any_("end")))
WEIGHTED_SUM = op(aten.matmul.default, WEIGHTS, tensor("v")) | op(
    aten.bmm.default, WEIGHTS | op(aten.reshape.default, WEIGHTS, any_("sizes")), tensor("v")
)
"""The weighted sum of the values; `follow_scores` walks what is inside the softmax."""

MASKED = op(
    attention,
    tensor("q"),
    tensor("k"),
    tensor("v"),
    any_("scale"),
    any_("causal"),
    any_("key_mask"),
    tensor("mask"),
    window=any_("window"),
)


@dataclass
class Scores:
    """Attention scores taken apart: q @ k^T * scale, then masks (bool: true may attend; float: added)."""

    q: fx.Node
    transposed_k: fx.Node
    scale: float = 1.0
    masks: list[fx.Node] = field(default_factory=list)


class Unsupported(Exception):
    """Why something that looks like attention is left alone."""


def from_sdpa(masks: Masks, match: Match) -> fx.Node | None:
    head_size = match.value("q").shape[-1]
    if match["dropout"] != 0:
        return match.decline(f"dropout of {match['dropout']} is random: call model.eval()")
    if match["scale"] is None and not isinstance(head_size, int):
        return match.decline("the head size is symbolic")
    scale = 1 / math.sqrt(head_size) if match["scale"] is None else match["scale"]
    if not isinstance(scale, (int, float)):
        return match.decline(f"the scale {scale} is not known while compiling")
    given = [match["mask"]] if match["mask"] is not None else []
    return to_attention(masks, match, match["q"], match["k"], match["v"], scale, bool(match["causal"]), given)


def from_softmax(masks: Masks, match: Match) -> fx.Node | None:
    if match["dim"] not in (-1, match.value("scores").ndim - 1):
        return match.decline(f"softmax over dimension {match['dim']}, not over the keys")
    if "sliced" in match:
        return match.decline("the softmax runs over more columns than there are keys (attention sinks)")
    if match.root.target == aten.bmm.default:
        return match.decline("batch and heads are one dimension")
    try:
        scores = follow_scores(match, match["scores"])
    except Unsupported as reason:
        return match.decline(str(reason))
    k = untransposed(match, scores.transposed_k)
    return to_attention(masks, match, scores.q, k, match["v"], scores.scale, False, scores.masks)


RULES = {"sdpa": (SDPA, from_sdpa), "softmax": (WEIGHTED_SUM, from_softmax)}


def to_attention(
    masks: Masks,
    match: Match,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    scale: float,
    causal: bool,
    given: list[fx.Node],
) -> fx.Node | None:
    """The fused op, with heads ungrouped and the masks that can be read turned into `causal` and `key_mask`."""
    ranks = [len(sizes(x)) for x in (q, k, v)]
    if ranks != [4, 4, 4]:
        return match.decline(f"expected q, k and v of rank 4 (batch, heads, length, head size), found ranks {ranks}")
    if len({dtype_of(x) for x in (q, k, v, match.root)}) != 1:
        return match.decline("q, k, v and the result differ in dtype")
    if any(sizes(x)[0] != sizes(q)[0] for x in (k, v)):
        return match.decline("q, k and v differ in batch size")
    k, v = grouped_heads(k, v)
    heads, groups = sizes(q)[1], sizes(k)[1]
    if groups != sizes(v)[1] or not (heads / groups).is_Integer:
        return match.decline(f"{heads} query heads do not divide among {groups} key and {sizes(v)[1]} value heads")
    key_mask, window, explicit = None, None, []
    for mask in given:
        try:
            form = masks.read(mask, (*sizes(q)[:3], sizes(k)[2]))
        except NotInferred:
            explicit.append(mask)
            continue
        if form.key_mask is not None and key_mask not in (None, form.key_mask):
            explicit.append(mask)
            continue
        causal, key_mask = causal or form.causal, form.key_mask or key_mask
        window = narrower(window, form.window)
    key_mask = of_the_keys(match, key_mask, q, k)
    limits = {} if window is None else {"window": window}
    fused = match.call(attention, q, k, v, float(scale), causal, key_mask, combined(match, explicit), **limits)
    erase_unused(match.graph, *given)
    return fused


def from_masked(masks: Masks, match: Match) -> fx.Node | None:
    """attention(..., mask)  -->  attention(..., causal=True, key_mask=...), where the mask can be read."""
    q, k = match["q"], match["k"]
    try:
        form = masks.read(match["mask"], (*sizes(q)[:3], sizes(k)[2]))
    except NotInferred as reason:
        return match.decline(f"the mask stays an operand: {reason}")
    if None not in (form.key_mask, match["key_mask"]) and form.key_mask is not match["key_mask"]:
        return match.decline("the mask stays an operand: it hides other keys than the key mask given")
    key_mask = match["key_mask"] or of_the_keys(match, form.key_mask, q, k)
    window, causal = narrower(match["window"], form.window), match["causal"] or form.causal
    limits = {} if window is None else {"window": window}
    return match.call(attention, q, k, match["v"], match["scale"], causal, key_mask, **limits)


def narrower(*windows: int | None) -> int | None:
    """The window that holds where all of these do; None is no window."""
    return min((window for window in windows if window is not None), default=None)


def of_the_keys(match: Match, key_mask: fx.Node | None, q: fx.Node, k: fx.Node) -> fx.Node | None:
    """The part [B, T] of a key mask that may be of a longer context: its sizes are those of q and k."""
    for dim, (source, source_dim) in enumerate(((q, 0), (k, 2))):
        if key_mask is not None and sizes(key_mask)[dim] != sizes(source)[source_dim]:
            size = source.meta["val"].shape[source_dim]
            end = size if isinstance(size, int) else match.call(aten.sym_size.int, source, source_dim)
            key_mask = match.call(aten.slice.Tensor, key_mask, dim, 0, end)
    return key_mask


# --- scores ----------------------------------------------------------------------------------------------------------


def follow_scores(match: Match, node: fx.Node) -> Scores:
    """Walk from the softmax back to q @ k^T. Raises Unsupported with what is in the way."""
    if node.op != "call_function":
        raise Unsupported(f"the scores come from {node.name}, which is no product of queries and keys")
    if node.target in CASTS:
        return follow_scores(match, node.args[0])
    if node.target == aten.matmul.default:
        return Scores(*node.args)
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float)):
        scores = follow_scores(match, node.args[0])
        if scores.masks:
            raise Unsupported("the scores are scaled after the mask is added")
        factor = node.args[1] if node.target == aten.mul.Tensor else 1 / node.args[1]
        scores.scale *= factor
        return scores
    if node.target == aten.add.Tensor and "alpha" not in node.kwargs:
        return follow_sum(match, node)
    if node.target in (aten.masked_fill.Scalar, aten.where.ScalarOther) and node.args[2] <= HIDDEN:
        hidden_is_true = node.target == aten.masked_fill.Scalar
        source, condition = (node.args[0], node.args[1]) if hidden_is_true else (node.args[1], node.args[0])
        scores = follow_scores(match, source)
        scores.masks.append(match.call(aten.bitwise_not.default, condition) if hidden_is_true else condition)
        return scores
    if node.target == aten.tanh.default:
        raise Unsupported("the scores are capped by tanh (softcap)")
    if node.target == aten.cat.default:
        raise Unsupported("columns are appended to the scores (attention sinks)")
    raise Unsupported(f"between the softmax and q @ k^T stands {node.name} = {node.target}")


def follow_sum(match: Match, node: fx.Node) -> Scores:
    """scores + mask, in either order."""
    reasons = []
    for source, mask in (node.args, reversed(node.args)):
        if not isinstance(source, fx.Node) or sizes(source) != sizes(node):
            continue
        try:
            scores = follow_scores(match, source)
        except Unsupported as reason:
            reasons.append(reason)
            continue
        if not isinstance(mask, fx.Node):
            return scores  # the softmax does not see a constant
        if len(sizes(mask)) > 4:
            raise Unsupported(f"the mask {mask.name} has more than four dimensions")
        scores.masks.append(mask)
        return scores
    raise reasons[0] if reasons else Unsupported(f"{node.name} adds tensors that are not the scores")


def combined(match: Match, masks: list[fx.Node]) -> fx.Node | None:
    """The masks that could not be read as one operand of rank 4; bool masks are all to hold, float masks are added."""
    if not masks:
        return None
    wide = [to_rank_4(match, mask) for mask in masks]
    booleans = [mask for mask in wide if dtype_of(mask) == torch.bool]
    floats = [mask for mask in wide if dtype_of(mask) != torch.bool]
    if booleans and floats:
        lowest = torch.finfo(dtype_of(floats[0])).min
        zero = match.call(aten.zeros_like.default, floats[0])
        condition = booleans.pop()
        for other in booleans:
            condition = match.call(aten.bitwise_and.Tensor, condition, other)
        floats.append(match.call(aten.where.ScalarOther, condition, zero, lowest))
        booleans = []
    target, rest = (aten.bitwise_and.Tensor, booleans) if booleans else (aten.add.Tensor, floats)
    result = rest[0]
    for mask in rest[1:]:
        result = match.call(target, result, mask)
    return result


def to_rank_4(match: Match, mask: fx.Node) -> fx.Node:
    for _ in range(4 - len(sizes(mask))):
        mask = match.call(aten.unsqueeze.default, mask, 0)
    return mask


# --- keys and values -------------------------------------------------------------------------------------------------


def untransposed(match: Match, transposed: fx.Node) -> fx.Node:
    """[..., D, T] --> [..., T, D], by taking a permutation back where there is one."""
    rank = len(sizes(transposed))
    dims = [*range(rank - 2), rank - 1, rank - 2]
    source = transposed
    if transposed.target == aten.permute.default:
        inner = [dim % rank for dim in transposed.args[1]]
        source, dims = transposed.args[0], [inner[dim] for dim in dims]
    return source if dims == sorted(dims) else match.call(aten.permute.default, source, dims)


def grouped_heads(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values without the repeats that give each query head its own: [B, H, T, D] --> [B, G, T, D]."""
    few_k, few_v = without_repeats(k), without_repeats(v)
    return (few_k, few_v) if sizes(few_k)[1] == sizes(few_v)[1] else (k, v)


def without_repeats(x: fx.Node) -> fx.Node:
    """The node of which `x` [B, H, T, D] repeats each head for a group of neighbouring query heads; else `x`."""
    source, repeated = x, False
    while source.op == "call_function" and source.target in VIEWS:
        repeated = repeated or source.target in REPEATS
        source = source.args[0]
        if repeated and is_repeat_of(x, source):
            return source
    return x


def is_repeat_of(x: fx.Node, source: fx.Node) -> bool:
    """Whether x[b, h, t, d] == source[b, h // (H / G), t, d]."""
    shape, few = sizes(x), sizes(source)
    if len(few) != 4 or (shape[0], shape[2], shape[3]) != (few[0], few[2], few[3]):
        return False
    if not (shape[1] / few[1]).is_Integer:
        return False
    inference = Inference(opaque=(source,))
    try:
        function = inference.infer(x)
    except NotInferred:
        return False
    b, h, t, d = (inference.index(name, size) for name, size in zip("bhtd", shape))
    group = inference.divmod(h, shape[1] / few[1])[0]
    element = function.at(b, h, t, d)
    return isinstance(element, sympy.Function) and element.args == (b, group, t, d)


def fuse_attention(graph: Graph) -> PassResult:
    """Replace attention by one op each; `misses` name what is left alone and masks that stay operands."""
    masks = Masks(graph)
    fuse = [Rule(name, pattern, partial(build, masks)) for name, (pattern, build) in RULES.items()]
    return rewrite(graph, [*fuse, Rule("mask", MASKED, partial(from_masked, masks))])
