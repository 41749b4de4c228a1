"""Patterns over graph nodes: small combinators that bind names to what they find.

    X = any_("x")
    MEAN_SQUARE = op(aten.mean.dim, op(aten.pow.Tensor_Scalar, X, 2), any_("dims"), True)
    RSTD = op(aten.rsqrt.default, op(aten.add.Tensor, MEAN_SQUARE, const("eps")))

A pattern names the arguments it cares about, in the order of the op's schema; every other argument must have its
default value, so `op(aten.gelu.default, X)` is not the tanh approximation and `op(aten.add.Tensor, X, Y)` has
alpha 1. A name that occurs twice must stand for the same node or number. Operands of commutative ops are tried in
both orders, and a choice that fails later is taken back.

    PRODUCT = op(aten.mul.Tensor, X, Y).only_user()    # nothing but the match uses the product
    SILU = closed(op(aten.mul.Tensor, X, op(aten.sigmoid.default, X)))    # nor anything within, up to the root

Who uses a node is known once the whole match is: `rewrite` declines a match whose conditions do not hold, with the
node that is used elsewhere as the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from .graph import Graph, is_tensor

aten = torch.ops.aten

COMMUTATIVE = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        operator.add,
        operator.mul,
    }
)

CASTS = frozenset({aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout})


class Bindings(NamedTuple):
    """What a partial match has found: names bound to nodes or numbers, and the op nodes it consists of.

    private: nodes that nothing outside of the whole match may use.
    """

    graph: Graph
    names: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]
    private: tuple[fx.Node, ...] = ()

    def bind(self, name: str, value: Any) -> Bindings | None:
        """These bindings with `name` standing for `value`; None if it stands for something else already."""
        if name in self.names:
            return self if same(self.names[name], value) else None
        return self._replace(names={**self.names, name: value})


class Pattern:
    """Something that a node or an argument may look like."""

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        """Every way in which `value` fits, each as extended bindings."""
        raise NotImplementedError

    @property
    def targets(self) -> frozenset[Any] | None:
        """The call targets of the nodes that can match, or None if that is not known."""
        return None

    def named(self, name: str) -> Pattern:
        """This pattern, with what it matches bound to `name`."""
        return Named(self, name)

    def only_user(self) -> Pattern:
        """This pattern, where nothing but the match uses the node: what is rewritten with it is not needed again."""
        return OnlyUser(self)

    def __or__(self, other: Pattern) -> Pattern:
        return OneOf((self, other))


class Anything(Pattern):
    def __init__(self, name: str, fits: Callable[[Graph, Any], bool] = lambda graph, value: True) -> None:
        self.name = name
        self.fits = fits

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if self.fits(bindings.graph, value) and (bound := bindings.bind(self.name, value)) is not None:
            yield bound


class Literal(Pattern):
    def __init__(self, value: Any) -> None:
        self.value = value

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if same(self.value, value):
            yield bindings


class Sequence(Pattern):
    def __init__(self, items: tuple[Pattern, ...]) -> None:
        self.items = items

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if isinstance(value, (list, tuple)) and len(value) == len(self.items):
            yield from match_all(self.items, tuple(value), bindings)


class Named(Pattern):
    def __init__(self, pattern: Pattern, name: str) -> None:
        self.pattern = pattern
        self.name = name

    @property
    def targets(self) -> frozenset[Any] | None:
        return self.pattern.targets

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        bound = bindings.bind(self.name, value)
        if bound is not None:
            yield from self.pattern.match(value, bound)


class OnlyUser(Pattern):
    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    @property
    def targets(self) -> frozenset[Any] | None:
        return self.pattern.targets

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        for bound in self.pattern.match(value, bindings):
            yield bound._replace(private=(*bound.private, value))


class Closed(Pattern):
    """Nothing but the match uses the calls that `pattern` covers, besides its root and those named in `shared`."""

    def __init__(self, pattern: Pattern, shared: tuple[str, ...]) -> None:
        self.pattern = pattern
        self.shared = shared

    @property
    def targets(self) -> frozenset[Any] | None:
        return self.pattern.targets

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        for bound in self.pattern.match(value, bindings):
            open_ = (value, *(bound.names.get(name) for name in self.shared))
            inner = (node for node in bound.nodes[len(bindings.nodes) :] if node not in open_)
            yield bound._replace(private=(*bound.private, *inner))


class OneOf(Pattern):
    def __init__(self, choices: tuple[Pattern, ...]) -> None:
        self.choices = choices

    @property
    def targets(self) -> frozenset[Any] | None:
        parts = [choice.targets for choice in self.choices]
        return None if None in parts else frozenset().union(*parts)

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        for choice in self.choices:
            yield from choice.match(value, bindings)


class Call(Pattern):
    """A node that calls one of `calls` with arguments that match; see the module docstring for those not named."""

    def __init__(self, calls: tuple[Any, ...], args: tuple[Pattern, ...], kwargs: dict[str, Pattern]) -> None:
        self.calls = frozenset(calls)
        self.args = args
        self.kwargs = kwargs

    @property
    def targets(self) -> frozenset[Any] | None:
        return self.calls

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in self.calls:
            return
        found = arguments(value)
        names = list(found)
        if len(self.args) > len(names):
            return
        wanted = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        defaults = default_arguments(value.target)
        for name in names:
            if name not in wanted and not (name in defaults and same(found[name], defaults[name])):
                return
        patterns = [wanted[name] for name in names if name in wanted]
        values = [found[name] for name in names if name in wanted]
        bindings = bindings._replace(nodes=(*bindings.nodes, value))
        yield from match_all(patterns, values, bindings)
        if value.target in COMMUTATIVE and len(self.args) >= 2 and not same(values[0], values[1]):
            values[:2] = reversed(values[:2])
            yield from match_all(patterns, values, bindings)


class CallOf(Pattern):
    """A node that calls one of `calls`, whatever its arguments."""

    def __init__(self, calls: Iterable[Any]) -> None:
        self.calls = frozenset(calls)

    @property
    def targets(self) -> frozenset[Any] | None:
        return self.calls

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if isinstance(value, fx.Node) and value.op == "call_function" and value.target in self.calls:
            yield bindings._replace(nodes=(*bindings.nodes, value))


class Cast(Pattern):
    """A change of dtype of what `source` matches, and nothing else (no change of device or layout)."""

    def __init__(self, source: Pattern, dtype: torch.dtype | None) -> None:
        self.source = source
        self.dtype = dtype

    @property
    def targets(self) -> frozenset[Any] | None:
        return CASTS

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if not (is_tensor(value) and value.op == "call_function" and value.target in CASTS):
            return
        source = value.args[0]
        before, after = source.meta["val"], value.meta["val"]
        if before.device != after.device or before.layout != after.layout:
            return
        if self.dtype is not None and after.dtype != self.dtype:
            return
        yield from self.source.match(source, bindings._replace(nodes=(*bindings.nodes, value)))


class Part(NamedTuple):
    """`x[..., start:stop:step]` of a tensor whose last axis has `size` entries."""

    start: int
    stop: int
    step: int
    size: int


class LastAxisPart(Pattern):
    """A slice of the last axis, of a size known while compiling, of what `source` matches."""

    def __init__(self, source: Pattern, name: str) -> None:
        self.source = source
        self.name = name

    @property
    def targets(self) -> frozenset[Any] | None:
        return frozenset({aten.slice.Tensor})

    def match(self, value: Any, bindings: Bindings) -> Iterator[Bindings]:
        if not is_tensor(value) or value.target is not aten.slice.Tensor:
            return
        found = arguments(value)
        shape = found["self"].meta["val"].shape
        bounds = (found["start"] or 0, found["end"], found["step"])
        if found["dim"] not in (-1, len(shape) - 1) or not isinstance(shape[-1], int):
            return
        if any(isinstance(bound, fx.Node) for bound in bounds):
            return
        start, stop, step = slice(*bounds).indices(shape[-1])
        part = Part(start, max(start, stop), step, shape[-1])
        bound = bindings._replace(nodes=(*bindings.nodes, value)).bind(self.name, part)
        if bound is not None:
            yield from self.source.match(found["self"], bound)


def pattern(value: Any) -> Pattern:
    """`value` as a pattern: a list or tuple matches item by item, anything else itself."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (list, tuple)):
        return Sequence(tuple(pattern(item) for item in value))
    return Literal(value)


