"""Whether what masks were read as is what the graph computes: both are evaluated at random sizes and inputs."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .attention_ops import ScoreArguments, all_of
from .graph import Graph, size_expr
from .index_values import NotInferred, Shape
from .mask_form import HIDDEN, MaskForm
from .weights import Constant

CHECKED_SIZES = range(2, 8)
CHECKS, ATTEMPTS = 4, 16
"""A reading is compared with the graph this often; sizes that do not go together, which cannot be run, are skipped."""

LONGEST = 4100
"""One comparison is at a length beyond the form's window and numbers, if they are below this."""


ZERO = torch.zeros(())


def check_masks(
    graph: Graph, masks: Sequence[fx.Node], form: MaskForm, scores: Shape, unknown: Collection[fx.Node] = ()
) -> None:
    """Compare `form` with the graph's own masks at several sizes and inputs. Raises NotInferred where they differ.

    unknown: nodes that are unknown functions to the form, which hold random numbers as the inputs do.
    """
    compared, failure = 0, None
    for seed, sizes in enumerate([reaching_sizes(form, masks, scores), *[{}] * ATTEMPTS]):
        try:
            values, symbols = evaluate_at_random(graph, masks, form, unknown, scores, sizes, seed=seed)
            same = agrees(form, masks, values, [size.subs(symbols) for size in scores])
        except NotInferred as reason:
            failure = reason
            continue
        if not same:
            raise NotInferred(masks[0], f"it was read as {form}, but the graph computes another mask (seed {seed})")
        compared += 1
        if compared == CHECKS:
            return
    if compared < 2:
        raise failure


def reaching_sizes(form: MaskForm, masks: Sequence[fx.Node], scores: Shape) -> dict[sympy.Symbol, int]:
    """Lengths beyond the numbers in the form and in the masks' arithmetic, where those are not too long to try."""
    texts = [str(form.window), str(form.visible), str(form.bias), *(str(node.args) for node in ancestors(*masks))]
    numbers = {int(number) for text in texts for number in re.findall(r"(?<![\w.])\d+(?![\w.])", text)}
    reach = 3 + max((number for number in numbers if number + 3 <= LONGEST), default=0)
    batch, _, *lengths = scores
    sizes = dict.fromkeys(lengths, reach) | {batch: 1}
    return {size: value for size, value in sizes.items() if size.is_Symbol} if reach > max(CHECKED_SIZES) else {}


def agrees(form: MaskForm, masks: Sequence[fx.Node], values: dict[fx.Node, Any], scores: list[sympy.Expr]) -> bool:
    """Whether the values of the masks, broadcast to `scores` [B, H, S, T], are what `form` says."""
    shape = tuple(map(int, scores))
    batch, heads, length, context = shape
    places = torch.arange(max(length, context))
    tables = [values[table] for table in form.tables]
    given = ScoreArguments(window=form.window, visible=form.visible, bias=form.bias, tables=tables)
    q_position, k_position = places[None, None, :length, None], places[None, None, None, :context]
    allowed, bias = given.of_indices(batch, heads, q_position, k_position, form.causal)
    if form.key_mask is not None:
        allowed = all_of(allowed, (values[form.key_mask][:batch, :context] != 0)[:, None, None, :])
    try:
        visible, added = zip(*(meaning(mask, values, shape) for mask in masks))
        visible = all_of(*visible)
        expected = torch.ones(()).bool() if allowed is None else allowed
        if not bool((visible == expected).all()):
            return False
        if bias is None and all(x is ZERO for x in added):
            return True
        bias = ZERO if bias is None else bias
        return same_up_to_rows(sum(added), bias, visible.expand(*visible.shape[:-1], context))
    except RuntimeError:  # the sizes do not broadcast
        return False


