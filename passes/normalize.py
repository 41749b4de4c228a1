"""One spelling for each idea, so that the passes that follow need one pattern each.

    view, _unsafe_view, flatten, unflatten             -->  reshape(x, sizes), sizes explicit where known
    transpose, t, mT                                   -->  permute(x, dims); two in a row are one
    to, type_as, _to_copy                              -->  _to_copy(x, dtype=...); none where nothing changes
    getitem(split | chunk | unbind)                    -->  slice or select
    clone, contiguous, alias, detach, dropout in eval  -->  x
    squeeze(unsqueeze(x, 1), 1)                        -->  x
    add(x, 0), mul(x, 1), x[:], expand to its own size -->  x
    x[..., [4, 5], :], index known                     -->  x[..., 4:6, :]
    cat([empty, x])                                    -->  x
    add.Scalar(x, 2), div(x, full([], 2))              -->  add.Tensor(x, 2), div.Tensor(x, 2)
    x * x, square(x), pow(x, 2.0)                      -->  pow(x, 2)
    outer(x, y)                                        -->  unsqueeze(x, 1) * y
    index_select(table, 0, ids)                        -->  embedding(table, ids)
    einsum(a product of matrices)                      -->  matmul, permute (`einsum`)
    __and__, logical_and of bools                      -->  bitwise_and
    sym_size of anything                               -->  sym_size of the first input with that size, or an int

Dimensions count from the front, trailing arguments that equal their default are left out, equal calls are merged,
and dead code and assertions go.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..compiler.graph import Graph, is_tensor, size_expr
from ..compiler.pattern import any_, arguments, call_of, const, op, tensor
from ..compiler.rewrite import Match, PassResult, Rule, rewrite
from ..compiler.weights import Constant
from .arguments import tidy_arguments, use_input_sizes
from .cleanup import erase_dead_code, merge_equal_calls, merge_equal_weights
from .einsum import RULE as EINSUM

aten = torch.ops.aten

X = tensor("x")

RESHAPE = op(aten.reshape.default, aten.view.default, aten._unsafe_view.default, X, any_("sizes"))
FLATTEN = op(aten.flatten.using_ints, X, any_("start"), any_("end")) | op(
    aten.unflatten.int, X, any_("dim"), any_("sizes")
)
TRANSPOSE = op(aten.transpose.int, X, any_("dim0"), any_("dim1")) | op(
    aten.t.default, aten.numpy_T.default, aten.mT.default, X
)
PERMUTE = op(aten.permute.default, X, any_("dims"))
CONVERSIONS = frozenset(
    {
        aten._to_copy.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
    }
)
COPIES = frozenset(
    {
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.lift_fresh.default,
        aten.resolve_conj.default,
        aten.resolve_neg.default,
    }
)
DROPOUT = op(aten.dropout.default, aten.feature_dropout.default, X, any_("p"), False)
EXPAND = op(aten.expand.default, X, any_("sizes"))
SQUEEZE = op(aten.squeeze.dim, op(aten.unsqueeze.default, X, const("dim")), const("dim"))
SLICE = op(aten.slice.Tensor, X, any_("dim"), any_("start"), any_("end"), any_("step"))
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int)
ITEM = op(operator.getitem, call_of(SPLITS).named("parts"), const("index"))
INDEX = op(aten.index.Tensor, X, any_("indices"))
CAT = op(aten.cat.default, any_("parts"), any_("dim"))
ADD_ZERO = op(aten.add.Tensor, aten.sub.Tensor, X, 0)
TIMES_ONE = op(aten.mul.Tensor, aten.div.Tensor, X, 1) | op(aten.pow.Tensor_Scalar, X, 1)
OUTER = op(aten.outer.default, X, tensor("y"))
SQUARE = op(aten.mul.Tensor, X, X) | op(aten.square.default, X)
POWER = op(aten.pow.Tensor_Scalar, X, const("exponent"))
LOGICAL = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.logical_and.default: aten.bitwise_and.Tensor,
    aten.logical_or.default: aten.bitwise_or.Tensor,
    aten.logical_not.default: aten.bitwise_not.default,
}
SCALAR_OVERLOADS = {
    getattr(aten, name).Scalar: getattr(aten, name).Tensor
    for name in ("add", "sub", "mul", "div")  # the others take no number in the place of a tensor
}
BINARY = frozenset(SCALAR_OVERLOADS.values())
ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)


def to_reshape(match: Match) -> fx.Node | None:
    x, value = match["x"], match.root.meta["val"]
    if same_sizes(x, match.root):
        return x
    if x.target == aten.reshape.default:
        x = x.args[0]
    sizes = [
        given if isinstance(given, fx.Node) or not isinstance(size, int) else size
        for given, size in zip(match["sizes"], value.shape)
    ]
    if same_sizes(x, match.root):
        return x
    if match.root.target == aten.reshape.default and match.root.args == (x, sizes):
        return None
    return match.call(aten.reshape.default, x, sizes)


def to_explicit_reshape(match: Match) -> fx.Node | None:
    """A reshape whose sizes the op does not spell out: at most one symbolic size can be left to be inferred."""
    sizes = [size if isinstance(size, int) else -1 for size in match.root.meta["val"].shape]
    if sizes.count(-1) > 1:
        known = {size_expr(size): dim for dim, size in enumerate(match["x"].meta["val"].shape)}
        for dim, size in enumerate(match.root.meta["val"].shape):
            if sizes[dim] == -1 and size_expr(size) in known:
                sizes[dim] = match.call(aten.sym_size.int, match["x"], known[size_expr(size)])
    if sizes.count(-1) > 1:
        return match.decline("more than one size is not a size of its input")
    return match.call(aten.reshape.default, match["x"], sizes)


def to_permute(match: Match) -> fx.Node | None:
    x = match["x"]
    rank = x.meta["val"].ndim
    dims = list(range(rank))
    if match.root.target == aten.numpy_T.default:
        dims.reverse()
    else:
        first, second = match.get("dim0", -2), match.get("dim1", -1)
        if rank > 1:
            dims[first], dims[second] = dims[second], dims[first]
    return permuted(match, x, dims)


def to_one_permute(match: Match) -> fx.Node | None:
    x = match["x"]
    dims = [dim % x.meta["val"].ndim for dim in match["dims"]]
    if x.target == aten.permute.default or dims == sorted(dims):
        return permuted(match, x, dims)
    return None


def permuted(match: Match, x: fx.Node, dims: list[int]) -> fx.Node:
    if x.target == aten.permute.default:
        inner = [dim % len(dims) for dim in x.args[1]]
        x, dims = x.args[0], [inner[dim] for dim in dims]
    return x if dims == sorted(dims) else match.call(aten.permute.default, x, dims)


def to_cast(match: Match) -> fx.Node | None:
    x = match.root.args[0]
    before, after = x.meta["val"], match.root.meta["val"]
    if before.device != after.device or before.layout != after.layout:
        return None
    if before.dtype == after.dtype:
        return x
    if is_cast(x) and holds(x.args[0].meta["val"].dtype, before.dtype) and x.args[0].meta["val"].dtype == after.dtype:
        return x.args[0]
    if is_cast(match.root):
        return None
    return match.call(aten._to_copy.default, x, dtype=after.dtype)


def is_cast(node: fx.Node) -> bool:
    return node.target == aten._to_copy.default and set(node.kwargs) == {"dtype"}


def holds(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of the floating-point type `narrow` is one of `wide`."""
    return (
        narrow.is_floating_point
        and wide.is_floating_point
        and torch.finfo(narrow).eps >= torch.finfo(wide).eps
        and torch.finfo(narrow).tiny >= torch.finfo(wide).tiny
    )


