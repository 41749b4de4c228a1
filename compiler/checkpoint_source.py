"""A quantized checkpoint as a source of tensors: a matrix in codes is its parts, all else is as the files have it.

model.layers.0.mlp.up_proj.qweight, .qzeros, .scales  -->  model.layers.0.mlp.up_proj.weight.codes, .scales, .mins
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Matrix, Tensors
from .checkpoint_layouts import awq, gptq
from .column_order import columns_back
from .compressed_tensors import compressed_tensors
from .errors import ModelError
from .quantized_weights import Dequantize
from .weights import Shape, TensorSource, Weight, read

METHODS: dict[str, Callable[[Tensors, Mapping[str, Any]], Iterator[Matrix]]] = {
    "awq": awq,
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
}
"""By `quant_method` of config.json."""


class CheckpointSource:
    """The tensors of a checkpoint; of its quantized matrices, the parts: NAME.codes, NAME.scales, ..."""

    def __init__(self, base: Tensors, matrices: Iterable[Matrix]) -> None:
        self._base = base
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._parts = {
            f"{name}.{part}": (matrix, part, *kept)
            for name, matrix in self._matrices.items()
            for part, kept in matrix.format.part_shapes(*matrix.shape).items()
        }
        used = {name for matrix in self._matrices.values() for name in matrix.tensors}
        self._others = tuple(name for name in base.names if name not in used)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._others, *self._parts)

    def shape(self, name: str) -> Shape:
        return self._parts[name][2] if name in self._parts else self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._parts[name][3] if name in self._parts else self._base.dtype(name)

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self._base.read(name)
        matrix, part, *_ = self._parts[name]
        return matrix.read(part)

    def stored(self, name: str) -> Weight | None:
        """The recipe for the tensor `name`: its values where it is quantized; None where there is no such tensor."""
        matrix = self._matrices.get(name)
        if matrix is None:
            return read(self, name) if name in self._others else None
        parts = tuple(read(self, f"{name}.{part}") for part in matrix.format.part_names)
        values = Dequantize(parts, matrix.format.name, matrix.shape, torch.float32)
        return values if matrix.order is None else columns_back(values, matrix.order)


def of_method(base: Tensors, config: Mapping[str, Any], where: object) -> TensorSource:
    """A checkpoint by its `quantization_config`. Raises ModelError for a method or a layout that is not known here."""
    method = config.get("quant_method")
    if method not in METHODS:
        raise ModelError(f"{where}: unsupported quant_method {method!r}; expected one of {', '.join(METHODS)}")
    try:
        return CheckpointSource(base, METHODS[method](base, config))
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
