"""What a model is made of and what became of it, in one row: `effc explain`, and the table of families.

attention: 2 causal | norms 5 | ropes 4 | linears 15 -> 7 | a block: 43 calls in eager, 11 launches in prefill,
9 in decode | KV cache: 256 bytes per token | through ATen: none
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .codegen.kernel import Fallback
from .codegen.views import is_view
from .compiler import ops  # noqa: F401  (registers the vocabulary)
from .compiler.errors import ModelError
from .compiler.fold import recipe_of
from .compiler.graph import Graph, is_tensor
from .compiler.pattern import arguments

if TYPE_CHECKING:
    from .codegen.schedule import Scheduled
    from .program import Program

aten, effc = torch.ops.aten, torch.ops.effc

ATTENTIONS = frozenset({effc.attention.default, effc.cached_attention.default})
NORMS = frozenset({effc.rms_norm.default, aten.layer_norm.default})
EXPERTS = frozenset({effc.experts.default, effc.moe.default})
LINEARS = frozenset({effc.linear.default, effc.gated_linear.default})
PRODUCTS = {
    aten.linear.default: 1,
    aten.addmm.default: 2,
    aten.matmul.default: 1,
    aten.mm.default: 1,
}
"""Products that are a linear where this argument is made of weights."""

FORMS = frozenset(
    {
        aten.linear.default,
        aten.addmm.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.scaled_dot_product_attention.default,
        aten.rsqrt.default,
    }
)
"""What the passes fuse: where such a call is left, a pass found no match for it."""


@dataclass(frozen=True)
class Anatomy:
    """One model, compiled.

    attention: kind of mask -> sites. linears: in the trace, and after merging. left: calls that a pass should have
    taken, in the fused graph. per_block: what runs between one attention and the next, as calls in eager and as
    launches of each graph. through_aten: graph -> ops without a kernel. bytes_per_token: of the KV cache, per row.
    max_length: where the model bounds it. refusal: why there is no KV cache, or no graph.
    """

    attention: dict[str, int] = field(default_factory=dict)
    experts: int = 0
    norms: int = 0
    ropes: int = 0
    linears: tuple[int, int] = (0, 0)
    left: dict[str, int] = field(default_factory=dict)
    per_block: dict[str, float] = field(default_factory=dict)
    through_aten: dict[str, list[str]] = field(default_factory=dict)
    bytes_per_token: int = 0
    max_length: int | None = None
    refusal: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data that equals what JSON gives back."""
        return {**asdict(self), "linears": list(self.linears)}

    def __str__(self) -> str:
        return "\n".join(f"{name:<12}{value}" for name, value in zip(COLUMNS, self.cells()))

    def cells(self) -> tuple[str, ...]:
        """The texts of one row of the table; the columns are `COLUMNS`."""
        if not self.attention and self.refusal:
            return (f"refused: {self.refusal}", *[""] * (len(COLUMNS) - 1))
        blocks = ", ".join(f"{name} {shortest(count)}" for name, count in self.per_block.items())
        aten = ", ".join(sorted({op for found in self.through_aten.values() for op in found})) or "none"
        cache = f"{self.bytes_per_token} bytes" if self.refusal is None else f"none: {self.refusal}"
        before, after = self.linears
        return (
            "; ".join(f"{count} {kind}" for kind, count in self.attention.items()),
            str(self.norms),
            str(self.ropes),
            f"{before} to {after}" + f", {self.experts} of experts" * bool(self.experts),
            blocks,
            aten,
            cache,
        )


COLUMNS = ("attention", "norms", "ropes", "linears", "a block", "by ATen", "KV cache")


def shortest(count: float) -> str:
    return f"{count:.1f}".removesuffix(".0")


