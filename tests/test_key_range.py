"""Attention kernels read the blocks of keys that their queries can see, and no others.

NaN in a key and its value that a kernel reads would reach every row of its tile, through a weight of zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from effc.codegen.target import CPU
from torch import Tensor

from .graphs import Compiled, random

effc = torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, HEADS, GROUPS, SIZE = 300, 4, 2, 16
ROWS, KEYS = CPU.attention


class Reach(NamedTuple):
    """Arguments of attention, keys that some tiles of queries cannot see, and the first rows of tiles that do."""

    options: dict[str, Any]
    hidden: slice
    seen_by: tuple[int, ...] = ()
    causal: bool = True


REACHES = {
    "causal": Reach({}, slice(128, 200), (128, 192, 256)),
    "window": Reach({"window": 40}, slice(0, 20), (0,)),
    "chunks": Reach({"visible": "k // 100 == q // 100"}, slice(100, 200), (64, 128, 192)),
    "chunks from a start": Reach({"visible": "(k - t0[b]) // 100 == (q - t0[b]) // 100"}, slice(70, 170), (64, 128)),
    "chunks, both ways": Reach({"visible": "k // 100 == q // 100"}, slice(100, 200), (64, 128, 192), causal=False),
    "prefix": Reach({"visible": "(k <= q) | (k < 100)"}, slice(200, 300), (192, 256), causal=False),
    "first tokens and a window": Reach({"visible": "(k < 4) | (q - k < 40)"}, slice(128, 140), (128,)),
    "padding": Reach({"visible": "k >= t0[b]"}, slice(0, 70)),
    "ends": Reach({"visible": "k <= t0[b]"}, slice(71, 300), causal=False),
}


def operands(s: int, t: int, past: int = 0) -> dict[str, Tensor]:
    return {
        "q": random(1, HEADS, s, SIZE, seed=1),
        "k": random(1, GROUPS, t, SIZE, seed=2),
        "v": random(1, GROUPS, t, SIZE, seed=3),
        "start": torch.tensor([70]),
        "past": torch.tensor([past]),
    }


def poisoned(tensors: dict[str, Tensor], keys: slice) -> dict[str, Tensor]:
    copies = {name: tensors[name].clone() for name in "kv"}
    for copied in copies.values():
        copied[:, :, keys] = float("nan")
    return {**tensors, **copies}


def attending(reach: Reach, cached: bool = False):
    def function(q: Tensor, k: Tensor, v: Tensor, start: Tensor, past: Tensor) -> Tensor:
        named = {**reach.options, "tables": [start] if "t0" in reach.options.get("visible", "") else None}
        if cached:
            return effc.cached_attention(q, k, v, past, 0.3, **named)
        return effc.attention(q, k, v, 0.3, reach.causal, **named)

    return function


@pytest.mark.parametrize("name", REACHES)
def test_tiles_of_queries_read_what_they_can_see(name: str) -> None:
    reach, tensors = REACHES[name], operands(LENGTH, LENGTH)
    compiled = Compiled(attending(reach), tensors)
    (expected,) = compiled.check(**tensors, luck=4)
    (actual,) = compiled(**poisoned(tensors, reach.hidden))
    for first in range(0, LENGTH, ROWS):
        tile = slice(first, first + ROWS)
        if first in reach.seen_by:
            assert actual[:, :, tile].isnan().any()
        else:
            assert torch.equal(actual[:, :, tile], expected[:, :, tile]), f"rows from {first}"


CACHED = {
    "window": [(0, 201)],
    "chunks": [(0, 200)],
    "chunks from a start": [(0, 170)],
    "first tokens and a window": [(KEYS, 201)],
    "padding": [(0, 70)],
}
"""Keys that no query from position 240 on sees."""


@pytest.mark.parametrize("s", [1, 7])
@pytest.mark.parametrize("name", CACHED)
def test_decoding_reads_what_it_can_see(name: str, s: int) -> None:
    tensors = operands(s, LENGTH, past=240)
    compiled = Compiled(attending(REACHES[name], cached=True), tensors)
    (expected,) = compiled.check(**tensors, luck=4)
    hidden = poisoned(tensors, slice(240 + s, LENGTH))
    for first, last in CACHED[name]:
        hidden = poisoned(hidden, slice(first, last))
    assert torch.equal(compiled(**hidden)[0], expected)


@pytest.mark.parametrize("name", CACHED)
def test_decoding_at_every_position(name: str) -> None:
    compiled = Compiled(attending(REACHES[name], cached=True), operands(1, LENGTH))
    for past in (0, 1, 3, 4, 39, 63, 64, 99, 100, 103, 104, 105, 169, 170, 255, 299):
        compiled.check(**operands(1, LENGTH, past), luck=4)
