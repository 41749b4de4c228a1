"""What the compiler did: `program.explain()`, `effc.explain()` for torch.compile, and `effc.dump(model, folder)`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .codegen.fusion_cost import summary
from .compiler.files import refusals, write_atomically
from .compiler.rewrite import Miss, source_line

if TYPE_CHECKING:
    import torch

    from .anatomy import Anatomy
    from .codegen.cpu import CpuTarget
    from .codegen.schedule import Scheduled
    from .passes.cacheability import Cacheability
    from .passes.pipeline import Step
    from .program import Program


@dataclass(frozen=True)
class KernelUse:
    """One distinct kernel and the steps of a graph that may launch it."""

    name: str
    launches: int
    stands_for: tuple[str, ...]


@dataclass(frozen=True)
class MissingKernel:
    """An op that runs through ATen."""

    node: str
    op: str
    reason: str
    source: str


@dataclass(frozen=True)
class GraphExplanation:
    """One graph: what passes matched and nearly matched, its kernels, what has none, and what shares one, or not."""

    name: str
    passes: tuple[tuple[str, int, float], ...]
    misses: tuple[Miss, ...]
    kernels: tuple[KernelUse, ...]
    launches: int
    segments: int
    missing: tuple[MissingKernel, ...]
    notes: tuple[str, ...]
    fusion: tuple[str, ...] = ()

    @classmethod
    def refused(cls, name: str, reason: str) -> GraphExplanation:
        """A graph that eager PyTorch runs."""
        return cls(name, (), (), (), 0, 0, (), (f"runs in eager PyTorch: {reason}",))

    def __str__(self) -> str:
        lines = [
            f"graph {self.name}: {self.launches} launches of {len(self.kernels)} kernels in {self.segments} segments"
        ]
        matched = ", ".join(f"{name} {matches}" for name, matches, _ in self.passes)
        lines.append(f"  passes: {matched}")
        for kernel in self.kernels:
            lines.append(f"  {kernel.launches:4} x {kernel.name:40} {shortened(kernel.stands_for)}")
        for missing in self.missing:
            lines.append(f"  through ATen: {missing.node} = {missing.op}: {missing.reason}  {missing.source}".rstrip())
        lines += [f"  fusion: {decision}" for decision in self.fusion]
        lines += [f"  near miss in {miss.during}: {miss}" for miss in self.misses]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass
class Explanation:
    """What the compiler did with a model; prints as text.

    anatomy: what the model is made of, in one row. cache: its KV cache, or why it has none.
    """

    title: str
    graphs: list[GraphExplanation] = field(default_factory=list)
    cache: Cacheability | None = None
    anatomy: Anatomy | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [str(part) for part in (self.anatomy, self.cache) if part is not None]
        return "\n\n".join([self.title, *parts, *map(str, self.graphs)])


def shortened(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def explain_graph(scheduled: Scheduled, steps: Iterable[Step], notes: Iterable[str] = ()) -> GraphExplanation:
    """The account of one scheduled graph. steps: what the passes did that made it."""
    steps = list(steps)
    schedule = scheduled.schedule
    launches: Counter[str] = Counter()
    nodes: dict[str, list[str]] = {}
    for step in schedule.steps:
        for launch in step.launches:
            launches[launch.kernel.symbol] += 1
            nodes.setdefault(launch.kernel.symbol, []).extend(launch.nodes)
    missing = tuple(
        MissingKernel(step.node.name, str(step.node.target), step.reason, source_line(step.node))
        for step in schedule.fallbacks
    )
    return GraphExplanation(
        name=schedule.name,
        passes=tuple((step.name, step.matches, step.seconds) for step in steps),
        misses=tuple(miss for step in steps for miss in step.misses),
        kernels=tuple(KernelUse(name, count, tuple(nodes[name])) for name, count in launches.items()),
        launches=schedule.launch_count(one_row=schedule.name == "decode"),
        segments=len(schedule.fallbacks) + 1,
        missing=missing,
        notes=tuple(notes),
        fusion=tuple(summary(scheduled.decisions)),
    )


def explain_program(program: Program, kinds: Iterable[str] = ("prefill", "decode")) -> Explanation:
    """The account of a program's graphs; of `forward` alone where it has no KV cache."""
    from .anatomy import anatomy
    from .passes.cacheability import cacheability

    result = Explanation(f"{program.model.name} on {program.target.isa}")
    result.anatomy = anatomy(program)
    result.cache = cacheability(program.stages.graph("forward", True))
    if result.cache.refusal is not None:
        kinds = ("forward",)
    for kind in kinds:
        scheduled = program.stages.scheduled(kind, False)
        graph = program.stages.graph(kind, False)
        result.graphs.append(explain_graph(scheduled, program.stages.steps(kind, False), graph.notes))
    return result


