"""Formats of weights and activations: packing, what parts stand for, GGUF's own blocks, rounding, bad input."""

from __future__ import annotations

import math
import re

import gguf
import numpy as np
import pytest
import torch
from effc.compiler import ops  # noqa: F401  (registers effc's)
from effc.compiler.activation_formats import ACTIVATION_FORMATS, dequantize_rows, find_activation, quantize_rows
from effc.compiler.bit_planes import pack, pack_planes, unpack, unpack_planes
from effc.compiler.errors import InputError, ModelError
from effc.compiler.formats import FORMATS, Format, find, spelled
from effc.compiler.gguf_blocks import BLOCKS, format_of, read_part, split
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {name for name in FORMATS if not name.startswith("int")} | {
    "int8", "int8a", "int8_g64", "int8z_g64", "int4", "int4_g32", "int4_g128", "int4a_g32", "int4z_g128", "int3_g64",
    "int3a_g64", "int2_g64",
}  # fmt: skip
"""The other formats differ from these in numbers only."""


def of_formats(*formats: Format) -> pytest.MarkDecorator:
    rows = [pytest.param(row, id=row.name, marks=[] if row.name in QUICK else pytest.mark.slow) for row in formats]
    return pytest.mark.parametrize("format", rows)


every_format = of_formats(*FORMATS.values())
every_own_format = of_formats(*(format for format in FORMATS.values() if not format.whole))
every_block = pytest.mark.parametrize("name", BLOCKS)
N, K = 5, 512


def effective_scales(parts: tuple[Tensor, ...], format: Format, k: int = K) -> Tensor:
    """The step between two codes, for each weight."""
    part = format.named(parts)
    scales = part["scales"].float()
    if format.super_block:
        scales = scales * part["super"].float().repeat_interleave(format.super_block // format.group, -1)
    return format.spread(scales, k).expand(-1, k)


def nmse(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).pow(2).sum() / expected.double().pow(2).sum())


