"""Round to nearest, with ranges that are cut where that lessens the error of the outputs.

weight [N, K]  -->  parts: each group's range times the ratio in (0, 1] with the least e @ H @ e
"""

from __future__ import annotations

from torch import Tensor

from ...compiler.formats import Format
from ...compiler.round_to_nearest import round_under
from .grid import search_scales


def round_nearest(weight: Tensor, hessian: Tensor | None, format: Format) -> tuple[Tensor, ...]:
    return format.quantize(weight)


def round_clipped(weight: Tensor, hessian: Tensor | None, format: Format) -> tuple[Tensor, ...]:
    """The parts of `weight` [N, K] under searched scales. hessian [K, K] of the inputs; None weighs all alike."""
    format.check_columns(weight.shape[-1])
    return round_under(weight.float(), *search_scales(weight, format, hessian), format)
