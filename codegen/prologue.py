"""A norm as the prologue of a product with one row: each program of the product normalizes the row for itself.

    linear(rms_norm(x, g), W)  -->  one kernel: the row's scale first, then x * scale * g as W is read

With one row this costs a second reading of x in each program, small beside its share of W, and saves a launch. With
more rows the norm is a launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..compiler.graph import dtype_of, sizes
from ..compiler.ops import OPS
from .kernel import TL_TYPES, Layout
from .pointwise import MAX_COLUMNS
from .scope import Scope
from .template import Arguments, power_of_two

aten = torch.ops.aten

NORMS = frozenset({OPS["rms_norm"].target, aten.layer_norm.default})
PRODUCTS = frozenset(OPS[name].target for name in ("linear", "gated_linear", "moe", "fake_quantize"))


@dataclass
class Norm:
    """A norm to be computed by the product that reads it. weight and bias: [K], where it has them."""

    node: fx.Node
    x: Layout
    weight: Layout | None
    bias: Layout | None
    eps: float
    scales_rounded: bool

    @property
    def size(self) -> int:
        return int(sizes(self.node)[-1])

    @property
    def centers(self) -> bool:
        return self.node.target is aten.layer_norm.default

    def add_pointers(self, arguments: Arguments) -> None:
        for name, layout in (("norm_weight_ptr", self.weight), ("norm_bias_ptr", self.bias)):
            if layout is not None:
                arguments.pointer(name, layout)

    def add_to(self, arguments: Arguments) -> None:
        self.add_pointers(arguments)
        arguments.constant("BLOCK_ROW", power_of_two(self.size))

    def statistics(self) -> list[str]:
        """Lines that compute `scale`, and `mean` for a layer norm, of the whole row."""
        masked = self.size != power_of_two(self.size)
        mask = f", mask=tl.arange(0, BLOCK_ROW) < {self.size}, other=0.0" if masked else ""
        load = f"whole = tl.load(x_ptr + tl.arange(0, BLOCK_ROW){mask}).to(tl.float32)"
        return [load, *self.statistics_of("whole", f"tl.arange(0, BLOCK_ROW) < {self.size}" if masked else "")]

    def statistics_of(self, row: str, there: str, total: str = "tl.sum({}, axis=0)") -> list[str]:
        """The same of a row that lies in the variable `row`; `total` sums all of it, `there` is its mask."""
        lines = []
        if self.centers:
            centered = f"{row} - mean"
            lines += [
                f"mean = {total.format(row)} / {self.size}",
                f"whole = tl.where({there}, {centered}, 0.0)" if there else f"whole = {centered}",
            ]
            row = "whole"
        return [*lines, f"scale = 1.0 / tl.sqrt({total.format(f'{row} * {row}')} / {self.size} + {self.eps!r})"]

    def normalize(self, mask: str, place: str = "k + inner") -> list[str]:
        """Lines that normalize `x`, the entries `place` of the row; it rounds where the norm's own kernel does."""
        low = dtype_of(self.node) != torch.float32
        rounded = f".to({TL_TYPES[dtype_of(self.node)]}).to(tl.float32)" if low else ""
        x = "(x - mean) * scale" if self.centers else "x * scale"
        lines = []
        if self.scales_rounded and low and self.weight is not None:
            lines.append(f"x = ({x}){rounded}")
            x = "x"
        for name, layout, sign in (("norm_weight", self.weight, "*"), ("norm_bias", self.bias, "+")):
            if layout is not None:
                lines.append(f"{name} = tl.load({name}_ptr + {place}{mask}).to(tl.float32)")
                x = f"{x} {sign} {name}"
        return [*lines, f"x = ({x}){rounded}" if low else f"x = {x}"]


def joins_product(node: fx.Node) -> bool:
    """Whether a norm is read by one product alone, as the vectors that it multiplies, and by nothing else."""
    if node.target not in NORMS or len(node.users) != 1:
        return False
    (user,) = node.users
    return (
        user.target in PRODUCTS
        and user.args[0] is node
        and all(argument is not node for argument in (*user.args[1:], *user.kwargs.values()))
        and has_prologue(node)
    )


def has_prologue(node: fx.Node) -> bool:
    """Whether `Norm` can express a norm: over the last axis, of a known size, in a dtype that products take."""
    size, parameters = sizes(node)[-1], [argument for argument in node.args[1:] if isinstance(argument, fx.Node)]
    if node.target is aten.layer_norm.default and len(node.args[1]) != 1:
        return False
    wide = {dtype_of(value) for value in (node, node.args[0], *parameters)}
    known = size.is_Integer and 0 < int(size) <= MAX_COLUMNS
    return known and wide <= {torch.float32, torch.bfloat16, torch.float16} and dtype_of(node) == dtype_of(node.args[0])


def norm_of(scope: Scope, node: fx.Node, x: Layout) -> Norm:
    """A norm whose input lies at `x`."""
    if node.target is aten.layer_norm.default:
        weight, bias, eps = (*node.args[2:5], *(None, None, 1e-5)[len(node.args[2:5]) :])
        in_fp32 = True
    else:
        weight, bias, eps = node.args[1], None, node.args[2]
        in_fp32 = node.args[3] if len(node.args) > 3 else node.kwargs.get("scale_in_fp32", False)
    layouts = [None if parameter is None else scope.contiguous(parameter) for parameter in (weight, bias)]
    return Norm(node, x, *layouts, float(eps), not in_fp32)
