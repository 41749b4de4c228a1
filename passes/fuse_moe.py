"""Fuse mixtures of experts: the router that chooses experts, the experts and the residual are one op.

    values, indices = topk(x, k)  -->  gather(x, indices), indices = effc.top_k(x, k)

    values = softmax(linear(x, router));  chosen = top_k(values, k);  scores = gather(values, chosen)
    effc.experts(x, chosen, scores / sum(scores), up, down)

        -->  effc.moe(x, router, up, down, k, values="softmax(logits)", weights="chosen / sum(chosen)")

    reshape(effc.moe(reshape(x), router, ...))  -->  effc.moe(x, router, ...)
    r + effc.moe(x, router, ...)                -->  effc.moe(x, router, ..., residual=r)

How a router scores, ranks and weights experts may be any that `expressions` can say; it is read off the graph.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler.expressions import parse
from ..compiler.fold import recipe_of, weight_of
from ..compiler.graph import Graph, dtype_of, is_tensor, sizes
from ..compiler.ops import OPS
from ..compiler.pattern import CASTS, Bindings, Pattern, any_, arguments, cast, const, op, tensor
from ..compiler.rewrite import Match, PassResult, Rule, add_weight, rewrite
from ..compiler.weights import Reshape
from .expression_reader import Reader, Unreadable

aten = torch.ops.aten
top_k, experts, moe = (OPS[name].target for name in ("top_k", "experts", "moe"))

MOST_CHOSEN = 16
"""The largest k for which top_k replaces topk: it takes the entries one by one."""

TOPK = op(aten.topk.default, tensor("x"), const("k"), any_("dim"), any_("largest"), any_("sorted"))
TOPK_PART = op(operator.getitem, TOPK, const("part"))


def call(target: Any, **patterns: Pattern | None) -> Pattern:
    """A call of an effc op with these arguments and any others."""
    names = [argument.name for argument in target._schema.arguments]
    return op(target, *(patterns.get(name, any_(name)) for name in names))


EXPERTS = call(experts, x=tensor("x"), experts=op(top_k, tensor("ranks"), const("k")).named("chosen"))
MOE_OF_ROWS = op(
    aten.reshape.default,
    call(moe, x=op(aten.reshape.default, tensor("x"), any_("rows")), residual=None).named("moe").only_user(),
    any_("sizes"),
)
RESIDUAL = op(aten.add.Tensor, call(moe, residual=None).named("moe").only_user(), tensor("addend"))


PARTS = op(aten.reshape.default, tensor("ungrouped"), any_("parts")).named("groups")
SUMS = op(
    aten.sum.dim_IntList,
    op(aten.gather.default, PARTS, any_("axis"), op(top_k, PARTS, const("best"))),
    any_("summed"),
).named("sums")
KEPT = op(
    aten.scatter.value,
    op(aten.zeros_like.default, SUMS, **dict.fromkeys(("dtype", "layout", "device", "pin_memory"), any_("like"))),
    any_("last"),
    op(top_k, SUMS, const("kept")),
    1,
)
OF_ENTRIES = op(
    aten.reshape.default,
    op(aten.expand.default, op(aten.unsqueeze.default, KEPT, 2), any_("expanded")),
    any_("whole"),
)
OF_BEST_GROUPS = op(
    aten.masked_fill.Scalar,
    tensor("ungrouped"),
    op(aten.bitwise_not.default, cast(OF_ENTRIES, torch.bool)),
    float("-inf"),
)


# --- the router ------------------------------------------------------------------------------------------------------


class Router:
    """What a router computes, read backwards from the scores of the experts that it chose.

    logits: its product. correction: what it adds for each expert. gathered: the values of all experts, of which the
    scores are those that were chosen.
    """

    def __init__(self, match: Match) -> None:
        self.graph, self.chosen, self.x = match.graph, match["chosen"], match["x"]
        self.logits: fx.Node | None = None
        self.correction: fx.Node | None = None
        self.gathered: fx.Node | None = None
        self.gathers: list[fx.Node] = []
        weights = Reader("the scores", self.of_chosen)
        self.weights = weights.text(match["scores"])
        if self.gathered is None:
            raise Unreadable("the scores are not those of the experts chosen")
        values = Reader("the values of experts", self.of_logits)
        self.values = values.text(self.gathered)
        ranks = Reader("the ranks of experts", self.of_values)
        self.ranks = self.of_groups(match["ranks"], ranks) or ranks.text(match["ranks"])
        if self.logits is None:
            raise Unreadable("no product of the tokens with a weight is among the ranks of experts")
        self.nodes = (*weights.nodes, *self.gathers, *values.nodes, *ranks.nodes, self.logits)

    def of_chosen(self, node: fx.Node) -> str | None:
        """The values of the chosen experts."""
        if node.target is not aten.gather.default or node.args[2] is not self.chosen:
            return None
        source, axis = node.args[:2]
        if self.gathered not in (None, source) or axis % len(sizes(node)) != len(sizes(node)) - 1:
            return None
        self.gathered = source
        self.gathers.append(node)
        return "chosen"

    def of_values(self, node: fx.Node) -> str | None:
        return "values" if node is self.gathered else self.of_logits(node)

    def of_groups(self, node: fx.Node, ranks: Reader) -> str | None:
        """A choice of the groups that experts may be chosen from."""
        for found in OF_BEST_GROUPS.match(node, Bindings(self.graph, {}, ())):
            groups = sizes(found.names["groups"])
            last = len(groups) - 1
            if sizes(found.names["sums"]) != groups[:-1] or found.names["axis"] % (last + 1) != last:
                continue
            ranks.nodes += found.nodes
            text = ranks.text(found.names["ungrouped"])
            return f"of_best_groups({text}, {groups[-2]}, {found.names['kept']}, {found.names['best']})"
        return None

    def of_logits(self, node: fx.Node) -> str | None:
        """The product of the tokens with a weight, or a weight with one entry an expert."""
        if node is self.logits or (node.target is aten.linear.default and self.is_product(node)):
            self.logits = node
            return "logits"
        if is_tensor(node) and recipe_of(self.graph, node) is not None and self.correction in (None, node):
            if sympy.prod(sizes(node)) != sizes(self.chosen.args[0])[-1] or sizes(node)[-1] == 1:
                raise Unreadable(f"{node.name} has not one entry for each expert")
            self.correction = node
            return "correction"
        return None

    def is_product(self, node: fx.Node) -> bool:
        """Whether a linear multiplies the tokens, in any dtype, with weights; and the only one that does."""
        x, weight, bias = (*node.args, None)[:3]
        source = x.args[0] if x.target in CASTS else x
        computed = [operand for operand in (weight, bias) if operand is not None and not recipe_of(self.graph, operand)]
        return self.logits is None and source is self.x and not computed


def to_moe(match: Match) -> fx.Node | None:
    try:
        router = Router(match)
    except Unreadable as reason:
        return match.decline(str(reason))
    graph = match.graph
    whole = Match(graph, match.root, Bindings(graph, match.names, (*match.nodes, *router.nodes)))
    if (shared := whole.used_outside(node for node in whole.nodes if node is not match.root)) is not None:
        return match.decline(f"{shared.name} is used elsewhere too")
    x, weight, bias = (*router.logits.args, None)[:3]
    if dtype_of(x) != dtype_of(weight):
        return match.decline(f"the router is {dtype_of(weight)}, what it multiplies {dtype_of(x)}")
    given = {
        **{name: match[name] for name in ("x", "k", "up", "down", "up_bias", "down_bias", "activation")},
        "router": weight_of(graph, weight),
        "router_bias": bias and weight_of(graph, bias),
        "correction": router.correction and vector_of(graph, router.correction),
        "residual": None,
        **{name: ast.unparse(parse(getattr(router, name))) for name in ("values", "ranks", "weights")},
    }
    return match.call(moe, *in_order(given))


def vector_of(graph: Graph, node: fx.Node) -> fx.Node:
    """The weight that holds the numbers of `node` [1, ..., E] as [E]."""
    if len(sizes(node)) == 1:
        return weight_of(graph, node)
    recipe = recipe_of(graph, node)
    return add_weight(graph, f"{node.name}_vector", Reshape(recipe, recipe.shape[-1:]))


def in_order(named: Mapping[str, Any]) -> list[Any]:
    return [named[argument.name] for argument in moe._schema.arguments]


# --- what is around it -----------------------------------------------------------------------------------------------


def to_moe_of_tokens(match: Match) -> fx.Node | None:
    """Leading axes that are flattened for the experts and restored after them stay as they are."""
    x = match["x"]
    if sizes(x) != sizes(match.root):
        return match.decline("the reshape after the experts is not that before them undone")
    return match.call(moe, *in_order({**arguments(match["moe"]), "x": x}))


def to_residual(match: Match) -> fx.Node | None:
    residual, found = match["addend"], match["moe"]
    if sizes(residual) != sizes(found) or dtype_of(residual) != dtype_of(found):
        return match.decline(f"{residual.name} and the mixture of experts differ in shape or dtype")
    return match.call(moe, *in_order({**arguments(found), "residual": residual}))


def to_top_k(match: Match) -> fx.Node | None:
    x, k = match["x"], match["k"]
    axis = len(sizes(x)) - 1
    if match["dim"] % (axis + 1) != axis or not match["largest"]:
        return match.decline("it takes the smallest entries, or works along another axis than the last")
    if k > MOST_CHOSEN:
        return match.decline(f"it takes {k} entries of a row, more than {MOST_CHOSEN}")
    made = (user for user in x.users if user.target is top_k and user.args[1] == k)
    indices = next(made, None) or match.call(top_k, x, k)
    return indices if match["part"] == 1 else match.call(aten.gather.default, x, axis, indices)


RULES = (
    Rule("top_k", TOPK_PART, to_top_k),
    Rule("moe", EXPERTS, to_moe),
    Rule("moe of rows", MOE_OF_ROWS, to_moe_of_tokens),
    Rule("moe with residual", RESIDUAL, to_residual),
)


def fuse_moe(graph: Graph) -> PassResult:
    """Replace the router and the experts of each mixture by one op, and the choice of entries by one with a kernel."""
    return rewrite(graph, RULES)
