"""Ring caches: slots that are used in turn, written and read by kernels, and what decoding makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .graphs import Compiled, random

effc = torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 5


def visible_kept(kept: int) -> str | None:
    return f"(k < {kept}) | (q - k < {WINDOW})" if kept else None


def step(kept: int):
    """Write new keys and values, and attend: over a ring behind `kept` slots."""

    def function(q: Tensor, new: Tensor, cos: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
        k = effc.kv_write(k, effc.rope(new, cos, cos), past, ring=kept)
        v = effc.kv_write(v, new * 2, past, ring=kept)
        seen = {"visible": visible_kept(kept)} if kept else {"window": WINDOW}
        return effc.cached_attention(q, k, v, past, 0.25, ring=kept, **seen)

    return function


def operands(
    s: int, past: list[int], capacity: int, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    batch = len(past)
    return {
        "q": random(batch, 4, s, 16, dtype=dtype, seed=seed),
        "new": random(batch, 2, s, 16, dtype=dtype, seed=seed + 1),
        "cos": random(1, s, 16, dtype=dtype, seed=seed + 2),
        "k": random(batch, 2, capacity, 16, dtype=dtype, seed=seed + 3),
        "v": random(batch, 2, capacity, 16, dtype=dtype, seed=seed + 4),
        "past": torch.tensor(past),
    }


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("s", [1, 4])
def test_kernels_equal_the_reference(s: int, dtype: torch.dtype, kept: int) -> None:
    dynamic = {"q": (0, 2) if s > 1 else (0,), "new": (0, 2) if s > 1 else (0,), "cos": (1,) if s > 1 else ()}
    dynamic |= {"k": (0, 2), "v": (0, 2), "past": (0,)}
    compiled = Compiled(step(kept), operands(s, [3, 4, 6], 13, 1, dtype), dynamic, states=("k", "v"))
    assert not compiled.fallbacks
    for past, capacity in (([0, 1, 11], 13), ([40, 13, 12], 13), ([200, 7], 80), ([1], kept + WINDOW + s)):
        compiled.check(**operands(s, past, capacity, 7, dtype))


@pytest.mark.parametrize("kept", [0, 3])
def test_a_ring_gives_what_a_cache_of_everything_gives(kept: int) -> None:
    """Steps of several lengths, with tokens taken back, over a ring of window + 3 slots."""
    batch, spare, length = 2, 3, 40
    keys = random(batch, 2, length, 8, dtype=torch.float64, seed=1)
    queries = random(batch, 4, length, 8, dtype=torch.float64, seed=2)
    seen = {"window": None, "visible": visible_kept(kept)} if kept else {"window": WINDOW}
    expected = effc.attention(queries, keys, keys, 0.3, True, **seen)
    ring = torch.full((batch, 2, kept + WINDOW + spare, 8), 7.0, dtype=torch.float64)
    past = 0
    for count in (1, 4, 2, 4, -3, 1, 4, 4, -2, 1, 1, 4, -1, 3, 4):
        if count < 0:
            past += count
            continue
        where, at = slice(past, past + count), torch.tensor([past] * batch)
        effc.kv_write(ring, keys[:, :, where], at, ring=kept)
        found = effc.cached_attention(queries[:, :, where], ring, ring, at, 0.3, ring=kept, **seen)
        torch.testing.assert_close(found, expected[:, :, where])
        past += count
    assert past > 2 * ring.shape[2] - kept
