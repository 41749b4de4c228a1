"""What a pass changed in a graph, as pairs of small graphs that must compute the same value.

A node keeps its name through a pass, so a node of that name in the graph before and after should hold the same value.
Where such a node has another argument than before, the old argument and the new one are a *change*:

    before: add(mul_3, y)  after: add(rms_norm, y)     -->  mul_3 must equal rms_norm

Both are cut out of their graphs back to nodes that the pass kept; those become inputs. If every change holds, so does
the whole graph, by induction along it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .graph import Graph, is_tensor
from .verify import agree, describe
from .weights import Constant

UNSET = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)
"""Ops whose result holds whatever was there: no value to keep."""


@dataclass(frozen=True)
class Change:
    """A value of the graph before a pass and the one that a user reads in its place after it."""

    old: fx.Node
    new: fx.Node


def changes(before: Graph, after: Graph) -> Iterator[Change]:
    """Each value that something reads instead of another one, once, users after inputs."""
    earlier = {node.name: node for node in before.nodes}
    seen: set[tuple[str, str]] = set()
    for node in after.nodes:
        counterpart = earlier.get(node.name)
        if counterpart is None:
            continue
        for old, new in differing(counterpart, node, before, after):
            if (old.name, new.name) not in seen and getattr(old.target, "overloadpacket", None) not in UNSET:
                seen.add((old.name, new.name))
                yield Change(old, new)


def differing(old: fx.Node, new: fx.Node, before: Graph, after: Graph) -> list[tuple[fx.Node, fx.Node]]:
    """The arguments in which two nodes of one name differ; the nodes themselves if they cannot be paired."""
    if old.op == "placeholder" or new.op == "placeholder":
        same_recipe = before.weights.get(old.name) == after.weights.get(new.name)
        return [] if old.op == new.op and same_recipe else [(old, new)]
    (left, shape_left), (right, shape_right) = (pytree.tree_flatten((n.args, n.kwargs)) for n in (old, new))
    pairs = []
    paired = old.target == new.target and shape_left == shape_right
    for a, b in zip(left, right):
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            paired = paired and agree(a.meta.get("val"), b.meta.get("val"))
            if a.name != b.name:
                pairs.append((a, b))
        elif isinstance(a, fx.Node) or isinstance(b, fx.Node) or a != b:
            paired = False
    return pairs if paired or old.op == "output" else [(old, new)]


class Kept:
    """The nodes that a pass kept, by name: where regions may be cut.

    known: those whose values follow from the inputs alone (masks, positions, sizes), which stay what they are; the
    rest are activations, for which any numbers do.
    """

    def __init__(self, before: Graph, after: Graph) -> None:
        later = {node.name: node for node in after.nodes}
        self.place = {node.name: place for place, node in enumerate(before.nodes)}
        self.known: dict[str, fx.Node] = {}
        self.activations: dict[str, fx.Node] = {}
        learned: set[fx.Node] = set()
        for node in before.nodes:
            recipe = before.weights.get(node.name)
            if not isinstance(recipe, Constant | None) or not learned.isdisjoint(node.all_input_nodes):
                learned.add(node)
            if node.op == "output" or node.name not in later or not cuttable(node, later[node.name]):
                continue
            if recipe is None and node not in learned:
                self.known[node.name] = node
            elif node.op != "placeholder" and is_tensor(node) and node.meta["val"].dtype.is_floating_point:
                self.activations[node.name] = node

    def cut_above(self, change: Change, known: bool = True) -> Callable[[fx.Node], bool]:
        """Which nodes end a region around a change: activations kept that come before it; what is `known` too."""
        place = self.place[change.old.name]
        return lambda node: (
            self.place.get(node.name, place) < place
            and (node.name in self.activations or (known and node.name in self.known))
        )


def cuttable(old: fx.Node, new: fx.Node) -> bool:
    simple = is_tensor(old) or not isinstance(old.meta.get("val"), (list, tuple))
    return simple and agree(old.meta.get("val"), new.meta.get("val"))


@dataclass(frozen=True)
class Region:
    """The nodes of a graph that compute `roots`, in order, back to `leaves`: placeholders and where it was cut."""

    graph: Graph
    roots: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    leaves: frozenset[fx.Node]

    def build(self) -> Graph:
        """The region as a graph of its own; where it was cut it has inputs."""
        nodes = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in sorted(self.nodes, key=lambda node: node not in self.leaves):
            leaf = node in self.leaves
            mapping[node] = nodes.placeholder(node.name) if leaf else nodes.node_copy(node, mapping.__getitem__)
            mapping[node].meta = dict(node.meta)
        nodes.output(tuple(mapping[root] for root in self.roots))
        names = {node.name for node in self.leaves}
        weights = {name: recipe for name, recipe in self.graph.weights.items() if name in names}
        states = tuple(name for name in self.graph.states if name in names)
        return Graph(fx.GraphModule({}, nodes), self.graph.name, self.graph.dialect, weights, states)


class Cutter:
    """Cuts regions out of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.place = {node: place for place, node in enumerate(graph.nodes)}

    def region(self, roots: Sequence[fx.Node], ends: Callable[[fx.Node], bool] = lambda node: False) -> Region:
        """What computes `roots`, back to placeholders and to nodes where it `ends`."""
        found, leaves = set(), set()
        pending = list(roots)
        while pending:
            node = pending.pop()
            if node in found:
                continue
            found.add(node)
            if node.op == "placeholder" or ends(node):
                leaves.add(node)
            else:
                pending.extend(node.all_input_nodes)
        nodes = sorted(found, key=self.place.__getitem__)
        return Region(self.graph, tuple(roots), tuple(nodes), frozenset(leaves))


def fingerprint(before: Region, after: Region, kept: Kept) -> str:
    """Text that two pairs of regions share where they compute the same: names of activations and weights aside."""
    names: dict[str, str] = {}

    def anonymous(name: str) -> str:
        return name if name in kept.known else names.setdefault(name, f"%{len(names)}")

    def argument(value: Any) -> str:
        return str(fx.node.map_aggregate(value, lambda x: anonymous(x.name) if isinstance(x, fx.Node) else x))

    lines = []
    for region in (before, after):
        for node in region.nodes:
            value = describe(node.meta.get("val"))
            if node in region.leaves:
                recipe = str(region.graph.weights.get(node.name, ""))
                recipe = re.sub(r'"[^"]*"', lambda found: names.setdefault(found[0], f"%{len(names)}"), recipe)
                lines.append(f"{anonymous(node.name)} {value} {recipe}")
            else:
                lines.append(
                    f"{anonymous(node.name)} {value} {node.target} {argument(node.args)} {argument(node.kwargs)}"
                )
    return "\n".join(lines)
