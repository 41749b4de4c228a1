"""Formats that weights are quantized to: which parts a matrix becomes, and what values they stand for.

    [N, K]  -->  codes, scales, ...        Format.quantize (round to nearest)
    codes, scales, ...  -->  [N, K]        Format.dequantize, plain tensor math: what a format means

The first axis of each part is N, so rows are cut, joined and permuted alike in a matrix and in its parts (leading
axes, experts say, may stand before). Codes lie in planes of bits (`bit_planes`). A group is what shares a scale along
K; the last group of a row may be shorter, in own formats. By family, element by element:

    int8, int8_g64, int4_g128, int3_g64, ..     w = scale * (code - zero)          zero is half of the range
    int4a_g32, q4_1, ..                         w = scale * code + min
    int4z_g128, ..                              the same; the mins come from integer zero points and are kept in fp32
    q4_k, q5_k                                  w = super * scale * code - super_min * min       scale, min: 6 bits
    q6_k                                        w = super * scale * (code - 32)
    nf4_g64                                     w = scale * book[code]        (Dettmers et al., 2023)
    fp8_e4m3                                    w = scale * code              (Micikevicius et al., 2022)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bit_planes import unpack_planes
from .errors import InputError
from .round_to_nearest import round_to_nearest

Shape = tuple[int, ...]
F16, F32, I8, U8 = torch.float16, torch.float32, torch.int8, torch.uint8


@dataclass(frozen=True)
class Format:
    """How a matrix [N, K] is kept.

    planes: widths of the bit planes that codes lie in, low bits first. group: weights along K that share a scale;
    None: the row. zero: what is taken from each code. asymmetric: a group has a min as well. scale_dtype, min_dtype:
    how those are kept. integer_zeros: a min is an integer times the scale. whole: rows hold whole groups only.
    super_block: weights along K that share the scales of the scales (K quants). book: the values that codes index, in
    rising order (NF4). code_dtype: of a plane of 8 bits.
    """

    name: str
    planes: tuple[int, ...]
    group: int | None
    zero: int = 0
    asymmetric: bool = False
    scale_dtype: torch.dtype = F16
    min_dtype: torch.dtype = F16
    integer_zeros: bool = False
    whole: bool = False
    super_block: int | None = None
    book: tuple[float, ...] | None = None
    code_dtype: torch.dtype = I8

    @property
    def width(self) -> int:
        """Bits of a code."""
        return sum(self.planes)

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts in the order of `effc.dequantize`'s list."""
        names = ["codes", "high"][: len(self.planes)] + ["scales"] + ["mins"] * self.asymmetric
        if self.super_block:
            names += ["super"] + ["super_min"] * self.asymmetric
        return tuple(names)

    def part_shapes(self, n: int, k: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each part of a matrix [n, k]. Raises InputError where the format cannot hold it."""
        self.check_columns(k)
        groups = math.ceil(k / (self.group or max(k, 1)))
        shapes: dict[str, tuple[Shape, torch.dtype]] = {}
        for name, width in zip(("codes", "high"), self.planes):
            shapes[name] = ((n, k * width // 8), self.code_dtype if width == 8 else U8)
        shapes["scales"] = ((n, groups), self.scale_dtype)
        if self.asymmetric:
            shapes["mins"] = ((n, groups), self.min_dtype)
        if self.super_block:
            for name in self.part_names[len(shapes) :]:
                shapes[name] = ((n, k // self.super_block), F16)
        return shapes

    def check_columns(self, k: int) -> None:
        """Raises InputError where rows of `k` weights do not fit: GGUF's blocks and the bytes of planes are whole."""
        unit = self.super_block or (self.group if self.whole else 8 // min(self.planes))
        if k % unit or not k:
            raise InputError(f"{self.name}: expected rows of a multiple of {unit} weights, found {k}")

    def columns(self, codes_columns: int) -> int:
        """K of a matrix, from the columns of its codes."""
        return codes_columns * 8 // self.planes[0]

    def bits(self, n: int, k: int) -> float:
        """Bits per weight of a matrix [n, k], all told."""
        parts = self.part_shapes(n, k).values()
        return sum(8 * math.prod(shape) * dtype.itemsize for shape, dtype in parts) / (n * k)

    def named(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parts by name. Raises InputError where their number is another."""
        if len(parts) != len(self.part_names):
            raise InputError(f"{self.name}: expected the parts {', '.join(self.part_names)}, found {len(parts)} parts")
        return dict(zip(self.part_names, parts))

    def codes(self, parts: Sequence[Tensor]) -> Tensor:
        """The codes [..., N, K] as they are kept: int8 or fp8, uint8 where they lie in planes of fewer bits."""
        if self.planes == (8,):
            return parts[0]
        return unpack_planes(parts[: len(self.planes)], self.planes)

    def dequantize(self, parts: Sequence[Tensor], dtype: torch.dtype = F32) -> Tensor:
        """The values [..., N, K], computed in fp32 and rounded to `dtype`."""
        part = self.named(parts)
        scales, mins = part["scales"].float(), part["mins"].float() if self.asymmetric else None
        if self.super_block:
            per_super = self.super_block // self.group
            scales = part["super"].float().repeat_interleave(per_super, -1) * scales
            if mins is not None:
                mins = -(part["super_min"].float().repeat_interleave(per_super, -1) * mins)
        return self.values(self.codes(parts), scales, mins).to(dtype)

    def values(self, codes: Tensor, scales: Tensor, mins: Tensor | None) -> Tensor:
        """What codes [..., K] stand for under scales and mins [..., groups], all fp32 (codes of any dtype)."""
        if self.book is not None:
            values = torch.tensor(self.book, device=codes.device)[codes.long()]
        elif codes.dtype == torch.float32:
            values = codes - self.zero
        else:
            values = codes.float().sub_(self.zero)
        self.scale_groups(values, scales, mins)
        return values

    def scale_groups(self, values: Tensor, scales: Tensor, mins: Tensor | None) -> None:
        """values * scale + min in place, group by group: [..., K] by [..., groups]. The last group may be shorter."""
        group = self.group or values.shape[-1]
        whole = values.shape[-1] // group
        full, rest = values[..., : whole * group].unflatten(-1, (whole, group)), values[..., None, whole * group :]
        for groups, at in ((full, slice(0, whole)), (rest, slice(whole, None))):
            if groups.numel():
                groups.mul_(scales[..., at, None])
                if mins is not None:
                    groups.add_(mins[..., at, None])

    def spread(self, values: Tensor, k: int) -> Tensor:
        """One value a group --> one a weight: [..., groups] --> [..., k], or [..., 1] where the row is the group."""
        return values if self.group is None else values.repeat_interleave(self.group, -1)[..., :k]

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The parts of `weight` [..., N, K], rounded to nearest.

        Raises InputError where K does not fit, a weight is NaN or infinite, or a scale does not fit its dtype.
        """
        self.check_columns(weight.shape[-1])
        return round_to_nearest(weight, self)


# --- the table -------------------------------------------------------------------------------------------------

GROUPS = (32, 64, 128)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


def integers(bits: int) -> Iterator[Format]:
    """int4, int4_g32, ... symmetric, a: with mins, z: with zero points, _f32: scales of checkpoints that need it."""
    zero, planes = 0 if bits == 8 else 1 << bits - 1, PLANES[bits]
    for group in (None, *GROUPS):
        suffix, scale = ("", F32) if group is None else (f"_g{group}", F16)
        yield Format(f"int{bits}{suffix}", planes, group, zero, scale_dtype=scale)
        yield Format(f"int{bits}a{suffix}", planes, group, asymmetric=True, scale_dtype=scale, min_dtype=scale)
        zeros = Format(f"int{bits}z{suffix}", planes, group, 0, True, scale, F32, integer_zeros=True)
        yield zeros
        if group is not None:
            yield Format(f"int{bits}{suffix}_f32", planes, group, zero, scale_dtype=F32)
            yield replace(zeros, name=f"{zeros.name}_f32", scale_dtype=F32)


def fp8(group: int | None) -> Format:
    name = "fp8_e4m3" if group is None else f"fp8_e4m3_g{group}"
    return Format(name, (8,), group, scale_dtype=F32, code_dtype=torch.float8_e4m3fn)


def gguf_blocks() -> Iterator[Format]:
    """GGUF's blocks of 32, and of 256 with scales of scales (K quants)."""
    yield Format("q8_0", (8,), 32, whole=True)
    for bits in (4, 5):
        planes, six_bits = PLANES[bits], {"scale_dtype": U8, "min_dtype": U8, "super_block": 256}
        yield Format(f"q{bits}_0", planes, 32, zero=1 << bits - 1, whole=True)
        yield Format(f"q{bits}_1", planes, 32, asymmetric=True, whole=True)
        yield Format(f"q{bits}_k", planes, 32, asymmetric=True, whole=True, **six_bits)
    yield Format("q6_k", PLANES[6], 16, zero=32, scale_dtype=I8, whole=True, super_block=256)


FORMATS: dict[str, Format] = {
    **{row.name: row for bits in (8, 4, 3, 2) for row in integers(bits)},
    **{row.name: row for row in gguf_blocks()},
    **{f"nf4_g{group}": Format(f"nf4_g{group}", (4,), group, book=NF4) for group in GROUPS},
    **{row.name: row for row in map(fp8, (None, *GROUPS))},
}


def spelled() -> str:
    """All names in a line."""
    sizes = " or ".join(f"_g{group}" for group in GROUPS)
    others = ", ".join(name for name in FORMATS if not name.startswith("int"))
    return f"int8, int4, int3 or int2 (then a: with mins, or z: zero points; then {sizes}: in groups), {others}"


def find(name: str) -> Format:
    """The format of that name. Raises InputError that lists those there are."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}; expected one of {spelled()}")
    return FORMATS[name]
