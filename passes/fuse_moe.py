"""Fuse mixtures of experts: what carries tokens to their experts and back, with the experts' MLPs, is one op.

    sorted, perm = sort(experts);  ends = cumsum(histc(sorted))
    hidden = activation(grouped_mm(x[perm // K], up, ends));  rows = grouped_mm(hidden, down, ends) * scores[perm]
    sum over K of rows[inverse of perm]

        -->  effc.moe(x, experts, scores, up, down, activation="silu(gate) * up")

    values, indices = topk(x, k)  -->  gather(x, indices), indices = effc.top_k(x, k)

The activation may be any that `gate_expressions` can say; it is read off the graph. Experts' weights that lie
transposed, or with the rows of gate and up in turns, are laid out by their recipes. Which op multiplies by groups
depends on the dtype and on how the graph was made: `GROUPED_MATMULS`.
"""

from __future__ import annotations

import ast
import operator
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler.fold import base_weights, recipe_of, transposed
from ..compiler.gate_expressions import BINARY, FUNCTIONS, parse
from ..compiler.graph import Graph, dtype_of, is_tensor, sizes
from ..compiler.ops import OPS
from ..compiler.pattern import Bindings, Pattern, any_, arguments, cast, const, maybe_cast, op, part, tensor
from ..compiler.rewrite import Match, Miss, PassResult, Rule, add_weight, rewrite
from ..compiler.weights import Reshape, Transpose, Weight

aten = torch.ops.aten
top_k, moe = OPS["top_k"].target, OPS["moe"].target

GROUPED_MATMULS = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
"""By name: the second is registered by a library that need not be here."""

MOST_CHOSEN = 16
"""The largest k for which top_k replaces topk: it takes the entries one by one."""

TOPK = op(aten.topk.default, tensor("x"), const("k"), any_("dim"), any_("largest"), any_("sorted"))
TOPK_PART = op(operator.getitem, TOPK, const("part"))

SORT = op(aten.sort.default, op(aten.reshape.default, tensor("experts"), any_("flat")), any_("axis"))
SORTED, PERM = op(operator.getitem, SORT, 0), op(operator.getitem, SORT, 1).named("perm")
COUNTS = op(aten.histc.default, maybe_cast(SORTED), const("bins"), 0, const("last"))
ENDS = op(aten.cumsum.default, COUNTS, 0, dtype=any_("count_type"))
NUMBERS = op(aten.arange.default, any_("pairs"), device=any_("device")).named("numbers")
INVERSE = op(aten.index_put.default, op(aten.empty_like.default, PERM), [PERM], NUMBERS)
X_OF_PAIRS = op(aten.index.Tensor, tensor("x"), [op(aten.floor_divide.default, PERM, const("per_token"))])
SCORES_OF_PAIRS = op(aten.index.Tensor, op(aten.reshape.default, tensor("scores"), any_("flat_scores")), [PERM])


def product(targets: list[Any], rows: Pattern, name: str) -> Pattern:
    """rows @ weight[e], e the expert of each row, perhaps plus bias[e]."""
    rows = op(*targets, rows, tensor(name), ENDS)
    return op(aten.add.Tensor, rows, op(aten.index.Tensor, tensor(f"{name}_bias"), [SORTED])) | rows


def experts_of_tokens(targets: list[Any]) -> Pattern:
    rows = product(targets, tensor("hidden"), "down")
    weighted = op(aten.mul.Tensor, rows, op(aten.unsqueeze.default, SCORES_OF_PAIRS, 1))
    of_tokens = op(aten.reshape.default, op(aten.index.Tensor, weighted, [INVERSE]), any_("sizes"))
    return op(aten.sum.dim_IntList, of_tokens.named("of_tokens"), [1])


# --- the hidden values -----------------------------------------------------------------------------------------------

ALL, FIRST_HALF, SECOND_HALF, EVEN, ODD = "all", "the first half", "the second half", "the even", "the odd"
NAMES = {ALL: "up", FIRST_HALF: "gate", SECOND_HALF: "up", EVEN: "gate", ODD: "up"}
"""Which columns of the first product the hidden values read, and how the expression calls them."""

LAYOUTS = ({ALL}, {FIRST_HALF, SECOND_HALF}, {EVEN, ODD})
"""The columns that the op can give apart."""


class Unreadable(Exception):
    """Why the hidden values are no expression over the first product."""


