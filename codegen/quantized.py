"""Linear and gated linear whose weight is kept in a quantized format: kernels read its parts.

    linear(fake_quantize(x, "int8_g32"), dequantize([codes, scales, mins], "q4_1", dtype))

    sums = dot(codes of x, codes of w)                                  int32, over one step along K
    acc += sums * (scale of x * scale of w)                             fp32
    acc += (scale of x * sum of codes of x) * (min - zero * scale of w)

A step is as long as one scale of x and one of w hold. Where x is not quantized, w's values are made in the tile. Codes
lie in words of four, in panels (see `packed_words`); one tile height serves one row, one a few, one many.
"""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ..compiler.activation_formats import ActivationFormat, find_activation
from ..compiler.formats import Format, find
from ..compiler.graph import dtype_of, sizes
from ..compiler.packed_words import PackWords
from ..compiler.pattern import arguments
from ..compiler.weights import Concat, Pack, Slice
from .domain import NoKernel
from .kernel import Buffer, Launch, Packed, PackedWords, Rounded
from .linear import DTYPES, Case, epilogue
from .scope import Scope
from .target import Target, Tile
from .template import Arguments

effc = torch.ops.effc
LINEARS = frozenset({effc.linear.default, effc.gated_linear.default})
LONGEST_STEP = 128
"""Along K, where neither side has groups."""
LEAST_PANEL = 16
"""Columns of a program at least."""

TILE = """
@triton.jit
def {{ name }}({{ header }}):
    panel = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, STEP)
    quad = tl.arange(0, STEP // 4)
    bits = 8 * tl.arange(0, 4)
    in_rows = row[:, None] < {{ m }}
    x_rows = x_ptr + row[:, None].to(tl.int64) * {{ x_stride }}
#% if x_groups
    x_scales = x_scale_ptr + row[:, None].to(tl.int64) * {{ x_groups }}
#% endif
#% if x_sums
    x_sums = x_sum_ptr + row[:, None].to(tl.int64) * {{ x_sums }}
#% endif
#% for part in parts
#% for line in part.pointers
    {{ line }}
#% endfor
    {{ part.acc }} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
#% endfor

    for step in range({{ steps }}):
        x = tl.load(x_rows + (step * STEP + inner)[None, :], mask=in_rows
            {{- " & ((step * STEP + inner)[None, :] < " ~ k ~ ")" if masks_k }}, other=0){{ to_dot }}
#% if x_groups
        x_scale = tl.load(x_scales + {{ x_group }}, mask=in_rows, other=0.0)
#% endif
#% if x_sums
        x_sum = {{ x_sum }}
#% endif
#% for part in parts
#% for line in part.words
        {{ line }}
#% endfor
        w = tl.reshape((words[:, None, :] >> bits[None, :, None]).to(tl.int8), [STEP, BLOCK_N])
#% if x_groups
        sums = tl.dot(x, w{{ to_dot }}, out_dtype={{ sum_type }})
        scale = {{ part.scale }}
        {{ part.acc }} += sums.to(tl.float32) * (x_scale * scale)
#% if part.shift
        shift = {{ part.shift }}
        {{ part.acc }} += x_sum * shift
#% endif
#% else
        values = {{ part.value }}
        {{ part.acc }} = tl.dot(x, values.to(x.dtype), {{ part.acc }}, input_precision="ieee")
#% endif
#% endfor

    out_col = panel * BLOCK_N + col[None, :]
{{ epilogue }}
    out = out_ptr + row[:, None].to(tl.int64) * {{ n }} + out_col
    tl.store(out, y, mask=in_rows{{ " & (out_col < " ~ n ~ ")" if masks_n }})
"""


# --- what has kernels --------------------------------------------------------------------------------------------


def has_parts(node: fx.Node) -> bool:
    """Whether a node is a linear by a quantized weight."""
    return node.target in LINEARS and node.args[1].target is effc.dequantize.default


def format_of(node: fx.Node) -> Format:
    """The format of a `dequantize`."""
    return find(arguments(node)["format"])


