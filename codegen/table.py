"""Which op is lowered how: the kernels of the op vocabulary and of the writes to caches, in one table each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..compiler.graph import sizes
from ..compiler.ops import OPS
from ..compiler.pattern import arguments
from . import (  # noqa: F401  (dequantize, gathers, movement, pointwise_ops and reductions fill EMITTERS)
    attention,
    dequantize,
    gathers,
    linear,
    moe,
    movement,
    pointwise_ops,
    quantize_rows,
    quantized,
    reductions,
    rope,
    scan,
    top_k,
)
from .domain import Slot
from .kernel import Layout
from .pointwise import EMITTERS
from .scope import Scope

aten, effc = torch.ops.aten, torch.ops.effc


def lower_linear(scope: Scope, node: fx.Node) -> None:
    """By the parts of a quantized weight, where it has them."""
    (quantized if quantized.has_parts(node) else linear).lower(scope, node)


TEMPLATES: dict[Any, Callable[[Scope, fx.Node], None]] = {
    effc.linear.default: lower_linear,
    effc.gated_linear.default: lower_linear,
    effc.fake_quantize.default: quantize_rows.lower,
    effc.attention.default: attention.lower,
    effc.cached_attention.default: attention.lower,
    effc.rope.default: rope.lower,
    effc.top_k.default: top_k.lower,
    effc.experts.default: moe.lower,
    effc.moe.default: moe.lower,
    aten.cumsum.default: scan.lower,
}
"""Ops with a kernel of their own; `pointwise.EMITTERS` has the others."""


@dataclass(frozen=True)
class Write:
    """How a kernel writes to a tensor. operands: (new values, positions) of a node; slot: where they land.

    Without positions, the new values take the place of all.
    """

    name: str
    operands: Callable[[fx.Node], tuple[fx.Node, fx.Node | None]]
    slot: Callable[[fx.Node, Layout], Slot] | None = None


def ring_of(write: fx.Node) -> int | None:
    return arguments(write)["ring"]


WRITES: dict[Any, Write] = {
    effc.kv_write.default: Write(
        "write_to_cache",
        lambda node: (node.args[1], node.args[2]),
        lambda node, positions: Slot(axis=2, positions=positions, by=0, adds=True, ring=ring_of(node)),
    ),
    aten.index_copy_.default: Write(
        "write_to_cache",
        lambda node: (node.args[3], node.args[2]),
        lambda node, positions: Slot(
            axis=node.args[1] % len(sizes(node)), positions=positions, by=node.args[1] % len(sizes(node)), adds=False
        ),
    ),
    aten.copy_.default: Write("copy_to", lambda node: (node.args[1], None)),
}
"""Writes in place: effc's own, and those that Hugging Face's static caches are made of (see `in_place.py`)."""


def has_kernel(op: str) -> bool:
    """Whether an op of the vocabulary has a kernel; a test holds that each has."""
    target = OPS[op].target
    return target in TEMPLATES or target in EMITTERS or target in WRITES
