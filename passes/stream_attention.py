"""Attend to the first tokens and a window only (StreamingLLM, Xiao et al., 2023): an option that changes results.

    attention(q, k, v, scale, causal)  -->  attention(q, k, v, scale, causal, visible="(k < 4) | (q - k < 1020)")

The first tokens, which attention falls back on, stay visible, so that text of any length has a cache of one size.
What lies between them and the window is forgotten. Positions stay absolute, as the model was trained: its context
length still holds. Attention that has a window or a condition of its own stays as it is.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import torch

from ..compiler.graph import Graph
from ..compiler.index_expressions import parse
from ..compiler.pattern import arguments
from ..compiler.rewrite import insert_named, replace

effc = torch.ops.effc

WARNING = (
    "each token attends to the first {kept} tokens and the last {window} only: from token {first} on, results are not"
    " those of the model"
)


@dataclass(frozen=True)
class Seen:
    """What a query sees: keys from `kept` keys at the start, and the last `window`."""

    kept: int
    window: int

    @property
    def condition(self) -> str:
        return f"(k < {self.kept}) | (q - k < {self.window})"

    @property
    def warning(self) -> str:
        return WARNING.format(kept=self.kept, window=self.window, first=self.kept + self.window + 1)


def stream_attention(graph: Graph, seen: Seen) -> int:
    """Bound what attention sees; how many did not have a bound of their own. The graph's notes say what it means."""
    changed = 0
    for node in list(graph.nodes):
        if node.target != effc.attention.default:
            continue
        named = arguments(node)
        if named["causal"] and named["window"] is None and named["visible"] is None and named["mask"] is None:
            replace(graph, node, insert_named(graph, node, node.target, named | {"visible": seen.condition}))
            changed += 1
    if changed:
        graph.notes.append(seen.warning)
    return changed


def seen_by(window: int | None, visible: str | None) -> Seen | None:
    """The bound that the window of causal attention, or else its condition, puts on what a query sees; or None."""
    if window is not None:
        return Seen(0, window)
    tree = None if visible is None else parse(visible)
    match tree:
        case ast.BinOp(
            left=ast.Compare(left=ast.Name(id="k"), ops=[ast.Lt()], comparators=[ast.Constant(value=int() as kept)]),
            op=ast.BitOr(),
            right=ast.Compare(
                left=ast.BinOp(left=ast.Name(id="q"), op=ast.Sub(), right=ast.Name(id="k")),
                ops=[ast.Lt()],
                comparators=[ast.Constant(value=int() as window)],
            ),
        ):
            return Seen(kept, window)
    return None