class Reader:
    """Reads the hidden values as an expression over the experts' first product.

    bindings: what the match bound, then what the first product binds too. parts: which of its columns were read.
    """

    def __init__(self, match: Match, first: Pattern) -> None:
        self.first, self.dtype = first, dtype_of(match["hidden"])
        self.bindings = Bindings(match.graph, match.names, match.nodes)
        self.parts: set[str] = set()
        self.texts: dict[fx.Node, str] = {}

    def text(self, value: Any) -> str:
        """The expression of a node or number. Raises Unreadable with what is in the way."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return repr(value)
        if not is_tensor(value):
            raise Unreadable(f"the hidden values depend on {value}")
        if value not in self.texts:
            self.texts[value] = self.column(value) or self.call(value)
        return self.texts[value]

    def column(self, node: fx.Node) -> str | None:
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

    def call(self, node: fx.Node) -> str:
        if node.op != "call_function":
            raise Unreadable(f"the hidden values depend on {node.name}")
        if dtype_of(node) != self.dtype:
            raise Unreadable(f"{node.name} is {dtype_of(node)}, the hidden values are {self.dtype}")
        named = arguments(node)
        operands = [self.text(value) for value in node.args if not (value is None or isinstance(value, str))]
        self.bindings = self.bindings._replace(nodes=(*self.bindings.nodes, node))
        if node.target is aten.clamp.default:
            low, high = named["min"], named["max"]
            text = operands[0] if low is None else f"maximum({operands[0]}, {low!r})"
            return text if high is None else f"minimum({text}, {high!r})"
        if node.target in OPERATORS and named.get("alpha", 1) == 1:
            return f"({f' {OPERATORS[node.target]} '.join(operands)})"
        if node.target is aten.gelu.default and named["approximate"] == "tanh":
            return f"gelu_tanh({operands[0]})"
        if node.target in CALLS:
            return f"{CALLS[node.target]}({', '.join(operands)})"
        raise Unreadable(f"the hidden values are made by {node.target} ({node.name}), which no activation has")


OPERATORS = {BINARY[kind]: sign for kind, sign in ((ast.Add, "+"), (ast.Sub, "-"), (ast.Mult, "*"), (ast.Div, "/"))}
CALLS = {target: name for name, target in FUNCTIONS.items() if name != "gelu_tanh"}


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


def to_moe(first: Pattern, match: Match) -> fx.Node | None:
    reader = Reader(match, first)
    try:
        activation = reader.text(match["hidden"])
    except Unreadable as reason:
        return match.decline(str(reason))
    if reader.parts not in LAYOUTS:
        return match.decline(f"the hidden values read {' and '.join(sorted(reader.parts))} columns of the product")
    whole = Match(match.graph, match.root, reader.bindings)
    if reason := misfit(whole):
        return match.decline(reason)
    weights = laid_out(whole, in_turns=EVEN in reader.parts)
    if isinstance(weights, str):
        return match.decline(weights)
    operands = (whole["x"], whole["experts"], whole["scores"], *weights)
    return match.call(moe, *operands, ast.unparse(parse(activation)))


def misfit(match: Match) -> str | None:
    """Why the parts found do not make up a mixture of experts; None if they do."""
    chosen = sizes(match["experts"])
    tokens, pairs = sympy.prod(chosen[:-1]), sympy.prod(chosen)
    count = sizes(match["down"])[0]
    inner = (node for node in match.nodes if node not in (match.root, match["numbers"]))
    if (shared := match.used_outside(inner)) is not None:
        return f"{shared.name} is used elsewhere too"
    if sizes(match["scores"]) != chosen:
        return f"scores {list(sizes(match['scores']))} and chosen experts {list(chosen)} differ in shape"
    if (match["per_token"], match["bins"], match["last"]) != (chosen[-1], count, count - 1):
        return f"tokens are dealt out as if each chose {match['per_token']} of {match['bins']} experts"
    if sizes(match["perm"]) != (pairs,) or sizes(match["of_tokens"])[:2] != (tokens, chosen[-1]):
        return "what is sorted are not all choices of all tokens"
    if sizes(match["x"])[:-1] != (tokens,):
        return f"there are {tokens} choices of experts for {list(sizes(match['x']))} tokens"
    dtypes = {dtype_of(match[name]) for name in ("x", "up", "down", "hidden")} | {dtype_of(match.root)}
    if len(dtypes) > 1:
        return f"the tokens, the experts' weights and the result differ in dtype ({', '.join(map(str, dtypes))})"
    return None


def laid_out(match: Match, in_turns: bool) -> list[fx.Node | None] | str:
    """up, down, up_bias and down_bias as the op takes them; or why they cannot be."""
    graph, recipes = match.graph, []
    for name, turn in (("up", (0, 2, 1)), ("down", (0, 2, 1)), ("up_bias", (0, 1)), ("down_bias", (0, 1))):
        node = match.get(name)
        recipe = None if node is None else recipe_of(graph, node)
        if node is not None and recipe is None:
            return f"{node.name} is not a weight but computed at run time"
        if recipe is not None:
            recipe = transposed(recipe, turn)
            recipe = gathered(recipe) if in_turns and name.startswith("up") else recipe
            base = base_weights(graph, node)[0]
            if recipe not in graph.weights.values() and len(base.users) > 1:
                return f"{base.name} is used elsewhere too: another layout of it would keep it twice"
            recipes.append((base.name, recipe))
        else:
            recipes.append(None)
    return [found and add_weight(graph, f"{found[0]}_{type(found[1]).__name__.lower()}", found[1]) for found in recipes]


def gathered(recipe: Weight) -> Weight:
    """Rows gate0, up0, gate1, up1, ... of each expert  -->  all of gate, then all of up."""
    experts, rows, *rest = recipe.shape
    pairs = Reshape(recipe, (experts, rows // 2, 2, *rest))
    return Reshape(Transpose(pairs, (0, 2, 1, *range(3, 3 + len(rest)))), recipe.shape)


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


TOP_K = Rule("top_k", TOPK_PART, to_top_k)


def fuse_moe(graph: Graph) -> PassResult:
    """Replace mixtures of experts by one op each, and the choice of experts by one with a kernel."""
    targets = {node.target for node in graph.nodes if node.op == "call_function" and is_grouped(node.target)}
    if not targets:
        return rewrite(graph, (TOP_K,))
    pattern = experts_of_tokens(list(targets))
    build = partial(to_moe, product(list(targets), X_OF_PAIRS, "up"))
    result = rewrite(graph, (TOP_K, Rule("moe", cast(pattern), build), Rule("moe", pattern, build)))
    if all(miss.rule != "moe" for miss in result.misses):
        stray = [node for node in graph.nodes if node.target in targets]
        result.misses += [Miss.at(node, "moe", STRAY) for node in stray]
    return result


STRAY = "what leads to the product of each expert, or what follows it, is not the known way to its tokens and back"


def is_grouped(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in GROUPED_MATMULS
