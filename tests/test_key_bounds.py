"""The keys that a condition leaves in reach of a block of queries."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.index_expressions import evaluate
from effc.compiler.key_bounds import KeyBounds, key_bounds
from torch import Tensor

LENGTH = 24
TABLES: dict[str, list[Tensor]] = {
    "documents": [(torch.arange(LENGTH) // 5).expand(2, LENGTH)],
    "starts": [torch.tensor([3, 0])],
    "fractions": [torch.tensor([2.5, 0.0])],
}

BOUNDS = {
    "k <= q": KeyBounds(None, "q"),
    "k < q": KeyBounds(None, "q - 1"),
    "k > q - 4": KeyBounds("q - 3", None),
    "(k <= q) & (k >= q - 3)": KeyBounds("q - 3", "q"),
    "(k <= q) | (k < 16)": KeyBounds(None, "maximum(15, q)"),
    "(k < 4) | (k < 6)": KeyBounds(None, "5"),
    "(k < 4) | (q - k < 6)": KeyBounds("q - 5", None, 4),
    "((k < 4) | (q - k < 6)) & (k <= q)": KeyBounds("q - 5", "q", 4),
    "((k < 2) | (k < 4) | (q - k < 6)) & (k >= 1)": KeyBounds("maximum(1, q - 5)", None, 4),
    "(k // 4 == q // 4) & (k <= q)": KeyBounds("q // 4 * 4", "minimum(q, q // 4 * 4 + 3)"),
    "(k // 4 == q // 4) | (k < 2)": KeyBounds("q // 4 * 4", "q // 4 * 4 + 3", 2),
    "(k + 1) // 4 == (q + 1) // 4": KeyBounds("(q + 1) // 4 * 4 - 1", "(q + 1) // 4 * 4 + 2"),
    "k // 4 == (q + 1) // 4": KeyBounds(),
    "k + q < 9": KeyBounds(),
    "k >= 3": KeyBounds("3", None),
    "k >= 2 * q": KeyBounds(),
}
OF_TABLES = {
    ("(k <= q) & (t0[b, k] == t0[b, q])", "documents"): KeyBounds(None, "q"),
    ("(k <= q) | (t0[b, k] == t0[b, q])", "documents"): KeyBounds(),
    ("k <= t0[b, q]", "documents"): KeyBounds(),
    ("k >= t0[b]", "starts"): KeyBounds("t0[b]", None),
    ("k > t0[b]", "starts"): KeyBounds("t0[b] + 1", None),
    ("k > t0[b]", "fractions"): KeyBounds(),
    ("(k - t0[b]) // 4 == (q - t0[b]) // 4", "starts"): KeyBounds(
        "(q - t0[b]) // 4 * 4 + t0[b]", "(q - t0[b]) // 4 * 4 + t0[b] + 3"
    ),
}
EVERY = [*((text, None) for text in BOUNDS), *OF_TABLES]


def expected(text: str, table: str | None) -> KeyBounds:
    return BOUNDS[text] if table is None else OF_TABLES[text, table]


def found(text: str, table: str | None) -> KeyBounds:
    return key_bounds(text, tuple(tensor.dtype for tensor in TABLES.get(table, [])))


@pytest.mark.parametrize(("text", "table"), EVERY)
def test_keys_in_reach(text: str, table: str | None) -> None:
    assert found(text, table) == expected(text, table)


@pytest.mark.parametrize(("text", "table"), EVERY)
def test_no_visible_key_is_out_of_reach_of_a_block_of_queries(text: str, table: str | None) -> None:
    bounds, tables, place = found(text, table), TABLES.get(table, []), torch.arange(LENGTH)
    for row in range(2):
        indices = {"b": torch.tensor(row), "h": torch.tensor(0), "q": place[:, None], "k": place[None, :]}
        visible = evaluate(text, indices, tables).expand(LENGTH, LENGTH)

        def at(bound: str, query: int) -> Tensor:
            return evaluate(bound, indices | {"q": torch.tensor(query)}, tables)  # noqa: B023

        for first in range(0, LENGTH, 5):
            last = min(first + 5, LENGTH) - 1
            keys = torch.nonzero(visible[first : last + 1].any(0)).flatten()
            if bounds.highest is not None:
                assert bool((keys <= at(bounds.highest, last)).all())
            if bounds.lowest is not None:
                assert bool((keys >= at(bounds.lowest, first))[keys >= bounds.kept].all())
