"""Run a graph node by node with eager PyTorch: the oracle for passes and kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from . import ops  # noqa: F401  (registers the references of the vocabulary)
from .errors import InputError
from .evaluate import evaluate
from .graph import Graph
from .weights import TensorSource


def run(
    graph: Graph,
    inputs: Mapping[str, Any],
    source: TensorSource | None = None,
    states: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The outputs of `graph` in eager PyTorch.

    inputs: one value for each name in `graph.inputs`. source: where the weights' recipes read from (None if they
    read nothing). states: one tensor for each name in `graph.states`, updated in place. dtype: compute in this type
    instead of the graph's floating-point types; float64 gives a reference to measure rounding errors against.
    Raises InputError where a name is missing or unknown.
    """
    states = states or {}
    _check_names("input", graph.inputs, inputs)
    _check_names("state", graph.states, states)
    weights = {name: evaluate(weight, source) for name, weight in graph.weights.items()}
    values = {**weights, **inputs, **states}
    interpreter = Interpreter(graph.module, dtype)
    with torch.no_grad():
        arguments = [interpreter.convert(values[node.name]) for node in graph.placeholders]
        return list(interpreter.run(*arguments))


class Interpreter(fx.Interpreter):
    """Evaluates nodes in order; with a `dtype`, in that floating-point type wherever the graph says another."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype | None) -> None:
        super().__init__(module)
        self.dtype = dtype

    def convert(self, value: Any) -> Any:
        if self.dtype is None:
            return value
        if isinstance(value, torch.dtype):
            return self.dtype if value.is_floating_point else value
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.dtype)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.dtype is not None:
            args, kwargs = fx.node.map_aggregate((args, kwargs), self.convert)
        return super().call_function(target, args, kwargs)


def _check_names(kind: str, expected: list[str] | tuple[str, ...], found: Mapping[str, Any]) -> None:
    missing, unknown = set(expected) - set(found), set(found) - set(expected)
    if missing or unknown:
        raise InputError(f"expected {kind}s {sorted(expected)}, found {sorted(found)}")
