"""Expressions over the indices of scores: sympy to text and back."""

from __future__ import annotations

import random

import pytest
import sympy
import torch
from effc.compiler.index_expressions import INDICES, evaluate, parse
from effc.compiler.index_text import SYMBOLS, NoText, Writer, from_text
from torch import fx

SHAPES = {"slopes": (4,), "count": (3, 9), "document": (3, 9)}
SIZES = dict(zip(INDICES, (3, 4, 9, 9)))
SEED = 5


def leaves() -> dict[str, fx.Node]:
    graph = fx.Graph()
    return {name: graph.placeholder(name) for name in SHAPES}


def functions() -> dict[str, sympy.Function]:
    kinds = {"slopes": {"real": True}, "count": {"integer": True}, "document": {"integer": True}}
    return {name: sympy.Function(name, **kinds[name]) for name in SHAPES}


TEXTS = [
    "k <= q",
    "k < q",
    "k <= q + 2",
    "k < 16",
    "k >= 5",
    "q < k",
    "(k < 2) | (k <= q)",
    "k // 4 == q // 4",
    "k % 3 != 0",
    "(k - q) // 2 * 3",
    "t0[h] * k",
    "-t0[h] * k",
    "t0[h] * maximum(k - q, q - k)",
    "k * 0.5 + t0[h] * 0.125",
    "t0[b, k] * t1[h]",
    "t0[b, k] == t0[b, q]",
    "(t0[b, k] == t0[b, q]) & (t0[b, k] * t0[b, q] >= 1)",
    "where(k <= q, k * 0.5, minimum(k, q) - 1)",
    "bfloat16(bfloat16(t0[b, k] - 1) * bfloat16(t1[h])) * 0.25",
    "float16(k * 0.1)",
    "~((k < 2) & (t0[b, k] >= 1)) | (k == q)",
]


def table_names(text: str) -> list[str]:
    """Which tables a text reads as t0, t1: those of one index are slopes."""
    return ["slopes" if f"t{number}[h]" in text else "count" for number in range(2) if f"t{number}[" in text]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_was_written_is_read_and_written_alike(text):
    names = table_names(text)
    value = from_text(text, [functions()[name] for name in names])
    writer = Writer(leaves())
    written = writer.write(value)
    assert [table.name for table in writer.tables] == names
    again = from_text(written, [functions()[name] for name in names])
    assert Writer(leaves()).write(again) == written
    if not text.startswith("~"):
        assert written == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_evaluated_to_what_it_says(text):
    """Against sympy, element by element."""
    print(f"seed {SEED}")
    generator, chooser = torch.Generator().manual_seed(SEED), random.Random(SEED)
    names = table_names(text)
    values = {name: torch.randint(0, 3, shape, generator=generator) for name, shape in SHAPES.items()}
    values["slopes"] = torch.randn(SHAPES["slopes"], generator=generator, dtype=torch.float64)
    symbolic = from_text(text, [functions()[name] for name in names])
    for _ in range(12):
        place = {name: chooser.randrange(size) for name, size in SIZES.items()}
        indices = {name: torch.tensor(index) for name, index in place.items()}
        found = evaluate(text, indices, [values[name] for name in names])
        known = symbolic.subs({SYMBOLS[name]: index for name, index in place.items()})
        for call in known.atoms(sympy.core.function.AppliedUndef):
            if call.name in values:
                known = known.subs(call, values[call.name][tuple(map(int, call.args))].item())
        known = known.replace(
            lambda call: getattr(call, "name", "") in ("bfloat16", "float16"),
            lambda call: sympy.Float(torch.tensor(float(call.args[0])).to(getattr(torch, call.name)).item()),
        )
        assert float(found) == pytest.approx(float(bool(known) if known in (True, False) else known)), place


def test_what_has_no_text_is_said():
    size = sympy.Symbol("s0", integer=True, positive=True)
    for value, reason in ((SYMBOLS["k"] + size, "s0"), (sympy.sin(SYMBOLS["k"]), "sin"), (sympy.Function("f")(1), "f")):
        with pytest.raises(NoText, match=reason):
            Writer({}).write(value)
    for text in ("x + 1", "k + q.size", "f(k)", "k if q else h", "t[0]"):
        with pytest.raises(ValueError, match="expected"):
            parse(text)
