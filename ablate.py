"""What each pass is worth: a model compiled without it, beside the whole pipeline, in speed and in KL divergence.

print(ablate("smollm2", pairs=True))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .compiler.errors import EffcError, one_line
from .passes.pipeline import PASSES, name_of
from .program import Program, compile, load
from .receipt import kl
from .runtime.decode import decode_one, prefill
from .runtime.kv_cache import KVCache
from .speed import CompiledEngine, Surroundings, compare

SEED = 17


@dataclass(frozen=True)
class Row:
    """A pipeline without some passes. prefill, decode: tokens/s. kl: of its next tokens from the whole pipeline's, in
    nats, the largest. refused: why it does not compile, if it does not.
    """

    without: tuple[str, ...]
    prefill: float = 0.0
    decode: float = 0.0
    launches: int = 0
    fallbacks: int = 0
    kl: float = 0.0
    refused: str = ""

    def line(self, whole: Row) -> str:
        name = " and ".join(self.without) or "(nothing)"
        if self.refused:
            return f"{name:34} refused: {self.refused}"
        return (
            f"{name:34} {self.prefill:9.1f} {self.prefill / whole.prefill:6.2f}x {self.decode:9.1f}"
            f" {self.decode / whole.decode:6.2f}x {self.launches:9} {self.fallbacks:5} {self.kl:10.2e}"
        )


@dataclass(frozen=True)
class Ablation:
    """A table of pipelines without one pass, or two; the first row is the whole pipeline."""

    model: str
    prompt_tokens: int
    new_tokens: int
    rows: tuple[Row, ...]
    surroundings: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{'without':34} {'prefill/s':>9} {'':>7} {'decode/s':>9} {'':>7} {'launches':>9} {'ATen':>5} {'KL':>10}"
        title = f"{self.model}: {self.prompt_tokens} tokens read, {self.new_tokens} written"
        return "\n".join([title, head, *(row.line(self.rows[0]) for row in self.rows), self.surroundings])


def ablate(
    model: str | Path | nn.Module,
    dtype: torch.dtype | None = None,
    *,
    pairs: bool = False,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    repeats: int = 3,
    progress: Callable[[str], object] = lambda what: None,
) -> Ablation:
    """Compile a model with every pass left out in turn, with `pairs` every two as well, and measure each.

    A pipeline that makes no program (no KV cache without fused attention) is a row with the reason.
    """
    loaded = load(model, dtype)
    names = [name_of(function) for function in PASSES]
    skips: list[tuple[str, ...]] = [(), *((name,) for name in names)]
    if pairs:
        skips += itertools.combinations(names, 2)
    generator = torch.Generator().manual_seed(SEED)
    rows: list[Row] = []
    expected: Tensor | None = None
    around = Surroundings(0.0)
    for position, skip in enumerate(skips):
        progress(f"{position + 1} of {len(skips)}: without {' and '.join(skip) or 'nothing'}")
        try:
            program = compile(loaded, skip=skip)
            if expected is None:
                ids = torch.randint(program.config.vocab_size, (1, prompt_tokens + new_tokens), generator=generator)
            found = next_tokens(program, ids, prompt_tokens)
            (speed,), seen = compare([engine(program, ids)], ids[:, :prompt_tokens], new_tokens, repeats)
        except EffcError as error:
            if not skip:
                raise
            rows.append(Row(skip, refused=one_line(error)))
            continue
        expected = found if expected is None else expected
        around = seen if (seen.others or 0) > (around.others or 0) else around
        rows.append(row_of(skip, program, speed.prefill_rate, speed.decode_rate, kl(expected, found).max().item()))
    return Ablation(loaded.name, prompt_tokens, new_tokens, tuple(rows), str(around))


def engine(program: Program, ids: Tensor) -> CompiledEngine:
    return CompiledEngine(program, ids.shape[1])


def row_of(skip: Sequence[str], program: Program, read: float, write: float, divergence: float) -> Row:
    summary = program.built("decode").summary
    return Row(tuple(skip), read, write, summary.launches, len(summary.fallbacks), divergence)


def next_tokens(program: Program, ids: Tensor, prompt_tokens: int) -> Tensor:
    """Logits [n, V] after the prompt and after each further token of ids [1, S], read one by one."""
    cache = KVCache.allocate(program.config.cache_layout, 1, ids.shape[1])
    logits = [prefill(program, ids[:, :prompt_tokens], None, cache)]
    logits += [
        decode_one(program, ids[:, place : place + 1], cache) for place in range(prompt_tokens, ids.shape[1] - 1)
    ]
    return torch.cat(logits).float()
