"""Which integers and pointers are affine in the indices of a tile, and which masks only cut a dimension short.

    x_ptr + (row[:, None] * n + column[None, :])   -->   pointer x_ptr, coefficients {0: "n", 1: 1}
    (row[:, None] < m) & (column[None, :] < n)     -->   dimension 0 ends at m - first row, dimension 1 at n

A `Map` says for each dimension of a value which dimension of the tile indexes it; None where the index is 0.
"""

from dataclasses import dataclass

from .c_types import parse_literal
from .cells import LARGE
from .ir import Value

Map = tuple[int | None, ...]


@dataclass(frozen=True)
class Term:
    """A scalar summand of a base: C text and a power of two that divides it."""

    text: str
    divisor: int = 1


@dataclass(frozen=True)
class Affine:
    """pointer + sum(terms) + constant + sum over tile dimensions d of coefficients[d] * index[d]. Counts elements."""

    pointer: str = ""
    terms: tuple[Term, ...] = ()
    constant: int = 0
    coefficients: tuple[tuple[int, int | str], ...] = ()

    def coefficient(self, dim: int) -> int | str:
        return dict(self.coefficients).get(dim, 0)

    @property
    def is_constant(self) -> bool:
        return not self.pointer and not self.terms and not self.coefficients

    @property
    def divisor(self) -> int:
        divisor = self.constant & -self.constant or LARGE
        for term in self.terms:
            divisor = min(divisor, term.divisor)
        return divisor

    def base(self) -> str:
        """C expression of the value at index 0."""
        parts = ([self.pointer] if self.pointer else []) + [term.text for term in self.terms]
        if self.constant or not parts:
            parts.append(str(self.constant))
        return " + ".join(parts)

    def __add__(self, other: "Affine") -> "Affine":
        sums: dict[int, int | str] = dict(self.coefficients)
        for dim, coefficient in other.coefficients:
            sums[dim] = add(sums.get(dim, 0), coefficient)
        kept = tuple(sorted(((d, c) for d, c in sums.items() if c != 0), key=lambda item: item[0]))
        return Affine(self.pointer or other.pointer, self.terms + other.terms, self.constant + other.constant, kept)

    def scaled(self, factor: "Affine") -> "Affine":
        """self * factor, where factor has neither coefficients nor pointer."""
        if factor.is_constant:
            number = factor.constant
            if number == 0:
                return Affine()
            low = abs(number) & -abs(number)
            terms = tuple(Term(times(t.text, number), min(t.divisor * low, LARGE)) for t in self.terms)
            coefficients = tuple((d, multiply(c, number)) for d, c in self.coefficients)
            return Affine("", terms, self.constant * number, coefficients)
        text = factor.base()
        base = (
            ()
            if not self.terms and not self.constant
            else (Term(times(self.base(), text), min(self.divisor * factor.divisor, LARGE)),)
        )
        return Affine("", base, 0, tuple((d, multiply(c, text)) for d, c in self.coefficients))


def wrapped(text: str) -> str:
    return f"({text})" if " " in text or text.startswith("-") else text


def times(text: str, factor: int | str) -> str:
    if factor == 1:
        return text
    return f"{wrapped(text)} * {wrapped(str(factor))}"


def add(a: int | str, b: int | str) -> int | str:
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return b if a == 0 else a if b == 0 else f"{a} + {wrapped(str(b))}"


def multiply(a: int | str, b: int | str) -> int | str:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return times(str(a), b) if b != 1 and a != 1 else (b if a == 1 else a)


