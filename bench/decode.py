"""Prefill and decode of one model by several engines, in one run: `effc bench`, `make bench` or this file.

Engines take turns; each baseline is run in the way that is fastest for it. The table stands with the machine's read
bandwidth, which bounds decoding, and with the receipt of what effc computed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure
import torch
from effc.compiler.errors import InputError
from effc.compiler.schemes import scheme_of
from effc.llm import LLM
from effc.program import Program
from effc.receipt import PROMPTS, STORY, agreement, continued, receipt
from effc.runtime.store import DEFAULT_MODEL, resolve
from effc.speed import CompiledEngine, Engine, Speed, Surroundings, TransformersEngine, best_of, compare
from effc.startup import measure as measure_startup
from engines import InductorEngine, LlamaCppEngine
from torch import nn

EAGER = "Hugging Face eager"
RECEIPT_TOKENS = 64
"""How far each prompt of a receipt is continued."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="effc bench", description=__doc__.split("\n\n")[0])
    found.add_argument("--model", default=DEFAULT_MODEL, help="a known name, a GGUF file or a Hugging Face folder")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), help="what the weights become")
    found.add_argument(
        "--quantize", nargs="+", default=["stored", "none"], metavar="SCHEME", help="one row of effc each"
    )
    found.add_argument("--prompt-tokens", type=int, nargs="+", default=[512], metavar="N", help="one measurement each")
    found.add_argument("--batch", type=int, metavar="B", help="also effc with so many rows at once")
    found.add_argument("--new-tokens", type=int, default=64, metavar="N", help="at least 2")
    found.add_argument("--repeats", type=int, default=7, metavar="N", help="turns of each engine")
    found.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of every engine")
    found.add_argument("--inductor", action="store_true", help="also torch.compile on its own (takes minutes)")
    found.add_argument("--llama-cpp", action="store_true", help="also llama.cpp (needs llama-cpp-python)")
    found.add_argument("--no-startup", action="store_true", help="leave out the cold and the warm start")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--save", action="store_true", help="write the result to bench/results, as JSON and Markdown")
    return found


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    limits = {"new_tokens": 2, "repeats": 1, "threads": 1, "prompt_tokens": 1, "batch": 1}
    for name, least in limits.items():
        found = getattr(options, name)
        if found is not None and min(found if isinstance(found, list) else [found]) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, found {found}")
    for scheme in options.quantize:
        scheme_of(scheme)
    torch.set_num_threads(options.threads)
    result = run(options)
    measure.report(result, markdown(result), "decode", as_json=options.json, save=options.save)
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return everything that the table is made of."""
    path = resolve(options.model)
    startups = {} if options.no_startup else measure_startups(path, options.dtype)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    llms = {scheme: LLM(path, dtype=dtype, quantize=scheme) for scheme in options.quantize}
    llm = next(iter(llms.values()))
    eager = llm.program.model.module()
    prompts = [llm.encode(text) for text in PROMPTS]
    longest = max(*options.prompt_tokens, *map(len, prompts))
    capacity = longest + max(options.new_tokens, RECEIPT_TOKENS)
    compiled = [CompiledEngine(found.program, capacity, f"effc, {scheme}") for scheme, found in llms.items()]
    others: list[Engine] = []
    if options.inductor:
        others.append(InductorEngine(eager, capacity))
    if options.llama_cpp:
        others.append(LlamaCppEngine(path, capacity, options.threads))
    growing = TransformersEngine(eager, None, f"{EAGER}, growing cache")
    static = TransformersEngine(eager, capacity, f"{EAGER}, static cache")

    say("comparing with eager")
    receipts = {scheme: receipt(found.program, eager, prompts, RECEIPT_TOKENS) for scheme, found in llms.items()}
    texts = continued(growing, eager, prompts, RECEIPT_TOKENS)
    agreements = {engine.name: agreement(engine, texts) for engine in (*compiled, *others)}

    bandwidth = measure.read_bandwidth()
    story, rows = llm.encode(STORY), []
    for length in options.prompt_tokens:
        prompt = torch.tensor([(story * (length // len(story) + 1))[:length]])
        engines = [*compiled, *others, growing, static]
        speeds, around = compare(engines, prompt, options.new_tokens, options.repeats, say)
        speeds.insert(-2, best_of(EAGER, speeds[-2:]))
        rows.append(Row(length, 1, speeds, around.others))
        if options.batch:
            engines = [CompiledEngine(found.program, capacity, f"effc, {scheme}") for scheme, found in llms.items()]
            speeds, around = compare(engines, prompt.repeat(options.batch, 1), options.new_tokens, options.repeats, say)
            rows.append(Row(length, options.batch, speeds, around.others))
    say("")
    return {
        **measure.head(options.threads),
        "model": llm.program.model.name,
        "dtype": str(llm.program.model.dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "new_tokens": options.new_tokens,
        "read_bandwidth": max(bandwidth, measure.read_bandwidth()),
        "weight_bytes": {
            **{engine.name: program_bytes(engine.program) for engine in compiled},
            EAGER: weight_bytes(eager),
        },
        "startups": startups,
        "rows": [asdict(row) for row in rows],
        "agreements": {name: asdict(found) for name, found in agreements.items()},
        "receipts": {scheme: found.to_dict() for scheme, found in receipts.items()},
        "receipts_text": {scheme: str(found) for scheme, found in receipts.items()},
    }


@dataclass(frozen=True)
class Row:
    """One measurement: rows of `prompt_tokens` read, `batch` at once. others: cores that other processes used."""

    prompt_tokens: int
    batch: int
    speeds: list[Speed]
    others: float | None


def measure_startups(path: Path, dtype: str | None) -> dict[str, Any]:
    """A cold start in an empty cache folder, then a warm one in the same."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="effc-bench-") as cache:
        for name in ("cold", "warm"):
            say(f"{name} start")
            found[name] = asdict(measure_startup(path, Path(cache), dtype))
    return found