def activation_of(node: fx.Node) -> ActivationFormat | None:
    """The format that a linear's input is rounded to; None where it is not."""
    x = node.args[0]
    return find_activation(x.args[1]) if x.target is effc.fake_quantize.default else None


def why_not(node: fx.Node) -> str | None:
    """Why a linear by a quantized weight has no kernel; None if it has one."""
    format, activation = format_of(node.args[1]), activation_of(node)
    if format.book is not None or format.code_dtype != torch.int8:
        return f"a linear by weights in {format.name} has no kernel: its codes are no integers"
    if activation is not None and activation.dtype != torch.int8:
        return f"a linear of {activation.name} activations has no kernel"
    if not {dtype_of(node.args[0]), dtype_of(node)} <= set(DTYPES):
        return f"a linear of {dtype_of(node.args[0])} by quantized weights has no kernel"
    if not all(part.op == "placeholder" and set(part.users) == {node.args[1]} for part in node.args[1].args[0]):
        return "the parts of its weight are computed, or read by something else"
    halves = effc.gated_linear.default
    alone = all(user.target is halves for user in node.args[1].users)
    if node.target is halves and not alone and int(sizes(node.args[1])[0]) // 2 % LEAST_PANEL:
        return "its weight is read as a whole too, and its halves are no whole panels"
    return None


def readers(weight: fx.Node, refused: object) -> list[fx.Node]:
    """The linears that read the parts of a `dequantize` in place of its values."""
    users = [user for user in weight.users if has_parts(user) and user.args[1] is weight and user.args[0] is not weight]
    return [user for user in users if user not in refused and why_not(user) is None]


def step_of(weight: fx.Node, linears: list[fx.Node]) -> int:
    """Weights along K whose products are summed before the sum is scaled: a power of two."""
    formats = [format_of(weight), *map(activation_of, linears)]
    groups = [format.group for format in formats if format is not None and format.group is not None]
    k = int(sizes(weight)[1])
    if groups:
        return math.gcd(*groups)
    return min(LONGEST_STEP, max(32, 1 << (k - 1).bit_length()))


# --- weights in memory -------------------------------------------------------------------------------------------


def place_parts(scope: Scope, weight: fx.Node) -> None:
    """Pack the parts of a `dequantize` that linears read: planes in words, scales in panels as wide."""
    linears = readers(weight, scope.refused)
    if not linears:
        return
    format, (n, k) = format_of(weight), map(int, sizes(weight))
    gated = any(linear.target is effc.gated_linear.default for linear in linears)
    step = step_of(weight, linears)
    rows = n // 2 if gated else n
    block = panel_of(rows, scope.target)
    matrix, widths = (sympy.Integer(n), sympy.Integer(k)), dict(zip(("codes", "high"), format.planes))
    for name, part in zip(format.part_names, weight.args[0]):
        recipe = scope.recipes[part.name]
        width = widths.get(name)
        halves = (recipe,) if not gated else (Slice(recipe, 0, 0, rows), Slice(recipe, 0, rows, n))
        packed = [PackWords(half, width, step, block) if width else Pack(half, block) for half in halves]
        recipe = packed[0] if len(packed) == 1 else Concat(tuple(packed), 0)
        buffer = Buffer(part.name, sympy.Integer(recipe.numel), dtype_of(part), "weight")
        scope.recipes[part.name] = recipe
        scope.layouts[part] = (
            PackedWords(buffer, matrix, width, step, block) if width else Packed(buffer, tuple(sizes(part)), block)
        )


def panel_of(rows: int, target: Target) -> int:
    """Columns of a program: as many as the target likes, fewer where that leaves less to fill up."""
    block = target.quantized.n
    while block > LEAST_PANEL and rows % block:
        block //= 2
    return block


# --- kernels -----------------------------------------------------------------------------------------------------