class AffineAnalysis:
    """Affine forms of a kernel's values. `divisors`: powers of two known to divide scalars, grown while printing."""

    def __init__(self, stored: set[Value]):
        self.stored = stored
        self.divisors: dict[Value, int] = {}

    def scalar(self, value: Value) -> Affine:
        if value.op is not None and value.op.name == "arith.constant":
            return Affine(constant=int(parse_literal(value.op.attrs["value"], value.type.element)))
        if value.type.element == "ptr":
            return Affine(pointer=value.name)
        return Affine(terms=(Term(value.name, self.divisors.get(value, 1)),))

    def of(self, value: Value, at: Map) -> Affine | None:
        """The affine form of `value` (i32, i64 or pointer), indexed by the tile as `at` says; None if it has none.

        It holds where no sum or product of indices leaves its type, as Triton's own analysis of addresses supposes.
        """
        return self.form(value, at, {})

    def form(self, value: Value, at: Map, known: dict[tuple[Value, Map], Affine | None]) -> Affine | None:
        """`of`, with the forms found on the way: what is used twice is looked at once."""
        if (value, at) not in known:
            known[value, at] = self.find(value, at, known)
        return known[value, at]

    def find(self, value: Value, at: Map, known: dict[tuple[Value, Map], Affine | None]) -> Affine | None:
        if not value.type.is_tensor:
            return self.scalar(value) if value.type.element in ("i32", "i64", "ptr", "index", "i16") else None
        op = value.op
        if op is None or value in self.stored:
            return None
        if op.name == "tt.splat":
            return self.form(op.operands[0], (), known)
        if op.name == "arith.constant" and value.type.element in ("i16", "i32", "i64"):
            return Affine(constant=int(parse_literal(op.attrs["value"], value.type.element)))
        if op.name == "tt.make_range":
            coefficients = () if at[0] is None else ((at[0], 1),)
            return Affine(constant=int(op.attrs["start"]), coefficients=coefficients)
        if (inner := through_view(value, at)) is not None:
            return self.form(*inner, known)
        if op.name in ("arith.extsi", "arith.index_cast") and op.operands[0].type.element != "i1":
            form = self.form(op.operands[0], at, known)
            if form is None or op.result.type.element != "i64":
                return form
            terms = tuple(Term(f"(int64_t){wrapped(t.text)}", t.divisor) for t in form.terms)
            coefficients = tuple(
                (d, c if isinstance(c, int) else f"(int64_t){wrapped(c)}") for d, c in form.coefficients
            )
            return Affine(form.pointer, terms, form.constant, coefficients)
        if op.name in ("arith.addi", "tt.addptr", "arith.subi", "arith.muli") and value.type.element != "i1":
            left, right = (self.form(operand, at, known) for operand in op.operands)
            if left is None or right is None:
                return None
            if op.name == "arith.muli":
                if not right.coefficients:
                    return left.scaled(right)
                return right.scaled(left) if not left.coefficients else None
            return left + (right.scaled(Affine(constant=-1)) if op.name == "arith.subi" else right)
        return None


def step(value: Value, at: Map, dim: int, known: dict[tuple[Value, Map], int | None] | None = None) -> int | None:
    """How much an integer or pointer grows per element along `dim`, whatever it is along the others; None if unknown.

    It needs no affine form of the whole: a row's address may be looked up, its columns still follow each other.
    known: steps along `dim` found on the way.
    """
    if not value.type.is_tensor or dim not in at:
        return 0
    known = {} if known is None else known
    if (value, at) not in known:
        known[value, at] = find_step(value, at, dim, known)
    return known[value, at]


def find_step(value: Value, at: Map, dim: int, known: dict[tuple[Value, Map], int | None]) -> int | None:
    op = value.op
    if op is None:
        return None
    if op.name in ("tt.splat", "arith.constant"):
        return 0
    if op.name == "tt.make_range":
        return 1
    if (inner := through_view(value, at)) is not None:
        return step(*inner, dim, known)
    if op.name in ("arith.extsi", "arith.index_cast"):
        return step(op.operands[0], at, dim, known)
    if op.name in ("arith.addi", "tt.addptr", "arith.subi"):
        left, right = (step(operand, at, dim, known) for operand in op.operands)
        if left is None or right is None:
            return None
        return left - right if op.name == "arith.subi" else left + right
    if op.name.startswith("arith.") and all(step(operand, at, dim, known) == 0 for operand in op.operands):
        return 0
    return None


