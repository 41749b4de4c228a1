"""What changes the scores of attention: windows, softcap, sinks, and expressions over the indices, cached and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .graphs import Compiled, check, random

effc = torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")

H, G, D = 6, 2, 16
ALIBI = "t0[h] * (k - q)"
DOCUMENTS = "t1[b, q] == t1[b, k]"
PREFIX = "(k < 5) | (k <= q)"
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 1.0, 0.3])

OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 5},
    "window of one": {"window": 1},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "bias": {"bias": ALIBI},
    "prefix": {"visible": PREFIX, "causal": False},
    "documents": {"visible": DOCUMENTS},
    "sinks, window": {"window": 7, "sinks": True},
    "softcap, window": {"window": 70, "softcap": 20.0},
    "bias, documents, sinks": {"bias": ALIBI, "visible": DOCUMENTS, "sinks": True, "softcap": 5.0},
}


SHOWN = "t2[b, k] != 0"


def attended(cached: bool = False, causal: bool = True, sinks: bool = False, **options: Any):
    """A function of all operands that uses those that the options ask for; over a cache, t2 hides slots."""

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: Tensor, t0: Tensor, t1: Tensor, p: Tensor):
        named = {**options, "sinks": s if sinks else None}
        if "visible" in options or "bias" in options:
            named["tables"] = [t0, t1]
        if cached:
            visible = f"({options['visible']}) & ({SHOWN})" if "visible" in options else SHOWN
            return effc.cached_attention(q, k, v, p, 0.3, **named | {"visible": visible, "tables": [t0, t1, m]})
        return effc.attention(q, k, v, 0.3, causal, **named)

    return function


def operands(
    batch: int, s: int, t: int, past: list[int] | None = None, dtype: torch.dtype = torch.float32, size: int = D
) -> dict[str, Tensor]:
    """Operands of attention; what lies behind the last key of a cache is NaN."""
    k, v = random(batch, G, t, size, dtype=dtype, seed=2), random(batch, G, t, size, dtype=dtype, seed=3)
    for row, length in enumerate(past or ()):
        k[row, :, length + s :] = v[row, :, length + s :] = float("nan")
    shown = torch.ones(batch, t, dtype=torch.int64)
    shown[:1, :2] = 0
    return {
        "q": random(batch, H, s, size, dtype=dtype, seed=1),
        "k": k,
        "v": v,
        "m": shown,
        "s": random(H, dtype=dtype, seed=4),
        "t0": SLOPES,
        "t1": (torch.arange(t) // 6).expand(batch, t).contiguous(),
        "p": torch.tensor(past if past is not None else [0] * batch, dtype=torch.int64),
    }


DYNAMIC = {"q": (0, 2), "k": (0, 2), "v": (0, 2), "m": (0, 1), "t1": (0, 1), "p": (0,)}


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_of_many_queries(name: str) -> None:
    compiled = Compiled(attended(**OPTIONS[name]), operands(2, 5, 5), DYNAMIC)
    assert not compiled.fallbacks
    for batch, s in ((1, 150), (3, 17), (1, 1), (2, 64), (2, 0)):
        compiled.check(**operands(batch, s, s))


@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if options.get("causal", True)])
@pytest.mark.parametrize("s", [1, 5])
def test_scores_over_a_cache(name: str, s: int) -> None:
    compiled = Compiled(attended(cached=True, **OPTIONS[name]), operands(2, s, 11, [3, 4]), DYNAMIC)
    assert not compiled.fallbacks
    for past, t in (([300, 255, 2], 306), ([0, 63], 200), ([5, 60], 131), ([0], s)):
        compiled.check(**operands(len(past), s, t, past))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bias, documents, sinks", torch.bfloat16),
        pytest.param("bias, documents, sinks", torch.float16, marks=pytest.mark.slow),
        pytest.param("softcap, window", torch.bfloat16, marks=pytest.mark.slow),
        ("softcap, window", torch.float16),
    ],
)
def test_scores_in_half_precision(name: str, dtype: torch.dtype) -> None:
    compiled = Compiled(attended(**OPTIONS[name]), operands(2, 5, 5, dtype=dtype), DYNAMIC)
    compiled.check(**operands(2, 90, 90, dtype=dtype))
    compiled = Compiled(attended(cached=True, **OPTIONS[name]), operands(2, 1, 11, [3, 4], dtype=dtype), DYNAMIC)
    compiled.check(**operands(2, 1, 200, [198, 100], dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 80, 96, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_of_every_head_size(name: str, size: int) -> None:
    check(attended(**OPTIONS[name]), **operands(2, 90, 90, size=size))


def test_expressions_round_down_as_python_does() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            effc.attention(q, k, v, 0.3, False, bias=bias)
            for bias in (
                "(k - q) // 3",
                "(k - q) % 4 - (q - k) // (-2 - h)",
                "where((k // 4) == (q // 4), minimum(k, q) * 0.1, -maximum(k - q, 2) / 7)",
                "(k < q) + (~(k < 3)) * (h % 2)",
            )
        )

    check(function, **{name: operands(2, 20, 20)[name] for name in "qkv"})


def test_tables_of_every_shape() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return (
            effc.attention(q, k, v, 0.3, True, bias="t0[h, k - q + 3]", tables=[a]),
            effc.attention(q, k, v, 0.3, False, visible="t0[b, k] | t1[h, 0] | (k == q)", tables=[b, c]),
            effc.attention(
                q, k, v, 0.3, True, bias="t0[h, minimum(q - k, 4)] * t1[b, q]", tables=[a.transpose(0, 1), b]
            ),
        )

    tensors = {name: operands(2, 20, 20)[name] for name in "qkv"}
    a = random(H, H, dtype=torch.bfloat16, seed=7)
    check(function, **tensors, a=a, b=random(2, 20, seed=8) > 0, c=random(H, 2, seed=9) > 0)


def test_a_sink_alone_gives_zeros_and_a_low_sink_changes_nothing() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor, low: Tensor) -> tuple[Tensor, ...]:
        return (
            effc.attention(q, k, v, 0.3, True, m, sinks=low * 0),
            effc.attention(q, k, v, 0.3, True, sinks=low),
            effc.attention(q, k, v, 0.3, True),
        )

    tensors = {name: x for name, x in operands(2, 20, 20).items() if name in "qkvm"}
    tensors["m"][0] = 0
    hidden, low, without = check(function, **tensors, low=torch.full((H,), -1e4)).last
    assert not hidden[0].any()
    torch.testing.assert_close(low, without)


def test_nan_in_values_that_the_key_mask_hides_is_not_seen() -> None:
    tensors = {name: x for name, x in operands(2, 9, 30).items() if name in "qkvm"}
    tensors["m"][0, :4] = tensors["m"][1, 3] = 0
    tensors["v"][0, :, :4] = tensors["v"][1, :, 3] = float("nan")
    assert check(lambda q, k, v, m: effc.attention(q, k, v, 0.3, False, m), **tensors).last[0].isfinite().all()
