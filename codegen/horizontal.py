"""Merge small launches that do not depend on each other: one kernel whose programs are shared out among them.

    rope(q); rope_to_cache(k, cache); write_to_cache(v, cache)  -->  rope_and_rope_to_cache_and_write_to_cache

    program < programs(rope):                       rope, program
    program < programs(rope) + programs(rope_2):    rope_2, program - programs(rope)
    ...

Each part stays a function of its own, so a merged kernel reads as its parts and a list of who does what. A launch
says what it writes to be merged at all (kernels that fill the machine by themselves do not); any other is taken to
write whatever it touches.
"""

from __future__ import annotations

import itertools
import re

import sympy

from .kernel import Buffer, Kernel, Launch, Pointer, Step
from .pointwise import RESERVED

MOST_PARTS = 4
"""Launches that one kernel merges at most."""


def merge_launches(steps: list[Step]) -> list[Step]:
    """The steps with independent launches merged; each part moves forward to the first of them."""
    groups: list[list[Step]] = []
    for step in steps:
        place = earliest(groups, step)
        if place is None:
            groups.append([step])
        else:
            groups[place].append(step)
    return [merged(group) if len(group) > 1 else group[0] for group in groups]


def earliest(groups: list[list[Step]], step: Step) -> int | None:
    """The first group that the step can join: neither it nor one behind it depends on the step, or the other way."""
    found = None
    for place in range(len(groups) - 1, -1, -1):
        group = groups[place]
        if any(depend(step, other) for other in group):
            break
        if is_mergeable(step) and all(map(is_mergeable, group)) and len(group) < MOST_PARTS:
            found = place
    return found


def is_mergeable(step: Step) -> bool:
    return isinstance(step, Launch) and step.writes is not None and step.grid[1:] == (1, 1)


def depend(step: Step, other: Step) -> bool:
    """Whether one writes what the other touches."""
    return not written(step).isdisjoint(other.buffers) or not written(other).isdisjoint(step.buffers)


def written(step: Step) -> frozenset[Buffer]:
    writes = getattr(step, "writes", None)
    return frozenset(step.buffers if writes is None else writes)


# --- the merged kernel -------------------------------------------------------------------------------------------


class Parameters:
    """The parameters of a merged kernel; what several parts are given is passed once."""

    def __init__(self, used: set[str]) -> None:
        self.used = used
        self.names: dict[tuple[str, Pointer | sympy.Expr], str] = {}

    def name(self, wanted: str, kind: str, argument: Pointer | sympy.Expr) -> str:
        """Text that stands for an argument: its number, or the parameter that holds it."""
        if not isinstance(argument, Pointer) and argument.is_Integer:
            return str(argument)
        if (kind, argument) not in self.names:
            self.names[kind, argument] = fresh(wanted, self.used)
        return self.names[kind, argument]

    @property
    def ordered(self) -> list[tuple[str, str, Pointer | sympy.Expr]]:
        """Name, type and argument of each, pointers first."""
        found = [(name, kind, argument) for (kind, argument), name in self.names.items()]
        return sorted(found, key=lambda parameter: not isinstance(parameter[2], Pointer))


def merged(parts: list[Launch]) -> Launch:
    """One launch that does what the parts do."""
    names = list(dict.fromkeys(part.kernel.name for part in parts))
    name = "_and_".join(names) if len(names) > 1 else f"{names[0]}_{len(parts)}_times"
    parameters = Parameters({name, "program", *RESERVED})
    functions = {kernel: fresh(kernel.name, parameters.used) for kernel in dict.fromkeys(part.kernel for part in parts)}
    calls = []
    for part in parts:
        arguments = zip(part.kernel.signature, part.arguments, strict=True)
        given = [parameters.name(wanted, kind, argument) for (wanted, kind), argument in arguments]
        calls.append((functions[part.kernel], given))
    *ends, programs = itertools.accumulate(part.grid[0] for part in parts)
    starts = [parameters.name("programs", "i32", end) for end in ends]
    texts = [part_function(kernel, function) for kernel, function in functions.items()]
    texts.append(dispatcher(name, [name for name, _, _ in parameters.ordered], calls, starts))
    return Launch(
        Kernel(name, "\n\n".join(texts), tuple((name, kind) for name, kind, _ in parameters.ordered)),
        (programs, sympy.Integer(1), sympy.Integer(1)),
        tuple(argument for _, _, argument in parameters.ordered),
        tuple(node for part in parts for node in part.nodes),
        tuple(dict.fromkeys(buffer for part in parts for buffer in part.writes)),
    )


def part_function(kernel: Kernel, name: str) -> str:
    """A kernel as a function that is told which program it is."""
    source = kernel.source.replace(f"def {kernel.name}(", f"def {name}(program, ", 1)
    for constant, value in kernel.constants:
        source = source.replace(f"{constant}: tl.constexpr", f"{constant}: tl.constexpr = {value}", 1)
    return source.replace("tl.program_id(0)", "program")


def dispatcher(name: str, parameters: list[str], calls: list[tuple[str, list[str]]], starts: list[str]) -> str:
    """The kernel that hands each program to its part. starts: the first program of each part behind the first."""
    lines = ["@triton.jit", f"def {name}({', '.join(parameters)}):", "    program = tl.program_id(0)"]
    for position, (function, given) in enumerate(calls):
        program = f"program - {starts[position - 1]}" if position else "program"
        condition = f"if program < {starts[position]}" if position < len(starts) else "se"
        lines += [f"    {'el' if position else ''}{condition}:", f"        {function}({', '.join([program, *given])})"]
    return "\n".join(lines) + "\n"


def fresh(wanted: str, used: set[str]) -> str:
    """`wanted`, or the first of wanted_2, wanted_3, ... that is not used yet."""
    base, name, count = re.sub(r"_\d+$", "", wanted), wanted, 1
    while name in used:
        count += 1
        name = f"{base}_{count}"
    used.add(name)
    return name
