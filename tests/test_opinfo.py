"""A sample of PyTorch's own OpInfo database through torch.compile(backend="effc"): nothing wrong, nothing crashes.

`python bench/opinfo.py` prints how many calls had kernels throughout, and which ops ran through ATen.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("expecttest", reason="PyTorch's OpInfo database imports expecttest")

from .opinfo_cases import DTYPES, FAMILIES, check_all, compare, sample

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # PyTorch's, about its own samples
]

QUICK = {("elementwise", torch.float32), ("reductions", torch.bfloat16), ("indexing", torch.int64)}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(f, d, marks=() if (f, d) in QUICK else pytest.mark.slow, id=f"{f}-{str(d)[6:]}")
        for f in FAMILIES
        for d in DTYPES
    ],
)
def test_calls_agree_with_eager(family: str, dtype: torch.dtype) -> None:
    quick = (family, dtype) in QUICK
    outcome = check_all(sample(family, dtype, 1, every=4) if quick else sample(family, dtype, 4), batch=48)
    assert outcome.cases
    assert not outcome.failures, "\n".join(f"{name}: {why}" for name, why in outcome.failures.items())
    assert not outcome.refused, outcome.refused


def test_a_wrong_result_is_told() -> None:
    case = sample("elementwise", torch.float32, 1, every=1000)[0]
    with pytest.raises(AssertionError, match="elements are off"):
        compare(case, [result + 0.1 for result in case.call(case.tensors)])
