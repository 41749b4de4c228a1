"""fuse_norm: the spellings of RMS norm that models use, and what only looks like one."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.weights import Add
from effc.passes.fuse_norm import fuse_norm
from torch import Tensor, nn

from .pass_checks import B, S, check_pass, example, graph_of, randomize

aten = torch.ops.aten
rms_norm = torch.ops.effc.rms_norm.default
K = 16


class Norm(nn.Module):
    """Llama's RMS norm, with every step open to change."""

    def __init__(self, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K, dtype=weight_dtype or dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = self.widen(x)
        return self.scale(wide, torch.rsqrt(self.mean(wide) + 1e-5), x.dtype)

    def widen(self, x: Tensor) -> Tensor:
        return x.float()

    def mean(self, wide: Tensor) -> Tensor:
        return wide.pow(2).mean(-1, keepdim=True)

    def scale(self, wide: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
        return self.weight * (wide * rstd).to(dtype)


class OnePlusWeight(Norm):
    """Gemma's: scaled by 1 + weight before rounding."""

    def scale(self, wide, rstd, dtype):
        return (wide * rstd * (1.0 + self.weight.float())).to(dtype)


class DividedByRoot(Norm):
    def forward(self, x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight


class Unscaled(Norm):
    def scale(self, wide, rstd, dtype):
        return (wide * rstd).to(dtype)


class TorchNorm(nn.Module):
    def __init__(self, dtype=torch.float32, eps=None):
        super().__init__()
        self.norm = nn.RMSNorm(K, eps=eps, dtype=dtype)

    def forward(self, x):
        return self.norm(x)


def check(module: nn.Module, dtype: torch.dtype = torch.float32, **claims):
    module = randomize(module)
    x = example(B, S, K, dtype=dtype)
    return check_pass(fuse_norm, graph_of(module, x), module, (x,), **claims)


FUSED = {"matches": 1, "present": {rms_norm: 1}, "gone": (aten.mean.dim, aten.rsqrt.default, aten.mul.Tensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scaled_after_rounding(dtype):
    module = Norm(dtype)
    if dtype == torch.float64:
        module.widen = lambda x: x
    graph = check(module, dtype, **FUSED, atol=0)
    (norm,) = (node for node in graph.nodes if node.target is rms_norm)
    assert norm.args == (graph.placeholder("x"), graph.placeholder("weight"), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_plus_weight_becomes_a_recipe(dtype):
    graph = check(OnePlusWeight(dtype), dtype, **FUSED, atol=0)
    (recipe,) = graph.weights.values()
    assert isinstance(recipe, Add)
    assert recipe.dtype == torch.float32


def test_division_by_the_root():
    check(DividedByRoot(), matches=1, present={rms_norm: 1}, gone=(aten.sqrt.default, aten.div.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_scale(dtype):
    graph = check(Unscaled(dtype), dtype, **FUSED, atol=0)
    assert not graph.weights


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_torch(dtype, eps):
    check(TorchNorm(dtype, eps), dtype, matches=1, present={rms_norm: 1}, atol=1e-6 if dtype == torch.float32 else 0)


def test_mean_over_another_dim_is_left_alone():
    module = Norm()
    module.mean = lambda wide: wide.pow(2).mean(1, keepdim=True)
    check(module, matches=0, gone=(rms_norm,), misses=("not over the last",) * 2)


def test_mean_of_something_else_is_left_alone():
    module = Norm()
    module.mean = lambda wide: wide.pow(4).mean(-1, keepdim=True)
    check(module, matches=0, gone=(rms_norm,))


def test_a_norm_in_low_precision_is_left_alone():
    module = Norm(torch.bfloat16)
    module.widen = lambda x: x
    check(module, torch.bfloat16, matches=0, gone=(rms_norm,), misses=("not in fp32",) * 2)


def test_a_scale_of_higher_precision_is_left_out():
    check(Norm(torch.bfloat16, torch.float32), torch.bfloat16, matches=1, present={rms_norm: 1, aten.mul.Tensor: 1})


def test_a_scale_that_is_no_weight_is_left_out():
    module = Norm()
    module.scale = lambda wide, rstd, dtype: wide.sigmoid() * (wide * rstd)
    check(module, matches=1, present={rms_norm: 1, aten.mul.Tensor: 1})


def test_a_shared_inner_value_is_not_computed_twice():
    module = Norm()
    module.scale = lambda wide, rstd, dtype: (module.weight * (wide * rstd), rstd)
    check(module, matches=0, gone=(rms_norm,), misses=("used elsewhere",) * 2)


class WrittenOut(nn.Module):
    """Cohere's layer norm, in fp32 whatever its input is."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(K, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.weight.float() * self.normalize(wide, wide.mean(-1, keepdim=True))).to(x.dtype)

    def normalize(self, wide: Tensor, mean: Tensor) -> Tensor:
        return (wide - mean) * torch.rsqrt((wide - mean).pow(2).mean(-1, keepdim=True) + 1e-5)


class MeanIsUsed(WrittenOut):
    def normalize(self, wide, mean):
        return super().normalize(wide, mean) + mean


class MeanOfTheRest(WrittenOut):
    def normalize(self, wide, mean):
        return super().normalize(wide, wide.mean(-2, keepdim=True))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str)
def test_a_layer_norm_that_is_written_out(dtype, atol):
    module = randomize(WrittenOut(dtype))
    x = example(B, S, K, dtype=dtype)
    present = {aten.layer_norm.default: 1, aten._to_copy.default: 0}
    gone = (aten.mean.dim, aten.sub.Tensor, rms_norm)
    graph = check_pass(fuse_norm, graph_of(module, x), module, (x,), matches=2, present=present, gone=gone, atol=atol)
    (weight,) = graph.weights.values()
    assert weight.dtype == dtype


@pytest.mark.parametrize("near_miss", [MeanIsUsed, MeanOfTheRest])
def test_what_is_no_layer_norm(near_miss):
    module, x = randomize(near_miss()), example(B, S, K)
    graph = graph_of(module, x)
    fuse_norm(graph)
    assert graph.count(aten.layer_norm.default) == 0
