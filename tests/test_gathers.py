"""Reads where a tensor says, and repeats, beside eager: every position of the indices, negative ones, runtime sizes."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.evaluate import evaluate
from effc.compiler.fold import recipe_of
from effc.compiler.weights import Call, Concat, Read, substitute
from torch import Tensor, nn
from torch.nn import functional as F

from .graphs import Compiled, check, random
from .pass_checks import graph_of

pytestmark = pytest.mark.usefixtures("one_thread")


def indices(*shape: int, limit: int, low: int = 0, seed: int = 0) -> Tensor:
    print(f"index seed {seed}")
    return torch.randint(low, limit, shape, generator=torch.Generator().manual_seed(seed))


def gathers(x: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, ...]:
    """x [B, 5, 7, 6]; i [S], from -5 to 4; j [3, 1], from 0 to 4"""
    return (
        x[:, i] * 2,
        x[:, :, i],
        x[:, i, j],
        x[:, i, :, j] + 1,
        x[:, i.clamp(min=0), 2:5],
        x[0, i, i, i],
        torch.index_select(x, 2, i.clamp(min=0)) * x[:, :, :1],
        torch.gather(x, 1, (i.clamp(min=0)[:, None, None] + torch.zeros_like(x[:, :1, :, :])).long()).tanh(),
    )


def test_gathers_equal_eager_at_every_size() -> None:
    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        return {
            "x": random(batch, 5, 7, 6, seed=length),
            "i": indices(length, limit=5, low=-5, seed=length),
            "j": indices(3, 1, limit=5),
        }

    compiled = Compiled(gathers, inputs(2, 11), {"x": (0,), "i": (0,)})
    assert not compiled.fallbacks
    for batch, length in ((1, 1), (3, 9), (2, 70), (2, 0)):
        compiled.check(**inputs(batch, length))


def repeats(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """x [B, S, 6], y [6]"""
    return (
        x.repeat_interleave(2, dim=-1) + 1,
        x.repeat_interleave(3, dim=1) * y,
        x[:, :, 0].repeat_interleave(2, dim=0),
        x.repeat(1, 2, 3).sin(),
        y.repeat(4, 2),
        y.expand_as(x) * x,
        x.transpose(0, 1).repeat(2, 1, 1).sum(-1),
    )


def test_repeats_equal_eager_at_every_size() -> None:
    compiled = Compiled(repeats, {"x": random(2, 5, 6), "y": random(6, seed=1)}, {"x": (0, 1)})
    assert not compiled.fallbacks
    for batch, length in ((1, 1), (3, 17), (2, 0)):
        compiled.check(x=random(batch, length, 6, seed=length), y=random(6, seed=1))


def test_two_tables_read_at_the_same_ids_stay_within_the_tile() -> None:
    def function(ids: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.embedding(ids, first) + F.embedding(ids, second) + F.embedding(ids, first, 0)

    tables = {"first": random(9, 20), "second": random(9, 20, seed=1)}
    compiled = Compiled(function, {"ids": indices(2, 5, limit=9), **tables}, {"ids": (0, 1)})
    for length in (1, 13):
        compiled.check(ids=indices(2, length, limit=9, seed=length), **tables)


# --- weights computed from weights -----------------------------------------------------------------------------------


class Heads(nn.Module):
    """What is computed from weights alone, and what only looks so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 6, generator=torch.Generator().manual_seed(3)))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            F.linear(x, F.normalize(self.weight)),
            F.linear(x, (self.weight * self.scale).tanh()),
            F.linear(x, self.weight + x[0, :1]),
            self.scale.expand(3, 4) + x.sum(),
        )


def test_a_function_of_weights_is_a_recipe_and_nothing_else_is() -> None:
    model = Heads()
    graph = graph_of(model, torch.randn(2, 5, 6))
    tensors = {"weight": model.weight.detach(), "scale": model.scale.detach()}

    class Source:
        names = tuple(tensors)
        shape = staticmethod(lambda name: tuple(tensors[name].shape))
        dtype = staticmethod(lambda name: tensors[name].dtype)
        read = staticmethod(tensors.__getitem__)

    linears = [node for node in graph.nodes if node.target == torch.ops.aten.linear.default]
    normal, bent, shifted = (recipe_of(graph, node.args[1]) for node in linears)
    assert shifted is None
    assert torch.equal(evaluate(normal, Source()), F.normalize(model.weight))
    assert torch.equal(evaluate(bent, Source()), (model.weight * model.scale).tanh())
    expanded = next(node for node in graph.nodes if node.target == torch.ops.aten.expand.default)
    assert recipe_of(graph, expanded) is None, "larger than what it is made of"


def test_a_call_names_what_it_reads_and_is_rebuilt_over_other_names() -> None:
    weight = Read("w", (4, 3), torch.float32)
    call = Call("aten.linalg_vector_norm.default", (weight, 2.0, (1,), True), (4, 1), torch.float32)
    assert call.names() == ("w",)
    parts = Concat((Read("a", (2, 3), torch.float32), Read("b", (2, 3), torch.float32)))
    moved = substitute(call, {"w": parts})
    assert moved.names() == ("a", "b")
    assert moved != call
    assert moved.key() != call.key()


def test_gathers_and_scatters_within_a_row() -> None:
    def function(x: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        doubled = torch.gather(x * 2, -1, places)
        return (
            doubled / doubled.sum(-1, keepdim=True).abs(),
            torch.gather(x.softmax(-1), -1, places),
            torch.gather(x, 1, places[:, :2].clamp(max=2)),
            x.scatter(-1, places, 2.5),
            torch.zeros_like(x).scatter(2, places[..., :1], -1) + x,
        )

    x, places = random(5, 3, 24), random(5, 3, 24, seed=1).topk(4).indices
    compiled = check(function, {"x": (0, 1), "places": (0, 1)}, x=x, places=places)
    compiled.check(x=x[:2].clone(), places=places[:2].clone())
    check(function, x=x.bfloat16(), places=places)


def test_a_scatter_to_many_places_runs_through_aten() -> None:
    x, places = random(3, 24), random(3, 24, seed=1).topk(17).indices
    check(lambda x, places: x.scatter(-1, places, 1.0), fallbacks=1, x=x, places=places)
