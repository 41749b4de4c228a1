"""Fuse attention, with its grouped heads and what its mask means.

    scaled_dot_product_attention(q, repeat(k), repeat(v), k_pos <= q_pos & attention_mask[b, k_pos])
    softmax(q @ repeat(k)^T * scale + where(k_pos <= q_pos & ..., 0, min)) @ repeat(v)

        -->  attention(q, k, v, scale, causal=True, key_mask=attention_mask)

The ways to write the scores are in `scores`; softcap and sinks become arguments too. Masks are inferred
(`compiler/masks.py`), not pattern-listed. One that cannot be read stays an explicit operand, and a miss says why.
Repeats of key and value heads are recognized by the same index algebra (`heads`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from ..compiler import ops  # noqa: F401  (registers the vocabulary)
from ..compiler.graph import Graph, dtype_of, sizes
from ..compiler.index_algebra import NotInferred
from ..compiler.masks import MaskForm, Masks
from ..compiler.pattern import any_, maybe_cast, op, tensor
from ..compiler.rewrite import Match, PassResult, Rule, erase_unused, replace, rewrite
from .heads import grouped_heads, not_widened, size_of, untransposed, with_heads
from .scores import Mask, Scores, Unsupported, follow_scores, sink_of_each_head

aten = torch.ops.aten
attention = torch.ops.effc.attention.default

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
COLUMNS = op(aten.slice.Tensor, SOFTMAX, any_("slice_dim"), any_("start"), any_("end")).named("columns")
WEIGHTS = maybe_cast(SOFTMAX | COLUMNS)
WEIGHTED_SUM = op(
    aten.matmul.default,
    aten.bmm.default,
    WEIGHTS | op(aten.reshape.default, WEIGHTS, any_("sizes")),
    tensor("v"),
)
"""The weighted sum of the values; `follow_scores` walks what is inside the softmax."""

GIVEN = {name: any_(name) for name in ("window", "softcap", "visible", "bias", "tables", "sinks")}
OPERANDS = tensor("q"), tensor("k"), tensor("v"), any_("scale"), any_("causal"), any_("key_mask")
MASKED = op(attention, *OPERANDS, tensor("mask"), **GIVEN)
TABLED = op(attention, *OPERANDS, any_("mask"), **GIVEN)


@dataclass
class Site:
    """One attention that was found: its operands, [B, H, S, D], and what `scores` says of the rest."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    causal: bool = False
    masks: list[fx.Node] = field(default_factory=list)
    softcap: float | None = None
    sinks: fx.Node | None = None


def from_sdpa(masks: Masks, match: Match) -> fx.Node | None:
    head_size = match.value("q").shape[-1]
    if match["dropout"] != 0:
        return match.decline(f"dropout of {match['dropout']} is random: call model.eval()")
    if match["scale"] is None and not isinstance(head_size, int):
        return match.decline("the head size is symbolic")
    scale = 1 / math.sqrt(head_size) if match["scale"] is None else match["scale"]
    if not isinstance(scale, (int, float)):
        return match.decline(f"the scale {scale} is not known while compiling")
    given = [] if match["mask"] is None else [Mask(match["mask"], len(sizes(match["q"])))]
    q, k, v = match["q"], match["k"], match["v"]
    try:
        q, k, v, given = of_rank_4(match, q, k, v, given)
    except Unsupported as reason:
        return match.decline(str(reason))
    return to_attention(masks, match, Site(q, k, v, scale, bool(match["causal"]), given))


def from_softmax(masks: Masks, match: Match) -> fx.Node | None:
    if match["dim"] not in (-1, match.value("scores").ndim - 1):
        return match.decline(f"softmax over dimension {match['dim']}, not over the keys")
    try:
        scores = follow_scores(match, match["scores"])
        check_columns(match, scores)
        sinks = None if scores.sinks is None else sink_of_each_head(scores.sinks)
        k = untransposed(match, scores.transposed_k)
        q, k, v, given = of_rank_4(match, scores.q, k, match["v"], scores.masks)
    except Unsupported as reason:
        return match.decline(str(reason))
    dtype = dtype_of(v)
    q, k = not_widened(q, dtype), not_widened(k, dtype)
    return to_attention(masks, match, Site(q, k, v, scores.scale, False, given, scores.softcap, sinks))


