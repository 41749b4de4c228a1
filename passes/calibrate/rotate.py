"""Rotate the residual stream of a model with RMS norms (QuaRot, Ashkboos et al., 2024; SpinQuant's R1).

    embedding(E, ids)                  -->  embedding(E @ R, ids)
    linear(x, W, b, residual=r)        -->  linear(x, R.T @ W, b @ R, residual=r)
    linear(rms_norm(r, g), W)          -->  linear(rms_norm(r, None), (W * g) @ R)

An RMS norm without a scale commutes with a rotation, so the function that the graph computes stays what it was, while
outlier channels are spread over all: groups of weights and activations are rounded with less error. All of it happens
in recipes; a tied head becomes a matrix of its own, since only the embedding loses its norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ...compiler.graph import Graph, is_output, sizes
from ...compiler.ops import OPS
from ...compiler.pattern import arguments
from ...compiler.rewrite import Miss, PassResult, add_weight, erase_unused
from ...compiler.weights import Call, Constant, Multiply, Weight
from .folds import as_dtype
from .hadamard import rotation
from .sites import LINEARS

aten = torch.ops.aten
RMS_NORM, LINEAR = OPS["rms_norm"].target, OPS["linear"].target


class Declined(Exception):
    """Why the stream cannot be rotated. node: where."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class Stream:
    """The nodes that hold the residual stream, and what writes to it and reads from it.

    writers: embeddings and linears. norms: of the stream, read by linears only. readers: linears of those norms, or of
    the stream itself. Raises Declined at anything else.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: dict[fx.Node, None] = {}
        self.writers: list[fx.Node] = []
        self.norms: list[fx.Node] = []
        self.readers: list[fx.Node] = []
        for node in graph.nodes:
            if node.target is aten.embedding.default and node not in self.nodes:
                self.add(node)
        if not self.norms:
            raise Declined(next(graph.nodes), "no RMS norm reads what an embedding makes")

    def add(self, node: fx.Node) -> None:
        """`node` holds the stream: so does what it is the sum of, and what is added to it."""
        pending = [node]
        while pending:
            node = pending.pop()
            if node in self.nodes:
                continue
            self.nodes[node] = None
            pending += self.operands(node)
            for user in node.users:
                if self.reads(node, user):
                    continue
                if is_output(node) or user.target not in (LINEAR, aten.add.Tensor, aten.mul.Tensor):
                    raise Declined(user, f"it reads the residual stream {node.name} without an RMS norm")
                pending.append(user)

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """What a node of the stream is a sum of; a writer is noted."""
        given = arguments(node) if node.op == "call_function" else {}
        if node.target is aten.embedding.default:
            self.writers.append(node)
            return []
        if node.target is LINEAR:
            if given["activation"] != "none":
                raise Declined(node, f"{given['activation']} stands between its weight and the residual stream")
            self.writers.append(node)
            return [] if given["residual"] is None else [given["residual"]]
        if node.target is aten.add.Tensor and given["alpha"] == 1:
            found = [given["self"], given["other"]]
            if all(isinstance(operand, fx.Node) and sizes(operand) == sizes(node) for operand in found):
                return found
        if node.target is aten.mul.Tensor and not isinstance(given["other"], fx.Node):
            return [given["self"]]
        raise Declined(node, "it is part of the residual stream, and neither an embedding, a linear nor a sum")

    def reads(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether `user` reads the stream in a way that undoes a rotation; it is noted."""
        if user.target is RMS_NORM:
            for reader in user.users:
                if reader.target not in LINEARS or list(reader.args).count(user) > 1 or reader.args[0] is not user:
                    raise Declined(reader, f"it reads the norm {user.name} and is no linear")
            self.norms.append(user)
            self.readers += user.users
            return True
        if user.target in LINEARS and user.args[0] is node:
            if list(user.args).count(node) > 1:
                raise Declined(user, "the residual stream is both its input and its residual")
            self.readers.append(user)
            return True
        return False


def rotate(graph: Graph, seed: int = 0) -> PassResult:
    """Rotate the residual stream by a random Hadamard matrix; matches are the weights that were rotated."""
    try:
        stream = Stream(graph)
        check_weights(stream)
    except Declined as declined:
        return PassResult(0, [Miss.at(declined.node, "rotate", str(declined))])
    size = int(sizes(stream.norms[0])[-1])
    matrix = rotation(size, seed)
    changed = 0
    norms: dict[fx.Node, Weight | None] = {}
    for norm in stream.norms:
        scale = arguments(norm)["weight"]
        norms[norm] = None if scale is None else graph.weights[scale.name]
        norm.update_arg(1, None)
        if scale is not None:
            erase_unused(graph, scale)
    for reader in stream.readers:
        recipe = graph.weights[reader.args[1].name]
        scale = norms.get(reader.args[0])
        changed += set_weight(graph, reader, 1, product(recipe, matrix, scale))
    for writer in stream.writers:
        at = 0 if writer.target is aten.embedding.default else 1
        recipe = graph.weights[writer.args[at].name]
        changed += set_weight(graph, writer, at, product(recipe, matrix) if at == 0 else rows_product(recipe, matrix))
        if at == 1 and (bias := arguments(writer)["bias"]) is not None:
            changed += set_weight(graph, writer, 2, product(graph.weights[bias.name], matrix))
    return PassResult(changed)


def check_weights(stream: Stream) -> None:
    """Raises Declined where what is to be rotated is computed at run time."""
    weights = stream.graph.weights
    for node in (*stream.writers, *stream.readers, *stream.norms):
        given = arguments(node)
        for name in ("weight", "bias"):
            if given.get(name) is not None and given[name].name not in weights:
                raise Declined(node, f"{given[name].name} is no weight but computed at run time")


def set_weight(graph: Graph, node: fx.Node, index: int, recipe: Weight) -> int:
    """Give `node` the weight `recipe` as its argument `index`, under the name of the weight before if it is its own."""
    old = node.args[index]
    if len(old.users) == 1:
        graph.weights[old.name] = recipe
    else:
        node.update_arg(index, add_weight(graph, f"{old.name}_rotated", recipe))
    return 1


def product(recipe: Weight, matrix: Tensor, scale: Weight | None = None) -> Weight:
    """(recipe * scale) @ matrix in fp32 or wider, in the dtype of the recipe."""
    wide = torch.promote_types(recipe.dtype, torch.float32)
    source = as_dtype(recipe, wide)
    if scale is not None:
        source = Multiply(source, as_dtype(scale, wide))
    op = "aten.mm.default" if len(recipe.shape) == 2 else "aten.matmul.default"
    return as_dtype(Call(op, (source, Constant.of(matrix.to(wide))), recipe.shape, wide), recipe.dtype)


def rows_product(recipe: Weight, matrix: Tensor) -> Weight:
    """matrix.T @ recipe in fp32 or wider, in the dtype of the recipe."""
    wide = torch.promote_types(recipe.dtype, torch.float32)
    turned = Constant.of(matrix.t().to(wide))
    return as_dtype(Call("aten.mm.default", (turned, as_dtype(recipe, wide)), recipe.shape, wide), recipe.dtype)
