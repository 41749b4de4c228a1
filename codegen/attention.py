"""Attention: a tiled kernel for many queries, and a split-K pair of kernels for one query per row.

Blocks of keys that no query of a program can see are not read (`key_range`). Query heads that share a key/value head
(GQA) are processed together while decoding (Flash-Decoding, Dao et al., 2023). The kernels' text is in
`attention_kernels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Max, Min

from ..compiler.graph import dtype_of, sizes
from ..compiler.pattern import arguments as arguments_of
from .attention_kernels import COMBINE, SPLIT, TILED
from .domain import NoKernel
from .index_code import IndexCode
from .kernel import TL_TYPES, Launch, Layout, contiguous_strides
from .key_range import bounds_of, range_values, ring_values
from .scope import Scope
from .target import Target
from .template import Arguments, power_of_two

ONE = sympy.Integer(1)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TENSORS = ("q", "k", "v", "past", "key_mask", "mask", "sinks")


@dataclass(frozen=True)
class Attention:
    """One `effc.attention` or `effc.cached_attention` while it is lowered.

    operands: its arguments by name. layouts: where the tensors among them lie, but for `tables`. out [B, H, S, D'].
    """

    node: fx.Node
    operands: dict[str, Any]
    layouts: dict[str, Layout]
    tables: tuple[Layout, ...]
    out: Layout
    target: Target

    @property
    def cached(self) -> bool:
        return "past" in self.layouts

    @property
    def heads(self) -> int:
        return int(sizes(self.operands["q"])[1])

    @property
    def groups(self) -> int:
        return int(sizes(self.operands["k"])[1])

    @property
    def size(self) -> int:
        return int(sizes(self.operands["q"])[3])

    @property
    def value_size(self) -> int:
        return int(sizes(self.operands["v"])[3])

    @property
    def key_index(self) -> str:
        """The positions of a block of keys, in a row."""
        return "at[None, :]" if self.operands.get("ring") is None else "k_at[None, :]"

    @property
    def float_mask(self) -> bool:
        return "mask" in self.layouts and self.layouts["mask"].buffer.dtype != torch.bool


def lower(scope: Scope, node: fx.Node) -> None:
    """Launches for one `effc.attention` or `effc.cached_attention`."""
    operands = {name.removesuffix("_cache"): value for name, value in arguments_of(node).items()}
    q, k, v = (operands[name] for name in "qkv")
    if not {dtype_of(x) for x in (q, k, v)} <= set(DTYPES) or dtype_of(q) != dtype_of(k):
        raise NoKernel(f"attention of {dtype_of(q)} over {dtype_of(k)} has no kernel")
    if not all(sizes(x)[axis].is_Integer for x in (q, k, v) for axis in (1, 3)):
        raise NoKernel("heads and head sizes of attention must be known when compiling")
    layouts = {name: scope.rows(operands[name]) for name in "qkv"}
    layouts |= {name: scope.layout(operands[name]) for name in TENSORS[3:] if operands.get(name) is not None}
    tables = tuple(scope.layout(table) for table in operands["tables"] or ())
    out = output_layout(scope, node)
    scope.layouts[node] = out
    attention = Attention(node, operands, layouts, tables, out, scope.target)
    if attention.cached and sizes(q)[2] == 1:
        lower_split(scope, attention)
    else:
        scope.add(tiled(attention))


def output_layout(scope: Scope, node: fx.Node) -> Layout:
    """The result [B, H, S, D] laid out as [B, S, H, D], so that merging the heads of a token is a view."""
    batch, heads, length, size = sizes(node)
    out = scope.result(node, (batch, length, heads, size))
    order = (0, 2, 1, 3)
    return Layout(out.buffer, out.offset, tuple(out.sizes[i] for i in order), tuple(out.strides[i] for i in order))


# --- what the kernels are told -----------------------------------------------------------------------------------


def shared_values(
    attention: Attention, arguments: Arguments, indices: dict[str, str], queries: dict[str, str], block: int
) -> dict[str, Any]:
    """Template values of the keys to read and the loop over them.

    indices: what the kernel calls b, h, q and k, as [rows, keys]. queries, block: as in `range_values`.
    """
    batch, heads = sizes(attention.operands["q"])[:2]
    operands, layouts = attention.operands, attention.layouts
    for name in TENSORS:
        if name in layouts:
            arguments.pointer(f"{name}_ptr", layouts[name])
    extents = {"b": batch, "h": heads} if indices["h"] == "head" else {"b": batch}
    code = IndexCode(arguments, indices, attention.tables, extents)
    bias, visible = (operands[name] and code.text(operands[name]) for name in ("bias", "visible"))

    def strides(name: str, layout: Layout, axes: str = "bhs") -> list[str]:
        return [arguments.size(f"{name}_stride_{axis}", stride) for axis, stride in zip(axes, layout.strides)]

    ring, causal = operands.get("ring"), attention.cached or bool(operands["causal"])
    t = arguments.size("T", sizes(operands["k"])[2]) if ring is not None or not attention.cached else ""
    bounds = bounds_of(operands, causal, tuple(table.buffer.dtype for table in attention.tables))
    values: dict[str, Any] = {
        **{name: strides(name, layouts[name]) for name in "qkv"},
        **(range_values(bounds, code, queries, t, block) if ring is None else ring_values(t)),
        "causal": causal,
        "t": t,
        "heads": attention.heads,
        "groups": attention.groups,
        "ratio": attention.heads // attention.groups,
        "window": operands["window"],
        "ring": ring,
        "k_at": attention.key_index.removesuffix("[None, :]"),
        "key_mask": "key_mask" in layouts,
        "mask": None,
        "bias": bias,
        "condition": visible,
        "lines_before": code.before,
        "lines": code.inside,
        "sinks": "sinks" in layouts,
        **scores(attention),
    }
    if "key_mask" in layouts:
        values["km"] = strides("key_mask", layouts["key_mask"], "bs")
    if "sinks" in layouts:
        (stride,) = strides("sinks", layouts["sinks"], "h")
        values["sink_place"] = "head" if stride == "1" else f"head * {stride}"
    return values


def scores(attention: Attention) -> dict[str, Any]:
    """The factors of the scores, and the exponential taken of them.

    Scores are taken in base 2, but where something is added: a float mask may hold the lowest number, which would
    overflow, and expressions are in base e.
    """
    operands = attention.operands
    natural = operands["bias"] is not None or attention.float_mask
    base = 1.0 if natural else math.log2(math.e)
    scale, softcap = float(operands["scale"]), operands["softcap"]
    return {
        "exp": "tl.exp" if natural else "tl.exp2",
        "to_base": "" if natural else f" * {base!r}",
        "scale": repr(scale * base if softcap is None else scale / softcap),
        "softcap": None if softcap is None else repr(softcap * base),
    }


def result_values(attention: Attention, arguments: Arguments) -> dict[str, Any]:
    """Template values of what stores the result."""
    layout = attention.out
    return {
        "o": [arguments.size(f"out_stride_{axis}", stride) for axis, stride in zip("bhs", layout.strides)],
        "out_type": TL_TYPES[layout.buffer.dtype],
        "heads": attention.heads,
        "value_size": attention.value_size,
        "masks_v": attention.value_size != head_block(attention.value_size, attention.target),
    }


def head_block(size: int, target: Target) -> int:
    """Lanes that hold one head: a power of two, and no fewer than `tl.dot` takes."""
    return max(power_of_two(size), target.min_dot_size)


def access_masks(attention: Attention, rows: str) -> dict[str, str]:
    """The masks of loads and stores; the lanes of a head size that does not fill its block are named in them.

    rows: the condition for a row of queries to exist.
    """

    def ragged(condition: str, dim: str, size: int, axis: str) -> str:
        filled = size == head_block(size, attention.target)
        return condition if filled else f"{condition} & ({dim} < {size}){axis}"

    size, value_size = attention.size, attention.value_size
    hidden = " & shown[:, None]" if "key_mask" in attention.layouts else ""
    return {
        "q_mask": ragged(rows, "dim", size, "[None, :]"),
        "k_mask": ragged("(at[None, :] < last_key)", "dim", size, "[:, None]"),
        "v_mask": ragged("(at[:, None] < last_key)" + hidden, "value_dim", value_size, "[None, :]"),
        "out_mask": ragged(rows, "value_dim", value_size, "[None, :]"),
    }


def constants(attention: Attention, arguments: Arguments, **blocks: int) -> None:
    for name, value in blocks.items():
        arguments.constant(name, value)
    arguments.constant("BLOCK_D", head_block(attention.size, attention.target))
    arguments.constant("BLOCK_V", head_block(attention.value_size, attention.target))


# --- the kernels -------------------------------------------------------------------------------------------------


def mask_strides(mask: Layout, scores: tuple[sympy.Expr, ...]) -> list[sympy.Expr]:
    """The strides of a mask along the four axes of the scores, 0 where it has one entry for all."""
    found: list[sympy.Expr] = [sympy.Integer(0)] * (4 - len(mask.sizes))
    for size, stride, wanted in zip(mask.sizes, mask.strides, scores[len(found) :], strict=True):
        if not is_one(size) and size != wanted:
            raise NoKernel(f"a mask of {list(mask.sizes)} for scores of {list(scores)} has no kernel")
        found.append(sympy.Integer(0) if is_one(size) else stride)
    return found


def is_one(size: sympy.Expr) -> bool:
    """Whether a size is 1 however large the runtime sizes are, which are at least 1."""
    more = {symbol: sympy.Symbol(f"{symbol}_more", integer=True, nonnegative=True) + 1 for symbol in size.free_symbols}
    return size == 1 or size.xreplace(more).replace(Max, sympy.Max).replace(Min, sympy.Min) == 1


def tiled(attention: Attention) -> Launch:
    """Each program computes a tile of queries of one head."""
    operands, layouts, arguments = attention.operands, attention.layouts, Arguments()
    s = arguments.size("S", sizes(operands["q"])[2])
    block_m, block_n = attention.target.attention
    names = {"b": "batch", "h": "head", "q": "q_at[:, None]", "k": attention.key_index}
    past = "past + " if attention.cached else ""
    queries = {
        "first_q": f"{past}tl.program_id(1) * BLOCK_M",
        "last_q": f"{past}tl.minimum(tl.program_id(1) * BLOCK_M + BLOCK_M, {s}) - 1",
    }
    values = shared_values(attention, arguments, names, queries, block_n)
    arguments.pointer("out_ptr", attention.out)
    values |= result_values(attention, arguments)
    if "mask" in layouts:
        mask = layouts["mask"]
        broadcast = mask_strides(mask, (*sizes(operands["q"])[:3], sizes(operands["k"])[2]))
        values["mask"] = "float" if attention.float_mask else "bool"
        values["mk"] = [arguments.size(f"mask_stride_{i}", x) for i, x in enumerate(broadcast)]
    constants(attention, arguments, BLOCK_M=block_m, BLOCK_N=block_n)
    batch, heads, length = sizes(operands["q"])[:3]
    return arguments.launch(
        "cached_attention" if attention.cached else "attention",
        TILED,
        (batch * heads, FloorDiv(length + block_m - 1, block_m), ONE),
        (attention.node.name,),
        tiled=True,
        cached=attention.cached,
        loop=("0", "last_key - skipped") if values["kept"] else ("first_key", "last_key"),
        s=s,
        **access_masks(attention, f"(row[:, None] < {s})"),
        **values,
    )


def lower_split(scope: Scope, attention: Attention) -> None:
    """The keys of a head are shared by several programs; a second kernel adds what they found."""
    target, splits = attention.target, attention.target.splits
    batch, heads = sizes(attention.operands["q"])[:2]
    per_split = batch * heads * splits
    scratch = {
        name: Layout(buffer, sympy.Integer(0), shape, contiguous_strides(shape))
        for name, shape in (
            ("largest", (per_split,)),
            ("total", (per_split,)),
            ("partial", (per_split, sympy.Integer(attention.value_size))),
        )
        for buffer in (scope.temporary(f"{attention.node.name}.{name}", sympy.prod(shape), torch.float32),)
    }
    scope.add(split(attention, scratch))
    arguments = Arguments()
    for name, layout in scratch.items():
        arguments.pointer(f"{name}_ptr", layout)
    arguments.pointer("out_ptr", attention.out)
    values = result_values(attention, arguments) | {"exp": scores(attention)["exp"], "splits": splits}
    arguments.constant("BLOCK_V", head_block(attention.value_size, target))
    scope.add(arguments.launch("combine_splits", COMBINE, (batch * heads, ONE, ONE), (attention.node.name,), **values))


def split(attention: Attention, scratch: dict[str, Layout]) -> Launch:
    target, arguments = attention.target, Arguments()
    names = {"b": "batch", "h": "head[:, None]", "q": "q_at", "k": attention.key_index}
    values = shared_values(attention, arguments, names, {}, target.decode_keys)
    for name, layout in scratch.items():
        arguments.pointer(f"{name}_ptr", layout)
    ratio = values["ratio"]
    block_h = max(power_of_two(ratio), target.min_dot_size)
    constants(attention, arguments, BLOCK_H=block_h, BLOCK_N=target.decode_keys)
    return arguments.launch(
        "decode_attention",
        SPLIT,
        (sizes(attention.operands["q"])[0] * attention.groups, sympy.Integer(target.splits), ONE),
        (attention.node.name,),
        splits=target.splits,
        tiled=False,
        loop=("first", "last"),
        value_size=attention.value_size,
        masks_v=attention.value_size != head_block(attention.value_size, target),
        **access_masks(attention, f"(member[:, None] < {ratio})"),
        **values,
    )
