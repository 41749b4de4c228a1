"""What shares a kernel, what gets memory, what runs through ATen, and that all of it computes what eager does."""

from __future__ import annotations

import pytest
import torch
from effc.codegen.schedule import strides_in_file
from effc.compiler.weights import Cast, Read, Reshape, Transpose
from torch import Tensor
from torch.nn import functional as F

from .graphs import Compiled, check, random

aten, effc = torch.ops.aten, torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(compiled: Compiled) -> int:
    return len(compiled.scheduled.schedule.steps)


# --- weights -----------------------------------------------------------------------------------------------------


def test_a_weight_that_is_a_stored_tensor_seen_in_another_way_is_read_where_it_is() -> None:
    """Depth before rows, and rows of gate and up in turns: the strides are those of the tensor in the file."""
    stored = random(2, 6, 8)
    read = Read("w", (2, 6, 8), torch.float32)
    recipe = Transpose(Reshape(Transpose(read, (0, 2, 1)), (2, 4, 2, 6)), (0, 2, 1, 3))
    found, strides = strides_in_file(recipe)
    assert found is read
    seen = stored.as_strided(recipe.shape, [int(stride) for stride in strides])
    assert torch.equal(seen, stored.permute(0, 2, 1).reshape(2, 4, 2, 6).permute(0, 2, 1, 3))
    assert strides_in_file(Reshape(recipe, (2, 8, 6))) is None, "gate, then up, is another order"
    assert strides_in_file(Cast(read, torch.bfloat16)) is None


# --- sharing kernels ---------------------------------------------------------------------------------------------


def test_a_chain_is_one_kernel() -> None:
    assert steps(check(lambda x, y: F.silu(x * 2 + y).transpose(0, 1) * 3, x=random(5, 7), y=random(7))) == 1


def test_a_norm_and_what_it_reads_is_one_kernel() -> None:
    assert steps(check(lambda x, y: effc.rms_norm(x + y, None, 1e-6) * 2, x=random(5, 7), y=random(5, 7))) == 1


def test_results_over_one_domain_share_a_kernel() -> None:
    assert steps(check(lambda x: (x.sin(), x.cos(), x.sum(-1)), x=random(5, 7))) == 1


def test_results_that_depend_on_each_other_at_other_indices_do_not() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y.transpose(0, 1) + 1

    assert steps(check(function, x=random(6, 6))) == 2


def test_equal_layers_share_their_kernels() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(4):
            x = effc.linear(effc.rms_norm(x, None, 1e-6), w, None, x)
        return x

    compiled = check(function, x=random(20, 32), w=random(32, 32) / 6)
    assert steps(compiled) == 8
    # The first norm reads x, the others the result of a linear, and say so by name.
    assert len(compiled.scheduled.schedule.kernels) == 3


def test_what_is_not_used_is_not_computed() -> None:
    def function(x: Tensor) -> Tensor:
        torch.softmax(x, -1)
        return x + 1

    assert steps(check(function, x=random(3, 4))) == 1


# --- ops without a kernel ------------------------------------------------------------------------------------------


def test_an_op_in_the_middle() -> None:
    def function(x: Tensor) -> Tensor:
        return (x * 2).cumprod(-1).exp() + x

    compiled = check(function, x=random(5, 7) / 7, dynamic={"x": (0,)}, fallbacks=1)
    assert steps(compiled) == 3
    compiled.check(x=random(9, 7) / 7)


def test_ops_at_both_ends_and_in_a_row() -> None:
    check(lambda x: (x.cumprod(0) + 1).cumprod(1).msort(), x=random(5, 7), fallbacks=3)


def test_an_op_with_several_results() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        values, places = (x * 2).topk(3, -1)
        ordered, order = x.sort(-1)
        return values + 1, places + 1, ordered, x.gather(-1, order) - ordered, values

    compiled = check(function, x=random(5, 7), dynamic={"x": (0,)}, fallbacks=2)
    compiled.check(x=random(1, 7))


def test_an_op_that_reads_views_and_inlined_values() -> None:
    def function(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        picked = aten.index.Tensor(y.transpose(0, 1), [None, i])
        return picked * 2, y[:, ::2].cumprod(-1), y.reshape(-1).cumprod(0), aten.index.Tensor(x, [i * 2])

    check(function, x=random(6, 8), i=torch.tensor([2, 0, 1]), fallbacks=2)


def test_an_op_whose_arguments_are_runtime_sizes() -> None:
    def function(x: Tensor) -> Tensor:
        return aten.roll(x * 2, [x.shape[0] - 1], [1]) + 1

    compiled = check(function, x=random(3, 7), dynamic={"x": (0,)}, fallbacks=1)
    compiled.check(x=random(9, 7))


def test_two_results_with_names_like_numbered_ones() -> None:
    """The second `median` is the node median_1, which is not the second result of the first."""
    check(lambda x: (*torch.median(x, 1), *torch.median(x * 2, 0)), x=random(5, 7), fallbacks=2)


def test_empty_tensors_are_neither_computed_nor_copied() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        nothing = x[:, :0]
        return nothing * 2, nothing.repeat(1, 1), torch.cat((nothing, nothing), 1), nothing.sum(-1), x.t().flatten()

    check(function, x=random(3, 4))


def test_reductions_without_a_kernel_say_why() -> None:
    def function(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return x.prod(0), i.amax(-1), F.layer_norm(x, (4, 6)), i.long().pow(4), x.cumprod(-1)

    compiled = check(function, x=random(4, 6).abs(), i=torch.arange(12, dtype=torch.int8).reshape(3, 4), fallbacks=5)
    reasons = " ".join(step.reason for step in compiled.scheduled.schedule.fallbacks)
    for reason in ("torch.int8", "more than the last axis", "power 4 of torch.int64"):
        assert reason in reasons


def test_rows_of_runtime_length_are_reduced_by_aten() -> None:
    compiled = check(lambda x: x.sum(-1) * 2, x=random(3, 7), dynamic={"x": (1,)}, fallbacks=1)
    compiled.check(x=random(3, 100))


def test_parts_of_a_split_that_runs_through_aten() -> None:
    check(lambda x: [part * 2 for part in x.cumprod(-1).split(2, -1)][1] + x[:, 2:4], x=random(3, 6), fallbacks=1)


# --- inputs and results ----------------------------------------------------------------------------------------------


def test_results_may_be_inputs_views_and_each_other() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return x, y, y, y.t(), x[1:], w, w.t(), effc.linear(x, w)

    for weights in ((), ("w",)):
        check(function, x=random(3, 64), w=random(64, 64), weights=weights)


def test_results_of_one_call_are_not_overwritten_by_the_next() -> None:
    x = random(4, 8)
    compiled = Compiled(lambda x: (x + 1, torch.softmax(x, -1)), {"x": x})
    first = compiled(x=x)
    kept = [result.clone() for result in first]
    compiled(x=x * 5)
    for result, copy in zip(first, kept, strict=True):
        assert torch.equal(result, copy)
