"""Scales and rotations that are folded into weights: the graph computes the same function, exactly in fp64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from effc.compiler.graph import Graph
from effc.compiler.interpret import run
from effc.compiler.ops import OPS
from effc.compiler.sources import ModuleSource
from effc.compiler.trace import trace
from effc.compiler.verify import verify
from effc.passes import run as run_passes
from effc.passes.calibrate.folds import apply_fold, find_folds
from effc.passes.calibrate.hadamard import hadamard, rotation
from effc.passes.calibrate.rotate import rotate
from torch import Tensor, nn

from .families import example_inputs, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SLOW = pytest.mark.slow
FOLDS = {
    "Llama": (4 * 2 + 1, 0),
    "Qwen2": (4 * 2, 1),  # the tied head
    "OPT": (4 * 2, 1),
    "GPT2": (3 * 2, 3),  # behind GELU
    "Gemma2": (4 * 2, 1),
    "Falcon": (2, 5),
    "Phi3": (4 * 2 + 1, 0),
    "Qwen3": (4 * 2 + 1, 0),
    "Mixtral": (2 * 2 + 1, 0),  # what the experts read is no linear's
}
"""Family -> inputs that can be scaled, and those that cannot, of two layers."""


@cache
def wide(family: str) -> tuple[nn.Module, Graph]:
    """A model in fp64 and its fused graph; copy the graph before changing it."""
    model = tiny_model(family).double()
    return model, run_passes(trace(model), verify=False)[0]


def logits(model: nn.Module, graph: Graph, inputs: dict[str, Tensor]) -> Tensor:
    given = {name: inputs[name] for name in graph.inputs}
    return run(graph, given, ModuleSource(model), dtype=torch.float64)[0]


def assert_same_function(model: nn.Module, before: Graph, after: Graph) -> None:
    verify(after)
    inputs = example_inputs(2, 9)
    expected, found = (logits(model, graph, inputs) for graph in (before, after))
    changed = (recipe for name, recipe in after.weights.items() if recipe != before.weights.get(name))
    single = any(recipe.dtype == torch.float32 for recipe in changed)  # Gemma's norms: 1 + w in fp32
    assert (found - expected).abs().max() < (1e-6 if single else 1e-11) * expected.abs().max()


FAMILY = [pytest.param(name, marks=() if name in ("Llama", "OPT") else SLOW) for name in FOLDS]


@pytest.mark.parametrize("family", FAMILY)
def test_scales_are_folded_into_the_op_before(family):
    model, graph = wide(family)
    scaled = graph.copy()
    folds, misses = find_folds(scaled)
    assert (len(folds), len(misses)) == FOLDS[family], [str(miss) for miss in misses]
    generator = torch.Generator().manual_seed(8)
    for fold in folds:
        scale = fold.tied(torch.rand(fold.channels.shape, generator=generator, dtype=torch.float64) + 0.5)
        apply_fold(scaled, fold, scale)
    assert_same_function(model, graph, scaled)
    assert sum(scaled.weights[name] != recipe for name, recipe in graph.weights.items()) >= len(folds) + 2


def test_heads_that_share_a_value_share_its_scales():
    folds = find_folds(wide("Llama")[1])[0]
    fold = next(fold for fold in folds if "o_proj" in fold.sites[0].name)
    scale = fold.tied(torch.arange(1.0, 33.0)).view(4, 8)
    assert torch.equal(scale[0], scale[1])
    assert not torch.equal(scale[1], scale[2])
    torch.testing.assert_close(scale[0, 0], torch.tensor((1.0 * 9.0) ** 0.5))


def test_why_an_input_is_not_scaled_is_said():
    misses = find_folds(wide("OPT")[1])[1]
    assert ["used elsewhere too" in miss.reason for miss in misses] == [True]


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 32, 48, 64, 576, 1536])
def test_hadamard_matrices_are_orthogonal(size):
    matrix = hadamard(size)
    assert set(matrix.abs().flatten().tolist()) == {1.0}
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


def test_a_rotation_of_any_size_is_orthogonal():
    assert hadamard(36) is None
    for size in (6, 36, 32):
        matrix = rotation(size)
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
    assert not torch.equal(rotation(32, seed=0), rotation(32, seed=1))


@pytest.mark.parametrize("family", ["Llama", *(pytest.param(name, marks=SLOW) for name in ("Qwen2", "Qwen3", "Phi3"))])
def test_rotating_the_residual_stream_changes_no_output(family):
    model, graph = wide(family)
    rotated = graph.copy()
    result = rotate(rotated)
    assert result.misses == []
    assert result.matches >= 2 * 4 + 2
    assert_same_function(model, graph, rotated)
    norms = [node for node in rotated.nodes if node.target == OPS["rms_norm"].target]
    assert sum(node.args[1] is None for node in norms) == 2 * 2 + 1
    assert {node.name for node in rotated.placeholders if node.name in rotated.weights} == set(rotated.weights)


@pytest.mark.slow
def test_a_tied_head_becomes_a_matrix_of_its_own():
    _, graph = wide("Qwen2")
    rotated = graph.copy()
    rotate(rotated)
    heads = [name for name in rotated.weights if name.startswith("model_embed_tokens_weight")]
    assert len(heads) == 2


@pytest.mark.parametrize("family", ["OPT", *(pytest.param(name, marks=SLOW) for name in ("GPT2", "Gemma2", "Mixtral"))])
def test_a_stream_that_cannot_be_rotated_is_left_alone_with_the_reason(family):
    _, graph = wide(family)
    rotated = graph.copy()
    result = rotate(rotated)
    assert result.matches == 0
    assert len(result.misses) == 1
    assert result.misses[0].reason
    assert rotated.weights == graph.weights
    assert str(rotated) == str(graph)
