"""AWQ (Lin et al., 2023): spend the steps of the codes on the channels that see large inputs.

    x @ W.T  -->  (x / s) @ round(W * s).T        s = mean(|x|) ** alpha, the best of a grid of alphas

The division is folded into the op before (`folds`), so the graph computes the same function until it is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...compiler.formats import Format
from ...compiler.round_to_nearest import group_scales, kept_scales, nearest_values
from .grid import ROWS
from .statistics import InputStatistics, output_error

ALPHAS = tuple(step / 10 for step in range(11))
SMALLEST = 1e-4
"""Of a mean magnitude: what a channel that is always 0 counts as."""


@dataclass(frozen=True)
class Scaling:
    """scale [K]: what columns are multiplied by. error, error_unscaled: of the outputs, rounded to nearest."""

    scale: Tensor
    alpha: float
    error: float
    error_unscaled: float


def search_scaling(
    weights: Sequence[tuple[Tensor, Format]], statistics: InputStatistics, tie: Callable[[Tensor], Tensor] = lambda s: s
) -> Scaling:
    """The scale of the columns of `weights` [N, K] with the least error of all outputs, after rounding to the formats.

    All weights multiply the input of `statistics`. tie: makes channels alike that have to be (`Fold.tied`).
    """
    magnitudes, hessian = statistics.mean.float().clamp(min=SMALLEST), statistics.hessian.float()
    tried = []
    for alpha in ALPHAS:
        scale = tie(magnitudes**alpha)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = sum(scaled_error(weight.float(), scale, format, hessian) for weight, format in weights)
        tried.append((error, alpha, scale))
    error, alpha, scale = min(tried, key=lambda entry: entry[0])
    return Scaling(scale, alpha, error, tried[0][0])


def scaled_error(weight: Tensor, scale: Tensor, format: Format, hessian: Tensor) -> float:
    total = 0.0
    for rows in weight.split(ROWS):
        scaled = rows * scale
        rounded = nearest_values(scaled, *kept_scales(*group_scales(scaled, format), format)[1:], format)
        total += output_error(rounded / scale - rows, hessian)
    return total
