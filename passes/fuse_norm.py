"""Fuse root mean square norms, and layer norms that are written out.

    weight * (x * rsqrt(mean(x**2, -1) + eps))  -->  rms_norm(x, weight, eps)
    rms_norm(x - mean(x, -1), weight, eps)      -->  layer_norm(x, [K], weight, None, eps)

with x in fp32 inside and rounded back before the scale (Llama) or after it (Gemma, whose scale is 1 + weight: the
sum becomes part of the weight's recipe). `aten.layer_norm` itself has a kernel and needs no rewrite.
"""

from __future__ import annotations

import torch
from torch import fx

from ..compiler.fold import recipe_of, weight_of
from ..compiler.graph import Graph, dtype_of, sizes
from ..compiler.ops import OPS
from ..compiler.pattern import any_, cast, closed, const, maybe_cast, op, tensor
from ..compiler.rewrite import Match, PassResult, Rule, add_weight, rewrite
from ..compiler.weights import Cast
from .normalize import holds

aten = torch.ops.aten
rms_norm = OPS["rms_norm"].target

X = tensor("x")
WIDE = maybe_cast(X).named("wide")
SQUARE = op(aten.pow.Tensor_Scalar, WIDE, 2)
MEAN_SQUARE = op(aten.add.Tensor, op(aten.mean.dim, SQUARE, any_("dims"), True), const("eps"))
ROOT = op(aten.sqrt.default, MEAN_SQUARE)
RECIPROCAL_ROOT = (
    op(aten.rsqrt.default, MEAN_SQUARE) | op(aten.reciprocal.default, ROOT) | op(aten.div.Tensor, 1.0, ROOT)
)
NORMALIZED = op(aten.mul.Tensor, WIDE, RECIPROCAL_ROOT) | op(aten.div.Tensor, WIDE, ROOT)
ROUNDED = cast(NORMALIZED)
SCALED_ROUNDED = op(aten.mul.Tensor, (ROUNDED | NORMALIZED).named("normalized"), tensor("scale"))
SCALED_WIDE = cast(op(aten.mul.Tensor, NORMALIZED.named("normalized"), tensor("scale")))
COMPOSITE = op(aten.rms_norm.default, X, any_("shape"), any_("scale"), any_("eps"))
CENTERED = op(aten.sub.Tensor, WIDE, op(aten.mean.dim, WIDE, any_("dims"), True))
LAYER_NORM = op(rms_norm, CENTERED, any_("weight"), any_("eps"), any_("scale_in_fp32"))


def unfit(match: Match) -> str | None:
    """Why the inner part of a match is not the norm of `ops.rms_norm`; None if it is."""
    rank = match.value("x").ndim
    if [dim % max(rank, 1) for dim in match["dims"]] != [rank - 1]:
        return f"the mean is over dimensions {list(match['dims'])} of {rank}, not over the last"
    if match.value("wide").dtype not in (torch.float32, torch.float64):
        return f"it is computed in {match.value('wide').dtype}, not in fp32"
    if match.value("wide").dtype == torch.float64 and match.value("x").dtype != torch.float64:
        return "it is computed in fp64 for an input of lower precision"
    return None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_weight(match: Match) -> fx.Node | None:
    """The scale as a weight of one entry per channel; None if it is anything else."""
    recipe = recipe_of(match.graph, match["scale"])
    fits = recipe is not None and recipe.shape == tuple(match.value("x").shape[-1:])
    return weight_of(match.graph, match["scale"]) if fits else None


def to_rms_norm_scaled_rounded(match: Match) -> fx.Node | None:
    dtype = match.value("x").dtype
    if match.value("normalized").dtype != dtype:
        return None
    if reason := unfit(match):
        return match.decline(reason)
    if dtype_of(match.root) != dtype:
        return match.decline(f"the scale turns {dtype} into {dtype_of(match.root)}")
    if (weight := norm_weight(match)) is None:
        return match.decline(f"the scale {match['scale'].name} is not a weight with one entry per channel")
    return match.call(rms_norm, match["x"], weight, float(match["eps"]))


def to_rms_norm_scaled_wide(match: Match) -> fx.Node | None:
    if reason := unfit(match):
        return match.decline(reason)
    if dtype_of(match.root) != match.value("x").dtype:
        return match.decline(f"the result is rounded to {dtype_of(match.root)}, not to the input's dtype")
    if (weight := norm_weight(match)) is None:
        return match.decline(f"the scale {match['scale'].name} is not a weight with one entry per channel")
    return match.call(rms_norm, match["x"], weight, float(match["eps"]), True)


def to_rms_norm(match: Match) -> fx.Node | None:
    if dtype_of(match.root) != match.value("x").dtype:
        return None
    if reason := unfit(match):
        return match.decline(reason)
    return match.call(rms_norm, match["x"], None, float(match["eps"]))


def to_rms_norm_from_composite(match: Match) -> fx.Node | None:
    """torch's own rms_norm: computed and scaled in fp32, then rounded."""
    x = match.value("x")
    if len(match["shape"]) != 1:
        return match.decline(f"it normalizes over the last {len(match['shape'])} dimensions, not over one")
    eps = match["eps"] if match["eps"] is not None else torch.finfo(wide_dtype(x.dtype)).eps
    weight = match["scale"]
    if weight is not None and (weight := norm_weight(match)) is None:
        return match.decline(f"the scale {match['scale'].name} is not a weight with one entry per channel")
    in_fp32 = weight is not None and x.dtype not in (torch.float32, torch.float64)
    return match.call(rms_norm, match["x"], weight, float(eps), *(True,) * in_fp32)


def to_layer_norm(match: Match) -> fx.Node | None:
    """The same in the input's own dtype if it is widened and the result is rounded back: layer_norm does so inside."""
    if reason := unfit(match):
        return match.decline(reason)
    x, weight = match["wide"], match["weight"]
    if dtype_of(match.root) == match.value("x").dtype:
        x = match["x"]
    elif dtype_of(match.root) != dtype_of(x):
        return match.decline(f"the result is rounded to {dtype_of(match.root)}, not to the input's dtype")
    if weight is not None:
        recipe = match.graph.weights.get(weight.name)
        if isinstance(recipe, Cast) and recipe.source.dtype == dtype_of(x) and holds(dtype_of(x), recipe.dtype):
            weight = add_weight(match.graph, f"{weight.name}_{dtype_of(x)}".replace("torch.", ""), recipe.source)
    return match.call(aten.layer_norm.default, x, [int(sizes(x)[-1])], weight, None, float(match["eps"]))


# What rounds at the end comes first: inside it, the same norm of the widened input would match too.
RULES = (
    Rule("rms_norm, scaled in fp32", closed(SCALED_WIDE, "wide"), to_rms_norm_scaled_wide),
    Rule("rms_norm, scaled after rounding", closed(SCALED_ROUNDED, "wide"), to_rms_norm_scaled_rounded),
    Rule("rms_norm, rounded", closed(ROUNDED, "wide"), to_rms_norm),
    Rule("rms_norm without scale", closed(NORMALIZED, "wide"), to_rms_norm),
    Rule("rms_norm of torch", COMPOSITE, to_rms_norm_from_composite),
    Rule("layer_norm", closed(cast(LAYER_NORM), "wide"), to_layer_norm),
    Rule("layer_norm in one dtype", closed(LAYER_NORM, "wide"), to_layer_norm),
)


def fuse_norm(graph: Graph) -> PassResult:
    return rewrite(graph, RULES)
