"""The op vocabulary: each op has a reference, a shape rule, a cost and a kernel, and they fit each other."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import sympy
import torch
from effc.codegen.table import has_kernel
from effc.compiler.activation_formats import ACTIVATION_FORMATS, quantize_rows
from effc.compiler.formats import FORMATS
from effc.compiler.graph import Graph
from effc.compiler.ops import ACTIVATIONS, LEGAL, OPS, Cost, op_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

effc = torch.ops.effc
FLOATS = (torch.float32, torch.bfloat16, torch.float64)


@dataclass
class Sizes:
    """Random sizes by the letters of `compiler/ops.py`, and tensors of them."""

    generator: torch.Generator
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.B, self.S, self.G = (self.integer(1, 4) for _ in range(3))
        self.H = self.G * self.integer(1, 4)
        self.T = self.S + self.integer(1, 6)
        self.D, self.R = 2 * self.integer(4, 9), 2 * self.integer(1, 4)
        self.K, self.N = self.integer(3, 20), self.integer(3, 20)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    @property
    def past(self) -> Tensor:
        return torch.randint(self.T - self.S + 1, (self.B,), generator=self.generator)

    @property
    def key_mask(self) -> Tensor:
        return torch.rand(self.B, self.T, generator=self.generator) > 0.3


Arguments = tuple[object, ...]
"""What an op is called with; a dict at the end holds arguments by keyword."""

SCORES: dict[str, Callable[[Sizes], dict[str, object]]] = {
    "window": lambda z: {"window": 2},
    "softcap": lambda z: {"softcap": 2.0},
    "sinks": lambda z: {"sinks": z.tensor(z.H), "window": 3},
    "bias": lambda z: {"bias": "t0[h] * (k - q)", "tables": [z.tensor(z.H)]},
    "documents": lambda z: {"visible": "t0[b, q] == t0[b, k]", "tables": [z.past[:, None] + torch.arange(z.T) // 3]},
}
"""Arguments that both attention ops share."""

CASES: dict[str, dict[str, Callable[[Sizes], Arguments]]] = {
    "rms_norm": {
        "scaled": lambda z: (z.tensor(z.B, z.S, z.K), z.tensor(z.K), 1e-5),
        "plain": lambda z: (z.tensor(z.B, z.S, z.K), None, 1e-6),
        "scaled in fp32": lambda z: (z.tensor(z.B, z.S, z.K), z.tensor(z.K), 1e-5, True),
    },
    "rope": {
        "halves": lambda z: (z.tensor(z.B, z.H, z.S, z.D), z.tensor(z.B, z.S, z.D), z.tensor(z.B, z.S, z.D)),
        "partial": lambda z: (z.tensor(z.B, z.H, z.S, z.D), z.tensor(1, z.S, z.R), z.tensor(1, z.S, z.R)),
        "interleaved": lambda z: (z.tensor(z.B, z.H, z.S, z.D), z.tensor(1, z.S, z.R), z.tensor(1, z.S, z.R), True),
    },
    "linear": {
        "plain": lambda z: (z.tensor(z.B, z.S, z.K), z.tensor(z.N, z.K)),
        **{
            f"bias, residual, {name}": lambda z, name=name: (
                z.tensor(z.B, z.S, z.K), z.tensor(z.N, z.K), z.tensor(z.N), z.tensor(z.B, z.S, z.N), name
            )
            for name in ACTIVATIONS
        },
    },
    "gated_linear": {
        "silu": lambda z: (z.tensor(z.B, z.S, z.K), z.tensor(2 * z.N, z.K)),
        "bias, gelu": lambda z: (z.tensor(z.B, z.S, z.K), z.tensor(2 * z.N, z.K), z.tensor(2 * z.N), "gelu"),
    },
    "attention": {
        "causal": lambda z: (*queries_and_keys(z, z.S), 0.3, True),
        "padded": lambda z: (*queries_and_keys(z, z.T), 0.3, False, z.key_mask),
        "masked": lambda z: (*queries_and_keys(z, z.T), 0.3, False, None, z.tensor(z.B, 1, z.S, z.T) > 0),
        "biased": lambda z: (*queries_and_keys(z, z.T), 0.3, False, None, z.tensor(1, z.H, z.S, z.T)),
        **{name: lambda z, make=make: (*queries_and_keys(z, z.S), 0.3, True, make(z)) for name, make in SCORES.items()},
    },
    "kv_write": {
        "anywhere": lambda z: (z.tensor(z.B, z.G, z.T, z.D), z.tensor(z.B, z.G, z.S, z.D), z.past),
    },
    "cached_attention": {
        "plain": lambda z: (*queries_and_keys(z, z.T), z.past, 0.3),
        **{
            name: lambda z, make=make: (*queries_and_keys(z, z.T), z.past, 0.3, make(z))
            for name, make in SCORES.items()
        },
    },
    "top_k": {
        "two": lambda z: (z.tensor(z.B, z.S, z.K), 2),
    },
    "experts": {
        "gated": lambda z: (
            z.tensor(z.B, z.S, z.D), *choices(z, 3), z.tensor(3, 2, z.N, z.D), z.tensor(3, z.D, z.N)
        ),
        "biased": lambda z: (
            z.tensor(z.B, z.S, z.D), *choices(z, 3), z.tensor(3, 2, z.N, z.D), z.tensor(3, z.D, z.N),
            z.tensor(3, 2, z.N), z.tensor(3, z.D), "maximum(up, -1.0) * (gate * sigmoid(gate * 1.5))",
        ),
        "without a gate": lambda z: (
            z.tensor(z.B, z.S, z.D), *choices(z, 3), z.tensor(3, 1, z.N, z.D), z.tensor(3, z.D, z.N),
            None, None, "relu(up)",
        ),
    },
    "dequantize": {
        name: lambda z, name=name: ([*FORMATS[name].quantize(z.tensor(z.N, 256 * z.B))], name, z.dtype)
        for name in ("int8", "int4_g32", "int3_g64", "q4_1", "q4_k", "nf4_g64", "fp8_e4m3")
    },
    "fake_quantize": {
        name: lambda z, name=name: (z.tensor(z.B, z.S, z.K + 30), name) for name in ACTIVATION_FORMATS
    },
    "moe": {
        "softmax of all": lambda z: (
            z.tensor(z.B, z.S, z.D), z.tensor(5, z.D), z.tensor(5, 2, z.N, z.D), z.tensor(5, z.D, z.N), 2
        ),
        "corrected sigmoids": lambda z: (
            z.tensor(z.B, z.S, z.D), z.tensor(4, z.D), z.tensor(4, 1, z.N, z.D), z.tensor(4, z.D, z.N), 3,
            z.tensor(4), z.tensor(4), z.tensor(4, 1, z.N), z.tensor(4, z.D), z.tensor(z.B, z.S, z.D),
            "sigmoid(logits)", "values + correction", "chosen / (sum(chosen) + 1e-20) * 2.5", "relu(up)",
        ),
    },
}  # fmt: skip
"""Arguments of every op, in the ways that change what it does."""

EVERY_CASE = [(name, case) for name, cases in CASES.items() for case in cases]


def queries_and_keys(z: Sizes, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return z.tensor(z.B, z.H, z.S, z.D), z.tensor(z.B, z.G, keys, z.D), z.tensor(z.B, z.G, keys, z.D)


def choices(z: Sizes, experts: int) -> tuple[Tensor, Tensor]:
    """For each token two of the experts, so that all of them are chosen by some, and their scores."""
    chosen = torch.rand(z.B, z.S, experts, generator=z.generator).topk(2).indices
    chosen.view(-1)[:experts] = torch.arange(min(experts, chosen.numel()))
    return chosen, z.tensor(z.B, z.S, 2)


@pytest.fixture(params=FLOATS, ids=str)
def sizes(request, generator) -> Sizes:
    return Sizes(generator, request.param)


def test_every_op_is_tried():
    assert set(CASES) == set(OPS), "add arguments of the new op to CASES"


WITHOUT_KERNEL = {"fake_quantize": "a linear that reads it runs on its codes: the kernel comes with those of linears"}


@pytest.mark.parametrize("name", [name for name in OPS if name not in WITHOUT_KERNEL])
def test_every_op_has_a_kernel(name):
    assert has_kernel(name), f"{name}: add a template to codegen/table.py or an emitter to codegen/pointwise.py"


@pytest.mark.parametrize("name", OPS)
def test_every_row_is_complete(name):
    op = OPS[name]
    assert op.target._schema.name == f"effc::{name}"
    assert op.mutates == op.target._schema.is_mutable == (name == "kv_write")
    assert op.reference.__doc__, "the reference says what the op computes, with shapes"


def test_every_op_is_legal_somewhere():
    assert LEGAL["traced"] == set()
    assert LEGAL["stateful"] == set(OPS)
    assert LEGAL["fused"] == set(OPS) - {"kv_write", "cached_attention"}


@pytest.mark.parametrize(("name", "case"), EVERY_CASE)
def test_shape_rule_says_what_the_reference_gives(name, case, sizes):
    arguments = CASES[name][case](sizes)
    found = call(name, clone(arguments))
    with FakeTensorMode() as mode:
        promised = call(name, fake(arguments, mode))
    assert promised.shape == found.shape
    assert promised.dtype == found.dtype == (torch.int64 if name == "top_k" else sizes.dtype)
    assert promised.stride() == found.stride()


@pytest.mark.parametrize(("name", "case"), EVERY_CASE)
def test_symbolic_sizes_stay_symbolic(name, case, generator):
    sizes = Sizes(generator)
    arguments = CASES[name][case](sizes)
    graph, hints = symbolic(name, arguments)
    (node,) = (node for node in graph.nodes if op_of(node) is OPS[name])
    found = call(name, clone(arguments))
    shape = [size if isinstance(size, int) else size.node.expr for size in node.meta["val"].shape]
    assert [int(sympy.sympify(size).subs(hints)) for size in shape] == list(found.shape)
    assert not isinstance(node.meta["val"].shape[0], int) or found.shape[0] == 1


@pytest.mark.parametrize(("name", "case"), EVERY_CASE)
def test_cost_counts_every_tensor_once(name, case, generator):
    arguments = CASES[name][case](Sizes(generator))
    cost = cost_of(name, arguments)
    found = call(name, clone(arguments))
    moved = found.nbytes + sum(value.nbytes for value in tree_leaves(arguments) if isinstance(value, Tensor))
    if name == "kv_write":
        moved = 2 * arguments[1].nbytes
    if name == "fake_quantize":
        codes, scales = quantize_rows(arguments[0], ACTIVATION_FORMATS[arguments[1]])
        moved = arguments[0].nbytes + codes.nbytes + scales.nbytes
    assert cost.bytes == moved
    assert cost.flops >= 0


def test_cost_of_linear_and_attention(generator):
    z = Sizes(generator)
    tokens = z.B * z.S
    assert cost_of("linear", CASES["linear"]["plain"](z)).flops == 2 * tokens * z.K * z.N
    assert cost_of("gated_linear", CASES["gated_linear"]["silu"](z)).flops == 2 * tokens * z.K * 2 * z.N
    assert cost_of("attention", CASES["attention"]["causal"](z)).flops == 4 * tokens * z.H * z.S * z.D


@pytest.mark.parametrize("format", ["q4_1", "int8", "q6_k", "nf4_g64"])
def test_cost_of_a_linear_is_that_of_the_parts_it_reads(format, generator):
    x = torch.randn(2, 3, 512, generator=generator)
    parts = FORMATS[format].quantize(torch.randn(10, 512, generator=generator))

    def quantized(x: Tensor, *parts: Tensor) -> tuple[Tensor]:
        weight = effc.dequantize(parts, format, torch.float32)
        return (effc.linear(effc.fake_quantize(x, "int8_g32"), weight),)

    graph = Graph(make_fx(quantized, tracing_mode="fake")(x, *parts))
    (linear,) = (node for node in graph.nodes if op_of(node) is OPS["linear"])
    codes, scales = quantize_rows(x, ACTIVATION_FORMATS["int8_g32"])
    moved = codes.nbytes + scales.nbytes + sum(part.nbytes for part in parts) + 2 * 3 * 10 * 4
    assert OPS["linear"].cost(linear) == Cost(2 * x.numel() * 10, moved)


def test_rms_norm_is_torchs(generator):
    x, weight = torch.randn(3, 5, 16, generator=generator), torch.randn(16, generator=generator)
    torch.testing.assert_close(effc.rms_norm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))


def test_rope_is_that_of_transformers(generator):
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as interleaved
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    q, angles = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 5, 4, generator=generator)
    cos, sin = (torch.cat((part, part), -1) for part in (angles.cos(), angles.sin()))
    torch.testing.assert_close(effc.rope(q, cos, sin), halves(q, q, cos, sin)[0])
    doubled = (part.repeat_interleave(2, -1) for part in (angles.cos(), angles.sin()))
    torch.testing.assert_close(effc.rope(q, *doubled, True), interleaved(q, q, cos, sin)[0])


def test_attention_is_torchs(generator):
    z = Sizes(generator)
    q, k, v = queries_and_keys(z, z.S)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(effc.attention(q, k, v, 1 / math.sqrt(z.D), True), expected)


def test_a_row_that_sees_nothing_gives_zeros(generator):
    z = Sizes(generator)
    q, k, v = queries_and_keys(z, z.T)
    hidden = torch.zeros(z.B, z.T, dtype=torch.bool)
    v[:] = float("nan")
    assert effc.attention(q, k, v, 0.3, False, hidden).eq(0).all()


def test_a_cache_gives_what_attention_over_all_keys_gives(generator):
    z = Sizes(generator)
    q, k, v = queries_and_keys(z, z.T)
    k_cache, v_cache = torch.zeros_like(k), torch.zeros_like(v)
    first = z.T - z.S
    for cache, whole in ((k_cache, k), (v_cache, v)):
        effc.kv_write(cache, whole[:, :, :first], torch.zeros(z.B, dtype=torch.int64))
        effc.kv_write(cache, whole[:, :, first:], torch.full((z.B,), first))
        assert torch.equal(cache, whole)
    q_whole = torch.cat((torch.zeros(z.B, z.H, first, z.D), q), dim=2)
    expected = effc.attention(q_whole, k, v, 0.3, True)[:, :, first:]
    past = torch.full((z.B,), first)
    torch.testing.assert_close(effc.cached_attention(q, k_cache, v_cache, past, 0.3), expected)


def call(name: str, arguments: Arguments) -> Tensor:
    named = arguments[-1] if isinstance(arguments[-1], dict) else {}
    return OPS[name].target(*arguments[: len(arguments) - bool(named)], **named)


def on_tensors(arguments: Arguments, function: Callable[[Tensor], object]) -> Arguments:
    return tree_map(lambda value: function(value) if isinstance(value, Tensor) else value, arguments)


def clone(arguments: Arguments) -> Arguments:
    return on_tensors(arguments, Tensor.clone)


def fake(arguments: Arguments, mode: FakeTensorMode) -> Arguments:
    return on_tensors(arguments, mode.from_tensor)


def symbolic(name: str, arguments: Arguments) -> tuple[Graph, dict[sympy.Symbol, int]]:
    """A graph of one op in which every size above 1 is symbolic, and what the symbols stand for."""
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    fakes = []
    for value in tree_leaves(arguments):
        if isinstance(value, Tensor):
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * value.ndim)
            fakes.append(mode.from_tensor(value, symbolic_context=context))

    def traced(*given: Tensor) -> tuple[Tensor]:
        left = iter(given)
        return (call(name, on_tensors(arguments, lambda value: next(left))),)

    with mode:
        graph = Graph(make_fx(traced, pre_dispatch=True)(*fakes))
    return graph, {symbol: int(hint) for symbol, hint in shapes.backed_var_to_val.items()}


def cost_of(name: str, arguments: Arguments) -> Cost:
    """The cost of one call, as numbers."""
    graph, hints = symbolic(name, arguments)
    (node,) = (node for node in graph.nodes if op_of(node) is OPS[name])
    cost = OPS[name].cost(node)
    return Cost(*(int(sympy.sympify(part).subs(hints)) for part in (cost.flops, cost.bytes)))