RULES = {"sdpa": (SDPA, from_sdpa), "softmax": (WEIGHTED_SUM, from_softmax)}


def check_columns(match: Match, scores: Scores) -> None:
    """Hold that the weights of the sinks, and no others, are cut off. Raises Unsupported."""
    if "columns" not in match:
        if scores.sinks is not None:
            raise Unsupported("the weight of the column that is appended to the scores is used")
        return
    kept, before = sizes(match["columns"]), sizes(match["scores"])
    if scores.sinks is None or kept[:-1] != before[:-1] or kept[-1] != before[-1] - 1:
        raise Unsupported("a part of the softmax's columns is used, not all but those of sinks")
    if (match["start"] or 0) != (1 if scores.sinks_first else 0):
        raise Unsupported("the column of sinks is used, and the weight of a key is not")


def of_rank_4(
    match: Match, q: fx.Node, k: fx.Node, v: fx.Node, masks: list[Mask]
) -> tuple[fx.Node, fx.Node, fx.Node, list[fx.Node]]:
    """q, k, v and masks as [B, H, ...], where they had batch and heads in one dimension. Raises Unsupported."""
    ranks = [len(sizes(x)) for x in (q, k, v)]
    if ranks == [4, 4, 4] and all(mask.rank == 4 for mask in masks):
        return q, k, v, [mask.node for mask in masks]
    if not set(ranks) <= {3, 4}:
        raise Unsupported(f"expected q, k and v of rank 4 (batch, heads, length, head size), found ranks {ranks}")
    if sizes(q)[0] == 1 or len({sizes(x)[0] for x in (q, k, v)}) != 1:
        raise Unsupported(
            f"batch and heads are not one dimension of all of q, k and v: {[sizes(x) for x in (q, k, v)]}"
        )
    merged = [mask for mask in masks if mask.rank == 3 and len(sizes(mask.node)) == 3]
    q4, k4, v4, *split = with_heads(match, q, k, v, *(mask.node for mask in merged))
    if sizes(q4)[1] == 1 and len(merged) < len(masks):
        raise Unsupported("batch and heads of q are one dimension")
    nodes = dict(zip(merged, split))
    return q4, k4, v4, [nodes.get(mask, mask.node) for mask in masks]


def to_attention(masks: Masks, match: Match, site: Site) -> fx.Node | None:
    """The fused op, with heads ungrouped and the masks that can be read turned into its arguments."""
    q, k, v = site.q, site.k, site.v
    if len({dtype_of(x) for x in (q, k, v, match.root)}) != 1:
        return match.decline("q, k, v and the result differ in dtype")
    if any(sizes(x)[0] != sizes(q)[0] for x in (k, v)):
        return match.decline("q, k and v differ in batch size")
    k, v = grouped_heads(match, k, v)
    heads, groups = sizes(q)[1], sizes(k)[1]
    if groups != sizes(v)[1] or not (heads / groups).is_Integer:
        return match.decline(f"{heads} query heads do not divide among {groups} key and {sizes(v)[1]} value heads")
    form, explicit = masks.read_together(site.masks, (*sizes(q)[:3], sizes(k)[2]))
    form = dataclasses.replace(form, causal=site.causal or form.causal)
    arguments = {"softcap": site.softcap, "sinks": site.sinks}
    fused = call(match, (q, k, v, float(site.scale)), form, combined(match, list(explicit)), arguments)
    erase_unused(match.graph, *site.masks)
    return of_the_root(match, fused)


def from_masked(masks: Masks, match: Match) -> fx.Node | None:
    """attention(..., mask)  -->  attention(..., causal=True, key_mask=...), where the mask can be read."""
    q, k = match["q"], match["k"]
    try:
        form = both(given_form(match), masks.read(match["mask"], (*sizes(q)[:3], sizes(k)[2])), match["mask"])
    except NotInferred as reason:
        return match.decline(f"the mask stays an operand: {reason}")
    arguments = {name: match[name] for name in ("softcap", "sinks")}
    return call(match, (q, k, match["v"], match["scale"]), form, None, arguments)


