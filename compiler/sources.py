"""Sources of tensors that are no files: a module in memory, and another source under other names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .evaluate import evaluate
from .weights import Shape, TensorSource, Weight, substitute


class ModuleSource:
    """The parameters and buffers of a module in memory, by reference: reading copies nothing.

    The names are those of the module's state dict; a tensor shared by two names is one tensor.
    """

    def __init__(self, module: nn.Module) -> None:
        self._tensors = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


class MappedSource:
    """A source under other names: each name is a recipe over the tensors of `base`.

    A file's own layout (GGUF's names, permuted rows, a tied head) is one such mapping. `recipes` stays readable, so a
    pass can look through a name at what the file holds, blocks of a quantized format included; other names are those
    of `base`.
    """

    def __init__(self, base: TensorSource, recipes: Mapping[str, Weight]) -> None:
        self.base = base
        self.recipes = dict(recipes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.recipes)

    def shape(self, name: str) -> Shape:
        return self.recipes[name].shape if name in self.recipes else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.recipes[name].dtype if name in self.recipes else self.base.dtype(name)

    def read(self, name: str) -> Tensor:
        return evaluate(self.recipes[name], self.base) if name in self.recipes else self.base.read(name)

    def resolve(self, weight: Weight) -> Weight:
        """The same tensor as a recipe over `base`: every name replaced by what stands for it."""
        return substitute(weight, self.recipes)
