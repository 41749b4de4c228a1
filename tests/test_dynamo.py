"""Dynamo graphs, through the interpreter: torch.compile with a backend that traces, fuses and interprets."""

import pytest
import torch
from effc.compiler.dynamo import trace_dynamo
from effc.compiler.errors import ModelError
from effc.compiler.graph import Graph, writes
from effc.compiler.interpret import run
from effc.compiler.verify import verify
from effc.compiler.weights import Read
from effc.passes import run as run_passes
from torch import nn

from .families import example_inputs, tiny_model


class Arguments:
    """The tensors of one call as a source of weights."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.names = tuple(tensors)

    def read(self, name):
        return self.tensors[name].detach()


class Backend:
    """Interprets what was traced, after all passes; keeps the traced graphs."""

    def __init__(self):
        self.graphs: list[Graph] = []
        self.fused: list[Graph] = []

    def __call__(self, gm, example_inputs):
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        graph = trace_dynamo(gm)
        verify(graph)
        fused, _ = run_passes(graph)
        self.graphs.append(graph)
        self.fused.append(fused)

        def call(*values):
            given = dict(zip(names, values))
            return run(fused, {name: given[name] for name in fused.inputs}, Arguments(given))

        return call


@pytest.fixture
def backend():
    torch._dynamo.reset()
    with torch.no_grad():
        yield Backend()


def test_a_language_model_at_several_lengths(backend):
    model = tiny_model()
    compiled = torch.compile(model, backend=backend)
    for length in (7, 9, 12, 5):
        input_ids = example_inputs(2, length, seed=length)["input_ids"]
        error = (compiled(input_ids).logits - model(input_ids).logits).abs().max()
        assert error < 1e-5, f"length {length}"
    assert len(backend.graphs) == 2
    static, dynamic = backend.graphs
    assert len(static.inputs) == 1
    assert len(dynamic.inputs) == 2  # the length comes as a SymInt
    reads = [recipe for recipe in static.weights.values() if isinstance(recipe, Read)]
    assert len(reads) == len(dict(model.named_parameters())) + 1  # and inv_freq
    assert backend.fused[0].count(torch.ops.effc.attention.default) == 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_a_cache_gives_the_same_tokens(backend, cache):
    model = tiny_model()
    prompt = example_inputs(1, 5)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = model.generate(prompt, **options)
    model.forward = torch.compile(model.forward, backend=backend)
    assert torch.equal(model.generate(prompt, **options), expected)
    decode = backend.graphs[-1]
    written = [node for node in decode.nodes if writes(node)]
    in_place = [node for node in written if node.target == torch.ops.aten.index_copy_.default]
    assert len(in_place) == (4 if cache == "static" else 0)
    assert all(node.args[0].op == "placeholder" for node in in_place)


class Counter(nn.Module):
    """Updates a buffer in place, and writes into a slice of a fresh tensor."""

    def __init__(self):
        super().__init__()
        self.scale = 0.5
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, 1:] * self.scale
        return y + self.calls


def test_writes_reach_the_buffer_and_slices_are_functionalized(backend):
    model, reference = Counter().eval(), Counter().eval()
    compiled = torch.compile(model, backend=backend)
    x = torch.arange(12.0).reshape(3, 4)
    for _ in range(3):
        assert torch.equal(compiled(x), reference(x))
    assert model.calls == 3
    (graph,) = backend.graphs
    assert [node.target for node in graph.nodes if writes(node)] == [torch.ops.aten.copy_.default]
    assert not graph.weights


def test_a_dynamic_float_is_fixed_to_its_value_and_guarded(backend):
    model = Counter().eval()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    x = torch.ones(3, 4)
    for scale in (0.5, 0.25):
        model.scale = scale
        assert (compiled(x) - model.calls)[0, 1] == scale
    assert all(name != "item" for graph in backend.graphs for name in graph.inputs)
    assert len(backend.graphs) == 2


def test_two_outputs_stay_two_tensors(backend):
    compiled = torch.compile(lambda x: (x.new_zeros(2), x.new_zeros(2), x.clone()), backend=backend)
    x = torch.ones(2)
    first, second, copy = compiled(x)
    first += 1
    copy += 1
    assert second.tolist() == [0, 0]
    assert x.tolist() == [1, 1]


def test_models_that_are_not_language_models(backend):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))


def test_control_flow_is_refused_in_one_line(backend):
    def branch(x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        torch.compile(branch, backend=backend)(torch.ones(3))
    assert isinstance(error.value.inner_exception, ModelError)
    assert "calls a graph of its own" in str(error.value.inner_exception)


def gelu_of_what_it_doubles(x):
    half, gate = x * 0.5, 1 + torch.erf(x / 2**0.5)
    x.mul_(2)
    return half * gate + x


def copies_of_what_it_doubles(x):
    copies = x + 0, x * 1, x.double().float(), torch.cat([x]), x.clone()[0]
    x.mul_(2)
    return copies


@pytest.mark.parametrize("function", [gelu_of_what_it_doubles, copies_of_what_it_doubles])
def test_passes_do_not_move_reads_behind_writes(backend, function):
    given = torch.linspace(-2, 2, 12).reshape(3, 4)
    x, y = given.clone(), given.clone()
    expected, found = function(x), torch.compile(function, backend=backend)(y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(y, x)
    memory = [tensor.data_ptr() for tensor in (found if isinstance(found, tuple) else (found,))]
    assert y.data_ptr() not in memory
    assert len(set(memory)) == len(memory)
