"""The memory plan: what lives at the same time never shares memory, and what fits is shared."""

from __future__ import annotations

import sympy
import torch
from effc.codegen.kernel import Buffer, Kernel, Launch, Pointer, Schedule
from effc.codegen.memory import plan_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from .graphs import check, random

S = sympy.Symbol("S", integer=True, positive=True)
SIZES = [sympy.Integer(0), sympy.Integer(1), sympy.Integer(640), S, 3 * S, 64 * S, S * S, S * S + S]
DTYPES = [torch.float32, torch.bfloat16, torch.bool]


def buffer(name: str, elements: sympy.Expr, dtype: torch.dtype = torch.float32) -> Buffer:
    return Buffer(name, elements, dtype, "temporary")


def schedule_of(steps: list[list[Buffer]]) -> Schedule:
    """One launch a step, which touches the buffers given."""
    kernel = Kernel("k", "", ())
    launches = [Launch(kernel, (S, S, S), tuple(Pointer(b) for b in touched), ("n",)) for touched in steps]
    return Schedule("test", list(launches))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.data())
def test_lives_never_overlap_in_a_slot(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    buffers = [
        buffer(f"b{i}", data.draw(st.sampled_from(SIZES)), data.draw(st.sampled_from(DTYPES))) for i in range(count)
    ]
    steps = data.draw(st.lists(st.lists(st.sampled_from(buffers), max_size=4), max_size=12))
    plan = plan_memory(schedule_of(steps))
    used = {b.name: b for step in steps for b in step}
    assert set(plan.slot_of) == set(used)
    for name, b in used.items():
        touched = [i for i, step in enumerate(steps) if b in step]
        assert plan.lives[name] == (touched[0], touched[-1])
        slot = plan.slots[plan.slot_of[name]]
        for size in (1, 7, 1000):
            assert slot.size.subs(S, size) >= b.bytes.subs(S, size)
        for other in slot.buffers:
            if other != b:
                (first, last), (start, end) = plan.lives[name], plan.lives[other.name]
                assert last < start or end < first, f"{name} and {other.name} live at the same time"


def test_a_chain_needs_two_slots() -> None:
    a, b, c, d = (buffer(name, 64 * S) for name in "abcd")
    plan = plan_memory(schedule_of([[a], [a, b], [b, c], [c, d]]))
    assert [slot.buffers for slot in plan.slots] == [[a, c], [b, d]]
    assert plan.unplanned_bytes == 4 * 64 * 4 * S


def test_a_slot_grows_to_the_larger_buffer() -> None:
    a, b = buffer("a", S), buffer("b", 5 * S)
    plan = plan_memory(schedule_of([[a], [b]]))
    assert [slot.size for slot in plan.slots] == [20 * S]


def test_sizes_that_do_not_compare_are_kept_apart() -> None:
    plan = plan_memory(schedule_of([[buffer("a", S * S)], [buffer("b", S + 1)]]))
    assert len(plan.slots) == 2


def test_temporaries_outlive_an_op_that_runs_through_aten() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(x * 2, -1)
        z = torch.softmax(x * 3, -1)
        later = y.transpose(0, 1).cumprod(0)
        return torch.softmax(z + y, -1).amax(-1) + later[0, 0]

    check(function, x=random(9, 33), dynamic={"x": (0,)}, fallbacks=1)
