"""Graphs that a rule matches, sampled from its pattern, and mutants of them that it may have to leave alone.

A pattern is a tree of combinators; sampling walks it from the leaves, computes every node on real tensors as it goes,
and gives up where an op refuses its arguments. What the combinators do not say (shapes, dims, which leaf is a weight)
is drawn at random until the rule applies.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from effc.compiler import interpret
from effc.compiler.graph import Graph
from effc.compiler.pattern import (
    COMMUTATIVE,
    Anything,
    Bindings,
    Call,
    CallOf,
    Cast,
    Closed,
    LastAxisPart,
    Literal,
    Named,
    OneOf,
    OnlyUser,
    Pattern,
    Sequence,
)
from effc.compiler.rewrite import Rule, infer, rewrite
from effc.compiler.samples import Sampler
from effc.compiler.weights import Read
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel

aten = torch.ops.aten

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "x": ((2, 5, 16), (2, 4, 5, 16), (10, 16), (2, 5, 4, 16)),
    "weight": ((16, 16), (32, 16)),
    "transposed": ((16, 16), (16, 32)),
    "bias": ((16,), (32,)),
    "scale": ((16,),),
    "q": ((2, 4, 5, 16),),
    "k": ((2, 4, 5, 16),),
    "v": ((2, 4, 5, 16),),
    "mask": ((5, 5), (2, 1, 5, 5)),
    "cos": ((1, 1, 5, 16), (2, 1, 5, 16), (2, 5, 16), (2, 5, 8), (1, 1, 5, 8)),
}
"""Shapes for leaves of these names (and of names that end in them); others take any of them."""

SHAPES["sin"] = SHAPES["cos"]
ANY_SHAPE = (*dict.fromkeys(shape for shapes in SHAPES.values() for shape in shapes), (), (2, 5, 8))

VALUES: dict[str, tuple[Any, ...]] = {
    "cubic": (0.044715,),
    "factor": (math.sqrt(0.5), math.sqrt(2 / math.pi)),
    "divisor": (math.sqrt(2),),
    "eps": (1e-6,),
    "dims": ([-1], [2], [1, 0]),
    "axis": (-1, 3),
    "shape": ([16],),
    "dropout": (0.0,),
    "scale": (None, 0.5, 1.0),
    "rows": ([10, 16], [-1, 16]),
}
"""Values for what is no tensor, by name."""

WORDS = ("none", "silu", "gelu", "gelu_tanh", "relu", "tanh")
NUMBERS = (1e-6, 0.5, 2, 3, 1, 0, 0.044715)
DIMS = (-1, 0, 1, 2, 3)
LISTS = ([-1], [2], [0, 2, 1, 3], [2, 5, 16], [2, 5, -1], [10, 16], [16], [2, 4, 5, 16], [1, 0], [0, 1, 2])
OTHER_DTYPE = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}


class Mismatch(Exception):
    """What was drawn does not fit together."""


class Sample:
    """A graph under construction, each node with the real tensor that it computes."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.fx = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.bound: dict[str, Any] = {}
        self.weights: list[str] = []
        self.dtype = chance.choice((torch.float32, torch.float32, torch.bfloat16))
        self.halves: bool | None = None

    def of(self, pattern: Pattern, kind: str = "Tensor", before: list[Any] | None = None) -> Any:
        """A node or value that `pattern` may match. kind: the type of the argument by the op's schema."""
        match pattern:
            case Literal():
                return pattern.value
            case Sequence():
                return [self.of(item) for item in pattern.items]
            case Named():
                return self.remember(pattern.name, lambda: self.of(pattern.pattern, kind, before))
            case OnlyUser() | Closed():
                return self.of(pattern.pattern, kind, before)
            case OneOf():
                return self.of(self.chance.choice(pattern.choices), kind, before)
            case Anything():
                return self.remember(pattern.name, lambda: self.leaf(pattern, kind, before))
            case Cast():
                source = self.of(pattern.source)
                dtype = pattern.dtype or OTHER_DTYPE.get(self.values[source].dtype, torch.float32)
                return self.call(aten._to_copy.default, (source,), {"dtype": dtype})
            case LastAxisPart():
                return self.part(pattern)
            case Call():
                return self.sample_call(pattern)
            case CallOf():
                return self.any_call(pattern)
        raise Mismatch(f"{type(pattern).__name__} cannot be sampled")

    def remember(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.bound:
            self.bound[name] = make()
        return self.bound[name]

    def leaf(self, pattern: Anything, kind: str, before: list[Any] | None) -> Any:
        """A new input or weight, or a number, as `fits` allows."""
        if pattern.name in VALUES and not (pattern.name == "scale" and kind.endswith(("Tensor", "Tensor]"))):
            return self.chance.choice(VALUES[pattern.name])
        drawn = self.plain(kind, before)
        if drawn is not None or (kind.startswith("Optional") and self.chance.random() < 0.5):
            return drawn
        takes_number = kind == "Tensor" and pattern.fits(Graph(fx.GraphModule({}, fx.Graph())), 0.5)
        if takes_number and pattern.name not in SHAPES:
            return self.chance.choice(NUMBERS)
        names = [key for key in SHAPES if pattern.name.split("_")[-1] == key]
        shape = self.chance.choice(SHAPES[names[0]] if names else ANY_SHAPE)
        return self.placeholder(pattern.name, torch.randn(shape).to(self.dtype), self.chance.random() < 0.6)

    def plain(self, kind: str, before: list[Any] | None) -> Any:
        """A value of another type than a tensor, for an argument of this kind."""
        inner = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional") else kind
        if inner in ("List[int]", "List[SymInt]"):
            shape = list(self.values[before[0]].shape) if before else []
            flat = [[-1, shape[-1]], [*shape[:-1], -1], shape] if shape else []
            return self.chance.choice([*LISTS, *flat])
        if inner in ("int", "SymInt"):
            return self.chance.choice(DIMS)
        if inner == "bool":
            return self.chance.choice((True, False))
        if inner == "str":
            return self.chance.choice(WORDS)
        if inner in ("float", "number", "Scalar"):
            return self.chance.choice(NUMBERS)
        return None

    def placeholder(self, name: str, value: Tensor, learned: bool) -> fx.Node:
        first = next(iter(self.fx.nodes), None)
        with self.fx.inserting_before(first):
            node = self.fx.placeholder(name)
        node.target = node.name
        self.values[node] = value
        if learned:
            self.weights.append(node.name)
        return node

    def part(self, pattern: LastAxisPart) -> fx.Node:
        """A half of a leaf, or its entries at even or odd places: one of the two ways for all parts of a graph."""
        source = self.of(pattern.source)
        size, last = self.values[source].shape[-1], self.values[source].ndim - 1
        if self.halves is None:
            self.halves = self.chance.random() < 0.6
        second = pattern.name.startswith(("second", "up", "rest"))
        if self.halves:
            return self.call(aten.slice.Tensor, (source, last, size // 2 * second, size // 2 * (1 + second), 1), {})
        return self.call(aten.slice.Tensor, (source, last, int(second), size, 2), {})

    def sample_call(self, pattern: Call) -> fx.Node:
        target = self.chance.choice(sorted(pattern.calls, key=str))
        schema = getattr(target, "_schema", None)
        kinds = {a.name: str(a.type) for a in schema.arguments} if schema else {}
        names = list(kinds)
        args: list[Any] = []
        for position, argument in enumerate(pattern.args):
            args.append(self.of(argument, kinds[names[position]] if names else "Tensor", args))
        kwargs = {name: self.of(value, kinds.get(name, "Tensor"), args) for name, value in pattern.kwargs.items()}
        if target in COMMUTATIVE and self.chance.random() < 0.5:
            args[:2] = reversed(args[:2])
        return self.call(target, tuple(args), kwargs)

    def any_call(self, pattern: CallOf) -> fx.Node:
        """A call with a leaf or a value for every argument that has no default."""
        target = self.chance.choice(sorted(pattern.calls, key=str))
        args: list[Any] = []
        for argument in target._schema.arguments:
            if not argument.has_default_value():
                args.append(self.leaf(Anything(argument.name), str(argument.type), args))
        return self.call(target, tuple(args), {})

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        real_args, real_kwargs = fx.node.map_arg((args, kwargs), self.values.__getitem__)
        try:
            value = target(*real_args, **real_kwargs)
        except Exception as error:
            raise Mismatch(str(error)) from error
        node = self.fx.create_node("call_function", target, args, kwargs)
        self.values[node] = value
        return node


def sample(rule: Rule, seed: int, trials: int = 600) -> Graph | None:
    """A graph to which the rule applies, or None if chance found none."""
    chance = random.Random(seed)
    for _ in range(trials):
        made = Sample(chance)
        try:
            root = made.of(rule.pattern)
            if not isinstance(root, fx.Node) or not isinstance(made.values[root], Tensor):
                continue
            made.fx.output((root,))
            leaves = {node.name: value for node, value in made.values.items() if node.op == "placeholder"}
            graph = rebuild(made.fx, leaves, made.weights)
        except Mismatch:
            continue
        trial = graph.copy()
        found = next(rule.pattern.match(trial.outputs[0], Bindings(trial, {}, ())), None)
        if found is not None and rewrite(trial, (rule,)).matches:
            return graph
    return None


def rebuild(
    nodes: fx.Graph,
    leaves: Mapping[str, Tensor],
    weights: list[str],
    edit: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]] | None = None,
    lead: Mapping[str, Callable[[Graph, fx.Node], fx.Node]] | None = None,
) -> Graph:
    """The same calls over leaves of these shapes and dtypes, every value derived anew.

    edit: other arguments for a call. lead: what stands between a leaf and its users. Raises Mismatch where an op
    refuses.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    graph = Graph(fx.GraphModule({}, fx.Graph()), dialect="fused")
    mapping: dict[fx.Node, fx.Node] = {}
    for node in nodes.nodes:
        if node.op == "placeholder":
            new = graph.fx.placeholder(node.name)
            new.meta["val"] = mode.from_tensor(leaves[node.name], static_shapes=True)
            mapping[node] = new
            if node.name in weights:
                graph.weights[new.name] = Read(node.name, tuple(leaves[node.name].shape), leaves[node.name].dtype)
    for node in nodes.nodes:
        if node.op == "placeholder" and node.name in (lead or {}):
            mapping[node] = lead[node.name](graph, mapping[node])
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), mapping.__getitem__)
            if edit is not None:
                args, kwargs = edit(node, args, kwargs)
            mapping[node] = append(graph, node.target, args, kwargs)
        elif node.op == "output":
            graph.fx.output(tuple(mapping[root] for root in node.args[0]))
    require_runnable(graph)
    return graph


def require_runnable(graph: Graph) -> None:
    """Raise Mismatch where eager refuses what the shape rules accept, or would read beyond the end of its values."""
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            q, k, v = (argument.meta["val"] for argument in node.args[:3])
            mask = node.args[3].meta["val"] if len(node.args) > 3 and node.args[3] is not None else q[..., :1, :1]
            if k.shape[-2] != v.shape[-2] or mask.shape[-2] not in (1, q.shape[-2]):
                raise Mismatch("keys and values, or queries and a mask, of different lengths")
    sampler = Sampler({}, 0).learn(graph.weights.values())
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others take a mask that does not fit, or one beside is_causal
            interpret.run(graph, sampler.inputs(graph), sampler)
    except Exception as error:
        raise Mismatch(str(error)) from error


def append(graph: Graph, target: Any, args: Any, kwargs: Any | None = None) -> fx.Node:
    new = graph.fx.create_node("call_function", target, tuple(args), dict(kwargs or {}))
    try:
        new.meta["val"] = infer(graph, target, new.args, new.kwargs)
    except Exception as error:
        raise Mismatch(str(error)) from error
    return new


# --- mutants ---------------------------------------------------------------------------------------------------------

Mutant = tuple[str, Callable[[], Graph]]


def mutants(graph: Graph) -> Iterator[Mutant]:
    """Graphs that differ from one that matches in one respect each; making one may raise Mismatch."""
    values = {node.name: node.meta["val"] for node in graph.placeholders}
    leaves = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in values.items()}
    yield from other_leaves(graph, leaves)
    yield from other_users(graph, leaves)
    yield from other_arguments(graph, leaves)


def other_leaves(graph: Graph, leaves: dict[str, Tensor]) -> Iterator[Mutant]:
    learned = list(graph.weights)

    def with_leaves(**changed: Tensor) -> Callable[[], Graph]:
        return lambda: rebuild(graph.fx, leaves | changed, learned)

    def led(name: str, value: Tensor, way: Callable[[Graph, fx.Node], fx.Node]) -> Callable[[], Graph]:
        return lambda: rebuild(graph.fx, leaves | {name: value}, learned, lead={name: way})

    for name, value in leaves.items():
        for dtype in (torch.float64, torch.float16, OTHER_DTYPE.get(value.dtype, torch.float32)):
            yield f"{name} in {dtype}", with_leaves(**{name: value.to(dtype)})
        if name in learned:
            others = [weight for weight in learned if weight != name]
            yield f"{name} is no weight", lambda others=others: rebuild(graph.fx, leaves, others)
        shape = tuple(value.shape)
        for axis in range(len(shape)):
            narrow = (*shape[:axis], 1, *shape[axis + 1 :])
            yield f"{name} broadcast along {axis}", with_leaves(**{name: value.new_empty(narrow)})
            yield (
                f"{name} expanded along {axis}",
                led(name, value.new_empty(narrow), lambda g, n, s=shape: append(g, aten.expand.default, (n, list(s)))),
            )
        if len(shape) >= 2:
            dims = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
            turned = value.new_empty([shape[dim] for dim in dims])
            yield f"{name} transposed", led(name, turned, lambda g, n, d=dims: append(g, aten.permute.default, (n, d)))
        if shape:
            wide = value.new_empty((*shape[:-1], 2 * shape[-1]))
            ends = (len(shape) - 1, 0, 2 * shape[-1], 2)
            halved = led(name, wide, lambda g, n, e=ends: append(g, aten.slice.Tensor, (n, *e)))
            yield f"every other entry of {name}", halved
    for old, new in (
        (2, 0),
        (2, 1),
        (2, 3),
        (5, 0),
        (5, 1),
        (10, 0),
        (10, 1),
        (16, 15),
        (16, 14),
        (4, 6),
        (4, 3),
        (8, 7),
    ):
        resized = {n: v.new_empty([new if size == old else size for size in v.shape]) for n, v in leaves.items()}
        yield f"{new} instead of {old}", with_leaves(**resized)
        for name, value in resized.items():
            yield f"{new} instead of {old} in {name}", with_leaves(**{name: value})
    for heads in (1, 2, 3):
        fewer = {name: leaves[name].new_empty((2, heads, 5, 16)) for name in ("k", "v") if name in leaves}
        if fewer:
            yield f"{heads} heads of keys and values", with_leaves(**fewer)


def other_users(graph: Graph, leaves: dict[str, Tensor]) -> Iterator[Mutant]:
    learned = list(graph.weights)

    def also_out(name: str) -> Graph:
        made = rebuild(graph.fx, leaves, learned)
        (output,) = (node for node in made.nodes if node.op == "output")
        output.args = ((*output.args[0], next(node for node in made.nodes if node.name == name)),)
        return made

    def written(name: str) -> Graph:
        made = rebuild(graph.fx, leaves, [weight for weight in learned if weight != name])
        (output,) = (node for node in made.nodes if node.op == "output")
        with made.fx.inserting_before(output):
            append(made, aten.mul_.Tensor, (made.placeholder(name), 2.0))
        return made

    def one_for_two(first: str, second: str) -> Graph:
        made = rebuild(graph.fx, leaves, learned)
        made.placeholder(second).replace_all_uses_with(made.placeholder(first))
        return made

    built = rebuild(graph.fx, leaves, learned)
    for name in (node.name for node in built.nodes if node.op == "call_function" and node not in built.outputs):
        yield f"{name} is used elsewhere", lambda name=name: also_out(name)
    for name in leaves:
        yield f"{name} is written to behind", lambda name=name: written(name)
        for other in leaves:
            if other != name and leaves[other].shape == leaves[name].shape:
                yield f"{other} is {name}", lambda name=name, other=other: one_for_two(name, other)


def other_arguments(graph: Graph, leaves: dict[str, Tensor]) -> Iterator[Mutant]:
    learned = list(graph.weights)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for key in (*range(len(node.args)), *node.kwargs):
            found = node.args[key] if isinstance(key, int) else node.kwargs[key]
            for other in varied(found):

                def edit(at: fx.Node, args: Any, kwargs: Any, node=node, key=key, other=other) -> tuple[Any, Any]:
                    if at is not node:
                        return args, kwargs
                    if isinstance(key, int):
                        return (*args[:key], other, *args[key + 1 :]), kwargs
                    return args, kwargs | {key: other}

                yield (
                    f"{node.name}({key}={other!r}) instead of {found!r}",
                    lambda edit=edit: rebuild(graph.fx, leaves, learned, edit),
                )


def varied(value: Any) -> list[Any]:
    """Other values of an argument that is no node."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 2, value + 1]
    if isinstance(value, str):
        return [word for word in WORDS if word != value]
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        return [[item + 1, *value[1:]] for item in value[:1]] + [list(reversed(value)), [*value[:-1], 0]]
    return []