# --- planes of bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_element_i_of_a_byte_lies_in_its_bits(width, generator):
    codes = torch.randint(1 << width, (3, 40), generator=generator, dtype=torch.uint8)
    plane = pack(codes, width)
    assert plane.shape == (3, 40 * width // 8)
    per_byte = 8 // width
    for element in range(40):
        byte, place = divmod(element, per_byte)
        assert torch.equal(plane[:, byte] >> place * width & (1 << width) - 1, codes[:, element])
    assert torch.equal(unpack(plane, width), codes)


@pytest.mark.parametrize("widths", [(4,), (4, 1), (4, 2), (2, 1), (2,)])
def test_planes_give_back_the_codes(widths, generator):
    codes = torch.randint(1 << sum(widths), (2, 3, 48), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack_planes(pack_planes(codes, widths), widths), codes)


# --- what parts stand for --------------------------------------------------------------------------------------


@every_format
def test_parts_are_as_promised(format, generator):
    parts = format.quantize(torch.randn(N, K, generator=generator))
    promised = format.part_shapes(N, K)
    assert tuple(promised) == format.part_names
    assert [(tuple(part.shape), part.dtype) for part in parts] == list(promised.values())
    assert all(part.is_contiguous() for part in parts)
    assert format.columns(parts[0].shape[-1]) == K
    assert format.bits(N, K) == 8 * sum(part.nbytes for part in parts) / (N * K)


@every_format
def test_every_weight_is_within_half_a_step(format, generator):
    weight = torch.randn(N, K, generator=generator) * torch.logspace(-3, 2, N)[:, None]
    parts = format.quantize(weight)
    found, scales = format.dequantize(parts), effective_scales(parts, format)
    error = (found - weight).abs()
    if format.book is not None:
        assert (error <= scales * (0.152 + 1e-3)).all()  # half of the widest gap in the book
    elif format.code_dtype.is_floating_point:
        assert (error <= torch.maximum(weight.abs() * 2**-4, scales * 2**-10)).all()
    elif format.super_block:
        assert nmse(found, weight) < {4: 8e-3, 5: 2e-3, 6: 6e-4}[format.width]
    else:
        rounding = (1 << format.width) * 2**-11 if format.scale_dtype == torch.float16 else 1e-5
        at_the_end = 0 if format.asymmetric and not format.integer_zeros else 0.5
        assert (error <= scales.abs() * (0.5 + at_the_end + 2 * rounding)).all()


@every_format
def test_the_values_are_those_of_the_codes_written_out(format, generator):
    """scale * code + min, weight by weight, in Python."""
    parts = format.quantize(torch.randn(2, 256, generator=generator))
    part = {name: values.tolist() for name, values in format.named(parts).items() if name not in ("codes", "high")}
    found, codes = format.dequantize(parts, torch.float64), format.codes(parts).float().tolist()
    for row in range(2):
        for column in range(0, 256, 7):
            group = 0 if format.group is None else column // format.group
            scale, low = part["scales"][row][group], part["mins"][row][group] if format.asymmetric else 0
            if format.super_block:
                scale *= part["super"][row][0]
                low *= -part["super_min"][row][0] if format.asymmetric else 0
            code = codes[row][column]
            level = format.book[int(code)] if format.book is not None else code - format.zero
            expected = scale * level + low
            largest = max(abs(scale * level), abs(low))
            assert math.isclose(found[row, column], expected, rel_tol=0, abs_tol=3e-7 * largest + 1e-30)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_round_the_fp32_values(format, dtype, generator):
    parts = format.quantize(torch.randn(N, K, generator=generator))
    assert torch.equal(format.dequantize(parts, dtype), format.dequantize(parts).to(dtype))


@every_format
def test_rows_are_cut_joined_and_permuted_alike(format, generator):
    weight = torch.randn(N, K, generator=generator)
    parts, values = format.quantize(weight), format.dequantize(format.quantize(weight))
    order = torch.randperm(N, generator=generator)
    moved = [torch.cat((part.view(torch.uint8)[order], part.view(torch.uint8)[1:3])).view(part.dtype) for part in parts]
    assert torch.equal(format.dequantize(moved), torch.cat((values[order], values[1:3])))
    experts = [part.unflatten(0, (N, 1)) for part in parts]
    assert torch.equal(format.dequantize(experts), values.unflatten(0, (N, 1)))


def test_quantizing_experts_is_quantizing_each(generator):
    weight = torch.randn(3, N, K, generator=generator)
    for name in ("int4_g128", "q4_k", "nf4_g64"):
        together = FORMATS[name].quantize(weight)
        for expert in range(3):
            assert all(map(torch.equal, FORMATS[name].quantize(weight[expert]), (part[expert] for part in together)))


def test_an_unknown_format_lists_those_there_are():
    with pytest.raises(InputError, match=r"unknown format 'int9'; expected one of int8, .*q4_k.*fp8_e4m3"):
        find("int9")
    with pytest.raises(InputError, match=r"unknown activation format 'int4'; expected one of int8, int8_g32"):
        find_activation("int4")


def test_every_name_is_spelled():
    families = {re.sub(r"[az]?(_g\d+)?(_f32)?$", "", name) if name.startswith("int") else name for name in FORMATS}
    assert all(re.search(rf"\b{name}\b", spelled()) for name in families)


def test_another_number_of_parts_is_named():
    with pytest.raises(InputError, match="q4_1: expected the parts codes, scales, mins, found 1 parts"):
        FORMATS["q4_1"].dequantize([torch.zeros(1, 16, dtype=torch.uint8)])


# --- GGUF ------------------------------------------------------------------------------------------------------

HALVES = {"q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}
"""Where blocks hold fp16; 0 in the others."""


def random_blocks(name: str, *rows: int, seed: int = 0) -> np.ndarray:
    """Rows of 3 blocks, any bits, with finite scales of all sizes, subnormal ones and zeros of both signs too."""
    print(f"seed {seed}")
    choose = np.random.default_rng(seed)
    size = BLOCKS[name].nbytes
    raw = choose.integers(0, 256, (*rows, 3 * size), dtype=np.uint8)
    blocks = raw.reshape(-1, size)
    for start in HALVES.get(name, (0,)):
        halves = choose.integers(0, 1 << 16, len(blocks), dtype=np.uint16)
        halves[(halves & 0x7C00) == 0x7C00] ^= 0x4000
        halves[:2] = 0, 0x8000
        blocks[:, start : start + 2] = halves[:, None].view(np.uint8)
    return raw


@every_block
def test_blocks_stand_for_what_gguf_says(name):
    raw = random_blocks(name, 40)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name.upper()])
    format = FORMATS[name]
    parts = split(torch.from_numpy(raw), format)
    shapes = format.part_shapes(40, 3 * BLOCKS[name].size)
    assert [(tuple(part.shape), part.dtype) for part in parts] == list(shapes.values())
    found = format.dequantize(parts).numpy()
    assert np.array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected)) or name in ("q4_1", "q5_1", "q4_k", "q5_k")


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_blocks_that_gguf_quantized(name):
    weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(0)).numpy()
    kind = gguf.GGMLQuantizationType[name.upper()]
    raw = gguf.quants.quantize(weight, kind)
    format = FORMATS[name]
    found = format.dequantize(split(torch.from_numpy(raw), format))
    assert np.array_equal(found.numpy(), gguf.quants.dequantize(raw, kind))
    own = format.dequantize(format.quantize(torch.from_numpy(weight)))
    assert nmse(own, torch.from_numpy(weight)) < 1.02 * nmse(found, torch.from_numpy(weight))


