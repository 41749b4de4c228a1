"""Counts that go on from the cache: positions made in the model, tables cut to the length, running counts of a mask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from effc.compiler.errors import ModelError
from effc.passes.materialize_kv import materialize_kv
from torch import Tensor, nn

from .families import without_padding
from .test_materialize_kv import Model, agree, attend, compiled, graphs_of

aten = torch.ops.aten


def padded(m: Model, x: Tensor, mask: Tensor) -> Tensor:
    """Attention that sees what is not padding."""
    place = torch.arange(x.shape[1])
    allowed = (place[None, :] <= place[:, None]) & (mask[:, None, None, :] != 0)
    return attend(m, x, is_causal=False, attn_mask=allowed)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rotated_attention(m: Model, x: Tensor, places: Tensor) -> Tensor:
    """Rope from positions [S] that are counted in the model, as llama2.c and its children have it."""
    angle = torch.outer(places.float(), 10000.0 ** -(torch.arange(0, 8, 2) / 8))
    cos, sin = angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]
    q, k, v = (part.unflatten(-1, (2, 8)) for part in m.mix(x).chunk(3, dim=-1))
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


COUNTS = {
    "arange": lambda m, x, mask, places: attend(m, x + m.places(torch.arange(x.shape[1]))),
    "arange with a batch of one": lambda m, x, mask, places: attend(m, x + m.places(torch.arange(x.shape[1])[None])),
    "arange from 2": lambda m, x, mask, places: attend(m, x + m.places(torch.arange(2, x.shape[1] + 2))),
    "arange, expanded": lambda m, x, mask, places: attend(
        m, x + m.places(torch.arange(x.shape[1])[None].expand(x.shape[0], -1))
    ),
    "arange after the last attention": lambda m, x, mask, places: attend(m, x) + m.places(torch.arange(x.shape[1])),
    "arange as a number": lambda m, x, mask, places: attend(m, x * (1 + torch.arange(x.shape[1])[:, None] / 8).log1p()),
    "a slice of a table": lambda m, x, mask, places: attend(m, x + m.places.weight[: x.shape[1]]),
    "a slice of a table, from 2": lambda m, x, mask, places: attend(m, x + m.places.weight[2 : x.shape[1] + 2]),
    "a slice of a table along dimension 1": lambda m, x, mask, places: attend(
        m, x + m.places.weight.T[:, : x.shape[1]].T
    ),
    "a slice of a table of rank 3": lambda m, x, mask, places: attend(
        m, x + m.places.weight.view(1, 32, 4, 4)[:, : x.shape[1]].flatten(2)
    ),
    "a slice of a table, looked up": lambda m, x, mask, places: attend(m, x + m.places.weight[: x.shape[1]][places]),
    "a running count of ones": lambda m, x, mask, places: attend(
        m, x + m.places(torch.ones_like(places).cumsum(1) - 1)
    ),
    "rope": lambda m, x, mask, places: rotated_attention(m, x, torch.arange(x.shape[1])),
}
"""Models that count tokens and take neither positions nor padding."""


EACH_TIME = {
    "arange",
    "arange, expanded",
    "a slice of a table of rank 3",
    "a slice of a table, looked up",
    "rope",
    "a running count of the mask",
    "the padding of each row",
}


def some_each_time(names: Iterable[str]) -> list[Any]:
    """The names, those that are not in EACH_TIME marked slow."""
    return [pytest.param(name, marks=() if name in EACH_TIME else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_each_time(COUNTS))
def test_counts_go_on_from_the_cache(name):
    model, graph = compiled(COUNTS[name])
    graph = without_padding(graph)
    graphs = graphs_of(graph)
    assert graphs["decode"].inputs == ["input_ids", "position_ids", "past"]
    agree(model, graph, graphs, padding=False)


def chunks(m: Model, x: Tensor, mask: Tensor) -> Tensor:
    """Attention within chunks of 3, counted from the first token that is not padding (Llama 4)."""
    place, start = torch.arange(x.shape[1]), (mask.bool().cumsum(1) == 0).sum(1)[:, None, None, None]
    alike = (place[None, :] - start) // 3 == (place[:, None] - start) // 3
    allowed = alike & (place[None, :] <= place[:, None]) & (mask[:, None, None, :] != 0)
    return attend(m, x, is_causal=False, attn_mask=allowed)


PADDED = {
    "the mask": lambda m, x, mask, places: padded(m, x * mask[:, :, None], mask),
    "a running count of the mask": lambda m, x, mask, places: padded(
        m, x + m.places((mask.cumsum(1) * mask - 1).long() + 2), mask
    ),
    "a running count of a cast": lambda m, x, mask, places: padded(
        m, x + m.places((mask != 0).int().cumsum(1).clamp(min=1) - 1), mask
    ),
    "the padding of each row": lambda m, x, mask, places: chunks(m, x, mask),
}


@pytest.mark.parametrize("name", some_each_time(PADDED))
def test_counts_of_what_is_visible_know_the_padding(name):
    model, graph = compiled(PADDED[name])
    graphs = graphs_of(graph)
    assert graphs["decode"].inputs == ["input_ids", "position_ids", "past", "padding"]
    agree(model, graph, graphs, padding=True)
    bare = without_padding(graph)
    agree(model, bare, graphs_of(bare), padding=False)


def packed(m: Model, x: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """Documents packed in a row: positions start anew at each, and no token sees another document."""
    document = (places.diff(dim=1, prepend=places[:, :1] - 1) != 1).cumsum(1)
    place = torch.arange(x.shape[1])
    allowed = (place[None, :] <= place[:, None]) & (document[:, None, :, None] == document[:, None, None, :])
    return attend(m, x, is_causal=False, attn_mask=allowed)


def up_to_a_count(m: Model, x: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """Attention to as many keys as positions are even: a number for each row that all its tokens decide."""
    place, count = torch.arange(x.shape[1]), (places % 2 == 0).sum(1)[:, None, None, None]
    return attend(m, x, is_causal=False, attn_mask=(place[None, :] <= place[:, None]) & (place <= count))


REFUSED = {
    "a number for each row": (up_to_a_count, r"attention .* depends on sum\w* .* a table of the tokens"),
    "documents packed in a row": (packed, r"attention .* depends on cumsum\w* .* packed in a row"),
    "more than the tokens": (
        lambda m, x, mask, places: attend(m, x + m.places(torch.arange(x.shape[1] + 1)[1:])),
        "more than|counts up to something else|tokens",
    ),
    "backwards": (
        lambda m, x, mask, places: attend(m, x + m.places(x.shape[1] - 1 - torch.arange(x.shape[1]))),
        "it computes with the length",
    ),
    "a running sum of positions": (
        lambda m, x, mask, places: attend(m, x + places.cumsum(1)[:, :, None]),
        "cumsum .* it adds up along dimension 1, over the tokens",
    ),
    "the end of a table": (
        lambda m, x, mask, places: attend(m, x + m.places.weight[-x.shape[1] :]),
        r"slice\w* .* it slices along the tokens",
    ),
    "a sorted count": (
        lambda m, x, mask, places: attend(
            m, x + torch.arange(x.shape[1])[:, None].expand(-1, 4).sort(-1)[0].sum(-1)[:, None]
        ),
        "sort",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_counts_that_cannot_go_on_are_refused(name):
    function, reason = REFUSED[name]
    graph = without_padding(compiled(function)[1])
    with pytest.raises(ModelError, match=reason):
        materialize_kv(graph, "decode")


def test_a_table_that_is_sliced_bounds_the_length():
    _, graph = compiled(COUNTS["a slice of a table, from 2"])
    decode = materialize_kv(without_padding(graph), "decode")
    assert decode.max_length == 30
    assert any("the table places_weight ends there" in note for note in decode.notes)


def test_counting_is_two_calls_on_past():
    _, graph = compiled(COUNTS["arange"])
    decode = materialize_kv(without_padding(graph), "decode")
    past = decode.placeholder("past")
    (first,) = (user for user in past.users if user.target == aten.unsqueeze.default)
    (slots,) = first.users
    assert slots.target == aten.add.Tensor
    assert [user.target for user in slots.users] == [aten.embedding.default]
