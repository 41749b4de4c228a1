"""A difference that a pass made, as a Python file that shows it: the two small graphs as functions, and their inputs.

    def before(x, weight, floats=None):                      def after(x, weight, floats=None):
        mul = aten.mul.Tensor(x, x)                              return effc.rms_norm.default(x, weight, 1e-06)
        ...

The file needs effc for its ops only. With `floats=torch.float64` a function computes in fp64 throughout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import ops  # noqa: F401  (scripts call the vocabulary)
from .evaluate import evaluate
from .files import write_atomically
from .graph import Graph
from .samples import Sampler, widened
from .weights import Constant, Weight

Function = Callable[..., Any]

SCRIPT = '''"""{title}

Both functions must give the same: python {file}
"""

import torch
from torch import device  # noqa: F401

from effc.compiler.reproduce import random, recipe, show
from effc.compiler.weights import Add, Call, Cast, Concat, Constant, Multiply, Pack, Read, Reshape, Slice, Transpose

aten, effc = torch.ops.aten, torch.ops.effc
SEED = {seed}


{before}


{after}


def inputs(floats=None):
    return {{
{inputs}
    }}


if __name__ == "__main__":
    show(before, after, inputs)
'''


def write_script(path: Path, title: str, before: Graph, after: Graph, given: Mapping[str, Any], seed: int) -> Path:
    """Write the file and return its path. given: the inputs of both graphs; weights come from their recipes."""
    lines = []
    for name, value in given.items():
        lines.append(f"        {name!r}: {literal(name, value)},")
    for name, weight in {**before.weights, **after.weights}.items():
        lines.append(f"        {name!r}: recipe({constructor(weight)}, SEED, floats),")
    names = list(dict.fromkeys([*given, *before.weights, *after.weights]))
    text = SCRIPT.format(
        title=title.replace("\\", "/"),
        file=path.name,
        seed=seed,
        before=function_text("before", before, names),
        after=function_text("after", after, names),
        inputs="\n".join(lines),
    )
    write_atomically(path, text)
    return path


def function_text(name: str, graph: Graph, parameters: Iterable[str]) -> str:
    """A graph as a Python function of the given parameters, of which it may leave some unused."""
    lines = [f"def {name}({', '.join(parameters)}, floats=None):"]
    for node in graph.nodes:
        if node.op == "call_function":
            arguments = [spelled(value) for value in node.args]
            arguments += [f"{key}={spelled(value)}" for key, value in node.kwargs.items()]
            lines.append(f"    {node.name} = {target_text(node.target)}({', '.join(arguments)})")
    lines.append(f"    return {', '.join(node.name for node in graph.outputs)}")
    return "\n".join(lines)


def target_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, name = target._schema.name.split("::")
        return f"{namespace}.{name}.{target._overloadname}"
    return f"__import__('operator').{target.__name__}" if target.__module__ == operator.add.__module__ else repr(target)


def spelled(value: Any) -> str:
    """An argument as code; a floating-point type is the one asked for, if one is."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(spelled, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return f"floats or {value}"
    if isinstance(value, float) and value in (float("inf"), -float("inf")):
        return f"float('{value}')"
    return repr(value)


def literal(name: str, value: Any) -> str:
    """A value as code: floats are drawn anew from the seed, everything else is written out."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.dtype.is_floating_point:
        return f"random({name!r}, {tuple(value.shape)}, {value.dtype}, SEED, floats)"
    return f"torch.tensor({value.tolist()}, dtype={value.dtype})"


def constructor(weight: Weight) -> str:
    """The Python expression that makes a recipe."""
    if isinstance(weight, Constant):
        return f"Constant.of(torch.tensor({weight.tensor.tolist()}, dtype={weight.dtype}))".replace("inf", "torch.inf")
    return f"{type(weight).__name__}({', '.join(field_text(getattr(weight, field.name)) for field in fields(weight))})"


def field_text(value: Any) -> str:
    if isinstance(value, Weight):
        return constructor(value)
    if isinstance(value, tuple) and any(isinstance(item, Weight) for item in value):
        return f"({''.join(f'{field_text(item)}, ' for item in value)})"
    return repr(value)


# --- what a script calls -------------------------------------------------------------------------------------------


def random(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, floats: torch.dtype | None) -> Tensor:
    """An activation, drawn in `dtype`."""
    return Sampler({}, seed).floats(name, shape, dtype).to(floats or dtype)


def recipe(weight: Weight, seed: int, floats: torch.dtype | None) -> Tensor:
    """A weight whose parts are drawn from the seed."""
    weight = widened(weight) if floats is not None and weight.dtype.is_floating_point else weight
    return evaluate(weight, Sampler({}, seed).learn([weight]))


def show(before: Function, after: Function, inputs: Callable[..., Mapping[str, Any]]) -> float:
    """Print how far the two functions differ, in their own precision and in fp64; returns the latter."""
    worst = 0.0
    for label, floats in (("as it is", None), ("in fp64", torch.float64)):
        with torch.no_grad():
            old, new = (pytree.tree_leaves(function(**inputs(floats), floats=floats)) for function in (before, after))
        for a, b in zip(old, new, strict=True):
            if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                print(f"{label:9} before {a}, after {b}")
                worst = float("inf")
            else:
                worst = (a.double() - b.double()).abs().nan_to_num(0.0, 0.0, 0.0).max().item() if a.numel() else 0.0
                print(f"{label:9} {tuple(a.shape)} {a.dtype}: largest difference {worst:.3g}")
    return worst
