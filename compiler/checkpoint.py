"""Quantized checkpoints in safetensors: what each packs its matrices into, read as parts of a format.

    NAME.qweight, NAME.qzeros, NAME.scales  -->  NAME.weight.codes, NAME.weight.scales, NAME.weight.mins

Codes are moved, never dequantized; scales are kept exactly. The layouts are those of `checkpoint_layouts`, by the
`quant_method` of config.json. Bad scales, shapes and layouts are named in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .bit_planes import pack_planes
from .errors import InputError, ModelError
from .formats import FORMATS, Format
from .weights import Shape

Reader = Callable[[], Tensor]


class Tensors(Protocol):
    """The tensors of a checkpoint's files."""

    @property
    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix [N, K] of a checkpoint.

    tensors: what it is read from. codes: [N, K], as `Format.codes` has them. scales: [N, groups]. zeros: [N, groups],
    the codes that stand for 0, where the checkpoint has them. groups: for each column its group (GPTQ's act-order),
    where the checkpoint says.
    """

    name: str
    format: Format
    shape: Shape
    tensors: tuple[str, ...]
    codes: Reader
    scales: Reader
    zeros: Reader | None = None
    groups: Reader | None = None

    def __post_init__(self) -> None:
        try:
            self.format.part_shapes(*self.shape)
        except InputError as error:
            raise ModelError(f"{self.name}: {error}") from error

    @cached_property
    def order(self) -> Tensor | None:
        """The columns group by group; None where they lie so. Parts are in this order."""
        if self.groups is None or self.format.group is None:
            return None
        groups, k = self.groups().long(), self.shape[1]
        expected = torch.arange(k) // self.format.group
        order = torch.argsort(groups, stable=True)
        if groups.shape != (k,) or not torch.equal(groups[order], expected):
            raise ModelError(
                f"{self.name}: expected each group of g_idx to have {self.format.group} of {k} columns, found others"
            )
        return None if torch.equal(groups, expected) else order

    def read(self, part: str) -> Tensor:
        """One of the parts of the format."""
        match part:
            case "codes" | "high":
                return self.planes()[part]
            case "scales":
                return self.checked_scales().to(self.format.scale_dtype)
            case "mins":
                return -(self.checked_scales().float() * self.zeros().float())
        raise KeyError(f"{self.name} has no part {part!r}")

    def planes(self) -> dict[str, Tensor]:
        codes = self.codes()
        if self.order is not None:
            codes = codes[:, self.order]
        if self.format.width < 8:
            return dict(zip(("codes", "high"), pack_planes(codes, self.format.planes)))
        if codes.is_floating_point():
            bad = (codes.contiguous().view(torch.uint8) & 0x7F) == 0x7F
            if bad.any():
                raise ModelError(f"{self.name}: expected finite codes, found NaN in row {first_row(bad)}")
        return {"codes": codes.contiguous()}

    def checked_scales(self) -> Tensor:
        scales = self.scales()
        bad = ~scales.float().isfinite()
        if bad.any():
            found = "NaN" if scales.isnan().any() else "infinity"
            raise ModelError(f"{self.name}: expected finite scales, found {found} in row {first_row(bad)}")
        if self.zeros is not None and not self.format.asymmetric:
            other = self.zeros() != self.format.zero
            if other.any():
                found = int(self.zeros()[other][0])
                raise ModelError(
                    f"{self.name}: expected zero points of {self.format.zero} in a symmetric checkpoint, found {found} "
                    f"in row {first_row(other)}"
                )
        return scales.contiguous()


def first_row(bad: Tensor) -> int:
    return int(bad.any(-1).nonzero()[0, 0])


def format_for(name: str, kind: str, group: int | None, scale_dtype: torch.dtype) -> Format:
    """The format of that kind ("int4", "int4z", "fp8_e4m3") and group whose scales hold `scale_dtype` exactly."""
    wanted = kind if group is None else f"{kind}_g{group}"
    if wanted in FORMATS and FORMATS[wanted].scale_dtype != torch.float32 and scale_dtype != torch.float16:
        wanted += "_f32"
    if wanted not in FORMATS:
        held = [row.group for row in FORMATS.values() if row.name.startswith(f"{kind}_g") and not row.whole]
        sizes = ", ".join(map(str, sorted({size for size in held if size})))
        what = f"groups of {sizes}, or rows" if sizes else "8, 4, 3 or 2 bits"
        raise ModelError(f"{name}: expected {what}, found {wanted}")
    return FORMATS[wanted]


def check_shape(
    source: Tensors, name: str, expected: Shape, dtypes: Sequence[torch.dtype], ones_aside: bool = False
) -> None:
    """Raises ModelError where a tensor is missing or is another than the layout says.

    ones_aside: sizes of 1 may be there or not.
    """
    if name not in source.names:
        raise ModelError(f"expected a tensor {name}, found none in the checkpoint")
    shape, dtype = source.shape(name), source.dtype(name)
    left, right = ([size for size in sizes if size != 1 or not ones_aside] for sizes in (shape, expected))
    if left != right or dtype not in dtypes:
        kinds = " or ".join(str(kind).removeprefix("torch.") for kind in dtypes)
        found = f"{str(dtype).removeprefix('torch.')}{list(shape)}"
        raise ModelError(f"{name}: expected {kinds}{list(expected)}, found {found}")