def through_view(value: Value, at: Map) -> tuple[Value, Map] | None:
    """What an op that only renames indices reads: its operand and the operand's map. None for other ops."""
    op = value.op
    if op is None:
        return None
    if op.name == "tt.expand_dims":
        axis = op.attrs["axis"]
        return op.operands[0], at[:axis] + at[axis + 1 :]
    if op.name == "tt.broadcast":
        source = op.operands[0].type.shape
        return op.operands[0], tuple(None if size == 1 else d for d, size in zip(at, source, strict=True))
    if op.name == "tt.trans":
        order = op.attrs["order"]
        inverse = [at[order.index(d)] for d in range(len(order))]
        return op.operands[0], tuple(inverse)
    if op.name == "tt.reshape" and is_trivial_reshape(op.operands[0].type.shape, value.type.shape):
        kept = [d for d, size in zip(at, value.type.shape, strict=True) if size != 1]
        return op.operands[0], tuple(None if size == 1 else kept.pop(0) for size in op.operands[0].type.shape)
    if op.name in ("ttg.convert_layout",):
        return op.operands[0], at
    return None


def is_trivial_reshape(source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Only dimensions of size 1 come or go."""
    return [s for s in source if s != 1] == [t for t in target if t != 1]


@dataclass(frozen=True)
class Conjunct:
    """One `and`ed part of a mask, indexed by the tile as `at`.

    With dim: it says index[dim] < end, a C expression, of which `divisor` is a power-of-two divisor and `constant` the
    value where it is known. Without: it is `uniform` over the tile, or not understood.
    """

    leaf: Value
    at: Map
    dim: int | None = None
    end: str = ""
    constant: int | None = None
    divisor: int = 1
    uniform: bool = False


def conjuncts(mask: Value, at: Map, analysis: AffineAnalysis) -> list[Conjunct]:
    """The parts of a mask that must all hold."""
    op = mask.op
    if op is not None and mask not in analysis.stored:
        if op.name == "arith.andi":
            return [part for operand in op.operands for part in conjuncts(operand, at, analysis)]
        if op.name == "tt.splat":
            return conjuncts(op.operands[0], (), analysis)
        if (inner := through_view(mask, at)) is not None:
            return conjuncts(*inner, analysis)
        if op.name == "arith.constant" and parse_literal(op.attrs["value"], "i1"):
            return []
        if op.name == "arith.cmpi" and mask.type.is_tensor:
            return [compare_conjunct(mask, at, analysis)]
    return [Conjunct(mask, at, uniform=not mask.type.is_tensor)]


def compare_conjunct(leaf: Value, at: Map, analysis: AffineAnalysis) -> Conjunct:
    predicate = leaf.op.attrs["words"][0]
    left, right = (analysis.of(operand, at) for operand in leaf.op.operands)
    if left is None or right is None or predicate not in ("slt", "sle", "sgt", "sge"):
        return Conjunct(leaf, at)
    if predicate in ("sgt", "sge"):
        left, right = right, left
    if right.coefficients or len(left.coefficients) != 1 or left.coefficients[0][1] != 1:
        return Conjunct(leaf, at)
    more = 1 if predicate in ("sle", "sge") else 0
    base = Affine("", left.terms, left.constant)
    dim = left.coefficients[0][0]
    divisor = min(base.divisor, (right + Affine(constant=more)).divisor)
    if base.is_constant and right.is_constant:
        end = right.constant + more - base.constant
        return Conjunct(leaf, at, dim, str(end), end, divisor)
    if base.is_constant and base.constant == more:
        return Conjunct(leaf, at, dim, right.base(), None, divisor)
    text = f"(int64_t){wrapped(right.base())}"  # i <= n holds everywhere for the largest n
    if not base.is_constant:
        text += f" - {wrapped(base.base())}"
        return Conjunct(leaf, at, dim, f"{text} + 1" if more else text, None, divisor)
    return Conjunct(leaf, at, dim, f"{text} + {wrapped(str(more - base.constant))}", None, divisor)
