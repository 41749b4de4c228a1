import pytest
import torch
from effc.compiler.graph import Graph
from effc.compiler.interpret import run
from effc.compiler.show import count_ops
from effc.compiler.sources import ModuleSource
from effc.compiler.verify import verify
from effc.compiler.weights import Constant
from effc.passes.cleanup import cleanup
from effc.passes.normalize import normalize
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from .families import SIZES, example_inputs, traced, worst_error

BATCH, LENGTH = 2, 6


def graph_of(function, *inputs: torch.Tensor) -> Graph:
    """The ATen graph of a function of tensors, composite ops kept, sizes known."""
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    graph = Graph(module)
    (output,) = (node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], (list, tuple)):
        output.args = ((output.args[0],),)
    return graph


def check(function, inputs, expected: dict[str, int]) -> Graph:
    """Normalize; the calls are those expected, the result is bit-equal, and a second run finds nothing to do."""
    graph = graph_of(function, *inputs)
    normalize(graph)
    verify(graph)
    assert count_ops(graph) == expected
    wanted = function(*inputs)
    (found, *_) = run(graph, dict(zip(graph.inputs, inputs)))
    assert torch.equal(found, wanted)
    assert found.dtype == wanted.dtype
    assert normalize(graph).matches == 0
    return graph


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(dtype)


SAME = [
    ("reshapes", lambda x: torch.relu(x.view(3, -1).reshape(12).unflatten(0, (4, 3)).flatten()), {"reshape": 1}),
    ("reshape there and back", lambda x: torch.relu(x.reshape(-1).view(BATCH, LENGTH)), {}),
    ("transposes", lambda x: torch.relu(x[None].transpose(1, 2).mT.permute(0, 2, 1)), {"unsqueeze": 1, "permute": 1}),
    ("transpose there and back", lambda x: torch.relu(x.t().transpose(-1, -2)), {}),
    ("a cast to its own type", lambda x: torch.relu(x.to(torch.float32).type_as(x).float()), {}),
    ("copies", lambda x: torch.relu(x.clone().contiguous().detach()), {}),
    ("dropout in eval", lambda x: torch.relu(F.dropout(x, 0.5, training=False)), {}),
    ("neutral elements", lambda x: torch.relu((x + 0) * 1.0 / 1 - 0), {}),
    ("whole slices", lambda x: torch.relu(x[:, :][:, 0:][0:BATCH]), {}),
    ("expand to its own size", lambda x: torch.relu(x.expand(BATCH, -1)), {}),
    ("an open slice", lambda x: torch.relu(x[:, -4:]), {"slice": 1}),
    ("split", lambda x: torch.relu(x.split(4, dim=-1)[1]), {"slice": 1}),
    ("chunk", lambda x: torch.relu(x.chunk(2, dim=1)[0]), {"slice": 1}),
    ("unbind", lambda x: torch.relu(x.unbind(0)[1]), {"select": 1}),
    ("cat with nothing", lambda x: torch.relu(torch.cat([x.new_empty(0), x, x[:0]])), {}),
    ("equal calls", lambda x: torch.relu(torch.sin(x) + torch.sin(x)), {"sin": 1, "add": 1}),
    ("dead code", lambda x: (torch.cos(x), torch.relu(x))[1], {}),
    ("squares", lambda x: torch.relu(torch.square(x) + x * x + x**2.0), {"pow": 1, "add": 2}),
    ("powers of one half", lambda x: torch.relu(x.abs() ** -0.5), {"abs": 1, "rsqrt": 1}),
    ("a number as a tensor", lambda x: torch.relu(x / torch.full((), 3.0)), {"div": 1}),
    ("rows", lambda x: torch.relu(x.index_select(0, x[:, 0].argsort())), {"select": 1, "argsort": 1, "embedding": 1}),
    ("columns", lambda x: x.index_select(1, x[0].argsort()).relu(), {"select": 1, "argsort": 1, "index_select": 1}),
]


@pytest.mark.parametrize(("function", "rest"), [case[1:] for case in SAME], ids=[case[0] for case in SAME])
def test_one_spelling_is_left(function, rest):
    check(function, [x()], {"relu": 1, **rest})


LEFT_ALONE = [
    ("a cast that rounds", lambda x: x.bfloat16().float(), [x()], {"_to_copy": 2}),
    ("a sum that promotes", lambda x: x + 0.0, [torch.arange(3)], {"add": 1}),
    ("a sum that broadcasts", lambda x, y: x + torch.zeros_like(y) * 0, [x(1, 3), x(2, 3)], None),
    ("a product of two tensors", lambda x, y: x * y, [x(3), x(2, 3)], {"mul": 1}),
    ("a slice with a step", lambda x: x[:, ::2], [x()], {"slice": 1}),
    ("dropout in training", lambda x: F.dropout(x, 0.0, training=True), [x()], {"dropout": 1}),
    ("an integer square of floats", lambda x: x**3.5, [x().abs()], {"pow": 1}),
    ("a wide number", lambda x: x * torch.full((), 3.0, dtype=torch.float64), [torch.arange(3)], {"full": 1, "mul": 1}),
]


