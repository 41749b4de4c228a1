"""Kernels written as templates: Triton text with Jinja for what a specialization leaves out.

A template is rendered with literal sizes where they are known, so that the kernel in a dump has no dead branches.
Sizes that are known only at run time become parameters.
"""

from __future__ import annotations

import functools
import re

import sympy
from jinja2 import Environment, StrictUndefined, Template

from .kernel import TRITON_TYPES, Buffer, Kernel, Launch, Layout, Packed, Pointer

ENVIRONMENT = Environment(
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Arguments:
    """Collects the parameters of one launch: pointers first, then runtime sizes, then compile-time constants."""

    def __init__(self) -> None:
        self.pointers: list[tuple[str, str, Pointer]] = []
        self.sizes: list[tuple[str, sympy.Expr]] = []
        self.constants: list[tuple[str, object]] = []

    def pointer(self, name: str, layout: Layout | Packed) -> str:
        self.pointers.append((name, "*" + TRITON_TYPES[layout.buffer.dtype], layout.pointer))
        return name

    def size(self, name: str, value: sympy.Expr | int) -> str:
        """Text of a size: the number itself, or a parameter that holds it; equal strides of one tensor share one."""
        value = sympy.sympify(value)
        if value.is_Integer:
            return str(value)
        for known, expr in self.sizes:
            if expr == value and known.split("_stride_")[0] == name.split("_stride_")[0]:
                return known
        self.sizes.append((name, value))
        return name

    def constant(self, name: str, value: object) -> str:
        self.constants.append((name, value))
        return name

    @property
    def header(self) -> str:
        names = [name for name, _, _ in self.pointers] + [name for name, _ in self.sizes]
        return ", ".join([*names, *(f"{name}: tl.constexpr" for name, _ in self.constants)])

    def launch(
        self,
        name: str,
        template: str,
        grid: tuple[sympy.Expr, ...],
        nodes: tuple[str, ...],
        writes: tuple[Buffer, ...] | None = None,
        **values: object,
    ) -> Launch:
        source = parsed(template).render(name=name, header=self.header, **values).strip("\n") + "\n"
        signature = (*((n, kind) for n, kind, _ in self.pointers), *((n, "i32") for n, _ in self.sizes))
        kernel = Kernel(name, source, signature, tuple(self.constants))
        arguments = (*(pointer for _, _, pointer in self.pointers), *(expr for _, expr in self.sizes))
        return Launch(kernel, grid, arguments, nodes, writes)


@functools.cache
def parsed(template: str) -> Template:
    """The template, compiled once. Jinja's own line statements would swallow the blank lines behind them."""
    return ENVIRONMENT.from_string(re.sub(r"^#% (.*)$", r"{% \1 %}", template, flags=re.MULTILINE))


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
