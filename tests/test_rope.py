"""Rotary embedding beside eager: halves and neighbours, partial, strided, and straight into the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .graphs import Compiled, check, random

effc = torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")


def operands(
    batch: int, heads: int, s: int, size: int, rotated: int, interleaved: bool, dtype: torch.dtype, tables: int = 0
) -> dict[str, Tensor]:
    angles = random(tables or batch, s, rotated // 2, seed=2)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    return {
        "x": random(batch, heads, s, size, dtype=dtype, seed=1),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "size", "rotated"), [(2, 64, 64), (3, 80, 32), (1, 20, 12), (5, 6, 2)])
def test_rope_of_any_size(heads: int, size: int, rotated: int, dtype: torch.dtype, interleaved: bool) -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return (
            effc.rope(x, cos, sin, interleaved),
            effc.rope(x * 2, cos[:1], sin[:1], interleaved),
            effc.rope(x.transpose(1, 2).contiguous().transpose(1, 2), cos + 0, sin, interleaved),
        )

    def tensors(batch: int, s: int) -> dict[str, Tensor]:
        return operands(batch, heads, s, size, rotated, interleaved, dtype)

    compiled = Compiled(function, tensors(2, 5), {"x": (0, 2), "cos": (0, 1), "sin": (0, 1)})
    assert not compiled.fallbacks
    for batch, s in ((1, 100), (3, 17), (2, 1), (1, 1), (0, 3), (1, 0)):
        compiled.check(**tensors(batch, s))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_into_a_cache_is_one_kernel(dtype: torch.dtype, interleaved: bool) -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, past: Tensor) -> Tensor:
        return effc.kv_write(k, effc.rope(x, cos, sin, interleaved), past)

    for s in (1, 7):
        tensors = operands(3, 2, s, 20, 12, interleaved, dtype)
        compiled = check(
            function, states=("k",), **tensors, k=random(3, 2, 30, 20, dtype=dtype), past=torch.tensor([0, 23, 5])
        )
        assert len(compiled.scheduled.schedule.steps) == 1


def test_a_wider_cache_holds_what_eager_rounds() -> None:
    def function(x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, past: Tensor) -> Tensor:
        return effc.kv_write(k, effc.rope(x, cos, sin), past)

    tensors = operands(1, 2, 3, 16, 16, False, torch.bfloat16)
    check(function, states=("k",), **tensors, k=random(1, 2, 9, 16), past=torch.tensor([2]))


@pytest.mark.parametrize(
    ("dtype", "tables"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.double)],
)
def test_tables_of_another_dtype(dtype: torch.dtype, tables: torch.dtype) -> None:
    """Products are made in the wider dtype and rounded once; fp64 has no kernel."""

    def function(x: Tensor, cos: Tensor, sin: Tensor, k: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        turned = effc.rope(x, cos, sin)
        return effc.kv_write(k, turned, past), effc.rope(x * 2, cos, sin) + 1

    tensors = operands(1, 2, 3, 16, 16, False, tables)
    tensors["x"] = tensors["x"].to(dtype)
    k, past = random(1, 2, 9, 16, dtype=dtype), torch.tensor([2])
    check(function, states=("k",), fallbacks=2 * (tables == torch.double), **tensors, k=k, past=past)


def test_a_value_without_rope_goes_to_the_cache_in_one_kernel() -> None:
    def function(x: Tensor, v: Tensor, past: Tensor) -> Tensor:
        return effc.kv_write(v, x.view(2, 5, 3, 8).transpose(1, 2), past)

    compiled = check(function, states=("v",), x=random(2, 5, 24), v=random(2, 3, 40, 8), past=torch.tensor([35, 0]))
    assert len(compiled.scheduled.schedule.steps) == 1
