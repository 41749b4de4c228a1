"""Quantize the weights of linears, and what is multiplied with them.

    linear(x, W)       -->  linear(fake_quantize(x, "int8_g32"), dequantize([codes, scales], "q4_0"))
    embedding(W, ids)  -->  embedding(dequantize([codes, scales], "q8_0"), ids)
    linear(x, V[:, places])  -->  linear(x[..., order], dequantize([codes, scales], "int4_g128"))       (`column_order`)

Runs last, on linears as they were merged. The kernels compute with the codes: `dequantize` is what they stand for, and
`fake_quantize` what the rounded activations stand for, so that the rewritten graph says what is computed. Which format
a weight gets is the scheme's choice: the blocks that the file has it in, or one that the loader rounds it to.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from ..compiler.column_order import as_stored
from ..compiler.errors import InputError
from ..compiler.estimate import Estimate
from ..compiler.formats import find
from ..compiler.graph import Graph, dtype_of, is_output, sizes
from ..compiler.ops import OPS
from ..compiler.quantized_weights import NotStored, formats_in, rounded_parts, stored_parts
from ..compiler.rewrite import Miss, PassResult, add_weight, erase_unused, insert
from ..compiler.schemes import Scheme
from ..compiler.vocabulary import nbytes, numel
from ..compiler.weights import Weight

aten = torch.ops.aten
index_select = aten.index_select.default
dequantize, fake_quantize = OPS["dequantize"].target, OPS["fake_quantize"].target
LINEARS = frozenset({OPS["linear"].target, OPS["gated_linear"].target})

Parts = tuple[str, tuple[Weight, ...], Weight | None]
"""A format, the recipes of a matrix in it, and the order of its columns there if it is another."""


def quantize(graph: Graph, scheme: Scheme) -> PassResult:
    """Quantize what the scheme can; `matches` counts matrices. What stays as it was is a miss with the reason."""
    result = PassResult(inexact="quantization rounds: its ops are held to their references instead")
    for weight in [node for node in graph.placeholders if node.name in graph.weights]:
        readers = list(weight.users)
        if not any(is_matrix_of(reader, weight) for reader in readers):
            continue
        try:
            check_readers(weight)
            name, parts, order = choose(graph, weight, scheme)
        except NotStored as reason:
            if scheme.weights is not None or not is_float(graph, weight):
                result.misses.append(Miss.at(readers[0], "quantize", f"{weight.name}: {reason}", cost_of(weight)))
            continue
        replace_weight(graph, weight, name, parts)
        for reader in readers:
            if order is not None:
                reorder_input(graph, reader, order)
            if reader.target in LINEARS and scheme.activations is not None:
                round_input(graph, reader, scheme.activations)
        result.matches += 1
    return result


def is_float(graph: Graph, weight: fx.Node) -> bool:
    """Whether the file keeps a weight in floating point, where a scheme that keeps what is stored changes nothing."""
    return not formats_in(graph.stored_as(weight))


def is_matrix_of(reader: fx.Node, weight: fx.Node) -> bool:
    """Whether `reader` is a linear by `weight`."""
    return reader.target in LINEARS and reader.args[1] is weight


def check_readers(weight: fx.Node) -> None:
    """Raise where something reads a weight that needs its values one by one."""
    if len(sizes(weight)) != 2:
        raise NotStored(f"it is no matrix but {list(map(str, sizes(weight)))}")
    for reader in weight.users:
        looks_up = reader.target is aten.embedding.default and reader.args[1] is not weight
        if not looks_up and not (is_matrix_of(reader, weight) and reader.args[0] is not weight):
            raise NotStored(f"{reader.name} ({reader.target}) reads it too")


def choose(graph: Graph, weight: fx.Node, scheme: Scheme) -> Parts:
    """The format of a weight and its parts. Raises NotStored where it cannot be in the scheme's format."""
    if scheme.weights is None:
        stored, order = as_stored(graph.stored_as(weight))
        if order is not None and not all(is_matrix_of(reader, weight) for reader in weight.users):
            raise NotStored("its columns are stored in another order, and its rows are looked up")
        return *stored_parts(stored), order
    name = scheme.head if is_head(weight) else scheme.weights
    try:
        find(name).check_columns(int(sizes(weight)[1]))
    except InputError as reason:
        raise NotStored(str(reason)) from None
    return name, rounded_parts(graph.weights[weight.name], name), None


def is_head(weight: fx.Node) -> bool:
    """Whether a weight gives the logits, or is a table of embeddings."""
    return any(reader.target is aten.embedding.default or is_output(reader) for reader in weight.users)


def replace_weight(graph: Graph, weight: fx.Node, name: str, parts: tuple[Weight, ...]) -> None:
    """Put `dequantize` of the parts in the place of a weight."""
    first = first_of(graph, weight.users)
    names = find(name).part_names
    placeholders = [add_weight(graph, f"{weight.name}_{part}", recipe) for part, recipe in zip(names, parts)]
    values = insert(graph, first, dequantize, placeholders, name, dtype_of(weight), origins=(weight,))
    weight.replace_all_uses_with(values)
    erase_unused(graph, weight)


def reorder_input(graph: Graph, linear: fx.Node, recipe: Weight) -> None:
    """Multiply with inputs in the order that columns are stored in; linears of one input share it."""
    x, order = linear.args[0], add_weight(graph, "order", recipe)
    ordered = next((user for user in x.users if user.target is index_select and user.args[2] is order), None)
    if ordered is None:
        ordered = insert(graph, first_of(graph, x.users), index_select, x, len(sizes(x)) - 1, order)
    linear.update_arg(0, ordered)


def round_input(graph: Graph, linear: fx.Node, name: str) -> None:
    """Round what a linear multiplies its weight with; linears of one input share what it is rounded to."""
    x = linear.args[0]
    rounded = next((user for user in x.users if user.target is fake_quantize and user.args[1] == name), None)
    if rounded is None:
        rounded = insert(graph, first_of(graph, x.users), fake_quantize, x, name)
    linear.update_arg(0, rounded)


def first_of(graph: Graph, nodes: Container[fx.Node]) -> fx.Node:
    """The one of `nodes` that runs first."""
    return next(node for node in graph.nodes if node in nodes)


def cost_of(weight: fx.Node) -> Estimate:
    """What it costs to read a weight as it is instead of in 8 bits."""
    return Estimate(int(nbytes(weight) - numel(weight)), launches=0)
