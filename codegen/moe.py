"""Mixture of experts: the MLPs of the chosen experts, for one token or for many.

    y = residual + sum over k of scores[k] * (down[e] @ activation(up[e] @ x)), e = experts[k]

One token: two launches, of which no program touches another expert's weights than those chosen. Where the experts are
not given but a router chooses them (`router.py`), its product goes before. Many tokens: `dispatch`, two products and a
sum. The kernels are in `moe_kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from ..compiler.graph import dtype_of, sizes
from ..compiler.pattern import arguments
from .domain import NoKernel
from .expression_text import gate_lines, rounded
from .kernel import TL_TYPES, Launch, Layout, Packed, contiguous_strides
from .linear import DTYPES, flat_rows
from .moe_kernels import COMBINE, DISPATCH, DOWN_OF_TOKEN, TILED, UP_OF_TOKEN
from .prologue import Norm
from .router import Router
from .scope import Scope
from .target import Target, Tile
from .template import Arguments, power_of_two

ONE, ZERO = sympy.Integer(1), sympy.Integer(0)


def lower(scope: Scope, node: fx.Node) -> None:
    """Launches for one `effc.experts` or `effc.moe`."""
    case = Case(scope, node)
    target = scope.target
    few = sympy.Le(case.pairs, target.small_rows * case.count)
    scope.choose(
        [
            (sympy.Eq(case.tokens, 1), case.for_one_token(target)),
            (few, case.for_tokens(target.linear_small, target.linear_small)),
            (sympy.true, case.for_tokens(target.experts, target.linear_large)),
        ]
    )


@dataclass(frozen=True)
class Product:
    """One of the experts' two products: weight [E, parts, n, k], of each part a column n of the result.

    strides: of the experts, parts, rows and depth of the weight; a panel's where it is packed.
    """

    name: str
    weight: Layout | Packed
    bias: Layout | None
    parts: int
    n: int
    k: int
    strides: tuple[int, int, int, int]
    activation: str | None = None

    @classmethod
    def of(cls, scope: Scope, name: str, node: fx.Node, bias: fx.Node | None, activation: str | None) -> Product:
        shape = tuple(map(int, sizes(node)))
        parts, n, k = shape[1:] if len(shape) == 4 else (1, *shape[1:])
        layout = scope.layouts.get(node) or scope.layout(node)
        if isinstance(layout, Packed):
            strides = (parts * n * k, n * k, 1, layout.block)
        else:
            if not all(stride.is_Integer for stride in layout.strides):
                layout = scope.copy(node)
            expert, *part, row, depth = map(int, layout.strides)
            strides = (expert, *(part or (0,)), row, depth)
        return cls(name, layout, bias and scope.contiguous(bias), parts, n, k, strides, activation)

    @property
    def is_packed(self) -> bool:
        return isinstance(self.weight, Packed)

    @property
    def by_columns(self) -> bool:
        """Whether neighbours in memory are neighbouring rows of the weight, which are columns of the result."""
        return self.is_packed or self.strides[3] != 1


class Case:
    """One `effc.experts` or `effc.moe` to lower: its operands, the memory between its kernels, and its launches."""

    def __init__(self, scope: Scope, node: fx.Node) -> None:
        named = arguments(node)
        check(named)
        self.scope, self.node, self.dtype = scope, node, dtype_of(named["x"])
        self.count = int(sizes(named["up"])[0])
        self.router = Router(scope, node, named) if "router" in named else None
        if self.router is None:
            self.x, self.norm = flat_rows(scope, named["x"]), None
            self.per_token = int(sizes(named["experts"])[-1])
            self.chosen, self.scores = scope.contiguous(named["experts"]), scope.contiguous(named["scores"])
        else:
            self.x, self.norm, self.per_token = self.router.product.x, self.router.product.norm, self.router.k
            self.chosen, self.scores = self.router.experts, self.router.scores
        self.promoted = torch.promote_types(self.dtype, self.scores.buffer.dtype)
        self.tokens = self.x.sizes[0]
        self.pairs = self.tokens * self.per_token
        residual = named.get("residual")
        self.residual = None if residual is None else scope.contiguous(residual)
        self.up = Product.of(scope, "up", named["up"], named["up_bias"], named["activation"])
        self.down = Product.of(scope, "down", named["down"], named["down_bias"], None)
        self.hidden = self.between("hidden", (self.pairs, sympy.Integer(self.up.n)), self.dtype)
        self.y = self.between("y", (self.pairs, sympy.Integer(self.down.n)), self.dtype)
        self.out = scope.result(node)

    def between(self, name: str, shape: tuple[sympy.Expr, ...], dtype: torch.dtype) -> Layout:
        buffer = self.scope.temporary(f"{self.node.name}_{name}", sympy.prod(shape), dtype)
        return Layout(buffer, ZERO, shape, contiguous_strides(shape))

    # --- one token ---------------------------------------------------------------------------------------------------

    def for_one_token(self, target: Target) -> tuple[Launch, ...]:
        launches = (self.up_of_token(target), self.down_of_token(target))
        return launches if self.router is None else (self.router.product.gemv(target), *launches)

    def up_of_token(self, target: Target) -> Launch:
        block_n, block_k = self.vector_block(target, self.up)
        arguments, router = Arguments(), self.router
        if router is not None:
            router.add_to(arguments)
        arguments.pointer("experts_ptr", self.chosen)
        if router is not None:
            arguments.pointer("scores_ptr", self.scores)
        self.operands(arguments, self.up, self.x if self.norm is None else self.norm.x, self.hidden)
        arguments.constant("BLOCK_N", block_n)
        arguments.constant("BLOCK_K", block_k)
        if self.norm is not None:
            self.norm.add_to(arguments)
        return arguments.launch(
            "choose_and_expert_up" if router is not None else "expert_up",
            UP_OF_TOKEN,
            (sympy.Integer(-(-self.up.n // block_n)), sympy.Integer(self.per_token), ONE),
            (self.node.name,),
            choice=router.choice() if router is not None else "",
            first=router.store_mask("(panel == 0)", "(pair == 0)") if router is not None else "",
            statistics=self.norm.statistics() if self.norm is not None else (),
            **self.of_vector(self.up, block_n, block_k, self.norm),
        )

    def down_of_token(self, target: Target) -> Launch:
        block_n, block_k = self.vector_block(target, self.down)
        arguments = Arguments()
        arguments.pointer("experts_ptr", self.chosen)
        arguments.pointer("scores_ptr", self.scores)
        if self.residual is not None:
            arguments.pointer("residual_ptr", self.residual)
        self.operands(arguments, self.down, self.hidden, self.out)
        arguments.constant("BLOCK_N", block_n)
        arguments.constant("BLOCK_K", block_k)
        return arguments.launch(
            "expert_down" + "_residual" * (self.residual is not None),
            DOWN_OF_TOKEN,
            (sympy.Integer(-(-self.down.n // block_n)), ONE, ONE),
            (self.node.name,),
            **self.of_sum(),
            **self.of_vector(self.down, block_n, block_k, None),
        )

    def vector_block(self, target: Target, product: Product) -> tuple[int, int]:
        """Columns of the result that one program makes, and the depth of a step."""
        if isinstance(product.weight, Packed):
            return product.weight.block, depth(product.k, target.gemv_k)
        if product.by_columns:
            return target.linear_small.n, depth(product.k, target.gemv_k)
        return target.gemv_rows, min(power_of_two(product.k), 1024)

    def of_vector(self, product: Product, block_n: int, block_k: int, norm: Norm | None) -> dict[str, object]:
        """Template values of a product with a vector."""
        masks_k = product.k % block_k != 0
        axes = ("[:, None]", "[None, :]")
        of_k, of_n = axes if product.by_columns else axes[::-1]
        conditions = [f"(out_col < {product.n}){of_n}"] if product.n % block_n and not product.is_packed else []
        conditions += [f"in_k{of_k}"] if masks_k else []
        return {
            **self.shared(product, block_n, block_k, 4 if product is self.up else 8),
            "by_columns": product.by_columns,
            "normalize": norm.normalize(", mask=in_k, other=0.0" if masks_k else "") if norm is not None else (),
            "weight_mask": " & ".join(conditions),
        }

    # --- many tokens -------------------------------------------------------------------------------------------------

    def for_tokens(self, tile: Tile, router_tile: Tile) -> tuple[Launch, ...]:
        tiles = FloorDiv(self.pairs, tile.m) + self.count
        order = self.between("order", (self.pairs,), torch.int32)
        bounds = self.between("bounds", (sympy.Integer(2 * self.count),), torch.int32)
        expert_of_tile = self.between(f"expert_of_tile_{tile.m}", (tiles,), torch.int32)
        dealt = (("order_ptr", order), ("bounds_ptr", bounds), ("expert_of_tile_ptr", expert_of_tile))
        launches = (
            self.dispatch(tile, dealt, tiles),
            self.tiled(tile, dealt, tiles, self.up, self.x, self.hidden),
            self.tiled(tile, dealt, tiles, self.down, self.hidden, self.y),
            self.combine(),
        )
        if self.router is None:
            return launches
        return (*self.router.norm_launches, self.router.product.tiled(router_tile), self.router.choose(), *launches)

    def dispatch(self, tile: Tile, dealt: Dealt, tiles: sympy.Expr) -> Launch:
        arguments = Arguments()
        arguments.pointer("experts_ptr", self.chosen)
        for name, layout in dealt:
            arguments.pointer(name, layout)
        values = {"pairs": arguments.size("pairs", self.pairs), "tiles": arguments.size("tiles", tiles)}
        arguments.constant("BLOCK_P", 64)
        arguments.constant("BLOCK_M", tile.m)
        grid = (sympy.Integer(self.count), ONE, ONE)
        return arguments.launch("dispatch", DISPATCH, grid, (self.node.name,), experts=self.count, **values)

    def tiled(self, tile: Tile, dealt: Dealt, tiles: sympy.Expr, product: Product, x: Layout, out: Layout) -> Launch:
        block_n = product.weight.block if isinstance(product.weight, Packed) else tile.n
        block_k = depth(product.k, tile.k)
        arguments = Arguments()
        for name, layout in dealt:
            arguments.pointer(name, layout)
        self.operands(arguments, product, x, out)
        x_stride = arguments.size("x_stride", x.strides[0])
        arguments.constant("BLOCK_M", tile.m)
        arguments.constant("BLOCK_N", block_n)
        arguments.constant("BLOCK_K", block_k)
        conditions = []
        if product.n % block_n and not product.is_packed:
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
            experts=self.count,
            weight_mask=" & ".join(conditions),
            **self.shared(product, block_n, block_k, 4),
        )

    def combine(self) -> Launch:
        size = self.down.n
        block_d = min(power_of_two(size), 1024)
        arguments = Arguments()
        for name, layout in (("y_ptr", self.y), ("scores_ptr", self.scores), ("out_ptr", self.out)):
            arguments.pointer(name, layout)
        if self.residual is not None:
            arguments.pointer("residual_ptr", self.residual)
        arguments.constant("BLOCK_D", block_d)
        return arguments.launch(
            "combine_experts" + "_residual" * (self.residual is not None),
            COMBINE,
            (self.tokens, sympy.Integer(-(-size // block_d)), ONE),
            (self.node.name,),
            d=size,
            result=self.stored,
            **self.of_sum(),
        )

    # --- what they share ---------------------------------------------------------------------------------------------

    @property
    def stored(self) -> str:
        return "y" if self.dtype == torch.float32 else f"y.to({TL_TYPES[self.dtype]})"

    def operands(self, arguments: Arguments, product: Product, x: Layout, out: Layout) -> None:
        arguments.pointer("x_ptr", x)
        arguments.pointer("weight_ptr", product.weight)
        if product.bias is not None:
            arguments.pointer("bias_ptr", product.bias)
        arguments.pointer("out_ptr", out)

    def of_sum(self) -> dict[str, object]:
        """Template values of the weighted sum over a token's experts."""
        return {
            "per_token": self.per_token,
            "weighted": rounded("y * score", self.promoted),
            "total": rounded(rounded("total", self.promoted), self.dtype),
            "residual": self.residual is not None,
        }

    def shared(self, product: Product, block_n: int, block_k: int, spaces: int) -> dict[str, object]:
        """Template values that both ways have in common; the epilogue stands so many spaces to the right."""
        expert, part, row, along = product.strides
        names = ("gate", "up") if product.parts == 2 else (product.name,)
        return {
            "k": product.k,
            "n": product.n,
            "expert_stride": expert,
            "panel_stride": product.k * block_n if product.is_packed else row * block_n,
            "by_row": times(row),
            "by_depth": times(along) if not product.is_packed else " * BLOCK_N",
            "masks_k": product.k % block_k != 0,
            "masks_n": product.n % block_n != 0,
            "parts": [
                {"acc": name, "weight": f"{name}_weight", "tile": f"{name}_tile", "start": position * part}
                for position, name in enumerate(names)
            ],
            "epilogue": indent("\n".join(self.epilogue(product, names, product.n % block_n != 0)), " " * spaces),
            "result": self.stored,
        }

    def epilogue(self, product: Product, names: tuple[str, ...], masks_n: bool) -> list[str]:
        """Lines from the accumulators to `y`, in fp32; every step rounds."""
        lines = []
        mask = f", mask=out_col < {product.n}, other=0.0" if masks_n else ""
        for position, name in enumerate(names):
            if self.dtype != torch.float32:
                lines.append(f"{name} = {rounded(name, self.dtype)}")
            if product.bias is not None:
                shift = f" + {position * product.n}" if position else ""
                rows = product.parts * product.n
                bias = f"tl.load(bias_ptr + expert * {rows} + out_col{shift}{mask}).to(tl.float32)"
                lines.append(f"{name} = {rounded(f'{name} + {bias}', self.dtype)}")
        if product.activation is None:
            return [*lines, f"y = {names[0]}"]
        return [*lines, *gate_lines(product.activation, self.dtype)]


Dealt = tuple[tuple[str, Layout], ...]
"""Pointer names and layouts of what `dispatch` writes."""


def times(stride: int) -> str:
    return "" if stride == 1 else f" * {stride}"


def check(named: dict[str, object]) -> None:
    """Raise NoKernel for operands that the kernels do not take."""
    x, scores = named["x"], named.get("scores")
    weights = [named[name] for name in ("up", "down", "up_bias", "down_bias") if named[name] is not None]
    if scores is not None and dtype_of(scores) not in DTYPES:
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
