"""What becomes one kernel, why, and how that is told: estimates, groups, near-misses, and long graphs."""

from __future__ import annotations

import cProfile
import pstats

import pytest
import torch
from effc.codegen.fusion_cost import MACHINES, Decision, Work, recompute, summary, weigh
from effc.codegen.schedule import schedule
from effc.codegen.target import CPU, CUDA
from torch import Tensor, fx

from .graphs import Compiled, check, graph_of, random

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(compiled: Compiled) -> int:
    return len(compiled.scheduled.schedule.steps)


def decision(compiled: Compiled, node: str) -> Decision:
    (found,) = (d for d in compiled.scheduled.decisions if d.node == node)
    return found


# --- estimates ---------------------------------------------------------------------------------------------------


def node(name: str, *shape: int) -> fx.Node:
    found = fx.Graph().placeholder(name)
    found.meta["val"] = torch.empty(shape, device="meta")
    return found


def test_what_both_read_is_loaded_once() -> None:
    x, a, b = (node(name, 1000) for name in "xab")
    first, second = (Work({x: 4000}, {made: 4000}, 1000, 4) for made in (a, b))
    assert weigh(first, second, frozenset(), CPU) == (True, "0.9 us instead of 1.4 us", 4000)


def test_what_one_makes_for_the_other_is_neither_stored_nor_loaded() -> None:
    x, a, b = (node(name, 1000) for name in "xab")
    joined = Work({x: 4000}, {a: 4000}, 1000, 4).joined(Work({a: 4000}, {b: 4000}, 1000, 4), frozenset({a}))
    assert (joined.reads, joined.writes) == ({x: 4000}, {b: 4000})


def test_a_wide_kernel_is_not_held_to_the_few_programs_of_a_reduction() -> None:
    x, y, a, b = (node(name, 1000) for name in "xyab")
    wide, narrow = Work({x: 1 << 28}, {a: 1 << 28}, 1 << 26, 1 << 16), Work({y: 1 << 20}, {b: 4}, 1 << 20, 1)
    fused, reason, _ = weigh(wide, narrow, frozenset(), CUDA)
    assert not fused
    assert reason.startswith("too few programs")


def test_a_kernel_does_not_touch_any_number_of_tensors() -> None:
    first, second = (Work({node(f"x{i}", 4): 16 for i in range(13)}, {}, 4, 1) for _ in range(2))
    assert weigh(first, second, frozenset(), CPU)[:2] == (False, "one kernel would touch 26 tensors, more than 24")


def test_cheap_values_are_computed_again_and_costly_ones_are_not() -> None:
    y, inputs = node("y", 1 << 20), [node(f"x{i}", 1 << 20) for i in range(6)]
    few, many = (dict.fromkeys(inputs[:count], 1 << 22) for count in (1, 6))
    assert recompute(y, few, 2, 2, CPU)[0]
    assert not recompute(y, many, 2, 2, CPU)[0]
    assert not recompute(y, few, 500, 2, CPU)[0]


@pytest.mark.parametrize("name", MACHINES)
def test_fewer_bytes_are_never_slower(name: str) -> None:
    x = node("x", 4)
    seconds = [Work({x: size}, {}, 100, 8).seconds(MACHINES[name]) for size in (0, 10**6, 10**7)]
    assert seconds == sorted(seconds)


# --- groups ------------------------------------------------------------------------------------------------------


def test_a_sum_that_is_kept_and_its_norm_are_one_kernel() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return total, torch.softmax(total, -1)

    compiled = check(function, x=random(5, 64), y=random(5, 64))
    assert steps(compiled) == 1
    assert decision(compiled, "softmax").fused


def test_a_value_that_only_its_own_kernel_reads_is_not_stored() -> None:
    def function(x: Tensor) -> Tensor:
        rows = torch.softmax(x, -1)
        return rows * torch.softmax(rows * 2, -1)

    compiled = check(function, x=random(5, 64))
    assert steps(compiled) == 1
    assert compiled.source.count("tl.store") == 1
    assert compiled.source.count("tl.load") == 1


def test_a_row_that_is_needed_at_other_indices_is_a_kernel_of_its_own() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.softmax(x, -1)
        return rows, rows.transpose(0, 1) + 1

    compiled = check(function, x=random(6, 6))
    assert steps(compiled) == 2
    found = decision(compiled, "add")
    assert not found.fused
    assert found.reason.startswith("at other indices")
    assert found.bytes_saved == 6 * 6 * 4


def test_kernels_over_other_sizes_say_so() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.softmax(x, -1)
        return rows, rows[1:] * 2

    compiled = check(function, x=random(5, 8))
    assert steps(compiled) == 2
    assert "runs over" in decision(compiled, "mul").reason


def test_what_lies_between_two_kernels_keeps_them_apart() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.softmax(x, -1)
        return y, y.cumprod(0) + y

    assert steps(check(function, x=random(6, 8), fallbacks=1)) == 3


def test_a_read_stays_before_the_write_that_follows_it() -> None:
    def function(x: Tensor, state: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        before = state[1:] * 2
        state.index_copy_(0, at, x)
        return before + 1, state * 3

    check(function, x=random(2, 8), state=random(6, 8, seed=1), at=torch.tensor([4, 1]), states=("state",))


def test_decisions_of_equal_layers_are_one_line() -> None:
    decisions = [Decision(f"add_{i}", f"mul_{i}", True, "less traffic", 64) for i in range(30)]
    assert summary(decisions) == ["30 x add fused with mul: less traffic, 64 B of traffic saved"]


def test_long_chains_are_cut_before_they_take_the_stack() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        for _ in range(150):
            x = (x + y).sin()
        return x

    compiled = check(function, x=random(3, 7), y=random(7))
    assert steps(compiled) == 1


def calls_to_schedule(layers: int) -> int:
    """Python calls that it takes to schedule a graph of so many layers."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(layers):
            y = torch.softmax(x, -1)
            x = x + y.transpose(0, 1).cumprod(0) * y + w
        return x

    graph = graph_of(function, {"x": random(6, 6), "w": random(6)})
    with cProfile.Profile() as profile:
        result = schedule(graph, CPU)
    assert len(result.schedule.steps) == 2 * layers + 1
    return pstats.Stats(profile).total_calls


def test_scheduling_grows_with_the_length_of_the_graph_and_not_faster() -> None:
    calls_to_schedule(2)
    few, many = calls_to_schedule(20), calls_to_schedule(80)
    assert many < 6 * few, f"20 layers take {few} calls, 80 layers {many}"
