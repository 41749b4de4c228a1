"""Where the time of a graph goes: one line per kernel with its time, GFLOP/s and GB/s (`effc profile`)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import sympy
import torch

from .codegen.build import cpp_source
from .codegen.cpu import build_library
from .codegen.executable import NativeExecutable, runtime_size
from .codegen.launcher import manifest_of
from .codegen.memory import plan_memory
from .compiler.errors import InputError
from .compiler.ops import Cost, op_of
from .runtime import decode
from .runtime.kv_cache import KVCache

if TYPE_CHECKING:
    from .program import Program


@dataclass(frozen=True)
class KernelTime:
    """One kernel in one run of a graph. seconds: of all its launches. flops, bytes: by the cost table, 0 if unknown."""

    name: str
    launches: int
    seconds: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class Profile:
    """Times of one graph, kernel by kernel; prints as a table."""

    title: str
    kernels: tuple[KernelTime, ...]

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [self.title, f"{'ms':>9} {'share':>6} {'launches':>8} {'GFLOP/s':>8} {'GB/s':>6}  kernel"]
        for kernel in sorted(self.kernels, key=lambda kernel: -kernel.seconds):
            rates = [f"{value / kernel.seconds / 1e9:.1f}" if value else "" for value in (kernel.flops, kernel.bytes)]
            times = f"{kernel.seconds * 1e3:9.3f} {kernel.seconds / self.seconds:6.1%}"
            lines.append(f"{times} {kernel.launches:8} {rates[0]:>8} {rates[1]:>6}  {kernel.name}")
        lines.append(f"{self.seconds * 1e3:9.3f}  in all")
        return "\n".join(lines)


def profile(program: Program, kind: str = "decode", tokens: int = 512, repeats: int = 10) -> Profile:
    """Time each kernel of a graph on random tokens: prefill of `tokens`, or decode behind as many.

    The times are medians of `repeats` runs. Raises InputError for a graph that holds ops without kernels: they run
    outside of what is timed.
    """
    if kind not in ("prefill", "decode"):
        raise InputError(f"expected graph prefill or decode, found {kind!r}")
    decode.check_prompt(
        torch.zeros(1, tokens, dtype=torch.int64), None, 1, program.config.vocab_size, program.config.max_position
    )
    scheduled = program.stages.scheduled(kind, False)
    schedule, names = scheduled.schedule, scheduled.scope.names
    if schedule.fallbacks:
        raise InputError(f"{kind} holds ops without kernels ({schedule.fallbacks[0].node.name}): it cannot be timed")
    text = cpp_source(schedule, plan_memory(schedule), names, program.target, timed=True)
    library = build_library(text, program.target, program.libraries)
    executable = NativeExecutable(manifest_of(schedule, names), library)
    weights = program.weights(kind)

    launches = [launch for step in schedule.steps for launch in step.launches]
    clock = executable.library.launch_seconds
    clock.restype = ctypes.POINTER(ctypes.c_double)
    times = clock()
    cache = KVCache.allocate(program.config.cache_layout, 1, tokens + 1)
    length, past = (tokens, 0) if kind == "prefill" else (1, tokens)
    cache.past.fill_(past)
    inputs = {
        "input_ids": torch.randint(program.config.vocab_size, (1, length)),
        "position_ids": torch.arange(past, past + length)[None],
        "past": cache.past,
        **cache.states,
    }
    runs: list[list[float]] = []
    for _ in range(repeats + 1):  # the first one warms up
        for position in range(len(launches)):
            times[position] = 0.0
        executable(inputs, weights)
        runs.append(list(times[: len(launches)]))
    typical = [median(seconds) for seconds in zip(*runs[1:])]
    size_of = {symbol: runtime_size(inputs[name], axis) for symbol, (name, axis) in schedule.symbols.items()}
    nodes = {node.name: node for node in program.stages.graph(kind, False).nodes}
    rows: dict[str, list[float]] = {}
    for launch, seconds in zip(launches, typical):
        if seconds:
            costs = launch_costs((nodes[name] for name in launch.nodes if name in nodes), size_of)
            row = rows.setdefault(launch.kernel.symbol, [0, 0.0, 0.0, 0.0])
            for i, value in enumerate((1, seconds, *costs)):
                row[i] += value
    what = "a prompt" if kind == "prefill" else "a context"
    title = f"{program.model.name} {kind}, {what} of {tokens} tokens, median of {repeats} runs"
    return Profile(title, tuple(KernelTime(name, int(row[0]), *row[1:]) for name, row in rows.items()))


def launch_costs(nodes: Iterable[Any], sizes: dict[sympy.Symbol, int]) -> tuple[float, float]:
    """FLOPs and bytes of the vocabulary ops among a launch's nodes, at the given sizes."""
    flops = moved = 0.0
    nodes = list(nodes)
    for node in nodes:
        op = op_of(node)
        read_in_place = op is not None and op.kept is not None and any(user in nodes for user in node.users)
        if op is not None and not read_in_place:
            cost: Cost = op.cost(node)
            flops += float(sympy.sympify(cost.flops).subs(sizes))
            moved += float(sympy.sympify(cost.bytes).subs(sizes))
    return flops, moved
