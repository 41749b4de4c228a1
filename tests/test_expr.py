"""Sizes as text mean the same in Python, in C++ and in Triton."""

from __future__ import annotations

import pytest
import sympy
from effc.codegen.expr import cpp_text, python_text, triton_text
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Mod

A, B = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))
NAMES = {A: "B", B: "S"}
LEAVES = st.sampled_from([A, B]) | st.integers(0, 70).map(sympy.Integer)
DIVISORS = st.sampled_from([A, B, A * B]) | st.integers(1, 70).map(sympy.Integer)


def grow(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, DIVISORS).map(lambda pair: FloorDiv(*pair)),
        st.tuples(inner, DIVISORS).map(lambda pair: Mod(*pair)),
        st.tuples(inner, inner).map(lambda pair: sympy.Max(*pair)),
        st.tuples(inner, inner).map(lambda pair: sympy.Min(*pair)),
        inner.map(lambda x: x**2),
    )


EXPRESSIONS = st.recursive(LEAVES, grow, max_leaves=6)


class Tl:
    """The two functions of Triton's language that sizes use."""

    maximum, minimum = staticmethod(max), staticmethod(min)


def as_python(cpp: str) -> str:
    """C++ over non-negative numbers as Python: the division, the casts and two names are what differs."""
    for text, other in (("larger", "max"), ("smaller", "min"), ("int64_t", "int"), ("/", "//")):
        cpp = cpp.replace(text, other)
    return cpp


@settings(derandomize=True, deadline=None, max_examples=150)
@given(EXPRESSIONS, st.integers(1, 9), st.integers(1, 9))
def test_every_language_computes_the_same(expr: sympy.Expr, a: int, b: int) -> None:
    value = int(expr.xreplace({A: sympy.Integer(a), B: sympy.Integer(b)}))
    sizes = {"B": a, "S": b, "tl": Tl}
    named = expr.xreplace({old: sympy.Symbol(new, integer=True, positive=True) for old, new in NAMES.items()})
    assert eval(python_text(expr, NAMES), dict(sizes)) == value
    assert eval(as_python(cpp_text(expr, NAMES)), dict(sizes)) == value
    assert eval(triton_text(named), dict(sizes)) == value


def test_conditions() -> None:
    for condition, text in ((sympy.Eq(A * B, 1), "B*S == 1"), (A * B <= 16, "B*S <= 16"), (sympy.Ne(A, 2), "B != 2")):
        assert python_text(condition, NAMES) == cpp_text(condition, NAMES) == f"({text})"
    assert (python_text(sympy.true, NAMES), cpp_text(sympy.true, NAMES)) == ("True", "true")


def test_what_no_size_holds_is_refused() -> None:
    for expr in (A**-1, sympy.sin(A), sympy.sqrt(A)):
        with pytest.raises(ValueError, match="a size holds"):
            python_text(expr, NAMES)
