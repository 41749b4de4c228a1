"""Index functions of small tensors against the tensors themselves, and what masks are read as."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from effc.compiler import masks
from effc.compiler.graph import Graph, is_tensor, sizes
from effc.compiler.index_algebra import Inference, NotInferred
from effc.compiler.index_values import reshape_groups
from effc.compiler.masks import MaskForm, Masks
from effc.compiler.weights import Constant
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

LOWEST = torch.finfo(torch.float32).min
SEED = 3


def graph_of(function, *inputs: Tensor, symbolic: bool = True) -> Graph:
    """The graph of a function of small tensors: inputs a, b, c, whose sizes are symbolic or not."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    kind = DimDynamic.DYNAMIC if symbolic else DimDynamic.STATIC
    fakes = [
        mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=[kind] * x.ndim)) for x in inputs
    ]
    with mode:
        graph = Graph(make_fx(lambda *args: (function(*args),), pre_dispatch=True)(*fakes))
    for node, name in zip(graph.placeholders, "abc"):
        node._rename(name)
        node.target = node.name
    return graph


def numbers(*shape: int, low: int = 0, high: int = 2) -> Tensor:
    print(f"seed {SEED}")
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(SEED))


def evaluate(function, inputs: dict[str, Tensor], graph: Graph, shape: torch.Size) -> list:
    """Every element of an index function, with inputs looked up and sizes given their values."""
    symbols = {
        symbol: size
        for node in graph.placeholders
        for symbol, size in zip(sizes(node), inputs[node.name].shape)
        if isinstance(symbol, sympy.Symbol)
    }

    def element(*indices: int):
        value = sympy.sympify(function.at(*map(sympy.Integer, indices)))
        while value.atoms(AppliedUndef) or value.has(sympy.Sum):
            value = value.subs(symbols).doit()
            found = {call: inputs[call.name][tuple(map(int, call.args))].item() for call in value.atoms(AppliedUndef)}
            value = value.subs(found)
        return value.subs(symbols)

    return [element(*indices) for indices in itertools.product(*map(range, shape))]


FUNCTIONS = {
    "causal": lambda a: torch.arange(a.shape[1])[None, :] <= torch.arange(a.shape[1])[:, None],
    "causal by triangle": lambda a: torch.ones(a.shape[1], a.shape[1], dtype=torch.bool).tril(),
    "upper triangle": lambda a: torch.full((a.shape[1], a.shape[1]), -1.5).triu(1),
    "window": lambda a: torch.arange(a.shape[1])[None, :] > torch.arange(a.shape[1])[:, None] - 3,
    "padding": lambda a: a.to(torch.bool)[:, None, None, :],
    "padding by index": lambda a: a.bool()[torch.arange(a.shape[0])[:, None], torch.arange(a.shape[1])[None, :]],
    "additive": lambda a: torch.where(a[:, None].bool(), 0.0, LOWEST),
    "filled": lambda a: torch.zeros(a.shape).masked_fill(a == 0, LOWEST),
    "arithmetic": lambda a: (2 - a) * 3 + torch.arange(a.shape[1]),
    "logic": lambda a: ((a > 0) | (torch.arange(a.shape[1]) < 2)) & ~(a == 5),
    "running count": lambda a: a.cumsum(-1) - 1,
    "differences": lambda a: torch.arange(3, 3 + a.shape[1]).diff(),
    "documents": lambda a: torch.arange(a.shape[1]).diff(prepend=torch.full((1,), -1)).ne(1).cumsum(-1),
    "views": lambda a: a[:, None, :].expand(-1, 3, -1).transpose(1, 2).reshape(a.shape[0], -1)[:, 1:],
    "merged": lambda a: a[:, :, None].expand(-1, -1, 2).reshape(a.shape[0] * a.shape[1], 2),
    "select": lambda a: a.select(0, -1)[2:],
    "concatenated": lambda a: torch.cat((a, a + 10), dim=1),
    "repeated": lambda a: a.repeat_interleave(2, dim=0).repeat(1, 2),
    "narrow numbers": lambda a: torch.full((2,), LOWEST).to(torch.bfloat16),
}


@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "static"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_index_functions_give_the_elements_of_the_tensor(name, symbolic):
    given = numbers(2, 5, high=4)
    graph = graph_of(FUNCTIONS[name], given, symbolic=symbolic)
    (node,) = graph.outputs
    expected = FUNCTIONS[name](given)
    function = Inference(graph).infer(node)
    found = evaluate(function, {"a": given}, graph, expected.shape)
    for value, wanted in zip(found, expected.flatten().tolist(), strict=True):
        value = value == sympy.true if isinstance(wanted, bool) else float(value)
        assert value == wanted, name


def test_what_is_not_index_arithmetic_is_named():
    graph = graph_of(lambda a: a.remainder(3) <= 1, numbers(2, 5))
    with pytest.raises(NotInferred, match=r"remainder.* is not index arithmetic"):
        Inference(graph).infer(graph.outputs[0])


def test_views_group_dimensions():
    b, t = sympy.symbols("b t", integer=True, positive=True)
    two, four = sympy.Integer(2), sympy.Integer(4)
    assert reshape_groups((b, two, two, t), (b, four, t)) == [([0], [0]), ([1, 2], [1]), ([3], [2])]
    assert reshape_groups((b * t, four), (b, t, four)) == [([0], [0, 1]), ([1], [2])]
    assert reshape_groups((b, t), (t, b)) is None


