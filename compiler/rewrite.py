"""Rewrite a graph by rules: a pattern, and a function that builds what replaces it.

    def to_rms_norm(match):
        if match.value("x").dtype != match.root.meta["val"].dtype:
            return match.decline("the result has another dtype than the input")
        return match.call(ops.effc.rms_norm.default, match["x"], match["weight"], match["eps"])

    RULES = (Rule("rms_norm", RMS_NORM, to_rms_norm),)
    rewrite(graph, RULES)

A pass mutates the graph it is given; whoever wants to keep the original copies it first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .aliasing import ReadTooLate, check_unwritten, why_separate
from .estimate import Estimate, of_fusing
from .graph import Graph
from .pattern import Bindings, Pattern
from .weights import Weight


@dataclass(frozen=True)
class Miss:
    """Something that looked like a match and was left alone.

    node: its name. rule: the rule that declined. reason: why. source: the model's line that made the node. cost: what
    a step of decoding loses by it. during: the pass that it happened in.
    """

    node: str
    rule: str
    reason: str
    source: str
    cost: Estimate | None = None
    during: str = ""

    @classmethod
    def at(cls, node: fx.Node, rule: str, reason: str, cost: Estimate | None = None) -> Miss:
        return cls(node.name, rule, reason, source_line(node), cost)

    def within(self, name: str, step: int) -> Miss:
        """The same as a miss of the pass `name`, its cost as a part of a step that moves `step` bytes."""
        cost = self.cost
        if cost is not None and step:
            cost = dataclasses.replace(cost, share=cost.bytes / step)
        return dataclasses.replace(self, cost=cost, during=name)

    def __str__(self) -> str:
        text = f"{self.node}: {self.rule} does not apply: {self.reason}"
        if self.cost is not None:
            text += f"; costs {self.cost}"
        return text + (f"  # {self.source}" if self.source else "")


@dataclass
class PassResult:
    """What a pass did: how often its rules applied, and near-misses with reasons.

    inexact: why values change, for a pass that is meant to change them; None for a rewrite that keeps every value.
    """

    matches: int = 0
    misses: list[Miss] = field(default_factory=list)
    inexact: str | None = None

    def __add__(self, other: PassResult) -> PassResult:
        return PassResult(self.matches + other.matches, self.misses + other.misses, self.inexact or other.inexact)


class Match:
    """One place where a pattern fits: what its names stand for, and the nodes that it covers."""

    def __init__(self, graph: Graph, root: fx.Node, bindings: Bindings) -> None:
        self.graph = graph
        self.root = root
        self.names = bindings.names
        self.nodes = tuple(dict.fromkeys(bindings.nodes))
        self.private = bindings.private
        self.reason: str | None = None
        self.created: list[fx.Node] = []

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str, default: Any = None) -> Any:
        return self.names.get(name, default)

    def value(self, name: str) -> Tensor:
        """The fake tensor of the node that `name` stands for: its shape and dtype."""
        return self.names[name].meta["val"]

    def used_outside(self, nodes: Iterable[fx.Node]) -> fx.Node | None:
        """The first of the nodes that something outside the match uses, or None."""
        covered = {self.root, *self.nodes}
        return next((node for node in nodes if not covered.issuperset(node.users)), None)

    def decline(self, reason: str) -> None:
        """Leave the graph as it is, and say why. For use as `return match.decline(...)`."""
        self.reason = reason

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in the place of the root, with its shape from the shape rule.

        Raises ReadTooLate, which declines the match, where an operand is no longer what it was when it was matched.
        """
        node = insert(self.graph, self.root, target, *args, origins=self.nodes, **kwargs)
        self.created.append(node)
        check_unwritten(node)
        return node


@dataclass(frozen=True)
class Rule:
    """`rewrite(match)` gives the node that replaces the root of each match of `pattern`, or None to decline."""

    name: str
    pattern: Pattern
    rewrite: Callable[[Match], fx.Node | None]


def rewrite(graph: Graph, rules: Sequence[Rule]) -> PassResult:
    """Apply the rules in their order, each to every node, inputs before users; repeat until nothing changes.

    A rule that stands first wins, so larger patterns precede the smaller ones that they contain. Nodes that are no
    longer used are erased, with their weights. The misses are those that remain at the end.
    """
    result = PassResult()
    changed = True
    while changed:
        changed = False
        result.misses = []
        for rule in rules:
            targets = rule.pattern.targets
            for node in list(graph.nodes):
                if node.op != "call_function" or node._erased or (targets is not None and node.target not in targets):
                    continue
                if apply(graph, node, rule, result.misses):
                    result.matches += 1
                    changed = True
    return result


def apply(graph: Graph, node: fx.Node, rule: Rule, misses: list[Miss]) -> bool:
    """Replace `node` if the rule applies to it; whether it did. A match that the rule declines is added to `misses`."""
    reason, cost = None, None
    for bindings in rule.pattern.match(node, Bindings(graph, {}, ())):
        match = Match(graph, node, bindings)
        replacement = replacement_of(match, rule)
        if replacement is not None:
            replace(graph, node, replacement)
            erase_unused(graph, *match.created)
            return True
        erase_unused(graph, *match.created)
        if reason is None and match.reason is not None:
            reason, cost = match.reason, of_fusing(match.nodes, node)
    if reason is not None:
        misses.append(Miss.at(node, rule.name, reason, cost))
    return False


