"""Tensors of tiny quantized checkpoints, packed as the published formats say, element by element."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Linear:
    """Random codes [N, K], scales and zero points [N, groups] of one matrix, and the values they stand for.

    act_order: columns belong to any group, to the same in all matrices of that K, as those that share an input do.
    """

    n: int
    k: int
    bits: int
    group: int | None
    symmetric: bool
    seed: int = 0
    scale_dtype: torch.dtype = torch.float16
    act_order: bool = False
    codes: Tensor = field(init=False)
    scales: Tensor = field(init=False)
    zeros: Tensor = field(init=False)
    index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        print(f"seed {self.seed}")
        generator = torch.Generator().manual_seed(self.seed)
        groups = 1 if self.group is None else -(-self.k // self.group)
        top = 1 << self.bits
        self.codes = torch.randint(top, (self.n, self.k), generator=generator)
        self.codes[0, :2] = torch.tensor([0, top - 1])
        self.scales = (torch.rand(self.n, groups, generator=generator) * 0.1 - 0.02).to(self.scale_dtype)
        self.zeros = torch.full((self.n, groups), top // 2)
        if not self.symmetric:
            self.zeros = torch.randint(1, top, (self.n, groups), generator=generator)
        self.index = torch.arange(self.k) // (self.group or self.k)
        if self.act_order:
            self.index = self.index[torch.randperm(self.k, generator=torch.Generator().manual_seed(self.k))]

    @property
    def values(self) -> Tensor:
        """w = scale * (code - zero), in fp32."""
        return self.scales.float()[:, self.index] * (self.codes - self.zeros[:, self.index])


def bits_along(codes: Tensor, dim: int, bits: int) -> Tensor:
    """A stream of bits along an axis, the first code in the lowest bits, as int32 words."""
    stream = codes.movedim(dim, -1)
    digits = torch.stack([stream >> place & 1 for place in range(bits)], -1).flatten(-2)
    digits = torch.nn.functional.pad(digits, (0, -digits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (digits << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int().movedim(-1, dim).contiguous()


def awq(linear: Linear, name: str) -> dict[str, Tensor]:
    def words(codes: Tensor) -> Tensor:
        """[.., N] --> [.., N / 8]: nibble i of a word is column AWQ_ORDER[i] of eight."""
        return bits_along(codes.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2), -1, 4)

    return {
        f"{name}.qweight": words(linear.codes.t()),
        f"{name}.qzeros": words(linear.zeros.t()),
        f"{name}.scales": linear.scales.t().contiguous(),
    }


def gptq(linear: Linear, name: str, version: int = 1) -> dict[str, Tensor]:
    return {
        f"{name}.qweight": bits_along(linear.codes.t(), 0, linear.bits),
        f"{name}.qzeros": bits_along(linear.zeros.t() - int(version == 1), 1, linear.bits),
        f"{name}.scales": linear.scales.t().contiguous(),
        f"{name}.g_idx": linear.index.int(),
    }


def packed(linear: Linear, name: str) -> dict[str, Tensor]:
    """compressed-tensors, pack-quantized. Its codes are signed; half of the range is added before packing."""
    tensors = {
        f"{name}.weight_packed": bits_along(linear.codes, 1, linear.bits),
        f"{name}.weight_scale": linear.scales,
        f"{name}.weight_shape": torch.tensor([linear.n, linear.k]),
    }
    if not linear.symmetric:
        tensors[f"{name}.weight_zero_point"] = bits_along(linear.zeros, 0, linear.bits)
    if linear.act_order:
        tensors[f"{name}.weight_g_idx"] = linear.index.int()
    return tensors


def plain(linear: Linear, name: str) -> dict[str, Tensor]:
    """compressed-tensors, int-quantized."""
    half = 1 << linear.bits - 1
    tensors = {f"{name}.weight": (linear.codes - half).to(torch.int8), f"{name}.weight_scale": linear.scales}
    if not linear.symmetric:
        tensors[f"{name}.weight_zero_point"] = (linear.zeros - half).to(torch.int8)
    return tensors


def packed_config(linear: Linear, layout: str = "pack-quantized", **weights: object) -> dict[str, object]:
    """quantization_config of compressed-tensors."""
    strategy = {"strategy": "channel"} if linear.group is None else {"strategy": "group", "group_size": linear.group}
    described = {"num_bits": linear.bits, "type": "int", "symmetric": linear.symmetric, **strategy, **weights}
    group = {"targets": ["Linear"], "weights": described, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
