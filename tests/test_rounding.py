"""rounding="eager" rounds where eager does, rounding="fp32" only where kernels store: both held against fp64."""

from __future__ import annotations

import effc
import pytest
import torch
from effc.codegen.rounding import POINT, rounding_points
from effc.codegen.schedule import schedule
from effc.codegen.target import CUDA
from effc.compiler.errors import InputError
from effc.report import describe_schedule
from torch import Tensor

from .families import tiny_model
from .graphs import Compiled, random

pytestmark = pytest.mark.usefixtures("one_thread")
ops = torch.ops.effc
DTYPES = (torch.bfloat16, torch.float16)


def pointwise(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.silu(x * y + x) * (y - 0.5) * x


def norm(x: Tensor, y: Tensor) -> Tensor:
    return ops.rms_norm(x, y[0, 0], 1e-6) * y + x


def gated(x: Tensor, w: Tensor) -> Tensor:
    return ops.gated_linear(x, w, None, "silu")


def with_residual(x: Tensor, w: Tensor) -> Tensor:
    return ops.linear(x, w, None, x, "gelu_tanh")


def tensors(function, dtype: torch.dtype) -> dict[str, Tensor]:
    if function in (pointwise, norm):
        return {"x": random(3, 40, 64, dtype=dtype), "y": random(3, 40, 64, dtype=dtype, seed=1)}
    rows = 128 if function is gated else 64
    return {"x": random(3, 40, 64, dtype=dtype), "w": random(rows, 64, dtype=dtype, seed=1) / 8}


CASES = [(pointwise, torch.bfloat16), (pointwise, torch.float16), (norm, torch.bfloat16), (gated, torch.bfloat16)]
SLOW = [(norm, torch.float16), (gated, torch.float16), *((with_residual, dtype) for dtype in DTYPES)]


@pytest.mark.parametrize(
    ("function", "dtype"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_fp32_inside_is_nearer_to_the_truth_than_eager(function, dtype):
    given = tensors(function, dtype)
    weights = ("w",) if "w" in given else ()
    (eager,) = (function(**given),)
    truth = function(**{name: x.double() for name, x in given.items()})
    error_of_eager = (eager.double() - truth).abs()
    compiled = {rounding: Compiled(function, given, None, weights, rounding=rounding) for rounding in ("eager", "fp32")}
    compiled["eager"].check(**given)  # at most twice eager's error
    (found,) = compiled["fp32"](**given)
    error = (found.double() - truth).abs()
    assert error.max() <= error_of_eager.max()
    assert error.mean() < error_of_eager.mean()
    assert POINT.search(compiled["eager"].source)
    assert not POINT.search(compiled["fp32"].source)


def test_fp32_kernels_are_the_same_in_both():
    x = random(3, 8)
    sources = [Compiled(pointwise, {"x": x, "y": x + 1}, rounding=rounding).source for rounding in ("eager", "fp32")]
    assert sources[0] == sources[1]


def test_the_dump_counts_the_points_where_a_kernel_rounds():
    given = tensors(pointwise, torch.bfloat16)
    compiled = Compiled(pointwise, given)
    (kernel,) = compiled.scheduled.schedule.kernels
    assert rounding_points(kernel) >= 5
    assert f", rounds at {rounding_points(kernel)} points within" in describe_schedule(compiled.scheduled)
    assert "points within" not in describe_schedule(schedule(compiled.graph, CUDA, rounding="fp32"))


@pytest.mark.slow
def test_both_front_ends_take_the_option():
    model = tiny_model(num_hidden_layers=1).to(torch.bfloat16)
    ids = torch.tensor([[3, 14, 15, 9, 26]])
    wide = tiny_model(num_hidden_layers=1).to(torch.bfloat16).double()(input_ids=ids, use_cache=False).logits
    eager = model(input_ids=ids, use_cache=False).logits
    program = effc.compile(model, rounding="fp32")
    assert program.options.rounding == "fp32"
    assert not any(POINT.search(source) for source in program.kernels.values())
    compiled = torch.compile(model.forward, backend="effc", options={"rounding": "fp32"})
    with torch.no_grad():
        results = (program(ids), compiled(input_ids=ids, use_cache=False).logits)
    for logits in results:
        assert (logits.double() - wide).abs().mean() <= (eager.double() - wide).abs().mean()


def test_another_word_is_refused():
    with pytest.raises(InputError, match="expected a rounding of eager, fp32, found 'exact'"):
        effc.compile(tiny_model(), rounding="exact")
