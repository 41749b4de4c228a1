"""What calibration decides for one matrix: its format and the parts that it becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.formats import Format
from .sites import Site

Choice = Callable[[Site], Format | None]
"""The format of a site; None leaves it as it is."""

Progress = Callable[[int, int, str], None]
"""Told how many of how many steps are done, and what the last one was."""


@dataclass(frozen=True)
class Assignment:
    """A matrix in a format. parts: in the order of `format.part_names`."""

    format: Format
    parts: tuple[Tensor, ...]

    def values(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] that the parts stand for."""
        return self.format.dequantize(self.parts, dtype)


def everywhere(format: Format) -> Choice:
    """One format for all linears but those whose weight something else reads too (a tied embedding)."""
    return lambda site: None if site.shared else format


def no_progress(done: int, total: int, what: str) -> None:
    """Nobody is told."""
