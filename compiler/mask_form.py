"""What a mask is read as: arguments of `effc.attention`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

HIDDEN = -1e4
"""A key is hidden where its score is replaced by this or less, or this is added: exp(-1e4) is 0 in fp32 (GPT-1's)."""


@dataclass(frozen=True)
class MaskForm:
    """A mask in the arguments of `effc.attention`; key k is visible to query q where all its conditions hold.

    causal: k <= q. window: k > q - window. key_mask: key_mask[b, k] != 0, an input of at least [B, T], of which what is
    beyond is not read; one of integers holds 0 and 1. visible: a condition over b, h, q, k and the tables t0, t1, ...
    (`index_expressions`). bias: what is added to the scores of visible keys, up to a number for each (b, h, q), which
    the softmax does not see.
    """

    causal: bool = False
    window: int | None = None
    key_mask: fx.Node | None = None
    visible: str | None = None
    bias: str | None = None
    tables: tuple[fx.Node, ...] = ()
