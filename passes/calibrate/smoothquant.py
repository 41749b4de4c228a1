"""SmoothQuant (Xiao et al., 2022): move the outliers of activations into the weights, where they cost less.

    x @ W.T  -->  (x / s) @ (W * s).T        s = max(|x|) ** strength / max(|W|) ** (1 - strength), per channel

For int8 activations, whose scale is set by the largest channel. The division is folded into the op before (`folds`).
"""

from __future__ import annotations

from torch import Tensor

STRENGTH = 0.5
SMALLEST = 1e-5


def smoothing(weight: Tensor, largest: Tensor, strength: float = STRENGTH) -> Tensor:
    """The scale [K] > 0 of a weight [N, K] for inputs with magnitudes up to `largest` [K]."""
    of_inputs = largest.float().clamp(min=SMALLEST) ** strength
    of_weights = weight.float().abs().amax(0).clamp(min=SMALLEST) ** (1 - strength)
    return (of_inputs / of_weights).clamp(min=SMALLEST)