def any_(name: str, fits: Callable[[Graph, Any], bool] | None = None) -> Pattern:
    """Any node or value (for which `fits(graph, value)`, when given)."""
    return Anything(name) if fits is None else Anything(name, fits)


def tensor(name: str) -> Pattern:
    """Any node that computes a tensor."""
    return Anything(name, lambda graph, value: is_tensor(value))


def weight(name: str) -> Pattern:
    """A placeholder that holds a weight."""
    return Anything(name, lambda graph, value: isinstance(value, fx.Node) and value.name in graph.weights)


def const(name: str) -> Pattern:
    """A number known while compiling."""
    return Anything(name, lambda graph, value: isinstance(value, (int, float)) and not isinstance(value, bool))


def op(*signature: Any, **kwargs: Any) -> Pattern:
    """A call of any of the leading targets with the arguments that follow them.

    op(aten.silu.default, any_("x"));  op(aten.sub.Tensor, aten.add.Tensor, any_("x"), const("c"))
    """
    split = 0
    while split < len(signature) and is_target(signature[split]):
        split += 1
    args = tuple(pattern(argument) for argument in signature[split:])
    return Call(signature[:split], args, {name: pattern(value) for name, value in kwargs.items()})


def call_of(calls: Iterable[Any]) -> Pattern:
    """A call of any of these targets, whatever its arguments."""
    return CallOf(calls)


