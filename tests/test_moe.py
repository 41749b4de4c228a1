"""The kernels of top_k and moe beside eager: one token, few and many; ragged sizes; packed and row-major weights."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import sys
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from .graphs import Compiled, check, random

effc = torch.ops.effc
BF16, FP32 = torch.bfloat16, torch.float32
EXPERTS, PER_TOKEN = 6, 2
TOKENS = (200, 40, 2, 1, 0)
"""Tiles that are shared by many pairs, by few, the way of one token, and nothing to do."""

SWIGLU = "silu(gate) * up"
CLAMPED = "(minimum(maximum(up, -7.0), 7.0) + 1) * (minimum(gate, 7.0) * sigmoid(minimum(gate, 7.0) * 1.702))"

pytestmark = pytest.mark.usefixtures("one_thread")


def choices(tokens: int) -> Tensor:
    """Two different experts for each token; none chooses the last one."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, EXPERTS - 1, generator=generator).topk(PER_TOKEN).indices


class Experts:
    """One shape of experts, to be run on any number of tokens."""

    def __init__(
        self,
        d: int,
        n: int,
        dtype: torch.dtype = FP32,
        scores: torch.dtype | None = None,
        activation: str = SWIGLU,
        bias: bool = False,
        pack: bool = True,
    ) -> None:
        self.d, self.dtype, self.scores = d, dtype, scores or dtype
        parts = 2 if "gate" in activation else 1
        self.weights = {
            "up": (random(EXPERTS, parts, n, d, seed=4) / d**0.5).to(dtype),
            "down": (random(EXPERTS, d, n, seed=5) / n**0.5).to(dtype),
        }
        if bias:
            self.weights["up_bias"] = random(EXPERTS, parts, n, dtype=dtype, seed=6)
            self.weights["down_bias"] = random(EXPERTS, d, dtype=dtype, seed=7)

        def function(x: Tensor, experts: Tensor, scores: Tensor, *weights: Tensor) -> Tensor:
            return effc.experts(x, experts, scores, *weights, *(None,) * (4 - len(weights)), activation)

        self.function = function
        free = dict.fromkeys(("x", "experts", "scores"), (0,))
        self.compiled = Compiled(function, self.tensors(5), free, ("up", "down"), pack=pack)
        assert not self.compiled.fallbacks

    def tensors(self, tokens: int) -> dict[str, Tensor]:
        return {
            "x": random(tokens, self.d, dtype=self.dtype, seed=tokens),
            "experts": choices(tokens),
            "scores": random(tokens, PER_TOKEN, seed=3).softmax(-1).to(self.scores),
            **self.weights,
        }

    def check(self, **changes: Tensor) -> Tensor:
        tokens = next(iter(changes.values())).shape[0]
        (result,) = self.compiled.check(luck=1, **{**self.tensors(tokens), **changes})
        return result


@cache
def some_experts() -> Experts:
    return Experts(33, 16)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "row-major"])
@pytest.mark.parametrize(("d", "n"), [(64, 32), (33, 7)])
def test_one_compilation_serves_every_token_count(d: int, n: int, pack: bool) -> None:
    experts = Experts(d, n, pack=pack)
    for tokens in TOKENS:
        experts.compiled.check(luck=1, **experts.tensors(tokens))


