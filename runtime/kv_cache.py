"""The KV cache: the state that prefill fills and every decoded token extends, as explicit tensors.

Slots are columns of the prompt as given, padding included: with left padding all rows fill the same slots, and a
row's position is its slot less its padding. `past` is per row so that rows may drift apart (tokens taken back).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiler.errors import InputError

ROUND_TO = 256
"""Capacity is a multiple of this many slots, so that the buffers of one call fit most later calls."""

Layout = Sequence[tuple[str, tuple[int, int], torch.dtype]]
"""One entry per state of a program: its name, (G, D) and dtype."""


@dataclass
class KVCache:
    """Buffers of one batch and what they hold.

    states: name -> [B, G, T, D], updated in place by a run. past [B] int64: slots filled in each row, updated in
    place. padding [B] int64: how many of them, at the left, are padding; padded: whether any is. length: the largest
    `past`, kept on the host.
    """

    states: dict[str, Tensor]
    past: Tensor
    padding: Tensor
    capacity: int
    padded: bool = False
    length: int = 0

    @classmethod
    def allocate(cls, layout: Layout, batch: int, capacity: int, device: torch.device | str = "cpu") -> KVCache:
        """An empty cache of at least `capacity` slots (rounded up to a multiple of `ROUND_TO`)."""
        capacity = -(-capacity // ROUND_TO) * ROUND_TO
        # Zeros, since a kernel may multiply what lies behind `past` by a weight of zero.
        states = {
            name: torch.zeros(batch, heads, capacity, size, dtype=dtype, device=device)
            for name, (heads, size), dtype in layout
        }
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(states, past=zeros, padding=zeros.clone(), capacity=capacity)

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

    def require(self, new: int) -> None:
        """Raise InputError unless `new` more tokens fit every row."""
        if self.length + new > self.capacity:
            raise InputError(
                f"the KV cache holds {self.capacity} tokens per row: {self.length} are taken and {new} more do not fit;"
                f" allocate it with a capacity of at least {self.length + new}"
            )

    def pad(self, attention_mask: Tensor) -> None:
        """Take the left padding of a prompt from attention_mask [B, S] (zeros, then ones); the cache must be empty."""
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

    def rollback(self, count: int | Tensor) -> None:
        """Take back the last `count` tokens, of all rows or (count [B] int64) of each; their slots are written anew."""
        remaining = self.past - count
        if bool((remaining < self.padding).any()) or bool((remaining > self.past).any()):
            raise InputError(
                f"cannot take back {count if isinstance(count, int) else count.tolist()} tokens:"
                f" the rows hold {(self.past - self.padding).tolist()}"
            )
        self.past.copy_(remaining)
        self.length = int(remaining.max())


def reuse_or_allocate(
    cache: KVCache | None, layout: Layout, batch: int, capacity: int, device: torch.device | str = "cpu"
) -> KVCache:
    """An empty cache for that many rows and slots: `cache` itself if its buffers do, else a new one."""
    if cache is not None and cache.fits(batch, capacity, device):
        cache.reset()
        return cache
    return KVCache.allocate(layout, batch, capacity, device)
