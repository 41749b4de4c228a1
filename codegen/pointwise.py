"""Pointwise and row-reduction kernels, generated from any group of ATen nodes.

A kernel runs over a *domain*: rows (the leading axes, flattened) and columns (the last axis). Every node is a
function from an index to a value; `RowKernel.value` asks a node for its value at an index, which loads it, or asks
the node's arguments in turn. Views only change the index, so a chain of nodes and views becomes straight-line code
over one tile. A reduction is over the last axis and gives one value per row.

Low-precision values are computed in fp32 and rounded where eager rounds: after every node.
"""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from ..compiler.graph import dtype_of, is_tensor, size_expr, sizes
from .domain import COL, ROW, Domain, Misaligned, NoKernel, Store, row_symbol
from .expr import triton_text
from .kernel import TL_TYPES, TRITON_TYPES, Kernel, Launch, Pointer, contiguous_strides
from .views import Index, broadcast_index, is_view, same, view_index, view_source

LOW_PRECISION = (torch.bfloat16, torch.float16)
ONE, ZERO = sympy.Integer(1), sympy.Integer(0)
MAX_COLUMNS = 16384
"""The longest row that a reduction holds in one tile."""

PLACE = r"\w+_at_row(_\d+)?"
"""Names of variables that hold an index which was read from a tensor."""

RESERVED = frozenset({"row", "col", "row_mask", "col_mask", "program", "tl", "triton", "float", *keyword.kwlist})
"""Names that variables of a kernel must not take."""


@dataclass(frozen=True)
class Value:
    """A variable of the kernel. dtype is the node's; low-precision values are held in fp32."""

    name: str
    dtype: torch.dtype


