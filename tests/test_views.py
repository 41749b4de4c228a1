"""Views as arithmetic: every element of a view lies where PyTorch says it does."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from effc.codegen.kernel import Buffer, Layout
from effc.codegen.views import is_view, reshape_index, reshape_strides, view_index, view_layout, view_source
from effc.compiler.graph import sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .graphs import graph_of

aten = torch.ops.aten
B, S = (sympy.Symbol(name, integer=True, positive=True) for name in "BS")


def integers(values: tuple[int, ...]) -> tuple[sympy.Expr, ...]:
    return tuple(map(sympy.Integer, values))


def factors(data: st.DataObject, count: int) -> tuple[int, ...]:
    """A random shape of `count` elements."""
    shape = []
    while count > 1:
        factor = data.draw(st.sampled_from([d for d in range(1, count + 1) if count % d == 0]))
        shape.append(factor)
        count //= factor
        if len(shape) == 4:
            break
    return (*shape, count)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_reshapes_of_strided_tensors(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 6, 12, 24, 30]))
    x = torch.arange(count).reshape(factors(data, count))
    x = x.permute(data.draw(st.permutations(range(x.ndim))))
    new = factors(data, count)
    strides = reshape_strides(integers(x.shape), integers(x.stride()), integers(new))
    if strides is None:
        with pytest.raises(RuntimeError):
            x.view(new)
    else:
        assert torch.equal(x.as_strided(new, [int(s) for s in strides]), x.reshape(new))
    expected = x.reshape(new)
    for place in itertools.product(*map(range, new)):
        index = reshape_index(integers(x.shape), integers(new), integers(place))
        assert x[tuple(map(int, index))] == expected[place]


def test_runtime_axes_that_a_reshape_leaves_alone_keep_their_index() -> None:
    b, s, c, d = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bscd")
    twelve, three, four = integers((12, 3, 4))
    assert reshape_index((B, S, twelve), (B, S, three, four), (b, s, c, d)) == (b, s, 4 * c + d)
    merged = reshape_index((B, S, twelve), (B * S, three, four), (s, c, d))
    assert merged[2] == 4 * c + d
    assert reshape_index((B * S, twelve), (B, S, twelve), (b, s, d)) == (b * S + s, d)


def test_runtime_axes_of_a_strided_reshape() -> None:
    three, four, twelve, one = integers((3, 4, 12, 1))
    assert reshape_strides((B, S, twelve), (12 * S, twelve, one), (B * S, three, four)) == (12, 4, 1)
    assert reshape_strides((B, three, S, four), (12 * S, four, twelve, one), (B, three * S, four)) is None


def all_views(x: Tensor) -> tuple[Tensor, ...]:
    low, high = x.split(2, 1)
    return (
        x.view(6, 20),
        x.reshape(2, 3, 4, 5, 1),
        aten._unsafe_view(x, [24, 5]),
        x.flatten(1, 2),
        x.unflatten(2, (2, 2)) if x.shape[2] == 4 else x,
        x.permute(2, 0, 3, 1),
        x.transpose(-1, 1),
        x[0, 0].t(),
        x.unsqueeze(0),
        x.unsqueeze(-1),
        x.unsqueeze(2),
        x.unsqueeze(1).squeeze(1),
        x.unsqueeze(1).unsqueeze(0).squeeze(),
        x.unsqueeze(1).squeeze((1, 2)),
        x.unsqueeze(1).expand(2, 6, 3, 4, 5),
        x[:1].expand(3, -1, 4, 5),
        x[1:],
        x[:, -2:],
        x[:, :, 1::2],
        x[-9:, :2],
        x.narrow(2, 1, 3),
        x.select(1, -1),
        x.select(3, 2),
        low,
        high,
        x.split_with_sizes([1, 3], 2)[1],
        x.chunk(3, -1)[2],
        aten.alias(x),
        x.detach(),
    )


def test_every_view_op() -> None:
    x = torch.arange(120).reshape(2, 3, 4, 5)
    graph = graph_of(all_views, {"x": x})
    shape = integers(x.shape)
    layout = Layout(Buffer("x", sympy.Integer(120), x.dtype, "input"), sympy.Integer(0), shape, integers(x.stride()))
    for node, expected in zip(graph.outputs, all_views(x), strict=True):
        chain = []
        while is_view(node):
            chain.append(node)
            node = view_source(node)
        assert node.op == "placeholder", f"{node.target} is no view"
        found: Layout | None = layout
        for view in reversed(chain):
            found = view_layout(view, found)
        assert found.sizes == integers(expected.shape) == (sizes(chain[0]) if chain else shape)
        strided = x.as_strided(*([int(n) for n in part] for part in (found.sizes, found.strides)), int(found.offset))
        assert torch.equal(strided, expected)
        for place in itertools.product(*map(range, expected.shape)):
            index = integers(place)
            for view in chain:
                index = view_index(view, index)
            assert x[tuple(map(int, index))] == expected[place]


def test_what_is_no_view() -> None:
    graph = graph_of(lambda x: (x.topk(2)[0], x.contiguous().clone(), x.flip(0)), {"x": torch.zeros(3, 4)})
    assert not any(is_view(node) for node in graph.nodes)