def to_its_input(match: Match) -> fx.Node:
    return match.root.args[0]


def to_input_if_same(match: Match) -> fx.Node | None:
    """x op neutral element --> x, where neither the dtype nor the sizes change."""
    unchanged = match["x"].meta["val"].dtype == match.root.meta["val"].dtype and same_sizes(match["x"], match.root)
    return match["x"] if unchanged else None


def to_slice(match: Match) -> fx.Node | None:
    x, dim, start, end, step = (match[name] for name in ("x", "dim", "start", "end", "step"))
    if step == 1 and same_sizes(x, match.root):
        return x
    size = x.meta["val"].shape[dim]
    start = 0 if start is None else start
    if isinstance(size, int) and isinstance(start, int) and (end is None or isinstance(end, int)):
        start, end, step = slice(start, end, step).indices(size)
    args = (x, dim, start, end, step) if step != 1 else (x, dim, start, end)
    return None if match.root.args == args else match.call(aten.slice.Tensor, *args)


def to_part(match: Match) -> fx.Node | None:
    """getitem(split(x, ...), i) --> slice(x, dim, start, end);  getitem(unbind(x), i) --> select(x, dim, i)"""
    parts, index = match["parts"], match["index"]
    x = parts.args[0]
    dim = arguments(parts)["dim"] % x.meta["val"].ndim
    if parts.target == aten.unbind.int:
        return match.call(aten.select.int, x, dim, index)
    ends = [0]
    for part in parts.meta["val"]:
        ends.append(ends[-1] + part.shape[dim])
    index %= len(ends) - 1
    if not all(isinstance(end, int) for end in ends):
        return match.decline("the sizes of the parts are not known while compiling")
    if len(ends) == 2:
        return x
    return match.call(aten.slice.Tensor, x, dim, ends[index], ends[index + 1])


