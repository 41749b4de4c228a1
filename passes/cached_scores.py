"""Which keys a query sees and what is added to its scores, in terms of slots of the cache.

Query and key indices are slots in both graphs, so causality, windows and expressions over q and k stay as they are.
What reads the tokens of the call is put in terms of `padding` [B], how many of a row's first slots hold padding:

    key_mask=attention_mask         -->  visible="k >= t0[b]", tables=[padding]
    t1[b, k], t1 = attention_mask   -->  where(k >= t0[b], 1, 0)
    t1[b, k], t1 = cumsum(mask)     -->  maximum(k + 1 - t0[b], 0)
    t1[b, k], t1 = cumsum(ones)     -->  1 * (k + 1)
    t1[b], t1 = (cumsum(mask) == 0).sum(1)  -->  t0[b]
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler.graph import Graph, is_tensor, sizes
from ..compiler.index_algebra import Inference, NotInferred
from ..compiler.index_expressions import parse, table_number
from ..compiler.mask_check import ancestors
from ..compiler.pattern import CASTS, arguments
from .count_tokens import PADDING, running_count

aten = torch.ops.aten

VISIBLE = "{slot} >= t{padding}[b]"
IS_VISIBLE = "where({slot} >= t{padding}[b], 1, 0)"
VISIBLE_SO_FAR = "maximum({slot} + 1 - t{padding}[b], 0)"
SO_FAR = "%d * ({slot} + 1)"
HIDDEN = "t{padding}[b]"


def slot_form(graph: Graph, table: fx.Node, length: sympy.Symbol) -> str | None:
    """What an element (b, slot) of a table of tokens [B, S], or b of one [B], is by the padding; None if unknown."""
    source = without_casts(table)
    if counts_padding(graph, source, length):
        return HIDDEN
    if sizes(table)[1:] != (length,):
        return None
    if source.name == PADDING:
        return IS_VISIBLE
    if source.target != aten.cumsum.default:
        return None
    counted = running_count(graph, source, length)
    return VISIBLE_SO_FAR if isinstance(counted, fx.Node) else None if counted is None else SO_FAR % counted


def without_casts(x: fx.Node) -> fx.Node:
    while x.target in CASTS:
        x = x.args[0]
    return x


def counts_padding(graph: Graph, node: fx.Node, length: sympy.Symbol) -> bool:
    """Whether a node [B] is (cumsum(attention_mask, 1) == 0).sum(1): how many tokens stand before the first visible."""
    if node.target != aten.sum.dim_IntList or len(sizes(node)) != 1:
        return False
    hidden = without_casts(arguments(node)["self"])
    counts = [x for x in map(without_casts, hidden.all_input_nodes) if x.target == aten.cumsum.default]
    if len(counts) != 1 or not isinstance(running_count(graph, counts[0], length), fx.Node):
        return False
    inference = Inference(opaque=counts)
    b, k = (inference.index(name, size) for name, size in zip("bk", sizes(counts[0])))
    try:
        return inference.infer(hidden).at(b, k) == sympy.Eq(inference.infer(counts[0]).at(b, k), 0)
    except NotInferred:
        return False


def reads_tokens(table: fx.Node, length: sympy.Symbol) -> bool:
    """Whether a table has a value for each token, or is computed from what has."""
    return any(size.has(length) for x in ancestors(table) if is_tensor(x) for size in sizes(x))


def table_refusal(graph: Graph, tables: Sequence[fx.Node] | None, length: sympy.Symbol) -> str | None:
    """Why attention with these tables cannot be continued from a cache, or None."""
    for table in tables or ():
        if reads_tokens(table, length) and slot_form(graph, table, length) is None:
            return (
                f"which keys it sees, or its bias, depends on {table.name} {list(sizes(table))}, a table of the tokens"
                " that is neither their number nor what is visible (documents packed in a row?)"
            )
    return None


def cached_scores(
    graph: Graph, named: dict[str, Any], length: sympy.Symbol, padding: Callable[[], fx.Node]
) -> dict[str, Any]:
    """The arguments `visible`, `bias` and `tables` of cached attention, from those of attention by name.

    padding: gives the input [B]; it is asked for only where it is read.
    """
    tables = list(named["tables"] or ())
    forms = {
        number: form
        for number, table in enumerate(tables)
        if reads_tokens(table, length) and (form := slot_form(graph, table, length)) is not None
    }
    texts = {name: named[name] for name in ("visible", "bias")}
    if not forms and named["key_mask"] is None:
        return {**texts, "tables": named["tables"]}
    hides = named["key_mask"] is not None
    asks = hides or any("{padding}" in form for form in forms.values())
    kept = [number for number in range(len(tables)) if number not in forms]
    numbers = {number: place for place, number in enumerate(kept)}
    place = len(kept)
    rewritten = {name: None if text is None else in_slots(text, forms, numbers, place) for name, text in texts.items()}
    if hides:
        shown = VISIBLE.format(slot="k", padding=place)
        rewritten["visible"] = shown if texts["visible"] is None else f"({rewritten['visible']}) & ({shown})"
    return {**rewritten, "tables": [*(tables[number] for number in kept), *([padding()] if asks else [])]}


def in_slots(text: str, forms: dict[int, str], numbers: dict[int, int], padding: int) -> str:
    """An expression whose tables in `forms` are replaced, and whose other tables are numbered anew."""

    class InSlots(ast.NodeTransformer):
        def visit_Subscript(self, tree: ast.Subscript) -> ast.expr:
            number = table_number(tree)
            tree = self.generic_visit(tree)
            if number in forms:
                slot = f"({ast.unparse(tree.slice.elts[1])})" if isinstance(tree.slice, ast.Tuple) else None
                return parse(forms[number].format(slot=slot, padding=padding))
            name = ast.Name(f"t{numbers[number]}", ast.Load())
            return ast.Subscript(name, tree.slice, ast.Load())

        def visit_Name(self, tree: ast.Name) -> ast.Name:
            return tree

    return ast.unparse(InSlots().visit(ast.parse(text, mode="eval").body))
