"""EFFC_VERIFY: what a pass got wrong is found, named, and shown by a script; what is right passes."""

from __future__ import annotations

import math
import runpy

import pytest
import torch
from effc.compiler.equivalence import check
from effc.compiler.graph import Graph
from effc.compiler.rewrite import PassResult, insert, replace
from effc.compiler.verify import VerificationError
from effc.compiler.weights import Concat, Read
from effc.passes import PASSES, pipeline
from effc.passes.fuse_attention import fuse_attention
from effc.passes.fuse_norm import fuse_norm
from effc.passes.materialize_kv import materialize_kv
from torch import Tensor, nn

from .families import tiny_model, traced
from .pass_checks import example, graph_of

aten, effc = torch.ops.aten, torch.ops.effc


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y.abs()) + y


def two_linears(dtype: torch.dtype = torch.float32) -> Graph:
    return graph_of(TwoLinears().to(dtype), example(2, 5, 8, dtype=dtype))


def after(graph: Graph, change) -> Graph:
    changed = graph.copy()
    change(changed)
    return changed


def only(graph: Graph, target) -> torch.fx.Node:
    return next(node for node in graph.nodes if node.target is target)


@pytest.mark.parametrize(
    "family", ["Llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("GPT2", "Gemma2"))]
)
def test_the_passes_keep_every_value(family, monkeypatch):
    monkeypatch.setenv("EFFC_VERIFY", "1")
    _, report = pipeline.run(traced(family)[1])
    assert [step.checked.unchecked for step in report.steps] == [[]] * len(PASSES)
    assert report.steps[0].checked.changes > 10
    assert "verified: fuse_norm: " in str(report)


def test_without_the_variable_nothing_is_interpreted(monkeypatch):
    monkeypatch.setenv("EFFC_VERIFY", "0")
    _, report = pipeline.run(traced()[1], ["normalize"])
    assert report.steps[0].checked is None


def fuse_attention_without_its_mask(graph: Graph) -> PassResult:
    result = fuse_attention(graph)
    node = [node for node in graph.nodes if node.target is effc.attention.default][-1]
    node.args = (*node.args[:4], False, *node.args[5:])
    return result


def test_a_wrong_rewrite_is_named_with_its_node_and_shown_by_a_script(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EFFC_VERIFY", "1")
    passes = ["normalize", "fuse_norm", "fuse_rope", fuse_attention_without_its_mask]
    with pytest.raises(VerificationError) as error:
        pipeline.run(traced()[1], passes, dump=tmp_path)
    text = str(error.value)
    assert text.startswith("after fuse_attention_without_its_mask: graph forward, node attention_1 (effc.attention")
    assert " from modeling_llama.py:" in text
    assert "expected the value that scaled_dot_product_attention_1 had before, found off by up to" in text
    (script,) = tmp_path.glob("*.py")
    assert f"python {script} shows it" in text
    assert script.read_text().count("effc.attention.default(") == 1
    assert "q_proj" not in script.read_text()
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()[-2:]
    assert [float(line.split()[-1]) > 0.01 for line in printed] == [True, True]


def test_layers_that_are_alike_are_looked_at_once():
    from effc.compiler.trace import trace
    from effc.passes.normalize import normalize

    found = []
    for layers in (2, 3):
        graph = trace(tiny_model(num_hidden_layers=layers))
        normalize(graph)
        found.append(check(graph, after(graph, fuse_norm), "fuse_norm").changes)
    assert found[0] == found[1] >= 1


def test_what_follows_from_the_values_before_is_no_difference():
    """abs(y) is y only because y is a relu, which stays: cut there, the change would look wrong."""

    def drop_abs(graph: Graph) -> None:
        node = only(graph, aten.abs.default)
        replace(graph, node, node.args[0])

    graph = two_linears()
    assert check(graph, after(graph, drop_abs), "drop_abs").unchecked == []


def test_another_scalar_is_found():
    def widen(graph: Graph) -> None:
        node = only(graph, aten.add.Tensor)
        replace(graph, node, insert(graph, node, aten.add.Tensor, *node.args, alpha=1 + 1e-6))

    graph = two_linears()
    with pytest.raises(VerificationError, match=r"after widen: graph forward, node add_1 .*off by up to .* in fp64"):
        check(graph, after(graph, widen), "widen")


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float8_e5m2)])
def test_rounding_where_eager_does_not_is_found(dtype, low):
    def round_twice(graph: Graph) -> None:
        node = only(graph, aten.abs.default)
        short = insert(graph, node, aten._to_copy.default, node.args[0], dtype=low)
        wide = insert(graph, node, aten._to_copy.default, short, dtype=dtype)
        replace(graph, node, insert(graph, node, aten.abs.default, wide))

    graph = two_linears(dtype)
    with pytest.raises(VerificationError, match="rounding errors up to"):
        check(graph, after(graph, round_twice), "round_twice")