def anatomy(program: Program) -> Anatomy:
    """The row of a program; its graphs are made and scheduled, nothing is built."""
    try:
        traced, fused = program.stages.traced, program.stages.graph("forward", True)
    except ModelError as refusal:
        return Anatomy(refusal=str(refusal))
    kinds, refusal = ["prefill", "decode"], None
    try:
        states = program.stages.graph("decode", False)
    except ModelError as reason:
        kinds, refusal, states = ["forward"], str(reason), None
    scheduled = {kind: program.stages.scheduled(kind, False) for kind in kinds}
    nodes = Counter(node.target for node in fused.nodes)
    return Anatomy(
        attention=dict(Counter(kind_of_attention(node) for node in fused.nodes if node.target in ATTENTIONS)),
        experts=sum(count for op, count in nodes.items() if op in EXPERTS),
        norms=sum(nodes[op] for op in NORMS),
        ropes=nodes[effc.rope.default],
        linears=(sum(is_linear(traced, node) for node in traced.nodes), sum(nodes[op] for op in LINEARS)),
        left={str(op): nodes[op] for op in sorted(FORMS, key=str) if nodes[op]},
        per_block={"eager": calls_per_block(traced)}
        | {kind: launches_per_block(x, kind) for kind, x in scheduled.items()},
        through_aten={
            kind: [str(step.node.target) for step in one.schedule.fallbacks] for kind, one in scheduled.items()
        },
        bytes_per_token=0 if states is None else bytes_per_token(states),
        max_length=fused.max_length,
        refusal=refusal,
    )


def kind_of_attention(node: fx.Node) -> str:
    """What the arguments of an attention say of its mask and scores: "causal, window 6, softcap 5.0"."""
    named = arguments(node)
    texts = ["causal" if named.get("causal", True) else "full"]
    for name in ("window", "softcap"):
        texts += [f"{name} {named[name]}"] * (named[name] is not None)
    texts += [f"visible {named['visible']}"] * (named["visible"] is not None)
    texts += [f"bias {named['bias']}"] * (named["bias"] is not None)
    texts += ["sinks"] * (named["sinks"] is not None)
    texts += ["explicit mask"] * (named.get("mask") is not None)
    return ", ".join(texts)


def is_linear(graph: Graph, node: fx.Node) -> bool:
    position = PRODUCTS.get(node.target)
    return position is not None and recipe_of(graph, node.args[position]) is not None


def calls_per_block(traced: Graph) -> float:
    """Calls that do work in eager PyTorch, per block: per module of the model's longest list of modules."""
    blocks: dict[str, Counter[str]] = {}
    for node in traced.nodes:
        if node.op != "call_function" or not is_tensor(node) or is_view(node):
            continue
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            if found := re.fullmatch(r"(.*)\.(\d+)", path):
                blocks.setdefault(found[1], Counter())[found[2]] += 1
                break
    longest = max(blocks.values(), key=lambda counts: (len(counts), counts.total()), default=None)
    return longest.total() / len(longest) if longest else 0.0


def launches_per_block(scheduled: Scheduled, kind: str) -> float:
    """Launches from one attention to the next, on average; of the whole graph where there is only one."""
    sites = {node.name for node in scheduled.scope.graph.nodes if node.target in ATTENTIONS}
    first: dict[str, int] = {}
    count = 0
    for step in scheduled.schedule.steps:
        for name in sites.intersection(names_of(step)):
            first.setdefault(name, count)
        count += len(step.launches_of(one_row=kind == "decode")) or isinstance(step, Fallback)
    return (max(first.values()) - min(first.values())) / (len(first) - 1) if len(first) > 1 else float(count)


def names_of(step: Any) -> list[str]:
    """The nodes that a step of a schedule stands for."""
    if isinstance(step, Fallback):
        return [step.node.name]
    return [name for launch in step.launches for name in launch.nodes]


def bytes_per_token(cached: Graph) -> int:
    """Of all states [B, G, T, D], per token and row."""
    values = [cached.placeholder(name).meta["val"] for name in cached.states]
    return sum(value.shape[1] * value.shape[3] * value.dtype.itemsize for value in values)
