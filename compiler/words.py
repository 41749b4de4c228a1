"""Codes in words of 32 bits, as checkpoints pack them: a stream of bits, the first code in the lowest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .bit_planes import unpack


def codes_in_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] --> uint8 codes [..., W * 32 / bits], the last ones unused where codes do not fill the words."""
    stream = words.contiguous().view(torch.uint8)
    if bits in (1, 2, 4, 8):
        return unpack(stream, bits)
    digits = unpack(stream, 1)
    digits = digits[..., : digits.shape[-1] // bits * bits].unflatten(-1, (-1, bits))
    codes = digits[..., 0].clone()
    for place in range(1, bits):
        codes |= digits[..., place] << place
    return codes


def words_of(count: int, bits: int) -> int:
    """How many words hold `count` codes."""
    return -(-count * bits // 32)
