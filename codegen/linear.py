"""Linear and gated linear: a matrix-vector kernel for one row, a tiled kernel for more.

    out = residual + activation(x @ weight.T + bias)                        linear
    out = activation(x @ gate.T + bias) * (x @ up.T + bias)                 gated_linear

where x may be a norm that the matrix-vector kernel computes itself (see `prologue`).

Weights lie row-major [N, K], or packed in panels [N / BLOCK_N, K, BLOCK_N], where one program's weights are one
contiguous stream. Sums are in fp32; the result rounds to x's dtype where eager rounds.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ..compiler.graph import dtype_of, sizes
from .domain import NoKernel, Store
from .kernel import TL_TYPES, Launch, Layout, Packed
from .prologue import Norm, joins_product, norm_of
from .scope import Scope
from .target import Target, Tile
from .template import Arguments, power_of_two
from .views import reshape_strides

GEMV = """
@triton.jit
def {{ name }}({{ header }}):
    panel = tl.program_id(0)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
#% for part in parts
    {{ part.weight }} = weight_ptr + panel.to(tl.int64) * {{ block_n * k }}{{ " + " ~ part.start if part.start }}
    {{ part.acc }} = tl.zeros([BLOCK_N], tl.float32)
#% endfor
#% for line in statistics
    {{ line }}
#% endfor

    for k in range(0, {{ k }}, BLOCK_K):
#% if masks_k
        in_k = k + inner < {{ k }}
#% endif
        x = tl.load(x_ptr + k + inner{{ ", mask=in_k, other=0.0" if masks_k }}).to(tl.float32)
#% for line in normalize
        {{ line }}
#% endfor
#% for part in parts
#% if packed
        {{ part.tile }} = tl.load({{ part.weight }} + (k + inner)[:, None] * BLOCK_N + col[None, :]
            {{- ", mask=in_k[:, None], other=0.0" if masks_k }}).to(tl.float32)
        {{ part.acc }} += tl.sum(x[:, None] * {{ part.tile }}, axis=0)
#% else
        {{ part.tile }} = tl.load({{ part.weight }} + col[:, None] * {{ k }} + (k + inner)[None, :]
            {{- ", mask=" ~ row_mask ~ ", other=0.0" if row_mask }}).to(tl.float32)
        {{ part.acc }} += tl.sum({{ part.tile }} * x[None, :], axis=1)
#% endif
#% endfor

    out_col = panel * BLOCK_N + col
{{ epilogue }}
    tl.store(out_ptr + out_col, y{{ ", mask=out_col < " ~ n if masks_n }})
"""

TILED = """
@triton.jit
def {{ name }}({{ header }}):
    panel = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    in_rows = row[:, None] < {{ m }}
    x_rows = x_ptr + row[:, None].to(tl.int64) * {{ x_stride }}
#% for part in parts
    {{ part.weight }} = weight_ptr + panel.to(tl.int64) * {{ block_n * k }}{{ " + " ~ part.start if part.start }}
    {{ part.acc }} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
#% endfor

    for k in range(0, {{ k }}, BLOCK_K):
        x = tl.load(x_rows + (k + inner)[None, :], mask=in_rows
            {{- " & ((k + inner)[None, :] < " ~ k ~ ")" if masks_k }}, other=0.0){{ x_cast }}
#% for part in parts
#% if packed
        {{ part.tile }} = tl.load({{ part.weight }} + (k + inner)[:, None] * BLOCK_N + col[None, :]
            {{- ", mask=(k + inner)[:, None] < " ~ k ~ ", other=0.0" if masks_k }})
#% else
        {{ part.tile }} = tl.load({{ part.weight }} + (k + inner)[:, None] + col[None, :] * {{ k }}
            {{- ", mask=" ~ col_mask ~ ", other=0.0" if col_mask }})
#% endif
        {{ part.acc }} = tl.dot(x, {{ part.tile }}, {{ part.acc }}, input_precision="ieee")
#% endfor

    out_col = panel * BLOCK_N + col[None, :]
{{ epilogue }}
    out = out_ptr + row[:, None].to(tl.int64) * {{ n }} + out_col
    tl.store(out, y, mask=in_rows{{ " & (out_col < " ~ n ~ ")" if masks_n }})
