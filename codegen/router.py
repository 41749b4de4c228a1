"""The choice of experts: what a router makes of its product with a token, as lines that any kernel may hold.

    logits ──values──▶ ──ranks──▶ the k largest: experts, chosen ──weights──▶ scores

One token: each program of the experts' first product chooses for itself, which costs nothing beside the weights that
it reads, and saves a launch. Many tokens: a kernel chooses, a program a token.
"""

from __future__ import annotations

from textwrap import indent

import sympy
import torch
from torch import fx

from ..compiler.graph import dtype_of, sizes
from . import linear
from .domain import NoKernel
from .expression_text import Lines
from .kernel import TL_TYPES, Launch, Layout, contiguous_strides
from .scope import Scope
from .template import Arguments, power_of_two
from .top_k import MOST_ENTRIES, ORDER

CHOOSE = """
@triton.jit
def {{ name }}({{ header }}):
    token = tl.program_id(0).to(tl.int64)
{{ choice }}

    tl.store(experts_ptr + token * {{ k }} + slot, experts{{ mask }})
    tl.store(scores_ptr + token * {{ k }} + slot, scores{{ mask }})
"""


class Router:
    """The router of one `effc.moe`: its product, and the choice for each token.

    product: the linear that makes the logits. experts and scores: what is chosen, [tokens, k].
    """

    def __init__(self, scope: Scope, node: fx.Node, named: dict[str, object]) -> None:
        weight, self.k = named["router"], named["k"]
        self.node, self.count, self.texts = (
            node,
            int(sizes(weight)[0]),
            [named[n] for n in ("values", "ranks", "weights")],
        )
        self.dtype = dtype_of(weight)
        if self.dtype not in linear.DTYPES:
            raise NoKernel(f"a router of {self.dtype} has no kernel")
        if self.count > MOST_ENTRIES:
            raise NoKernel(f"a choice among {self.count} experts has no kernel; up to {MOST_ENTRIES} have")
        self.product = linear.Case(scope, node, weight, self.dtype)
        self.norm_launches = self.product.read(named["x"])
        self.product.weight = scope.weight(weight)
        self.product.bias = None if named["router_bias"] is None else scope.contiguous(named["router_bias"])
        self.correction = None if named["correction"] is None else scope.contiguous(named["correction"])
        self.tokens = self.product.x.sizes[0]
        self.logits = self.between(scope, "logits", self.count, self.dtype)
        self.product.out = self.logits
        self.lines, self.scores_dtype = self.chosen_from_logits()
        self.experts = self.between(scope, "chosen", self.k, torch.int32)
        self.scores = self.between(scope, "scores", self.k, self.scores_dtype)

    def between(self, scope: Scope, name: str, columns: int, dtype: torch.dtype) -> Layout:
        shape = (self.tokens, sympy.Integer(columns))
        buffer = scope.temporary(f"{self.node.name}_{name}", sympy.prod(shape), dtype)
        return Layout(buffer, sympy.Integer(0), shape, contiguous_strides(shape))

    def add_to(self, arguments: Arguments) -> None:
        """The parameters that `choice` reads."""
        arguments.pointer("logits_ptr", self.logits)
        if self.correction is not None:
            arguments.pointer("correction_ptr", self.correction)

    def choice(self, token: str = "") -> str:
        """Lines from the logits of a token, the first if none is named, to `experts` and `scores` of each `slot`."""
        row = f"{token} * {self.count} + " if token else ""
        lines = [
            f"lane = tl.arange(0, {power_of_two(self.count)})",
            f"logits = tl.load(logits_ptr + {row}lane{self.lane_mask}).to(tl.float32)",
            *self.lines,
        ]
        return indent("\n".join(lines), "    ")

    @property
    def lane_mask(self) -> str:
        return f", mask=lane < {self.count}, other=0.0" if power_of_two(self.count) != self.count else ""

    def chosen_from_logits(self) -> tuple[list[str], torch.dtype]:
        values_text, ranks_text, weights_text = self.texts
        block, slots = power_of_two(self.count), power_of_two(self.k)
        ragged = block != self.count
        head, names = [], {"logits": ("logits", self.dtype)}
        of_all = Lines("lane", self.count)
        if self.correction is not None:
            head.append(f"correction = tl.load(correction_ptr + lane{self.lane_mask}).to(tl.float32)")
            names["correction"] = ("correction", self.correction.buffer.dtype)
        names["values"] = of_all.value(values_text, names)
        values, ranks = names["values"][0], of_all.value(ranks_text, names)[0]
        order = ORDER.replace("VALUE", ranks).strip("\n").replace("\n    ", "\n").strip().split("\n")
        if ragged:
            order.append(f"order = tl.where(lane < {self.count}, order, -0x80000000)")
        of_chosen = Lines("slot", self.k)
        scores, dtype = of_chosen.value(weights_text, {"chosen": ("chosen", names["values"][1])})
        lines = [
            *head,
            *of_all.lines,
            *order,
            f"slot = tl.arange(0, {slots})",
            f"experts = tl.zeros([{slots}], tl.int32)",
            f"chosen = tl.zeros([{slots}], tl.float32)",
            f"for k in range(0, {self.k}):",
            "    largest = tl.max(order, axis=0)",
            f"    place = tl.min(tl.where(order == largest, lane, {block}), axis=0)",
            "    experts = tl.where(slot == k, place, experts)",
            f"    chosen = tl.where(slot == k, tl.sum(tl.where(lane == place, {values}, 0.0), axis=0), chosen)",
            "    order = tl.where(lane == place, -0x80000000, order)",
            *of_chosen.lines,
            f"scores = {scores}.to({TL_TYPES[dtype]})",
        ]
        return lines, dtype

    def store_mask(self, *conditions: str) -> str:
        ragged = (f"(slot < {self.k})",) if power_of_two(self.k) != self.k else ()
        found = (*ragged, *conditions)
        return f", mask={' & '.join(found)}" if found else ""

    def choose(self) -> Launch:
        """The choice of every token."""
        arguments = Arguments()
        self.add_to(arguments)
        arguments.pointer("experts_ptr", self.experts)
        arguments.pointer("scores_ptr", self.scores)
        return arguments.launch(
            "choose_experts",
            CHOOSE,
            (self.tokens, sympy.Integer(1), sympy.Integer(1)),
            (self.node.name,),
            choice=self.choice("token"),
            k=self.k,
            mask=self.store_mask(),
        )