def lower(scope: Scope, node: fx.Node) -> None:
    """Launches for one linear or gated linear by a quantized weight."""
    if (reason := why_not(node)) is not None:
        raise NoKernel(reason)
    named = arguments(node)
    residual = named.get("residual")
    if residual is not None and sizes(residual) != sizes(node):
        raise NoKernel(f"a residual of {sizes(residual)} added to {sizes(node)} has no kernel")
    x = node.args[0]
    rounded = scope.rounded.get(x)
    if activation_of(node) is not None and rounded is None:
        raise NoKernel(f"{x.name}, which it multiplies, has no kernel")
    case = QuantizedCase(scope, node, rounded, named["activation"])
    if rounded is None:
        scope.steps.extend(case.read(x))
    else:
        case.x = rounded.codes
    case.bias = None if named["bias"] is None else scope.contiguous(named["bias"])
    case.residual = None if residual is None else scope.contiguous(residual)
    case.out = scope.result(node)
    rows, target = case.x.sizes[0], scope.target
    scope.choose(
        [
            (sympy.Eq(rows, 1), (case.tile(Tile(target.min_dot_size, 0, 0), "gemv"),)),
            (sympy.Le(rows, target.small_rows), (case.tile(target.linear_small, "flat_gemm"),)),
            (sympy.true, (case.tile(target.quantized, "gemm"),)),
        ]
    )


