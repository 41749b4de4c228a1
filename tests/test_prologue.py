"""A norm that one product reads is part of its matrix-vector kernel, and a launch of its own for more rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from effc.codegen.kernel import Choice
from torch import Tensor
from torch.nn import functional as F

from .graphs import Compiled, check, random

effc = torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rms_norm": lambda x, g, b: effc.rms_norm(x, g, 1e-6),
    "rms_norm, scaled in fp32": lambda x, g, b: effc.rms_norm(x, g, 1e-6, True),
    "rms_norm without scale": lambda x, g, b: effc.rms_norm(x, None, 1e-6),
    "layer_norm": lambda x, g, b: F.layer_norm(x, g.shape, g, b),
    "layer_norm without bias": lambda x, g, b: F.layer_norm(x, g.shape, g, None, 1e-3),
    "layer_norm without scale": lambda x, g, b: F.layer_norm(x, g.shape),
}


def kernels(compiled: Compiled) -> list[list[str]]:
    """The kernels of each step, for one row where the step has a choice."""
    steps = compiled.scheduled.schedule.steps
    first = [step.cases[0][1] if isinstance(step, Choice) else step.launches for step in steps]
    return [[launch.kernel.name for launch in launches] for launches in first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(64, 64), (70, 100)])
def test_one_row_takes_one_kernel(n: int, k: int, dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor, g: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        return tuple(effc.linear(norm(x, g, b), w, None, r, "gelu") for norm in NORMS.values())

    def tensors(rows: int) -> dict[str, Tensor]:
        x = random(rows, k, dtype=dtype, seed=rows) * 3 + 1
        return {"x": x, **fixed, "r": random(rows, n, dtype=dtype, seed=4)}

    fixed = {
        "w": (random(n, k, seed=1) / k**0.5).to(dtype),
        "g": random(k, seed=2, dtype=dtype) + 1,
        "b": random(k, seed=3, dtype=dtype),
    }
    compiled = Compiled(function, tensors(5), {"x": (0,), "r": (0,)}, ("w", "g", "b"))
    assert kernels(compiled) == [["norm_gemv_gelu_residual"]] * len(NORMS)
    for rows in (1, 2, 17, 0):
        compiled.check(**tensors(rows))


def test_a_gated_linear_takes_its_norm_in() -> None:
    def function(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        return effc.gated_linear(effc.rms_norm(x, g, 1e-6), w)

    given = {"w": random(128, 48, seed=1) / 7, "g": random(48, seed=2)}
    compiled = check(function, x=random(1, 48), **given)
    assert kernels(compiled) == [["gated_norm_gemv_silu"]]


def test_a_norm_that_something_else_reads_is_made_once() -> None:
    def function(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        norm = effc.rms_norm(x, g, 1e-6)
        return effc.linear(norm, w), norm * 2

    compiled = check(function, x=random(1, 48), w=random(16, 48, seed=1), g=random(48, seed=2))
    assert kernels(compiled)[-1] == ["gemv"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, g: effc.linear(F.layer_norm(x, (2, 48)), w),
        lambda x, w, g: effc.linear(w, effc.rms_norm(x, g, 1e-6)[0]),
        lambda x, w, g: effc.linear(effc.rms_norm(x * 2, g, 1e-6), w),
    ],
    ids=["over two axes", "as the weight", "of what has no memory"],
)
def test_near_misses_are_kernels_of_their_own(function: Callable[..., Tensor]) -> None:
    given = {"x": random(1, 2, 48), "w": random(16, 48, seed=1), "g": random(48, seed=2)}
    compiled = Compiled(function, given)
    compiled.check(**given)
    assert not any("norm_gemv" in name for step in kernels(compiled) for name in step)
