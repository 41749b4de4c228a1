"""What "equal to eager" means: as close to the fp64 truth as eager is, within a factor, and no NaN more or less."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close_to_reference(
    actual: Tensor,
    eager_same_precision: Tensor,
    reference_fp64: Tensor,
    label: str = "result",
    eager_error: float = 0.0,
) -> float:
    """The error is at most twice the largest that eager makes, plus one ulp of the dtype at the row's maximum.

    All [..., K] of one shape. NaN and infinities stand where eager has them; integers and booleans are equal.
    eager_error: what eager was seen to be off by elsewhere, for a result of few elements. Returns the larger one.
    """
    assert actual.shape == eager_same_precision.shape, f"{label}: {actual.shape} is not {eager_same_precision.shape}"
    assert actual.dtype == eager_same_precision.dtype, f"{label}: {actual.dtype} is not {eager_same_precision.dtype}"
    if not actual.dtype.is_floating_point:
        wrong = (actual != eager_same_precision).nonzero()
        assert not len(wrong), f"{label}: {len(wrong)} elements differ, the first at {wrong[0].tolist()}"
        return eager_error
    if not actual.numel():
        return eager_error
    finite = eager_same_precision.isfinite()
    same_special = torch.where(
        eager_same_precision.isnan(), actual.isnan(), finite | (actual == eager_same_precision)
    ) & (actual.isfinite() == finite)
    wrong = (~same_special).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{label}: {len(wrong)} elements, at {at}: {actual[at]}, eager has {eager_same_precision[at]}"
        )
    truth = reference_fp64.double().masked_fill(~finite, 0.0)
    error, error_of_eager = (
        (x.double().masked_fill(~finite, 0.0) - truth).abs() for x in (actual, eager_same_precision)
    )
    largest = truth.abs().amax(-1, keepdim=True) if truth.ndim else truth.abs()
    info = torch.finfo(actual.dtype)
    ulp = info.eps * torch.exp2(torch.floor(torch.log2(largest.clamp(min=info.tiny))))
    eager_error = max(eager_error, error_of_eager.max().item())
    allowed = 2 * eager_error + ulp
    wrong = (error > allowed).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{label}: {len(wrong)} of {error.numel()} elements are off by up to {error.max():.3g}, eager by up to "
            f"{eager_error:.3g}; at {at}: {actual[at]}, eager {eager_same_precision[at]}, truth {truth[at]}"
        )
    return eager_error
