"""What an attention mask means: causal, a window, padding, everything visible, or something that stays explicit.

    where((k <= q) & (attention_mask[b, k] != 0), 0, -3.4e38)   means   causal, with the key mask `attention_mask`
    (k <= q) & (k > q - 1024)                                   means   causal, with a window of 1,024 keys

A mask is inferred as a function of (b, h, q, k), taken apart into conditions, and then checked against the graph's
own arithmetic at random sizes; a reading that does not hold there is not used.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from sympy import Piecewise
from torch import Tensor, fx

from .graph import Graph, dtype_of, size_expr, sizes
from .index_algebra import Inference, NotInferred
from .index_values import Shape, Value
from .weights import Constant

HIDDEN = torch.finfo(torch.float16).min
"""An additive mask hides a key where it adds this or less: what the lowest half-precision number is, -65504."""

CHECKED_SIZES = range(2, 8)
CHECKS, ATTEMPTS = 4, 16
"""A reading is compared with the graph this often; sizes that do not go together, which cannot be run, are skipped."""


@dataclass(frozen=True)
class MaskForm:
    """A mask in the arguments of `effc.attention`; key k is visible to query q where all its conditions hold.

    causal: k <= q. window: k > q - window. key_mask: key_mask[b, k] != 0, an input of at least [B, T], of which what is
    beyond is not read. visible: a condition over b, h, q, k and the tables t0, t1, ... (`index_expressions`). bias:
    what is added to the scores of visible keys, up to a number for each (b, h, q), which the softmax does not see.
    """

    causal: bool = False
    window: int | None = None
    key_mask: fx.Node | None = None
    visible: str | None = None
    bias: str | None = None
    tables: tuple[fx.Node, ...] = ()


@dataclass
class Masks:
    """Reads the masks of one graph; each mask is inferred and checked once however many layers use it."""

    graph: Graph
    known: dict[tuple[fx.Node, Shape], MaskForm | NotInferred] = field(default_factory=dict)

    def read(self, mask: fx.Node, scores: Shape) -> MaskForm:
        """What `mask`, broadcast to `scores` [B, H, S, T], means. Raises NotInferred where that is not known."""
        key = (mask, scores)
        if key not in self.known:
            try:
                form = infer_mask(self.graph, mask, scores)
                check_mask(self.graph, mask, form, scores)
                self.known[key] = form
            except NotInferred as reason:
                self.known[key] = reason
        found = self.known[key]
        if isinstance(found, NotInferred):
            raise found
        return found


def infer_mask(graph: Graph, mask: fx.Node, scores: Shape) -> MaskForm:
    """Take a mask apart into conditions on (b, h, q, k). Raises NotInferred where one is not causal or padding."""
    inference = Inference(graph)
    function = inference.infer(mask)
    indices = tuple(inference.index(name, size) for name, size in zip("bhqk", scores))
    condition = inference.decide(visible(function.read(indices), mask))
    b, _, q, k = indices
    causal, window, key_mask = False, None, None
    for part in sympy.And.make_args(condition):
        padding = padding_input(inference, part, (b, k))
        if part == sympy.true:
            continue
        if isinstance(part, sympy.Ge) and part.lhs == q - k:
            causal = True
        elif isinstance(part, sympy.Ge) and (part.lhs - (k - q)).is_Integer and part.lhs - (k - q) >= 0:
            width = int(part.lhs - (k - q)) + 1
            window = width if window is None else min(width, window)
        elif padding is not None and key_mask in (None, padding):
            key_mask = padding
        else:
            raise NotInferred(mask, f"a key is visible only if {part}, which is neither causal, a window nor padding")
    return MaskForm(causal, window, key_mask)


def visible(value: Value, mask: fx.Node) -> Value:
    """The condition under which a mask's element leaves a key visible."""
    if dtype_of(mask) == torch.bool:
        return value
    value = sympy.piecewise_fold(value)
    branches = value.args if isinstance(value, Piecewise) else ((value, sympy.true),)
    allowed: list[Value] = []
    before: list[Value] = []
    for added, condition in branches:
        if not added.is_number or not (added == 0 or added <= HIDDEN):
            raise NotInferred(mask, f"it adds {added} to the scores")
        if added == 0:
            allowed.append(sympy.And(condition, *(sympy.Not(earlier) for earlier in before)))
        before.append(condition)
    return sympy.Or(*allowed)