@every_block
def test_blocks_of_experts_and_single_parts(name):
    raw, format = torch.from_numpy(random_blocks(name, 2, 6)), FORMATS[name]
    parts = split(raw, format)
    assert all(map(torch.equal, split(raw[1], format), (part[1] for part in parts)))
    for part, values in zip(format.part_names, parts):
        assert torch.equal(read_part(raw, format, part), values)


def test_many_rows_are_taken_apart_a_piece_at_a_time(monkeypatch):
    raw, format = torch.from_numpy(random_blocks("q5_k", 7)), FORMATS["q5_k"]
    whole = split(raw, format)
    monkeypatch.setattr("effc.compiler.gguf_blocks.BYTES_AT_ONCE", 2 * BLOCKS["q5_k"].nbytes)
    assert all(map(torch.equal, split(raw, format), whole))


def test_types_of_gguf_by_name():
    assert format_of("Q4_K") is FORMATS["q4_k"]
    assert format_of("Q8_0") is FORMATS["q8_0"]
    assert format_of("F16") is None
    assert format_of("IQ4_XS") is None


def test_rows_of_broken_blocks_are_refused():
    with pytest.raises(
        ModelError, match="q4_1: expected uint8 rows of whole blocks of 20 bytes, found uint8 rows of 41"
    ):
        split(torch.zeros(2, 41, dtype=torch.uint8), FORMATS["q4_1"])


# --- sizes that do not fit -------------------------------------------------------------------------------------


@every_own_format
@pytest.mark.parametrize("k", [8, 40, 136, 200])
def test_the_last_group_of_a_row_may_be_shorter(format, k, generator):
    """It is quantized as if it stood alone."""
    weight = torch.randn(3, k, generator=generator)
    parts = format.quantize(weight)
    assert [tuple(part.shape) for part in parts] == [shape for shape, _ in format.part_shapes(3, k).values()]
    found = format.dequantize(parts)
    assert found.shape == weight.shape
    if format.group is not None and k % format.group:
        last = weight[:, -(k % format.group) :]
        assert torch.equal(found[:, -last.shape[1] :], format.dequantize(format.quantize(last)))


