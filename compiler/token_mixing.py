"""Where a model that has no graph of symbolic length mixes tokens: found by changing one of them.

The model is exported once more for one length; the graph runs twice, on texts that differ in one token. The first call
whose result differs at another token than that one is what carries something along the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

LENGTHS = (11, 13, 17, 19, 23, 29, 31, 37)
"""Lengths to try; one that is no size of a parameter tells the tokens' dimension from others."""

CHANGED = 3
"""The token that differs."""


def first_mixing(module: nn.Module, inputs: dict[str, Tensor]) -> fx.Node | None:
    """The call of `module(*inputs)` that mixes tokens first; None where it cannot be told.

    inputs: [B, S] tensors of a call, of which only the names, in order, and dtypes count. Parameters need values.
    """
    used = {size for parameter in module.parameters() for size in parameter.shape}
    length = next((length for length in LENGTHS if length not in used), None)
    if length is None or any(parameter.is_meta for parameter in module.parameters()):
        return None
    texts = [text_of(inputs, length, token) for token in (0, 1)]
    traced = torch.export.export(module, texts[0], strict=False).module()
    values = []
    for text in texts:
        recorder = Recorder(traced)
        recorder.run(*text)
        values.append(recorder.values)
    for node in traced.graph.nodes:
        if node.op == "call_function" and mixes(*(found[node] for found in values), length):
            return origin(node, values[0], length)
    return None


def text_of(inputs: dict[str, Tensor], length: int, token: int) -> tuple[Tensor, ...]:
    """One row of tokens 0, without padding, in which one token is `token`."""
    made = {
        "input_ids": torch.zeros(1, length, dtype=torch.int64),
        "attention_mask": torch.ones(1, length, dtype=torch.int64),
        "position_ids": torch.arange(length)[None],
    }
    made["input_ids"][0, CHANGED] = token
    return tuple(made[name] for name in inputs)


class Recorder(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        self.values[node] = super().run_node(node)
        return self.values[node]


def mixes(left: Any, right: Any, length: int) -> bool:
    """Whether two values with one dimension of tokens differ at a token besides the one that was changed."""
    if not isinstance(left, Tensor) or list(left.shape).count(length) != 1:
        return False
    dim = list(left.shape).index(length)
    differs = (left != right).transpose(0, dim).reshape(length, -1).any(dim=1)
    differs[CHANGED] = False
    return bool(differs.any())


def origin(node: fx.Node, values: dict[fx.Node, Any], length: int) -> fx.Node:
    """The call that made what `node` only cuts out: the first one back that was given the tokens one by one."""
    while True:
        sources = [source for source in node.all_input_nodes if isinstance(values.get(source), Tensor)]
        if len(sources) != 1 or length in values[sources[0]].shape or sources[0].op != "call_function":
            return node
        node = sources[0]
