"""The cacheability report: what a KV cache of a graph would hold, site by site, or what stands in its way.

KV cache: 2 sites of attention, 512 bytes per token and row
  attention  # modeling_llama.py:270: attn_output, attn_weights = attention_interface(
    tokens: dimension 2 of q [B, 4, S, 8], k [B, 2, S, 8] and v [B, 2, S, 8]
    mask: causal (k <= q), padding (attention_mask[b, k] != 0)
    state: k_cache_0 and v_cache_0, 256 bytes per token and row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from ..compiler import ops  # noqa: F401  (registers the vocabulary)
from ..compiler.errors import ModelError
from ..compiler.graph import Graph, dtype_of, sizes
from ..compiler.rewrite import source_line
from .count_tokens import TOKENS
from .materialize_kv import cached_sites, check_cacheable, token_count


@dataclass(frozen=True)
class Site:
    """One attention. axis: where its tokens are. mask: kinds of mask, each with its condition. states: what it writes.

    bytes_per_token: of the states that this site is the first to write, per row.
    """

    node: str
    source: str
    axis: str
    mask: tuple[str, ...]
    states: tuple[str, ...]
    bytes_per_token: int

    def __str__(self) -> str:
        own = f"{self.bytes_per_token} bytes per token and row" if self.bytes_per_token else "shared with another site"
        lines = [
            f"{self.node}" + f"  # {self.source}" * bool(self.source),
            f"  tokens: {self.axis}",
            f"  mask: {', '.join(self.mask)}",
            f"  state: {' and '.join(self.states)}, {own}",
        ]
        return "\n".join(f"  {line}" for line in lines)


@dataclass(frozen=True)
class Cacheability:
    """What a graph's KV cache holds; `refusal` says why it can have none, with the node, its op and its source line."""

    sites: tuple[Site, ...]
    refusal: str | None = None

    @property
    def bytes_per_token(self) -> int:
        return sum(site.bytes_per_token for site in self.sites)

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"KV cache: none: {self.refusal}"
        count = f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} of attention"
        head = f"KV cache: {count}, {self.bytes_per_token} bytes per token and row"
        return "\n".join([head, *map(str, self.sites)])


def cacheability(graph: Graph) -> Cacheability:
    """The report of a fused graph, which stays as it is."""
    length = token_count(graph)
    try:
        check_cacheable(graph, length)
    except ModelError as refusal:
        return Cacheability((), str(refusal))
    return Cacheability(tuple(sites_of(graph, length)))


def sites_of(graph: Graph, length: sympy.Symbol) -> Iterator[Site]:
    letters = {sizes(graph.placeholder(TOKENS))[0]: "B", length: "S"}
    states: dict[fx.Node, str] = {}
    for node, named, fresh, layer in cached_sites(graph):
        for letter in fresh:
            states[named[letter]] = f"{letter}_cache_{layer}"
        yield Site(
            node.name,
            source_line(node),
            f"dimension 2 of {shape_of('q', named, letters)}, {shape_of('k', named, letters)}"
            f" and {shape_of('v', named, letters)}",
            mask_kinds(named),
            tuple(states[named[letter]] for letter in "kv"),
            sum(token_bytes(named[letter]) for letter in fresh),
        )


def shape_of(letter: str, named: Mapping[str, Any], letters: Mapping[sympy.Expr, str]) -> str:
    return f"{letter} [{', '.join(letters.get(size, str(size)) for size in sizes(named[letter]))}]"


def token_bytes(new: fx.Node) -> int:
    """Bytes that keys or values [B, G, S, D] take in the cache, per token and row."""
    _, heads, _, size = sizes(new)
    return int(heads * size) * dtype_of(new).itemsize


def mask_kinds(named: Mapping[str, Any]) -> tuple[str, ...]:
    """What an attention's arguments say about which keys a query sees, and with which scores."""
    kinds = [
        "causal (k <= q)" if named["causal"] else None,
        f"window of {named['window']} (k > q - {named['window']})" if named["window"] is not None else None,
        f"padding ({named['key_mask'].name}[b, k] != 0)" if named["key_mask"] is not None else None,
        f"visible where {named['visible']}" if named["visible"] is not None else None,
        f"bias {named['bias']}" if named["bias"] is not None else None,
        f"an explicit mask {named['mask'].name}" if named["mask"] is not None else None,
        f"softcap {named['softcap']}" if named["softcap"] is not None else None,
        f"sinks {named['sinks'].name}" if named["sinks"] is not None else None,
    ]
    tables = [f"t{number} = {table.name}" for number, table in enumerate(named["tables"] or ())]
    return tuple(kind for kind in (*kinds, *tables) if kind) or ("none",)
