"""Quantized checkpoints: AWQ, GPTQ and compressed-tensors stand for the values that their formats define."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from effc.compiler.checkpoint import Matrix
from effc.compiler.checkpoint_layouts import awq, gptq
from effc.compiler.compressed_tensors import compressed_tensors
from effc.compiler.errors import ModelError
from torch import Tensor

from . import quantized_checkpoints as published
from .quantized_checkpoints import Linear, packed_config

pytestmark = pytest.mark.usefixtures("one_thread")

N, K = 24, 256
NAME = "model.layers.0.mlp.up_proj"


class InMemory:
    """Tensors by name, as a checkpoint's files give them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def only(layout: Callable, tensors: dict[str, Tensor], config: dict) -> Matrix:
    (matrix,) = layout(InMemory(tensors), config)
    return matrix


def values(matrix: Matrix) -> Tensor:
    """What the parts stand for, columns where they were."""
    parts = [matrix.read(name) for name in matrix.format.part_names]
    promised = matrix.format.part_shapes(*matrix.shape).values()
    assert [(tuple(part.shape), part.dtype) for part in parts] == list(promised)
    assert all(part.is_contiguous() for part in parts)
    found = matrix.format.dequantize(parts)
    return found if matrix.order is None else found[:, torch.argsort(matrix.order)]


def check(matrix: Matrix, linear: Linear, format: str) -> None:
    assert matrix.name == f"{NAME}.weight"
    assert matrix.format.name == format
    assert matrix.shape == (linear.n, linear.k)
    if linear.symmetric:
        assert torch.equal(values(matrix), linear.values)
    else:
        largest = linear.scales.float().abs()[:, linear.index] * (1 << linear.bits)
        assert ((values(matrix) - linear.values).abs() <= largest * 2**-22).all()


# --- AWQ -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "format"), [(128, "int4z_g128"), (32, "int4z_g32"), (None, "int4z")])
def test_awq(group, format):
    linear = Linear(N, K, 4, group, symmetric=False)
    config = {"bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm"}
    check(only(awq, published.awq(linear, NAME), config), linear, format)
    old = {"w_bit": 4, "q_group_size": group or -1, "zero_point": True, "version": "GEMM"}
    check(only(awq, published.awq(linear, NAME), old), linear, format)


def test_awq_of_bf16_keeps_its_scales():
    linear = Linear(N, K, 4, 64, symmetric=False, scale_dtype=torch.bfloat16)
    linear.scales[3, 1] = 1e-20
    check(only(awq, published.awq(linear, NAME), {"bits": 4, "group_size": 64}), linear, "int4z_g64_f32")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bits": 4, "version": "gemv"}, "expected version gemm and 4 bits, found gemv and 4"),
        ({"bits": 3, "version": "gemm"}, "expected version gemm and 4 bits, found gemm and 3"),
        ({"bits": 4, "group_size": 48}, f"{NAME}: expected groups of 32, 64, 128, or rows, found int4z_g48"),
        ({"bits": 4, "group_size": 64}, rf"{NAME}.qzeros: expected int32\[4, 3\], found int32\[8, 3\]"),
    ],
)
def test_what_awq_cannot_be_is_named(config, said):
    group = 48 if config.get("group_size") == 48 else 32
    tensors = published.awq(Linear(N, K if group == 32 else 480, 4, group, symmetric=False), NAME)
    with pytest.raises(ModelError, match=said):
        list(awq(InMemory(tensors), config))


# --- GPTQ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [64, None], ids=["groups", "rows"])
def test_gptq(version, bits, symmetric, group):
    linear = Linear(32, K, bits, group, symmetric)
    config = {"bits": bits, "group_size": group or -1, "sym": symmetric, "desc_act": False}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    found = only(gptq, published.gptq(linear, NAME, version), config)
    check(found, linear, f"int{bits}{'' if symmetric else 'z'}{'_g64' if group else ''}")
    assert found.order is None


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("named", ["gptq", "gptq_v2"])
def test_a_symmetric_checkpoint_says_itself_how_it_keeps_zeros(kept, named):
    linear = Linear(N, K, 4, 32, symmetric=True)
    tensors = published.gptq(linear, NAME, kept)
    check(only(gptq, tensors, GPTQ | {"checkpoint_format": named}), linear, "int4_g32")


