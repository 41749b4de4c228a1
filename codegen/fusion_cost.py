"""What a fusion saves and what it costs, as an estimate in seconds: the one place that decides.

A kernel takes a launch, and the longer of its memory traffic and its arithmetic, on as much of the machine as its
programs fill. Two kernels become one where that is estimated to take no longer; a value that several kernels read is
computed again in each of them where that takes less time than to store and load it. Runtime sizes count as `NOMINAL`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from ..compiler.graph import dtype_of, sizes
from .target import Target

aten = torch.ops.aten

NOMINAL = 64
"""What each runtime size is taken for."""

MAX_POINTERS = 24
"""Tensors that a kernel made by merging may touch: beyond, addresses take more registers than values."""

MAX_INLINED = 64
"""Operations that are computed within one expression before a value of it is stored."""


@dataclass(frozen=True)
class Machine:
    """Orders of magnitude. bandwidth: bytes per second. rate: operations per second. launch: seconds. programs: how
    many fill it."""

    bandwidth: float
    rate: float
    launch: float
    programs: int


MACHINES = {
    "cpu": Machine(bandwidth=2e10, rate=1e11, launch=3e-7, programs=2),
    "cuda": Machine(bandwidth=2e12, rate=2e13, launch=3e-6, programs=264),
}

TRANSCENDENTAL = frozenset(
    {
        *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "tanh", "erf", "sigmoid"),
        *("silu", "gelu", "rsqrt", "sqrt", "pow", "div", "reciprocal", "softmax", "_softmax", "log_softmax"),
        *("rms_norm", "layer_norm"),
    }
)


def op_cost(target: Any) -> int:
    """Operations per element, roughly: a division or a function of math.h is worth a dozen additions."""
    return 12 if hasattr(target, "_schema") and target._schema.name.split("::")[1] in TRANSCENDENTAL else 1


def nominal(size: sympy.Expr | int) -> int:
    """A size as a number."""
    size = sympy.sympify(size)
    return int(size.xreplace(dict.fromkeys(size.free_symbols, sympy.Integer(NOMINAL))))


def bytes_of(node: fx.Node) -> int:
    return nominal(sympy.prod(sizes(node))) * dtype_of(node).itemsize


@dataclass(frozen=True)
class Work:
    """What one kernel does. reads, writes: bytes by tensor; ops: operations in all; programs: how many run it."""

    reads: Mapping[fx.Node, int]
    writes: Mapping[fx.Node, int]
    ops: int
    programs: int

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    def seconds(self, machine: Machine) -> float:
        busy = max(self.bytes / machine.bandwidth, self.ops / machine.rate)
        return machine.launch + busy * machine.programs / min(machine.programs, max(1, self.programs))

    def joined(self, other: Work, unstored: frozenset[fx.Node] = frozenset()) -> Work:
        """Both in one kernel: what one makes the other need not load; `unstored` is read by nobody else."""
        writes = {**self.writes, **other.writes}
        reads = {node: size for node, size in {**self.reads, **other.reads}.items() if node not in writes}
        writes = {node: size for node, size in writes.items() if node not in unstored}
        return Work(reads, writes, self.ops + other.ops, min(self.programs, other.programs))


@dataclass(frozen=True)
class Decision:
    """Whether two things share a kernel, and why. bytes_saved: memory traffic that fusing takes away, or would."""

    node: str
    into: str
    fused: bool
    reason: str
    bytes_saved: int = 0

    def __str__(self) -> str:
        saved = f", {readable(self.bytes_saved)} of traffic" + (" saved" if self.fused else " not saved")
        verb = "fused with" if self.fused else "apart from"
        return f"{self.node} {verb} {self.into}: {self.reason}{saved if self.bytes_saved else ''}"


def summary(decisions: Iterable[Decision]) -> list[str]:
    """A line for each distinct decision: layers that are decided alike are counted, their running numbers left out."""
    alike = Counter(str(replace(d, node=unnumbered(d.node), into=unnumbered(d.into))) for d in decisions)
    return [f"{count} x {text}" for text, count in alike.items()]


def unnumbered(names: str) -> str:
    return re.sub(r"_\d+\b", "", names)


def readable(count: int) -> str:
    return f"{count} B" if count < 10_000 else f"{count / 1e3:.0f} kB" if count < 1e7 else f"{count / 1e6:.0f} MB"


def weigh(first: Work, second: Work, unstored: frozenset[fx.Node], target: Target) -> tuple[bool, str, int]:
    """Whether two kernels should be one: (yes, why, bytes saved)."""
    machine = MACHINES[target.name]
    joined = first.joined(second, unstored)
    saved = first.bytes + second.bytes - joined.bytes
    if (pointers := len(joined.reads) + len(joined.writes)) > MAX_POINTERS:
        return False, f"one kernel would touch {pointers} tensors, more than {MAX_POINTERS}", saved
    apart, together = first.seconds(machine) + second.seconds(machine), joined.seconds(machine)
    times = f"{together * 1e6:.2g} us instead of {apart * 1e6:.2g} us"
    if together > apart:
        return False, f"too few programs to fill the machine: {times}", saved
    return True, times, saved


def recompute(
    node: fx.Node, inputs: Mapping[fx.Node, int], ops: int, readers: int, target: Target
) -> tuple[bool, str, int]:
    """Whether to compute a value again in each of its readers: (yes, why, bytes saved).

    inputs: the tensors that it is computed from, in bytes. ops: operations per element, with what is inlined in it.
    """
    machine = MACHINES[target.name]
    own = bytes_of(node)
    elements = own // dtype_of(node).itemsize
    stored = (own + sum(inputs.values()) + readers * own) / machine.bandwidth + ops * elements / machine.rate
    again = readers * max(sum(inputs.values()) / machine.bandwidth, ops * elements / machine.rate)
    saved = own + sum(inputs.values()) + readers * own - readers * sum(inputs.values())
    times = f"{again * 1e6:.2g} us computed {readers} times, {stored * 1e6:.2g} us stored and loaded"
    return again < stored, times, max(0, saved)