@pytest.mark.parametrize(
    ("name", "k", "unit"),
    [("int4_g32", 33, 2), ("int3_g64", 36, 8), ("int2", 6, 4), ("q4_1", 48, 32), ("q6_k", 128, 256), ("q8_0", 0, 32)],
)
def test_rows_that_do_not_fit_are_refused(name, k, unit):
    with pytest.raises(InputError, match=f"^{name}: expected rows of a multiple of {unit} weights, found {k}$"):
        FORMATS[name].quantize(torch.zeros(2, k))
    with pytest.raises(InputError, match=f"^{name}: expected rows"):
        FORMATS[name].part_shapes(2, k)


# --- values that do not fit ------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize(("bad", "said"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")])
def test_weights_that_are_no_numbers_are_named(format, bad, said):
    weight = torch.ones(4, 256)
    weight[2, 17] = bad
    with pytest.raises(InputError, match=f"^{format.name}: expected finite weights, found {said} in row 2$"):
        format.quantize(weight)


@every_format
def test_zeros_stay_zeros(format):
    weight = torch.zeros(2, K)
    weight[1, K // 2 :] = torch.linspace(-1, 1, K // 2)
    found = format.dequantize(format.quantize(weight))
    assert (found[0] == 0).all()
    assert found.isfinite().all()


@every_format
@pytest.mark.parametrize("value", [3.0, -3.0, 1e4, -1e4, 2.0**-4])
def test_groups_of_equal_weights(format, value):
    """All of them stand at an end of the range, which is a code: what is lost are the bits of the scale."""
    weight = torch.full((2, K), value)
    found = format.dequantize(format.quantize(weight))
    torch.testing.assert_close(found, weight, rtol=2**-8 if format.super_block else 2**-10, atol=0)


@every_format
def test_outliers_spoil_no_other_group(format, generator):
    weight = torch.randn(3, K, generator=generator)
    weight[0, 3], weight[1, 300] = 1e4, -1e4
    found = format.dequantize(format.quantize(weight))
    assert found.isfinite().all()
    steps = {8: 255, 6: 60, 5: 30, 4: 14, 3: 6, 2: 2}[format.width]
    assert (found[0, 3] - 1e4).abs() <= 1.1e4 / steps
    assert (found[1, 300] + 1e4).abs() <= 1.1e4 / steps
    apart = format.super_block or format.group or K
    expected = format.dequantize(format.quantize(weight[:, 256 - 256 % apart :])) if apart <= 128 else None
    if expected is not None:
        assert torch.equal(found[0, 256:], expected[0])


@pytest.mark.parametrize("name", ["int4_g32", "int8a_g64", "q8_0", "q4_k", "nf4_g64"])
def test_scales_beyond_fp16_are_refused(name):
    weight = torch.ones(2, 256)
    weight[1, 5] = 1e9
    with pytest.raises(InputError, match=f"^{name}: expected weights whose scales fit in float16, found"):
        FORMATS[name].quantize(weight)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_a_scale_per_row_holds_any_size(name, magnitude, generator):
    weight = torch.randn(2, 64, generator=generator)
    once, scaled = (FORMATS[name].dequantize(FORMATS[name].quantize(w)) for w in (weight, weight * magnitude))
    torch.testing.assert_close(scaled / magnitude, once, rtol=0.1, atol=1e-6)


def test_the_lowest_code_of_int8_is_a_number_like_others():
    """-128, which the magnitude of no other code has: x -128 and x 127, to 32 bits, in both corners."""
    format = FORMATS["int8"]
    codes = torch.tensor([[-128] * 64, [127] * 64], dtype=torch.int8)
    values = format.dequantize((codes, torch.ones(2, 1)))
    assert torch.equal(values, codes.float())
    weight = torch.tensor([[-128.0, 127.0, 0.4, -0.6], [128.0, -127.0, 0.4, -0.6]])
    kept, scales = format.quantize(weight)
    assert kept.tolist() == [[-128, 127, 0, -1], [-128, 127, 0, 1]]
    assert scales.tolist() == [[1], [-1]]
    x = torch.full((1, 64), 127, dtype=torch.int8)
    assert (x.int() @ codes.int().T).tolist() == [[-127 * 128 * 64, 127 * 127 * 64]]
    q8 = FORMATS["q8_0"]
    assert (q8.dequantize((codes, torch.full((2, 2), 0.5, dtype=torch.float16)))[0] == -64).all()


# --- activations -----------------------------------------------------------------------------------------------

every_activation = pytest.mark.parametrize("format", ACTIVATION_FORMATS.values(), ids=ACTIVATION_FORMATS)


@every_activation
@pytest.mark.parametrize("k", [1, 31, 32, 100, 256])
def test_activations_are_within_half_a_step(format, k, generator):
    x = torch.randn(2, 3, k, generator=generator) * 3
    codes, scales = quantize_rows(x, format)
    assert (codes.shape, codes.dtype) == (x.shape, format.dtype)
    assert (scales.shape, scales.dtype) == ((2, 3, format.groups(k)), torch.float32)
    error = (dequantize_rows(codes, scales, format) - x).abs()
    step = scales if format.group is None else scales.repeat_interleave(format.group, -1)[..., :k]
    if format.dtype == torch.int8:
        assert (error <= step * 0.501).all()
        assert codes.abs().amax(-1).eq(127).all()
    else:
        assert (error <= torch.maximum(x.abs() * 2**-4, step * 2**-10)).all()


def test_activations_round_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, scales = quantize_rows(x, ACTIVATION_FORMATS["int8"])
    assert scales.item() == 1
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@every_activation
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_activation_spoils_its_row_only(format, bad, generator):
    x, weight = torch.randn(3, 100, generator=generator), torch.randn(7, 100, generator=generator)
    x[1, 70] = bad
    fake = torch.ops.effc.fake_quantize(x, format.name)
    y = fake @ weight.T
    assert y[1].isnan().all()
    others = torch.tensor([0, 2])
    assert torch.equal(fake[others], torch.ops.effc.fake_quantize(x[others], format.name))
    codes, scales = quantize_rows(x, format)
    group = 0 if format.group is None else 70 // format.group
    assert scales[1, group].isnan()
    assert (codes[1, group * (format.group or 100) :][: format.group or 100].float() == 0).all()


@every_activation
def test_rows_of_zeros_and_of_the_smallest_numbers(format):
    x = torch.zeros(4, 64)
    x[1] = 1e-45
    x[2] = -1e-39
    x[3] = torch.finfo(torch.float32).tiny * 448
    codes, scales = quantize_rows(x, format)
    assert (codes[:3].float() == 0).all()
    assert (scales[:3] == 0).all()
    torch.testing.assert_close(dequantize_rows(codes, scales, format)[3], x[3], rtol=1e-6, atol=0)


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outliers_of_activations_do_not_overflow(format, dtype, generator):
    x = torch.randn(4, 256, generator=generator)
    x[0, 9], x[1, 200] = 1e4, -1e4
    x[2] = 3e38
    fake = torch.ops.effc.fake_quantize(x.to(dtype), format.name)
    assert fake.dtype == dtype
    assert fake.isfinite().all()
    torch.testing.assert_close(fake[2], x[2].to(dtype), rtol=0.01, atol=0)
    assert nmse(fake[:2], x[:2]) < 5e-4


@pytest.mark.parametrize("name", ["int8", "int8_g32", "q8_0", "int4_g128", "q4_1", "q6_k"])
@pytest.mark.parametrize("activation", ["int8", "int8_g32"])
@pytest.mark.parametrize("outlier", [0.0, 1e4], ids=["", "outliers"])
def test_products_over_codes_are_near_those_of_the_values(name, activation, outlier, generator):
    """What kernels compute: sums of int8 products per group, beside the dequantized weights in fp64."""
    format = FORMATS[name]
    x, parts = torch.randn(4, K, generator=generator), format.quantize(torch.randn(24, K, generator=generator))
    x[1, 5] += outlier
    weight = format.dequantize(parts, torch.float64)
    found = torch.ops.effc.linear(torch.ops.effc.fake_quantize(x, activation), weight.float())
    assert nmse(found, x.double() @ weight.T) <= 5e-4