def test_gptq_in_act_order():
    """Columns of a group lie anywhere: parts hold them group by group, and the order says where they were."""
    for linear in (Linear(N, K, 4, 32, True, act_order=True), Linear(N, K, 3, 64, False, seed=1, act_order=True)):
        linear = replace(linear, n=32)
        config = {"bits": linear.bits, "group_size": linear.group, "sym": linear.symmetric, "desc_act": True}
        found = only(gptq, published.gptq(linear, NAME), config)
        assert found.order is not None
        check(found, linear, f"int{linear.bits}{'' if linear.symmetric else 'z'}_g{linear.group}")


def test_gptq_without_g_idx():
    linear = Linear(N, K, 4, 128, symmetric=True)
    tensors = published.gptq(linear, NAME)
    del tensors[f"{NAME}.g_idx"]
    check(only(gptq, tensors, {"bits": 4, "group_size": 128, "sym": True}), linear, "int4_g128")


GPTQ = {"bits": 4, "group_size": 32, "sym": True}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"checkpoint_format": "marlin"}, "expected checkpoint_format gptq or gptq_v2, found marlin"),
        ({"is_marlin_format": True}, "expected checkpoint_format gptq or gptq_v2, found marlin"),
        ({"bits": 5}, "expected 2, 3, 4 or 8 bits, found 5"),
        ({"bits": 8}, rf"{NAME}.qzeros: expected int32\[4, 6\], found int32\[8, 3\]"),
        ({"group_size": 64}, rf"{NAME}.qzeros: expected int32\[4, 3\], found int32\[8, 3\]"),
    ],
)
def test_what_gptq_cannot_be_is_named(config, said):
    tensors = published.gptq(Linear(N, K, 4, 32, symmetric=True), NAME)
    with pytest.raises(ModelError, match=said):
        list(gptq(InMemory(tensors), GPTQ | config))


def test_bad_tensors_of_gptq_are_named():
    linear = Linear(N, K, 4, 32, symmetric=True)
    linear.zeros[5, 1] = 7
    matrix = only(gptq, published.gptq(linear, NAME), GPTQ)
    with pytest.raises(ModelError, match="expected zero points of 8 in a symmetric checkpoint, found 7 in row 5"):
        matrix.read("scales")
    linear = Linear(N, K, 4, 32, symmetric=True)
    linear.scales[9, 2] = torch.nan
    matrix = only(gptq, published.gptq(linear, NAME), GPTQ)
    with pytest.raises(ModelError, match=f"{NAME}.weight: expected finite scales, found NaN in row 9"):
        matrix.read("scales")
    linear = Linear(N, K, 4, 32, symmetric=True)
    linear.index[0] = 7
    matrix = only(gptq, published.gptq(linear, NAME), GPTQ)
    with pytest.raises(ModelError, match="expected each group of g_idx to have 32 of 256 columns, found others"):
        matrix.read("codes")
    tensors = published.gptq(linear, NAME)
    del tensors[f"{NAME}.qzeros"]
    with pytest.raises(ModelError, match=f"expected a tensor {NAME}.qzeros, found none"):
        list(gptq(InMemory(tensors), GPTQ))


# --- compressed-tensors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [128, None], ids=["groups", "rows"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_pack_quantized(bits, symmetric, group, scale_dtype):
    linear = Linear(21, K, bits, group, symmetric, scale_dtype=scale_dtype)
    kept = "_g128" + "_f32" * (scale_dtype == torch.bfloat16) if group else ""
    found = only(compressed_tensors, published.packed(linear, NAME), packed_config(linear))
    check(found, linear, f"int{bits}{'' if symmetric else 'z'}{kept}")


def test_pack_quantized_in_act_order():
    linear = Linear(N, K, 4, 32, True, act_order=True)
    found = only(compressed_tensors, published.packed(linear, NAME), packed_config(linear, actorder="group"))
    assert found.order is not None
    check(found, linear, "int4_g32")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [64, None], ids=["groups", "rows"])
