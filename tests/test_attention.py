"""Attention beside eager: causal, grouped, masked; cached decode and extend over memory that holds garbage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .graphs import Compiled, check, random

effc = torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")


def qkv(
    batch: int,
    heads: int,
    groups: int,
    s: int,
    t: int,
    size: int,
    value_size: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    return {
        "q": random(batch, heads, s, size, dtype=dtype, seed=1),
        "k": random(batch, groups, t, size, dtype=dtype, seed=2),
        "v": random(batch, groups, t, value_size or size, dtype=dtype, seed=3),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "value_size"), [(2, 2, 64, 64), (3, 1, 16, 80), (8, 2, 80, 16), (2, 1, 128, 100)]
)
def test_grouped_heads_of_any_size_at_any_length(
    heads: int, groups: int, size: int, value_size: int, dtype: torch.dtype
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return effc.attention(q, k, v, 0.2, True), effc.attention(q, k, v, size**-0.5, False)

    def tensors(batch: int, s: int, t: int) -> dict[str, Tensor]:
        return qkv(batch, heads, groups, s, t, size, value_size, dtype)

    compiled = Compiled(function, tensors(3, 5, 7), {"q": (0, 2), "k": (0, 2), "v": (0, 2)})
    for batch, s, t in (
        (1, 100, 100),
        (2, 17, 17),
        (1, 65, 3),
        (3, 1, 130),
        (1, 1, 1),
        (2, 7, 64),
        (0, 7, 7),
        (2, 0, 5),
    ):
        compiled.check(**tensors(batch, s, t))


def test_masks_of_every_shape() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        def attend(mask: Tensor, causal: bool = False, key_mask: Tensor | None = None) -> Tensor:
            return effc.attention(q, k, v, 0.25, causal, key_mask, mask)

        return (
            attend(m),
            attend(m[:, :1]),
            attend(m[:1, :1, :1], True),
            attend(m[0, 0]),
            attend(f),
            attend(f[:, :1, :1]),
            attend(f[0], True),
            attend(f[0, 0], False, h),
            attend(f.transpose(2, 3).contiguous().transpose(2, 3)),
            effc.attention(q, k, v, 0.25, True, h),
            effc.attention(q, k, v, 0.25, False, h != 0),
        )

    for dtype in (torch.float32, torch.bfloat16):
        for s, t in ((70, 70), (9, 33)):
            mask = random(2, 4, s, t, seed=4) > 0
            bias = random(2, 4, s, t, dtype=dtype, seed=5).masked_fill(~mask, float("-inf"))
            bias[..., 0] = 0.0
            hidden = torch.ones(2, t, dtype=torch.int64)
            hidden[0, :5] = 0
            check(function, **qkv(2, 4, 2, s, t, 16, dtype=dtype), m=mask, f=bias, h=hidden)


def test_rows_that_may_attend_to_nothing() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor, f: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (
            effc.attention(q, k, v, 0.25, False, None, m),
            effc.attention(q, k, v, 0.25, True, h),
            effc.attention(q, k, v, 0.25, False, None, f),
        )

    mask = random(2, 1, 20, 20, seed=4) > 0
    mask[:, :, 3] = False
    lowest = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    hidden = torch.ones(2, 20, dtype=torch.int64)
    hidden[0] = 0
    hidden[1, :7] = 0
    zeros, padded, even = check(function, **qkv(2, 2, 1, 20, 20, 16), m=mask, f=lowest, h=hidden).last
    assert not zeros[:, :, 3].any()
    assert not padded[0].any()
    assert not padded[1, :, :7].any()
    assert padded[1, :, 7:].any()
    assert even[:, :, 3].any(), "the most negative number hides no more than it hides in eager"


def test_operands_of_any_stride() -> None:
    def function(x: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        q = x.view(2, 10, 3, 2, 16)[:, :, 0].transpose(1, 2)
        v = x.view(2, 10, 3, 2, 16)[:, :, 1].transpose(1, 2)
        out = effc.attention(q, k.transpose(2, 3), v, 0.25, True)
        return out, out.transpose(1, 2).reshape(2, 10, 32) + 1, effc.attention(out * 2, q * 3, v[..., ::2], 0.25, True)

    check(function, x=random(2, 10, 96), k=random(2, 2, 16, 10, seed=1))


def test_nan_and_infinity_stay_in_their_row() -> None:
    tensors = qkv(2, 2, 1, 20, 20, 16)
    tensors["q"][0, 1, 3, 5] = float("nan")
    tensors["q"][1, 0, 4] = 1e30
    actual = check(lambda q, k, v: effc.attention(q, k, v, 0.25, False), **tensors).last[0]
    assert actual[0, 1, 3].isnan().all()
    assert actual[0].isnan().sum() == 16


# --- over a cache ----------------------------------------------------------------------------------------------------


def cached(dtype: torch.dtype, s: int, past: list[int], capacity: int, heads: int, groups: int, size: int) -> dict:
    """Operands of cached attention; every slot behind the last visible one holds NaN."""
    tensors = qkv(len(past), heads, groups, s, capacity, size, dtype=dtype)
    for row, length in enumerate(past):
        tensors["k"][row, :, length + s :] = float("nan")
        tensors["v"][row, :, length + s :] = float("nan")
    shown = torch.ones(len(past), capacity, dtype=torch.int64)
    for row, length in enumerate(past):
        shown[row, : length // 2] = 0
    return {**tensors, "past": torch.tensor(past, dtype=torch.int64), "shown": shown}


SHOWN = "t0[b, k] != 0"


def cached_both(q: Tensor, k: Tensor, v: Tensor, past: Tensor, shown: Tensor) -> tuple[Tensor, ...]:
    return (
        effc.cached_attention(q, k, v, past, 0.25),
        effc.cached_attention(q, k, v, past, 0.25, visible=SHOWN, tables=[shown]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "size"), [(2, 2, 64), (3, 1, 80), (8, 2, 16), (12, 1, 128)])
def test_decode_sees_the_cache_and_nothing_behind_it(heads: int, groups: int, size: int, dtype: torch.dtype) -> None:
    sizes = {"heads": heads, "groups": groups, "size": size}
    dynamic = {"q": (0,), "k": (0, 2), "v": (0, 2), "past": (0,), "shown": (0, 1)}
    compiled = Compiled(cached_both, cached(dtype, 1, [3, 4, 5], 11, **sizes), dynamic)
    for past, capacity in (([511, 255, 256], 512), ([0, 63, 64], 200), ([5, 0, 130], 131), ([0], 1), ([], 7)):
        compiled.check(**cached(dtype, 1, past, capacity, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extend_sees_the_cache_and_nothing_behind_it(dtype: torch.dtype) -> None:
    sizes = {"heads": 6, "groups": 2, "size": 48}
    dynamic = {"q": (0, 2), "k": (0, 2), "v": (0, 2), "past": (0,), "shown": (0, 1)}
    compiled = Compiled(cached_both, cached(dtype, 5, [3, 4, 6], 13, **sizes), dynamic)
    for s, past, capacity in ((7, [0, 200, 64], 260), (65, [1, 0], 300), (1, [40, 3], 64), (3, [0], 3)):
        compiled.check(**cached(dtype, s, past, capacity, **sizes))


def test_hidden_slots_are_not_read_as_numbers() -> None:
    for s in (1, 5):
        tensors = cached(torch.float32, s, [8, 20], 40, 4, 2, 16)
        for row, length in enumerate((8, 20)):
            tensors["k"][row, :, : length // 2] = float("nan")
        check(lambda *operands: cached_both(*operands)[1], **tensors)


def write_and_attend(q: Tensor, new: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    """The order in which a layer uses its cache; `new` is written as it comes, computed, and as a view."""
    k = effc.kv_write(k, new, past)
    v = effc.kv_write(v, (new * 2).transpose(1, 2).transpose(1, 2), past)
    return effc.cached_attention(q, k, v, past, 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", [1, 6])
def test_new_keys_and_values_are_written_before_they_are_read(s: int, dtype: torch.dtype) -> None:
    tensors = cached(dtype, s, [3, 0, 20], 27, 4, 2, 16)
    tensors = {
        "q": tensors["q"],
        "new": random(3, 2, s, 16, dtype=dtype, seed=9),
        "k": tensors["k"].nan_to_num(0.0),
        "v": tensors["v"].nan_to_num(0.0),
        "past": tensors["past"],
    }
    check(write_and_attend, states=("k", "v"), **tensors)
