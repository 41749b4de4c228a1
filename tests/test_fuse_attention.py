"""fuse_attention: SDPA and its written-out form, grouped heads, masks, and what is left alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from effc.compiler.graph import Graph, is_tensor, sizes
from effc.compiler.pattern import arguments
from effc.compiler.trace import trace
from effc.compiler.weights import Constant
from effc.passes.fuse_attention import fuse_attention
from effc.passes.normalize import normalize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .families import tiny_model, traced
from .pass_checks import check_pass, example

aten = torch.ops.aten
attention = torch.ops.effc.attention.default
EXPAND = aten.expand.default
B, S, H, G, D = 2, 6, 4, 2, 8
SCALE = 1 / math.sqrt(D)
LOWEST = torch.finfo(torch.float32).min


TRIANGLE = torch.ones(32, 32, dtype=torch.bool).tril()


def traced_function(function, groups: int) -> tuple[Graph, dict[str, Tensor]]:
    """The normalized graph of a function of (triangle, q, k, v, attention_mask) with symbolic B and S, and inputs.

    q [B, H, S, D], k and v [B, G, S, D], attention_mask [B, S]; triangle is a constant buffer.
    """
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[0, 2] = mask[1, 4] = 0  # every query sees its first key
    heads = {name: example(B, H if name == "q" else groups, S, D, seed=seed) for seed, name in enumerate("qkv")}
    inputs = {**heads, "attention_mask": mask}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    duck, static = DimDynamic.DUCK, DimDynamic.STATIC
    fakes = [mode.from_tensor(TRIANGLE, static_shapes=True)]
    for value in inputs.values():
        dims = [duck, static, duck, static] if value.ndim == 4 else [duck, duck]
        fakes.append(mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims)))
    with mode:
        graph = Graph(make_fx(lambda *given: (function(*given),), pre_dispatch=True)(*fakes))
    name_inputs(graph, ["triangle", *inputs])
    graph.weights["triangle"] = Constant.of(TRIANGLE)
    normalize(graph)
    return graph, {name: inputs[name] for name in graph.inputs}


def name_inputs(graph: Graph, names: Iterable[str]) -> None:
    for node, name in zip(graph.placeholders, names):
        node._rename(name)
        node.target = node.name


def repeated(x: Tensor) -> Tensor:
    """[B, G, T, D] --> [B, H, T, D], as transformers does it."""
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, H // g, t, d).reshape(b, H, t, d)


def causal(x: Tensor) -> Tensor:
    place = torch.arange(x.shape[-2])
    return place[None, None, None, :] <= place[None, None, :, None]


def padded(mask: Tensor) -> Tensor:
    return mask.bool()[:, None, None, :]


def check(function, matches: int = 1, groups: int = G, **claims) -> dict[str, object]:
    """The four claims; returns the arguments of the fused op by name (none where nothing is fused)."""
    graph, inputs = traced_function(function, groups)
    check_pass(fuse_attention, graph, nn.Module(), inputs, matches=matches, **claims)
    found = [arguments(node) for node in graph.nodes if node.target is attention]
    assert len(found) == matches
    for node in graph.nodes:
        if found and found[0]["mask"] is None:
            assert squares(node, graph) == 0, f"{node.name} has a value for each query and key"
    return found[0] if found else {}


def squares(node, graph: Graph) -> int:
    length = sizes(graph.placeholders[-1])[1]
    return is_tensor(node) and sizes(node).count(length) > 1


def meaning(named: dict[str, object]) -> tuple[bool, str | None, bool]:
    return named["causal"], named["key_mask"] and named["key_mask"].name, named["mask"] is not None


FORMS = {
    "is_causal": (lambda tri, q, k, v, am: sdpa(q, repeated(k), repeated(v), is_causal=True), (True, None)),
    "everything visible": (lambda tri, q, k, v, am: sdpa(q, repeated(k), repeated(v)), (False, None)),
    "enable_gqa": (lambda tri, q, k, v, am: sdpa(q, k, v, is_causal=True, enable_gqa=True), (True, None)),
    "padding only": (
        lambda tri, q, k, v, am: sdpa(q, repeated(k), repeated(v), padded(am)),
        (False, "attention_mask"),
    ),
    "repeat_interleave": (
        lambda tri, q, k, v, am: sdpa(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), causal(k) & padded(am), scale=0.5
        ),
        (True, "attention_mask"),
    ),
    "additive mask": (
        lambda tri, q, k, v, am: sdpa(
            q, repeated(k), repeated(v), torch.where(causal(k) & padded(am), 0.0, LOWEST).expand(am.shape[0], 1, -1, -1)
        ),
        (True, "attention_mask"),
    ),
    "written out": (
        lambda tri, q, k, v, am: (
            F.softmax(
                q @ repeated(k).transpose(2, 3) * SCALE + torch.where(causal(k) & padded(am), 0.0, LOWEST),
                dim=-1,
                dtype=torch.float32,
            ).to(q.dtype)
            @ repeated(v)
        ),
        (True, "attention_mask"),
    ),
    "divided, mask first": (
        lambda tri, q, k, v, am: (
            (torch.zeros(()).masked_fill(~causal(k), LOWEST) + q @ repeated(k).mT / 2.0).softmax(3) @ repeated(v)
        ),
        (True, None),
    ),
    "filled with the lowest": (
        lambda tri, q, k, v, am: (
            (q @ repeated(k).mT).masked_fill(~causal(k), LOWEST).masked_fill(~padded(am), LOWEST).softmax(-1)
            @ repeated(v)
        ),
        (True, "attention_mask"),
    ),
    "triangle in a buffer": (
        lambda tri, q, k, v, am: (
            torch.where(tri[: q.shape[2], : q.shape[2]], q @ repeated(k).mT, LOWEST).softmax(-1) @ repeated(v)
        ),
        (True, None),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_attention(name):
    function, (is_causal, key_mask) = FORMS[name]
    gone = (aten.scaled_dot_product_attention.default, aten.softmax.int, aten.expand.default, aten.matmul.default)
    named = check(function, gone=gone, present={attention: 1})
    assert meaning(named) == (is_causal, key_mask, False)
    assert [sizes(named[name])[1] for name in "qkv"] == [H, G, G]


def test_one_head_of_keys_for_all_queries():
    named = check(lambda tri, q, k, v, am: sdpa(q, k.expand(-1, H, -1, -1), repeated(v), is_causal=True), groups=1)
    assert [sizes(named[name])[1] for name in "kv"] == [1, 1]


def test_scales():
    def scale(**options):
        return check(lambda tri, q, k, v, am: sdpa(q, repeated(k), repeated(v), **options))["scale"]

    assert scale() == SCALE
    assert scale(scale=0.25) == 0.25
    named = check(lambda tri, q, k, v, am: (q @ repeated(k).mT * 3 / 2).softmax(-1) @ repeated(v))
    assert named["scale"] == 1.5


def window(k: Tensor) -> Tensor:
    place = torch.arange(k.shape[-2])
    return place[None, :] > place[:, None] - 3


WINDOWS = {
    "and causal": lambda tri, q, k, v, am: sdpa(q, repeated(k), repeated(v), causal(k) & window(k)),
    "of rank 2": lambda tri, q, k, v, am: sdpa(q, repeated(k), repeated(v), window(k) & causal(k)[0, 0]),
    "in two masks": lambda tri, q, k, v, am: (
        (q @ repeated(k).mT + torch.where(causal(k), 0.0, LOWEST)).masked_fill(~window(k), LOWEST).softmax(-1)
        @ repeated(v)
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_an_argument(name):
    named = check(WINDOWS[name])
    assert (meaning(named), named["window"]) == ((True, None, False), 3)


MISSES = {
    "a bias that depends on the data": (
        lambda tri, q, k, v, am: sdpa(q, repeated(k), repeated(v), (q @ repeated(k).mT).sin()),
        "is not index arithmetic",
    ),
    "a bias and a window": (
        lambda tri, q, k, v, am: (
            (q @ repeated(k).mT + (q @ repeated(k).mT).sin())
            .masked_fill(~window(k), LOWEST)
            .masked_fill(~causal(k), LOWEST)
            .softmax(-1)
            @ repeated(v)
        ),
        "is not index arithmetic",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_masks_that_are_not_understood_stay_operands(name):
    function, reason = MISSES[name]
    named = check(function, misses=(reason,))
    assert named["mask"] is not None
    assert len(sizes(named["mask"])) == 4


ALONE = {
    "dropout": (lambda tri, q, k, v, am: sdpa(q, repeated(k), repeated(v), dropout_p=1e-9), "dropout"),
    "softmax over queries": (
        lambda tri, q, k, v, am: (q @ repeated(k).mT).softmax(-2) @ repeated(v),
        "not over the keys",
    ),
    "another order": (
        lambda tri, q, k, v, am: (
            ((q @ repeated(k).mT + torch.where(causal(k), 0.0, LOWEST)) * 0.5).softmax(-1) @ repeated(v)
        ),
        "scaled after the mask",
    ),
    "no product": (lambda tri, q, k, v, am: q.exp().softmax(-1) @ q.mT.contiguous().mT.mT @ q, "exp"),
}


@pytest.mark.parametrize("name", ALONE)
def test_near_misses_are_left_alone(name):
    function, reason = ALONE[name]
    check(function, matches=0, misses=(reason,))


def tables(x: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.arange(x.shape[2])[:, None] * torch.arange(1, D + 1) / 7
    return angles.cos()[None], angles.sin()[None]


def rope(x: Tensor) -> Tensor:
    return torch.ops.effc.rope(x, *tables(x))


def repeated_before_heads(x: Tensor) -> Tensor:
    """[B, G, T, D] --> [B, H, T, D], with the repeat beside the heads of [B, T, G, 1, D] (Falcon)."""
    b, g, t, d = x.shape
    return x.transpose(1, 2).unsqueeze(3).expand(b, t, g, H // g, d).reshape(b, t, H, d).transpose(1, 2)


BEFORE = {
    "rope": lambda x: rope(repeated(x)),
    "rope, tokens first": lambda x: rope(repeated_before_heads(x)),
    "norm and rope": lambda x: rope(torch.ops.effc.rms_norm(repeated(x), None, 1e-5)),
    "a cast": lambda x: repeated(x.double()).float(),
    "nothing, tokens first": repeated_before_heads,
}


@pytest.mark.parametrize("name", BEFORE)
def test_heads_are_repeated_before_something_done_to_each(name):
    named = check(lambda tri, q, k, v, am: sdpa(q, BEFORE[name](k), BEFORE[name](v), is_causal=True), gone=(EXPAND,))
    assert [sizes(named[letter])[1] for letter in "qkv"] == [H, G, G]


NOT_ALIKE = {
    "scaled by head": lambda x: repeated(x) * torch.arange(1, H + 1)[:, None, None],
    "rotated, tiled": lambda x: rope(x.repeat(1, H // G, 1, 1)),
    "tiled": lambda x: x.repeat(1, H // G, 1, 1),
    "groups in turn": lambda x: x.unsqueeze(1).expand(-1, H // G, -1, -1, -1).flatten(1, 2),
}


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_heads_that_are_not_alike_in_a_group_are_left_alone(name):
    named = check(lambda tri, q, k, v, am: sdpa(q, NOT_ALIKE[name](k), repeated(v), is_causal=True))
    assert [sizes(named[letter])[1] for letter in "qkv"] == [H, H, H]


@pytest.mark.parametrize(
    "family", ["Llama", "GPT2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Gemma", "GPTJ", "GPTNeoX"))]
)
def test_every_layer_of_a_model(family):
    graph = traced(family)[1].copy()
    normalize(graph)
    result = fuse_attention(graph)
    assert (result.matches, result.misses) == (2, [])
    for node in graph.nodes:
        assert squares(node, graph) == 0
        if node.target is attention:
            assert meaning(arguments(node)) == (True, "attention_mask", False)


def test_the_windowed_layers_of_a_model_have_a_window():
    result = fuse_attention(graph := trace(tiny_model("Mistral", sliding_window=4)))
    assert (result.matches, result.misses) == (2, [])
    assert [arguments(node)["window"] for node in graph.nodes if node.target is attention] == [4, 4]


def test_a_key_mask_of_a_longer_context_is_cut_to_the_keys():
    """One new token over a cache that grew by concatenation, as `generate` has it under torch.compile."""

    def decode(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        k = torch.cat((y, x[:, :G]), dim=2)
        place = torch.arange(k.shape[2])
        row = torch.arange(x.shape[0])[:, None, None, None]
        visible = (place <= y.shape[2])[None, None, None, :] & z.bool()[row, place[None, None, None, :]]
        return sdpa(x, k, k, visible, enable_gqa=True)

    past = 5
    inputs = example(B, H, 1, D), example(B, G, past, D, seed=1), torch.ones(B, 9, dtype=torch.int64)
    inputs[2][0, 1] = 0
    graph = static_graph(decode, *inputs)
    graph = check_pass(fuse_attention, graph, nn.Module(), inputs, matches=1, present={attention: 1})
    (named,) = (arguments(node) for node in graph.nodes if node.target is attention)
    assert (named["causal"], named["mask"]) == (False, None)
    assert sizes(named["key_mask"]) == (B, past + 1)


def static_graph(function, *inputs: Tensor) -> Graph:
    """The normalized graph of a function with inputs x, y, z of fixed sizes."""
    graph = Graph(make_fx(lambda *given: (function(*given),), tracing_mode="fake", pre_dispatch=True)(*inputs))
    name_inputs(graph, "xyz")
    normalize(graph)
    return graph


def test_tables_of_a_mask_that_became_all_ones_are_written_out():
    """BLOOM counts the keys that are visible so far; without padding that is the key's place."""

    def alibi(tri: Tensor, q: Tensor, k: Tensor, v: Tensor, am: Tensor) -> Tensor:
        slopes = torch.full((), 0.5) ** torch.arange(1, 1 + H)
        bias = slopes[:, None, None] * am.cumsum(-1)[:, None, None, :]
        return sdpa(q, repeated(k), repeated(v), bias.masked_fill(~(causal(k) & padded(am)), LOWEST))

    graph, inputs = traced_function(alibi, G)
    fuse_attention(graph)
    mask = graph.placeholder("attention_mask")
    with graph.fx.inserting_after(graph.placeholders[-1]):
        ones = graph.fx.call_function(torch.ops.aten.ones_like.default, (mask,))
    ones.meta["val"] = mask.meta["val"]
    mask.replace_all_uses_with(ones, delete_user_cb=lambda user: user is not ones)
    graph = check_pass(fuse_attention, graph, nn.Module(), inputs, matches=1)
    (named,) = (arguments(node) for node in graph.nodes if node.target is attention)
    assert (named["causal"], named["key_mask"], named["bias"]) == (True, None, "t0[h] * k")