def test_int_quantized(symmetric, group):
    linear = Linear(N, K, 8, group, symmetric)
    found = only(compressed_tensors, published.plain(linear, NAME), packed_config(linear, "int-quantized"))
    check(found, linear, f"int8{'' if symmetric else 'z'}{'_g64' if group else ''}")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_scale_for_the_whole_tensor(shape):
    linear = Linear(N, K, 8, None, True)
    linear.scales = linear.scales[:1].expand(N, 1)
    tensors = published.plain(linear, NAME) | {f"{NAME}.weight_scale": linear.scales[:1].reshape(shape)}
    check(only(compressed_tensors, tensors, packed_config(linear, "int-quantized", strategy="tensor")), linear, "int8")


def float_quantized(n: int, k: int, scales: Tensor) -> dict[str, Tensor]:
    codes = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).mul(50).to(torch.float8_e4m3fn)
    return {f"{NAME}.weight": codes, f"{NAME}.weight_scale": scales}


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_float_quantized(strategy):
    n, k = 20, 96
    shape = {"channel": (n, 1), "tensor": (1,), "block": (3, 3)}[strategy]
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    tensors = float_quantized(n, k, scales)
    linear = Linear(n, k, 8, None, True)
    config = packed_config(linear, "float-quantized", type="float", strategy=strategy, block_structure=[8, 32])
    found = only(compressed_tensors, tensors, config)
    assert found.format.name == ("fp8_e4m3_g32" if strategy == "block" else "fp8_e4m3")
    spread = (
        scales.float() if strategy != "block" else scales.float().repeat_interleave(8, 0)[:n].repeat_interleave(32, 1)
    )
    assert torch.equal(values(found), spread * tensors[f"{NAME}.weight"].float())


def test_bad_codes_of_fp8_are_named():
    tensors = float_quantized(20, 96, torch.ones(20, 1))
    tensors[f"{NAME}.weight"].view(torch.uint8)[4, 7] = 0xFF
    config = packed_config(Linear(20, 96, 8, None, True), "float-quantized", strategy="channel")
    with pytest.raises(ModelError, match=f"{NAME}.weight: expected finite codes, found NaN in row 4"):
        only(compressed_tensors, tensors, config).read("codes")


def test_modules_find_their_group():
    """By name, by pattern, else by class."""
    wide, narrow = Linear(N, K, 8, None, True), Linear(N, K, 4, 64, True, seed=1)
    groups = {
        "a": packed_config(wide)["config_groups"]["group_0"],
        "b": packed_config(narrow)["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$"]},
    }
    config = packed_config(wide, "mixed-precision") | {"config_groups": groups}
    tensors = published.packed(wide, "mlp.up_proj") | published.packed(narrow, "mlp.down_proj")
    found = {matrix.name: matrix for matrix in compressed_tensors(InMemory(tensors), config)}
    assert {name: matrix.format.name for name, matrix in found.items()} == {
        "mlp.up_proj.weight": "int8",
        "mlp.down_proj.weight": "int4_g64",
    }
    assert torch.equal(values(found["mlp.down_proj.weight"]), narrow.values)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"format": "nvfp4-pack-quantized"},
            "unsupported compressed-tensors format 'nvfp4-pack-quantized': expected one",
        ),
        ({"config_groups": {}}, f"{NAME}: expected a group of config_groups that targets it, found none"),
    ],
)
def test_what_compressed_tensors_cannot_be_is_named(config, said):
    linear = Linear(N, K, 4, 32, symmetric=True)
    with pytest.raises(ModelError, match=said):
        list(compressed_tensors(InMemory(published.packed(linear, NAME)), packed_config(linear) | config))


def test_bits_that_no_format_has_are_named():
    linear = Linear(N, K, 5, 32, symmetric=True)
    with pytest.raises(ModelError, match=f"{NAME}: expected 8, 4, 3 or 2 bits, found int5_g32"):
        list(compressed_tensors(InMemory(published.packed(linear, NAME)), packed_config(linear)))


def test_other_tensors_of_a_checkpoint_are_left_alone():
    linear = Linear(N, K, 4, 32, symmetric=True)
    tensors = published.packed(linear, NAME) | {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(4, 4)}
    assert only(compressed_tensors, tensors, packed_config(linear)).name == f"{NAME}.weight"
