"""Fuse the experts of a mixture: what carries tokens to their experts and back, with the experts' MLPs, is one op.

    sorted, perm = sort(experts);  ends = cumsum(histc(sorted))
    hidden = activation(grouped_mm(x[perm // K], up, ends));  rows = grouped_mm(hidden, down, ends) * scores[perm]
    sum over K of rows[inverse of perm]

    hidden = activation(bmm(up[experts], repeat_interleave(x, K)));  rows = bmm(down[experts], hidden) * scores
    sum over K of rows

        -->  effc.experts(x, experts, scores, up, down, activation="silu(gate) * up")

The activation may be any that `expressions` can say; it is read off the graph. Experts' weights that lie transposed,
or with the rows of gate and up in turns, are laid out by their recipes. Which op multiplies by groups depends on the
dtype and on how the graph was made: `GROUPED_MATMULS`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler.expressions import parse
from ..compiler.fold import base_weights, recipe_of
from ..compiler.graph import Graph, dtype_of, sizes
from ..compiler.ops import OPS
from ..compiler.pattern import Bindings, Pattern, any_, cast, const, maybe_cast, op, part, tensor
from ..compiler.rewrite import Match, Miss, PassResult, Rule, add_weight, rewrite
from ..compiler.weights import Reshape, Transpose, Weight, transposed
from .expression_reader import Reader, Unreadable

aten = torch.ops.aten
experts = OPS["experts"].target

GROUPED_MATMULS = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
"""By name: the second is registered by a library that need not be here."""

EXPERTS = op(aten.reshape.default, tensor("experts"), any_("flat"))
SCORES = op(aten.reshape.default, tensor("scores"), any_("flat_scores"))

SORT = op(aten.sort.default, EXPERTS, any_("axis"))
SORTED, PERM = op(operator.getitem, SORT, 0), op(operator.getitem, SORT, 1).named("perm")
COUNTS = op(aten.histc.default, maybe_cast(SORTED), const("bins"), 0, const("last"))
ENDS = op(aten.cumsum.default, COUNTS, 0, dtype=any_("count_type"))
NUMBERS = op(aten.arange.default, any_("pairs"), device=any_("device")).named("numbers")
INVERSE = op(aten.index_put.default, op(aten.empty_like.default, PERM), [PERM], NUMBERS)


@dataclass(frozen=True)
class Way:
    """How tokens get to their experts and back.

    chosen: the expert of each pair of token and expert. x, scores: those of each pair. multiply: a pair's product with
    a weight [E, ...] of its expert, which `turn` turns to [E, rows, depth]. back: values in the order of the tokens.
    """

    chosen: Pattern
    x: Pattern
    scores: Pattern
    multiply: Callable[[Pattern, Pattern], Pattern]
    turn: tuple[int, ...]
    back: Callable[[Pattern], Pattern] = lambda rows: rows

    def product(self, rows: Pattern, name: str) -> Pattern:
        """rows @ weight[e], e the expert of each row, perhaps plus bias[e]."""
        rows = self.multiply(rows, tensor(name))
        return op(aten.add.Tensor, rows, op(aten.index.Tensor, tensor(f"{name}_bias"), [self.chosen])) | rows

    @property
    def first(self) -> Pattern:
        return self.product(self.x, "up")

    @property
    def whole(self) -> Pattern:
        rows = self.product(tensor("hidden"), "down")
        weighted = op(aten.mul.Tensor, rows, op(aten.unsqueeze.default, self.scores, 1))
        of_tokens = op(aten.reshape.default, self.back(weighted), any_("sizes"))
        return op(aten.sum.dim_IntList, of_tokens.named("of_tokens"), [1])


def sorted_by_expert(targets: Iterable[Any]) -> Way:
    return Way(
        chosen=SORTED,
        x=op(aten.index.Tensor, tensor("x"), [op(aten.floor_divide.default, PERM, const("per_token"))]),
        scores=op(aten.index.Tensor, SCORES, [PERM]),
        multiply=lambda rows, weight: op(*targets, rows, weight, ENDS),
        turn=(0, 2, 1),
        back=lambda rows: op(aten.index.Tensor, rows, [INVERSE]),
    )


def with_weights_of_pairs(multiply: Callable[[Pattern, Pattern], Pattern], turn: tuple[int, ...]) -> Way:
    return Way(
        chosen=EXPERTS,
        x=op(aten.repeat_interleave.self_int, tensor("x"), const("per_token"), 0),
        scores=SCORES,
        multiply=lambda rows, weight: multiply(rows, op(aten.index.Tensor, weight, [EXPERTS])),
        turn=turn,
    )


def matrix_times_column(rows: Pattern, weights: Pattern) -> Pattern:
    return op(aten.squeeze.dim, op(aten.bmm.default, weights, op(aten.unsqueeze.default, rows, 2)), 2)


def row_times_matrix(rows: Pattern, weights: Pattern) -> Pattern:
    return op(aten.squeeze.dim, op(aten.bmm.default, op(aten.unsqueeze.default, rows, 1), weights), 1)


def ways(graph: Graph) -> list[Way]:
    """Those that a graph may have, by the products that it makes."""
    called = {node.target for node in graph.nodes if node.op == "call_function"}
    found = []
    if grouped := list(filter(is_grouped, called)):
        found.append(sorted_by_expert(grouped))
    if aten.bmm.default in called:
        found.append(with_weights_of_pairs(matrix_times_column, (0, 1, 2)))
        found.append(with_weights_of_pairs(row_times_matrix, (0, 2, 1)))
    return found


# --- the hidden values -----------------------------------------------------------------------------------------------

ALL, FIRST_HALF, SECOND_HALF, EVEN, ODD = "all", "the first half", "the second half", "the even", "the odd"
NAMES = {ALL: "up", FIRST_HALF: "gate", SECOND_HALF: "up", EVEN: "gate", ODD: "up"}
"""Which columns of the first product the hidden values read, and how the expression calls them."""

LAYOUTS = ({ALL}, {FIRST_HALF, SECOND_HALF}, {EVEN, ODD})
"""The columns that the op can give apart."""


class Columns:
    """What parts of the first product's columns are called. bindings: what the product bound too. parts: those read."""

    def __init__(self, match: Match, first: Pattern) -> None:
        self.first = first
        self.bindings = Bindings(match.graph, match.names, match.nodes)
        self.parts: set[str] = set()

    def name_of(self, node: fx.Node) -> str | None:
        """The name of a part of the columns of the first product, if that is what the node is."""
        for pattern in (self.first, part(self.first, "columns")):
            for found in pattern.match(node, self.bindings):
                columns = found.names.get("columns")
                names = {name: value for name, value in found.names.items() if name != "columns"}
                self.bindings = found._replace(names=names)
                which = ALL if columns is None else part_of_columns(*columns)
                self.parts.add(which)
                return NAMES[which]
        return None


