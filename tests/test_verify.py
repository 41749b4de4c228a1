import pytest
import torch
from effc.compiler import ops  # noqa: F401  (registers torch.ops.effc)
from effc.compiler.graph import Graph
from effc.compiler.verify import VerificationError, verify
from effc.compiler.weights import Read
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten


def small_graph() -> Graph:
    """relu(x + w) with x [2, 3] and a weight w [3]."""
    nodes, mode = fx.Graph(), FakeTensorMode()
    x, w = nodes.placeholder("x"), nodes.placeholder("w")
    y = nodes.create_node("call_function", aten.add.Tensor, (x, w), name="add")
    z = nodes.create_node("call_function", aten.relu.default, (y,), name="relu")
    nodes.output((z,))
    with mode:
        for node, shape in ((x, (2, 3)), (w, (3,)), (y, (2, 3)), (z, (2, 3))):
            node.meta["val"] = torch.empty(shape)
    weights = {"w": Read("w", (3,), torch.float32)}
    return Graph(fx.GraphModule(torch.nn.Module(), nodes), weights=weights)


def node_of(graph: Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name == name)


def refused(graph: Graph, pattern: str) -> None:
    with pytest.raises(VerificationError, match=pattern) as error:
        verify(graph)
    assert "\n" not in str(error.value)


def test_a_right_graph_passes_twice():
    graph = small_graph()
    verify(graph)
    verify(graph)


def test_a_wrong_recorded_shape_is_named_with_what_the_rule_gives():
    graph = small_graph()
    node = node_of(graph, "relu")
    node.meta["val"] = node.meta["val"].new_empty(2, 4)
    refused(
        graph, r"node relu \(aten.relu.default\): expected float32\[2, 3\] by its shape rule, found float32\[2, 4\]"
    )


def test_a_wrong_dtype_is_found_after_an_earlier_verification():
    graph = small_graph()
    verify(graph)
    node = node_of(graph, "relu")
    node.meta["val"] = node.meta["val"].to(torch.float64)
    refused(graph, r"expected float32\[2, 3\] by its shape rule, found float64")


def test_arguments_that_changed_are_derived_again():
    graph = small_graph()
    verify(graph)
    node_of(graph, "relu").args = (node_of(graph, "w"),)
    refused(graph, r"node relu .*expected float32\[3\]")


def test_arguments_that_the_op_does_not_take():
    graph = small_graph()
    graph.placeholder("w").meta["val"] = graph.placeholder("w").meta["val"].new_empty(4)
    graph.weights["w"] = Read("w", (4,), torch.float32)
    refused(graph, r"node add .*arguments that its shape rule accepts, found .*length 4")


def test_a_missing_value():
    graph = small_graph()
    del node_of(graph, "add").meta["val"]
    refused(graph, r"node add .*expected float32\[2, 3\] in meta\['val'\], found nothing")


def test_a_weight_whose_recipe_has_another_shape_or_no_placeholder():
    graph = small_graph()
    graph.weights["w"] = Read("w", (5,), torch.float32)
    refused(graph, r"node w .*expected a recipe for float32\[3\], found float32\[5\]")
    graph = small_graph()
    graph.weights["lost"] = graph.weights["w"]
    refused(graph, "expected a placeholder for 'lost', found none")


def test_our_ops_are_legal_only_where_the_dialect_allows_them():
    graph = small_graph()
    node = node_of(graph, "relu")
    node.target = torch.ops.effc.rms_norm.default
    node.args = (node.args[0], graph.placeholder("w"), 1e-6)
    refused(graph, "in the traced dialect no effc op, found effc.rms_norm")
    graph.dialect = "fused"
    verify(graph)
    graph.dialect = "mystery"
    refused(graph, "expected a dialect of .*, found 'mystery'")


def test_writes_go_to_placeholders_only():
    graph = small_graph()
    node_of(graph, "relu").target = aten.relu_.default
    refused(graph, "expected an op that mutates nothing but an input, found aten.relu_.default")
    node_of(graph, "relu").args = (graph.placeholder("x"),)
    verify(graph)


def test_lint_finds_a_use_before_its_definition():
    graph = small_graph()
    node_of(graph, "relu").append(node_of(graph, "add"))
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        verify(graph)
