"""Count tokens from those that are cached: what a graph counts from 0, a cached run counts from `past`.

    arange(S)                 [S]     -->  past[:, None] + arange(S)                           [B, S]
    slice(table, 0, 0, S)[p]  [B, S]  -->  table[p]
    slice(table, 0, 0, S)     [S, E]  -->  embedding(table, past[:, None] + arange(S))         [B, S, E]
    attention_mask            [B, S]  -->  past[:, None] + arange(S) >= padding[:, None]       [B, S]
    cumsum(attention_mask, 1) [B, S]  -->  max(past[:, None] + arange(S) + 1 - padding[:, None], 0)

Rows may hold different numbers of tokens, so a count gets a dimension for the rows. It stands first, whatever the
rank of the node, until the node meets a tensor of the batch: there it takes the place of that tensor's batch.

    add(x [B, S, E], embedding(w, arange [S]) [S, E])  -->  add(x, embedding(w, slots [B, S]) [B, S, E])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch
from torch import fx

from ..compiler.graph import Graph, dtype_of, is_output, is_tensor, size_expr, sizes
from ..compiler.index_algebra import Inference, NotInferred
from ..compiler.index_values import number
from ..compiler.pattern import arguments
from ..compiler.rewrite import erase_unused, insert, insert_named, replace

aten = torch.ops.aten
effc = torch.ops.effc

TOKENS, PADDING = "input_ids", "attention_mask"

ARANGES = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})

ALONG = {
    aten.unsqueeze.default: "dim",
    aten.squeeze.dim: "dim",
    aten.slice.Tensor: "dim",
    aten.select.int: "dim",
    aten.repeat_interleave.self_int: "dim",
    aten.cat.default: "dim",
    aten.stack.default: "dim",
}
"""Op -> its argument that names a dimension, which moves by one where the rows stand first."""

TRAILING = {aten.embedding.default: 1, aten.linear.default: 0, effc.linear.default: 0}
"""Op that does the same whatever dimensions stand in front -> its argument that may have them."""

BROADCASTS = frozenset({aten._to_copy.default, aten.clone.default, aten.matmul.default})
"""Ops that broadcast their arguments, beside the pointwise ones."""


class NotOffset(Exception):
    """Why the count in `node` cannot be continued from the tokens that are cached."""

    node: fx.Node


def counts_tokens(node: fx.Node, length: sympy.Symbol) -> bool:
    """Whether a node is `arange(start, start + S)`."""
    named = arguments(node)
    if size_expr(named.get("step", 1)) != 1 or dtype_of(node).is_floating_point:
        return False
    return size_expr(named.get("end")) - size_expr(named.get("start", 0)) == length


def slices_table(node: fx.Node, length: sympy.Symbol) -> bool:
    """Whether a node is `slice(table, dim, start, start + S)`: a row of a table for each token."""
    named = arguments(node)
    table, axis = node.args[0], named["dim"] % len(sizes(node))
    start = size_expr(named["start"] or 0)
    whole = all(size.is_Integer for size in sizes(table))
    return whole and sizes(node)[axis] == length and start.is_Integer and start >= 0 and named["step"] == 1


def looks_up_in_slice(node: fx.Node, length: sympy.Symbol) -> fx.Node | None:
    """The table of `slice(table, 0, 0, S)[positions]`: the positions of tokens, which are below S, are places in it."""
    if node.target not in (aten.index.Tensor, aten.embedding.default):
        return None
    source = node.args[0]
    if source.op != "call_function" or source.target != aten.slice.Tensor or not slices_table(source, length):
        return None
    named = arguments(source)
    return source.args[0] if named["dim"] == 0 and not named["start"] else None


def running_count(graph: Graph, node: fx.Node, length: sympy.Symbol) -> fx.Node | int | None:
    """What `cumsum(x, dim)` adds up along the tokens: the attention mask, or c where x is c everywhere; else None."""
    named = arguments(node)
    axis = named["dim"] % len(sizes(node))
    inference = Inference(graph)
    try:
        function = inference.infer(node.args[0])
    except NotInferred:
        return None
    indices = tuple(inference.index(f"i{dim}", size) for dim, size in enumerate(function.shape))
    element = function.at(*indices)
    if getattr(element, "is_Integer", False):
        return int(element)
    leaves = list(inference.leaves.values())
    if [leaf.name for leaf in leaves] != [PADDING] or (len(indices), axis) != (2, 1) or sizes(leaves[0])[1] != length:
        return None
    mask = inference.infer(leaves[0]).at(*indices)
    hidden, visible = (number(element.subs(mask, value)) for value in (0, 1))
    return leaves[0] if (hidden, visible) == (0, 1) else None


class TokenCounts:
    """Rewrites the counts of one graph.

    past: the input [B] that says how many tokens each row has in the cache. padding() gives the input [B] that says
    how many of them are padding; it is asked for only where a graph counts what is visible.
    """

    def __init__(self, graph: Graph, length: sympy.Symbol, past: fx.Node, padding: Callable[[], fx.Node]) -> None:
        self.graph, self.length, self.past, self.padding = graph, length, past, padding
        self.rows = sizes(past)[0]
        self.lifted: dict[fx.Node, fx.Node] = {}  # a node that counts --> the same with a dimension of rows in front

    def rewrite(self) -> None:
        """Rewrite all counts. Raises NotOffset."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and not node._erased:
                try:
                    self.visit(node)
                except NotOffset as refusal:
                    refusal.node = node
                    raise
        if PADDING in self.graph.inputs:
            self.replace_mask(self.graph.placeholder(PADDING))
        erase_unused(self.graph, *reversed(list(self.lifted)))

    def replace_mask(self, mask: fx.Node) -> None:
        """What is visible among the new tokens [B, S]: attention_mask  -->  slots >= padding[:, None]"""
        if mask.users:
            first = next(node for node in self.graph.nodes if node in mask.users)
            padding = insert(self.graph, first, aten.unsqueeze.default, self.padding(), 1)
            visible = insert(self.graph, first, aten.ge.Tensor, self.slots(first), padding)
            visible = insert(self.graph, first, aten._to_copy.default, visible, dtype=dtype_of(mask))
            mask.replace_all_uses_with(visible)
        self.graph.fx.erase_node(mask)

    def visit(self, node: fx.Node) -> None:
        if (table := looks_up_in_slice(node, self.length)) is not None:
            node.args = (table, *node.args[1:])
        elif node.target in ARANGES and counts_tokens(node, self.length):
            self.lifted[node] = self.slots(node, arguments(node).get("start", 0), dtype_of(node))
        elif node.target == aten.slice.Tensor and not self.counted(node) and slices_table(node, self.length):
            self.lifted[node] = self.rows_of_table(node)
        elif node.target == aten.cumsum.default and self.sums_tokens(node):
            replace(self.graph, node, self.running_sum(node))
        elif self.counted(node):
            self.follow(node)

    def sums_tokens(self, node: fx.Node) -> bool:
        return sizes(node)[arguments(node)["dim"] % len(sizes(node))] == self.length

    def counted(self, node: fx.Node) -> list[fx.Node]:
        return [source for source in node.all_input_nodes if source in self.lifted]

    # --- where counts begin ------------------------------------------------------------------------------------------

    def slots(self, before: fx.Node, start: int = 0, dtype: torch.dtype = torch.int64) -> fx.Node:
        """The slot of each new token [B, S], from `start` on."""
        count = insert(self.graph, before, aten.sym_size.int, self.graph.placeholder(TOKENS), 1)
        device = self.past.meta["val"].device
        steps = insert(self.graph, before, aten.arange.default, count, dtype=torch.int64, device=device)
        first = insert(self.graph, before, aten.unsqueeze.default, self.past, 1)
        result = insert(self.graph, before, aten.add.Tensor, first, steps, origins=[before])
        if start != 0:
            result = insert(self.graph, before, aten.add.Tensor, result, start, origins=[before])
        return self.cast(result, before, dtype)

    def cast(self, count: fx.Node, before: fx.Node, dtype: torch.dtype) -> fx.Node:
        return count if dtype == torch.int64 else insert(self.graph, before, aten._to_copy.default, count, dtype=dtype)

    def rows_of_table(self, node: fx.Node) -> fx.Node:
        """slice(table [..., L, ...], dim, start, start + S)  -->  [B, ..., S, ...], by looking up slots + start."""
        graph, named, shape = self.graph, arguments(node), sizes(node)
        table, axis, rank = node.args[0], named["dim"] % len(shape), len(shape)
        others = [dim for dim in range(rank) if dim != axis]
        if axis != 0:
            table = insert(graph, node, aten.permute.default, table, [axis, *others], origins=[node])
        if rank != 2:
            flat = [int(sizes(table)[0]), int(sympy.prod(shape[dim] for dim in others))]
            table = insert(graph, node, aten.reshape.default, table, flat, origins=[node])
        start = named["start"] or 0
        graph.limit_length(int(sizes(node.args[0])[axis]) - start, f"the table {node.args[0].name} ends there")
        slots = self.slots(node, start)
        found = insert(graph, node, aten.embedding.default, table, slots, origins=[node])
        if rank != 2:
            rows, count = (insert(graph, node, aten.sym_size.int, slots, dim) for dim in (0, 1))
            wanted = [rows, count, *(int(shape[dim]) for dim in others)]
            found = insert(graph, node, aten.reshape.default, found, wanted, origins=[node])
        if axis == 0:
            return found
        back = [0, *range(2, axis + 2), 1, *range(axis + 2, rank + 1)]
        return insert(graph, node, aten.permute.default, found, back, origins=[node])

    def running_sum(self, node: fx.Node) -> fx.Node:
        """cumsum along the tokens, of the mask or of a constant [B, S]."""
        graph = self.graph
        counted = running_count(graph, node, self.length)
        if counted is None or sizes(node) != (self.rows, self.length):
            raise NotOffset("it adds up along the tokens something else than the attention mask")
        total = self.slots(node, 1)
        if isinstance(counted, int):
            total = insert(graph, node, aten.mul.Tensor, total, counted, origins=[node])
        else:
            padding = insert(graph, node, aten.unsqueeze.default, self.padding(), 1)
            total = insert(graph, node, aten.sub.Tensor, total, padding, origins=[node])
            total = insert(graph, node, aten.clamp_min.default, total, 0, origins=[node])
        return self.cast(total, node, dtype_of(node))

    # --- what is computed from them ----------------------------------------------------------------------------------

    def follow(self, node: fx.Node) -> None:
        """Rewrite a node that uses a count: with the rows in front, or with the batch where another tensor has one."""
        others = [x for x in node.all_input_nodes if is_tensor(x) and x not in self.lifted]
        if is_output(node):
            raise NotOffset("the output is computed from a count of the tokens alone")
        if node.target == aten.expand.default and sizes(node)[0] == self.rows:
            self.expand(node)
        elif node.target == effc.rope.default or any(size.has(self.rows) for x in others for size in sizes(x)):
            self.merge(node)
        else:
            self.lifted[node] = self.lift(node, others)

    def lift(self, node: fx.Node, others: Sequence[fx.Node]) -> fx.Node:
        """The same call with the rows in front. others: its arguments that count nothing, which have no batch."""
        named = arguments(node)
        if node.target in (aten.cat.default, aten.stack.default) and others:
            raise NotOffset("it joins a count of the tokens with other tensors")
        if node.target in ALONG:
            name = ALONG[node.target]
            rank = len(sizes(self.counted(node)[0])) + (node.target in (aten.unsqueeze.default, aten.stack.default))
            if named[name] is None:
                raise NotOffset("it flattens a count of the tokens")
            named[name] = named[name] % rank + 1
        elif node.target == aten.permute.default:
            named["dims"] = [0, *(dim + 1 for dim in named["dims"])]
        elif node.target in (aten.reshape.default, aten.expand.default):
            name = "shape" if node.target == aten.reshape.default else "size"
            if node.target == aten.expand.default and len(named[name]) != len(sizes(node.args[0])):
                raise NotOffset("it expands a count of the tokens to a higher rank")
            named[name] = [insert(self.graph, node, aten.sym_size.int, self.past, 0), *named[name]]
        elif node.target in TRAILING:
            place = TRAILING[node.target]
            if any(x in self.lifted for x in node.all_input_nodes if x is not node.args[place]):
                raise NotOffset("its weights depend on a count of the tokens")
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in BROADCASTS:
            return self.broadcast(node, others)
        else:
            raise NotOffset("it is computed from a count of the tokens in a way that is not known to go on")
        return insert_named(self.graph, node, node.target, fx.node.map_arg(named, lambda x: self.lifted.get(x, x)))

    def broadcast(self, node: fx.Node, others: Sequence[fx.Node]) -> fx.Node:
        """Right-aligned operands stay so: counts get ones behind the rows up to the rank of the result."""
        rank = len(sizes(node))

        def operand(x: fx.Node) -> fx.Node:
            return self.with_rank(x, rank, node) if x in self.lifted else x

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        return insert(self.graph, node, node.target, *args, origins=[node], **kwargs)

    def with_rank(self, x: fx.Node, rank: int, before: fx.Node) -> fx.Node:
        found = self.lifted[x]
        for _ in range(rank - len(sizes(x))):
            found = insert(self.graph, before, aten.unsqueeze.default, found, 1)
        return found

    def expand(self, node: fx.Node) -> None:
        """expand(count [1, S], [B, S]) is the count [B, S] that has its rows in front already."""
        (found,) = self.counted(node)
        if sizes(found)[0] != 1 or len(sizes(found)) != len(sizes(node)) or sizes(found)[1:] != sizes(node)[1:]:
            raise NotOffset("it expands a count of the tokens in more than its batch")
        replace(self.graph, node, insert(self.graph, node, aten.squeeze.dim, self.lifted[found], 1, origins=[node]))

    def merge(self, node: fx.Node) -> None:
        """Let counts meet the batch: [B, 1, S, E] is [B, S, E] where the node has its batch first."""
        shape = sizes(node)
        tables = node.target == effc.rope.default
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if not (tables and node.args[0] not in self.lifted) and not (pointwise and shape[0] == self.rows):
            raise NotOffset("a count of the tokens meets the batch in an op that is not known to broadcast it")

        def operand(x: fx.Node) -> fx.Node:
            if x not in self.lifted:
                return x
            found = self.with_rank(x, len(sizes(x)) if tables else len(shape), node)
            if sizes(found)[1] != 1:
                raise NotOffset("a count of the tokens meets the batch in another dimension")
            return insert(self.graph, node, aten.squeeze.dim, found, 1)

        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
