import pytest
import torch
from effc.compiler.errors import InputError
from effc.compiler.interpret import run
from effc.compiler.sources import ModuleSource

from .families import example_inputs, tiny_model, traced


def test_float64_is_computed_in_float64_throughout():
    model, graph = traced()
    inputs = example_inputs(2, 7)
    (single,) = run(graph, inputs, ModuleSource(model))
    (double,) = run(graph, inputs, ModuleSource(model), dtype=torch.float64)
    assert double.dtype == torch.float64
    assert 0 < (single - double).abs().max() < 1e-3
    wide = tiny_model().double()
    wide.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    with torch.no_grad():
        expected = wide(**inputs, use_cache=False).logits
    # eager keeps the angles of the rotary embedding in fp32, the oracle does not
    assert (double - expected).abs().max() < 1e-4


def test_a_missing_or_unknown_input_is_named():
    model, graph = traced()
    inputs = example_inputs(1, 2)
    with pytest.raises(InputError, match=r"expected inputs \['attention_mask', .*found \['input_ids'\]"):
        run(graph, {"input_ids": inputs["input_ids"]}, ModuleSource(model))
    with pytest.raises(InputError, match=r"found .*'labels'"):
        run(graph, {**inputs, "labels": inputs["input_ids"]}, ModuleSource(model))


def test_states_are_updated_in_place():
    from effc.compiler.graph import Graph
    from torch import fx

    nodes = fx.Graph()
    cache, new, past = (nodes.placeholder(name) for name in ("cache", "new", "past"))
    nodes.output((nodes.call_function(torch.ops.effc.kv_write.default, (cache, new, past)),))
    graph = Graph(fx.GraphModule(torch.nn.Module(), nodes), dialect="stateful", states=("cache",))
    assert graph.inputs == ["new", "past"]
    cache = torch.zeros(1, 1, 4, 2)
    run(graph, {"new": torch.ones(1, 1, 1, 2), "past": torch.tensor([2])}, states={"cache": cache})
    assert cache[0, 0, :, 0].tolist() == [0, 0, 1, 0]