"""

ACTIVATION_TEXT: dict[str, str | None] = {
    "none": None,
    "silu": "{0} / (1.0 + tl.exp(-{0}))",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
}
"""The activations of `ops.ACTIVATIONS` as Triton code, in fp32."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def epilogue(
    dtype: torch.dtype, gated: bool, bias: bool, residual: str | None, activation: str, n: int, mask: str
) -> str:
    """Lines from the accumulators to `y`; every step rounds to `dtype`."""
    low = dtype != torch.float32
    rounded = f".to({TL_TYPES[dtype]}).to(tl.float32)" if low else ""
    lines = []
    load_mask = f", mask={mask}, other=0.0" if mask else ""
    names = ("gate", "up") if gated else ("acc",)
    for position, name in enumerate(names):
        if bias:
            shift = f" + {n}" if position else ""
            lines.append(f"{name} += tl.load(bias_ptr + out_col{shift}{load_mask}).to(tl.float32)")
        if low:
            lines.append(f"{name} = {name}{rounded}")
    y = names[0]
    form = ACTIVATION_TEXT[activation]
    if form is not None:
        lines.append(f"activated = {f'({form.format(y)}){rounded}' if low else form.format(y)}")
        y = "activated"
    if gated:
        lines.append(f"{'product' if residual else 'y'} = {f'({y} * up){rounded}' if low else f'{y} * up'}")
        y = "product" if residual else "y"
    if residual:
        lines.append(f"y = tl.load({residual}).to(tl.float32) + {y}")
    elif y != "y":
        lines.append(f"y = {y}")
    if low:
        lines.append(f"y = y.to({TL_TYPES[dtype]})")
    return "\n".join(f"    {line}" for line in lines)


def flat_rows(scope: Scope, node: fx.Node) -> Layout:
    """An operand [..., K] as a matrix [M, K] whose rows are contiguous, copied if its axes do not merge."""
    layout = scope.layout(node)
    matrix = (sympy.sympify(sympy.prod(layout.sizes[:-1])), layout.sizes[-1])
    strides = reshape_strides(layout.sizes, layout.strides, matrix)
    if strides is None or strides[1] != 1:
        layout = scope.copy(node)
        strides = (matrix[1], sympy.Integer(1))
    return Layout(layout.buffer, layout.offset, matrix, strides)


def lower(scope: Scope, node: fx.Node) -> None:
    """Launches for one `effc.linear` or `effc.gated_linear`."""
    gated = node.target is torch.ops.effc.gated_linear.default
    x, weight, bias, *rest = (*node.args, *(None,) * 3)[:5]
    bias = node.kwargs.get("bias", bias)
    residual = None if gated else node.kwargs.get("residual", rest[0])
    activation = node.kwargs.get("activation", (rest[0] if gated else rest[1]) or ("silu" if gated else "none"))
    if not {dtype_of(x), dtype_of(weight), dtype_of(node)} <= set(DTYPES) or dtype_of(x) != dtype_of(weight):
        raise NoKernel(f"linear of {dtype_of(x)} by {dtype_of(weight)} has no kernel")
    if not all(size.is_Integer for size in sizes(weight)):
        raise NoKernel("the sizes of a linear's weight must be known when compiling")
    if residual is not None and sizes(residual) != sizes(node):
        raise NoKernel(f"a residual of {sizes(residual)} added to {sizes(node)} has no kernel")
    case = Case(scope, node, weight, dtype_of(node), gated, activation)
    norm_launches = case.read(x)
    case.weight = scope.weight(weight)
    case.bias = None if bias is None else scope.contiguous(bias)
    case.residual = None if residual is None else scope.contiguous(residual)
    case.out = scope.result(node)
    rows = case.x.sizes[0]
    target = scope.target
    tile = target.linear_small if rows.is_Integer and rows <= target.small_rows else None
    choices = [
        (sympy.Eq(rows, 1), (case.gemv(target),)),
        (sympy.Le(rows, target.small_rows), (*norm_launches, case.tiled(tile or target.linear_small))),
        (sympy.true, (*norm_launches, case.tiled(target.linear_large))),
    ]
    scope.choose(choices)