def to_slice_from_index(match: Match) -> fx.Node | None:
    """An index along one axis by consecutive numbers that are known while compiling."""
    indexed = [(dim, index) for dim, index in enumerate(match["indices"]) if index is not None]
    if len(indexed) != 1:
        return None
    (dim, index), x = indexed[0], match["x"]
    recipe, size = match.graph.weights.get(index.name), x.meta["val"].shape[dim]
    if not isinstance(recipe, Constant) or recipe.tensor.dtype == torch.bool or recipe.tensor.ndim != 1:
        return None
    entries = recipe.tensor.tolist()
    if not isinstance(size, int) or not entries:
        return None
    entries = [entry % size if -size <= entry < size else entry for entry in entries]
    start = entries[0]
    if entries != list(range(start, start + len(entries))) or start < 0 or start + len(entries) > size:
        return match.decline(f"the entries {recipe.tensor.tolist()} do not follow each other")
    return match.call(aten.slice.Tensor, x, dim, start, start + len(entries))


def to_shorter_cat(match: Match) -> fx.Node | None:
    """cat([empty, x, y]) --> cat([x, y]);  cat([x]) --> x"""
    parts, dim = match["parts"], match["dim"]
    rank = match.root.meta["val"].ndim
    full = [part for part in parts if part.meta["val"].ndim == rank and not is_zero(part.meta["val"].shape[dim])]
    if len(full) == 1 and full[0].meta["val"].dtype == match.root.meta["val"].dtype:
        return full[0]
    same_dtype = {part.meta["val"].dtype for part in full} == {part.meta["val"].dtype for part in parts}
    return match.call(aten.cat.default, full, dim) if full and len(full) < len(parts) and same_dtype else None


def is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def to_product(match: Match) -> fx.Node:
    column = match.call(aten.unsqueeze.default, match["x"], 1)
    return match.call(aten.mul.Tensor, column, match["y"])


def to_embedding(match: Match) -> fx.Node | None:
    """Rows of a matrix."""
    table, dim, ids = match.root.args
    if table.meta["val"].ndim != 2 or dim % 2 != 0 or ids.meta["val"].ndim != 1:
        return None
    return match.call(aten.embedding.default, table, ids)


def to_square(match: Match) -> fx.Node:
    return match.call(aten.pow.Tensor_Scalar, match["x"], 2)


def to_known_power(match: Match) -> fx.Node | None:
    """Powers that PyTorch computes as another function, or with an integer exponent in floating point."""
    exponent = match["exponent"]
    if exponent in (0.5, -0.5) and match.value("x").is_floating_point():
        return match.call(aten.sqrt.default if exponent > 0 else aten.rsqrt.default, match["x"])
    if isinstance(exponent, float) and exponent.is_integer() and match.value("x").is_floating_point():
        return match.call(aten.pow.Tensor_Scalar, match["x"], int(exponent))
    return None


