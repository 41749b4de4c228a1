"""Every pass on a small graph: how many matches, which calls come and go, numerics, near-misses; and a second run.

The graphs lie in golden/ as text, before and after; `pytest tests/test_pass_claims.py --update-golden` writes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from effc.compiler import interpret, show
from effc.compiler.errors import EffcError
from effc.compiler.graph import Graph, dtype_of, sizes
from effc.compiler.rewrite import PassResult
from effc.compiler.schemes import scheme_of
from effc.compiler.sources import ModuleSource
from effc.passes import pipeline
from effc.passes.materialize_kv import materialize_kv
from effc.passes.quantize import quantize
from effc.passes.specialize import specialize
from effc.passes.stream_attention import Seen, stream_attention
from torch import Tensor

from . import small_graphs as small
from .small_graphs import Small

GOLDEN = Path(__file__).parent / "golden"
CAPACITY = 8
LETTERS = {("x", 0): "M", ("x", 1): "N"}
"""What the goldens call the runtime sizes of a tensor."""


@dataclass(frozen=True)
class Claims:
    """What a pass does to a small graph.

    changes: calls that came (positive) and went. misses: a part of the reason of each near-miss, in order. atol: how
    far the outputs may move. refused: what a second run raises, where the pass does not take what it made.
    """

    make: Callable[[], Small]
    matches: int
    changes: Mapping[str, int] = field(default_factory=dict)
    misses: tuple[str, ...] = ()
    atol: float = 1e-6
    refused: str | None = None


CLAIMS = {
    "normalize": Claims(
        small.spellings,
        12,
        {"view": -1, "reshape": 1, "transpose": -1, "permute": 1, "contiguous": -1, "to": -1}
        | {"chunk": -1, "getitem": -2, "slice": 2, "mul": -2, "square": -1, "pow": 2, "add": -1},
        misses=("the caller gets it, and has or gets x too",),
    ),
    "fuse_norm": Claims(
        small.norms,
        1,
        {"effc.rms_norm": 1, "pow": -1, "mean": -1, "add": -1, "rsqrt": -1, "mul": -2},
        misses=("the mean is over dimensions [1] of 3",) * 2,
    ),
    "fuse_rope": Claims(
        small.rotations,
        1,
        {"effc.rope": 1, "neg": -1, "cat": -1, "mul": -1, "add": -1},
        misses=("neither halves nor pairs",),
    ),
    "fuse_attention": Claims(
        small.scores,
        1,
        {"effc.attention": 1, "permute": 1, "matmul": -1, "softmax": -1, "masked_fill": -1, "bitwise_not": -1}
        | {"bitwise_and": -1, "le": -1, "arange": -1, "_to_copy": -1, "unsqueeze": -6},
        misses=("softmax over dimension 2, not over the keys",),
    ),
    "fuse_activation": Claims(
        small.activations, 1, {"silu": 1, "sigmoid": -1, "mul": -1}, misses=("sigmoid_1 is used elsewhere too",)
    ),
    "fuse_experts": Claims(
        small.experts,
        1,
        {"effc.experts": 1, "reshape": -3, "unsqueeze": -3, "bmm": -2, "index": -2, "mul": -2, "slice": -2}
        | {"squeeze": -2, "repeat_interleave": -1, "silu": -1, "sum": -1},
        atol=1e-5,
    ),
    "fuse_moe": Claims(
        small.mixtures,
        5,
        {"effc.moe": 1, "effc.experts": -1, "linear": -1, "softmax": -1, "topk": -1, "getitem": -2, "reshape": -2}
        | {"sym_size": -2, "add": -1},
        misses=("it takes the smallest entries",),
        atol=1e-5,
    ),
    "fuse_linear": Claims(
        small.linears,
        7,
        {"linear": -4, "effc.linear": 4, "add": -2, "silu": -1},
        misses=("linear_6 is used elsewhere too",) * 2,
    ),
    "fuse_mlp": Claims(
        small.gates,
        1,
        {"effc.linear": -2, "mul": -1, "effc.gated_linear": 1},
        misses=("linear_8 is used elsewhere too",),
    ),
    "quantize": Claims(small.matrices, 1, {"effc.dequantize": 1}, misses=("rows of a multiple of 2",)),
    "cleanup": Claims(small.repeats, 2, {"cos": -1, "exp": -1}),
    "drop_padding": Claims(small.padded, 3, {"ones": 1, "sym_size": 2}),
    "materialize_kv": Claims(
        small.uncached,
        16,
        {"effc.attention": -1, "effc.kv_write": 2, "effc.cached_attention": 1, "cumsum": -1, "arange": 1, "add": 3}
        | {"sub": 1, "clamp_min": 1, "unsqueeze": 4, "squeeze": 1, "sym_size": 2},
        refused="kv_write .* not known to treat every token alone",
    ),
    "specialize": Claims(small.one_token, 1, {"sym_size": -1}),
    "stream_attention": Claims(small.streamed, 1),
}


def fix_length(graph: Graph) -> PassResult:
    """`specialize` for one token; its match is the length."""
    length = sizes(graph.placeholder("input_ids"))[1]
    specialize(graph, {length: 1} if length.is_Symbol else {})
    return PassResult(int(length.is_Symbol))


def stream(graph: Graph) -> PassResult:
    return PassResult(stream_attention(graph, Seen(small.KEPT, small.WINDOW)))


RUN = {pipeline.name_of(function): function for function in (*pipeline.PASSES, *pipeline.UNPADDED)} | {
    "quantize": partial(quantize, scheme=scheme_of("w4")),
    "materialize_kv": partial(materialize_kv, kind="extend"),
    "specialize": fix_length,
    "stream_attention": stream,
}


def test_every_pass_has_its_claims_and_goldens():
    stages = (*pipeline.quantized(pipeline.PASSES, scheme_of("w4")), *pipeline.UNPADDED, *pipeline.cached("decode"))
    assert {pipeline.name_of(function) for function in stages} <= set(CLAIMS) == set(RUN)
    assert {path.name for path in GOLDEN.iterdir()} == {
        f"{name}.{at}.txt" for name in RUN for at in ("before", "after")
    }


@pytest.mark.parametrize("name", RUN)
def test_a_pass_does_what_it_claims(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(pipeline.VERIFY, "0")  # the numbers are compared here
    claims, run = CLAIMS[name], RUN[name]
    given = claims.make()
    before, expected = text_of(given.graph), given.expected or outputs(given.graph, given)
    graph, step = pipeline.run_pass(given.graph, run, verify=True)
    after = text_of(graph)
    for stage, text in (("before", before), ("after", after)):
        golden = GOLDEN / f"{name}.{stage}.txt"
        if request.config.getoption("--update-golden"):
            golden.write_text(text)
        assert text == golden.read_text(), f"{golden.name} differs: where that is right, run with --update-golden"

    assert (step.matches, step.changes) == (claims.matches, claims.changes)
    reasons = [miss.reason for miss in step.misses]
    assert len(reasons) == len(claims.misses), reasons
    assert all(part in reason for part, reason in zip(claims.misses, reasons)), reasons
    for wanted, found in zip(expected, outputs(graph, given), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=claims.atol, rtol=0)

    if claims.refused is not None:
        with pytest.raises(EffcError, match=claims.refused):
            run(graph)
        return
    graph, again = pipeline.run_pass(graph, run, verify=True)
    assert (again.matches, text_of(graph)) == (0, after), "a second run matches again"


def outputs(graph: Graph, given: Small) -> list[Tensor]:
    """What a graph computes; from empty caches, where it has any."""
    states = {}
    for name in graph.states:
        _, heads, _, size = sizes(graph.placeholder(name))
        shape = (small.B, int(heads), CAPACITY, int(size))
        states[name] = torch.full(shape, torch.nan, dtype=dtype_of(graph.placeholder(name)))
    inputs = {name: given.inputs[name] for name in graph.inputs}
    return interpret.run(graph, inputs, ModuleSource(given.module), states)


def text_of(graph: Graph) -> str:
    """The graph with its sizes by letters, and calls numbered as they stand: without what differs between versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "SIZE_NAMES", show.SIZE_NAMES | LETTERS)
        text = show.show(graph, source=False)
    seen: Counter[str] = Counter()
    names = {}
    for node in graph.nodes:
        if node.op == "call_function":
            name = show.op_name(node)
            seen[name] += 1
            names[node.name] = f"{name.removeprefix('effc.')}_{seen[name]}"
    return re.sub(r"\b\w+\b(?!\()", lambda word: names.get(word[0], word[0]), text)
