"""The KV cache: sizes, positions under left padding, taking tokens back, reuse."""

import pytest
import torch
from effc.compiler.errors import InputError
from effc.runtime.kv_cache import ROUND_TO, KVCache, Ring, State, reuse_or_allocate

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


RING = Ring(kept=2, window=4, spare=3)
RINGS = [State("k_cache_0", (2, 4), torch.float32, RING), State("v_cache_0", (2, 8), torch.float32, RING)]


def test_a_ring_has_its_own_slots_and_no_end():
    cache = KVCache.allocate(RINGS, 2, 100)
    assert {tensor.shape[2] for tensor in cache.states.values()} == {9}
    cache.require(10**9)
    mixed = KVCache.allocate([*RINGS, State("k_cache_1", (2, 4), torch.float32)], 2, 100)
    assert mixed.states["k_cache_1"].shape[2] == mixed.capacity == ROUND_TO


def test_a_ring_takes_and_gives_back_as_many_tokens_as_it_has_spare_slots():
    cache = KVCache.allocate(RINGS, 2, 100)
    cache.require_at_once(4)
    with pytest.raises(InputError, match="takes at most 4 tokens at a time, found 5"):
        cache.require_at_once(5)
    for _ in range(5):
        cache.advance(4)
    cache.rollback(2)
    cache.advance(1)
    with pytest.raises(InputError, match="cannot take back 3 tokens: the ring has 3 spare slots"):
        cache.rollback(3)  # of 20 tokens, 19 are left, and 3 fewer would be 4 behind the furthest
    cache.rollback(2)
    assert cache.past.tolist() == [17, 17]


def test_padding_does_not_go_with_first_tokens_that_are_kept():
    with pytest.raises(InputError, match="cannot keep padding"):
        KVCache.allocate(RINGS, 2, 100).pad(torch.tensor([[0, 1], [1, 1]]))


def test_rows_exchange_all_that_they_hold():
    cache = KVCache.allocate(LAYOUT, 3, 8)
    cache.pad(torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]]))
    cache.advance(3)
    cache.rollback(torch.tensor([0, 1, 2]))
    for tensor in cache.states.values():
        tensor += torch.arange(3)[:, None, None, None]
    cache.reorder(torch.tensor([2, 0, 1]))
    assert (cache.past.tolist(), cache.padding.tolist()) == ([1, 3, 2], [0, 2, 1])
    assert cache.states["k_cache_0"][:, 0, 0, 0].tolist() == [2, 0, 1]
