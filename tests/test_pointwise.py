"""Generated pointwise and reduction kernels beside eager: every op, ragged and runtime sizes, views, NaN, infinity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from .graphs import Compiled, check, random

aten, effc = torch.ops.aten, torch.ops.effc
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = (1, 2, 3, 7, 16, 17, 63, 65, 100, 257)
DYNAMIC = {"x": (0, 1), "y": (0, 1)}

pytestmark = pytest.mark.usefixtures("one_thread")


def float_ops(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    positive = x.abs() + 0.1
    return (
        x + y,
        torch.add(x, y, alpha=2),
        x - y,
        torch.rsub(x, 2.5),
        x * 0.3,
        x / positive,
        positive.reciprocal(),
        torch.maximum(x, y),
        torch.minimum(x, y),
        -x,
        x.exp(),
        positive.log(),
        positive.sqrt(),
        positive.rsqrt(),
        x.sin(),
        x.cos(),
        x.erf(),
        x.sigmoid(),
        F.silu(x),
        F.relu(x),
        F.gelu(x),
        F.gelu(x, approximate="tanh"),
        x.tanh(),
        (x / 16).tanh(),
        x.pow(2),
        x.pow(3),
        positive.pow(0.5),
        positive.pow(-0.5),
        positive.pow(1.7),
        x.clamp(-0.5, 0.5),
        x.clamp(min=0.25),
        torch.clamp_max(x, 0.25),
        torch.where(x < y, x, y),
        torch.where(x < 0.1, x, 0.25),
        x.masked_fill(y > 0, -1.5),
        torch.full_like(x, 0.1) + y,
        x.exp2(),
        positive.log2(),
        positive.log10(),
        positive.log1p(),
        x.expm1(),
        x.tan(),
        x.tanh().asin(),
        x.tanh().acos(),
        x.atan(),
        x.sinh(),
        x.cosh(),
        x.asinh(),
        (positive + 1).acosh(),
        (x / 8).atanh(),
        x.erfc(),
        torch.atan2(x, y),
        torch.copysign(x, y),
        torch.fmod(x, positive),
        torch.pow(positive, y),
        x.floor(),
        x.ceil(),
        x.trunc(),
        (x * 2).round(),
        x.sign(),
        torch.fmax(x, y),
        torch.fmin(x, y),
        torch.clamp(x, y, positive),
        x.isnan(),
        torch.logical_xor(x > 0, y > 0),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_op_agrees_with_eager(dtype: torch.dtype) -> None:
    x, y = random(2, 3, 17, dtype=dtype), random(2, 3, 17, dtype=dtype, seed=1)
    check(float_ops, x=x, y=y, dynamic=DYNAMIC)


def whole_ops(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (
        x + y,
        x * 3 - y,
        x / y,
        x * 0.5,
        torch.maximum(x, y),
        x.abs(),
        -x,
        x == y,
        x != 3,
        x >= y,
        (x > 0) & (y > 0),
        (x > 0) | (y > 2),
        ~(x > 0),
        ~x,
        x & y,
        x | y,
        torch.logical_not(x),
        torch.logical_and(x, y > 1),
        torch.logical_or(x > 1, y),
        (x > 0) + y,
        (x > 0) == (y > 0),
        x < 2.5,
        x.to(torch.float32) / 3,
        x.to(torch.bfloat16),
        x.to(torch.int32),
        x.to(torch.bool),
        torch.where(x > 0, x, -1),
        x.clamp(-1, 2),
        torch.rsub(x, y, alpha=2),
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_every_integer_op_agrees_with_eager(dtype: torch.dtype) -> None:
    x = torch.arange(-10, 11, dtype=dtype).reshape(3, 7)
    y = torch.arange(1, 22, dtype=dtype).reshape(3, 7) % 5 + 1
    check(whole_ops, x=x, y=y)


def test_boolean_sums_are_ors() -> None:
    x, y = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    check(lambda x, y: (x + y, x * y, x | y, x.to(torch.float32) - 0.5), x=x, y=y)


def test_numbers_are_compared_in_the_dtype_of_the_tensor() -> None:
    x = torch.tensor([[0.1, 0.2, 0.3, -0.1]], dtype=torch.bfloat16)
    check(lambda x: (x == 0.1, x <= 0.1, x < 0.3, x > -0.1), x=x)


def test_a_size_is_an_operand() -> None:
    compiled = check(lambda x: (x / (x.shape[0] - 1), x * (x.shape[0] + 1)), x=random(5, 7), dynamic={"x": (0,)})
    compiled.check(x=random(3, 7))


def test_integers_and_booleans_are_reduced() -> None:
    def function(i: Tensor) -> tuple[Tensor, ...]:
        return i.sum(-1), i.amax(-1), i.amin(-1, keepdim=True), (i > 0).sum(-1), (i > 3).any(-1), (i > -9).all(-1)

    for dtype in (torch.int64, torch.int32):
        check(function, i=torch.arange(-10, 11, dtype=dtype).reshape(3, 7))


def test_what_is_no_number_is_told() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [float("nan"), float("inf"), -0.0]])
    check(lambda x: (x.isnan(), torch.where(x.isnan(), 0.0, x), x.nansum(-1), x.nan_to_num()), x=x)


def test_flips_and_pads() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x.flip(0, 2), F.pad(x, (1, 2)), F.pad(x, (-1, 2, 3, 0), value=0.5), x.flip(-1).sum(-1)

    check(function, x=random(3, 4, 5), dynamic={"x": (0, 1)}).check(x=random(2, 7, 5))


def test_runtime_sizes_from_one_compilation() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return F.silu(x) * y, x.transpose(0, 1) + 1, torch.softmax(x, -1), x.reshape(-1, 10) * 2

    compiled = Compiled(function, {"x": random(2, 3, 20), "y": random(2, 3, 20)}, DYNAMIC)
    for batch in (1, 2, 3):
        for length in RAGGED:
            compiled.check(x=random(batch, length, 20, seed=length), y=random(batch, length, 20, seed=batch))
    for batch, length in ((0, 3), (2, 0)):
        compiled.check(x=random(batch, length, 20), y=random(batch, length, 20))


def test_a_runtime_size_on_the_last_axis() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        places = torch.arange(x.shape[1])
        causal = places[None, :] <= places[:, None]
        return torch.where(causal, x[:, None, :], -1.0) + y, x.unsqueeze(2) * y, y.transpose(1, 2) + x[:, None, :]

    x, y = random(2, 5), random(2, 5, 5, seed=1)
    compiled = Compiled(function, {"x": x, "y": y}, {"x": (0, 1), "y": (0, 1, 2)})
    for length in RAGGED:
        compiled.check(x=random(2, length), y=random(2, length, length, seed=1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reductions_and_norms_agree_with_eager(dtype: torch.dtype) -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        size = x.shape[-1]
        return (
            x.sum(-1),
            x.sum(-1, keepdim=True) * x,
            x.mean(-1, keepdim=True),
            x.amax(-1),
            x.amin(-1, keepdim=True),
            torch.softmax(x, -1),
            torch.log_softmax(x, -1),
            F.layer_norm(x, (size,), w, b),
            F.layer_norm(x, (size,)),
            effc.rms_norm(x, w, 1e-5),
            effc.rms_norm(x, w, 1e-6, True),
            effc.rms_norm(x, None, 1e-6),
            x - x.mean(-1, keepdim=True),
        )

    for size in (1, 7, 17, 100, 257):
        x = random(2, 40, size, dtype=dtype, seed=size)
        w, b = random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2)
        check(function, x=x, w=w, b=b, dynamic={"x": (0, 1)})


def test_rows_and_scalars_of_any_rank() -> None:
    def function(x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return x.sum(-1), x * s, s + 1, x[3] * 2, x.reshape(5, 2).sum(-1).sum(-1), x.unsqueeze(0).expand(3, 10) + s

    check(function, x=random(10), s=torch.tensor(0.5))


def test_five_axes() -> None:
    check(
        lambda x: (x.permute(0, 2, 4, 1, 3) + 1, x.sum(-1)),
        x=random(2, 3, 4, 5, 6),
        dynamic={"x": (0, 1)},
    )


# --- what is not a number ------------------------------------------------------------------------------------------


def test_special_values_stay_in_their_row() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.softmax(x, -1),
            torch.log_softmax(x, -1),
            x.amax(-1),
            x.amin(-1),
            x.sum(-1),
            F.layer_norm(x, (17,)),
            effc.rms_norm(x, None, 1e-6),
            F.relu(x),
            F.silu(x),
            F.gelu(x, approximate="tanh"),
            x.tanh(),
            x.sigmoid(),
            x.clamp(-1, 1),
            torch.maximum(x, -x),
            0.0 * x,
            x == x,
        )

    x = random(8, 17)
    x[1, 3] = float("nan")
    x[3, 5] = float("inf")
    x[5, 16] = float("-inf")
    x[6] = float("-inf")
    x[7] = float("nan")
    check(function, x=x)


# --- views, gathers, joins -------------------------------------------------------------------------------------------


def test_reductions_of_what_has_no_columns_count_every_column() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        column = x[:, :1]
        return (
            column.expand(4, 9).sum(-1),
            torch.ones(4, 9).sum(-1) * x.sum(-1),
            torch.full((4, 16), 0.25).mean(-1) + column.squeeze(1),
            (column.expand(4, 16) * 2).sum(-1),
            torch.softmax(column.expand(4, 9), -1),
            x.mean(-1, keepdim=True).expand(4, 16).sum(-1),
        )

    check(function, x=(random(4, 9) * 8).round())


def test_a_reduction_read_across_columns_is_stored_first() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x.mean(-1) + y, F.layer_norm(x, (16,)).transpose(1, 2) + 1, F.layer_norm(x, (16,))[:, :, 3] + y

    check(function, x=random(4, 16, 16), y=random(4, 16, seed=1))


def test_views_of_views() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return (
            y.transpose(1, 2).reshape(2, 9, 4)[:, ::2].unsqueeze(1) + 1,
            x.permute(2, 0, 1)[3:, -1].flip(0) * 2,
            y[:, 1:, ::3].reshape(2, -1) + 1,
            y.select(1, -1).squeeze(0) - 1,
            y.reshape(6, 4, 3).transpose(0, 2).reshape(3, 24) + 0.5,
            x[-100:, :2].contiguous(),
            x.expand(2, 2, 3, 12).reshape(4, 36) * 3,
            x.view(2, 1, 36).squeeze(1) + 1,
            x[:, 3:] + 1,
        )

    check(function, x=random(2, 3, 12))


def test_views_as_outputs() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return x, x.transpose(0, 1), y, y[:, 2:], y.transpose(0, 1).reshape(-1), x.expand(2, 4, 6)

    check(function, x=random(4, 6))


def test_splits_and_joins() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        low, high = x.split(5, -1)
        first, second, third = (x * 2).split_with_sizes([1, 3, 6], -1)
        half, other = (x + y).chunk(2, -1)
        return (
            torch.cat((-high, low), -1),
            torch.cat((first * third[..., 2:3], second), -1),
            torch.cat((x, y, x), 0) + 1,
            torch.cat((x, y), 1).sum(-1),
            torch.cat((x,), 1) * 2,
            torch.cat((torch.softmax(x, -1), y), 0),
            torch.cat((x, y), 1)[:, 2] + torch.cat((x, y), 1)[:, -1],
            torch.cat((x.reshape(-1)[:0], x[0], x[0, :0]), 0) + 1,
            half * other,
            torch.cat((x.sum(-1, keepdim=True), x), -1),
        )

    check(function, x=random(2, 3, 10), y=random(2, 3, 10, seed=1), dynamic={"x": (0,), "y": (0,)})


def test_embedding_of_row_major_and_packed_tables() -> None:
    def function(ids: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        rows = F.embedding(ids, table)
        return effc.linear(rows, table), rows * 2, F.embedding(ids, table).transpose(1, 2) + 1

    ids = torch.tensor([[1, 0, 127], [5, 64, 63]])
    for pack in (True, False):
        table = random(128, 24)
        compiled = Compiled(function, {"ids": ids, "table": table}, {"ids": (0, 1)}, weights=("table",), pack=pack)
        assert not compiled.fallbacks
        for length in (1, 3, 17):
            ids = torch.randint(0, 128, (2, length), generator=torch.Generator().manual_seed(length))
            compiled.check(ids=ids, table=table)


def test_names_that_python_or_triton_own() -> None:
    check(
        lambda float, row_mask, i0, tl, lambda_: (
            torch.where(float > 0, float + row_mask, -torch.inf) * i0 + tl - lambda_
        ),
        **{name: random(3, 5) for name in ("float", "row_mask", "i0", "tl", "lambda_")},
    )


def test_squares_of_runtime_sizes() -> None:
    compiled = check(lambda x: x.permute(2, 0, 1) + 1, x=random(5, 5, 5), dynamic={"x": (0, 1, 2)})
    compiled.check(x=random(7, 7, 7))


def test_an_arange_of_floats_runs_through_aten() -> None:
    check(lambda x: torch.arange(0, 1, 0.25) + x, x=random(4), fallbacks=1)


NORM = """\
@triton.jit
def rms_norm(x_ptr, w_ptr, out_ptr, B, S, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    col = tl.arange(0, BLOCK_C)[None, :]
    row_mask = row < B*S

    x = tl.load(x_ptr + col + 16*row, mask=row_mask, other=0)
    w = tl.load(w_ptr + col)

    total = tl.sum(x * x, axis=1)[:, None]
    scale = 1.0 / tl.sqrt(total / 16 + 1e-06)
    rms_norm = x * scale
    rms_norm_2 = rms_norm * w

    tl.store(out_ptr + col + 16*row, rms_norm_2, mask=row_mask)
"""


def test_the_code_is_what_a_person_would_write() -> None:
    compiled = check(lambda x, w: effc.rms_norm(x, w, 1e-6), x=random(2, 3, 16), w=random(16), dynamic={"x": (0, 1)})
    assert compiled.source == NORM