class QuantizedCase(Case):
    """One linear by a quantized weight, and what its kernels have in common."""

    def __init__(self, scope: Scope, node: fx.Node, rounded: Rounded | None, activation: str) -> None:
        gated = node.target is effc.gated_linear.default
        super().__init__(scope, node, node.args[1], dtype_of(node), gated, activation)
        self.rounded = rounded
        weight = node.args[1]
        self.format = format_of(weight)
        self.parts = {
            name: scope.layouts[part] for name, part in zip(self.format.part_names, weight.args[0], strict=True)
        }
        codes = self.parts["codes"]
        self.block, self.step, self.steps = codes.block, codes.group, codes.steps

    def tile(self, tile: Tile, name: str) -> Launch:
        rows = self.x.sizes[0]
        arguments = Arguments()
        arguments.pointer("x_ptr", self.x)
        if self.rounded is not None:
            arguments.pointer("x_scale_ptr", self.rounded.scales)
        if self.needs_sums:
            arguments.pointer("x_sum_ptr", self.rounded.sums)
        for part, layout in self.parts.items():
            arguments.pointer(f"{part}_ptr", layout)
        for operand, layout in (("bias_ptr", self.bias), ("residual_ptr", self.residual), ("out_ptr", self.out)):
            if layout is not None:
                arguments.pointer(operand, layout)
        m = arguments.size("M", rows)
        x_stride = arguments.size("x_stride", self.x.strides[0])
        arguments.constant("BLOCK_M", tile.m)
        arguments.constant("BLOCK_N", self.block)
        arguments.constant("STEP", self.step)
        masks_n = self.n % self.block != 0
        mask = "in_rows" + (f" & (out_col < {self.n})" if masks_n else "")
        residual = f"residual_ptr + row[:, None].to(tl.int64) * {self.n} + out_col, mask={mask}, other=0.0"
        panels = -(-self.n // self.block)
        in_bytes = self.scope.target.min_dot_size == 1 or self.step >= 32
        text = epilogue(
            dtype_of(self.node),
            self.gated,
            self.bias is not None,
            residual if self.residual is not None else None,
            self.activation,
            self.n,
            f"out_col < {self.n}" if masks_n else "",
        )
        return arguments.launch(
            self.kernel_name(f"{self.format.name}_{name}"),
            TILE,
            (sympy.Integer(panels), FloorDiv(rows + tile.m - 1, tile.m), sympy.Integer(1)),
            (self.node.name,),
            m=m,
            x_stride=x_stride,
            n=self.n,
            k=self.k,
            steps=self.steps,
            masks_n=masks_n,
            masks_k=self.rounded is None and self.k % self.step != 0,
            to_dot="" if in_bytes or self.rounded is None else ".to(tl.float16)",
            sum_type="tl.int32" if in_bytes else "tl.float32",
            parts=[
                self.part(name, panels * half)
                for half, name in enumerate(("gate", "up") if self.gated else ("acc",))
            ],
            epilogue=text,
            **self.of_activation(),
        )  # fmt: skip

    @property
    def needs_sums(self) -> bool:
        return self.rounded is not None and (self.format.asymmetric or self.format.zero != 0)

    def of_activation(self) -> dict[str, object]:
        """What the template says of x's scales and sums."""
        if self.rounded is None:
            return {"x_groups": 0, "x_sums": 0}
        groups = int(self.rounded.scales.sizes[1])
        found: dict[str, object] = {"x_groups": groups, "x_group": self.index(groups), "x_sums": 0}
        if self.needs_sums:
            runs = self.step // self.rounded.run
            places = [f"step * {runs} + {place}" if runs > 1 else "step" for place in range(runs)]
            loads = [f"tl.load(x_sums + {place}, mask=in_rows, other=0.0)" for place in places]
            found |= {"x_sums": int(self.rounded.sums.sizes[1]), "x_sum": " + ".join(loads)}
        return found

    def index(self, groups: int) -> str:
        """Which of a row's groups a step lies in."""
        run = -(-self.steps // groups)
        return "0" if groups == 1 else "step" if run == 1 else f"step // {run}"

    def part(self, name: str, panels: int) -> dict[str, object]:
        """What the template says of one accumulator. panels: how many of the weight lie before its own."""
        start = f"(panel + {panels})" if panels else "panel"
        suffix = "" if name == "acc" else f"_{name}"
        pointers, words = [], []
        shift = 0
        for part, layout in self.parts.items():
            if isinstance(layout, PackedWords):
                size = layout.block * layout.steps * layout.words
                pointer = f"tl.cast({part}_ptr, tl.pointer_type(tl.int32), bitcast=True)"
                pointers.append(f"{part}{suffix} = {pointer} + {start} * {size}")
                words += plane_lines(f"{part}{suffix}", layout, shift)
                shift += layout.width
            else:
                size = layout.block * int(layout.sizes[1])
                pointers.append(f"{part}{suffix} = {part}_ptr + {start} * {size}")
        return {"acc": name, "pointers": pointers, "words": words, **self.scaling(suffix)}

    def scaling(self, suffix: str) -> dict[str, str]:
        """The scale of a step, [1, BLOCK_N], and what is added for each unit of x; the values, where x has no codes."""
        format, scale = self.format, self.load("scales", suffix)
        if format.super_block:
            scale = f"{self.load('super', suffix)} * {scale}"
        shift = self.load("mins", suffix) if format.asymmetric else ""
        if format.asymmetric and format.super_block:
            shift = f"-{self.load('super_min', suffix)} * {shift}"
        codes = f"(w.to(tl.float32) - {format.zero}.0)" if format.zero else "w.to(tl.float32)"
        value = f"{codes} * ({scale})" + (f" + {shift}" if shift else "")
        if format.zero and not shift:
            shift = f"-{format.zero}.0 * scale"
        return {"scale": scale, "shift": shift, "value": value}

    def load(self, part: str, suffix: str) -> str:
        groups = int(self.parts[part].sizes[1])
        index = self.index(groups)
        place = "" if index == "0" else f" + {index if index == 'step' else f'({index})'} * BLOCK_N"
        return f"tl.load({part}{suffix}{place} + col[None, :]).to(tl.float32)"


def plane_lines(pointer: str, layout: PackedWords, shift: int) -> list[str]:
    """Lines that bring a plane's bits of a step into `words` [STEP / 4, BLOCK_N], `shift` bits up in each byte."""
    rows, width = layout.words, layout.width
    quad = "quad" if width == 8 else f"quad % {rows}"
    start = f"step * {rows} + " if layout.steps > 1 else ""
    load = f"tl.load({pointer} + ({start}{quad})[:, None] * BLOCK_N + col[None, :])"
    if width == 8:
        return [f"words = {load}"]
    ones = 0x01010101 * ((1 << width) - 1)
    taken = f"({load} >> ({width} * (quad // {rows}))[:, None]) & {ones:#010x}"
    return [f"words |= ({taken}) << {shift}"] if shift else [f"words = {taken}"]
