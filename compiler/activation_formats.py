"""Formats that activations are quantized to while a model runs: symmetric, a scale per row or per group along K.

    x [..., K]  -->  codes int8 [..., K], scales fp32 [..., groups]        x ~ codes * scales

The scale is the largest magnitude over 127 (448 in fp8), codes are x / scale rounded half to even. The last group of
a row may be shorter. A group whose scale would be below the smallest normal number counts as zeros: scale 0, codes 0.
NaN or infinity makes its group's scale NaN and its codes 0, so each sum over that row is NaN, and no other row's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class ActivationFormat:
    """group: activations along K that share a scale; None: the row. largest: the code of the largest magnitude."""

    name: str
    group: int | None
    dtype: torch.dtype = torch.int8
    largest: float = 127

    def groups(self, k: int) -> int:
        """Scales of a row of `k`."""
        return 1 if self.group is None else math.ceil(k / self.group)


ACTIVATION_FORMATS: dict[str, ActivationFormat] = {
    row.name: row
    for row in (
        ActivationFormat("int8", None),
        ActivationFormat("int8_g32", 32),
        ActivationFormat("int8_g64", 64),
        ActivationFormat("int8_g128", 128),
        ActivationFormat("fp8_e4m3", None, torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
    )
}


def find_activation(name: str) -> ActivationFormat:
    """The format of that name. Raises InputError that lists those there are."""
    if name not in ACTIVATION_FORMATS:
        raise InputError(f"unknown activation format {name!r}; expected one of {', '.join(ACTIVATION_FORMATS)}")
    return ACTIVATION_FORMATS[name]


def quantize_rows(x: Tensor, format: ActivationFormat) -> tuple[Tensor, Tensor]:
    """codes [..., K] and scales fp32 [..., groups] of x [..., K]; see the module's docstring."""
    k = x.shape[-1]
    groups = in_groups(x.float(), format.group)
    largest = groups.abs().amax(-1)
    scales = largest / format.largest
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    scales = torch.where(largest.isfinite(), scales, float("nan"))
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    steps = torch.where(inverse.unsqueeze(-1) > 0, groups * inverse.unsqueeze(-1), 0.0)
    codes = (steps if format.dtype.is_floating_point else torch.round(steps)).to(format.dtype)
    return codes.flatten(-2)[..., :k], scales


def dequantize_rows(codes: Tensor, scales: Tensor, format: ActivationFormat) -> Tensor:
    """fp32 [..., K]."""
    if format.group is not None:
        scales = scales.repeat_interleave(format.group, -1)[..., : codes.shape[-1]]
    return codes.float() * scales


def in_groups(x: Tensor, group: int | None) -> Tensor:
    """[..., K] --> [..., groups, group]; a shorter last group is filled with zeros."""
    if group is None:
        return x.unsqueeze(-2)
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
