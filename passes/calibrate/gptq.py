"""GPTQ (Frantar et al., 2022): round column by column, and let the columns that are left make up for each error.

With H the hessian of a row's squared output error and U the upper Cholesky factor of its inverse, after column j is
rounded with error e_j the least error is had by

    w[j + 1:] -= e_j / U[j, j] * U[j, j + 1:]

Columns go in blocks, so that the rest of the matrix is updated by one product for each block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...compiler.errors import InputError
from ...compiler.formats import Format
from ...compiler.round_to_nearest import kept_scales, nearest_values, round_under
from .grid import DAMPING, Scales, damped, search_scales

BLOCK = 128
LARGEST_DAMPING = 1e6


def round_gptq(
    weight: Tensor, hessian: Tensor | None, format: Format, *, by_activation: bool = True, damping: float = DAMPING
) -> tuple[Tensor, ...]:
    """The parts of `weight` [N, K] for inputs with `hessian` [K, K]; without one, as `search_scales` clips.

    by_activation: columns with large inputs first (act-order); scales are then those of the weight as it is, else
    those of a group as the columns before it have left it. Raises InputError for a hessian that is not finite.
    """
    weight = weight.float()
    format.check_columns(weight.shape[-1])
    scales = search_scales(weight, format, hessian)
    if hessian is None:
        return round_under(weight, *scales, format)
    hessian = hessian.float()
    if by_activation:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        return compensate(weight, hessian, scales, format, order, damping, refit=False)
    refit = format.group is not None and not format.super_block
    return compensate(weight, hessian, scales, format, torch.arange(len(hessian)), damping, refit)


def compensate(
    weight: Tensor, hessian: Tensor, scales: Scales, format: Format, order: Tensor, damping: float, refit: bool
) -> tuple[Tensor, ...]:
    """Round the columns in their `order`. refit: search the scales of a group anew when its first column comes."""
    kept = kept_scales(*scales, format)[1:]
    group = format.group or weight.shape[1]
    block = max(BLOCK // group, 1) * group if refit else BLOCK
    factor = inverse_factor(hessian[order][:, order], damping)
    rest = weight[:, order].t().contiguous()  # [K, N]; what is not yet rounded makes up for what is
    columns = order.tolist()
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        errors = torch.empty(stop - start, rest.shape[1])
        for i in range(start, stop):
            if refit and i % group == 0:
                end = min(i + group, len(columns))
                part = search_scales(rest[i:end].t(), format, hessian[i:end, i:end])
                for whole, new in zip((*scales, *kept), (*part, *kept_scales(*part, format)[1:])):
                    if new is not None:
                        whole[:, i // group] = new[:, 0]
            of_group = slice(columns[i] // group, columns[i] // group + 1)
            scale, low = (None if part is None else part[:, of_group] for part in kept)
            rounded = nearest_values(rest[i, :, None], scale, low, format)[:, 0]
            error = errors[i - start] = (rest[i] - rounded) / factor[i, i]
            rest[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return round_under(rest.t()[:, order.argsort()], *scales, format)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of inverse(hessian + damping), U^T U; damping grows until there is one."""
    if not hessian.isfinite().all():
        raise InputError("GPTQ: the inputs of this linear are not finite on the calibration text")
    while damping < LARGEST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        damping *= 10
    raise InputError("GPTQ: the second moments of this linear's inputs have no inverse")