class RowKernel:
    """Builds the source of one kernel; see the module's docstring."""

    def __init__(self, domain: Domain, layouts: Mapping[fx.Node, Any], stores: list[Store], names: Mapping) -> None:
        self.domain = domain
        self.layouts = layouts
        self.made_here = {
            store.node
            for store in stores
            if store.layout is None or layouts.get(store.node, store.layout).buffer == store.layout.buffer
        }
        self.single = sum(store.layout is not None for store in stores) == 1
        self.names = names
        self.loads: list[str] = []
        self.body: list[str] = []
        self.pointers: dict[str, Pointer] = {}
        self.pointer_of: dict[tuple[str, sympy.Expr], str] = {}
        self.pointer_types: dict[str, str] = {}
        self.size_symbols: dict[str, sympy.Symbol] = {}
        self.values: dict[tuple[Any, Index, str], Value] = {}
        self.used: set[str] = {*RESERVED, *names.values()}
        self.across: set[str] = {"col", "col_mask"}
        self.row_axes: set[int] = set()
        self.condition: list[str] = []
        self.reduces = False
        self.nodes: list[str] = []
        self.writes = [store.layout.buffer for store in stores if store.layout is not None]
        static = self.domain.cols.is_Integer
        self.block_c = min(1 << (int(self.domain.cols) - 1).bit_length(), 1024) if static else 1024
        self.index = domain.index
        for store in stores:
            self.store(store)

    # --- values ------------------------------------------------------------------------------------------------

    def value(self, node: Any, index: Index) -> Value:
        """The variable that holds `node` at `index` (already of the node's rank)."""
        key = (node, index, "&".join(self.condition))
        if key in self.values:
            return self.values[key]
        if node in self.layouts and node not in self.made_here:
            value = self.load(node, index)
        elif is_view(node):
            value = self.value(view_source(node), view_index(node, index))
        elif node in self.made_here and index != self.domain_index(node):
            raise Misaligned(f"{node.name} is made at {self.domain_index(node)} and needed at {index}")
        else:
            emit = EMITTERS.get(node.target) if node.op == "call_function" else None
            try:
                if emit is None:
                    raise NoKernel(f"{node.target} has no kernel")
                value = emit(self, node, index)
            except NoKernel as problem:
                problem.node = problem.node or node
                raise
            except ZeroDivisionError:  # an index divided by a size of 0
                problem = NoKernel("it reads an empty tensor")
                problem.node = node
                raise problem from None
            self.nodes.append(node.name)
        self.values[key] = value
        return value

    def argument(self, argument: Any, index: Index) -> Value | str:
        """An operand, broadcast, at `index`: a variable, or the text of a number or size."""
        if is_tensor(argument):
            return self.value(argument, broadcast_index(sizes(argument), index))
        if isinstance(argument, fx.Node | torch.SymInt):
            return self.factor_text(size_expr(argument))
        if isinstance(argument, float) and (argument != argument or argument in (float("inf"), float("-inf"))):
            return f'float("{argument}")'
        return repr(argument)

    def domain_index(self, node: fx.Node) -> Index:
        """The index at which a stored node is made: the lane's own, without columns for one value per row."""
        return node_index(node, self.domain)

    def let(self, node: fx.Node, expression: str, dtype: torch.dtype | None = None) -> Value:
        """A new variable for a node's value, rounded to its dtype."""
        dtype = dtype or dtype_of(node)
        if dtype in LOW_PRECISION:
            expression = f"({expression}).to({TL_TYPES[dtype]}).to(tl.float32)"
        return Value(self.assign(short_name(node.name), expression), dtype)

    def assign(self, wanted: str, expression: str) -> str:
        """A new variable; its name is `wanted` or near it."""
        name = self.fresh(wanted)
        self.body.append(f"{name} = {expression}")
        if self.is_across(expression):
            self.across.add(name)
        return name

    def is_across(self, code: str) -> bool:
        """Whether code over the kernel's variables gives one value per column, not one per row."""
        return not self.across.isdisjoint(re.findall(r"[a-zA-Z_]\w*", code))

    def fresh(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.used or re.fullmatch(r"i\d+", candidate):
            count += 1
            candidate = f"{name}_{count}"
        self.used.add(candidate)
        return candidate

    # --- indices -----------------------------------------------------------------------------------------------

    def index_text(self, expr: sympy.Expr) -> str:
        """An index as code. A sum that runs through all row axes contiguously becomes a multiple of `row`."""
        expr = sympy.expand(expr)
        axes = [(i, size) for i, size in enumerate(self.domain.rows) if size != 1]
        strides = dict(zip(range(len(self.domain.rows)), contiguous_strides(self.domain.rows)))
        if axes and not expr.has(FloorDiv, Mod):
            last = axes[-1][0]
            step = expr.coeff(row_symbol(last)) / strides[last]
            total = sum((row_symbol(i) * strides[i] * step for i, _ in axes), ZERO)
            rest = sympy.expand(expr - total)
            if step != 0 and not rest.free_symbols & {row_symbol(i) for i, _ in axes}:
                expr = rest + ROW * step
        for symbol in expr.free_symbols:
            if symbol.name.startswith("i") and symbol.name[1:].isdigit():
                self.row_axes.add(int(symbol.name[1:]))
        return self.size_text(expr)

    def size_text(self, expr: sympy.Expr) -> str:
        """Code for an expression whose runtime sizes become parameters of the kernel."""
        renamed = {}
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol in self.names:
                name = self.names[symbol]
                self.size_symbols[name] = symbol
                renamed[symbol] = sympy.Symbol(name, integer=True, nonnegative=True)
        return triton_text(expr.xreplace(renamed))

    def factor_text(self, expr: sympy.Expr) -> str:
        """The same, fit to be an operand."""
        code = self.size_text(expr)
        return code if code.isalnum() else f"({code})"

    def mask_text(self, expr: sympy.Expr | None) -> str:
        """The lanes of the tile that may touch memory, as far as the index depends on them."""
        terms = list(self.condition)
        symbols = {symbol.name for symbol in expr.free_symbols} if expr is not None else None
        on_rows = symbols is None or any(name == "row" or re.fullmatch(rf"i\d+|{PLACE}", name) for name in symbols)
        if on_rows and self.domain.row_count != 1:
            terms.append("row_mask")
        on_cols = symbols is None or self.condition or not self.across.isdisjoint(symbols)
        if on_cols and self.masks_columns:
            terms.append("col_mask")
        return conjunction(terms)

    @property
    def masks_columns(self) -> bool:
        cols = self.domain.cols
        return not (cols.is_Integer and cols > 0 and int(cols) % self.block_c == 0)

    # --- memory ------------------------------------------------------------------------------------------------

    def pointer(self, layout: Any, name: str) -> str:
        key = (layout.buffer.name, layout.offset)
        if key not in self.pointer_of:
            parameter = self.fresh(f"{name}_ptr")
            self.pointer_of[key] = parameter
            self.pointers[parameter] = layout.pointer
            self.pointer_types[parameter] = "*" + TRITON_TYPES[layout.buffer.dtype]
        return self.pointer_of[key]

    def load(self, node: fx.Node, index: Index) -> Value:
        layout = self.layouts[node]
        name = short_name(node.name)
        return self.load_layout(layout, index, name, dtype_of(node))

    def layout_of(self, node: fx.Node) -> Any:
        """Where a tensor lies that is in memory."""
        return self.layouts[node]

    def load_layout(self, layout: Any, index: Index, name: str, dtype: torch.dtype) -> Value:
        expr = layout.element(index)
        pointer = self.pointer(layout, name)
        one_element = all(symbol in self.names for symbol in expr.free_symbols)
        mask = "" if one_element else self.mask_text(expr)
        place = self.index_text(expr)
        call = f"tl.load({pointer} + {place}" if place != "0" else f"tl.load({pointer}"
        call += f", mask={mask}, other=0)" if mask else ")"
        if dtype in LOW_PRECISION:
            call += ".to(tl.float32)"
        variable = self.fresh(name)
        if self.is_across(f"{place} {mask}"):
            self.across.add(variable)
        gathers = any(re.fullmatch(PLACE, symbol.name) for symbol in expr.free_symbols)
        (self.body if gathers or self.condition else self.loads).append(f"{variable} = {call}")
        return Value(variable, dtype)

    def index_from(self, value: Value) -> sympy.Symbol:
        """A loaded or computed integer as a symbol that later indices may use."""
        name = self.assign(f"{value.name}_at_row", f"{value.name}.to(tl.int64)")
        return sympy.Symbol(name, integer=True, nonnegative=True)

    def store(self, store: Store) -> None:
        index = self.domain_index(store.node)
        value = self.value(store.node, index)
        if store.layout is None:
            return
        place = list(index)
        if store.slot is not None:
            slot = store.slot
            read = self.load_layout(slot.positions, index[slot.by : slot.by + 1], "slot", torch.int64)
            position = self.index_from(read) + (index[slot.axis] if slot.adds else ZERO)
            place[slot.axis] = slot.place(position, store.layout.sizes[slot.axis])
        expr = store.layout.element(tuple(place))
        pointer = self.pointer(store.layout, "out" if self.single else short_name(store.node.name))
        on_columns = None if COL in expr.free_symbols or self.domain.cols == 1 else expr
        mask = self.mask_text(on_columns)
        dtype = store.layout.buffer.dtype
        stored = value.name if value.dtype == dtype not in LOW_PRECISION else f"{value.name}.to({TL_TYPES[dtype]})"
        place_text = self.index_text(expr)
        if not re.search(r"\b(row|col|i\d+)\b", place_text):
            place_text += " + tl.arange(0, 1)[None, :]"
        line = f"tl.store({pointer} + {place_text}, {stored}" + (f", mask={mask})" if mask else ")")
        self.body += ["", line, ""]

    # --- reductions --------------------------------------------------------------------------------------------

    def whole_row(self, node: fx.Node) -> None:
        """Ask for tiles that hold whole rows, which a reduction over `node`'s last axis needs."""
        cols = sizes(node)[-1] if len(sizes(node)) else ONE
        if not same(cols, self.domain.cols):
            raise NoKernel(f"it reduces {cols} columns in a kernel over {self.domain.cols}")
        if not cols.is_Integer or int(cols) > MAX_COLUMNS:
            raise NoKernel(f"a reduction over {cols} columns; up to {MAX_COLUMNS}, known when compiling, have a kernel")
        self.reduces = True
        self.block_c = 1 << (int(cols) - 1).bit_length()

    def reduce(self, how: str, value: str, dtype: torch.dtype = torch.float32) -> str:
        """The variable that holds the sum, max or min of a tile's rows, [BLOCK_R, 1]; `dtype` is what they are of."""
        neutral = {"sum": "0" if not dtype.is_floating_point else "0.0", "max": 'float("-inf")', "min": 'float("inf")'}
        if not dtype.is_floating_point:
            neutral |= {"max": str(torch.iinfo(dtype).min), "min": str(torch.iinfo(dtype).max)}
        if not self.is_across(value):
            value = f"tl.broadcast_to({value}, [BLOCK_R, BLOCK_C])"
        if self.domain.cols != self.block_c:
            value = f"tl.where(col_mask, {value}, {neutral[how]})"
        name = self.fresh({"sum": "total", "max": "largest", "min": "smallest"}[how])
        self.body.append(f"{name} = tl.{how}({value}, axis=1)[:, None]")
        return name

    def loop(self, count: sympy.Expr, iteration: Callable[[sympy.Symbol], None]) -> None:
        """`for k in range(count)` over what `iteration` adds to the body; its values are unknown behind it."""
        outside = self.loads, self.body, dict(self.values)
        self.loads, self.body = [], []
        counter = self.fresh("k")
        iteration(sympy.Symbol(counter, integer=True, nonnegative=True))
        inside = [*self.loads, *self.body]
        self.loads, self.body, self.values = outside
        self.body += ["", f"for {counter} in range({self.size_text(count)}):", *(f"    {line}" for line in inside), ""]

    # --- the kernel --------------------------------------------------------------------------------------------

    def launch(self, name: str) -> Launch:
        """The finished kernel and how to launch it."""
        rows, cols = self.domain.row_count, self.domain.cols
        block_c = self.block_c
        block_r = max(1, min(16, 1024 // block_c))
        lines = []
        row_masked = rows != 1
        if self.reduces or (not self.masks_columns and block_c == cols):
            lines.append("col = tl.arange(0, BLOCK_C)[None, :]")
        else:
            lines.append("col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]")
        if row_masked:
            lines.insert(0, "row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]")
            lines.append(f"row_mask = row < {self.size_text(rows)}")
        if self.masks_columns:
            lines.append(f"col_mask = col < {self.size_text(cols)}")
        strides = contiguous_strides(self.domain.rows)
        leading = next((i for i, size in enumerate(self.domain.rows) if size != 1), 0)
        for axis in sorted(self.row_axes):
            expr = "row" if strides[axis] == 1 else f"row // {self.factor_text(strides[axis])}"
            if axis != leading:
                expr = f"{expr} % {self.factor_text(self.domain.rows[axis])}"
            lines.append(f"i{axis} = {expr}")
        size_params = sorted(self.size_symbols)
        params = [*self.pointers, *size_params]
        signature = [(p, self.pointer_types[p]) for p in self.pointers] + [(p, "i32") for p in size_params]
        constants = (("BLOCK_R", block_r if row_masked else 1), ("BLOCK_C", block_c))
        header = ", ".join([*params, *(f"{constant}: tl.constexpr" for constant, _ in constants)])
        sections = [lines, self.loads, *paragraphs(self.body)]
        code = "\n\n".join("\n".join(f"    {line}" if line else "" for line in part) for part in sections if part)
        source = f"@triton.jit\ndef {name}({header}):\n{code}\n"
        grid_c = ONE if self.reduces or block_c == cols else FloorDiv(cols + block_c - 1, block_c)
        grid = (FloorDiv(rows + block_r - 1, block_r) if row_masked else ONE, grid_c, ONE)
        arguments = (*self.pointers.values(), *(self.size_symbols[p] for p in size_params))
        kernel = Kernel(name, source, tuple(signature), constants)
        return Launch(kernel, grid, arguments, tuple(dict.fromkeys(self.nodes)), tuple(self.writes))


def conjunction(terms: list[str]) -> str:
    """All of the terms; a single one needs no parentheses of its own."""
    return terms[0].removeprefix("(").removesuffix(")") if len(terms) == 1 else " & ".join(terms)


def paragraphs(lines: list[str]) -> list[list[str]]:
    """Lines between blank ones."""
    return [list(group) for blank, group in itertools.groupby(lines, lambda line: line == "") if not blank]


def node_index(node: fx.Node, domain: Domain) -> Index:
    """The index of a node of the domain at the lane's place; a node with one value per row has no column."""
    shape = sizes(node)
    index = domain.index
    if len(shape) == len(index):
        return broadcast_index(shape, index)
    if len(shape) == len(index) - 1:
        return broadcast_index(shape, index[:-1])
    raise NoKernel(f"{node.name} of {len(shape)} axes in a kernel over {len(index)}")


def short_name(name: str) -> str:
    """A variable name for a node: without layer numbers and running counts, so that equal layers read alike."""
    name = re.sub(r"^(p|b|c)_", "", name.lower())
    words = [word for word in name.split("_") if word and not word.isdigit()]
    words = words[-3:] if words and words[-1] in ("weight", "bias") else words[-4:]
    name = "_".join(words) or "value"
    return f"v_{name}" if name[0].isdigit() else name


Emitter = Callable[[RowKernel, fx.Node, Index], Value]
EMITTERS: dict[Any, Emitter] = {}
"""How each op computes its value at an index. `pointwise_ops.py` and `reductions.py` fill it."""