def meaning(mask: fx.Node, values: dict[fx.Node, Any], scores: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(visible, added to the scores) as the graph computes them."""
    value = of_rank_4(values[mask], scores)
    return (value, ZERO) if value.dtype == torch.bool else (value > HIDDEN, value)


def of_rank_4(value: Tensor, scores: tuple[int, ...]) -> Tensor:
    if value.ndim == 3 and value.shape[0] != scores[1] and value.shape[0] == scores[0] * scores[1]:
        return value.unflatten(0, scores[:2])
    return value


def same_up_to_rows(found: Tensor, expected: Tensor, visible: Tensor) -> bool:
    """Whether two biases differ, for the visible keys, by a number for each row, within the rounding of fp32."""
    found, expected, visible = torch.broadcast_tensors(found, expected, visible)
    difference = torch.where(visible, found.double() - expected, 0.0)
    first = visible.int().argmax(-1, keepdim=True)  # of a row without visible keys: the first, which is 0 as all are
    spread = (difference - difference.gather(-1, first)).abs().mul(visible).max()
    largest = torch.where(visible, torch.maximum(found.abs(), expected.abs()), 0.0).max()
    return bool(spread <= 8 * torch.finfo(torch.float32).eps * largest)


def evaluate_at_random(
    graph: Graph,
    nodes: Sequence[fx.Node],
    form: MaskForm,
    unknown: Collection[fx.Node],
    scores: Shape,
    symbols: dict[sympy.Symbol, int],
    *,
    seed: int,
) -> tuple[dict[fx.Node, Any], dict[sympy.Symbol, int]]:
    """The values of `nodes`, of the form's tensors and of what they are computed from, and the sizes used.

    Inputs are random: key masks of 0 and 1, other whole numbers of 0 to 3, or 0 and 1 at odd seeds, where they may be
    indices. Two seeds use the sizes of the traced example, others random ones; `symbols` goes before both. Raises
    NotInferred where the sizes do not go together.
    """
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    stop = {*unknown, *(node for node in graph.nodes if is_size(node))}
    wanted = ancestors(*nodes, *form.tables, *([form.key_mask] if form.key_mask is not None else []), stop=stop)
    symbols = (example_sizes(wanted) if seed in (1, 2) else {}) | symbols

    def size(value: Any) -> int:
        expr = value if isinstance(value, sympy.Expr) else size_expr(value)
        for symbol in sorted(expr.free_symbols, key=str):
            symbols.setdefault(symbol, chooser.choice(CHECKED_SIZES))
        return int(expr.subs(symbols))

    def random_value(node: fx.Node) -> Any:
        fake = node.meta["val"]
        if not isinstance(fake, Tensor):
            return size(fake)
        shape = [size(dim) for dim in fake.shape]
        if fake.dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(fake.dtype)
        binary = node is form.key_mask or fake.dtype == torch.bool or seed % 2
        return torch.randint(0, 2 if binary else 4, shape, generator=generator).to(fake.dtype)

    def is_given(node: fx.Node) -> bool:
        known = isinstance(graph.weights.get(node.name), Constant)
        return node in stop or (node.op == "placeholder" and not known)

    given = {node: random_value(node) for node in graph.nodes if node in wanted and is_given(node)}
    for expr in scores:
        size(expr)
    return evaluated(graph, [*nodes, *form.tables], given), symbols


def evaluated(graph: Graph, nodes: Sequence[fx.Node], given: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The values of `nodes` and of all they are computed from, up to the nodes that are given. Raises NotInferred."""
    wanted = ancestors(*nodes, stop=given)
    values = dict(given)
    try:
        for step in graph.nodes:
            if step not in wanted or step in given:
                continue
            if step.op == "placeholder":
                values[step] = graph.weights[step.name].tensor
            else:
                args, kwargs = fx.node.map_arg((step.args, step.kwargs), values.__getitem__)
                values[step] = step.target(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise NotInferred(nodes[0], f"it cannot be evaluated: {error}") from error
    return values


def is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def example_sizes(nodes: set[fx.Node]) -> dict[sympy.Symbol, int]:
    """The sizes of the inputs among `nodes` when they were traced, where those are known."""
    found = {}
    for node in nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.has_hint() and isinstance(size_expr(size), sympy.Symbol):
                found[size_expr(size)] = int(size.node.hint)
    return found


def ancestors(*nodes: fx.Node, stop: Container[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and everything that they are computed from, not beyond the nodes to stop at."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(() if node in stop else node.all_input_nodes)
    return found
