"""The compiler's stages for one model: trace, passes, schedule, build; each made once, when it is first asked for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .codegen.executable import Manifest
from .compiler.load import LoadedModel
from .compiler.schemes import scheme_of
from .compiler.weights import Weight

if TYPE_CHECKING:
    from .codegen.cpu import CpuTarget
    from .codegen.schedule import Scheduled
    from .compiler.graph import Graph
    from .passes.pipeline import Pass, Report, Step


@dataclass(frozen=True)
class Built:
    """One graph as native code, with what fills its weights. Plain data: this is what the cache holds.

    recipes: buffer -> recipe over the tensors of the model's file. library: file name in the cache's library folder.
    """

    manifest: Manifest
    library: str
    recipes: dict[str, Weight]
    summary: Summary


@dataclass(frozen=True)
class Summary:
    """What a receipt tells of one graph: counts of kernels and launches, ops without kernels, and seconds.

    formats: what its weights are kept in, and then what activations are rounded to, where it is quantized.
    """

    kernels: tuple[str, ...]
    launches: int
    fallbacks: tuple[str, ...]
    passes: tuple[tuple[str, int, float], ...]
    traced_calls: int
    arena: str
    formats: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What is asked of the compiler, as in `effc.compile`. passes: None are those of the pipeline."""

    passes: tuple[Pass | str, ...] | None = None
    skip: tuple[str, ...] = ()
    ring: int | None = None
    stream: tuple[int, int] | None = None
    rounding: str = "eager"
    quantize: str = "none"

    @property
    def identity(self) -> str | None:
        """Options as text that says what they are; None where a pass is a function, which has no name in the cache."""
        return None if any(callable(item) for item in self.passes or ()) else repr(self)


class Stages:
    """The compiler's stages for one model, each made once, on demand."""

    def __init__(self, model: LoadedModel, options: Options, dump: Path | None) -> None:
        self.model, self.options, self.dump = model, options, dump
        self.seconds: dict[str, float] = {}
        self.reports: dict[str, Report] = {}
        self._graphs: dict[tuple[str, bool], Graph] = {}
        self._scheduled: dict[tuple[str, bool], Scheduled] = {}

    @cached_property
    def traced(self) -> Graph:
        from .compiler.trace import trace

        start = time.perf_counter()
        graph = trace(self.model)
        self.seconds["trace"] = time.perf_counter() - start
        return graph

    def graph(self, kind: str, padded: bool) -> Graph:
        """The graph of `kind` that is scheduled; `padded` ones take an attention mask."""
        from .passes import pipeline
        from .passes.stream_attention import Seen, stream_attention

        key = (kind, padded)
        if key not in self._graphs:
            first, skip = self.options.passes or pipeline.PASSES, self.options.skip
            if kind == "forward" and padded:
                base, passes = self.traced, pipeline.quantized(first, scheme_of(self.options.quantize))
            else:
                base = self.graph("forward", padded or kind == "forward")
                made = pipeline.UNPADDED if kind == "forward" else pipeline.cached(kind, self.options.ring is not None)
                passes, skip = pipeline.later(made, first, skip), ()
            start = time.perf_counter()
            name = f"{kind}-padded" if padded else kind
            folder = None if self.dump is None else self.dump / name
            self._graphs[key], self.reports[name] = pipeline.run(base, passes, skip=skip, dump=folder)
            if self.options.stream is not None and base is self.traced:
                stream_attention(self._graphs[key], Seen(*self.options.stream))
            self.seconds[f"passes {name}"] = time.perf_counter() - start
        return self._graphs[key]

    def steps(self, kind: str, padded: bool) -> list[Step]:
        """What each pass did on the way from the trace to a graph, in order."""
        self.graph(kind, padded)
        names = ["forward-padded", *([] if padded else ["forward"])]
        if kind != "forward":
            names.append(f"{kind}-padded" if padded else kind)
        return [step for name in names for step in self.reports[name].steps]

    def scheduled(self, kind: str, padded: bool) -> Scheduled:
        from .codegen.schedule import schedule
        from .codegen.target import CPU

        key = (kind, padded)
        if key not in self._scheduled:
            start = time.perf_counter()
            self._scheduled[key] = schedule(self.graph(kind, padded), CPU, rounding=self.options.rounding)
            self.seconds[f"schedule {kind}"] = time.perf_counter() - start
        return self._scheduled[key]


def build(stages: Stages, kind: str, padded: bool, target: CpuTarget, libraries: Path) -> Built:
    """Schedule one graph, print its kernels and compile them."""
    from .codegen.build import build_native
    from .codegen.launcher import manifest_of
    from .codegen.memory import plan_memory

    scheduled = stages.scheduled(kind, padded)
    names = scheduled.scope.names
    start = time.perf_counter()
    plan = plan_memory(scheduled.schedule)
    library = build_native(scheduled.schedule, plan, names, target, libraries)
    stages.seconds[f"build {kind}"] = time.perf_counter() - start
    resolve = getattr(stages.model.source, "resolve", lambda recipe: recipe)
    summary = Summary(
        kernels=tuple(kernel.symbol for kernel in scheduled.schedule.kernels),
        launches=scheduled.schedule.launch_count(one_row=kind == "decode"),
        fallbacks=tuple(f"{step.node.name}: {step.reason}" for step in scheduled.schedule.fallbacks),
        passes=tuple((step.name, step.matches, step.seconds) for step in stages.steps(kind, padded)),
        traced_calls=sum(node.op == "call_function" for node in stages.traced.nodes),
        arena=str(plan.arena_bytes),
        formats=formats_of(stages.graph(kind, padded)),
        seconds=dict(stages.seconds),
    )
    recipes = {name: resolve(recipe) for name, recipe in scheduled.recipes.items()}
    return Built(manifest_of(scheduled.schedule, names), library.name, recipes, summary)


def formats_of(graph: Graph) -> tuple[str, ...]:
    """The formats of a graph's quantized weights, then those of its rounded activations."""
    from .compiler.ops import OPS

    found = [
        node.args[1]
        for name in ("dequantize", "fake_quantize")
        for node in graph.nodes
        if node.target is OPS[name].target
    ]
    return tuple(dict.fromkeys(found))