def explain(target: Any = None) -> Explanation:
    """What the compiler did.

    target: a Program, a model that `effc.compile` takes, or None for every graph that `torch.compile(...,
    backend="effc")` compiled in this process.
    """
    from .program import Program, compile

    if target is None:
        from .backend import COMPILED

        return Explanation("graphs compiled through torch.compile", [graph.explanation for graph in COMPILED])
    program = target if isinstance(target, Program) else compile(target)
    return explain_program(program)


# --- dumps -------------------------------------------------------------------------------------------------------


def dump(model: Any, output: str | Path, dtype: torch.dtype | None = None, **options: Any) -> Path:
    """Write everything between a model and its native code into a folder; returns the index.

    graphs/ holds each graph before and after each pass, <graph>.txt the launches in order and the memory plan, and
    kernels/ the Triton source, Triton IR and C++ of each kernel; <kernel>.txt has them line by line beside each other,
    then the assembly of the hot loop. Other options go to `effc.compile`.
    """
    from .program import KINDS, compile

    output = Path(output)
    with refusals(output):
        output.mkdir(parents=True, exist_ok=True)
    program = compile(model, dtype, dump=output / "graphs", **options)
    lines = []
    for kind in KINDS:
        scheduled = program.stages.scheduled(kind, False)
        dump_schedule(scheduled, output, program.target)
        lines.append(str(explain_graph(scheduled, program.stages.steps(kind, False))))
    reports = [f"graphs/{name}\n{report}" for name, report in program.stages.reports.items()]
    index = output / "index.txt"
    write_atomically(index, "\n\n".join([*reports, *lines]) + "\n")
    return index


def dump_schedule(scheduled: Scheduled, output: Path, target: CpuTarget | None) -> None:
    """The launches and the memory plan of one graph, and its kernels: as C++ too if a CPU is the target."""
    from .codegen.build import cpp_kernel, kernel_file
    from .codegen.cpu.listing import listing

    write_atomically(output / f"{scheduled.schedule.name}.txt", describe_schedule(scheduled))
    folder = output / "kernels"
    for kernel in scheduled.schedule.kernels:
        launches = [launch for step in scheduled.schedule.steps for launch in step.launches if launch.kernel == kernel]
        nodes = [name for launch in launches for name in launch.nodes]
        write_atomically(folder / f"{kernel.symbol}.py", kernel_file(kernel, nodes))
    if target is None:
        return
    lowered = {kernel.symbol: cpp_kernel(kernel, target) for kernel in scheduled.schedule.kernels}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each runs the compiler once more
        listings = pool.map(lambda kernel: listing(kernel, target), lowered.values())
        for (symbol, kernel), text in zip(lowered.items(), listings, strict=True):
            write_atomically(folder / f"{symbol}.ttir", kernel.ttir)
            write_atomically(folder / f"{symbol}.cpp", kernel.cpp)
            write_atomically(folder / f"{symbol}.txt", text)


def describe_schedule(scheduled: Scheduled) -> str:
    """The launches of a graph in order, then its memory plan."""
    from .codegen.kernel import Choice, Fallback
    from .codegen.memory import plan_memory
    from .codegen.rounding import rounding_points

    schedule = scheduled.schedule
    lines = [f"graph {schedule.name}", "", "step  what"]
    for position, step in enumerate(schedule.steps):
        if isinstance(step, Fallback):
            what = f"{step.node.target} through ATen: {step.reason}"
        elif isinstance(step, Choice):
            cases = [
                f"{condition}: " + ", ".join(one.kernel.symbol for one in found) for condition, found in step.cases
            ]
            what = "one of " + "; ".join(cases) + f"  ({', '.join(step.launches[0].nodes)})"
        else:
            what = f"{step.kernel.symbol} on {tuple(step.grid)}  ({', '.join(step.nodes)})"
        points = sum(rounding_points(launch.kernel) for launch in step.launches[:1])
        if points:
            what += f", rounds at {points} points within"
        lines.append(f"{position:4}  {what}")
    plan = plan_memory(schedule)
    lines += ["", f"memory plan: {len(plan.slots)} slots, {plan.arena_bytes} bytes instead of {plan.unplanned_bytes}"]
    for position, slot in enumerate(plan.slots):
        lines.append(f"slot {position}: {slot.size} bytes")
        for buffer in slot.buffers:
            first, last = plan.lives[buffer.name]
            lines.append(f"    {buffer.name:30} steps {first} to {last}")
    return "\n".join(lines) + "\n"
