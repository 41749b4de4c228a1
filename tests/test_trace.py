import copy

import pytest
import torch
from effc.compiler.errors import InputError, ModelError
from effc.compiler.graph import sizes
from effc.compiler.interpret import run
from effc.compiler.load import load
from effc.compiler.sources import ModuleSource
from effc.compiler.trace import trace
from effc.compiler.verify import verify
from effc.compiler.weights import Constant, Read
from torch import nn

from .families import SIZES, example_inputs, tiny_model, traced, worst_error


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma", "GPT2", "OPT", "Bloom"])
def test_a_trace_equals_eager_exactly_at_every_size(family):
    model, graph = traced(family)
    verify(graph)
    assert graph.dialect == "traced"
    for batch, length in SIZES:
        assert worst_error(graph, model, example_inputs(batch, length, seed=length)) == 0.0


def test_inputs_are_those_that_forward_accepts():
    assert traced("Llama")[1].inputs == ["input_ids", "attention_mask", "position_ids"]
    assert traced("Bloom")[1].inputs == ["input_ids", "attention_mask"]


def test_all_inputs_and_the_logits_share_two_symbolic_sizes():
    _, graph = traced()
    shapes = {sizes(graph.placeholder(name)) for name in graph.inputs}
    assert len(shapes) == 1
    batch, length = shapes.pop()
    assert batch.is_Symbol
    assert length.is_Symbol
    assert sizes(graph.outputs[0]) == (batch, length, 97)


def test_weights_are_read_by_state_dict_name_and_computed_buffers_are_constants():
    model, graph = traced()
    reads = {recipe.name for recipe in graph.weights.values() if isinstance(recipe, Read)}
    constants = [name for name, recipe in graph.weights.items() if isinstance(recipe, Constant)]
    assert reads == {name for name, _ in model.named_parameters()}
    assert constants == ["model_rotary_emb_inv_freq"]


