"""Whether a graph treats every token alike and alone, outside of attention: what a KV cache needs.

A graph can be run on a few new tokens at a time if token i of every result depends on token i of its inputs only (and
on how many tokens stand before it, see `count_tokens`), and not on the length S. `check_per_token` follows the token
axis, the one dimension whose size contains S, through an allow-list of ops; what is not on the list, or mixes tokens,
is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler import ops  # noqa: F401  (registers the vocabulary)
from ..compiler.errors import ModelError
from ..compiler.graph import Graph, is_tensor, size_expr, sizes
from ..compiler.index_values import reshape_groups
from ..compiler.pattern import arguments
from ..compiler.rewrite import source_line
from .cached_scores import table_refusal
from .count_tokens import PADDING, counts_tokens, looks_up_in_slice, running_count, slices_table

aten = torch.ops.aten
effc = torch.ops.effc

Check = Callable[["TokenAxis", fx.Node], str | None]
"""Gives the reason why a node mixes tokens, or None if it does not."""


class TokenAxis:
    """Finds the dimension of a tensor that runs over tokens: the one whose size contains the symbol `length`."""

    def __init__(self, graph: Graph, length: sympy.Symbol) -> None:
        self.graph, self.length = graph, length

    def of(self, node: Any) -> int | None:
        """The token dimension of a node; None if it is the same for every token. See `dims` for refusals."""
        dims = self.dims(node)
        return dims[0] if dims else None

    def dims(self, node: Any) -> list[int]:
        if not is_tensor(node):
            return []
        return [dim for dim, size in enumerate(sizes(node)) if size.has(self.length)]

    def from_right(self, node: fx.Node) -> int | None:
        dim = self.of(node)
        return None if dim is None else dim - len(sizes(node))

    def in_value(self, value: Any) -> bool:
        """Whether an argument is a number that depends on the length."""
        if isinstance(value, (torch.SymInt, fx.Node)) and not is_tensor(value):
            value = value.meta.get("val") if isinstance(value, fx.Node) else value
            return isinstance(value, torch.SymInt) and size_expr(value).has(self.length)
        return False


def check_per_token(graph: Graph, length: sympy.Symbol) -> None:
    """Raise ModelError at the first node, attention aside, where a token depends on others or on the length."""
    axis = TokenAxis(graph, length)
    tables = only_in_tables(graph)
    for node in graph.nodes:
        if node.op == "call_function" and node not in tables and (reason := refusal(axis, node)) is not None:
            raise refused(graph, node, reason)
    for logits in graph.outputs:
        if axis.of(logits) is None:
            raise refused(graph, logits, "the output has no dimension that runs over the tokens")


def only_in_tables(graph: Graph) -> set[fx.Node]:
    """What is computed for the tables of attention alone, which attention answers for."""
    found: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if (
            node.op == "call_function"
            and node.users
            and all(user in found or in_tables(node, user) for user in node.users)
        ):
            found.add(node)
    return found


def in_tables(node: fx.Node, user: fx.Node) -> bool:
    if user.target != effc.attention.default:
        return False
    named = arguments(user)
    return node in (named.pop("tables") or ()) and node not in named.values()


def refused(graph: Graph, node: fx.Node, reason: str) -> ModelError:
    line = source_line(node)
    where = f"{node.name} ({node.target})" + (f" from {line}" if line else "")
    return ModelError(f"no KV cache can be made for graph {graph.name}: {where}: {reason}")


def refusal(axis: TokenAxis, node: fx.Node) -> str | None:
    """Why a call mixes tokens, or None."""
    value = node.meta.get("val")
    if isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return None
    if node.target != operator.getitem and not is_tensor(node) and not isinstance(value, (list, tuple)):
        return "it computes no tensor"
    if len(axis.dims(node)) > 1:
        return f"more than one dimension runs over the tokens: {list(sizes(node))}"
    check = CHECKS.get(node.target)
    if check is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        check = pointwise
    if check is not None:
        return check(axis, node)
    if axis.of(node) is None and not any(map(axis.dims, node.all_input_nodes)):
        if any(map(axis.in_value, node.all_input_nodes)):
            return "it depends on the length"
        return None
    return "it is not known to treat every token alone"


# --- checks ----------------------------------------------------------------------------------------------------------


def pointwise(axis: TokenAxis, node: fx.Node) -> str | None:
    named = arguments(node)
    shapes = {"size", "shape", "sizes"}
    if any(axis.in_value(value) for name, value in named.items() if name not in shapes):
        return "it computes with the length"
    places = {axis.from_right(x) for x in node.all_input_nodes if axis.of(x) is not None}
    if places - {axis.from_right(node)}:
        return "its arguments have their tokens in different dimensions"
    return None


def counting(axis: TokenAxis, node: fx.Node) -> str | None:
    """arange over the tokens continues from those that are cached (`count_tokens`)."""
    if axis.of(node) is None and not any(axis.in_value(x) for x in node.all_input_nodes):
        return None
    return None if counts_tokens(node, axis.length) else "it counts up to something else than the number of tokens"


def cumsum(axis: TokenAxis, node: fx.Node) -> str | None:
    """The running count of what is visible, or of every token, is known from the cache (`count_tokens`)."""
    dim = arguments(node)["dim"] % len(sizes(node))
    if axis.of(node) != dim:
        return None
    if running_count(axis.graph, node, axis.length) is None:
        return f"it adds up along dimension {dim}, over the tokens"
    return None


def along(*names: str) -> Check:
    """Ops that work along the dimensions in the arguments `names`."""

    def check(axis: TokenAxis, node: fx.Node) -> str | None:
        named = arguments(node)
        source = next(x for x in flat(named.values()) if is_tensor(x))
        token, rank = axis.of(source), len(sizes(source))
        for name in names:
            dims = named.get(name)
            dims = list(range(rank)) if dims is None or dims == [] else flat([dims])
            if token is not None and any(dim % rank == token for dim in dims):
                return f"it works along dimension {token}, over the tokens"
        return pointwise_list(axis, named)

    return check


def pointwise_list(axis: TokenAxis, named: dict[str, Any]) -> str | None:
    if any(axis.in_value(value) for value in flat(named.values())):
        return "it computes with the length"
    places = {axis.of(x) for x in flat(named.values()) if axis.of(x) is not None}
    return "its arguments have their tokens in different dimensions" if len(places) > 1 else None


def reshape(axis: TokenAxis, node: fx.Node) -> str | None:
    """The token axis stays as it is, or is merged with the batch before it, or split from it again."""
    source = node.args[0]
    if axis.of(source) is None and axis.of(node) is None:
        return None
    old, new = sizes(source), sizes(node)
    groups = reshape_groups(old, new)
    if groups is None:
        return f"cannot follow the view of {list(old)} as {list(new)}"
    for before, after in groups:
        left = [old[dim] for dim in before if old[dim] != 1]
        right = [new[dim] for dim in after if new[dim] != 1]
        if not any(size.has(axis.length) for size in left + right) or left == right:
            continue
        if (left[-1:] == [axis.length] and len(right) == 1) or (right[-1:] == [axis.length] and len(left) == 1):
            continue
        return f"the view of {list(old)} as {list(new)} mixes tokens with other dimensions"
    return None


def same_or_new(axis: TokenAxis, node: fx.Node) -> str | None:
    """permute, unsqueeze, squeeze, expand, select along another dimension: sizes tell where the tokens are."""
    source = node.args[0]
    if axis.of(source) is not None and axis.of(node) is None:
        return "it picks one token"
    return None


def slice_(axis: TokenAxis, node: fx.Node) -> str | None:
    named = arguments(node)
    source = node.args[0]
    dim = named["dim"] % len(sizes(source))
    if slices_table(node, axis.length):
        return None
    if axis.of(source) == dim or axis.of(node) == dim:
        return "it slices along the tokens, or by their number"
    return None


def linear(axis: TokenAxis, node: fx.Node) -> str | None:
    named = arguments(node)
    x = node.args[0]
    if axis.of(x) == len(sizes(x)) - 1:
        return "it multiplies over the tokens"
    if any(axis.of(named.get(name)) is not None for name in ("weight", "bias")):
        return "its weight or bias depends on the tokens"
    if named.get("residual") is not None and axis.of(named["residual"]) != axis.of(node):
        return "its residual has its tokens in another dimension"
    return None


def mixture(axis: TokenAxis, node: fx.Node) -> str | None:
    """Each token goes to experts of its own."""
    named = {name: value for name, value in arguments(node).items() if is_tensor(value)}
    tokens = [named.pop(name) for name in ("x", "experts", "scores", "residual") if name in named]
    if any(axis.of(x) == len(sizes(x)) - 1 for x in tokens):
        return "it multiplies over the tokens, or chooses among them"
    if len({axis.of(x) for x in tokens}) > 1:
        return "its arguments have their tokens in different dimensions"
    if any(axis.of(weight) is not None for weight in named.values()):
        return "its weights depend on the tokens"
    return None


def top_k(axis: TokenAxis, node: fx.Node) -> str | None:
    x = node.args[0]
    return "it chooses among the tokens" if axis.of(x) == len(sizes(x)) - 1 else None


def matmul(axis: TokenAxis, node: fx.Node) -> str | None:
    bias = node.args[0] if node.target == aten.addmm.default else None
    left, right = node.args[-2:]
    if axis.of(right) is not None or axis.of(bias) not in (None, axis.of(node)):
        return "it multiplies tokens with tokens, and was not recognized as attention"
    if axis.of(left) == len(sizes(left)) - 1:
        return "it multiplies over the tokens"
    return None


def layer_norm(axis: TokenAxis, node: fx.Node) -> str | None:
    x, normalized = node.args[:2]
    if axis.of(x) is not None and axis.of(x) >= len(sizes(x)) - len(normalized):
        return "it normalizes over the tokens"
    return None


def rms_norm(axis: TokenAxis, node: fx.Node) -> str | None:
    x = node.args[0]
    return "it normalizes over the tokens" if axis.of(x) == len(sizes(x)) - 1 else None


def embedding(axis: TokenAxis, node: fx.Node) -> str | None:
    table = looks_up_in_slice(node, axis.length) or node.args[0]
    return "its table depends on the tokens" if axis.of(table) is not None else None


def fake_quantize(axis: TokenAxis, node: fx.Node) -> str | None:
    x = node.args[0]
    return "it scales over the tokens" if axis.of(x) == len(sizes(x)) - 1 else None


def rope(axis: TokenAxis, node: fx.Node) -> str | None:
    x, cos, sin = node.args[:3]
    if axis.of(x) not in (None, 2) or any(axis.of(table) not in (None, 1) for table in (cos, sin)):
        return "its tokens are not where a rotary embedding has them"
    return None


def attention(axis: TokenAxis, node: fx.Node) -> str | None:
    """Attention is what the cache is for: causal, over all tokens, with no mask but padding."""
    named = arguments(node)
    if any(axis.dims(named[name]) != [2] for name in "qkv"):
        return "its queries, keys and values do not all run over the tokens"
    if any(sizes(named[name])[2] != axis.length for name in "qkv"):
        return "its keys are not those of the tokens of this call"
    if named["mask"] is not None:
        return "it has a mask that is not known to be causal or padding"
    if not named["causal"]:
        return "it is not causal: a token sees those behind it"
    if named["key_mask"] is not None and named["key_mask"].name != PADDING:
        return f"its key mask is not the input {PADDING}"
    return table_refusal(axis.graph, named["tables"], axis.length)


def made_of_size(axis: TokenAxis, node: fx.Node) -> str | None:
    value = arguments(node).get("fill_value")
    return "it is filled with the length" if axis.in_value(value) else None


def repeat(axis: TokenAxis, node: fx.Node) -> str | None:
    source, counts = node.args[:2]
    token = axis.from_right(source)
    if any(axis.in_value(count) for count in counts) or (token is not None and counts[token] != 1):
        return "it repeats tokens"
    return None


def index(axis: TokenAxis, node: fx.Node) -> str | None:
    """A lookup in a table that is the same for every token, or the same choice from every token."""
    source, indices = node.args[:2]
    source = looks_up_in_slice(node, axis.length) or source
    places = [place for place in indices if place is not None]
    if axis.of(source) is None:
        return None if len(indices) == 1 else "its table has several indices"
    if any(axis.of(place) is not None for place in places):
        return "it picks other tokens"
    first = next(dim for dim, place in enumerate(indices) if place is not None)
    return None if axis.of(source) < first else "it picks tokens"


def index_select(axis: TokenAxis, node: fx.Node) -> str | None:
    """Rows of a table for each token, or the same entries of every token, in another order say."""
    source, dim, places = node.args
    if axis.of(source) is None:
        return None
    if axis.of(places) is not None or axis.of(source) == dim % len(sizes(source)):
        return "it picks other tokens"
    return None


def part(axis: TokenAxis, node: fx.Node) -> str | None:
    return None


def flat(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += flat(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return found


CHECKS: dict[Any, Check] = {
    operator.getitem: part,
    aten._to_copy.default: pointwise,
    aten.clone.default: pointwise,
    aten.embedding.default: embedding,
    aten.arange.default: counting,
    aten.arange.start: counting,
    aten.arange.start_step: counting,
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default), reshape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.unsqueeze.default), same_or_new),
    **dict.fromkeys((aten.squeeze.dim, aten.expand.default, aten.select.int), same_or_new),
    aten.slice.Tensor: slice_,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), along("dim")),
    **dict.fromkeys((aten.cat.default, aten.stack.default, aten.softmax.int), along("dim")),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.var.correction), along("dim")),
    aten.index_select.default: index_select,
    **dict.fromkeys((aten.repeat_interleave.self_int, aten.gather.default, aten.scatter.value), along("dim")),
    aten.cumsum.default: cumsum,
    aten.repeat.default: repeat,
    aten.index.Tensor: index,
    **dict.fromkeys((aten.linear.default, effc.linear.default, effc.gated_linear.default), linear),
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default), matmul),
    aten.layer_norm.default: layer_norm,
    effc.rms_norm.default: rms_norm,
    effc.fake_quantize.default: fake_quantize,
    effc.rope.default: rope,
    effc.attention.default: attention,
    effc.top_k.default: top_k,
    effc.experts.default: mixture,
    effc.moe.default: mixture,
    **dict.fromkeys((aten.full.default, aten.ones.default, aten.zeros.default), made_of_size),
    **dict.fromkeys((aten.full_like.default, aten.ones_like.default, aten.zeros_like.default), made_of_size),
}
