"""Scales of groups, and the values that weights may take under them: what every way of rounding chooses from.

weight [N, K], hessian [K, K]  -->  scales, mins [N, groups]  -->  the nearest values [N, K]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...compiler.formats import Format
from ...compiler.round_to_nearest import check_finite, group_scales, in_groups, kept_scales, nearest_values

CLIP_RATIOS = tuple(ratio / 100 for ratio in range(100, 38, -4))
"""Parts of a group's range that are tried."""

DAMPING = 0.01
"""Part of the mean of a hessian's diagonal that is added to it (Frantar et al.)."""

ROWS = 512
"""How many rows of a matrix are searched at once, so that they stay in the caches: three times as fast as all."""

Scales = tuple[Tensor, Tensor | None]


def search_scales(weight: Tensor, format: Format, hessian: Tensor | None = None) -> Scales:
    """Scales and mins [N, groups] of the clipped range with the least error, group by group, not yet as they are kept.

    hessian [K, K]: the error of a group is e @ H @ e with the group's own block of it; without, |e|^2. A group's range
    is cut by one of `CLIP_RATIOS`.
    """
    check_finite(weight, format)
    weight = weight.float()
    blocks = None if hessian is None else diagonal_blocks(damped(hessian.to(weight)), format.group)
    found = [search_rows(rows, format, blocks) for rows in weight.split(ROWS)]
    scales, mins = zip(*found)
    return torch.cat(scales), torch.cat(mins) if format.asymmetric else None


def search_rows(weight: Tensor, format: Format, blocks: Tensor | None) -> Scales:
    """`search_scales` of some rows, by the blocks [groups, group, group] on the hessian's diagonal."""
    best, chosen = None, None
    for ratio in CLIP_RATIOS:
        scales, mins = group_scales(weight * ratio, format)
        values = nearest_values(weight, *kept_scales(scales, mins, format)[1:], format)
        error = group_errors(values - weight, blocks, format.group)
        if best is None:
            best, chosen = error, (scales, mins)
            continue
        better = error < best
        best = torch.where(better, error, best)
        pairs = zip((scales, mins), chosen)
        chosen = tuple(None if new is None else torch.where(better, new, old) for new, old in pairs)
    return chosen


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """hessian + damping * its mean diagonal, so that channels that the text did not use count too."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    return hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype)


def diagonal_blocks(hessian: Tensor, group: int | None) -> Tensor:
    """[K, K] --> [groups, group, group], the blocks on the diagonal; a shorter last one is filled with zeros."""
    size = group or len(hessian)
    count = -(-len(hessian) // size)
    blocks = hessian.new_zeros(count, size, size)
    for index in range(count):
        block = hessian[index * size : (index + 1) * size, index * size : (index + 1) * size]
        blocks[index, : len(block), : len(block)] = block
    return blocks


def group_errors(difference: Tensor, blocks: Tensor | None, group: int | None) -> Tensor:
    """[N, K] --> [N, groups]: e @ block @ e of each group."""
    if group is not None and (rest := difference.shape[-1] % group):
        difference = torch.nn.functional.pad(difference, (0, group - rest))
    grouped = in_groups(difference, group)  # [N, groups, group]
    if blocks is None:
        return grouped.square().sum(-1)
    weighted = torch.bmm(grouped.transpose(0, 1), blocks)  # [groups, N, group]
    return (weighted.transpose(0, 1) * grouped).sum(-1)
