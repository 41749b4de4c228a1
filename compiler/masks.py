"""What an attention mask means: causal, a window, padding, ALiBi, ..., or something that stays explicit.

    where((k <= q) & (attention_mask[b, k] != 0), 0, -3.4e38)   means   causal, with the key mask `attention_mask`
    (k <= q) & (k > q - 1024)                                   means   causal, with a window of 1,024 keys
    (document[b, q] == document[b, k]) & (k <= q)               means   causal, visible="t0[b, q] == t0[b, k]"
    slopes[h] * (k - q) + where(k <= q, 0, -3.4e38)             means   causal, bias="t0[h] * k"

A mask is inferred as a function of (b, h, q, k), taken apart into conditions and what it adds to the scores, and then
checked against the graph's own arithmetic at random sizes; a reading that does not hold there is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import sympy
import torch
from sympy import Piecewise
from sympy.core.function import AppliedUndef
from torch import fx

from .graph import Graph, dtype_of, size_expr, sizes
from .index_algebra import Inference, NotInferred
from .index_text import NoText, Writer
from .index_values import Shape, Value
from .rewrite import add_weight
from .weights import Constant

HIDDEN = -1e4
"""An additive mask hides a key where it adds this or less (the first GPT's choice; others take the lowest number)."""

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskForm:
    """A mask in the arguments of `effc.attention`; key k is visible to query q where all its conditions hold.

    causal: k <= q. window: k > q - window. key_mask: key_mask[b, k] != 0, an input of at least [B, T], of which what is
    beyond is not read; one of integers holds 0 and 1. visible: a condition over b, h, q, k and the tables t0, t1, ...
    (`index_expressions`). bias: what is added to the scores of visible keys, up to a number for each (b, h, q), which
    the softmax does not see.
    """

    causal: bool = False
    window: int | None = None
    key_mask: fx.Node | None = None
    visible: str | None = None
    bias: str | None = None
    tables: tuple[fx.Node, ...] = ()


class Blend(NamedTuple):
    """A mask in two tensors: scores * factor + added."""

    factor: fx.Node
    added: fx.Node


Mask = fx.Node | Blend


class Reading(NamedTuple):
    """A mask as a function of (b, h, q, k): the condition under which a key is visible, and what is added then."""

    condition: Value
    bias: sympy.Expr


@dataclass
class Masks:
    """Reads the masks of one graph; each is inferred and checked once however many layers use it."""

    graph: Graph
    known: dict[tuple[tuple[Mask, ...], Shape], MaskForm | NotInferred] = field(default_factory=dict)

    def read(self, mask: Mask, scores: Shape) -> MaskForm:
        """What `mask`, broadcast to `scores` [B, H, S, T], means. Raises NotInferred where that is not known."""
        return self._read((mask,), scores)

    def read_together(self, masks: Sequence[Mask], scores: Shape) -> tuple[MaskForm, dict[Mask, NotInferred]]:
        """What several masks mean that all hold, and those that stay operands with the reasons."""
        rest: dict[Mask, NotInferred] = {}
        for mask in masks:
            try:
                self.read(mask, scores)
            except NotInferred as reason:
                rest[mask] = reason
        return self._read(tuple(mask for mask in masks if mask not in rest), scores), rest

    def _read(self, masks: tuple[Mask, ...], scores: Shape) -> MaskForm:
        if (masks, scores) not in self.known:
            try:
                self.known[masks, scores] = checked_form(self.graph, masks, scores) if masks else MaskForm()
            except NotInferred as reason:
                self.known[masks, scores] = reason
        found = self.known[masks, scores]
        if isinstance(found, NotInferred):
            raise found
        return found


def checked_form(graph: Graph, masks: Sequence[Mask], scores: Shape) -> MaskForm:
    """What the masks mean together. Raises NotInferred."""
    from .mask_check import check_masks

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


def infer_masks(inference: Inference, masks: Sequence[Mask], scores: Shape) -> MaskForm:
    """What the masks mean together, by the algebra alone. Raises NotInferred."""
    indices = tuple(inference.index(name, size) for name, size in zip("bhqk", scores))
    readings = [reading_of(inference, mask, indices, scores) for mask in masks]
    condition = sympy.And(*(reading.condition for reading in readings))
    bias = sum((reading.bias for reading in readings), sympy.Integer(0))
    node = masks[0].added if isinstance(masks[0], Blend) else masks[0]
    return form_of(inference, Reading(inference.decide(condition), bias), indices, node)


# --- masks to conditions ---------------------------------------------------------------------------------------------


def reading_of(inference: Inference, mask: Mask, indices: tuple[sympy.Expr, ...], scores: Shape) -> Reading:
    if not isinstance(mask, Blend):
        return conditions(element(inference, mask, indices, scores), mask)
    kept, added = (element(inference, node, indices, scores) for node in mask)
    left_alone = sympy.Or(*(condition for factor, condition in branches(kept) if factor == 1))
    if not {factor for factor, _ in branches(kept)} <= {0, 1}:
        raise NotInferred(mask.factor, f"it multiplies the scores by {kept}")
    visible, bias = conditions(added, mask.added)
    if inference.decide(sympy.And(visible, sympy.Not(left_alone))) != sympy.false:
        raise NotInferred(mask.added, "it leaves keys visible whose scores are multiplied by zero")
    return Reading(sympy.And(visible, left_alone), bias)


def element(inference: Inference, mask: fx.Node, indices: tuple[sympy.Expr, ...], scores: Shape) -> Value:
    """The element of a mask that broadcasts to (b, h, q, k); batch and heads may be one dimension."""
    function = inference.infer(mask)
    shape = function.shape
    if len(shape) == 3 and shape[0] != scores[1] and shape[0] == sympy.expand(scores[0] * scores[1]):
        b, h, *rest = indices
        indices = (b * scores[1] + h, *rest)
    return function.read(indices)


def conditions(value: Value, mask: fx.Node) -> Reading:
    """A mask's element taken apart: a truth value, or a number that is added to the score."""
    if dtype_of(mask) == torch.bool:
        return Reading(value, sympy.Integer(0))
    visible: list[Value] = []
    biases: list[tuple[sympy.Expr, Value]] = []
    for added, condition in branches(of_zero_and_one(value)):
        if not hides(added):
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
        found.append((branch, sympy.And(condition, *(sympy.Not(earlier) for earlier in before))))
        before.append(condition)
    return found


def of_zero_and_one(value: sympy.Expr) -> sympy.Expr:
    """(1 - mask[b, k]) * -3.4e38  -->  where(mask[b, k] == 0, -3.4e38, 0): a mask of integers holds 0 and 1."""
    for call in value.atoms(AppliedUndef):
        slope = value.diff(call) if call.is_integer else sympy.Integer(0)
        if slope.is_number and slope.is_extended_real and slope >= -HIDDEN:
            value = Piecewise((value.subs(call, 0), sympy.Eq(call, 0)), (value.subs(call, 1), True))
    return value


def hides(added: sympy.Expr) -> bool:
    """Whether adding this leaves nothing of a score: a low number, whatever finite is added to it."""
    return any(term.is_number and term <= HIDDEN for term in sympy.Add.make_args(added))


# --- conditions to arguments of attention ----------------------------------------------------------------------------


def form_of(inference: Inference, reading: Reading, indices: tuple[sympy.Expr, ...], mask: fx.Node) -> MaskForm:
    b, _, q, k = indices
    causal, window, key_mask = False, None, None
    others: list[Value] = []
    for part in sympy.And.make_args(reading.condition):
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
    condition = sympy.And(*others)
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