def part_of_columns(start: int, stop: int, step: int, size: int) -> str:
    found = {
        (0, size, 1): ALL,
        (0, size // 2, 1): FIRST_HALF,
        (size // 2, size, 1): SECOND_HALF,
        (0, size, 2): EVEN,
        (1, size, 2): ODD,
    }.get((start, stop, step))
    if found is None or size % 2:
        raise Unreadable(f"columns {start}:{stop}:{step} of {size} are neither a half nor every other one")
    return found


# --- the op ----------------------------------------------------------------------------------------------------------


def to_experts(way: Way, match: Match) -> fx.Node | None:
    columns = Columns(match, way.first)
    reader = Reader("the hidden values", columns.name_of, has_rows=False)
    try:
        activation = reader.text(match["hidden"])
    except Unreadable as reason:
        return match.decline(str(reason))
    if columns.parts not in LAYOUTS:
        return match.decline(f"the hidden values read {' and '.join(sorted(columns.parts))} columns of the product")
    bindings = columns.bindings
    whole = Match(match.graph, match.root, bindings._replace(nodes=(*bindings.nodes, *reader.nodes)))
    if reason := misfit(whole):
        return match.decline(reason)
    weights = laid_out(whole, columns.parts, way.turn)
    if isinstance(weights, str):
        return match.decline(weights)
    operands = (whole["x"], whole["experts"], whole["scores"], *weights)
    return match.call(experts, *operands, ast.unparse(parse(activation)))


def misfit(match: Match) -> str | None:
    """Why the parts found do not make up a mixture of experts; None if they do."""
    chosen = sizes(match["experts"])
    tokens, count = sympy.prod(chosen[:-1]), sizes(match["down"])[0]
    bins, last = match.get("bins", count), match.get("last", count - 1)
    inner = (node for node in match.nodes if node not in (match.root, match.get("numbers")))
    if (shared := match.used_outside(inner)) is not None:
        return f"{shared.name} is used elsewhere too"
    if sizes(match["scores"]) != chosen:
        return f"scores {list(sizes(match['scores']))} and chosen experts {list(chosen)} differ in shape"
    if (match["per_token"], bins, last) != (chosen[-1], count, count - 1):
        return f"tokens are dealt out as if each chose {match['per_token']} of {bins} experts"
    if sizes(match.root)[0] != tokens or sizes(match["of_tokens"])[:2] != (tokens, chosen[-1]):
        return "what is sorted are not all choices of all tokens"
    if sizes(match["x"])[:-1] != (tokens,):
        return f"there are {tokens} choices of experts for {list(sizes(match['x']))} tokens"
    dtypes = {dtype_of(match[name]) for name in ("x", "up", "down", "hidden")} | {dtype_of(match.root)}
    if len(dtypes) > 1:
        return f"the tokens, the experts' weights and the result differ in dtype ({', '.join(map(str, dtypes))})"
    return None


def laid_out(match: Match, parts: set[str], turn: tuple[int, ...]) -> list[fx.Node | None] | str:
    """up, down, up_bias and down_bias as the op takes them; or why they cannot be."""
    graph, recipes = match.graph, []
    for name, dims in (("up", turn), ("down", turn), ("up_bias", (0, 1)), ("down_bias", (0, 1))):
        node = match.get(name)
        recipe = None if node is None else recipe_of(graph, node)
        if node is not None and recipe is None:
            return f"{node.name} is not a weight but computed at run time"
        if recipe is not None:
            recipe = transposed(recipe, dims)
            recipe = in_parts(recipe, parts) if name.startswith("up") else recipe
            base = base_weights(graph, node)[0]
            if recipe not in graph.weights.values() and len(base.users) > 1:
                return f"{base.name} is used elsewhere too: another layout of it would keep it twice"
            recipes.append((base.name, recipe))
        else:
            recipes.append(None)
    return [found and add_weight(graph, f"{found[0]}_{type(found[1]).__name__.lower()}", found[1]) for found in recipes]


def in_parts(recipe: Weight, parts: set[str]) -> Weight:
    """[E, P * N, ...]  -->  [E, P, N, ...], where gate and up may lie one behind the other, or row by row in turns."""
    count, rows, *rest = recipe.shape
    if EVEN not in parts:
        return Reshape(recipe, (count, len(parts), rows // len(parts), *rest))
    return Transpose(Reshape(recipe, (count, rows // 2, 2, *rest)), (0, 2, 1, *range(3, 3 + len(rest))))


def fuse_experts(graph: Graph) -> PassResult:
    """Replace the experts of each mixture by one op."""
    rules = []
    for way in ways(graph):
        build = partial(to_experts, way)
        rules += [Rule("experts", cast(way.whole), build), Rule("experts", way.whole, build)]
    result = rewrite(graph, rules)
    if not result.misses:
        stray = [node for node in graph.nodes if multiplies_by_expert(node)]
        result.misses += [Miss.at(node, "experts", STRAY) for node in stray]
    return result


STRAY = "what leads to the product of each expert, or what follows it, is not the known way to its tokens and back"


def is_grouped(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in GROUPED_MATMULS


def multiplies_by_expert(node: fx.Node) -> bool:
    """Whether a call multiplies each row with a weight of its own."""
    if node.target is not aten.bmm.default:
        return node.op == "call_function" and is_grouped(node.target)
    return any(
        isinstance(operand, fx.Node) and operand.target is aten.index.Tensor and operand.args[0].op == "placeholder"
        for operand in node.args
    )
