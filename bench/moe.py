"""Decoding with a mixture of experts, as experts are added: a token reads the weights of those it chooses, no others.

One layer of Mixtral with random weights in fp32. The number of experts grows, the number that a token chooses does not,
so neither may the time of a step; tokens are random, and so are the experts they choose. Every expert's weights lie
outside of the caches even where there are fewest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import effc
import measure
import torch
from effc.speed import CompiledEngine, Engine, TransformersEngine, surroundings
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

HIDDEN, INTERMEDIATE, PER_TOKEN, VOCABULARY = 768, 2048, 2, 512
PROMPT, WARM_UPS = 16, 5
BYTES_OF_EXPERT = 3 * HIDDEN * INTERMEDIATE * 4


@dataclass
class Row:
    """Seconds of one step with so many experts, medians; error: the largest difference of a logit from eager's."""

    experts: int
    effc: float
    eager: float
    error: float

    @property
    def megabytes(self) -> float:
        return self.experts * BYTES_OF_EXPERT / 1e6


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="moe.py", description=__doc__.split("\n\n")[0])
    found.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32], metavar="E")
    found.add_argument("--steps", type=int, default=100, metavar="N", help="steps of each engine, in turns")
    found.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--save", action="store_true", help="write the result to bench/results, as JSON and Markdown")
    return found


def model_with(experts: int) -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=PER_TOKEN,
        sliding_window=None,
    )
    return MixtralForCausalLM(config).eval().requires_grad_(False)


class Pair:
    """A model with so many experts, compiled and in eager PyTorch, and what their steps took."""

    def __init__(self, experts: int, steps: int) -> None:
        self.experts, self.error = experts, 0.0
        model = model_with(experts)
        self.engines: tuple[Engine, Engine] = (
            CompiledEngine(effc.compile(model), PROMPT + steps),
            TransformersEngine(model, None, "eager"),
        )
        self.seconds: tuple[list[float], list[float]] = ([], [])
        prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(2))
        for engine in self.engines:
            engine.prefill(prompt)

    def step(self, token: Tensor) -> None:
        logits = []
        for engine, seconds in zip(self.engines, self.seconds):
            start = time.perf_counter()
            logits.append(engine.decode(token))
            seconds.append(time.perf_counter() - start)
        self.error = max(self.error, (logits[0] - logits[1]).abs().max().item())

    @property
    def row(self) -> Row:
        ours, eager = (statistics.median(seconds[WARM_UPS:]) for seconds in self.seconds)
        return Row(self.experts, ours, eager, self.error)


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """Models take turns, token by token, so that a change of the machine's mood meets them all."""
    steps = options.steps + WARM_UPS
    tokens = torch.randint(VOCABULARY, (steps, 1, 1), generator=torch.Generator().manual_seed(1))
    pairs = [Pair(experts, steps) for experts in options.experts]
    bandwidth = measure.read_bandwidth()
    with surroundings() as around:
        for token in tokens:
            for pair in pairs:
                pair.step(token)
    return {
        **measure.head(options.threads),
        "bandwidth": bandwidth,
        "surroundings": str(around),
        "rows": [asdict(pair.row) for pair in pairs],
    }


def markdown(result: dict[str, Any]) -> str:
    rows = [Row(**row) for row in result["rows"]]
    chosen = PER_TOKEN * BYTES_OF_EXPERT
    lines = [
        f"One layer of Mixtral, hidden {HIDDEN}, experts of {INTERMEDIATE}, {PER_TOKEN} a token, fp32, batch 1;"
        f" {result['threads']} threads of {result['machine']['cpu']}, {result['machine']['isa']}; {result['date']},"
        f" commit {result['commit']}; {result['surroundings']}.",
        f"A token's experts have {chosen / 1e6:.0f} MB of weights: {chosen / result['bandwidth'] * 1e3:.2f} ms at this"
        f" machine's {result['bandwidth'] / 1e9:.1f} GB/s.",
        "",
        "| experts | their weights, MB | effc, ms a step | to read all, ms | eager, ms a step | largest error |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        whole = row.megabytes * 1e6 / result["bandwidth"]
        lines.append(
            f"| {row.experts} | {row.megabytes:.0f} | {row.effc * 1e3:.2f} | {whole * 1e3:.2f} | {row.eager * 1e3:.2f}"
            f" | {row.error:.1e} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    result = run(options)
    measure.report(result, markdown(result), "moe", as_json=options.json, save=options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
