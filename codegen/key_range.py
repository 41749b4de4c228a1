"""Which keys a program of an attention kernel reads: the blocks that its queries can see, and no others.

    (k <= q) & (k // 64 == q // 64)   -->   first_key = first_q // 64 * 64
                                            last_key = tl.minimum(last_q, last_q // 64 * 64 + 63) + 1

What bounds there are follows from the condition alone (`compiler/key_bounds.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..compiler.index_expressions import parse
from ..compiler.key_bounds import KeyBounds, key_bounds
from .index_code import IndexCode


def bounds_of(operands: Mapping[str, Any], causal: bool, tables: tuple[torch.dtype, ...]) -> KeyBounds:
    """The bounds that the arguments of attention put on the keys of query q."""
    parts = ["k <= q"] if causal else []
    parts += [f"k > q - {operands['window']}"] if operands["window"] is not None else []
    parts += [operands["visible"]] if operands["visible"] is not None else []
    return key_bounds(" & ".join(f"({part})" for part in parts) or "True", tables)


def range_values(bounds: KeyBounds, code: IndexCode, queries: Mapping[str, str], t: str, block: int) -> dict[str, Any]:
    """Template values of the range of keys.

    code: prints the kernel's expressions. queries: how the kernel computes its first_q and last_q; empty where it has
    one query, q_at. t: the text of the number of keys, "" where no bound exceeds it. block: keys read at a time.
    """
    first, last = "0", t
    if bounds.lowest is not None:
        first, natural = printed(code, bounds.lowest, "first_q" if queries else "q_at")
        first = first if natural else f"tl.maximum({first}, 0)"
    if bounds.highest is not None:
        last = f"{printed(code, bounds.highest, 'last_q' if queries else 'q_at')[0]} + 1"
        last = f"tl.minimum({last}, {t})" if t else last
    return {
        "range_lines": [f"{name} = {form}" for name, form in queries.items() if name in f"{first} {last}"],
        "first_key": first,
        "last_key": last,
        "kept": -(-bounds.kept // block) * block,
    }


def ring_values(t: str) -> dict[str, Any]:
    """Those of a ring, whose slots are in no order: all that were written are read."""
    return {"range_lines": [], "first_key": "0", "last_key": f"tl.minimum(last_at + 1, {t})", "kept": 0}


def printed(code: IndexCode, bound: str, query: str) -> tuple[str, bool]:
    """The text of a bound at one query, and whether it is known not to be negative."""
    found = code.with_names({"q": query}).code(parse(bound))
    return (f"{found.text}.to(tl.int32)" if "[" in bound else found.text), found.natural