def padding_input(inference: Inference, condition: Value, indices: tuple[sympy.Expr, ...]) -> fx.Node | None:
    """The input of rank 2 of which `condition` says that its element (b, k) is not zero."""
    if not isinstance(condition, sympy.Ne) or condition.rhs != 0:
        return None
    leaf = inference.leaves.get(getattr(condition.lhs, "name", ""))
    if leaf is None or tuple(condition.lhs.args) != indices or len(sizes(leaf)) != 2:
        return None
    return leaf


# --- checking against the graph ------------------------------------------------------------------------------------


def check_mask(graph: Graph, mask: fx.Node, form: MaskForm, scores: Shape) -> None:
    """Compare `form` with the graph's own mask at several sizes and inputs. Raises NotInferred where they differ."""
    compared, failure = 0, None
    for seed in range(ATTEMPTS):
        try:
            values, symbols = evaluate_at_random(graph, mask, form.key_mask, seed=seed)
        except NotInferred as reason:
            failure = reason
            continue
        if not agrees(form, mask, values, [size.subs(symbols) for size in scores]):
            raise NotInferred(mask, f"it was read as {form}, but the graph computes another mask (seed {seed})")
        compared += 1
        if compared == CHECKS:
            return
    if compared < 2:
        raise failure


def agrees(form: MaskForm, mask: fx.Node, values: dict[fx.Node, Any], scores: list[sympy.Expr]) -> bool:
    """Whether the value of `mask`, broadcast to `scores` [B, H, S, T], is what `form` says."""
    batch, _, length, context = scores
    if not (length.is_Integer and context.is_Integer and (batch.is_Integer or form.key_mask is None)):
        raise NotInferred(mask, f"its inputs do not determine the sizes {scores} of the scores")
    expected = torch.ones(int(length), int(context), dtype=torch.bool)[None, None]
    if form.causal:
        expected = expected.tril()
    if form.window is not None:
        expected = expected.triu(1 - form.window)
    if form.key_mask is not None:
        expected = expected & (values[form.key_mask][: int(batch), : int(context)] != 0)[:, None, None, :]
    found = values[mask] if values[mask].dtype == torch.bool else values[mask] == 0
    try:
        return bool((found == expected).all())
    except RuntimeError:  # the sizes do not broadcast
        return False


def evaluate_at_random(
    graph: Graph, *nodes: fx.Node | None, seed: int
) -> tuple[dict[fx.Node, Any], dict[sympy.Symbol, int]]:
    """The values of `nodes` and of what they are computed from, with random inputs of 0 and 1, and the sizes used.

    The first two seeds use the sizes of the traced example, others random ones. Raises NotInferred where a parameter
    of the model is needed, or where the sizes do not go together.
    """
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    wanted = ancestors(*(node for node in nodes if node is not None))
    symbols = example_sizes(wanted) if seed < 2 else {}

    def size(value: Any) -> int:
        expr = size_expr(value)
        for symbol in sorted(expr.free_symbols, key=str):
            symbols.setdefault(symbol, chooser.choice(CHECKED_SIZES))
        return int(expr.subs(symbols))

    def value_of(placeholder: fx.Node) -> Any:
        weight = graph.weights.get(placeholder.name)
        if isinstance(weight, Constant):
            return weight.tensor
        if weight is not None:
            raise NotInferred(nodes[0], f"it depends on the parameter {placeholder.name}")
        fake = placeholder.meta["val"]
        if not isinstance(fake, Tensor):
            return size(fake)
        return torch.randint(0, 2, [size(dim) for dim in fake.shape], generator=generator).to(fake.dtype)

    values: dict[fx.Node, Any] = {}
    try:
        for step in graph.nodes:
            if step not in wanted:
                continue
            if step.op == "placeholder":
                values[step] = value_of(step)
            else:
                args, kwargs = fx.node.map_arg((step.args, step.kwargs), values.__getitem__)
                values[step] = step.target(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise NotInferred(nodes[0], f"it cannot be evaluated at the sizes {symbols}: {error}") from error
    return values, symbols


def example_sizes(nodes: set[fx.Node]) -> dict[sympy.Symbol, int]:
    """The sizes of the inputs among `nodes` when they were traced, where those are known."""
    found = {}
    for node in nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.has_hint() and isinstance(size_expr(size), sympy.Symbol):
                found[size_expr(size)] = int(size.node.hint)
    return found


def ancestors(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes and everything that they are computed from."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found
