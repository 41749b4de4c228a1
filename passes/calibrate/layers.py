"""Interpret a graph for many texts at once, one stretch of nodes after another, holding only what is still needed.

    walk = Walk(graph, source, inputs)
    for site in find_sites(graph):
        for x in walk.values(site.x): ...       # every text up to here; earlier layers are already forgotten
        walk.assignments[site.name] = rounded   # what comes after sees the rounded weight

Between two stretches live the residual stream and what crosses with it; a weight is read when a stretch needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...compiler.evaluate import evaluate
from ...compiler.graph import Graph
from ...compiler.interpret import Interpreter
from ...compiler.trace import POSITIONS
from ...compiler.weights import TensorSource
from .assignment import Assignment

Inputs = Mapping[str, Tensor]


class Walk:
    """The values of `graph` for several texts, computed in the order of its nodes.

    inputs: for each text, a value for each name in `graph.inputs`. assignments: what stands for recipes, by name of
    their placeholders; may be added to on the way. dtype: compute in this type instead of the graph's.
    """

    def __init__(
        self,
        graph: Graph,
        source: TensorSource | None,
        inputs: Sequence[Inputs],
        assignments: Mapping[str, Assignment] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.graph, self.source = graph, source
        self.assignments = dict(assignments or {})
        self.interpreter = Interpreter(graph.module, dtype)
        self.nodes = [node for node in graph.nodes if node.op != "placeholder"]
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.dying: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node in graph.nodes:
            if node.users:
                self.dying[max(self.order[user] for user in node.users)].append(node)
        given = [node for node in graph.placeholders if node.name not in graph.weights]
        self.environments: list[dict[fx.Node, Any]] = [
            {node: self.interpreter.convert(text[node.name]) for node in given} for text in inputs
        ]
        self.position = 0

    def values(self, node: fx.Node) -> Iterator[Tensor]:
        """What `node` is for each text. Raises KeyError if the walk has passed its last use."""
        self.to(node)
        return (environment[node] for environment in self.environments)

    def to(self, node: fx.Node) -> None:
        """Compute all nodes up to and with `node`, text by text."""
        stop = self.order.get(node, -1) + 1
        if stop <= self.position:
            return
        stretch = range(self.position, stop)
        weights = self._weights(stretch)
        for index, environment in enumerate(self.environments):
            values = self._run(stretch, environment, weights)
            self.environments[index] = {node: value for node, value in values.items() if node not in weights}
        self.position = stop

    def outputs(self) -> Iterator[Tensor]:
        """The graph's first output for each text, computed as it is asked for; the walk stays where it is."""
        stretch = range(self.position, len(self.nodes))
        weights = self._weights(stretch)
        for environment in self.environments:
            yield self._run(stretch, environment, weights)[self.nodes[-1]][0]

    def _run(
        self, stretch: range, environment: Mapping[fx.Node, Any], weights: Mapping[fx.Node, Tensor]
    ) -> dict[fx.Node, Any]:
        """What is alive after the nodes of a stretch, given what was before."""
        values = {**environment, **weights}
        self.interpreter.env = values
        with torch.no_grad():
            for index in stretch:
                node = self.nodes[index]
                values[node] = self.interpreter.run_node(node)
                for dead in self.dying[index]:
                    values.pop(dead, None)
        return values

    def _weights(self, stretch: range) -> dict[fx.Node, Tensor]:
        found = {}
        for index in stretch:
            for node in self.nodes[index].all_input_nodes:
                if node.name in self.graph.weights and node not in found:
                    found[node] = self.interpreter.convert(self.weight(node.name))
        return found

    def weight(self, name: str) -> Tensor:
        """The tensor of a weight's placeholder: what was assigned to it, or what its recipe makes."""
        recipe = self.graph.weights[name]
        if name in self.assignments:
            return self.assignments[name].values(recipe.dtype)
        return evaluate(recipe, self.source)


def inputs_of(graph: Graph, rows: Tensor) -> list[dict[str, Tensor]]:
    """The inputs of a traced language model for token ids [rows, length], each row on its own, without padding."""
    given = {name: POSITIONS[name](rows.shape[1]) for name in graph.inputs if name in POSITIONS}
    return [{"input_ids": row[None], **given} for row in rows]