def replacement_of(match: Match, rule: Rule) -> fx.Node | None:
    """What the rule puts in the place of a match, if the conditions hold that its pattern and all rules have."""
    if (node := match.used_outside(match.private)) is not None:
        return match.decline(f"{node.name} is used elsewhere too")
    try:
        replacement = rule.rewrite(match)
    except ReadTooLate as reason:
        return match.decline(str(reason))
    if replacement is None or replacement is match.root:
        return None
    if replacement not in match.created and (reason := why_separate(match.root, replacement)):
        return match.decline(reason)
    return replacement


def replace(graph: Graph, node: fx.Node, replacement: fx.Node) -> None:
    """Let every user of `node` use `replacement` instead (the replacement itself may use it); erase what dies."""
    node.replace_all_uses_with(replacement, delete_user_cb=lambda user: user is not replacement)
    erase_unused(graph, node)


def insert(
    graph: Graph, before: fx.Node, target: Any, *args: Any, origins: Iterable[fx.Node] = (), **kwargs: Any
) -> fx.Node:
    """A new call before the node `before`, with its value from the shape rule and the source line of `before`.

    origins: the nodes it stands for; their names are kept in `meta["origins"]`.
    """
    with graph.fx.inserting_before(before):
        node = graph.fx.create_node("call_function", target, args, kwargs, name=op_name(target))
    node.meta["val"] = infer(graph, target, args, kwargs)
    for key in ("stack_trace", "nn_module_stack"):
        if key in before.meta:
            node.meta[key] = before.meta[key]
    names = (name for origin in origins for name in origin.meta.get("origins", (origin.name,)))
    node.meta["origins"] = tuple(dict.fromkeys(names))
    if getattr(target, "namespace", None) == "effc" and graph.dialect == "traced":
        graph.dialect = "fused"
    return node


def insert_named(graph: Graph, node: fx.Node, target: Any, named: Mapping[str, Any]) -> fx.Node:
    """A new call before `node`, which it stands for, with arguments by name; those by keyword may be left out."""
    schema = target._schema.arguments
    args = [named[argument.name] for argument in schema if not argument.kwarg_only]
    kwargs = {argument.name: named.get(argument.name) for argument in schema if argument.kwarg_only}
    given = {name: value for name, value in kwargs.items() if value is not None}
    return insert(graph, node, target, *args, origins=[node], **given)


def op_name(target: Any) -> str | None:
    """The name of an op without namespace and overload; None leaves the choice to fx."""
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else None


def infer(graph: Graph, target: Any, args: Any, kwargs: Any) -> Any:
    """The shape and dtype that a call would have, as a fake tensor (or a size), from the op's shape rule."""
    args, kwargs = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
    with fake_mode(graph), enable_python_dispatcher(), torch.no_grad():
        return target(*args, **kwargs)


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The mode of the graph's fake tensors, which knows its symbolic sizes."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    raise ValueError(f"graph {graph.name!r} has no fake tensors: every node needs its value in meta['val']")


def add_weight(graph: Graph, name: str, recipe: Weight) -> fx.Node:
    """The placeholder of a weight: the one that has this recipe already, or a new one behind the others.

    The name of a new one may get a suffix to be unique.
    """
    for known, other in graph.weights.items():
        if other == recipe:
            return graph.placeholder(known)
    last = graph.placeholders[-1]
    with graph.fx.inserting_after(last):
        node = graph.fx.placeholder(name)
    node.target = node.name
    with fake_mode(graph):
        node.meta["val"] = torch.empty(recipe.shape, dtype=recipe.dtype, device=device_of(graph))
    graph.weights[node.name] = recipe
    return node


def device_of(graph: Graph) -> torch.device:
    """The device of the graph's tensors."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next(value.device for value in values if isinstance(value, Tensor))


def erase_unused(graph: Graph, *nodes: fx.Node) -> int:
    """Erase those of the nodes that nothing uses, then what only they used; how many went.

    Calls that mutate something, inputs and states stay; a weight that nothing reads goes with its recipe.
    """
    erased = 0
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node._erased or node.users or not (removable_call(node) or node.name in graph.weights):
            continue
        pending.extend(node.all_input_nodes)
        graph.weights.pop(node.name, None)
        graph.fx.erase_node(node)
        erased += 1
    return erased


def removable_call(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.is_impure(impure_random=False)


def source_line(node: fx.Node) -> str:
    """The line of the model's source that made a node, as `file.py:12: code`; empty if it is not known.

    PyTorch's own modules (`linear.py: return F.linear(...)`) say less than the line that called them.
    """
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]*)", line (\d+)[^\n]*\n\s*([^\n]*)', trace)
    if not frames:
        return ""
    path, line, code = next((frame for frame in reversed(frames) if "/torch/" not in frame[0]), frames[-1])
    return f"{path.rsplit('/', 1)[-1]}:{line}: {code.strip()}"