def test_another_dtype_or_shape_is_found():
    def narrow(graph: Graph) -> None:
        node = only(graph, aten.abs.default)
        replace(graph, node, insert(graph, node, aten._to_copy.default, node.args[0], dtype=torch.float64))

    graph = two_linears()
    with pytest.raises(VerificationError, match=r"found float64\[2, 5, 8\] instead of float32|an error"):
        check(graph, after(graph, narrow), "narrow")


def test_weights_joined_in_the_wrong_order_are_found(tmp_path):
    def join(graph: Graph, names: tuple[str, ...]) -> None:
        node = graph.placeholder("a_weight")
        parts = [Read(name, (4, 8), torch.float32) for name in names]
        graph.weights[node.name] = Concat(tuple(parts), 0)

    graph = two_linears()
    right = after(graph, lambda g: join(g, ("upper", "lower")))
    wrong = after(graph, lambda g: join(g, ("lower", "upper")))
    assert check(right, right.copy(), "join").changes == 0
    with pytest.raises(VerificationError, match="node a_weight"):
        check(right, wrong, "join", tmp_path)
    (script,) = tmp_path.glob("*.py")
    assert "Concat((Read('lower', (4, 8), torch.float32), Read('upper'" in script.read_text()
    show = runpy.run_path(str(script))
    assert show["before"](**show["inputs"]()).shape == (8, 8)


def test_what_cannot_be_run_is_said():
    def touch(graph: Graph) -> None:
        node = only(graph, aten.abs.default)
        replace(graph, node, insert(graph, node, aten.abs.default, node.args[0]))

    graph = two_linears()
    only(graph, aten.relu.default).args = (only(graph, aten.relu.default).args[0], "not an argument")
    only(graph, aten.abs.default).args = (only(graph, aten.relu.default), "nor this")
    (reason,) = check(graph, after(graph, lambda g: fix(g, touch)), "touch").unchecked
    assert reason.startswith("abs_")


def fix(graph: Graph, change) -> None:
    node = only(graph, aten.abs.default)
    node.args = node.args[:1]
    change(graph)


def test_infinities_must_stand_where_they_stood():
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x > 0, -math.inf).softmax(-1)

    def finite(graph: Graph) -> None:
        node = only(graph, aten.masked_fill.Scalar)
        replace(graph, node, insert(graph, node, aten.masked_fill.Scalar, *node.args[:2], -1e9))

    graph = graph_of(Masked(), example(2, 5, 8))
    with pytest.raises(VerificationError, match="NaN or infinity in other places"):
        check(graph, after(graph, finite), "finite")


@pytest.mark.parametrize("kind", ["prefill", "extend", "decode"])
def test_a_cache_gives_the_logits_of_the_graph_without_one(kind, monkeypatch):
    def forget_the_first_token(graph: Graph) -> Graph:
        cached = materialize_kv(graph, kind)
        for node in list(cached.nodes):
            if node.target is effc.cached_attention.default:
                visible = insert(cached, node, node.target, *node.args, **node.kwargs | {"visible": "k >= 1"})
                replace(cached, node, visible)
        return cached

    monkeypatch.setenv("EFFC_VERIFY", "1")
    fused, _ = pipeline.run(traced()[1])
    _, report = pipeline.run(fused, pipeline.cached(kind))
    assert (report.steps[0].checked.changes, report.steps[0].checked.unchecked) == (1, [])
    unpadded, _ = pipeline.run(fused, pipeline.UNPADDED)
    with pytest.raises(VerificationError, match=f"graph {kind}: expected the logits of the graph without a cache"):
        pipeline.run(unpadded, [forget_the_first_token])