def test_ranges_decide_conditions():
    inference = Inference()
    size = sympy.Symbol("n", integer=True, positive=True)
    k = inference.index("k", size)
    assert inference.decide(k <= size - 1) == sympy.true
    assert inference.decide(k > size) == sympy.false
    assert inference.decide(k <= size - 2) not in (sympy.true, sympy.false)
    assert inference.divmod(2 * k + 1, sympy.Integer(2)) == (k, 1)


# --- masks ---------------------------------------------------------------------------------------------------------


def read(function, *inputs: Tensor, scores: tuple, symbolic: bool = True) -> dict[str, object] | str:
    """What the mask that a function builds is read as for scores whose sizes are given as (input, dim) or numbers.

    The fields that a form sets, nodes by name.
    """
    graph = graph_of(function, *inputs, symbolic=symbolic)
    (mask,) = graph.outputs
    shape = tuple(
        sizes(graph.placeholder(size[0]))[size[1]] if isinstance(size, tuple) else sympy.Integer(size)
        for size in scores
    )
    try:
        form = Masks(graph).read(mask, shape)
    except NotInferred as reason:
        return reason.reason
    return {name: str(value) if is_tensor(value) else value for name, value in vars(form).items() if value}


CAUSAL, PADDING = {"causal": True}, {"key_mask": "a"}
SELF = (("a", 0), 4, ("a", 1), ("a", 1))


def positions(a: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(a.shape[1])
    return place[None, None, None, :], place[None, None, :, None]


def causal(a: Tensor) -> Tensor:
    k, q = positions(a)
    return k <= q


@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "static"])
def test_masks_that_are_causal_padding_both_or_nothing(symbolic):
    a = numbers(2, 5)

    def form(function):
        return read(function, a, scores=SELF, symbolic=symbolic)

    assert form(causal) == CAUSAL
    assert form(lambda a: ~(positions(a)[0] > positions(a)[1])) == CAUSAL
    assert form(lambda a: a[:, None, None, :] != 0) == PADDING
    assert form(lambda a: causal(a) & a.bool()[:, None, None, :]) == CAUSAL | PADDING
    assert form(lambda a: torch.where(causal(a) & a.bool()[:, None, None, :], 0.0, LOWEST)) == CAUSAL | PADDING
    assert form(lambda a: torch.zeros(()).masked_fill(~causal(a), float("-inf"))) == CAUSAL
    assert form(lambda a: torch.ones(a.shape[1], a.shape[1], dtype=torch.bool)) == {}
    assert form(lambda a: positions(a)[0] >= 0) == {}
    assert form(lambda a: positions(a)[0] > positions(a)[1] - 3) == {"window": 3}
    assert form(lambda a: causal(a) & (positions(a)[1] - positions(a)[0] <= 3)) == CAUSAL | {"window": 4}
    assert form(lambda a: causal(a) & (positions(a)[0] >= positions(a)[1])) == CAUSAL | {"window": 1}


def test_one_query_behind_all_keys_sees_them_all():
    def decode(a):
        past = a.shape[1] - 1
        return torch.arange(a.shape[1])[None, None, None, :] <= torch.arange(past, past + 1)[None, None, :, None]

    assert read(decode, numbers(2, 7), scores=(("a", 0), 4, 1, ("a", 1))) == {}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a: positions(a)[0] > positions(a)[1], "k - q - 1 >= 0"),
        (lambda a: causal(a) | (positions(a)[0] < 2), "neither causal, a window nor padding"),
        (lambda a: causal(a) & (a[:, None, :, None] != 0), "Ne(a(b, q), 0)"),
        (lambda a: causal(a) & (a[:, None, None, :] > 1), "a(b, k)"),
        (lambda a: torch.where(causal(a), 0.0, -1.0), "it adds -1"),
        (lambda a: torch.where(causal(a), positions(a)[0] * 0.5, LOWEST), "k"),
        (lambda a: causal(a) & torch.isfinite(a.float())[:, None, None, :], "not index arithmetic"),
    ],
)
def test_other_masks_are_left_with_a_reason(function, reason):
    assert reason in read(function, numbers(2, 5), scores=SELF)


def test_a_triangle_in_a_buffer_is_causal():
    graph = graph_of(lambda a, b: b[: a.shape[1], : a.shape[1]], numbers(2, 5), torch.ones(9, 9).tril().bool())
    triangle = graph.placeholder("b")
    graph.weights["b"] = Constant.of(torch.ones(9, 9).tril().bool())
    length = sizes(graph.placeholder("a"))[1]
    shape = (sizes(graph.placeholder("a"))[0], sympy.Integer(4), length, length)
    assert is_tensor(triangle)
    assert Masks(graph).read(graph.outputs[0], shape) == MaskForm(causal=True)


def test_a_reading_that_the_graph_contradicts_is_not_used(monkeypatch):
    monkeypatch.setattr(masks, "infer_mask", lambda graph, mask, scores: MaskForm(causal=True))
    assert "the graph computes another mask" in read(lambda a: positions(a)[0] >= 0, numbers(2, 5), scores=SELF)
