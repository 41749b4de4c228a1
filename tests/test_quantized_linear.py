"""Linears by quantized weights beside their contract in fp64: every format, row counts on both sides of each hand-over,
ragged sizes, every epilogue, and input that a naive kernel would overflow on or spread."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.activation_formats import dequantize_rows, find_activation, quantize_rows
from effc.compiler.formats import Format, find
from torch import Tensor
from torch.nn import functional as F

from .graphs import Compiled, random
from .on_cpu import some_slow

effc = torch.ops.effc
ROWS = (1, 2, 3, 4, 7, 8, 16, 17, 33, 128)
BLOCKS = ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"]
OWN = [f"int{bits}{suffix}" for bits in (8, 4, 3, 2) for suffix in ("", "_g32", "a_g64", "z_g128")]
QUICK = [("q4_1", "int8_g32"), ("q6_k", "int8_g32")]
SLOW = [(name, "int8_g32") for name in (*BLOCKS, *OWN)]
SLOW += [(name, None) for name in ("q8_0", "q4_1", "q6_k", "int4", "int3z_g128", "int2_g32")]

pytestmark = pytest.mark.usefixtures("one_thread")


def parts_of(format: Format, n: int, k: int, seed: int = 1) -> dict[str, Tensor]:
    return dict(zip((f"p_{name}" for name in format.part_names), format.quantize(random(n, k, seed=seed) / k**0.5)))


def compiled(format: Format, activation: str | None, k: int, parts: dict[str, Tensor]) -> Compiled:
    """A linear of x [M, K] for any M."""

    def function(x: Tensor, *parts: Tensor) -> Tensor:
        rounded = x if activation is None else effc.fake_quantize(x, activation)
        return effc.linear(rounded, effc.dequantize(list(parts), format.name, torch.float32))

    return Compiled(function, {"x": random(5, k), **parts}, {"x": (0,)}, tuple(parts))


def contract(x: Tensor, parts: dict[str, Tensor], format: Format, activation: str | None) -> Tensor:
    """x @ weight.T of the codes and scales, in fp64."""
    weight = format.dequantize(tuple(parts.values())).double()
    if activation is not None:
        found = find_activation(activation)
        codes, scales = quantize_rows(x, found)
        x = dequantize_rows(codes.double(), scales.double(), found)
    return x.double() @ weight.T


def assert_close(found: Tensor, want: Tensor, x: Tensor, parts: dict[str, Tensor], format: Format) -> None:
    """Within what fp32 sums of the products may be off by, and NMSE 5e-4 in any case."""
    weight = format.dequantize(tuple(parts.values())).double()
    biggest = weight.abs().amax(1) if format.zero == 0 else 4 * weight.abs().amax(1)
    size = x.double().abs().sum(1)[:, None] * biggest[None, :]
    error = (found.double() - want).abs()
    assert (error <= 4e-7 * size + 1e-30).all(), f"off by {(error / size).max():.1e} of the products' size"
    assert (error**2).sum() <= 5e-4 * (want**2).sum()


def columns_for(format: Format, columns: int) -> int:
    """About that many columns, as far as the format holds them."""
    unit = format.super_block or (format.group if format.whole else 8)
    return max(1, round(columns / unit)) * unit


@pytest.mark.parametrize("pair", some_slow([*QUICK, *(pair for pair in SLOW if pair not in QUICK)], QUICK), ids=str)
def test_every_format_at_every_row_count(pair: tuple[str, str | None]) -> None:
    name, activation = pair
    format = find(name)
    n, k = 70, columns_for(format, 200)
    parts = parts_of(format, n, k)
    step = compiled(format, activation, k, parts)
    assert not step.fallbacks
    for rows in ROWS:
        x = random(rows, k, seed=rows)
        assert_close(step(x=x)[0], contract(x, parts, format, activation), x, parts, format)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "activation"),
    [("int8", "int8"), ("int4a", "int8"), ("int8a_g64", "int8_g128"), ("q6_k", "int8"), ("int3z_g128", "int8_g64"),
     ("int2_g64", "int8")],
)  # fmt: skip
@pytest.mark.parametrize("k", [8, 40, 264, 1000])
def test_groups_of_weights_and_activations_may_differ(name: str, activation: str, k: int) -> None:
    format = find(name)
    n, k = 33, columns_for(format, k)
    parts = parts_of(format, n, k)
    step = compiled(format, activation, k, parts)
    for rows in (1, 5, 20):
        x = random(rows, k, seed=rows)
        assert_close(step(x=x)[0], contract(x, parts, format, activation), x, parts, format)


@pytest.mark.parametrize(
    ("n", "dtype"), [(48, torch.float32), pytest.param(40, torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_every_epilogue_behind_a_norm_that_is_rounded_once(n: int, dtype: torch.dtype) -> None:
    format, k = find("q4_0"), 96
    bias, gain = random(2 * n, dtype=dtype), random(k, dtype=dtype, seed=4)

    def function(x: Tensor, r: Tensor, b: Tensor, g: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        weight, halves = (effc.dequantize(list(pair), "q4_0", dtype) for pair in (parts[:2], parts[2:]))
        rounded = effc.fake_quantize(effc.rms_norm(x, g, 1e-6), "int8_g32")
        return effc.linear(rounded, weight, b, r, "gelu"), effc.gated_linear(rounded, halves, b)

    tensors = {"x": random(5, k, dtype=dtype), "r": random(5, 2 * n, dtype=dtype, seed=2), "b": bias, "g": gain}
    names = {f"{name}_{seed}": part for seed in (1, 2) for name, part in parts_of(format, 2 * n, k, seed).items()}
    step = Compiled(function, tensors | names, {"x": (0,), "r": (0,)}, ("b", "g", *names))
    assert not step.fallbacks
    kernels = [kernel.name for kernel in step.scheduled.schedule.kernels]
    assert kernels.count("norm_quantize") == 1
    assert len(kernels) == 7
    for rows in (1, 3, 40):
        x, r = random(rows, k, dtype=dtype, seed=rows), random(rows, 2 * n, dtype=dtype, seed=rows + 1)
        wants = function(x, r, bias, gain, *names.values())
        for found, want in zip(step(x=x, r=r), wants, strict=True):
            worst = (found.double() - want.double()).abs().max() / want.double().abs().max()
            assert worst <= (2e-2 if dtype == torch.bfloat16 else 2e-3)  # a code may round the other way


def test_extreme_input_neither_overflows_nor_spreads() -> None:
    format, n, k = find("q8_0"), 64, 96
    parts = parts_of(format, n, k)
    parts["p_codes"] = torch.where(random(n, k, seed=9) > 0, -128, 127).to(torch.int8)
    parts["p_codes"][:8] = -128
    parts["p_scales"][8:16] = 0
    step = compiled(format, "int8_g32", k, parts)
    for rows in (1, 3, 20):
        x = torch.where(random(rows, k, seed=rows) > 0, 1e4, -1e4)
        x[:, 5] = 1e-3
        assert_close(step(x=x)[0], contract(x, parts, format, "int8_g32"), x, parts, format)
        clean = step(x=x)[0].clone()
        for bad in (float("nan"), float("inf")):
            spoiled = x.clone()
            spoiled[rows // 2, 40] = bad
            found = step(x=spoiled)[0]
            assert found[rows // 2].isnan().all()
            others = [row for row in range(rows) if row != rows // 2]
            assert torch.equal(found[others], clean[others])
        zeros = torch.zeros(rows, k)
        assert torch.equal(step(x=zeros)[0], torch.zeros(rows, n))


def test_codes_and_scales_of_activations_are_those_of_the_format() -> None:
    """Seen through a weight that picks one element: exact."""
    format, k = find("int8"), 64
    parts = {"p_codes": torch.eye(k, dtype=torch.int8), "p_scales": torch.ones(k, 1)}
    step = compiled(format, "int8_g32", k, parts)
    x = random(37, k) * 10.0 ** torch.randint(-30, 30, (37, 1), generator=torch.Generator().manual_seed(0))
    x[3], x[4, :32] = 0.0, 1e-42
    want = effc.fake_quantize(x, "int8_g32")
    found = step(x=x)[0]
    steps = find_activation("int8_g32")
    scale = quantize_rows(x, steps)[1].repeat_interleave(32, 1)
    assert ((found - want).abs() <= 1.001 * scale).all()  # a tie may round the other way
    assert (found != want).float().mean() < 1e-3


def test_an_embedding_reads_rows_of_the_table_that_a_head_shares() -> None:
    format, n, k = find("q4_k"), 40, 256
    parts = parts_of(format, n, k)

    def function(ids: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        table = effc.dequantize(list(parts), format.name, torch.float32)
        x = F.embedding(ids, table)
        return x, effc.linear(effc.fake_quantize(x, "int8_g32"), table)

    ids = torch.tensor([[3, 0, 39, 17]])
    step = Compiled(function, {"ids": ids, **parts}, {"ids": (1,)}, tuple(parts))
    assert not step.fallbacks
    values = format.dequantize(tuple(parts.values()))
    for ids in (torch.tensor([[3, 0, 39, 17]]), torch.tensor([[11]])):
        x, logits = step(ids=ids)
        assert torch.equal(x, values[ids])
        assert_close(logits[0], contract(x[0], parts, format, "int8_g32"), x[0], parts, format)


def test_a_gated_weight_that_is_read_whole_too_has_whole_panels() -> None:
    format, n, k = find("q8_0"), 40, 32
    parts = parts_of(format, n, k)

    def function(x: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        weight = effc.dequantize(list(parts), "q8_0", torch.float32)
        return effc.linear(x, weight), effc.gated_linear(x, weight)

    step = Compiled(function, {"x": random(1, k), **parts}, None, tuple(parts))
    (gated,) = [step for step in step.scheduled.schedule.fallbacks if "linear" in str(step.node.target)]
    assert "no whole panels" in gated.reason
    x = random(1, k, seed=3)
    for found, want in zip(step(x=x), function(x, *parts.values()), strict=True):
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["nf4_g64", "fp8_e4m3"])
def test_formats_without_a_kernel_are_refused_by_name(name: str) -> None:
    format, n, k = find(name), 16, 64
    step = compiled(format, None, k, parts_of(format, n, k))
    (linear,) = [step for step in step.scheduled.schedule.fallbacks if "linear" in str(step.node.target)]
    assert name in linear.reason
