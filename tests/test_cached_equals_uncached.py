"""Cached equals cache-free, whatever the way through a text.

A walk prefills a text in chunks, extends it by some tokens, decodes single ones, takes tokens back (from all rows, or
another number from each) and exchanges rows, at random; after every step, the logits are those of the graph without a
cache at the same tokens. Error is measured against fp64 and may be twice what the graph without a cache makes in fp32.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import effc
import pytest
import torch
from effc.compiler.graph import Graph, dtype_of, sizes
from effc.compiler.interpret import run
from effc.compiler.sources import ModuleSource
from effc.passes.materialize_kv import materialize_kv
from effc.passes.stream_attention import Seen, stream_attention
from effc.runtime.decode import Runnable, decode_one, extend, prefill
from effc.runtime.kv_cache import KVCache, Ring, State
from torch import Tensor, nn

from .families import ATTENTION, VOCABULARY, verify_unless_told, without_padding
from .test_materialize_kv import fused

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, LENGTH, STEPS = 3, 40, 18
SPARE = 4


@dataclass
class Facts:
    vocab_size: int
    max_position: int | None
    eos_token_ids: tuple[int, ...]
    cache_layout: list[State]
    inputs: tuple[str, ...]
    cache_refusal: str | None = None


class Interpreted:
    """The cached graphs of a fused graph, run by the interpreter."""

    def __init__(self, model: nn.Module, graph: Graph, ring: bool) -> None:
        self.source, self.graph, self.ring = ModuleSource(model), graph, ring
        decode = self.cached("decode", False)
        layout = []
        for name in decode.states:
            state = decode.placeholder(name)
            _, heads, _, size = sizes(state)
            bounds = Ring(*decode.rings[name], SPARE) if name in decode.rings else None
            layout.append(State(name, (int(heads), int(size)), dtype_of(state), bounds))
        self.config = Facts(VOCABULARY, None, (), layout, tuple(graph.inputs))

    @cache  # noqa: B019
    def cached(self, kind: str, padded: bool) -> Graph:
        return materialize_kv(self.graph if padded else without_padding(self.graph), kind, self.ring)

    def run(self, kind: str, inputs: dict[str, Tensor], states: dict[str, Tensor], padded: bool) -> Tensor:
        graph = self.cached(kind, padded)
        return run(graph, {name: inputs[name] for name in graph.inputs}, self.source, states)[0]


@dataclass
class Text:
    """Random rows, and their logits without a cache: ids and visible [B, L], logits in fp32 and fp64 [B, L, V]."""

    ids: Tensor
    visible: Tensor
    logits: Tensor
    truth: Tensor

    @classmethod
    def of(cls, model: nn.Module, graph: Graph, padding: list[int], seed: int) -> Text:
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
        visible = torch.arange(LENGTH) >= torch.tensor(padding)[:, None]
        inputs = {
            "input_ids": ids,
            "attention_mask": visible.long(),
            "position_ids": (visible.cumsum(-1) - 1).clamp(min=0),
        }
        inputs = {name: inputs[name] for name in graph.inputs}
        single, double = (run(graph, inputs, ModuleSource(model), dtype=dtype)[0] for dtype in (None, torch.float64))
        return cls(ids, visible, single, double)

    def reorder(self, rows: Tensor) -> None:
        self.ids, self.visible, self.logits, self.truth = (
            x[rows] for x in (self.ids, self.visible, self.logits, self.truth)
        )

    def check(self, found: Tensor, places: Tensor, step: str) -> None:
        """Compare logits [B, n, V] of the tokens at places [B, n]."""
        rows = torch.arange(ROWS)[:, None]
        seen = self.visible[rows, places]
        truth = self.truth[rows, places]
        allowed = 2 * (self.logits - self.truth)[self.visible].abs().max()
        allowed = allowed + 2 * torch.finfo(found.dtype).eps * truth.abs().amax(-1, keepdim=True)
        wrong = ((found - truth).abs() > allowed) & seen[..., None]
        assert not bool(wrong.any()), (
            f"after {step}: off by {(found - truth)[wrong].abs().max():.3g} at {places.tolist()}"
        )


def walk(program: Runnable, text: Text, padding: list[int], seed: int) -> None:
    chooser = random.Random(seed)
    cache = KVCache.allocate(program.config.cache_layout, ROWS, LENGTH)
    start = chooser.randint(max(padding) + 1, LENGTH // 2)
    mask = text.visible[:, :start].long()
    logits = prefill(program, text.ids[:, :start], mask, cache, chunk=chooser.choice([None, 1, 3, 7]))
    text.check(logits[:, None], torch.full((ROWS, 1), start - 1), f"prefill of {start}")
    for _ in range(STEPS):
        step = chooser.choice(["decode", "decode", "decode", "extend", "take back", "take back from each", "exchange"])
        room = LENGTH - cache.length
        if step.startswith("take back"):
            reach = int((cache.past if cache.reach is None else cache.reach).max())
            most = min(SPARE - (reach - int(cache.past.min())), int((cache.past - cache.padding).min()) - 1)
            counts = [chooser.randint(0, max(most, 0)) for _ in range(ROWS)]
            cache.rollback(torch.tensor(counts if step.endswith("each") else counts[:1] * ROWS))
        elif step == "exchange":
            rows = torch.tensor(chooser.sample(range(ROWS), ROWS))
            text.reorder(rows)
            cache.reorder(rows)
        elif room > 0:
            count = 1 if step == "decode" else chooser.randint(1, min(room, SPARE + 1))
            places = cache.past[:, None] + torch.arange(count)
            tokens = text.ids.gather(1, places)
            logits = decode_one(program, tokens, cache)[:, None] if step == "decode" else extend(program, tokens, cache)
            text.check(logits, places, f"{step} of {count}")


def check(program: Runnable, model: nn.Module, graph: Graph, seeds: range) -> None:
    takes_mask = "attention_mask" in graph.inputs
    for seed in seeds:
        print(f"seed {seed}")
        padding = [0, 2, 5] if seed % 2 and takes_mask else [0, 0, 0]
        walk(program, Text.of(model, graph, padding, seed), padding, seed)


@pytest.fixture(autouse=True)
def comparable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    verify_unless_told(request, monkeypatch)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in ("Llama", "GPT2") else pytest.mark.slow) for name in ATTENTION],
)
def test_every_walk_through_a_text(family: str) -> None:
    model, graph = fused(family)
    check(Interpreted(model, graph, ring=False), model, graph, range(2))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name == "Mistral" else pytest.mark.slow)
        for name in ("Mistral", "Gemma3", "GptOss")
    ],
)
def test_rings_give_what_whole_caches_give(family: str) -> None:
    model, graph = fused(family)
    program = Interpreted(model, graph, ring=True)
    assert any(state.ring is not None for state in program.config.cache_layout)
    check(program, model, graph, range(2))


def test_a_streaming_cache_gives_what_its_graph_without_a_cache_gives() -> None:
    model, whole = fused("Llama")
    graph = without_padding(whole)
    assert stream_attention(graph, Seen(2, 6)) == 2
    assert stream_attention(graph, Seen(2, 6)) == 0
    assert "results are not those of the model" in graph.notes[-1]
    program = Interpreted(model, graph, ring=True)
    assert {state.ring for state in program.config.cache_layout} == {Ring(2, 6, SPARE)}
    check(program, model, graph, range(2))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) for name in ("Llama", "Bloom", "GPT2", "Gemma2")]
)
def test_compiled_programs(family: str) -> None:
    model, graph = fused(family)
    check(effc.compile(model), model, graph, range(2))


def test_compiled_rings() -> None:
    model, graph = fused("Mistral")
    program = effc.compile(model, ring=SPARE)
    assert not program.built("decode").summary.fallbacks
    check(program, model, graph, range(2))


@pytest.mark.slow
def test_a_streaming_program_warns_and_its_two_ways_agree() -> None:
    model, _ = fused("Llama")
    with pytest.warns(UserWarning, match="first 2 tokens and the last 6 only: from token 9 on, results are not those"):
        program = effc.compile(model, ring=SPARE, stream=(2, 6))
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(3))
    cache = KVCache.allocate(program.config.cache_layout, 2, 1)
    assert {tensor.shape[2] for tensor in cache.states.values()} == {2 + 6 + SPARE}
    logits = prefill(program, ids, None, cache)
    torch.testing.assert_close(logits, program(ids)[:, -1], atol=1e-4, rtol=0)
    ragged = program.generate_each([ids[0], ids[1, :7]], max_new_tokens=4, ignore_eos=True)
    for row, prompt in zip(ragged, (ids[0], ids[1, :7]), strict=True):
        assert torch.equal(row, program.generate(prompt[None], max_new_tokens=4, ignore_eos=True)[0])