@pytest.mark.parametrize("scores", [BF16, FP32], ids=str)
def test_low_precision_with_biases_and_a_clamped_gate(scores: torch.dtype) -> None:
    experts = Experts(40, 24, BF16, scores, CLAMPED, bias=True)
    for tokens in TOKENS:
        experts.compiled.check(luck=1, **experts.tensors(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "activation", ["gelu_tanh(up)", "relu(gate) * up", "gelu(gate) * up", "up / (1 + exp(0 - up))"]
)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    experts = Experts(48, 16, dtype, activation=activation, bias=True)
    for tokens in (50, 1):
        experts.compiled.check(luck=1, **experts.tensors(tokens))


def test_all_tokens_to_one_expert_and_none_to_the_others() -> None:
    experts = some_experts()
    for tokens in (300, 7, 1):
        chosen = torch.full((tokens, PER_TOKEN), EXPERTS - 1)
        experts.check(experts=chosen)


def test_a_token_of_nan_stays_alone() -> None:
    experts = some_experts()
    for tokens in (100, 6):
        x = random(tokens, 33)
        x[3] = float("nan")
        x[5, 2] = float("inf")
        result = experts.check(x=x)
        assert result[3].isnan().all()
        assert result[[0, 1, 2, 4]].isfinite().all()


def test_leading_axes_and_strides_are_any() -> None:
    def function(x: Tensor, chosen: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        return (
            effc.experts(x.transpose(0, 1), chosen, scores, up, down),
            effc.experts(x.transpose(0, 1)[:, :1], chosen[:, :1], scores[:, :1] * 2, up[::2], down[::2]),
        )

    check(
        function,
        x=random(3, 4, 16),
        chosen=choices(12).reshape(4, 3, 2) // 2,
        scores=random(4, 3, 2),
        up=random(EXPERTS, 2, 12, 16),
        down=random(EXPERTS, 16, 12),
    )


def test_weights_may_lie_in_any_order() -> None:
    """Rows of gate and up in turns, depth before rows: they are read where they are."""

    def function(x: Tensor, chosen: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return effc.experts(x, chosen, scores, up.permute(0, 3, 2, 1), down.transpose(1, 2))

    weights = {"up": random(EXPERTS, 33, 20, 2) / 6, "down": random(EXPERTS, 20, 33) / 5}

    def tensors(tokens: int) -> dict[str, Tensor]:
        scores = random(tokens, PER_TOKEN, seed=3).softmax(-1)
        return {"x": random(tokens, 33, seed=tokens), "chosen": choices(tokens), "scores": scores, **weights}

    free = dict.fromkeys(("x", "chosen", "scores"), (0,))
    compiled = Compiled(function, tensors(5), free, ("up", "down"))
    assert all(launch.kernel.name != "copy" for step in compiled.scheduled.schedule.steps for launch in step.launches)
    for tokens in TOKENS:
        compiled.check(luck=1, **tensors(tokens))


def test_mixed_dtypes_run_through_aten() -> None:
    tensors = {"x": random(3, 8), "chosen": choices(3), "scores": random(3, 2).double()}
    weights = {"up": random(EXPERTS, 2, 4, 8), "down": random(EXPERTS, 8, 4)}
    check(
        lambda x, chosen, scores, up, down: effc.experts(x, chosen, scores, up, down), fallbacks=1, **tensors, **weights
    )


def test_between_the_kernels_lies_nothing_of_tokens_by_experts() -> None:
    """What a token needs grows with the experts it chooses, not with those there are."""
    experts = some_experts()
    launches = [launch for step in experts.compiled.scheduled.schedule.steps for launch in step.launches]
    buffers = {buffer for launch in launches for buffer in launch.buffers if buffer.kind == "temporary"}
    (symbol,) = {symbol for buffer in buffers for symbol in buffer.elements.free_symbols}
    growth = sum(float(buffer.bytes.subs(symbol, 1600) - buffer.bytes.subs(symbol, 0)) for buffer in buffers) / 1600
    per_pair = 4 * (33 + 16 + 1)
    assert growth == pytest.approx(PER_TOKEN * per_pair + 4 * PER_TOKEN * (1 / 16 + 1 / 64))


# --- routers ---------------------------------------------------------------------------------------------------------

ROUTERS = {
    "softmax of all": ("softmax(float32(logits))", "values", "chosen / sum(chosen)"),
    "softmax of the chosen": ("logits", "values", "softmax(chosen)"),
    "corrected sigmoids": ("sigmoid(float32(logits))", "values + correction", "chosen / (sum(chosen) + 1e-20) * 2.5"),
    "the best groups": (
        "sigmoid(float32(logits))",
        "of_best_groups(values + correction, 3, 2, 2)",
        "chosen / (sum(chosen) + 1e-20)",
    ),
    "as x's dtype": ("softmax(float32(logits))", "values", "bfloat16(chosen)"),
}


class Mixture:
    """A mixture with a router, to be run on any number of tokens.

    The router's weights and the tokens are multiples of 1/4 and integers, so that its product is exact in any dtype,
    and ties are the same for all.
    """

    def __init__(
        self,
        router: str,
        count: int,
        per_token: int,
        dtype: torch.dtype = FP32,
        router_dtype: torch.dtype | None = None,
        norm: bool = False,
        pack: bool = True,
    ) -> None:
        self.d, self.dtype, values, n = 40, dtype, ROUTERS[router], 24
        self.weights = {
            "router": (random(count, self.d, seed=1).sign() / 4).to(router_dtype or dtype),
            "bias": integers(count, seed=2).to(router_dtype or dtype),
            "correction": random(count, seed=3) / 8,
            "up": (random(count, 2, n, self.d, seed=4) / self.d**0.5).to(dtype),
            "down": (random(count, self.d, n, seed=5) / n**0.5).to(dtype),
        }

        def function(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
            router, bias, correction, up, down = weights
            x = effc.rms_norm(x, None, 1e-5) if norm else x
            return effc.moe(x, router, up, down, per_token, bias, correction, None, None, y, *values)

        free = {"x": (0,), "y": (0,)}
        self.compiled = Compiled(function, self.tensors(5), free, ("router", "up", "down"), pack=pack)
        assert not self.compiled.fallbacks

    def tensors(self, tokens: int) -> dict[str, Tensor]:
        x, y = (integers(tokens, self.d, seed=tokens).to(self.dtype), random(tokens, self.d, dtype=self.dtype))
        return {"x": x, "y": y, **self.weights}

    def check(self) -> None:
        for tokens in TOKENS:
            self.compiled.check(luck=1, **self.tensors(tokens))


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("router", "count", "per_token", "dtype", "router_dtype"),
    [
        ("corrected sigmoids", 6, 3, BF16, FP32),
        pytest.param("corrected sigmoids", 16, 4, FP32, FP32, marks=pytest.mark.slow),
        pytest.param("the best groups", 15, 4, FP32, FP32, marks=pytest.mark.slow),
        pytest.param("softmax of all", 4, 2, FP32, FP32, marks=pytest.mark.slow),
        pytest.param("softmax of all", 60, 4, BF16, BF16, marks=pytest.mark.slow),
        pytest.param("softmax of the chosen", 8, 3, torch.float16, torch.float16, marks=pytest.mark.slow),
        pytest.param("softmax of the chosen", 5, 5, BF16, BF16, marks=pytest.mark.slow),
        pytest.param("as x's dtype", 7, 1, BF16, BF16, marks=pytest.mark.slow),
    ],
)
def test_routers(router: str, count: int, per_token: int, dtype: torch.dtype, router_dtype: torch.dtype | None) -> None:
    Mixture(router, count, per_token, dtype, router_dtype).check()


@pytest.mark.parametrize("pack", [pytest.param(True, marks=pytest.mark.slow), False], ids=["packed", "row-major"])
def test_one_token_takes_three_launches_and_no_norm_of_its_own(pack: bool) -> None:
    mixture = Mixture("softmax of all", 16, 2, norm=True, pack=pack)
    mixture.check()
    (step,) = mixture.compiled.scheduled.schedule.steps
    (_, of_one), *_ = step.cases
    assert [launch.kernel.name for launch in of_one] == ["norm_gemv", "choose_and_expert_up", "expert_down_residual"]


def test_a_router_in_fp64_runs_through_aten() -> None:
    tensors = {"x": random(3, 8), "r": random(4, 8).double(), "up": random(4, 2, 4, 8), "down": random(4, 8, 4)}
    check(lambda x, r, up, down: effc.moe(x, r, up, down, 2), fallbacks=1, **tensors)


# --- top_k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "k"), [(8, 2), (128, 8), (5, 5), (1, 1), (1000, 16)])
def test_top_k_is_that_of_torch(size: int, k: int) -> None:
    x = random(3, 7, size)
    compiled = check(lambda x: effc.top_k(x, k), {"x": (0, 1)}, x=x)
    assert torch.equal(compiled.last[0], x.topk(k).indices)
    compiled.check(x=random(1, 1, size))
    compiled.check(x=random(2, 0, size))


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
def test_the_first_of_equal_entries_comes_first(dtype: torch.dtype) -> None:
    x = torch.randint(-2, 3, (50, 12), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0], x[1, ::2], x[2, 3] = float("-inf"), float("inf"), -0.0
    check(lambda x: effc.top_k(x, 6), x=x)


def test_nan_is_the_largest_and_every_place_is_one_of_the_row() -> None:
    x = random(6, 9)
    x[0], x[1, 4], x[2, 2], x[3] = float("nan"), float("nan"), -float("nan"), float("-inf")
    compiled = check(lambda x: effc.top_k(x, 9), x=x)
    assert (compiled.last[0].sort(-1).values == torch.arange(9)).all()


def test_top_k_of_doubles_runs_through_aten() -> None:
    check(lambda x: effc.top_k(x, 2), x=random(3, 8).double(), fallbacks=1)


# --- what one token touches ------------------------------------------------------------------------------------------

PAGE = mmap.PAGESIZE


def guarded(tensor: Tensor) -> tuple[Tensor, Callable[[int], None]]:
    """A copy of a weight [E, ...] of whole pages an expert, and a function after which one expert's cannot be read."""
    size = tensor.nbytes // EXPERTS
    assert size % PAGE == 0
    memory = mmap.mmap(-1, tensor.nbytes)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    def forbid(expert: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        start = ctypes.c_void_p(copy.data_ptr() + expert * size)
        assert libc.mprotect(start, ctypes.c_size_t(size), 0) == 0, ctypes.get_errno()

    return copy, forbid


def ends_well(function: Callable[[], object]) -> bool:
    """Whether a function runs to its end in a child process."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        function()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected as on Linux")
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "row-major"])
def test_one_token_touches_only_the_weights_of_its_experts(pack: bool) -> None:
    experts = Experts(64, 32, pack=pack)
    forbidders = []
    for name in ("up", "down"):
        experts.compiled.weights[name], forbid = guarded(experts.compiled.weights[name])
        forbidders.append(forbid)
    for expert in (0, 2, 3, 5):
        for forbid in forbidders:
            forbid(expert)
    given = experts.tensors(1)
    assert ends_well(lambda: experts.compiled(**{**given, "experts": torch.tensor([[1, 4]])}))
    assert not ends_well(lambda: experts.compiled(**{**given, "experts": torch.tensor([[1, 5]])})), "nothing is guarded"
    given = experts.tensors(7)
    assert ends_well(lambda: experts.compiled(**{**given, "experts": torch.tensor([[4, 1]] * 7)})), "nor do many tokens"
