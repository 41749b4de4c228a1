"""Where a graph multiplies by weights that can be quantized: the matrices of its linears."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...compiler.graph import Graph
from ...compiler.ops import OPS
from ...compiler.rewrite import Miss

LINEARS = (OPS["linear"].target, OPS["gated_linear"].target)


@dataclass(frozen=True)
class Site:
    """One matrix [rows, columns] and the linear that multiplies by it.

    name: of the weight's placeholder. shared: something besides this linear reads the weight (a tied embedding).
    """

    name: str
    node: fx.Node
    rows: int
    columns: int
    shared: bool

    @property
    def x(self) -> fx.Node:
        """The input of the linear, [..., columns]."""
        return self.node.args[0]

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def find_sites(graph: Graph) -> tuple[list[Site], list[Miss]]:
    """The sites in the order of the graph, and the linears that are none, with the reason."""
    sites, misses, seen = [], [], set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in LINEARS:
            continue
        weight = node.args[1]
        if weight.name not in graph.weights:
            misses.append(Miss.at(node, "quantize", f"{weight.name} is no weight but computed at run time"))
        elif weight.name not in seen:
            seen.add(weight.name)
            rows, columns = graph.weights[weight.name].shape
            sites.append(Site(weight.name, node, rows, columns, len(weight.users) > 1))
    return sites, misses
