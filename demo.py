"""`make demo`: compile the default model from nothing, measure it beside Hugging Face eager, and ask it a question.

Everything is compiled into a cache folder that starts empty, so what the demo says of a cold start is true each time.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import progress_bar
from .compiler.errors import EffcError
from .runtime.store import DEFAULT_MODEL, MODELS, pull
from .startup import QUESTION, Startup, measure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .llm import LLM
    from .receipt import Receipt
    from .speed import Speed, Surroundings

PROMPT_TOKENS = 512
NEW_TOKENS = 32
REPEATS = 3


def main() -> int:
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    try:
        with tempfile.TemporaryDirectory(prefix="effc-demo-") as folder:
            run(console, Path(folder))
    except EffcError as error:
        print(f"effc: {error}", file=sys.stderr)
        return 1
    return 0


def run(console: Console, cache: Path) -> None:
    """The demo, with an empty folder to compile into."""
    model = MODELS[DEFAULT_MODEL]
    console.print(f"[bold]1. The model[/]: {DEFAULT_MODEL} ({model.bytes / 1e6:.0f} MB, {model.license})")
    with progress_bar() as progress:
        path = pull(DEFAULT_MODEL, progress)
    console.print(f"   {path}\n")

    console.print("[bold]2. Compiling[/], in a process of its own: with an empty cache, then again")
    with console.status("compiling with an empty cache"):
        cold = measure(path, cache)
        warm = measure(path, cache)
    show_startups(console, {"cold": cold, "warm": warm})

    os.environ["EFFC_CACHE_DIR"] = str(cache)
    from .llm import LLM

    llm = LLM(path)
    eager = llm.program.model.module()
    evidence, speeds, around = examine(console, llm, eager)
    show_passes(console, evidence)
    show_speeds(console, speeds, around)
    console.print("[bold]5. Receipt[/], against Hugging Face eager in fp32")
    for line in receipt_lines(evidence):
        console.print("   " + line, markup=False)

    console.print(f"\n[bold]6. {QUESTION}[/]")
    console.file.flush()
    for piece in llm.stream(QUESTION, chat=True):
        console.print(piece, end="", markup=False, soft_wrap=True)
    console.print()


def show_startups(console: Console, startups: dict[str, Startup]) -> None:
    table = table_of("seconds", "imports", "open", "compile", "weights, prompt", "process to first token")
    for name, found in startups.items():
        stages = (found.start, found.open, found.compile, found.first_token, found.total)
        table.add_row(name, *(f"{seconds:.2f}" for seconds in stages))
    console.print(table, "")


def examine(console: Console, llm: LLM, eager: object) -> tuple[Receipt, list[Speed], Surroundings]:
    """Compare the program with the eager model: what it says, and how fast both are."""
    import torch

    from .receipt import PROMPTS, STORY, receipt
    from .speed import CompiledEngine, TransformersEngine, best_of, compare

    with console.status("comparing with eager") as status:
        evidence = receipt(llm.program, eager, [llm.encode(text) for text in PROMPTS], NEW_TOKENS)
        prompt = (llm.encode(STORY) * PROMPT_TOKENS)[:PROMPT_TOKENS]
        capacity = PROMPT_TOKENS + NEW_TOKENS
        engines = [
            CompiledEngine(llm.program, capacity),
            TransformersEngine(eager, None, "Hugging Face eager, growing cache"),
            TransformersEngine(eager, capacity, "Hugging Face eager, static cache"),
        ]
        (effc, *others), around = compare(engines, torch.tensor([prompt]), NEW_TOKENS, REPEATS, status.update)
    return evidence, [effc, best_of("Hugging Face eager", others)], around


def show_passes(console: Console, evidence: Receipt) -> None:
    console.print("[bold]3. What the compiler did[/]")
    table = table_of("pass", "matches", "ms")
    for name, matches, seconds in evidence.passes:
        table.add_row(name, str(matches), f"{seconds * 1e3:.0f}")
    console.print(table)
    table = table_of("graph", "calls traced", "launches after fusion", "distinct kernels", "left to ATen")
    for graph in evidence.graphs:
        numbers = (graph.traced_calls, graph.launches, graph.kernels, len(graph.fallbacks))
        table.add_row(graph.name, *map(str, numbers))
    console.print(table, "")


def show_speeds(console: Console, speeds: list[Speed], around: Surroundings) -> None:
    import torch

    console.print(
        f"[bold]4. Speed[/]: a prompt of {PROMPT_TOKENS} tokens, then {NEW_TOKENS} written, in fp32 with"
        f" {torch.get_num_threads()} threads; median of {REPEATS} turns (spread)"
    )
    table = table_of("", "prefill tokens/s", "decode tokens/s")
    for speed in speeds:
        table.add_row(
            speed.name,
            f"{speed.prefill_rate:.0f} ({speed.spread('prefill'):.0%})",
            f"{speed.decode_rate:.1f} ({speed.spread('decode'):.0%})",
        )
    effc, eager = speeds
    ratios = (effc.prefill_rate / eager.prefill_rate, effc.decode_rate / eager.decode_rate)
    table.add_row("effc / eager", *(f"{ratio:.2f}x" for ratio in ratios))
    console.print(table)
    console.print(f"   {around}\n")


def receipt_lines(evidence: Receipt) -> list[str]:
    names = " and ".join(graph.name for graph in evidence.graphs)
    return [*str(evidence.agreement).splitlines(), f"ATen calls left in {names}: {evidence.fallbacks}"]


def table_of(first: str, *numbers: str) -> Table:
    """An empty table whose first column holds names."""
    from rich.table import Column, Table

    columns = (Column(name, justify="right") for name in numbers)
    return Table(first, *columns, box=None, pad_edge=False, padding=(0, 3, 0, 0))


if __name__ == "__main__":
    sys.exit(main())