def from_tables(masks: Masks, match: Match) -> fx.Node | None:
    """attention(..., bias="t0[h] * t1[b, k]", tables=[slopes, cumsum(ones)])  -->  attention(..., bias="t0[h] * k")"""
    given, (q, k) = given_form(match), (match["q"], match["k"])
    try:
        form = masks.reread(given, (*sizes(q)[:3], sizes(k)[2])) if given.tables else given
    except NotInferred:
        return None
    if form == given or set(form.tables) >= set(given.tables):
        return None
    arguments = {name: match[name] for name in ("softcap", "sinks")}
    return call(match, (q, k, match["v"], match["scale"]), form, match["mask"], arguments)


def given_form(match: Match) -> MaskForm:
    tables = tuple(match["tables"] or ())
    return MaskForm(match["causal"], match["window"], match["key_mask"], match["visible"], match["bias"], tables)


def call(
    match: Match, operands: tuple[Any, ...], form: MaskForm, mask: fx.Node | None, arguments: dict[str, Any]
) -> fx.Node:
    """The op with operands (q, k, v, scale), leaving out the arguments that say nothing."""
    named = {"window": form.window, "visible": form.visible, "bias": form.bias, **arguments}
    if form.tables:
        named["tables"] = list(form.tables)
    named = {name: value for name, value in named.items() if value is not None}
    key_mask = of_the_keys(match, form.key_mask, *operands[:2])
    return match.call(attention, *operands, form.causal, key_mask, mask, **named)


def of_the_root(match: Match, fused: fx.Node) -> fx.Node:
    """The result in the shape of what is replaced: [B * H, S, D] where batch and heads were one dimension.

    A reshape that takes them apart again is replaced by the result itself.
    """
    root = match.root
    if len(sizes(root)) == 4:
        return fused
    for user in list(root.users):
        if user.target == aten.reshape.default and sizes(user) == sizes(fused):
            replace(match.graph, user, fused)
    return match.call(aten.reshape.default, fused, [-1, size_of(match, fused, 2), size_of(match, fused, 3)])


# --- masks -----------------------------------------------------------------------------------------------------------


def both(left: MaskForm, right: MaskForm, mask: fx.Node) -> MaskForm:
    """The form of two masks that hold together. Raises NotInferred where two inputs hide keys."""
    if None not in (left.key_mask, right.key_mask) and left.key_mask is not right.key_mask:
        raise NotInferred(mask, "it hides other keys than the key mask given")
    windows = [window for window in (left.window, right.window) if window is not None]
    visible, bias = (renumbered(text, len(left.tables)) for text in (right.visible, right.bias))
    return MaskForm(
        causal=left.causal or right.causal,
        window=min(windows, default=None),
        key_mask=left.key_mask or right.key_mask,
        visible=joined("&", left.visible, visible),
        bias=joined("+", left.bias, bias),
        tables=(*left.tables, *right.tables),
    )


def joined(operator: str, *expressions: str | None) -> str | None:
    given = [text for text in expressions if text is not None]
    return f" {operator} ".join(f"({text})" for text in given) if len(given) > 1 else next(iter(given), None)


def renumbered(expression: str | None, behind: int) -> str | None:
    """An expression whose tables t0, t1, ... stand behind `behind` others."""
    return expression and re.sub(r"\bt(\d+)\b", lambda found: f"t{int(found[1]) + behind}", expression)


def of_the_keys(match: Match, key_mask: fx.Node | None, q: fx.Node, k: fx.Node) -> fx.Node | None:
    """The part [B, T] of a key mask that may be of a longer context: its sizes are those of q and k."""
    for dim, (source, source_dim) in enumerate(((q, 0), (k, 2))):
        if key_mask is not None and sizes(key_mask)[dim] != sizes(source)[source_dim]:
            key_mask = match.call(aten.slice.Tensor, key_mask, dim, 0, size_of(match, source, source_dim))
    return key_mask


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


def fuse_attention(graph: Graph) -> PassResult:
    """Replace attention by one op each; `misses` name what is left alone and masks that stay operands."""
    masks = Masks(graph)
    fuse = [Rule(name, pattern, partial(build, masks)) for name, (pattern, build) in RULES.items()]
    reread = Rule("mask", MASKED, partial(from_masked, masks)), Rule("tables", TABLED, partial(from_tables, masks))
    return rewrite(graph, [*fuse, *reread])