class Case:
    """One linear to lower: its operands and what its kernels have in common. dtype: what results are rounded to."""

    def __init__(
        self,
        scope: Scope,
        node: fx.Node,
        matrix: fx.Node,
        dtype: torch.dtype,
        gated: bool = False,
        activation: str = "none",
    ) -> None:
        self.scope, self.node, self.dtype, self.gated, self.activation = scope, node, dtype, gated, activation
        self.x: Layout
        self.weight: Layout | Packed
        self.bias: Layout | None = None
        self.residual: Layout | None = None
        self.out: Layout
        rows, depth = map(int, sizes(matrix))
        self.n = rows // 2 if gated else rows
        self.k = depth
        self.norm: Norm | None = None

    def read(self, x: fx.Node) -> tuple[Launch, ...]:
        """Place the operand x; if it is a norm that is not in memory, return the launch that puts it there."""
        if x in self.scope.layouts or not joins_product(x):
            self.x = flat_rows(self.scope, x)
            return ()
        self.norm = norm_of(self.scope, x, flat_rows(self.scope, x.args[0]))
        launch = self.scope.pointwise([Store(x, self.scope.result(x))])
        self.x = flat_rows(self.scope, x)
        return (launch,)

    def arguments(self, x: Layout) -> Arguments:
        arguments = Arguments()
        arguments.pointer("x_ptr", x)
        arguments.pointer("weight_ptr", self.weight)
        if self.bias is not None:
            arguments.pointer("bias_ptr", self.bias)
        if self.residual is not None:
            arguments.pointer("residual_ptr", self.residual)
        arguments.pointer("out_ptr", self.out)
        return arguments

    def common(self, block_n: int) -> dict[str, object]:
        names = (("gate", 0), ("up", self.n * self.k)) if self.gated else (("acc", 0),)
        suffix = {"acc": "", "gate": "_gate", "up": "_up"}
        return {
            "k": self.k,
            "n": self.n,
            "block_n": block_n,
            "packed": isinstance(self.weight, Packed),
            "masks_n": self.n % block_n != 0,
            "parts": [
                {"acc": name, "weight": f"weight{suffix[name]}", "tile": f"w{suffix[name]}", "start": start}
                for name, start in names
            ],
        }

    def block_n(self, wanted: int) -> int:
        """Columns of one program: the packed panel's width, or the one wanted."""
        return self.weight.block if isinstance(self.weight, Packed) else wanted

    def depth(self, wanted: int) -> int:
        """Depth of one step: the largest divisor of K among the powers of two up to `wanted`, if it is worth it."""
        block = wanted
        while block > 16 and self.k % block:
            block //= 2
        return block if self.k % block == 0 else wanted

    def gemv(self, target: Target) -> Launch:
        packed = isinstance(self.weight, Packed)
        block_n = self.block_n(target.gemv_rows)
        # Rows of a row-major weight are read whole, so that each is one stream; panels are a stream in any case.
        block_k = self.depth(target.gemv_k) if packed else min(power_of_two(self.k), 1024)
        arguments = self.arguments(self.x if self.norm is None else self.norm.x)
        arguments.constant("BLOCK_N", block_n)
        arguments.constant("BLOCK_K", block_k)
        if self.norm is not None:
            self.norm.add_to(arguments)
        masks_k, masks_n = self.k % block_k != 0, self.n % block_n != 0
        conditions = []
        if masks_n:
            conditions.append(f"(panel * BLOCK_N + col < {self.n})[:, None]")
        if masks_k:
            conditions.append("in_k[None, :]")
        mask = f"out_col < {self.n}" if masks_n else ""
        residual = None
        if self.residual is not None:
            residual = "residual_ptr + out_col" + (f", mask={mask}, other=0.0" if mask else "")
        text = epilogue(self.dtype, self.gated, self.bias is not None, residual, self.activation, self.n, mask)
        return arguments.launch(
            self.kernel_name("gemv" if self.norm is None else "norm_gemv"),
            GEMV,
            (sympy.Integer(-(-self.n // block_n)), sympy.Integer(1), sympy.Integer(1)),
            (self.node.name,),
            statistics=self.norm.statistics() if self.norm else (),
            normalize=self.norm.normalize(", mask=in_k, other=0.0" if masks_k else "") if self.norm else (),
            masks_k=masks_k,
            row_mask="" if packed else " & ".join(conditions),
            epilogue=text,
            **self.common(block_n),
        )

    def tiled(self, tile: Tile) -> Launch:
        block_n, block_k = self.block_n(tile.n), self.depth(tile.k)
        arguments = self.arguments(self.x)
        rows = self.x.sizes[0]
        m = arguments.size("M", rows)
        x_stride = arguments.size("x_stride", self.x.strides[0])
        arguments.constant("BLOCK_M", tile.m)
        arguments.constant("BLOCK_N", block_n)
        arguments.constant("BLOCK_K", block_k)
        masks_k, masks_n = self.k % block_k != 0, self.n % block_n != 0
        weight_dtype = self.weight.buffer.dtype
        conditions = []
        if masks_n:
            conditions.append(f"(panel * BLOCK_N + col < {self.n})[None, :]")
        if masks_k:
            conditions.append(f"((k + inner)[:, None] < {self.k})")
        mask = "in_rows" + (f" & (out_col < {self.n})" if masks_n else "")
        residual = f"residual_ptr + row[:, None].to(tl.int64) * {self.n} + out_col, mask={mask}, other=0.0"
        text = epilogue(
            self.dtype,
            self.gated,
            self.bias is not None,
            residual if self.residual is not None else None,
            self.activation,
            self.n,
            f"out_col < {self.n}" if masks_n else "",
        )
        grid = (sympy.Integer(-(-self.n // block_n)), FloorDiv(rows + tile.m - 1, tile.m), sympy.Integer(1))
        return arguments.launch(
            self.kernel_name("linear"),
            TILED,
            grid,
            (self.node.name,),
            m=m,
            x_stride=x_stride,
            masks_k=masks_k,
            x_cast="" if self.x.buffer.dtype == weight_dtype else f".to({TL_TYPES[weight_dtype]})",
            col_mask=" & ".join(conditions),
            epilogue=text,
            **self.common(block_n),
        )

    def kernel_name(self, base: str) -> str:
        words = ["gated", base] if self.gated else [base]
        if self.activation != "none":
            words.append(self.activation)
        if self.residual is not None:
            words.append("residual")
        return "_".join(words)