@pytest.mark.parametrize(
    ("function", "inputs", "rest"), [case[1:] for case in LEFT_ALONE], ids=[c[0] for c in LEFT_ALONE]
)
def test_near_misses_are_left_alone(function, inputs, rest):
    rest = count_ops(graph_of(function, *inputs)) if rest is None else rest
    check(function, inputs, rest)


def test_a_cast_there_and_back_without_loss_goes():
    graph = check(lambda x: torch.relu(x.float().bfloat16()), [x(dtype=torch.bfloat16)], {"relu": 1})
    assert graph.count(torch.ops.aten._to_copy.default) == 0


def test_dimensions_count_from_the_front_and_defaults_go():
    def function(x):
        return torch.cat([x.mean(-1, keepdim=True), F.linear(x, x, None)], -1)

    graph = check(function, [x()], {"mean": 1, "linear": 1, "cat": 1})
    args = {node.name: node.args for node in graph.nodes}
    assert args["mean"][1:] == ([1], True)
    assert args["cat"][1:] == (1,)
    assert len(args["linear"]) == 2


def test_booleans_are_combined_bitwise():
    function = lambda x: torch.logical_and(x > 0, ~(x > 1)) & torch.logical_not(x == 0.5)  # noqa: E731
    check(function, [x()], {"gt": 2, "eq": 1, "bitwise_not": 2, "bitwise_and": 2})


def test_a_copy_that_the_caller_gets_of_its_own_input_stays():
    graph = graph_of(lambda x: x.clone(), x())
    normalize(graph)
    assert count_ops(graph) == {"clone": 1}


def test_sizes_are_read_from_the_first_input_or_known():
    model, graph = traced()
    graph = graph.copy()
    normalize(graph)
    verify(graph)
    sizes = [node for node in graph.nodes if node.target == torch.ops.aten.sym_size.int]
    assert [node.args[0].name for node in sizes] == ["input_ids", "input_ids"]
    assert {node.args[1] for node in sizes} == {0, 1}
    assert "_assert_tensor_metadata" not in count_ops(graph)
    for batch, length in SIZES:
        assert worst_error(graph, model, example_inputs(batch, length)) == 0.0


@pytest.mark.parametrize("family", ["Gemma", "GPT2", "Bloom", "Phi3", "GPTJ", "GPTNeoX"])
def test_other_families_stay_equal_and_a_second_run_matches_nothing(family):
    model, graph = traced(family)
    graph = graph.copy()
    assert normalize(graph).matches > 0
    verify(graph)
    assert normalize(graph).matches == 0
    assert cleanup(graph).matches == 0
    assert worst_error(graph, model, example_inputs(2, 5)) == 0.0


def test_weights_with_one_recipe_become_one():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 4)
            self.register_buffer("left", torch.arange(4.0), persistent=False)
            self.register_buffer("right", torch.arange(4.0), persistent=False)

        def forward(self, input_ids):
            return torch.sin(self.table(input_ids) * self.left) + torch.sin(self.table(input_ids) * self.right)

    from effc.compiler.trace import trace

    model = Twins().eval()
    graph = trace(model)
    cleanup(graph)
    assert sum(isinstance(recipe, Constant) for recipe in graph.weights.values()) == 1
    assert count_ops(graph)["sin"] == 1
    ids = torch.tensor([[1, 3]])
    assert torch.equal(run(graph, {"input_ids": ids}, ModuleSource(model))[0], model(ids))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([-2, -1], {"slice": 1}),
        ([3], {"slice": 1}),
        ([0, 1, 2, 3, 4, 5], {}),
        ([1, 3], {"index": 1}),
        ([2, 1], {"index": 1}),
        ([1, 1], {"index": 1}),
    ],
)
def test_an_index_by_consecutive_numbers_is_a_slice(entries, expected):
    at = torch.tensor(entries)
    graph = graph_of(lambda x, at: torch.relu(x[:, at]), x(), at)
    graph.weights[graph.placeholders[1].name] = Constant.of(at)
    result = normalize(graph)
    verify(graph)
    assert {name: count for name, count in count_ops(graph).items() if name != "relu"} == expected
    assert bool(result.misses) == ("index" in expected)
    (found,) = run(graph, {graph.inputs[0]: x()})
    assert torch.equal(found, torch.relu(x()[:, at]))
    assert normalize(graph).matches == 0