def weight_bytes(model: nn.Module) -> int:
    """What decoding one token has to read: every weight once (an embedding that is not the output head is not)."""
    tied = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    lookup = {id(parameter) for parameter in model.get_input_embeddings().parameters()} - tied
    return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in lookup)


def program_bytes(program: Program) -> int:
    """What a compiled program keeps of its weights, all of which a token reads but for tables that are looked up."""
    return sum(recipe.nbytes for recipe in program.built("decode").recipes.values())


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: what ran where, a table a measurement, how the engines agree with eager, the receipts."""
    machine, bandwidth = result["machine"], result["read_bandwidth"]
    lines = [
        f"{result['model']} in {result['dtype']}: {result['new_tokens']} tokens written, {result['threads']} threads,"
        f" {result['repeats']} turns, median (spread)",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; read bandwidth {bandwidth / 1e9:.1f} GB/s;"
        f" commit {result['commit']}, {result['date'][:10]}; "
        + ", ".join(f"{name} {found}" for name, found in result["versions"].items()),
    ]
    for row in result["rows"]:
        lines += ["", *table(row, result["weight_bytes"], bandwidth)]
    lines += ["", "Agreement with eager in fp32 on eager's own continuations, read token by token:", ""]
    lines += ["| engine | greedy tokens equal | mean KL, nats | largest KL |", "|---|--:|--:|--:|"]
    for name, found in result["agreements"].items():
        lines.append(
            f"| {name} | {found['agreeing']} of {found['tokens']} | {found['mean_kl']:.2e} | {found['max_kl']:.2e} |"
        )
    lines.append("")
    for name, startup in result["startups"].items():
        lines.append(
            f"{name} start: compiled in {startup['compile']:.2f} s,"
            f" first token {startup['total']:.2f} s after the process began"
        )
    for scheme, text in result["receipts_text"].items():
        lines += ["", f"effc, {scheme}:", *text.splitlines()]
    return "\n".join(lines)


def table(row: dict[str, Any], weights: dict[str, int], bandwidth: float) -> list[str]:
    """One measurement; first / this: how many times as fast the first engine is."""
    speeds = [Speed(**entry) for entry in row["speeds"]]
    rows = "1 row" if row["batch"] == 1 else f"{row['batch']} rows"
    lines = [
        f"{rows} of {row['prompt_tokens']} tokens; {Surroundings(row['others'])}",
        "",
        "| engine | prefill tokens/s | first / this | decode tokens/s | first / this | ms a step | of read bandwidth |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for speed in speeds:
        read, write = row["batch"] * speed.prefill_rate, row["batch"] * speed.decode_rate
        nbytes = next((nbytes for name, nbytes in weights.items() if speed.name.startswith(name)), None)
        lines.append(
            f"| {speed.name} | {read:.0f} ({speed.spread('prefill'):.0%})"
            f" | {speeds[0].prefill_rate / speed.prefill_rate:.2f}x"
            f" | {write:.1f} ({speed.spread('decode'):.0%}) | {speeds[0].decode_rate / speed.decode_rate:.2f}x"
            f" | {1e3 / speed.decode_rate:.2f} |"
            f" {'' if nbytes is None else f'{nbytes * speed.decode_rate / bandwidth:.0%}'} |"
        )
    return lines


def say(what: str) -> None:
    """One line of progress, on a terminal, over the one before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from effc.compiler.errors import EffcError

    try:
        sys.exit(main(sys.argv[1:]))
    except EffcError as error:
        sys.exit(f"effc: {error}")
