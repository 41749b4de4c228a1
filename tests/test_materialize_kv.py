"""The graphs prefill, extend and decode against the graph forward, token by token, and what gets no cache."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from effc.compiler.errors import InputError, ModelError
from effc.compiler.graph import Graph, dtype_of, is_tensor, sizes
from effc.compiler.interpret import run
from effc.compiler.sources import ModuleSource
from effc.compiler.trace import trace
from effc.compiler.verify import verify
from effc.passes import pipeline
from effc.passes.materialize_kv import KINDS, materialize_kv
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .families import tiny_model, without_padding
from .pass_checks import SEED, randomize

effc = torch.ops.effc
B, PROMPT, NEW, CAPACITY = 3, 7, 3, 16
LENGTH = PROMPT + NEW


@cache
def fused(family: str) -> tuple[nn.Module, Graph]:
    model = tiny_model(family)
    return model, pipeline.run(trace(model))[0]


def graphs_of(graph: Graph) -> dict[str, Graph]:
    graphs = {kind: materialize_kv(graph, kind) for kind in KINDS}
    for stateful in graphs.values():
        verify(stateful)
        assert stateful.dialect == "stateful"
    return graphs


def token_inputs(padding: bool, vocabulary: int = 97) -> dict[str, Tensor]:
    """Rows of LENGTH tokens; with padding, row b starts with 2 * b tokens of it."""
    print(f"seed {SEED}")
    ids = torch.randint(0, vocabulary, (B, LENGTH), generator=torch.Generator().manual_seed(SEED))
    mask = torch.ones_like(ids)
    for row in range(B if padding else 0):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


class Session:
    """The graphs of a model run on slices of the same tokens, over one cache that starts full of NaN."""

    def __init__(self, model: nn.Module, graphs: dict[str, Graph], inputs: dict[str, Tensor]) -> None:
        self.source, self.graphs, self.inputs = ModuleSource(model), graphs, inputs
        self.states = {}
        for name in graphs["extend"].states:
            cache = graphs["extend"].placeholder(name)
            _, heads, _, size = sizes(cache)
            self.states[name] = torch.full((B, int(heads), CAPACITY, int(size)), torch.nan, dtype=dtype_of(cache))

    def run(self, kind: str, first: int, end: int) -> Tensor:
        """Logits of the tokens first .. end - 1 by one of the graphs."""
        graph = self.graphs[kind]
        given = {name: value[:, first:end] for name, value in self.inputs.items()}
        padding = (self.inputs["attention_mask"] == 0).sum(-1)
        given |= {"past": torch.full((B,), first), "padding": padding}
        (logits,) = run(graph, {name: given[name] for name in graph.inputs}, self.source, self.states)
        return logits


def agree(model: nn.Module, graph: Graph, graphs: dict[str, Graph], padding: bool) -> None:
    """Prefill in two chunks, decode token by token, and extend in two steps give what forward gives at every token."""
    inputs = token_inputs(padding)
    source = ModuleSource(model)
    (expected,) = run(graph, {name: inputs[name] for name in graph.inputs}, source)
    visible = inputs["attention_mask"].bool()
    atol = 2e-6 * max(1, expected.abs().max().item())

    def close(logits: Tensor, first: int, end: int) -> None:
        assert logits.shape == expected[:, first:end].shape
        seen = visible[:, first:end]
        torch.testing.assert_close(logits[seen], expected[:, first:end][seen], atol=atol, rtol=0)

    session = Session(model, graphs, inputs)
    session.run("prefill", 0, 4)
    close(session.run("prefill", 4, PROMPT), PROMPT - 1, PROMPT)
    for place in range(PROMPT, LENGTH):
        close(session.run("decode", place, place + 1), place, place + 1)
    session = Session(model, graphs, inputs)
    close(session.run("extend", 0, 5), 0, 5)
    close(session.run("extend", 5, LENGTH), 5, LENGTH)


@pytest.mark.parametrize("padding", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize(
    "family",
    [
        "Llama",
        "GPT2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen2", "Gemma", "OPT", "Phi3", "GPTNeoX", "GPTJ")),
    ],
)
def test_cached_runs_equal_forward(family, padding):
    model, graph = fused(family)
    graph = graph if padding else without_padding(graph)
    graphs = graphs_of(graph)
    for stateful in graphs.values():
        assert stateful.count(effc.cached_attention.default) == 2
        assert stateful.count(effc.kv_write.default) == len(stateful.states) == 4
        assert stateful.count(effc.attention.default) == 0
        assert stateful.inputs == ["input_ids", "position_ids", "past", *["padding"] * padding]
    agree(model, graph, graphs, padding)


def test_the_graph_given_stays_as_it_is():
    graph = fused("Llama")[1]
    before = str(graph.fx), graph.dialect, list(graph.inputs)
    graphs_of(graph)
    without_padding(graph)
    assert (str(graph.fx), graph.dialect, graph.inputs) == before


def test_decode_has_one_token_and_no_length():
    graph = fused("Llama")[1]
    length = sizes(graph.placeholder("input_ids"))[1]
    decode = materialize_kv(graph, "decode")
    assert sizes(decode.placeholder("input_ids"))[1] == 1
    for node in decode.nodes:
        if is_tensor(node):
            assert not any(size.has(length) for size in sizes(node)), node


def test_prefill_runs_what_is_behind_the_last_attention_for_one_token():
    graph = fused("Llama")[1]
    prefill = materialize_kv(graph, "prefill")
    nodes = list(prefill.nodes)
    last = max(index for index, node in enumerate(nodes) if node.target == effc.cached_attention.default)
    behind = [node for node in nodes[last + 1 :] if is_tensor(node)]
    assert {node.target for node in behind} >= {effc.linear.default, effc.gated_linear.default, effc.rms_norm.default}
    for node in behind:
        assert 1 in sizes(node)[1:3], node
    (logits,) = prefill.outputs
    assert sizes(logits)[1:] == (1, 97)


def test_states_are_named_by_layer_with_a_symbolic_capacity():
    decode = materialize_kv(fused("Llama")[1], "decode")
    assert decode.states == ("k_cache_0", "v_cache_0", "k_cache_1", "v_cache_1")
    batch = sizes(decode.placeholder("input_ids"))[0]
    shapes = {sizes(decode.placeholder(name)) for name in decode.states}
    ((b, heads, capacity, size),) = shapes
    assert (b, heads, size) == (batch, 2, 8)
    assert capacity.is_Symbol
    assert sizes(materialize_kv(fused("Llama")[1], "extend").placeholder("padding")) == (batch,)


# --- padding -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """An embedding, a function of (self, x, attention_mask, position_ids), and a head."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.embed, self.places = nn.Embedding(97, 16), nn.Embedding(32, 16)
        self.mix, self.head = nn.Linear(16, 48), nn.Linear(16, 97)
        self.filter = nn.Conv1d(16, 16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.head(self.function(self, self.embed(input_ids), attention_mask, position_ids))


def attend(model: Model, x: Tensor, **options) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in model.mix(x).chunk(3, dim=-1))
    return x + sdpa(q, k, v, **{"is_causal": True, **options}).transpose(1, 2).flatten(2)


