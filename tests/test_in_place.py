"""Writes in place, and their functional forms, as copies into tensors and to rows: beside eager, at every size."""

from __future__ import annotations

import pytest
import torch
from effc.codegen.in_place import write_by_kernels
from torch import Tensor

from .graphs import Compiled, check, graph_of, random

aten = torch.ops.aten
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (random(*shape, seed=seed) * 10).to(dtype)


def updates(x: Tensor, y: Tensor, z: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    """x [B, S, 6], y [S, 6] and z [B, S, 6] are changed; count has no axes"""
    before = x * 2
    x.add_(y, alpha=2)
    after = x + 1
    x.mul_(3)
    y.copy_(count)
    z.clamp_(min=0)
    count.add_(x.shape[1])
    return before, after, z + count


@DTYPES
def test_updates_equal_eagers_and_reads_see_what_was_there(dtype: torch.dtype) -> None:
    def operands(batch: int, length: int) -> dict[str, Tensor]:
        x, z = (values(batch, length, 6, dtype=dtype, seed=length + i) for i in range(2))
        return {"x": x, "y": values(length, 6, dtype=dtype, seed=9), "z": z, "count": torch.tensor(7)}

    dynamic = {"x": (0, 1), "y": (0,), "z": (0, 1)}
    compiled = Compiled(updates, operands(3, 5), dynamic, states=("x", "y", "z", "count"))
    assert not compiled.fallbacks
    for batch, length in ((3, 5), (1, 1), (2, 33), (2, 0)):
        compiled.check(**operands(batch, length))


def test_an_update_of_itself_is_one_kernel() -> None:
    compiled = check(lambda x, y: x.add_(y) * 2, x=random(4, 9), y=random(9), states=("x",))
    assert [step.kernel.name for step in compiled.scheduled.schedule.steps] == ["copy_to", "mul"]


def test_what_reads_other_elements_of_what_it_writes_is_made_first() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        y.copy_(y.flip(0) + y)
        x.sub_(x.roll((3, -1), (0, 1)))
        return y.roll(1)

    check(function, x=random(70, 70), y=random(40, 9, seed=1), states=("x", "y"))


def test_a_copy_of_a_view_of_itself_is_made_first() -> None:
    def transposed(x: Tensor) -> Tensor:
        x.copy_(x.t().clone())
        return x * 2

    torch._dynamo.reset()
    x = random(130, 130)
    expected = x.t().clone()
    torch.testing.assert_close(torch.compile(transposed, backend="effc")(x), expected * 2)
    assert torch.equal(x, expected)


def test_a_write_to_every_second_column_leaves_the_others() -> None:
    wide, y = random(6, 20), random(10, seed=1)
    expected = wide.clone()
    expected[:, ::2] += y
    Compiled(lambda x, y: x.add_(y).sum(-1), {"x": wide[:, ::2], "y": y})(x=wide[:, ::2], y=y)
    assert torch.equal(wide, expected)


def rows(x: Tensor, i: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """x [B, 5, 7, 6], i [S] from -5 to 4, y [B, S, 7, 6]"""
    positive = torch.where(i < 0, i + 5, i)
    return (
        torch.index_copy(x * 2, 1, positive, y + 1),
        torch.index_copy(x, 1, positive, y).sin(),
        aten.index_put(x, [None, i], y),
        aten.index_put(x, [None, None, i], x[:1, :1, :1]),
        x + torch.index_copy(x[:, :, 0], 1, positive, y[:, :, 0])[:, :, None],
    )


@DTYPES
def test_rows_are_copied_to_where_an_index_says(dtype: torch.dtype) -> None:
    def operands(batch: int, length: int) -> dict[str, Tensor]:
        i = torch.randperm(5, generator=torch.Generator().manual_seed(length))[:length]
        y = values(batch, length, 7, 6, dtype=dtype, seed=length)
        return {"x": values(batch, 5, 7, 6, dtype=dtype), "i": torch.where(i > 2, i - 5, i), "y": y}

    compiled = Compiled(rows, operands(2, 3), {"x": (0,), "i": (0,), "y": (0, 1)})
    assert not compiled.fallbacks
    for batch, length in ((2, 3), (1, 1), (3, 5), (2, 0)):
        compiled.check(**operands(batch, length))


def test_what_has_no_kernel_stays_one_call_of_aten() -> None:
    def function(x: Tensor, i: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.index_copy(x, 1, i, x[:, :3]),
            torch.index_put(x, [i], x[:3], accumulate=True),
            torch.index_put(x, [i, i], x[0, :3]),
            torch.index_put(x, [mask], x[0, 0]),
        )

    check(function, x=random(6, 5), i=torch.tensor([0, 2, 4]), mask=torch.arange(6) > 2, fallbacks=4)


def test_the_rewrite_and_its_second_run() -> None:
    graph = graph_of(lambda x, y: x.add_(y), {"x": random(3, 4), "y": random(4, seed=1).double()})
    once = write_by_kernels(graph)
    calls = [node.target for node in once.nodes if node.op == "call_function"]
    assert calls == [aten.add.Tensor, aten._to_copy.default, aten.copy_.default]
    assert write_by_kernels(once) is once
