"""What calibration made of a model, by the names of its parameters: what a file of the quantized model holds.

parts of concat(q, k, v)            -->  parts of q, of k and of v: their rows
norm / s                            -->  the norm's new values
rms_norm(x, g) --> rms_norm(x)      -->  ones for g
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...compiler.errors import ModelError
from ...compiler.evaluate import evaluate
from ...compiler.graph import Graph
from ...compiler.weights import Call, Cast, Concat, Constant, Multiply, Read, TensorSource, Transpose, Weight
from .assignment import Assignment
from .methods import Calibration


@dataclass
class Parameters:
    """matrices: parameters in parts. transposed: those of them that the model has as [K, N]. values: parameters that
    are not rounded, and other than they were."""

    matrices: dict[str, Assignment] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    def layout(self, name: str) -> tuple[tuple[int, int], bool]:
        """Shape [N, K] of a matrix in parts, and whether the model has it as [K, N]."""
        assignment = self.matrices[name]
        codes = assignment.parts[0]
        return (codes.shape[0], assignment.format.columns(codes.shape[1])), name in self.transposed


def parameters(before: Graph, calibration: Calibration, source: TensorSource | None) -> Parameters:
    """The parameters that differ from those of `source`, which the graph `before` was traced with.

    Raises ModelError where a weight is no longer made of whole parameters, and where one parameter became two: such a
    model has to be kept as a graph.
    """
    graph, found = calibration.graph, Parameters()
    made: dict[str, str] = {}
    as_before: set[str] = set()
    for placeholder, recipe in graph.weights.items():
        assignment = calibration.assignments.get(placeholder)
        if assignment is None and recipe == before.weights.get(placeholder):
            as_before |= set(recipe.names())
            continue
        values = None if assignment is not None else evaluate(recipe, source)
        start = 0
        for name, rows, transposed in rows_of(recipe, placeholder):
            if name in made:
                raise ModelError(f"{name} became two weights, {made[name]} and {placeholder}: a file has it once")
            made[name] = placeholder
            if assignment is not None:
                parts = tuple(part.narrow(0, start, rows) for part in assignment.parts)
                found.matrices[name] = Assignment(assignment.format, parts)
                found.transposed |= {name} if transposed else set()
            else:
                new = values.narrow(0, start, rows)
                found.values[name] = new.t() if transposed else new
            start += rows
    for placeholder, recipe in before.weights.items():
        for name in set(recipe.names()) - as_before - made.keys():  # the scale of a norm that is folded into matrices
            if not isinstance(recipe, Read):
                raise ModelError(f"{placeholder} is folded into others, and no parameter but {recipe}")
            found.values[name] = torch.ones(recipe.shape, dtype=recipe.dtype)
    return found


def rows_of(recipe: Weight, placeholder: str) -> Iterator[tuple[str, int, bool]]:
    """The parameters whose rows follow one another in a weight: name, rows, and whether the model has it transposed."""
    match recipe:
        case Read():
            yield recipe.name, recipe.shape[0], False
        case Transpose(source=Read() as source, dims=(1, 0)):
            yield source.name, recipe.shape[0], True
        case Cast(source=source) | Multiply(left=source):
            yield from rows_of(source, placeholder)
        case Concat(sources=sources, dim=0):
            for source in sources:
                yield from rows_of(source, placeholder)
        case Call(op="aten.mm.default" | "aten.matmul.default", args=(source, Constant())):
            yield from rows_of(source, placeholder)
        case Call(op="aten.mm.default", args=(Constant(), Read() | Cast(source=Read()) as source)):
            yield from rows_of(source, placeholder)
        case _:
            raise ModelError(f"{placeholder} is not made of whole parameters but by {recipe}")