def test_tied_weights_are_one_placeholder_with_the_first_name():
    graph = trace(tiny_model(tie_word_embeddings=True, num_hidden_layers=1))
    names = [recipe.name for recipe in graph.weights.values() if isinstance(recipe, Read)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_parameters_on_the_meta_device_give_the_same_graph_and_stay_there():
    model = tiny_model(tie_word_embeddings=True, num_hidden_layers=1)
    skeleton = copy.deepcopy(model)
    for owner in skeleton.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    skeleton.tie_weights()
    graph = trace(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert graph.weights == trace(model).weights
    assert str(graph) == str(trace(model))
    assert worst_error(graph, model, example_inputs(2, 5)) == 0.0


def test_a_meta_buffer_without_values_is_refused():
    model = tiny_model()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to("meta")
    with pytest.raises(ModelError, match=r"buffer model\.rotary_emb\.inv_freq is on the meta device"):
        trace(model)


def test_the_models_own_attention_is_put_back():
    model = tiny_model(num_hidden_layers=1)
    model.set_attn_implementation("eager")
    trace(model)
    assert model.config._attn_implementation == "eager"


def test_a_length_bounded_by_a_table_is_reported():
    model = tiny_model("GPTNeo")
    graph = trace(model)
    assert [note for note in graph.notes if "127" in note]
    assert worst_error(graph, model, example_inputs(2, 127)) == 0.0


def test_a_loop_over_the_sequence_is_refused_in_one_line():
    reason = (
        r"MambaForCausalLM cannot be traced .* fixed length.*; tokens are mixed by conv1d .* from modeling_mamba\.py:"
    )
    with pytest.raises(ModelError, match=reason) as error:
        trace(tiny_model("Mamba"))
    assert "\n" not in str(error.value)


def test_training_mode_and_models_without_tokens_are_refused():
    with pytest.raises(InputError, match=r"training mode: call model\.eval\(\)"):
        trace(tiny_model().train())
    with pytest.raises(InputError, match=r"takes input_ids, found Linear\(input\)"):
        trace(nn.Linear(2, 2).eval())


def test_a_model_that_returns_a_tensor_and_knows_no_cache():
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 10)

        def forward(self, input_ids):
            return self.table(input_ids)

    model = Bigram().eval()
    graph = trace(model)
    ids = torch.tensor([[1, 2, 3]])
    (logits,) = run(graph, {"input_ids": ids}, ModuleSource(model))
    assert torch.equal(logits, model(ids))


class Branching(nn.Module):
    """Adds a row to every embedding, another one where a condition on the inputs holds."""

    def __init__(self, condition):
        super().__init__()
        self.table = nn.Embedding(10, 10)
        self.rows = nn.Parameter(torch.randn(2, 10))
        self.condition = condition

    def forward(self, input_ids, position_ids):
        return self.table(input_ids) + self.rows[1 if self.condition(input_ids, position_ids) else 0]


def test_a_branch_on_positions_bounds_the_length():
    model = Branching(lambda ids, places: places.max() + 1 > 12).eval()
    graph = trace(model)
    verify(graph)
    assert graph.max_length == 12
    assert [note for note in graph.notes if "at most 12 tokens" in note and "test_trace.py" in note]
    ids = torch.arange(10)[None]
    (logits,) = run(graph, {"input_ids": ids, "position_ids": ids}, ModuleSource(model))
    assert torch.equal(logits, model(ids, ids))


class Choosing(nn.Module):
    """Scales by one of two rows, chosen by a `where`, and remembers which."""

    def __init__(self, condition):
        super().__init__()
        self.table = nn.Embedding(10, 10)
        self.register_buffer("chosen", torch.ones(10), persistent=False)
        self.rows = nn.Parameter(torch.randn(2, 10))
        self.condition = condition

    def forward(self, input_ids, position_ids):
        self.last = self.chosen = torch.where(self.condition(input_ids, position_ids), *self.rows)
        return self.table(input_ids) * self.chosen


def test_a_choice_by_the_length_bounds_it_and_the_module_stays_what_it_was():
    model = Choosing(lambda ids, places: places.max() + 1 > 12).eval()
    graph = trace(model)
    assert torch.equal(model.chosen, torch.ones(10))
    assert not hasattr(model, "last")
    verify(graph)
    assert (graph.max_length, len(graph.outputs), graph.count(torch.ops.aten.where.self)) == (12, 1, 0)
    assert [note for note in graph.notes if "at most 12 tokens" in note and "test_trace.py" in note]
    ids = torch.arange(10)[None]
    (logits,) = run(graph, {"input_ids": ids, "position_ids": ids}, ModuleSource(model))
    assert torch.equal(logits, model(ids, ids))


def test_a_choice_by_the_tokens_stays():
    graph = trace(Choosing(lambda ids, places: ids.max() > 5).eval())
    assert (graph.max_length, graph.count(torch.ops.aten.where.self)) == (None, 1)


def test_a_branch_that_every_length_takes_alike_bounds_nothing():
    assert trace(Branching(lambda ids, places: places.min() > 0).eval()).max_length is None


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (lambda ids, places: ids.max() > 5, "it depends on input_ids"),
        (lambda ids, places: places.max() < 4, "one token alone takes another branch"),
    ],
)
def test_a_branch_that_no_length_decides_is_refused(condition, reason):
    with pytest.raises(ModelError, match=rf"a branch on values at test_trace\.py:\d+.*: {reason}"):
        trace(Branching(condition).eval())


def test_buffers_of_a_loaded_model_are_constants():
    """A mask in a buffer is read as what it says, wherever the model comes from."""
    graph = trace(load(tiny_model("GPTNeo")))
    masks = [weight for name, weight in graph.weights.items() if name.endswith("attn_attention_bias")]
    assert len(masks) == 2
    assert all(isinstance(weight, Constant) for weight in masks)