def compiled(function) -> tuple[nn.Module, Graph]:
    model = randomize(Model(function))
    return model, pipeline.run(trace(model))[0]


def test_a_hand_written_model_gets_a_cache():
    model, graph = compiled(lambda m, x, mask, places: attend(m, attend(m, x + m.places(places)).relu()))
    graph = without_padding(graph)
    graphs = graphs_of(graph)
    assert len(graphs["decode"].states) == 4
    agree(model, graph, graphs, padding=False)


def test_features_in_another_order_are_still_each_tokens_own():
    model, graph = compiled(lambda m, x, mask, places: attend(m, torch.index_select(x, 2, torch.arange(15, -1, -1))))
    graph = without_padding(graph)
    agree(model, graph, graphs_of(graph), padding=False)


def test_a_window_is_one_of_the_cached_attention():
    def attends_to_three(m: Model, x: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        place = torch.arange(mask.shape[1])
        allowed = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - 3)
        return attend(m, x, is_causal=False, attn_mask=allowed)

    model, graph = compiled(attends_to_three)
    graph = without_padding(graph)
    graphs = graphs_of(graph)
    (node,) = (node for node in graphs["decode"].nodes if node.target == effc.cached_attention.default)
    assert node.kwargs == {"window": 3}
    agree(model, graph, graphs, padding=False)


def test_without_padding_other_uses_of_the_mask_are_ones():
    model, graph = compiled(lambda m, x, mask, places: attend(m, x * mask[:, :, None]))
    bare = without_padding(graph)
    verify(bare)
    assert bare.inputs == ["input_ids", "position_ids"]
    inputs = token_inputs(padding=False)
    (expected,) = run(graph, {name: inputs[name] for name in graph.inputs}, ModuleSource(model))
    (found,) = run(bare, {name: inputs[name] for name in bare.inputs}, ModuleSource(model))
    assert torch.equal(found, expected)
    agree(model, bare, graphs_of(bare), padding=False)


# --- refusals ------------------------------------------------------------------------------------------------------


REFUSED = {
    "attention that is not causal": (
        lambda m, x, mask, places: attend(m, x, is_causal=False),
        r"attention .*test_materialize_kv.py.*: it is not causal",
    ),
    "softcap": (lambda m, x, mask, places: x + (x @ x.mT).tanh().softmax(-1) @ x, "it is not causal"),
    "a running sum": (lambda m, x, mask, places: attend(m, x).cumsum(1), r"cumsum .* over the tokens"),
    "a mean over tokens": (lambda m, x, mask, places: attend(m, x) + x.mean(1, keepdim=True), "over the tokens"),
    "the first token": (lambda m, x, mask, places: attend(m, x) + x[:, :1], "slices along the tokens"),
    "tokens by an index": (
        lambda m, x, mask, places: attend(m, x) + torch.index_select(x, 1, places[0]),
        "picks other tokens",
    ),
    "a token picked": (lambda m, x, mask, places: attend(m, x) + x[:, -1][:, None], "picks one token"),
    "shifted tokens": (
        lambda m, x, mask, places: attend(m, torch.cat((x[:, :1] * 0, x), dim=1)[:, :-1]),
        "tokens",
    ),
    "a convolution": (
        lambda m, x, mask, places: attend(m, m.filter(nn.functional.pad(x.mT, (1, 0))).mT),
        "not known to treat every token alone|tokens",
    ),
    "tokens mixed by a view": (
        lambda m, x, mask, places: attend(m, x).transpose(0, 1).flatten(0, 1).unflatten(0, x.shape[:2]),
        "mixes tokens with other dimensions",
    ),
    "the number of tokens": (lambda m, x, mask, places: attend(m, x) * x.shape[1], "computes with the length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_cache_are_refused_with_the_node_and_the_reason(name):
    function, reason = REFUSED[name]
    _, graph = compiled(function)
    with pytest.raises(ModelError, match=reason) as error:
        materialize_kv(graph, "decode")
    assert "\n" not in str(error.value)


def test_bad_arguments():
    graph = fused("Llama")[1]
    with pytest.raises(InputError, match="expected a graph of prefill, extend, decode, found 'forward'"):
        materialize_kv(graph, "forward")
    with pytest.raises(InputError, match="symbolic S"):
        materialize_kv(materialize_kv(graph, "decode"), "extend")
