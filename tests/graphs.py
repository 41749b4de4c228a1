"""Small graphs from functions, scheduled and run natively beside eager.

check(lambda x, w: torch.softmax(x * w, -1), x=tensor, w=tensor, dynamic={"x": (0, 1)})
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from effc.codegen.build import build_native
from effc.codegen.cpu import host_target
from effc.codegen.executable import Executable, NativeExecutable
from effc.codegen.launcher import fallback_calls, manifest_of
from effc.codegen.memory import plan_memory
from effc.codegen.schedule import Scheduled, schedule
from effc.codegen.target import CPU, Target
from effc.compiler.evaluate import evaluate
from effc.compiler.graph import Graph
from effc.compiler.sources import ModuleSource
from effc.compiler.weights import Constant
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from .tolerance import assert_close_to_reference

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Axes = Mapping[str, tuple[int, ...]]


def graph_of(
    function: Function,
    examples: Mapping[str, Tensor],
    dynamic: Axes | None = None,
    weights: tuple[str, ...] = (),
    states: tuple[str, ...] = (),
) -> Graph:
    """The ATen graph of a function of named tensors.

    dynamic: which axes of an argument are runtime sizes; those of equal example size are one size. weights, states:
    which arguments are weights (held as constants) and states (written in place).
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for name, tensor in examples.items():
        free = (dynamic or {}).get(name, ())
        kinds = [DimDynamic.DUCK if axis in free else DimDynamic.STATIC for axis in range(tensor.ndim)]
        fakes.append(mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds)))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        result = function(*tensors)
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad(), mode:
        traced = make_fx(call, pre_dispatch=True)(*fakes)
    graph = Graph(traced, "forward", "stateful" if states else "fused", states=states)
    for node, name in zip(graph.placeholders, examples, strict=True):
        node._rename(name)
        node.target = node.name
    graph.weights = {name: Constant.of(examples[name]) for name in weights}
    traced.graph.eliminate_dead_code()
    return graph


def native(scheduled: Scheduled) -> NativeExecutable:
    """A schedule compiled for this machine."""
    result, names = scheduled.schedule, scheduled.scope.names
    cache = Path(os.environ["EFFC_CACHE_DIR"]) / "codegen-tests"
    cache.mkdir(parents=True, exist_ok=True)
    library = build_native(result, plan_memory(result), names, host_target(), cache)
    return NativeExecutable(manifest_of(result, names), library, fallback_calls(scheduled))


class Compiled:
    """A function compiled for the CPU, to be run at any sizes its graph allows."""

    def __init__(
        self,
        function: Function,
        examples: Mapping[str, Tensor],
        dynamic: Axes | None = None,
        weights: tuple[str, ...] = (),
        states: tuple[str, ...] = (),
        target: Target = CPU,
        pack: bool = True,
        rounding: str = "eager",
    ) -> None:
        self.function, self.examples, self.states = function, tuple(examples), states
        self.last: list[Tensor] = []
        self.eager_errors: dict[int, float] = {}
        self.graph = graph_of(function, examples, dynamic, weights, states)
        self.scheduled = schedule(self.graph, target, pack, rounding)
        self.executable: Executable = native(self.scheduled)
        source = ModuleSource(nn.Module())
        self.weights = {name: evaluate(recipe, source).contiguous() for name, recipe in self.scheduled.recipes.items()}

    @property
    def source(self) -> str:
        """The Triton code of all kernels."""
        return "\n".join(kernel.source for kernel in self.scheduled.schedule.kernels)

    @property
    def fallbacks(self) -> list[str]:
        """The ops that run through ATen."""
        return [str(step.node.target) for step in self.scheduled.schedule.fallbacks]

    def __call__(self, **tensors: Tensor) -> list[Tensor]:
        names = {given: node.name for given, node in zip(self.examples, self.graph.placeholders)}
        inputs = {names[given]: x for given, x in tensors.items() if given not in self.weights}
        return self.executable(inputs, self.weights)

    def check(self, luck: int = 0, **tensors: Tensor) -> list[Tensor]:
        """Run and compare every output, and every state afterwards, with eager; returns the outputs.

        Eager's error is the largest of all runs so far: where there are few elements, check many first, or grant
        that eager was lucky not to be off by `luck` ulps of the largest element.
        """
        cached = {name: tensors[name].clone() for name in self.states}
        actual = self(**{**tensors, **cached})
        wide = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
        results = zip((*actual, *cached.values()), self.eager(tensors), self.eager(wide), strict=True)
        for position, (ours, theirs, truth) in enumerate(results):
            seen = self.eager_errors.get(position, 0.0)
            if luck and ours.is_floating_point() and ours.numel():
                seen = max(seen, luck * torch.finfo(ours.dtype).eps * theirs.nan_to_num(0, 0, 0).abs().max().item())
            self.eager_errors[position] = assert_close_to_reference(ours, theirs, truth, f"output {position}", seen)
        return actual

    def eager(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        copies = {name: x.clone() if name in self.states else x for name, x in tensors.items()}
        with torch.no_grad():
            result = self.function(*copies.values())
        results = result if isinstance(result, tuple) else (result,)
        return [*results, *(copies[name] for name in self.states)]


def check(
    function: Function,
    dynamic: Axes | None = None,
    weights: tuple[str, ...] = (),
    states: tuple[str, ...] = (),
    fallbacks: int = 0,
    pack: bool = True,
    **tensors: Tensor,
) -> Compiled:
    """Compile a function of named tensors, run it on them, compare it with eager; it has `fallbacks` ops of ATen."""
    compiled = Compiled(function, tensors, dynamic, weights, states, pack=pack)
    compiled.last = compiled.check(**tensors)
    assert len(compiled.fallbacks) == fallbacks, compiled.fallbacks
    return compiled


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers from a printed seed."""
    print(f"seed {seed}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
