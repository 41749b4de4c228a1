"""Give a causal model a KV cache: the graphs prefill, extend and decode from the graph forward.

    attention(q, k, v, scale, causal=True, key_mask=attention_mask)

        -->  cached_attention(q, kv_write(k_cache_i, k, past), kv_write(v_cache_i, v, past), past, scale,
                              visible="k >= t0[b]", tables=[padding])

New inputs: past [B] int64, the slots that each row has filled in the cache; padding [B] int64, how many of its first
slots hold padding, where the graph hides or counts it. New states: k_cache_i and v_cache_i [B, G, T, D], whose capacity
T is symbolic. Masks and biases are put in terms of slots (`cached_scores`), and what counts tokens goes on from `past`
(`count_tokens`). `extend` gives logits at every new token [B, S, V]; `prefill` at the last one only [B, 1, V]; `decode`
is `extend` with S = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler import ops  # noqa: F401  (registers the vocabulary)
from ..compiler.errors import InputError, ModelError
from ..compiler.graph import Graph, dtype_of, size_expr, sizes
from ..compiler.pattern import arguments
from ..compiler.rewrite import fake_mode, insert, insert_named, replace
from .cached_scores import cached_scores
from .cleanup import erase_dead_code
from .count_tokens import ARANGES, PADDING, TOKENS, NotOffset, TokenCounts
from .fuse_attention import fuse_attention
from .per_token import TokenAxis, check_per_token, refused
from .specialize import rederive, specialize
from .stream_attention import Seen, seen_by

aten = torch.ops.aten
effc = torch.ops.effc

KINDS = ("prefill", "extend", "decode")
CAPACITY_EXAMPLE = 4099
"""A capacity to reason with where a shape rule wants an example; any other works."""


def materialize_kv(graph: Graph, kind: str, ring: bool = False) -> Graph:
    """The graph `kind` ("prefill", "extend" or "decode") of a causal model's fused graph, which stays as it is.

    ring: attention that sees a window only, or some first tokens and a window, gets a ring of slots (`Graph.rings`).

    Raises InputError for another kind, ModelError where tokens depend on each other outside of causal attention: it
    names the node, its op, its line in the model and the reason.
    """
    if kind not in KINDS:
        raise InputError(f"expected a graph of {', '.join(KINDS)}, found {kind!r}")
    graph = graph.copy(name=kind, dialect="stateful")
    length = token_count(graph)
    check_cacheable(graph, length)
    add_cache(graph, length, ring)
    if kind == "prefill":
        keep_last_token(graph, length)
    if kind == "decode":
        specialize(graph, {length: 1})
    erase_dead_code(graph)
    return graph


def check_cacheable(graph: Graph, length: sympy.Symbol) -> None:
    """Raise ModelError where a token depends on others. Attention that was not recognized is the reason to give."""
    try:
        check_per_token(graph, length)
    except ModelError:
        nodes = {node.name: node for node in graph.nodes}
        trial = graph.copy()
        misses = fuse_attention(trial).misses
        for node in trial.nodes:
            if node.target == effc.attention.default and node.name not in nodes:
                raise refused(graph, nodes[node.meta["origins"][0]], "fuse_attention was left out here") from None
        for miss in misses:
            raise refused(graph, nodes[miss.node], miss.reason) from None
        raise


def drop_padding(graph: Graph) -> Graph:
    """The graph for calls without padding: `attention_mask` is all ones, and no input any more.

    attention(q, k, v, scale, causal, key_mask=attention_mask)  -->  attention(q, k, v, scale, causal)
    """
    graph = graph.copy()
    if PADDING not in graph.inputs:
        return graph
    mask = graph.placeholder(PADDING)
    for node in list(mask.users):
        if node.target == effc.attention.default and arguments(node)["key_mask"] is mask:
            replace(graph, node, insert_named(graph, node, node.target, arguments(node) | {"key_mask": None}))
    if mask.users:
        replace_by_ones(graph, mask)
    graph.fx.erase_node(mask)
    return graph


def replace_by_ones(graph: Graph, mask: fx.Node) -> None:
    tokens = graph.placeholder(TOKENS)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    shape = [insert(graph, first, aten.sym_size.int, tokens, dim) for dim in range(len(sizes(mask)))]
    value = mask.meta["val"]
    ones = insert(graph, first, aten.ones.default, shape, dtype=value.dtype, device=value.device)
    mask.replace_all_uses_with(ones)


def token_count(graph: Graph) -> sympy.Symbol:
    """The symbol S of input_ids [B, S]."""
    if TOKENS not in graph.inputs:
        raise InputError(f"expected a graph with an input {TOKENS} [B, S], found inputs {', '.join(graph.inputs)}")
    shape = sizes(graph.placeholder(TOKENS))
    if len(shape) != 2 or not isinstance(shape[1], sympy.Symbol):
        raise InputError(f"expected {TOKENS} [B, S] with a symbolic S, found {list(shape)}")
    return shape[1]


# --- the cache -------------------------------------------------------------------------------------------------------


def add_cache(graph: Graph, length: sympy.Symbol, ring: bool = False) -> None:
    """Let every attention write its keys and values to a cache, and read all that is in it."""
    batch = graph.placeholder(TOKENS).meta["val"].shape[0]
    past = add_placeholder(graph, "past", (batch,), torch.int64)
    bounds = rings(graph) if ring else {}
    capacities: dict[Seen | None, torch.SymInt] = {}

    def padding() -> fx.Node:
        known = "padding" in graph.inputs
        return graph.placeholder("padding") if known else add_placeholder(graph, "padding", (batch,), torch.int64)

    written: dict[fx.Node, fx.Node] = {}
    for node, named, fresh, layer in list(cached_sites(graph)):
        bound = bounds.get(named["k"])
        first = None if bound is None else bound.kept
        if bound not in capacities:
            capacities[bound] = new_size(graph)
        for letter in fresh:
            new = named[letter]
            _, heads, _, size = new.meta["val"].shape
            shape = (batch, heads, capacities[bound], size)
            cache = add_placeholder(graph, f"{letter}_cache_{layer}", shape, dtype_of(new))
            graph.states += (cache.name,)
            if bound is not None:
                graph.rings[cache.name] = (bound.kept, bound.window)
            written[new] = insert_named(
                graph, node, effc.kv_write.default, {"cache": cache, "new": new, "past": past, "ring": first}
            )
        caches = {f"{letter}_cache": written[named[letter]] for letter in "kv"}
        named |= {**cached_scores(graph, named, length, padding), **caches, "past": past, "ring": first}
        replace(graph, node, insert_named(graph, node, effc.cached_attention.default, named))
    try:
        TokenCounts(graph, length, past, padding).rewrite()
    except NotOffset as reason:
        raise refused(graph, reason.node, str(reason)) from None


def rings(graph: Graph) -> dict[fx.Node, Seen]:
    """Keys and values -> what is seen of them, where that is bounded and the same wherever they are read."""
    seen: dict[fx.Node, set[Seen | None]] = {}
    sites = [
        (named["k"], named["v"], seen_by(named["window"], named["visible"])) for _, named, *_ in cached_sites(graph)
    ]
    for k, v, bound in sites:
        for x in (k, v):
            seen.setdefault(x, set()).add(bound)
    alike = [site for site in sites if site[2] is not None and seen[site[0]] == seen[site[1]] == {site[2]}]
    return {x: bound for k, v, bound in alike for x in (k, v)}


def cached_sites(graph: Graph) -> Iterator[tuple[fx.Node, dict[str, Any], list[str], int]]:
    """Each attention with its arguments by name, which of k and v no earlier one has written, and its layer."""
    written: set[fx.Node] = set()
    layers = 0
    for node in graph.nodes:
        if node.target == effc.attention.default:
            named = arguments(node)
            fresh = [letter for letter in "kv" if named[letter] not in written]
            written |= {named["k"], named["v"]}
            yield node, named, fresh, layers
            layers += bool(fresh)


def add_placeholder(graph: Graph, name: str, shape: tuple[Any, ...], dtype: torch.dtype) -> fx.Node:
    last = graph.placeholders[-1]
    with graph.fx.inserting_after(last):
        node = graph.fx.placeholder(name)
    node.target = node.name
    with fake_mode(graph):
        node.meta["val"] = torch.empty(shape, dtype=dtype, device=last.meta["val"].device)
    return node


def new_size(graph: Graph) -> torch.SymInt:
    """A new symbolic size among those of the graph."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    shapes = fake_mode(graph).shape_env
    source = ConstantSource(f"capacity_{len(shapes.var_to_range)}")
    symbol = shapes.create_symbol(CAPACITY_EXAMPLE, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return shapes.create_symintnode(symbol, hint=CAPACITY_EXAMPLE, source=source)


# --- logits of the last token only -----------------------------------------------------------------------------------


def keep_last_token(graph: Graph, length: sympy.Symbol) -> None:
    """Run what only the logits need, from the last attention on, for the last token alone.

    linear(norm(x), w) [B, S, V]  -->  linear(norm(slice(x, dim=1, start=-1)), w) [B, 1, V]
    """
    axis = TokenAxis(graph, length)
    tail = needed_for_logits_only(graph, axis)
    last: dict[fx.Node, fx.Node] = {}

    def last_token(source: fx.Node, before: fx.Node) -> fx.Node:
        if source not in last:
            last[source] = insert(graph, before, aten.slice.Tensor, source, axis.of(source), -1, origins=[source])
        return last[source]

    def argument(node: fx.Node, value: fx.Node) -> Any:
        if axis.in_value(value):
            return 1
        return value if value in tail or axis.of(value) is None else last_token(value, node)

    for node in list(graph.nodes):
        if node in tail or node.op == "output":
            node.args, node.kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda value, node=node: argument(node, value)
            )
    rederive(graph, tail)


def needed_for_logits_only(graph: Graph, axis: TokenAxis) -> set[fx.Node]:
    """The calls behind the last attention that can be run for one token: per token, with the tokens in a dimension."""
    tail: set[fx.Node] = set()
    whole = {effc.kv_write.default, effc.cached_attention.default, *ARANGES}
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.target in whole or not axis.dims(node):
            continue
        tensors = [x for x in (node, *node.all_input_nodes) if axis.dims(x)]
        numbers = [x for x in node.all_input_nodes if axis.in_value(x)]
        simple = all(sizes(x)[axis.of(x)] == axis.length for x in tensors) and all(
            size_expr(x) == axis.length for x in numbers
        )
        if simple and all(user in tail or user.op == "output" for user in node.users):
            tail.add(node)
    return tail
