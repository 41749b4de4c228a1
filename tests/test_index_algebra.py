"""Index functions of small tensors against the tensors themselves."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from effc.compiler.graph import Graph, sizes
from effc.compiler.index_algebra import Inference, NotInferred
from effc.compiler.index_values import reshape_groups
from effc.compiler.mask_check import evaluated
from sympy.core.function import AppliedUndef
from torch import Tensor

from .index_graphs import LOWEST, graph_of, numbers


def elements(function, inputs: dict[str, Tensor], graph: Graph, shape: torch.Size) -> list:
    """Every element of an index function, with tensors looked up and sizes given their values."""
    given = {node: inputs[node.name] for node in graph.placeholders}
    tensors = {node.name: value for node, value in evaluated(graph, graph.outputs, given).items()}
    symbols = {
        symbol: size
        for node in graph.placeholders
        for symbol, size in zip(sizes(node), inputs[node.name].shape)
        if isinstance(symbol, sympy.Symbol)
    }

    def element(*indices: int):
        value = sympy.sympify(function.at(*map(sympy.Integer, indices)))
        while value.atoms(AppliedUndef):
            value = value.subs(symbols).doit()
            found = {call: tensors[call.name][tuple(map(int, call.args))].item() for call in value.atoms(AppliedUndef)}
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
    "chunks": lambda a: torch.arange(a.shape[1])[None, :] // 2 == torch.arange(a.shape[1])[:, None] // 2,
    "remainders": lambda a: (torch.arange(7) - 2) % 3 + torch.arange(7).div(2, rounding_mode="floor"),
    "clamped": lambda a: torch.where(a > 1, -8.0, 0.5).add(a).clamp(min=-6.5, max=2),
    "compared": lambda a: torch.where(a > 1, -8.0, 0.5).add(a) < 1,
    "counted": lambda a: (a.cumsum(-1) - 1) * a,
    "divided": lambda a: a / 3.0 + 1,
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
    found = elements(function, {"a": given}, graph, expected.shape)
    for value, wanted in zip(found, expected.flatten().tolist(), strict=True):
        value = value == sympy.true if isinstance(wanted, bool) else float(value)
        assert value == (pytest.approx(wanted, rel=1e-6) if name == "divided" else wanted), name


def test_what_is_not_index_arithmetic_is_named():
    graph = graph_of(lambda a: a.float().sin() <= 1, numbers(2, 5))
    with pytest.raises(NotInferred, match=r"sin.* is not index arithmetic"):
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
