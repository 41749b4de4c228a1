"""Mixture of experts: the MLPs of the chosen experts, for one token or for many.

    y = sum over k of scores[k] * (down[e] @ activation(up[e] @ x)), e = experts[k]

One token: a program multiplies rows of one chosen expert's weights, or of each in turn, with a vector. No other
expert's weights are touched.

Many tokens: `dispatch` sorts the pairs of token and expert by expert, and deals them out in tiles of BLOCK_M pairs of
one expert; the products run over tiles (Gale et al., 2023, without padding). Expert e has the tiles from
first_pair[e] // BLOCK_M + e on: enough for all its pairs, since each expert before it leaves at most one tile unfilled.
So the grid, pairs // BLOCK_M + E tiles, depends on no data; tiles without pairs read no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ..compiler.gate_expressions import has_gate
from ..compiler.graph import dtype_of, sizes
from ..compiler.pattern import arguments
from .domain import NoKernel
from .gate_text import gate_lines, rounded
from .kernel import TL_TYPES, Launch, Layout, Packed, contiguous_strides
from .linear import DTYPES, flat_rows
from .scope import Scope
from .target import Target, Tile
from .template import Arguments, power_of_two

ONE, ZERO = sympy.Integer(1), sympy.Integer(0)

DISPATCH = """
@triton.jit
def {{ name }}({{ header }}):
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK_P)

    before = tl.zeros([BLOCK_P], tl.int32)
    mine = tl.zeros([BLOCK_P], tl.int32)
    for first in range(0, {{ pairs }}, BLOCK_P):
        chosen = tl.load(experts_ptr + first + lane, mask=first + lane < {{ pairs }}, other={{ experts }})
        before += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
        mine += (chosen == expert).to(tl.int32)
    begin = tl.sum(before, axis=0)
    end = begin + tl.sum(mine, axis=0)
    tl.store(bounds_ptr + expert, begin)
    tl.store(bounds_ptr + {{ experts }} + expert, end)

    place = begin
    for first in range(0, {{ pairs }}, BLOCK_P):
        chosen = tl.load(experts_ptr + first + lane, mask=first + lane < {{ pairs }}, other={{ experts }})
        taken = (chosen == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(taken, axis=0) - 1, first + lane, mask=taken != 0)
        place += tl.sum(taken, axis=0)

    last_tile = tl.where(expert == {{ experts - 1 }}, {{ tiles }}, end // BLOCK_M + expert + 1)
    for tile in range(begin // BLOCK_M + expert, last_tile):
        tl.store(expert_of_tile_ptr + tile, expert)
"""

TILED = """
@triton.jit
def {{ name }}({{ header }}):
    panel = tl.program_id(0)
    tile = tl.program_id(1)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    expert = tl.load(expert_of_tile_ptr + tile)
    begin = tl.load(bounds_ptr + expert)
    end = tl.load(bounds_ptr + {{ experts }} + expert)
    first = begin + (tile - begin // BLOCK_M - expert) * BLOCK_M
    place = first + tl.arange(0, BLOCK_M)
    in_tile = place < end
    pair = tl.load(order_ptr + place, mask=in_tile, other=0).to(tl.int64)
    x_rows = x_ptr + {{ x_row }}[:, None] * {{ x_stride }}
    depth = tl.where(first < end, {{ k }}, 0)
#% for part in parts
    {{ part.weight }} = weight_ptr + expert.to(tl.int64) * {{ rows * k }} + panel.to(tl.int64) * {{ block_n * k }}
        {{- " + " ~ part.start if part.start }}
    {{ part.acc }} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
#% endfor

    for k in range(0, depth, BLOCK_K):
        x = tl.load(x_rows + (k + inner)[None, :], mask=in_tile[:, None]
            {{- " & ((k + inner)[None, :] < " ~ k ~ ")" if masks_k }}, other=0.0)
#% for part in parts
#% if packed
        {{ part.tile }} = tl.load({{ part.weight }} + (k + inner)[:, None] * BLOCK_N + col[None, :]
            {{- ", mask=(k + inner)[:, None] < " ~ k ~ ", other=0.0" if masks_k }})
#% else
        {{ part.tile }} = tl.load({{ part.weight }} + (k + inner)[:, None] + col[None, :] * {{ k }}
            {{- ", mask=" ~ weight_mask ~ ", other=0.0" if weight_mask }})
#% endif
        {{ part.acc }} = tl.dot(x, {{ part.tile }}, {{ part.acc }}, input_precision="ieee")
#% endfor

    out_col = panel * BLOCK_N + col[None, :]
{{ epilogue }}
    out = out_ptr + {{ out_row }}[:, None] * {{ n }} + out_col
    tl.store(out, y, mask=in_tile[:, None]{{ " & (out_col < " ~ n ~ ")" if masks_n }})
"""

VECTOR = """
@triton.jit
def {{ name }}({{ header }}):
    panel = tl.program_id(0)
    pair = tl.program_id(1)
    col = tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    expert = tl.load(experts_ptr + pair).to(tl.int64)
#% if x_of_pairs
    x_row = x_ptr + pair * {{ k }}
#% else
    x_row = x_ptr
#% endif
#% for part in parts
    {{ part.weight }} = weight_ptr + expert * {{ rows * k }} + panel.to(tl.int64) * {{ block_n * k }}
        {{- " + " ~ part.start if part.start }}
    {{ part.acc }} = tl.zeros([BLOCK_N], tl.float32)
#% endfor

    for k in range(0, {{ k }}, BLOCK_K):
#% if masks_k
        in_k = k + inner < {{ k }}
#% endif
        x = tl.load(x_row + k + inner{{ ", mask=in_k, other=0.0" if masks_k }}).to(tl.float32)
#% for part in parts
#% if packed
        {{ part.tile }} = tl.load({{ part.weight }} + (k + inner)[:, None] * BLOCK_N + col[None, :]
            {{- ", mask=in_k[:, None], other=0.0" if masks_k }}).to(tl.float32)
        {{ part.acc }} += tl.sum(x[:, None] * {{ part.tile }}, axis=0)
#% else
        {{ part.tile }} = tl.load({{ part.weight }} + col[:, None] * {{ k }} + (k + inner)[None, :]
            {{- ", mask=" ~ weight_mask ~ ", other=0.0" if weight_mask }}).to(tl.float32)
        {{ part.acc }} += tl.sum({{ part.tile }} * x[None, :], axis=1)
#% endif
#% endfor

    out_col = panel * BLOCK_N + col
{{ epilogue }}
    tl.store(out_ptr + pair * {{ n }} + out_col, y{{ ", mask=out_col < " ~ n if masks_n }})
"""

COMBINE = """
@triton.jit
def {{ name }}({{ header }}):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)

    total = tl.zeros([BLOCK_D], tl.float32)
    for k in range(0, {{ per_token }}):
        score = tl.load(scores_ptr + token * {{ per_token }} + k).to(tl.float32)
        y = tl.load(y_ptr + (token * {{ per_token }} + k) * {{ d }} + col, mask=col < {{ d }}, other=0.0).to(tl.float32)
        total += {{ weighted }}

    tl.store(out_ptr + token * {{ d }} + col, {{ result }}, mask=col < {{ d }})
"""


def lower(scope: Scope, node: fx.Node) -> None:
    """Launches for one `effc.moe`."""
    case = Case(scope, node)
    target = scope.target
    few = sympy.Le(case.pairs, target.small_rows * case.experts)
    scope.choose(
        [
            (sympy.Eq(case.tokens, 1), case.for_one_token(target)),
            (few, case.for_tokens(target.linear_small)),
            (sympy.true, case.for_tokens(target.experts)),
        ]
    )


@dataclass(frozen=True)
class Product:
    """One of the experts' two products: its weight [E, rows, k] and bias, and the columns n that it gives a pair."""

    name: str
    weight: Layout | Packed
    bias: Layout | None
    rows: int
    k: int
    n: int
    activation: str | None


class Case:
    """One `effc.moe` to lower: its operands, the memory between its kernels, and its launches."""

    def __init__(self, scope: Scope, node: fx.Node) -> None:
        named = arguments(node)
        x, experts, scores = (named[name] for name in ("x", "experts", "scores"))
        weights = [named[name] for name in ("up", "down", "up_bias", "down_bias")]
        check(x, scores, [weight for weight in weights if weight is not None])
        self.scope, self.node, self.dtype = scope, node, dtype_of(x)
        self.promoted = torch.promote_types(self.dtype, dtype_of(scores))
        self.per_token, self.experts = int(sizes(experts)[-1]), int(sizes(weights[0])[0])
        self.x = flat_rows(scope, x)
        self.tokens = self.x.sizes[0]
        self.pairs = self.tokens * self.per_token
        self.chosen, self.scores = scope.contiguous(experts), scope.contiguous(scores)
        up, down = (tuple(map(int, sizes(weight)[1:])) for weight in weights[:2])
        activation = named["activation"]
        self.gated = has_gate(activation)
        layouts = [scope.weight(weight) for weight in weights[:2]]
        biases = [None if bias is None else scope.contiguous(bias) for bias in weights[2:]]
        self.up = Product("up", layouts[0], biases[0], up[0], up[1], down[1], activation)
        self.down = Product("down", layouts[1], biases[1], down[0], down[1], down[0], None)
        self.hidden = self.between("hidden", (self.pairs, sympy.Integer(down[1])), self.dtype)
        self.y = self.between("y", (self.pairs, sympy.Integer(down[0])), self.dtype)
        self.out = scope.result(node)

    def between(self, name: str, shape: tuple[sympy.Expr, ...], dtype: torch.dtype) -> Layout:
        buffer = self.scope.temporary(f"{self.node.name}_{name}", sympy.prod(shape), dtype)
        return Layout(buffer, ZERO, shape, contiguous_strides(shape))

    # --- one token ---------------------------------------------------------------------------------------------------

    def for_one_token(self, target: Target) -> tuple[Launch, ...]:
        return (
            self.vector(target, self.up, self.x, self.hidden),
            self.vector(target, self.down, self.hidden, self.y),
            self.combine(),
        )

    def vector(self, target: Target, product: Product, x: Layout, out: Layout) -> Launch:
        packed = isinstance(product.weight, Packed)
        block_n = product.weight.block if packed else target.gemv_rows
        block_k = depth(product.k, target.gemv_k) if packed else min(power_of_two(product.k), 1024)
        arguments = Arguments()
        arguments.pointer("experts_ptr", self.chosen)
        self.operands(arguments, product, x, out)
        arguments.constant("BLOCK_N", block_n)
        arguments.constant("BLOCK_K", block_k)
        conditions = []
        if product.n % block_n:
            conditions.append(f"(panel * BLOCK_N + col < {product.n})[:, None]")
        if product.k % block_k:
            conditions.append("in_k[None, :]")
        grid = (sympy.Integer(-(-product.n // block_n)), self.pairs, ONE)
        return arguments.launch(
            f"expert_{product.name}",
            VECTOR,
            grid,
            (self.node.name,),
            x_of_pairs=product is self.down,
            weight_mask=" & ".join(conditions),
            **self.shared(product, block_n, block_k),
        )

    # --- many tokens -------------------------------------------------------------------------------------------------

    def for_tokens(self, tile: Tile) -> tuple[Launch, ...]:
        tiles = FloorDiv(self.pairs, tile.m) + self.experts
        order = self.between("order", (self.pairs,), torch.int32)
        bounds = self.between("bounds", (sympy.Integer(2 * self.experts),), torch.int32)
        expert_of_tile = self.between(f"expert_of_tile_{tile.m}", (tiles,), torch.int32)
        dealt = (("order_ptr", order), ("bounds_ptr", bounds), ("expert_of_tile_ptr", expert_of_tile))
        return (
            self.dispatch(tile, dealt, tiles),
            self.tiled(tile, dealt, tiles, self.up, self.x, self.hidden),
            self.tiled(tile, dealt, tiles, self.down, self.hidden, self.y),
            self.combine(),
        )

    def dispatch(self, tile: Tile, dealt: Dealt, tiles: sympy.Expr) -> Launch:
        arguments = Arguments()
        arguments.pointer("experts_ptr", self.chosen)
        for name, layout in dealt:
            arguments.pointer(name, layout)
        values = {"pairs": arguments.size("pairs", self.pairs), "tiles": arguments.size("tiles", tiles)}
        arguments.constant("BLOCK_P", 64)
        arguments.constant("BLOCK_M", tile.m)
        grid = (sympy.Integer(self.experts), ONE, ONE)
        return arguments.launch("dispatch", DISPATCH, grid, (self.node.name,), experts=self.experts, **values)

    def tiled(self, tile: Tile, dealt: Dealt, tiles: sympy.Expr, product: Product, x: Layout, out: Layout) -> Launch:
        packed = isinstance(product.weight, Packed)
        block_n, block_k = product.weight.block if packed else tile.n, depth(product.k, tile.k)
        arguments = Arguments()
        for name, layout in dealt:
            arguments.pointer(name, layout)
        self.operands(arguments, product, x, out)
        x_stride = arguments.size("x_stride", x.strides[0])
        arguments.constant("BLOCK_M", tile.m)
        arguments.constant("BLOCK_N", block_n)
        arguments.constant("BLOCK_K", block_k)
        conditions = []
        if product.n % block_n:
            conditions.append(f"(panel * BLOCK_N + col < {product.n})[None, :]")
        if product.k % block_k:
            conditions.append(f"((k + inner)[:, None] < {product.k})")
        is_up = product is self.up
        return arguments.launch(
            f"experts_{product.name}",
            TILED,
            (sympy.Integer(-(-product.n // block_n)), tiles, ONE),
            (self.node.name,),
            x_row=f"(pair // {self.per_token})" if is_up else "place.to(tl.int64)",
            out_row="place.to(tl.int64)" if is_up else "pair",
            x_stride=x_stride,
            experts=self.experts,
            weight_mask=" & ".join(conditions),
            **self.shared(product, block_n, block_k),
        )

    # --- what they share ---------------------------------------------------------------------------------------------

    def operands(self, arguments: Arguments, product: Product, x: Layout, out: Layout) -> None:
        arguments.pointer("x_ptr", x)
        arguments.pointer("weight_ptr", product.weight)
        if product.bias is not None:
            arguments.pointer("bias_ptr", product.bias)
        arguments.pointer("out_ptr", out)

    def shared(self, product: Product, block_n: int, block_k: int) -> dict[str, object]:
        """Template values that both ways have in common."""
        gated = product is self.up and self.gated
        names = (("gate", 0), ("up", product.n * product.k)) if gated else ((product.name, 0),)
        return {
            "k": product.k,
            "n": product.n,
            "rows": product.rows,
            "block_n": block_n,
            "packed": isinstance(product.weight, Packed),
            "masks_k": product.k % block_k != 0,
            "masks_n": product.n % block_n != 0,
            "parts": [
                {"acc": name, "weight": f"{name}_weight", "tile": f"{name}_tile", "start": start}
                for name, start in names
            ],
            "epilogue": self.epilogue(product, [name for name, _ in names], product.n % block_n != 0),
        }

    def epilogue(self, product: Product, names: list[str], masks_n: bool) -> str:
        """Lines from the accumulators to `y`; every step rounds."""
        lines = []
        mask = f", mask=out_col < {product.n}, other=0.0" if masks_n else ""
        for position, name in enumerate(names):
            if self.dtype != torch.float32:
                lines.append(f"{name} = {rounded(name, self.dtype)}")
            if product.bias is not None:
                shift = f" + {position * product.n}" if position else ""
                bias = f"tl.load(bias_ptr + expert * {product.rows} + out_col{shift}{mask}).to(tl.float32)"
                lines.append(f"{name} = {rounded(f'{name} + {bias}', self.dtype)}")
        if product.activation is not None:
            lines += gate_lines(product.activation, self.dtype)
        else:
            lines.append(f"y = {names[0]}")
        if self.dtype != torch.float32:
            lines.append(f"y = y.to({TL_TYPES[self.dtype]})")
        return "\n".join(f"    {line}" for line in lines)

    def combine(self) -> Launch:
        size = self.down.n
        block_d = min(power_of_two(size), 1024)
        arguments = Arguments()
        for name, layout in (("y_ptr", self.y), ("scores_ptr", self.scores), ("out_ptr", self.out)):
            arguments.pointer(name, layout)
        arguments.constant("BLOCK_D", block_d)
        return arguments.launch(
            "combine_experts",
            COMBINE,
            (self.tokens, sympy.Integer(-(-size // block_d)), ONE),
            (self.node.name,),
            per_token=self.per_token,
            d=size,
            weighted=rounded("y * score", self.promoted),
            result=f"{rounded('total', self.promoted)}.to({TL_TYPES[self.dtype]})",
        )


Dealt = tuple[tuple[str, Layout], ...]
"""Pointer names and layouts of what `dispatch` writes."""


def check(x: fx.Node, scores: fx.Node, weights: list[fx.Node]) -> None:
    """Raise NoKernel for operands that the kernels do not take."""
    if dtype_of(scores) not in DTYPES:
        raise NoKernel(f"experts with scores of {dtype_of(scores)} have no kernel")
    if dtype_of(x) not in DTYPES or any(dtype_of(weight) != dtype_of(x) for weight in weights):
        found = ", ".join(sorted({str(dtype_of(weight)) for weight in weights}))
        raise NoKernel(f"experts of {found} for tokens of {dtype_of(x)} have no kernel")
    if not all(size.is_Integer for weight in weights for size in sizes(weight)):
        raise NoKernel("the sizes of experts' weights must be known when compiling")


def depth(k: int, wanted: int) -> int:
    """Depth of one step: the largest divisor of k among the powers of two up to `wanted`, if it is worth it."""
    block = wanted
    while block > 16 and k % block:
        block //= 2
    return block if k % block == 0 else wanted
