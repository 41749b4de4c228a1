"""Fuse linears with their bias, activation and residual, and merge those that share an input.

    linear(x, W, b);  addmm(b, x, W.T);  matmul(x, W.T)  -->  effc.linear(x, W, b)
    reshape(effc.linear(reshape(x), W))                  -->  effc.linear(x, W), x reshaped if it must be
    effc.linear(x, W) + b                                -->  effc.linear(x, W, b)
    silu(effc.linear(x, W))                              -->  effc.linear(x, W, activation="silu")
    r + effc.linear(x, W)                                -->  effc.linear(x, W, residual=r)
    effc.linear(x, W1), effc.linear(x, W2)               -->  slices of effc.linear(x, concat(W1, W2))

What happens to weights happens in their recipes: nothing is read or copied here. A weight that something else uses
too (a tied embedding) is neither merged nor transposed, since that would keep it twice.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import fx

from ..compiler.estimate import Estimate, per_token
from ..compiler.fold import base_weights, recipe_of, used_elsewhere, weight_of
from ..compiler.graph import Graph, dtype_of, is_tensor, sizes
from ..compiler.ops import OPS
from ..compiler.pattern import any_, arguments, op, tensor
from ..compiler.quantized_weights import formats_in
from ..compiler.rewrite import (
    Match,
    Miss,
    PassResult,
    Rule,
    add_weight,
    insert,
    replace,
    rewrite,
)
from ..compiler.vocabulary import nbytes
from ..compiler.weights import Concat, Constant, Weight, transposed

aten = torch.ops.aten
linear = OPS["linear"].target


def is_vector(recipe: Weight | None) -> bool:
    return recipe is not None and len(recipe.shape) == 1


X, W, BIAS = tensor("x"), tensor("weight"), any_("bias")
LINEAR = op(aten.linear.default, X, W, BIAS)
ADDMM = op(aten.addmm.default, BIAS, X, tensor("transposed"))
MATMUL = op(aten.matmul.default, aten.mm.default, X, tensor("transposed"))

ADDEND = any_("addend", lambda graph, value: is_tensor(value) and is_vector(recipe_of(graph, value)))
PLAIN = op(linear, X, W, BIAS).named("linear").only_user()  # neither residual nor activation yet
UNBIASED = op(linear, X, W).named("linear").only_user()
ACTIVATED = op(linear, X, W, BIAS, None, any_("activation")).named("linear").only_user()
OF_ROWS = op(linear, op(aten.reshape.default, X, any_("rows")), W, BIAS).named("linear").only_user()
RESHAPED = op(aten.reshape.default, OF_ROWS, any_("sizes"))
BIASED = op(aten.add.Tensor, UNBIASED, ADDEND)
RESIDUAL = op(aten.add.Tensor, ACTIVATED, tensor("residual"))

ACTIVATIONS = {
    "silu": op(aten.silu.default, PLAIN),
    "gelu": op(aten.gelu.default, PLAIN),
    "gelu_tanh": op(aten.gelu.default, PLAIN, approximate="tanh"),
    "relu": op(aten.relu.default, PLAIN),
}


def is_bias(graph: Graph, node: fx.Node | None, rows: int) -> bool:
    """Whether `node` can be the bias of a linear with so many rows: None, or a weight with one entry per row."""
    recipe = None if node is None else recipe_of(graph, node)
    return node is None or (recipe is not None and recipe.shape == (rows,))


def to_linear(match: Match, matrix: str = "weight", turn: tuple[int, int] = (0, 1)) -> fx.Node | None:
    """The linear with `matrix`, its dimensions in the order `turn`, as its weight; other layouts become recipes."""
    graph, found, bias = match.graph, match[matrix], match.get("bias")
    recipe = recipe_of(graph, found)
    if recipe is None or len(recipe.shape) != 2:
        return match.decline(f"{found.name} is not a matrix of weights but computed at run time")
    recipe, base = transposed(recipe, turn), base_weights(graph, found)[0]
    if not is_bias(graph, bias, recipe.shape[0]):
        return match.decline(f"the addend {bias.name} is not a weight with one entry per output")
    if recipe not in graph.weights.values() and used_elsewhere(base, found):
        return match.decline(f"{base.name} is used elsewhere too: another layout of it would keep it twice")
    weight = add_weight(graph, f"{base.name}_{type(recipe).__name__.lower()}", recipe)
    return match.call(linear, match["x"], weight, *(() if bias is None else (weight_of(graph, bias),)))


def to_linear_of_transposed(match: Match) -> fx.Node | None:
    """x @ M with M = W.T; a product of two activations is no near-miss."""
    if recipe_of(match.graph, match["transposed"]) is None:
        return None
    return to_linear(match, "transposed", (1, 0))


def to_linear_of_rows(match: Match) -> fx.Node | None:
    """Leading axes that are flattened for the linear and restored after it stay as they are."""
    if sizes(match.root)[-1:] != sizes(match["weight"])[:1]:
        return match.decline("the reshape after the linear changes the last axis")
    x, inner = match["x"], sizes(match["weight"])[1]
    if sizes(x) != (*sizes(match.root)[:-1], inner):
        x = match.call(aten.reshape.default, x, [*match["sizes"][:-1], int(inner)])
    return match.call(linear, x, *match["linear"].args[1:])


def to_biased(match: Match) -> fx.Node | None:
    addend = match["addend"]
    if not is_bias(match.graph, addend, int(sizes(match["weight"])[0])):
        return match.decline(f"the addend {addend.name} is not a weight with one entry per output")
    if dtype_of(match.root) not in (torch.float32, torch.float64):
        return match.decline(f"the product is rounded to {dtype_of(match.root)} before the bias is added")
    if dtype_of(addend) != dtype_of(match["linear"]):
        return match.decline(f"the bias {addend.name} is {dtype_of(addend)}, the product {dtype_of(match['linear'])}")
    return match.call(linear, match["x"], match["weight"], weight_of(match.graph, addend))


def to_residual(match: Match) -> fx.Node | None:
    residual = match["residual"]
    if sizes(residual) != sizes(match.root) or sizes(match["linear"]) != sizes(match.root):
        return match.decline(f"{residual.name} and the linear differ in shape")
    if dtype_of(residual) != dtype_of(match["linear"]):
        return match.decline(f"{residual.name} is {dtype_of(residual)}, the linear {dtype_of(match['linear'])}")
    return match.call(linear, match["x"], match["weight"], match["bias"], residual, match["activation"])


def activation_rule(name: str) -> Rule:
    def to_activated(match: Match) -> fx.Node | None:
        return match.call(linear, match["x"], match["weight"], match["bias"], None, name)

    return Rule(f"linear with {name}", ACTIVATIONS[name], to_activated)


RULES = (
    Rule("linear", LINEAR, to_linear),
    Rule("linear from addmm", ADDMM, to_linear_of_transposed),
    Rule("linear from matmul", MATMUL, to_linear_of_transposed),
    Rule("linear of rows", RESHAPED, to_linear_of_rows),
    Rule("linear with bias", BIASED, to_biased),
    *(activation_rule(name) for name in ACTIVATIONS),
    Rule("linear with residual", RESIDUAL, to_residual),
)


def merge_linears(graph: Graph) -> PassResult:
    """Linears of one input become one linear with their weights one after another, and slices of its result."""
    result = PassResult()
    siblings = defaultdict(list)
    for node in graph.nodes:
        if is_plain(node) and not is_gated(node):
            siblings[node.args[0]].append(node)
    for group in siblings.values():
        kept = [node for node in group if not declined(graph, node, group, result.misses)]
        if len(kept) > 1:
            merge(graph, kept)
            result.matches += 1
    return result


def is_plain(node: fx.Node) -> bool:
    if node.target is not linear:
        return False
    found = arguments(node)
    return found["residual"] is None and found["activation"] == "none"


def is_gated(node: fx.Node) -> bool:
    """Whether the result is only multiplied by an activated linear of the same input: `fuse_mlp` merges those."""
    if [user.target for user in node.users] != [aten.mul.Tensor]:
        return False
    (product,) = node.users
    return any(
        is_tensor(gate)
        and gate.target is linear
        and gate.args[0] is node.args[0]
        and arguments(gate)["activation"] != "none"
        for gate in product.args
    )


def declined(graph: Graph, node: fx.Node, group: list[fx.Node], misses: list[Miss]) -> bool:
    """Whether a linear cannot be merged with its siblings; the reason becomes a miss."""
    reason = None
    weight, first = node.args[1], group[0].args[1]
    if len(group) == 1:
        return True
    if len(weight.users) > 1:
        reason = f"the weight {weight.name} is used elsewhere too"
    elif dtype_of(weight) != dtype_of(first):
        reason = f"the weight is {dtype_of(weight)}, that of {group[0].name} {dtype_of(first)}"
    elif (formats := [formats_in(graph.stored_as(matrix)) for matrix in (weight, first)])[0] != formats[1]:
        kinds = [" and ".join(names) or "floating point" for names in formats]
        reason = f"the weight is stored as {kinds[0]}, that of {group[0].name} as {kinds[1]}"
    if reason is not None:
        input_again = Estimate(per_token(nbytes(node.args[0])), launches=1)
        misses.append(Miss.at(node, "merge linears", reason, input_again))
    return reason is not None


def merge(graph: Graph, nodes: list[fx.Node]) -> None:
    x, weights = nodes[0].args[0], [node.args[1] for node in nodes]
    weight = concatenated(graph, weights, [graph.weights[weight.name] for weight in weights])
    biases = [arguments(node)["bias"] for node in nodes]
    operands = [x, weight]
    if any(bias is not None for bias in biases):
        recipes = [graph.weights[bias.name] if bias else zeros(weight) for bias, weight in zip(biases, weights)]
        operands.append(concatenated(graph, [bias for bias in biases if bias is not None], recipes))
    merged = insert(graph, nodes[0], linear, *operands, origins=nodes)
    axis, start = merged.meta["val"].ndim - 1, 0
    for node in nodes:
        stop = start + int(node.meta["val"].shape[-1])
        replace(graph, node, insert(graph, node, aten.slice.Tensor, merged, axis, start, stop, origins=(node,)))
        start = stop


def zeros(weight: fx.Node) -> Weight:
    return Constant.of(torch.zeros(int(weight.meta["val"].shape[0]), dtype=dtype_of(weight)))


def concatenated(graph: Graph, nodes: list[fx.Node], recipes: list[Weight]) -> fx.Node:
    return add_weight(graph, merged_name([node.name for node in nodes]), Concat(tuple(recipes)))


def merged_name(names: list[str]) -> str:
    """layer_q_proj_weight, layer_k_proj_weight  -->  layer_q_k_proj_weight"""
    words = [name.split("_") for name in names]
    shortest = min(map(len, words))
    start = next((i for i in range(shortest) if len({word[i] for word in words}) > 1), shortest - 1)
    end = next((i for i in range(shortest - start) if len({word[-1 - i] for word in words}) > 1), 0)
    middle = [part for word in words for part in word[start : len(word) - end]]
    return "_".join(words[0][:start] + middle + words[0][len(words[0]) - end :])


def fuse_linear(graph: Graph) -> PassResult:
    return rewrite(graph, RULES) + merge_linears(graph)
