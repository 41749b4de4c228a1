"""The KV cache: sizes, positions under left padding, taking tokens back, reuse."""

import pytest
import torch
from effc.compiler.errors import InputError
from effc.runtime.kv_cache import ROUND_TO, KVCache, reuse_or_allocate

LAYOUT = [("k_cache_0", (2, 4), torch.float32), ("v_cache_0", (2, 8), torch.bfloat16)]


def test_allocate_follows_the_layout_and_rounds_up():
    cache = KVCache.allocate(LAYOUT, batch=3, capacity=ROUND_TO + 1)
    assert cache.capacity == 2 * ROUND_TO
    assert cache.states["k_cache_0"].shape == (3, 2, 2 * ROUND_TO, 4)
    assert cache.states["v_cache_0"].shape == (3, 2, 2 * ROUND_TO, 8)
    assert cache.states["v_cache_0"].dtype == torch.bfloat16
    assert cache.past.tolist() == [0, 0, 0]
    assert not cache.padded


def test_positions_skip_left_padding():
    cache = KVCache.allocate(LAYOUT, 2, 8)
    cache.pad(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert cache.positions(4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert cache.padded
    assert cache.padding.tolist() == [2, 0]
    cache.advance(4)
    assert cache.next_position().tolist() == [[2], [4]] == cache.positions(1).tolist()


def test_advance_updates_past_in_place():
    cache = KVCache.allocate(LAYOUT, 2, 8)
    past = cache.past
    cache.advance(3)
    assert past.tolist() == [3, 3]
    assert cache.length == 3


def test_rollback_of_all_rows_and_of_each():
    cache = KVCache.allocate(LAYOUT, 2, 8)
    cache.advance(6)
    cache.rollback(1)
    assert cache.past.tolist() == [5, 5]
    cache.rollback(torch.tensor([3, 1]))
    assert cache.past.tolist() == [2, 4]
    assert cache.length == 4


@pytest.mark.parametrize("count", [4, -1, torch.tensor([0, 4])])
def test_rollback_of_more_than_there_is_is_refused(count):
    cache = KVCache.allocate(LAYOUT, 2, 8)
    cache.pad(torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]))
    cache.advance(5)
    with pytest.raises(InputError, match=r"the rows hold \[5, 3\]"):
        cache.rollback(count)
    assert cache.past.tolist() == [5, 5]


def test_too_many_tokens_are_refused_with_numbers():
    cache = KVCache.allocate(LAYOUT, 1, ROUND_TO)
    cache.advance(ROUND_TO - 1)
    cache.require(1)
    with pytest.raises(InputError, match=f"holds {ROUND_TO} tokens.*{ROUND_TO - 1} are taken and 2 more"):
        cache.require(2)


def test_buffers_are_reused_when_they_fit():
    first = KVCache.allocate(LAYOUT, 2, 100)
    first.pad(torch.tensor([[0, 1], [1, 1]]))
    first.advance(2)
    again = reuse_or_allocate(first, LAYOUT, 2, 200)
    assert again is first
    assert (again.past.tolist(), again.length, again.padded) == ([0, 0], 0, False)
    assert again.positions(2).tolist() == [[0, 1], [0, 1]]
    assert reuse_or_allocate(first, LAYOUT, 3, 100) is not first
    assert reuse_or_allocate(first, LAYOUT, 2, ROUND_TO + 1) is not first
    assert reuse_or_allocate(None, LAYOUT, 2, 100) is not first
