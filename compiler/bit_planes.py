"""Planes of bits: codes of a few bits each, several to a byte.

A plane of width w keeps element (8 / w) * j + i in bits [i * w, (i + 1) * w) of byte j. Codes whose width is no power
of two lie in two planes, the low bits in the first: 6 bits are (4, 2), 5 are (4, 1), 3 are (2, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(codes: Tensor, width: int) -> Tensor:
    """[..., K] unsigned codes --> uint8 [..., K * width / 8]; of each code the lowest `width` bits are kept."""
    per_byte = 8 // width
    parts = (codes.to(torch.uint8) & (1 << width) - 1).unflatten(-1, (-1, per_byte))
    packed = parts[..., 0].clone()
    for position in range(1, per_byte):
        packed |= parts[..., position] << position * width
    return packed


def unpack(plane: Tensor, width: int) -> Tensor:
    """uint8 [..., K * width / 8] --> uint8 codes [..., K]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    return (plane.unsqueeze(-1) >> shifts & (1 << width) - 1).flatten(-2)


def pack_planes(codes: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """[..., K] unsigned codes --> one plane for each width, the low bits first."""
    planes, shift = [], 0
    for width in widths:
        planes.append(pack(codes >> shift, width))
        shift += width
    return tuple(planes)


def unpack_planes(planes: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """The codes that `pack_planes` took."""
    codes = unpack(planes[0], widths[0])
    shift = widths[0]
    for plane, width in zip(planes[1:], widths[1:]):
        codes |= unpack(plane, width) << shift
        shift += width
    return codes
