"""What calibration needs to know of the inputs of a linear: second moments, largest and mean magnitudes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class InputStatistics:
    """Sums over the rows of an input [..., K] of a linear, row by row of a text.

    count: rows seen. hessian: X^T X / count [K, K], half the second derivative of the squared error of the outputs by
    a row of weights. largest, mean: of |x| per channel [K].
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.count = 0
        self.moments = torch.zeros(size, size, dtype=dtype)
        self.total = torch.zeros(size, dtype=dtype)
        self.largest = torch.zeros(size, dtype=dtype)

    @classmethod
    def of(cls, inputs: Iterable[Tensor]) -> InputStatistics:
        found = None
        for x in inputs:
            found = found or cls(x.shape[-1], torch.promote_types(x.dtype, torch.float32))
            found.add(x)
        if found is None:
            raise ValueError("expected at least one input")
        return found

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(self.moments.dtype)
        self.count += x.shape[0]
        self.moments.addmm_(x.t(), x)
        self.total += x.abs().sum(0)
        torch.maximum(self.largest, x.abs().amax(0), out=self.largest)

    @property
    def hessian(self) -> Tensor:
        return self.moments / self.count

    @property
    def mean(self) -> Tensor:
        return self.total / self.count


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Mean over rows of |x|^2 of x @ difference.T, for inputs x with this hessian [K, K]; difference [N, K]."""
    return ((difference @ hessian) * difference).sum(dtype=torch.float64).item()


def relative_error(rounded: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """Mean squared error of the outputs by their mean square; 0 where nothing comes out."""
    rounded, weight = rounded.to(hessian.dtype), weight.to(hessian.dtype)
    energy = output_error(weight, hessian)
    return output_error(rounded - weight, hessian) / energy if energy else 0.0