def closed(pattern: Pattern, *shared: str) -> Pattern:
    """`pattern`, where nothing but the match uses what is within it; its root and the names `shared` may be used."""
    return Closed(pattern, shared)


def cast(source: Pattern, dtype: torch.dtype | None = None) -> Pattern:
    """`source` in another dtype (in `dtype`, when given)."""
    return Cast(source, dtype)


def maybe_cast(source: Pattern) -> Pattern:
    """`source`, or `source` in another dtype."""
    return OneOf((Cast(source, None), source))


def part(source: Pattern, name: str) -> Pattern:
    """A slice of the last axis of `source`; binds `name` to a `Part`."""
    return LastAxisPart(source, name)


def is_target(value: Any) -> bool:
    return isinstance(value, torch._ops.OpOverload) or (callable(value) and not isinstance(value, (Pattern, type)))


def match_all(patterns: Any, values: Any, bindings: Bindings) -> Iterator[Bindings]:
    """Every way in which the patterns fit the values one by one."""
    if not patterns:
        yield bindings
        return
    for bound in patterns[0].match(values[0], bindings):
        yield from match_all(patterns[1:], values[1:], bound)


def same(left: Any, right: Any) -> bool:
    """Whether two arguments are the same node or equal values (True is not 1, 1 is 1.0)."""
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        return left is right
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    return left == right


def default_arguments(target: Any) -> dict[str, Any]:
    """The arguments of an op that may be left out, with their defaults."""
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    return {
        argument.name: argument.default_value for argument in target._schema.arguments if argument.has_default_value()
    }


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, in the order of the schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    found = default_arguments(node.target)
    names = [argument.name for argument in node.target._schema.arguments]
    found |= dict(zip(names, node.args, strict=False)) | node.kwargs
    return {name: found[name] for name in names if name in found}
