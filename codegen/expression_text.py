"""Expressions that ops carry (`compiler/expressions.py`) as Triton code, one line per op."""

from __future__ import annotations

import ast
from collections.abc import Mapping

import torch

from ..compiler.expressions import BINARY, CASTS, FUNCTIONS, parse
from .domain import NoKernel
from .kernel import TL_TYPES
from .linear import ACTIVATION_TEXT
from .pointwise_ops import SIMPLE
from .template import power_of_two

FORMS: dict[str, str] = {
    "gelu": ACTIVATION_TEXT["gelu"],
    "gelu_tanh": ACTIVATION_TEXT["gelu_tanh"],
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
}
"""Functions whose code `pointwise_ops.SIMPLE` does not have."""

Value = tuple[str, torch.dtype | None]
"""Text of a value in fp32 and the dtype that it is rounded to; None for a number."""


def rounded(text: str, dtype: torch.dtype) -> str:
    """`text`, a value in fp32, as `dtype` holds it."""
    if dtype == torch.float32:
        return text
    operand = text if text.isidentifier() else f"({text})"
    return f"{operand}.to({TL_TYPES[dtype]}).to(tl.float32)"


class Lines:
    """Lines of code, one per op, in which equal values are computed once.

    index: the variable that counts a row's entries, which lie along axis 0; count: how many there are, the axis being
    padded to a power of two. Without them only parts of rows are there, and functions along rows have no code.
    """

    def __init__(self, index: str = "", count: int = 0) -> None:
        self.index, self.count = index, count
        self.lines: list[str] = []
        self.made: dict[str, str] = {}

    def value(self, text: str, names: Mapping[str, Value]) -> Value:
        """The variable that holds an expression over names of variables in fp32, and its dtype."""
        return self.of_tree(parse(text), names)

    def of_tree(self, tree: ast.expr, names: Mapping[str, Value]) -> Value:
        match tree:
            case ast.Constant() | ast.UnaryOp():
                return repr(float(ast.literal_eval(tree))), None
            case ast.Name(id=name):
                return names[name]
            case ast.BinOp(left=left, op=op, right=right):
                target = BINARY[type(op)]
                operands = [self.of_tree(side, names) for side in (left, right)]
                return self.let(target._schema.name.split("::")[1], SIMPLE[target], operands)
            case ast.Call(func=ast.Name(id=name), args=[operand]) if name in CASTS:
                value, dtype = self.of_tree(operand, names)
                if torch.promote_types(dtype, CASTS[name]) == CASTS[name]:
                    return value, CASTS[name]
                return self.let(name, "{0}", [(value, CASTS[name])])
            case ast.Call(func=ast.Name(id="softmax"), args=[operand]):
                return self.softmax(self.of_tree(operand, names))
            case ast.Call(func=ast.Name(id="sum"), args=[operand]):
                value, dtype = self.of_tree(operand, names)
                return self.let("sum", f"tl.sum({self.within(value, '0.0')}, axis=0)", [(value, dtype)])
            case ast.Call(func=ast.Name(id="of_best_groups"), args=[operand, *numbers]):
                return self.of_best_groups(self.of_tree(operand, names), *map(ast.literal_eval, numbers))
            case ast.Call(func=ast.Name(id=name), args=args):
                form = FORMS.get(name) or SIMPLE[FUNCTIONS[name]]
                return self.let(name, form, [self.of_tree(operand, names) for operand in args])
        raise AssertionError(ast.dump(tree))

    def softmax(self, x: Value) -> Value:
        entries = self.within(x[0], "float('-inf')")
        exponent, _ = self.let("exp", f"tl.exp({entries} - tl.max({entries}, axis=0))", [(x[0], torch.float32)])
        return self.let("softmax", f"{exponent} / tl.sum({exponent}, axis=0)", [x])

    def within(self, value: str, other: str) -> str:
        if not self.count:
            raise NoKernel("a function along rows has no kernel where programs have parts of them")
        padded = power_of_two(self.count) != self.count
        return f"tl.where({self.index} < {self.count}, {value}, {other})" if padded else value

    def of_best_groups(self, x: Value, groups: int, kept: int, best: int) -> Value:
        """The sum of the largest entries of each group; then the groups with the largest sums, one after the other."""
        value, dtype = x
        slots = power_of_two(groups)
        self.lines += [
            f"group = {self.index} // {self.count // groups}",
            f"group_slot = tl.arange(0, {slots})",
            f"sums = tl.full([{slots}], float('-inf'), tl.float32)",
            f"for g in range(0, {groups}):",
            f"    left = tl.where(group == g, {value}, float('-inf'))",
            "    total = 0.0",
            f"    for _ in range(0, {best}):",
            "        largest = tl.max(left, axis=0)",
            "        total += largest",
            f"        first = tl.min(tl.where(left == largest, {self.index}, {power_of_two(self.count)}), axis=0)",
            f"        left = tl.where({self.index} == first, float('-inf'), left)",
            f"    sums = tl.where(group_slot == g, {rounded('total', dtype)}, sums)",
            "kept = group < 0",
            f"for _ in range(0, {kept}):",
            "    largest = tl.max(sums, axis=0)",
            f"    first = tl.min(tl.where(sums == largest, group_slot, {slots}), axis=0)",
            "    kept = kept | (group == first)",
            "    sums = tl.where(group_slot == first, float('-inf'), sums)",
        ]
        return self.let("of_best_groups", f"tl.where(kept, {value}, float('-inf'))", [x])

    def let(self, name: str, form: str, operands: list[Value]) -> Value:
        """A variable for an op, rounded to what its operands promote to."""
        dtypes = [dtype for _, dtype in operands if dtype is not None]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        text = rounded(form.format(*(text for text, _ in operands)), dtype)
        if text not in self.made:
            self.made[text] = f"{name}_{len(self.made)}"
            self.lines.append(f"{self.made[text]} = {text}")
        return self.made[text], dtype


def gate_lines(activation: str, dtype: torch.dtype) -> list[str]:
    """Lines from the variables gate and up, in fp32, to y; each op rounds."""
    lines = Lines()
    result, _ = lines.value(activation, {name: (name, dtype) for name in ("gate", "up")})
    return [*lines.lines, f"y = {result}"]
