"""Rounding a matrix for the inputs it sees: every way has less error on correlated inputs than round to nearest."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.activation_formats import find_activation, quantize_rows
from effc.compiler.errors import InputError
from effc.compiler.formats import find
from effc.compiler.round_to_nearest import round_under
from effc.passes.calibrate.awq import search_scaling
from effc.passes.calibrate.gptq import inverse_factor, round_gptq
from effc.passes.calibrate.grid import diagonal_blocks, group_errors
from effc.passes.calibrate.hadamard import rotation
from effc.passes.calibrate.rtn import round_clipped, round_nearest
from effc.passes.calibrate.smoothquant import smoothing
from effc.passes.calibrate.statistics import InputStatistics, output_error, relative_error
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS = 24, 96
FORMATS = ("int4_g128", "int3_g64", "int4a_g32", "int4z_g64", "nf4_g64", "int8", "int2_g32", "fp8_e4m3", "q4_0", "q5_1")


def correlated_inputs(columns: int = COLUMNS, rows: int = 512, seed: int = 3) -> Tensor:
    """Channels that hang together and differ in size, as those of a language model do."""
    print(f"input seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(0.02, 1, columns)
    return torch.randn(rows, columns, generator=generator) @ mix * torch.randn(columns, generator=generator).exp()


def matrix(rows: int = ROWS, columns: int = COLUMNS, seed: int = 4) -> Tensor:
    print(f"weight seed {seed}")
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def error_of(weight: Tensor, hessian: Tensor, parts: tuple[Tensor, ...], name: str) -> float:
    return output_error(find(name).dequantize(parts) - weight, hessian)


def test_statistics_are_those_of_the_rows():
    x = correlated_inputs(rows=60).double()
    found = InputStatistics.of([x[:10].view(2, 5, -1), x[10:]])
    assert found.count == 60
    torch.testing.assert_close(found.hessian, x.t() @ x / 60)
    torch.testing.assert_close(found.mean, x.abs().mean(0))
    assert torch.equal(found.largest, x.abs().amax(0))


def test_output_error_is_the_mean_square_of_the_outputs():
    x, difference = correlated_inputs().double(), matrix().double()
    expected = (x @ difference.t()).square().sum(-1).mean().item()
    assert output_error(difference, InputStatistics.of([x]).hessian) == pytest.approx(expected)


def test_the_relative_error_of_what_gives_nothing_is_zero():
    assert relative_error(torch.ones(2, 3), torch.zeros(2, 3), torch.eye(3)) == 0.0
    assert relative_error(2 * torch.ones(2, 3), torch.ones(2, 3), torch.eye(3)) == 1.0


@pytest.mark.parametrize("group", [32, 40, None])
def test_errors_of_groups_use_their_own_block_of_the_hessian(group):
    x, difference = correlated_inputs().double(), matrix().double()
    hessian = x.t() @ x / len(x)
    size = group or COLUMNS
    expected = [
        (x[:, i : i + size] @ difference[:, i : i + size].t()).square().mean(0) for i in range(0, COLUMNS, size)
    ]
    torch.testing.assert_close(
        group_errors(difference, diagonal_blocks(hessian, group), group), torch.stack(expected, -1)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_clipping_and_gptq_each_lessen_the_error(name):
    weight, hessian = matrix(), InputStatistics.of([correlated_inputs()]).hessian
    format = find(name)
    ways = (
        round_nearest,
        round_clipped,
        lambda *case: round_gptq(*case, by_activation=False),
        lambda *case: round_gptq(*case, by_activation=True),
    )
    errors = [error_of(weight, hessian, way(weight, hessian, format), name) for way in ways]
    assert errors[1] <= errors[0]
    assert errors[2] < errors[1]
    assert errors[3] < errors[2]
    assert errors[3] < 0.6 * errors[0]


def test_parts_are_those_of_the_format():
    weight, hessian = matrix(columns=72), InputStatistics.of([correlated_inputs(72)]).hessian
    format = find("int3_g64")  # the last group has 8 weights
    for way in (round_clipped, round_gptq):
        parts = way(weight, hessian, format)
        assert [(tuple(part.shape), part.dtype) for part in parts] == list(format.part_shapes(ROWS, 72).values())


def test_without_a_hessian_gptq_is_clipping():
    weight, format = matrix(), find("int4_g32")
    for mine, other in zip(round_gptq(weight, None, format), round_clipped(weight, None, format), strict=True):
        assert torch.equal(mine, other)


def test_gptq_leaves_a_matrix_alone_that_lies_on_the_grid():
    format = find("int4_g32")
    weight = format.dequantize(format.quantize(matrix()))
    hessian = InputStatistics.of([correlated_inputs()]).hessian
    assert torch.equal(format.dequantize(round_gptq(weight, hessian, format)), weight)


def test_channels_that_are_always_zero_are_rounded_to_nearest():
    x = correlated_inputs()
    x[:, 5:40] = 0
    weight, hessian, format = matrix(), InputStatistics.of([x]).hessian, find("int8")
    parts = round_gptq(weight, hessian, format)
    nearest = format.dequantize(round_under(weight, parts[1], None, format))
    assert torch.equal(format.dequantize(parts)[:, 5:40], nearest[:, 5:40])
    assert not torch.equal(format.dequantize(parts), nearest)


def test_a_singular_hessian_is_damped_until_it_has_a_factor():
    x = correlated_inputs(rows=4)
    hessian = x.t() @ x / 4
    factor = inverse_factor(hessian, 0.01)
    assert factor.isfinite().all()
    assert torch.equal(factor, factor.triu())
    assert inverse_factor(torch.zeros(8, 8), 0.01).isfinite().all()


def test_inputs_that_are_not_finite_are_refused():
    hessian = torch.eye(COLUMNS)
    hessian[3, 3] = float("nan")
    with pytest.raises(InputError, match="inputs of this linear are not finite"):
        round_gptq(matrix(), hessian, find("int4_g32"))


def test_weights_that_are_not_finite_are_refused():
    weight = matrix()
    weight[2, 3] = float("inf")
    for way in (round_clipped, round_gptq):
        with pytest.raises(InputError, match="found infinity in row 2"):
            way(weight, torch.eye(COLUMNS), find("int4_g32"))


# --- scales and rotations --------------------------------------------------------------------------------------


def inputs_with_outliers() -> Tensor:
    """Four channels that are a hundred times as large as the others."""
    x = correlated_inputs(rows=128) / 20
    x[:, 7::24] *= 100
    return x


def int8_error(x: Tensor, weight: Tensor) -> float:
    """Of x @ weight.T with both in int8, a scale a row."""
    codes, scales = quantize_rows(x, find_activation("int8"))
    rounded = find("int8").dequantize(find("int8").quantize(weight))
    return ((codes * scales) @ rounded.t() - x @ weight.t()).square().mean().item()


@pytest.mark.parametrize("name", ["int4_g128", "int3_g64"])
def test_awq_lessens_the_error_and_keeps_what_is_tied_alike(name):
    weight, statistics = matrix(), InputStatistics.of([inputs_with_outliers()])
    found = search_scaling([(weight[:8], find(name)), (weight[8:], find(name))], statistics)
    assert found.error < 0.8 * found.error_unscaled
    assert found.alpha > 0
    format = find(name)
    rounded = format.dequantize(format.quantize(weight * found.scale)) / found.scale
    assert output_error(rounded - weight, statistics.hessian) == pytest.approx(found.error, rel=1e-3)
    tied = search_scaling([(weight, format)], statistics, lambda scale: scale.view(2, -1).mean(0).repeat(2))
    assert torch.equal(tied.scale[:48], tied.scale[48:])


def test_smoothing_lessens_the_error_of_int8_activations():
    x, weight = inputs_with_outliers(), matrix()
    scale = smoothing(weight, x.abs().amax(0))
    assert int8_error(x / scale, weight * scale) < 0.1 * int8_error(x, weight)


def test_rotating_lessens_the_error_of_int8_activations():
    x, weight, turn = inputs_with_outliers(), matrix(), rotation(COLUMNS).float()
    assert int8_error(x @ turn, weight @ turn) < 0.3 * int8_error(x, weight)
