"""Round to nearest: the parts of a matrix in a format, without looking at data.

In a symmetric group the weight of the largest magnitude gets the lowest code, -2^(bits - 1), which stands alone: its
scale may be negative, and weights near the other end may be a step off. ggml does so; on random weights it leaves 0.6
(2 bits) to 0.97 times (8 bits) the error that clamping both ends half a step off leaves. With a min, the range is cut
into 2^bits - 1 steps. Scales are rounded to the dtype that they are kept in, and codes are the nearest under those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bit_planes import pack_planes
from .errors import InputError

if TYPE_CHECKING:
    from .formats import Format

LARGEST_SCALE_CODE = {torch.uint8: 63, torch.int8: 127}
"""Scales of scales: 6 bits in q4_k and q5_k, an int8 in q6_k."""

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


ELEMENTS_AT_ONCE = 1 << 22
"""Rows are rounded a few at a time: what lies between the weights and their codes is several times their size."""


def round_to_nearest(weight: Tensor, format: Format) -> tuple[Tensor, ...]:
    """weight [..., N, K] --> parts in the order of `format.part_names`. Raises InputError for what does not fit."""
    check_finite(weight, format)
    *leading, k = weight.shape
    pieces = weight.reshape(-1, k).split(max(1, ELEMENTS_AT_ONCE // k))
    rounded = zip(*(round_under(rows, *group_scales(rows, format), format) for rows in map(Tensor.float, pieces)))
    return tuple(torch.cat(parts).unflatten(0, leading) for parts in rounded)


def round_under(weight: Tensor, scales: Tensor, mins: Tensor | None, format: Format) -> tuple[Tensor, ...]:
    """The parts of `weight` [..., N, K] fp32 under given scales and mins [..., groups], not yet as they are kept."""
    scale_parts, scales, mins = kept_scales(scales, mins, format)
    codes = nearest_codes(weight, scales, mins, format)
    if format.width == 8:
        return (codes.to(format.code_dtype), *scale_parts)
    return (*pack_planes(codes.to(torch.uint8), format.planes), *scale_parts)


def kept_scales(scales: Tensor, mins: Tensor | None, format: Format) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Scales and mins [..., groups] as the parts they are kept in, and the fp32 values that those stand for."""
    if format.super_block:
        return scales_of_scales(scales, mins, format)
    parts = [stored(scales, format.scale_dtype, format)]
    scales = parts[0].float()
    if format.integer_zeros:
        mins = scales * torch.round(reciprocal(scales) * mins)
    if mins is None:
        return parts, scales, None
    parts.append(stored(mins, format.min_dtype, format))
    return parts, scales, parts[1].float()


def check_finite(weight: Tensor, format: Format) -> None:
    """Raises InputError that names the first row with a weight that is no number."""
    rows = weight.reshape(-1, weight.shape[-1])
    bad = ~rows.isfinite().all(-1)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        found = "NaN" if rows[row].isnan().any() else "infinity"
        raise InputError(f"{format.name}: expected finite weights, found {found} in row {row}")


def in_groups(weight: Tensor, group: int | None) -> Tensor:
    """[..., K] --> [..., groups, group]; a shorter last group repeats its first weight, which changes no range."""
    if group is None:
        return weight.unsqueeze(-2)
    if rest := weight.shape[-1] % group:
        filler = weight[..., -rest, None].expand(*weight.shape[:-1], group - rest)
        weight = torch.cat((weight, filler), -1)
    return weight.unflatten(-1, (-1, group))


def group_scales(weight: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and, in asymmetric formats, what code 0 stands for, of each group: [..., groups] fp32, not yet rounded."""
    groups = in_groups(weight, format.group)
    if not format.asymmetric:
        return symmetric_scales(groups, format), None
    low, high = groups.amin(-1), groups.amax(-1)
    if format.super_block or format.integer_zeros:
        low, high = low.clamp(max=0), high.clamp(min=0)
    steps = (1 << format.width) - 1
    scales = high / steps - low / steps
    return scales, low - lowest_code(format) * scales


def symmetric_scales(groups: Tensor, format: Format) -> Tensor:
    if format.code_dtype.is_floating_point:
        return groups.abs().amax(-1) / FP8_MAX
    if format.book is not None:
        return groups.abs().amax(-1) / max(format.book)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return 0 - largest / (1 << format.width - 1)


def lowest_code(format: Format) -> int:
    return -128 if format.width == 8 else 0


def scales_of_scales(scales: Tensor, mins: Tensor | None, format: Format) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The parts that scales (and mins, none above 0) [..., groups] become in K quants, and what those stand for."""
    per_super = format.super_block // format.group
    codes, supers, values = [], [], []
    kept = [(scales, format.scale_dtype)] + ([] if mins is None else [(-mins, format.min_dtype)])
    for numbers, dtype in kept:
        blocks = numbers.unflatten(-1, (-1, per_super))
        limit = LARGEST_SCALE_CODE[dtype]
        super_scale = stored(blocks.abs().amax(-1) / limit, torch.float16, format)
        wide = super_scale.float().unsqueeze(-1)
        code = torch.round(blocks * reciprocal(wide)).clamp(-limit, limit)
        codes.append(code.flatten(-2).to(dtype))
        supers.append(super_scale)
        values.append((wide * code).flatten(-2))
    return [*codes, *supers], values[0], -values[1] if mins is not None else None


def stored(scales: Tensor, dtype: torch.dtype, format: Format) -> Tensor:
    """Scales as they are kept. Raises InputError where one is too large for the dtype."""
    kept = scales.to(dtype)
    if not kept.isfinite().all():
        kind, found = str(dtype).removeprefix("torch."), float(scales.abs().max())
        raise InputError(f"{format.name}: expected weights whose scales fit in {kind}, found {found:.3g}")
    return kept


def reciprocal(scales: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0 or so small that this overflows, whose codes say nothing."""
    inverse = 1 / scales
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))


def nearest_codes(weight: Tensor, scales: Tensor, mins: Tensor | None, format: Format) -> Tensor:
    """The codes [..., K], not yet packed, that are nearest to `weight` under scales and mins [..., groups]."""
    k = weight.shape[-1]
    steps = weight if mins is None else weight - format.spread(mins, k)
    steps = steps * format.spread(reciprocal(scales), k)
    if format.book is not None:
        book = torch.tensor(format.book, device=weight.device)
        return torch.bucketize(steps.contiguous(), (book[1:] + book[:-1]) / 2)
    if format.code_dtype.is_floating_point:
        return steps.clamp(-FP8_MAX, FP8_MAX).to(format.code_dtype)
    lowest = lowest_code(format)
    return torch.round(steps + format.zero).clamp(lowest, lowest + (1 << format.width) - 1)


def nearest_values(weight: Tensor, scales: Tensor, mins: Tensor | None, format: Format) -> Tensor:
    """`weight` rounded: what its nearest codes stand for, fp32."""
    return format.values(nearest_codes(weight, scales, mins, format), scales, mins)
