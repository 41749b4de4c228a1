"""The KV cache: the state that prefill fills and every decoded token extends, as explicit tensors.

Slots are columns of the prompt as given, padding included: with left padding all rows fill the same slots, and a
row's position is its slot less its padding. `past` is per row so that rows may drift apart (tokens taken back).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiler.errors import InputError

ROUND_TO = 256
"""Capacity is a multiple of this many slots, so that the buffers of one call fit most later calls."""

UNBOUNDED = 2**62
"""The capacity where every state is a ring."""


class Ring(NamedTuple):
    """Slots that are used in turn: for the first `kept` tokens, the last `window`, and `spare` more.

    A run may write `spare` + 1 tokens at a time, and `spare` tokens may be taken back.
    """

    kept: int
    window: int
    spare: int

    @property
    def slots(self) -> int:
        return self.kept + self.window + self.spare


class State(NamedTuple):
    """A buffer of a cache [B, G, T, D]: its name, (G, D), dtype, and the ring that its slots are, if they are one."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    ring: Ring | None = None


Layout = Sequence[State]


@dataclass
class KVCache:
    """Buffers of one batch and what they hold.

    states: name -> [B, G, T, D], updated in place by a run. past [B] int64: slots filled in each row, updated in
    place. padding [B] int64: how many of them, at the left, are padding; padded: whether any is. length: the largest
    `past`, kept on the host. rings: those among the states; reach [B] int64: the largest `past` that there was.
    """

    states: dict[str, Tensor]
    past: Tensor
    padding: Tensor
    capacity: int
    padded: bool = False
    length: int = 0
    rings: tuple[Ring, ...] = ()
    reach: Tensor | None = None

    @classmethod
    def allocate(cls, layout: Layout, batch: int, capacity: int, device: torch.device | str = "cpu") -> KVCache:
        """An empty cache of at least `capacity` slots (a multiple of `ROUND_TO`); rings have as many as they need."""
        capacity = -(-capacity // ROUND_TO) * ROUND_TO
        layout = [State(*entry) for entry in layout]
        # Zeros, since a kernel may multiply what lies behind `past` by a weight of zero.
        states = {
            state.name: torch.zeros(
                (batch, state.shape[0], capacity if state.ring is None else state.ring.slots, state.shape[1]),
                dtype=state.dtype,
                device=device,
            )
            for state in layout
        }
        rings = tuple(dict.fromkeys(state.ring for state in layout if state.ring is not None))
        if layout and all(state.ring is not None for state in layout):
            capacity = UNBOUNDED
        past, padding, reach = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3))
        return cls(states, past, padding, capacity, rings=rings, reach=reach if rings else None)

    @property
    def batch(self) -> int:
        return len(self.past)

    def fits(self, batch: int, capacity: int, device: torch.device | str) -> bool:
        """Whether these buffers can serve another call of that size."""
        here = torch.empty(0, device=device).device  # "cuda" names the current one of several
        return self.batch == batch and self.capacity >= capacity and self.past.device == here

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.past.zero_()
        self.padding.zero_()
        self.padded = False
        self.length = 0
        if self.reach is not None:
            self.reach.zero_()

    def require(self, new: int) -> None:
        """Raise InputError unless `new` more tokens fit every row."""
        if self.length + new > self.capacity:
            raise InputError(
                f"the KV cache holds {self.capacity} tokens per row: {self.length} are taken and {new} more do not fit;"
                f" allocate it with a capacity of at least {self.length + new}"
            )

    @property
    def at_a_time(self) -> int:
        """How many tokens a run may write."""
        return min((ring.spare + 1 for ring in self.rings), default=UNBOUNDED)

    def require_at_once(self, new: int) -> None:
        """Raise InputError unless a run may write `new` tokens, and they fit."""
        self.require(new)
        if new > self.at_a_time:
            raise InputError(
                f"a ring with {self.at_a_time - 1} spare slots takes at most {self.at_a_time} tokens at a time, found"
                f" {new}: give them in parts"
            )

    def pad(self, attention_mask: Tensor) -> None:
        """Take the left padding of a prompt from attention_mask [B, S] (zeros, then ones); the cache must be empty."""
        if any(ring.kept for ring in self.rings):
            raise InputError(
                "a cache that keeps the first tokens cannot keep padding: give prompts of any lengths to generate_each"
            )
        self.padding.copy_((attention_mask == 0).sum(-1))
        self.padded = True

    def positions(self, new: int) -> Tensor:
        """Position ids [B, new] of the next `new` slots; padding has position 0."""
        steps = torch.arange(new, device=self.past.device)
        return (self.past[:, None] + steps - self.padding[:, None]).clamp_(min=0)

    def next_position(self) -> Tensor:
        """`positions(1)` of rows that hold a token already: [B, 1]."""
        return (self.past - self.padding)[:, None]

    def advance(self, new: int) -> None:
        """Count `new` tokens that a run has written to every row."""
        self.past += new
        self.length += new
        if self.reach is not None:
            torch.maximum(self.reach, self.past, out=self.reach)

    def rollback(self, count: int | Tensor) -> None:
        """Take back the last `count` tokens, of all rows or (count [B] int64) of each; their slots are written anew."""
        remaining = self.past - count
        if bool((remaining < self.padding).any()) or bool((remaining > self.past).any()):
            raise InputError(
                f"cannot take back {count if isinstance(count, int) else count.tolist()} tokens:"
                f" the rows hold {(self.past - self.padding).tolist()}"
            )
        if self.reach is not None and int((self.reach - remaining).max()) >= self.at_a_time:
            raise InputError(
                f"cannot take back {count if isinstance(count, int) else count.tolist()} tokens: the ring has"
                f" {self.at_a_time - 1} spare slots, and tokens before them are written over"
            )
        self.past.copy_(remaining)
        self.length = int(remaining.max())

    def reorder(self, rows: Tensor) -> None:
        """Let row i be what row rows[i] was; rows [B] int64."""
        for tensor in (*self.states.values(), self.past, self.padding, self.reach):
            if tensor is not None:
                tensor.copy_(tensor[rows])


def keeps_first(layout: Layout) -> bool:
    """Whether a cache of these buffers keeps the first tokens, so that there is no place for padding before them."""
    return any(state.ring is not None and state.ring.kept for state in (State(*entry) for entry in layout))


def reuse_or_allocate(
    cache: KVCache | None, layout: Layout, batch: int, capacity: int, device: torch.device | str = "cpu"
) -> KVCache:
    """An empty cache for that many rows and slots: `cache` itself if its buffers do, else a new one."""
    if cache is not None and cache.fits(batch, capacity, device):
        cache.reset()
        return cache
    return KVCache.allocate(layout, batch, capacity, device)
