"""Launches that do not depend on each other share a kernel, and every other one stays as it is."""

from __future__ import annotations

import pytest
import torch
from effc.codegen.kernel import Launch
from torch import Tensor

from .graphs import Compiled, check, random

effc = torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")


def names(compiled: Compiled) -> list[str]:
    return [launch.kernel.name for step in compiled.scheduled.schedule.steps for launch in step.launches]


def test_results_over_other_domains_share_a_launch() -> None:
    compiled = check(lambda x, y: (x.exp(), y.sum(-1), x.transpose(0, 1) + 1), x=random(5, 7), y=random(3, 9))
    assert names(compiled) == ["exp_and_sum_and_add"]


def test_equal_kernels_are_one_function() -> None:
    compiled = check(lambda x, y: (x.exp(), y.exp()), x=random(5, 70), y=random(4, 70), dynamic={"x": (0,), "y": (0,)})
    (step,) = compiled.scheduled.schedule.steps
    assert step.kernel.source.count("@triton.jit") == 3  # the row counts have names of their own
    compiled.check(x=random(17, 70), y=random(0, 70))
    compiled.check(x=random(0, 70), y=random(33, 70))


def test_what_depends_on_another_launch_stays_behind_it() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y.transpose(0, 1) + 1

    assert len(names(check(function, x=random(6, 6)))) == 2


def test_a_launch_moves_forward_over_what_it_does_not_touch() -> None:
    def function(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = effc.linear(x.exp(), w)
        return z.transpose(0, 1) + 1, y.exp(), y.transpose(0, 1) * 2

    compiled = check(function, x=random(5, 32), w=random(7, 32) / 6, y=random(3, 4))
    assert names(compiled)[0] == "exp_and_mul"
    assert names(compiled)[-1] == "add"


def test_queries_keys_and_values_take_one_launch_to_the_cache() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        q_part, k_part, v_part = (
            x[..., start : start + 4 * size].unflatten(-1, (size, 4)).transpose(1, 2)
            for start, size in ((0, 4), (16, 2), (24, 2))
        )
        k = effc.kv_write(k, effc.rope(k_part, cos, sin), past)
        v = effc.kv_write(v, v_part, past)
        return effc.cached_attention(effc.rope(q_part, cos, sin), k, v, past, 0.5)

    for s in (1, 7):
        angles = random(3, s, 2, seed=2)
        compiled = check(
            function,
            states=("k", "v"),
            x=random(3, s, 32),
            cos=torch.cat((angles, angles), -1).cos(),
            sin=torch.cat((angles, angles), -1).sin(),
            k=random(3, 2, 40, 4),
            v=random(3, 2, 40, 4),
            past=torch.tensor([0, 23, 5]),
        )
        assert sum("rope" in name for name in names(compiled)) == 1
        assert isinstance(compiled.scheduled.schedule.steps[0], Launch)
