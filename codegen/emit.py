"""A schedule as native code: one C++ function per run of launches, with one parallel region over all of them.

    for each launch:  threads take shares of its grid until all programs are done (codegen/cpu/threads.h)

Sizes, offsets and grids are computed by the function itself from the runtime sizes, so a call passes only
pointers and sizes. An op without a kernel ends a function; the next one starts behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch

from .cpu import CppKernel
from .expr import cpp_text
from .kernel import Buffer, Choice, Fallback, Launch, Pointer, Schedule, Step
from .memory import ALIGNMENT, MemoryPlan

C_TYPES: dict[torch.dtype, str] = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "uint16_t",
    torch.float16: "uint16_t",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "uint8_t",
}


EXPORT = 'extern "C" __attribute__((visibility("default")))'
CLOCK = """
extern "C" double omp_get_wtime(void);

static double seconds[{count}], last_stamp;

{export} double* launch_seconds() {{ return seconds; }}

static inline void stamp(int launch) {{
  if (omp_get_thread_num() != 0) return;
  const double now = omp_get_wtime();
  seconds[launch] += now - last_stamp;
  last_stamp = now;
}}
"""
"""What timed step functions add: the seconds from the end of one launch to the end of the next, summed over calls."""

SIZES = """\
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
"""
"""What sizes are written with (`expr.CppPrinter`)."""

PARAMETERS = "void* const* buffers, const int64_t* sizes, char* arena, int threads"


@dataclass(frozen=True)
class Segment:
    """Launches that run as one native function, and the op that runs through ATen behind them, if any."""

    function: str
    steps: tuple[Step, ...]
    fallback: Fallback | None


def segments(schedule: Schedule) -> list[Segment]:
    """Cut a schedule at the ops that run through ATen."""
    result, current = [], []
    for step in [*schedule.steps, None]:
        if isinstance(step, Fallback) or step is None:
            result.append(Segment(f"run_{len(result)}", tuple(current), step))
            current = []
        else:
            current.append(step)
    return result


def run_buffers(schedule: Schedule) -> list[Buffer]:
    """The buffers that a call passes by pointer, in order: everything but temporaries."""
    found: dict[str, Buffer] = {}
    for step in schedule.steps:
        for buffer in step.buffers:
            if buffer.kind != "temporary":
                found.setdefault(buffer.name, buffer)
    for layout in schedule.outputs:
        if layout.buffer.kind != "temporary":
            found.setdefault(layout.buffer.name, layout.buffer)
    return list(found.values())


class StepPrinter:
    """Prints the functions of one schedule. timed: they also measure each launch, for `effc profile`."""

    def __init__(
        self,
        schedule: Schedule,
        plan: MemoryPlan,
        kernels: dict[str, CppKernel],
        names: dict[sympy.Symbol, str],
        timed: bool = False,
    ) -> None:
        self.timed = timed
        self.schedule, self.plan, self.kernels, self.names = schedule, plan, kernels, names
        self.all_launches = [launch for step in schedule.steps for launch in step.launches]
        self.positions = {buffer.name: i for i, buffer in enumerate(run_buffers(schedule))}

    def size(self, expr: sympy.Basic) -> str:
        return cpp_text(expr, self.names)

    def pointer(self, pointer: Pointer, kind: str) -> str:
        """An address, cast to the parameter's type `kind`."""
        buffer = pointer.buffer
        if buffer.kind == "temporary":
            base = f"(arena + slot_{self.plan.slot_of[buffer.name]})"
        else:
            base = f"buffers[{self.positions[buffer.name]}]"
        offset = "" if pointer.offset == 0 else f" + {self.size(pointer.offset * buffer.dtype.itemsize)}"
        return f"({kind})((char*){base}{offset})" if offset else f"({kind}){base}"

    def arguments(self, launch: Launch) -> str:
        parameters = self.kernels[launch.kernel.symbol].params
        texts = []
        for (_, kind), argument in zip(parameters, launch.arguments, strict=True):
            texts.append(self.pointer(argument, kind) if isinstance(argument, Pointer) else self.size(argument))
        return ", ".join(texts)

    def launch(self, launch: Launch, indent: str) -> Iterator[str]:
        grid = [self.size(extent) for extent in launch.grid]
        yield f"{indent}{{  // {', '.join(launch.nodes)}"
        yield f"{indent}  const int64_t nx = {grid[0]}, ny = {grid[1]}, nz = {grid[2]}, all = nx * ny * nz;"
        place = "i % nx, i / nx % ny, i / (nx * ny), nx, ny, nz"
        call = f"{launch.kernel.symbol}({self.arguments(launch)}, {place})"
        yield f"{indent}  team.run(++launch, all, [&](int64_t i) {{ {call}; }});"
        if self.timed:
            yield f"{indent}  stamp({self.all_launches.index(launch)});"
        yield f"{indent}}}"

    def step(self, step: Step) -> Iterator[str]:
        if isinstance(step, Choice):
            opening = "if"
            for condition, launches in step.cases:
                head = "else" if condition == sympy.true else f"{opening} ({self.size(condition)})"
                yield f"    {head} {{"
                for launch in launches:
                    yield from self.launch(launch, "      ")
                yield "    }"
                opening = "else if"
        else:
            yield from self.launch(step, "    ")

    def preamble(self) -> Iterator[str]:
        for position, name in enumerate(self.names.values()):
            yield f"  const int64_t {name} = sizes[{position}];"
        yield "  int64_t end = 0;"
        for position, slot in enumerate(self.plan.slots):
            yield f"  const int64_t slot_{position} = end;"
            yield f"  end += ({self.size(slot.size)} + {ALIGNMENT - 1}) / {ALIGNMENT} * {ALIGNMENT};"

    def narrow_sizes(self) -> list[str]:
        """The runtime sizes that kernels take in 32 bits, each once."""
        found = []
        for launch in self.all_launches:
            for (_, kind), argument in zip(launch.kernel.signature, launch.arguments, strict=True):
                if kind == "i32" and not isinstance(argument, Pointer) and not argument.is_number:
                    found.append(self.size(argument))
        return list(dict.fromkeys(found))

    def functions(self) -> str:
        lines = [
            SIZES,
            CLOCK.format(count=len(self.all_launches), export=EXPORT) if self.timed else "",
            f"{EXPORT} int64_t arena_bytes(const int64_t* sizes) {{",
            *self.preamble(),
            *(f"  if ({size} > INT32_MAX) return -1;" for size in self.narrow_sizes()),
            "  return end;",
            "}",
            "",
        ]
        for segment in segments(self.schedule):
            lines += [
                f"{EXPORT} void {segment.function}({PARAMETERS}) {{",
                *self.preamble(),
                "  Team team(threads);",
                *(["  last_stamp = omp_get_wtime();"] if self.timed else []),
                "  on_threads(team.threads(), [&] {",
                "    uint64_t launch = 0;",
                *(line for step in segment.steps for line in self.step(step)),
                "  });",
                "}",
                "",
            ]
        return "\n".join(lines)
