"""fuse_rope: half-split, interleaved, partial and split forms, and what only looks like them."""

from __future__ import annotations

import pytest
import torch
from effc.passes.fuse_rope import fuse_rope
from torch import Tensor, nn

from .pass_checks import B, S, check_pass, example, graph_of

aten = torch.ops.aten
rope = torch.ops.effc.rope.default
H, D = 3, 8


def turn_halves(x: Tensor) -> Tensor:
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-high, low), dim=-1)


def turn_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


class Rotation(nn.Module):
    """A function of x [B, S, H, D] and an angle [B, S, R] as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, angle: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(x, angle)


def check(function, matches: int, rotated: int = D, dtype: torch.dtype = torch.float32, **claims):
    module, x = Rotation(function), example(B, S, H, D, dtype=dtype)
    angle = example(B, S, rotated, seed=1)
    claims = {"present": {rope: matches}, "atol": 0} | claims
    return check_pass(fuse_rope, graph_of(module, x, angle), module, (x, angle), matches=matches, **claims)


def by_heads(x: Tensor, angle: Tensor, turn=turn_halves) -> Tensor:
    cos, sin = (table.to(x.dtype).unsqueeze(1) for table in (angle.cos(), angle.sin()))
    x = x.transpose(1, 2)
    return x * cos + turn(x) * sin


def the_rope(graph):
    (node,) = (node for node in graph.nodes if node.target is rope)
    return node


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turn", [turn_halves, turn_pairs])
def test_whole_heads(turn, dtype):
    gone = (aten.mul.Tensor, aten.neg.default, aten.cat.default, aten.stack.default, aten.unsqueeze.default)
    graph = check(lambda x, angle: by_heads(x, angle, turn), 1, dtype=dtype, gone=gone)
    assert the_rope(graph).args[3] is (turn is turn_pairs)


def test_operands_in_the_other_order():
    def swapped(x, angle):
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        x = x.transpose(1, 2)
        return sin * turn_halves(x) + cos * x

    check(swapped, 1, gone=(aten.mul.Tensor,))


@pytest.mark.parametrize("turn", [turn_halves, turn_pairs])
def test_the_first_part_of_the_heads(turn):
    def partial(x, angle):
        x = x.transpose(1, 2)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        head, rest = x[..., :4], x[..., 4:]
        return torch.cat((head * cos + turn(head) * sin, rest), dim=-1)

    check(partial, 2, rotated=4, present={rope: 1}, gone=(aten.cat.default, aten.slice.Tensor))


def test_an_empty_rest_vanishes():
    def whole(x, angle):
        x = x.transpose(1, 2)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        return torch.cat((x * cos + turn_halves(x) * sin, x[..., D:]), dim=-1)

    check(whole, 1, present={rope: 1}, gone=(aten.cat.default,))


def test_two_halves_with_tables_for_one():
    def split(x, angle):
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        first, second = x.transpose(1, 2).chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned, torch.cat((second * cos, first * sin), dim=-1)

    graph = check(split, 1, rotated=D // 2, gone=(aten.sub.Tensor,))
    assert the_rope(graph).args[1].target is aten.cat.default


def test_heads_behind_positions():
    def later(x, angle):
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
        return x * cos + turn_halves(x) * sin

    check(later, 1, gone=(aten.mul.Tensor, aten.cat.default))


def test_the_first_part_of_heads_behind_positions():
    def later(x, angle):
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
        head, rest = x[..., :4], x[..., 4:]
        return torch.cat((head * cos + turn_pairs(head) * sin, rest), dim=-1).permute(0, 2, 1, 3)

    graph = check(later, 3, rotated=4, present={rope: 1}, gone=(aten.cat.default, aten.slice.Tensor))
    assert graph.count(aten.permute.default) == 1


def test_tables_without_batch():
    def two_dimensional(x, angle):
        cos, sin = angle[0].cos(), angle[0].sin()
        x = x.transpose(1, 2)
        return x * cos + turn_halves(x) * sin

    check(two_dimensional, 1, gone=(aten.mul.Tensor,))


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16], ids=str)
def test_computed_in_fp32_for_narrow_heads(tables):
    def widened(x, angle):
        cos, sin = (table.to(tables).unsqueeze(1) for table in (angle.cos(), angle.sin()))
        wide = x.transpose(1, 2).float()
        return (wide * cos + turn_halves(wide) * sin).to(x.dtype)

    check(widened, 2, dtype=torch.bfloat16, present={rope: 1}, gone=(aten.mul.Tensor,))


def test_two_heads_share_the_tables():
    graph = check(lambda x, angle: (by_heads(x, angle), by_heads(x.neg(), angle)), 2, present={rope: 2})
    first, second = (node for node in graph.nodes if node.target is rope)
    assert first.args[1:3] == second.args[1:3]


def test_a_turn_the_other_way_is_left_alone():
    def backwards(x):
        low, high = x.chunk(2, dim=-1)
        return torch.cat((-low, high), dim=-1)

    check(lambda x, angle: by_heads(x, angle, backwards), 0, misses=("neither halves nor pairs",))


def test_uneven_parts_are_left_alone():
    def uneven(x):
        return torch.cat((-x[..., 2:], x[..., :2]), dim=-1)

    check(lambda x, angle: by_heads(x, angle, uneven), 0, misses=("neither halves nor pairs",))


def test_tables_that_differ_by_head_are_left_alone():
    def per_head(x, angle):
        x = x.transpose(1, 2)
        cos, sin = (table.unsqueeze(1).repeat(1, H, 1, 1) for table in (angle.cos(), angle.sin()))
        return x * cos + turn_halves(x) * sin

    check(per_head, 0, misses=("not one row per position",))


def test_a_wider_result_is_left_alone():
    def widening(x, angle):
        x = x.transpose(1, 2)
        return x * angle.cos().unsqueeze(1) + turn_halves(x) * angle.sin().unsqueeze(1)

    check(widening, 0, dtype=torch.bfloat16, misses=("the result is torch.float32",))


def test_an_unrotated_part_in_front_is_left_to_its_cat():
    def behind(x, angle):
        x = x.transpose(1, 2)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        head, rest = x[..., 4:], x[..., :4]
        return torch.cat((head * cos + turn_halves(head) * sin, rest), dim=-1)

    check(behind, 1, rotated=4, misses=("not the axis in order",))
