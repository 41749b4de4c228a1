"""The memory plan: temporaries whose lives do not overlap share memory.

A buffer lives from the step that writes it to the last step that reads it. Buffers are placed first come, first
served into slots; a slot that is free is taken if its size and the buffer's differ only by a number, so that the
larger one is known when compiling. Slots lie behind each other in one arena whose size is a formula.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from .kernel import Buffer, Schedule

ALIGNMENT = 64


@dataclass
class Slot:
    """Memory for several temporaries, one after the other. free_after: the step behind which nothing reads it."""

    size: sympy.Expr
    buffers: list[Buffer] = field(default_factory=list)
    free_after: int = -1


@dataclass
class MemoryPlan:
    """slots in arena order; slot_of: buffer name -> position of its slot; lives: buffer name -> first and last step."""

    slots: list[Slot]
    slot_of: dict[str, int]
    lives: dict[str, tuple[int, int]]

    @property
    def arena_bytes(self) -> sympy.Expr:
        """Size of the arena, each slot rounded up to the alignment."""
        return sum((slot.size + ALIGNMENT for slot in self.slots), sympy.Integer(0))

    @property
    def unplanned_bytes(self) -> sympy.Expr:
        """What the temporaries would take without sharing."""
        return sum((buffer.bytes for slot in self.slots for buffer in slot.buffers), sympy.Integer(0))


def plan_memory(schedule: Schedule) -> MemoryPlan:
    """Assign every temporary of a schedule to a slot."""
    lives: dict[str, tuple[int, int]] = {}
    buffers: dict[str, Buffer] = {}
    for position, step in enumerate(schedule.steps):
        for buffer in step.buffers:
            if buffer.kind == "temporary":
                first, _ = lives.get(buffer.name, (position, position))
                lives[buffer.name] = (first, position)
                buffers.setdefault(buffer.name, buffer)
    slots: list[Slot] = []
    slot_of: dict[str, int] = {}
    for name in sorted(lives, key=lambda name: lives[name][0]):
        first, last = lives[name]
        position = best_slot(slots, buffers[name], first)
        if position is None:
            slots.append(Slot(room(buffers[name])))
            position = len(slots) - 1
        slot = slots[position]
        slot.size = larger(slot.size, room(buffers[name]))
        slot.buffers.append(buffers[name])
        slot.free_after = last
        slot_of[name] = position
    return MemoryPlan(slots, slot_of, lives)


def best_slot(slots: list[Slot], buffer: Buffer, first: int) -> int | None:
    """The free slot whose size is nearest to the buffer's, among those that compare with it."""
    candidates = []
    for position, slot in enumerate(slots):
        ratio = sympy.cancel(room(buffer) / slot.size) if slot.free_after < first else None
        if ratio is not None and ratio.is_number:
            candidates.append((max(ratio, 1 / ratio), position))
    return min(candidates)[1] if candidates else None


def room(buffer: Buffer) -> sympy.Expr:
    """Bytes to keep for a buffer: an empty one takes one, so that sizes have ratios."""
    return buffer.bytes or sympy.Integer(1)


def larger(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return b if sympy.cancel(b / a) > 1 else a
