"""What an attention mask means: causal, a window, padding, ALiBi, ..., or something that stays explicit.

    where((k <= q) & (attention_mask[b, k] != 0), 0, -3.4e38)   means   causal, with the key mask `attention_mask`
    (k <= q) & (k > q - 1024)                                   means   causal, with a window of 1,024 keys
    (document[b, q] == document[b, k]) & (k <= q)               means   causal, visible="t0[b, q] == t0[b, k]"
    slopes[h] * (k - q) + where(k <= q, 0, -3.4e38)             means   causal, bias="t0[h] * k"

A mask is inferred as a function of (b, h, q, k), taken apart into conditions and what it adds to the scores, and then
checked against the graph's own arithmetic at random sizes; a reading that does not hold there is not used.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import sympy
import torch
from sympy import Piecewise
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import BooleanFunction
from torch import fx

from .graph import Graph, dtype_of, size_expr, sizes
from .index_algebra import Inference, NotInferred
from .index_text import SYMBOLS, NoText, Writer, from_text
from .index_values import Shape, Value, canonical, less_equal, truth
from .mask_check import ancestors, check_masks, evaluated
from .mask_form import HIDDEN, MaskForm
from .rewrite import add_weight
from .weights import Constant

__all__ = ["HIDDEN", "MaskForm", "Masks"]

MAX_PARTS = 12
"""A condition of more parts is not simplified, which takes time exponential in their number."""

aten = torch.ops.aten


class Reading(NamedTuple):
    """A mask as a function of (b, h, q, k): the condition under which a key is visible, and what is added then."""

    condition: Value
    bias: sympy.Expr


@dataclass
class Masks:
    """Reads the masks of one graph; each is inferred and checked once, however many layers compute and use it."""

    graph: Graph
    known: dict[tuple[tuple[int, ...] | MaskForm, Shape], MaskForm | NotInferred] = field(default_factory=dict)
    numbers: dict[fx.Node, int] = field(default_factory=dict)
    computations: dict[Hashable, int] = field(default_factory=dict)

    def read(self, mask: fx.Node, scores: Shape) -> MaskForm:
        """What `mask`, broadcast to `scores` [B, H, S, T], means. Raises NotInferred where that is not known."""
        return self._read((mask,), scores)

    def read_together(self, masks: Sequence[fx.Node], scores: Shape) -> tuple[MaskForm, dict[fx.Node, NotInferred]]:
        """What several masks mean that all hold, and those that stay operands with the reasons."""
        rest: dict[fx.Node, NotInferred] = {}
        for mask in masks:
            try:
                self.read(mask, scores)
            except NotInferred as reason:
                rest[mask] = reason
        read = tuple(dict.fromkeys(mask for mask in masks if mask not in rest))
        try:
            return self._read(read, scores), rest
        except NotInferred as reason:  # of what they mean together
            return self._read(read[:1], scores), rest | dict.fromkeys(read[1:], reason)

    def reread(self, form: MaskForm, scores: Shape) -> MaskForm:
        """The form without the tables that have become known: "t0[b, k] * t1[h]" is "t0[h] * k" if t0 counts keys.

        Raises NotInferred where it cannot be written any more.
        """
        key = (form, scores)
        if key not in self.known:
            self.known[key] = reread_form(Inference(self.graph, partial=True), form, scores)
        return self.known[key]

    def _read(self, masks: tuple[fx.Node, ...], scores: Shape) -> MaskForm:
        key = (tuple(map(self._number, masks)), scores)
        if key not in self.known:
            try:
                self.known[key] = checked_form(self.graph, masks, scores) if masks else MaskForm()
            except NotInferred as reason:
                self.known[key] = reason
        found = self.known[key]
        if isinstance(found, NotInferred):
            raise found
        return found

    def _number(self, mask: fx.Node) -> int:
        """Equal for nodes that are computed alike, from equal constants."""
        wanted = ancestors(mask, stop=self.numbers)
        for node in self.graph.nodes:
            if node in wanted and node not in self.numbers:
                self.numbers[node] = self.computations.setdefault(self._computation(node), len(self.computations))
        return self.numbers[mask]

    def _computation(self, node: fx.Node) -> Hashable:
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return str(value)
        if node.op == "placeholder":
            recipe = self.graph.weights.get(node.name)
            return recipe.key() if isinstance(recipe, Constant) else node
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: f"node {self.numbers[source]}")
        return (node.target, str(arguments))


def checked_form(graph: Graph, masks: Sequence[fx.Node], scores: Shape) -> MaskForm:
    """What the masks mean together. Raises NotInferred."""
    inference = Inference(graph, partial=True)
    try:
        form = infer_masks(inference, masks, scores)
    except NotInferred:
        positions = [node for node in graph.nodes if starts_at_a_size(node)]
        if not positions:
            raise
        inference = Inference(graph, positions, partial=True)
        form = infer_masks(inference, masks, scores)
    check_masks(graph, masks, form, scores, {*inference.unknowns, *inference.opaque})
    return replace(form, tables=tuple(folded_table(graph, table) for table in form.tables))


def starts_at_a_size(node: fx.Node) -> bool:
    """Whether a node is arange(past, ...): positions that an expression can only have as a table."""
    return node.target in (aten.arange.start, aten.arange.start_step) and not size_expr(node.args[0]).is_number


def folded_table(graph: Graph, table: fx.Node) -> fx.Node:
    """A table that is computed from constants alone (ALiBi's slopes) as a weight; any other as it is."""
    if table.op == "placeholder" or any(
        node.op == "placeholder" and not isinstance(graph.weights.get(node.name), Constant) for node in ancestors(table)
    ):
        return table
    return add_weight(graph, f"{table.name}_table", Constant.of(evaluated(graph, [table], {})[table]))


def infer_masks(inference: Inference, masks: Sequence[fx.Node], scores: Shape) -> MaskForm:
    """What the masks mean together, by the algebra alone. Raises NotInferred."""
    indices = tuple(inference.index(name, size) for name, size in zip("bhqk", scores))
    readings = [conditions(inference, element(inference, mask, indices, scores), mask) for mask in masks]
    condition = sympy.And(*(reading.condition for reading in readings))
    bias = sum((reading.bias for reading in readings), sympy.Integer(0))
    return form_of(inference, Reading(decided(inference, condition), bias), indices, masks[0])


def reread_form(inference: Inference, form: MaskForm, scores: Shape) -> MaskForm:
    indices = tuple(inference.index(name, size) for name, size in zip("bhqk", scores))
    b, _, q, k = indices
    tables = [inference.infer(table).at for table in form.tables]
    places = dict(zip(SYMBOLS.values(), indices))

    def expression(text: str | None, default: Value) -> Value:
        return default if text is None else from_text(text, tables).subs(places)

    parts = [truth(expression(form.visible, sympy.true))]
    parts += [less_equal(k, q)] if form.causal else []
    parts += [less_equal(q - form.window + 1, k)] if form.window is not None else []
    parts += [truth(inference.infer(form.key_mask).at(b, k))] if form.key_mask is not None else []
    reading = Reading(decided(inference, sympy.And(*parts)), expression(form.bias, sympy.Integer(0)))
    return form_of(inference, reading, indices, form.tables[0])


def decided(inference: Inference, condition: Value) -> Value:
    return simplified(inference.decide(condition))


def simplified(condition: Value) -> Value:
    """The condition as a conjunction: ~(k <= q & m == 0) & k <= q  -->  k <= q & m != 0"""
    parts: dict[Value, Value] = {}

    def atom(part: Value) -> Value:
        if isinstance(part, BooleanFunction):
            return part.func(*map(atom, part.args))
        if part in (sympy.true, sympy.false):
            return part
        opposite = canonical(sympy.Not(part))
        if opposite in parts:
            return sympy.Not(parts[opposite])
        return parts.setdefault(part, sympy.Symbol(f"part{len(parts)}"))

    logic = sympy.simplify_logic(atom(condition), form="cnf", force=len(parts) <= MAX_PARTS)
    if any(sympy.Not(argument) in logic.args for argument in logic.args):  # which sympy leaves alone: p | ~p
        return sympy.true if isinstance(logic, sympy.Or) else sympy.false
    names = {symbol: part for part, symbol in parts.items()}

    def part(logic: Value) -> Value:
        if isinstance(logic, sympy.Not) and logic.args[0] in names:
            return canonical(sympy.Not(names[logic.args[0]]))
        return names[logic] if logic in names else logic.func(*map(part, logic.args)) if logic.args else logic

    return part(logic)


# --- masks to conditions ---------------------------------------------------------------------------------------------


def element(inference: Inference, mask: fx.Node, indices: tuple[sympy.Expr, ...], scores: Shape) -> Value:
    """The element of a mask that broadcasts to (b, h, q, k); batch and heads may be one dimension."""
    function = inference.infer(mask)
    shape = function.shape
    if len(shape) == 3 and shape[0] != scores[1] and shape[0] == sympy.expand(scores[0] * scores[1]):
        b, h, *rest = indices
        indices = (b * scores[1] + h, *rest)
    return function.read(indices)


def conditions(inference: Inference, value: Value, mask: fx.Node) -> Reading:
    """A mask's element taken apart: a truth value, or a number that is added to the score."""
    if dtype_of(mask) == torch.bool:
        return Reading(value, sympy.Integer(0))
    visible: list[Value] = []
    biases: list[tuple[sympy.Expr, Value]] = []
    for added, where in branches(value):
        condition = decided(inference, where) if not hides(added) else sympy.false
        if condition != sympy.false:
            visible.append(condition)
            biases.append((added, condition))
    if all(bias == biases[0][0] for bias, _ in biases):
        bias = biases[0][0] if biases else sympy.Integer(0)
    else:
        bias = Piecewise(*biases[:-1], (biases[-1][0], True))
    return Reading(sympy.Or(*visible), bias)


def branches(value: Value) -> list[tuple[sympy.Expr, Value]]:
    """The values that a number takes, with conditions of which one holds."""
    value = sympy.piecewise_fold(value)
    found, before = [], []
    for branch, condition in value.args if isinstance(value, Piecewise) else ((value, sympy.true),):
        condition_here = sympy.And(condition, *(sympy.Not(earlier) for earlier in before))
        found += [(added, sympy.And(condition_here, digit)) for added, digit in of_zero_and_one(branch)]
        before.append(condition)
    return found


def of_zero_and_one(added: sympy.Expr) -> list[tuple[sympy.Expr, Value]]:
    """(1 - mask[b, k]) * -3.4e38 is -3.4e38 where mask[b, k] == 0, and 0 elsewhere: it holds 0 and 1."""
    for call in added.atoms(AppliedUndef):
        if call.is_integer and hides(added.subs(call, 0)):
            return [(added.subs(call, 0), sympy.Eq(call, 0)), (added.subs(call, 1), sympy.Ne(call, 0))]
    return [(added, sympy.true)]


def hides(added: sympy.Expr) -> bool:
    """Whether adding this leaves nothing of a score: a low number, whatever finite is added to it."""
    return any(term.is_number and term <= HIDDEN for term in sympy.Add.make_args(added))


# --- conditions to arguments of attention ----------------------------------------------------------------------------


def form_of(inference: Inference, reading: Reading, indices: tuple[sympy.Expr, ...], mask: fx.Node) -> MaskForm:
    b, _, q, k = indices
    causal, window, key_mask = False, None, None
    others: list[Value] = []
    for part in sorted(sympy.And.make_args(reading.condition), key=str):
        padding = padding_input(inference, part, (b, k))
        reach = window_of(part, q, k)
        if part == sympy.true:
            continue
        if isinstance(part, sympy.Ge) and part.lhs == q - k:
            causal = True
        elif reach is not None:
            window = reach if window is None else min(window, reach)
        elif padding is not None and key_mask in (None, padding):
            key_mask = padding
        else:
            others.append(part)
    bias = reading.bias
    if key_mask is not None and not dtype_of(key_mask).is_floating_point:
        bias = bias.subs(sympy.Function(key_mask.name, integer=True)(b, k), 1)
    bias = bias.subs(known_elements(others))
    condition = sympy.And(*others)
    if condition == sympy.false:
        raise NotInferred(mask, "it hides every key")
    bias = sum((term for term in sympy.Add.make_args(sympy.expand(bias)) if term.has(k)), sympy.Integer(0))
    writer = Writer(inference.leaves)
    for value in (condition, bias):
        refuse_squares(inference, value, q, k)
    try:
        visible = writer.write(condition) if others else None
        added = writer.write(bias) if bias != 0 else None
    except NoText as reason:
        raise NotInferred(mask, str(reason)) from None
    return MaskForm(causal, window, key_mask, visible, added, tuple(writer.tables))


def known_elements(parts: Sequence[Value]) -> dict[sympy.Expr, sympy.Expr]:
    """The elements of tables that the conditions fix: mask(b, k) is 1 where mask(b, k) - 1 == 0."""
    found = {}
    for part in parts:
        for call in part.atoms(AppliedUndef) if isinstance(part, sympy.Eq) else ():
            value = sympy.expand(call - part.lhs + part.rhs)
            if value.is_number:
                found[call] = value
    return found


def window_of(part: Value, q: sympy.Expr, k: sympy.Expr) -> int | None:
    """The W of k - q + W - 1 >= 0."""
    reach = part.lhs - (k - q) if isinstance(part, sympy.Ge) and part.has(q) and part.has(k) else None
    return int(reach) + 1 if reach is not None and reach.is_Integer and reach >= 0 else None


def padding_input(inference: Inference, condition: Value, indices: tuple[sympy.Expr, ...]) -> fx.Node | None:
    """The input of rank 2 of which `condition` says that its element (b, k) is not zero."""
    if not isinstance(condition, sympy.Ne) or condition.rhs != 0:
        return None
    leaf = inference.leaves.get(getattr(condition.lhs, "name", ""))
    if leaf is None or tuple(condition.lhs.args) != indices or len(sizes(leaf)) != 2:
        return None
    return leaf


def refuse_squares(inference: Inference, value: Value, q: sympy.Expr, k: sympy.Expr) -> None:
    """Raise NotInferred for a table with an element for each query and key: it is a mask itself."""
    for call in value.atoms(AppliedUndef):
        node = inference.leaves.get(call.name)
        by_query, by_key = ({place for place in call.args if place.has(index)} for index in (q, k))
        if node is not None and by_query and by_key and len(by_query | by_key) > 1:
            reason = inference.unknowns.get(node, "it has an element for each query and key")
            raise NotInferred(node, reason)