def to_bitwise(match: Match) -> fx.Node | None:
    values = [node.meta["val"] for node in match.root.args if is_tensor(node)]
    if len(values) < len(match.root.args) or any(value.dtype != torch.bool for value in values):
        return None
    return match.call(LOGICAL[match.root.target], *match.root.args)


def to_tensor_overload(match: Match) -> fx.Node | None:
    if len(match.root.args) != 2 or match.root.kwargs:
        return None
    return match.call(SCALAR_OVERLOADS[match.root.target], *match.root.args)


def to_number(match: Match) -> fx.Node | None:
    """A binary op with a tensor of no dimensions whose value is known --> the same with a number."""
    args = list(match.root.args)
    for position in (1, 0):
        number = known_number(match.graph, args[position])
        if number is not None and position == 0 and match.root.target in COMMUTATIVE:
            args = [args[1], number]
        elif number is not None and position == 1:
            args[1] = number
        else:
            continue
        if not is_tensor(args[0]):
            return None
        replacement = match.call(match.root.target, *args, **match.root.kwargs)
        same = replacement.meta["val"].dtype == match.root.meta["val"].dtype
        return replacement if same and same_sizes(replacement, match.root) else None
    return None


COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})


def known_number(graph: Graph, value: Any) -> float | None:
    if not is_tensor(value) or value.meta["val"].ndim or value.meta["val"].dtype == torch.bool:
        return None
    recipe = graph.weights.get(value.name)
    if isinstance(recipe, Constant):
        return recipe.tensor.item()
    if value.target in (aten.full.default, aten.scalar_tensor.default):
        number = value.args[-1]
        if isinstance(number, (int, float)):
            return torch.tensor(number, dtype=value.meta["val"].dtype).item()
    return None


RULES = (
    EINSUM,
    Rule("reshape", RESHAPE, to_reshape),
    Rule("flatten", FLATTEN, to_explicit_reshape),
    Rule("transpose", TRANSPOSE, to_permute),
    Rule("permute", PERMUTE, to_one_permute),
    Rule("cast", call_of(CONVERSIONS), to_cast),
    Rule("copy", call_of(COPIES), to_its_input),
    Rule("dropout", DROPOUT, to_its_input),
    Rule("expand", EXPAND, to_input_if_same),
    Rule("squeeze", SQUEEZE, to_input_if_same),
    Rule("slice", SLICE, to_slice),
    Rule("part", ITEM, to_part),
    Rule("index", INDEX, to_slice_from_index),
    Rule("cat", CAT, to_shorter_cat),
    Rule("add_zero", ADD_ZERO, to_input_if_same),
    Rule("times_one", TIMES_ONE, to_input_if_same),
    Rule("outer", OUTER, to_product),
    Rule("rows", op(aten.index_select.default, X, any_("dim"), tensor("ids")), to_embedding),
    Rule("square", SQUARE, to_square),
    Rule("power", POWER, to_known_power),
    Rule("logical", call_of(LOGICAL), to_bitwise),
    Rule("scalar", call_of(SCALAR_OVERLOADS), to_tensor_overload),
    Rule("number", call_of(BINARY), to_number),
)


def normalize(graph: Graph) -> PassResult:
    """Bring every call into the form that the module's docstring lists."""
    changes = erase_assertions(graph) + use_input_sizes(graph) + tidy_arguments(graph)
    result = rewrite(graph, RULES)
    changes += use_input_sizes(graph) + merge_equal_weights(graph) + merge_equal_calls(graph) + erase_dead_code(graph)
    result.matches += changes
    return result


def same_sizes(left: fx.Node, right: fx.Node) -> bool:
    before, after = left.meta["val"].shape, right.meta["val"].shape
    return len(before) == len(after) and all(size_expr(a) == size_expr(b) for a, b in zip(before, after))


def erase_assertions(graph: Graph) -> int:
    found = [node for node in graph.nodes if node.op == "call_function" and node.target in ASSERTIONS]
    for node in found:
        graph.fx.erase_node(node)
    return len(found)
