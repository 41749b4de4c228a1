"""What a row of the op vocabulary is, and the table of all: schema, shape rule, eager reference and cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx

from .graph import dtype_of, is_tensor, sizes

LIBRARY = torch.library.Library("effc", "DEF")


@dataclass(frozen=True)
class Cost:
    """Work of one op: floating-point operations and bytes moved to and from memory, in symbolic sizes."""

    flops: sympy.Expr
    bytes: sympy.Expr


@dataclass(frozen=True)
class Op:
    """One row of the vocabulary.

    kept: of a node whose value kernels never make, since its readers take what it is made of: the bytes of that.
    """

    name: str
    schema: str
    reference: Callable[..., Tensor]
    shape: Callable[..., Tensor]
    cost: Callable[[fx.Node], Cost]
    mutates: bool = False
    kept: Callable[[fx.Node], sympy.Expr] | None = None

    @property
    def target(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.effc, self.name).default


OPS: dict[str, Op] = {}


LEGAL: dict[str, set[str]] = {"traced": set(), "fused": set(), "stateful": set()}
"""Names of effc ops that a dialect may hold beside functional ATen."""


def define(
    schema: str,
    *,
    shape: Callable[..., Tensor],
    cost: Callable[[fx.Node], Cost],
    dialects: tuple[str, ...] = ("fused", "stateful"),
    kept: Callable[[fx.Node], sympy.Expr] | None = None,
) -> Callable:
    """Register a reference implementation as `torch.ops.effc.<name>`, and add its row to `OPS` and `LEGAL`.

    shape: of the result, from fake tensors. cost: of a node that calls the op. dialects: those that may hold it.
    kept: see `Op`.
    """

    def register(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = schema.split("(", 1)[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"effc::{name}", shape, lib=LIBRARY)
        OPS[name] = Op(name, schema, reference, shape, cost, mutates="(a!)" in schema, kept=kept)
        for dialect in dialects:
            LEGAL[dialect].add(name)
        return reference

    return register


def numel(node: fx.Node) -> sympy.Expr:
    return sympy.prod(sizes(node))


def nbytes(node: fx.Node) -> sympy.Expr:
    return numel(node) * dtype_of(node).itemsize


def read_bytes(node: fx.Node) -> sympy.Expr:
    """Bytes that a kernel reads for an argument: those of its parts, where it is quantized."""
    op = op_of(node)
    return nbytes(node) if op is None or op.kept is None else op.kept(node)


def streamed(node: fx.Node, flops: sympy.Expr) -> Cost:
    """The cost of an op that reads each tensor argument once and writes its result once."""
    arguments = [argument for argument in node.all_input_nodes if is_tensor(argument)]
    return Cost(flops, nbytes(node) + sum(read_bytes(argument) for argument in arguments))


def like(x: Tensor, *rest: object, **named: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def op_of(node: fx.Node) -> Op | None:
    """The vocabulary row of a node that calls an effc op, else None."""
    if node.op == "call_function" and getattr(node.target, "namespace", None) == "effc":
        return OPS[node.target._schema.name.split("::")[1]]
    return None
