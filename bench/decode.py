"""Prefill and decode of one model by several engines, in one run: `effc bench`, `make bench` or this file.

Engines take turns; each baseline is run in the way that is fastest for it. The table stands with the machine's read
bandwidth, which bounds decoding, and with the receipt of what effc computed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure
import torch
from effc.compiler.errors import InputError
from effc.llm import LLM
from effc.receipt import PROMPTS, STORY, receipt
from effc.runtime.store import DEFAULT_MODEL, resolve
from effc.speed import CompiledEngine, Engine, Speed, TransformersEngine, best_of, compare
from effc.startup import measure as measure_startup
from engines import InductorEngine, LlamaCppEngine
from torch import nn

EAGER = "Hugging Face eager"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="effc bench", description=__doc__.split("\n\n")[0])
    found.add_argument("--model", default=DEFAULT_MODEL, help="a known name, a GGUF file or a Hugging Face folder")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), help="what the weights become")
    found.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
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
    for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1), ("threads", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, found {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    result = run(options)
    measure.report(result, markdown(result), "decode", as_json=options.json, save=options.save)
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return everything that the table is made of."""
    path = resolve(options.model)
    startups = {} if options.no_startup else measure_startups(path, options.dtype)
    llm = LLM(path, dtype=getattr(torch, options.dtype) if options.dtype else None)
    eager = llm.program.model.module()
    capacity = options.prompt_tokens + options.new_tokens
    engines: list[Engine] = [
        CompiledEngine(llm.program, capacity),
        TransformersEngine(eager, None, f"{EAGER}, growing cache"),
        TransformersEngine(eager, capacity, f"{EAGER}, static cache"),
    ]
    if options.inductor:
        engines.append(InductorEngine(eager, capacity))
    if options.llama_cpp:
        engines.append(LlamaCppEngine(path, capacity, options.threads))
    say("comparing with eager")
    evidence = receipt(llm.program, eager, [llm.encode(text) for text in PROMPTS])
    story = llm.encode(STORY)
    prompt = torch.tensor([(story * (options.prompt_tokens // len(story) + 1))[: options.prompt_tokens]])
    bandwidth = measure.read_bandwidth()
    speeds, around = compare(engines, prompt, options.new_tokens, options.repeats, say)
    say("")
    effc, growing, static, *others = speeds
    return {
        **measure.head(options.threads),
        "model": llm.program.model.name,
        "dtype": str(llm.program.model.dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "read_bandwidth": max(bandwidth, measure.read_bandwidth()),
        "weight_bytes": weight_bytes(eager),
        "others_cores": around.others,
        "surroundings": str(around),
        "startups": startups,
        "speeds": [asdict(speed) for speed in (effc, best_of(EAGER, [growing, static]), *others, growing, static)],
        "receipt": evidence.to_dict(),
        "receipt_text": str(evidence),
    }


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


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: what ran where, the table, the receipt."""
    speeds = [Speed(**entry) for entry in result["speeds"]]
    machine, first = result["machine"], speeds[0]
    bandwidth = result["read_bandwidth"]
    lines = [
        f"{result['model']} in {result['dtype']}: {first.prompt_tokens} tokens read, {first.new_tokens} written,"
        f" {result['threads']} threads, {result['repeats']} turns, median (spread)",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}; read bandwidth {bandwidth / 1e9:.1f} GB/s;"
        f" commit {result['commit']}, {result['date'][:10]}; "
        + ", ".join(f"{name} {found}" for name, found in result["versions"].items()),
        "",
        f"{result['surroundings']}",
        "",
        "| engine | prefill tokens/s | ms to first token | decode tokens/s | ms per token | of read bandwidth |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for speed in speeds:
        share = result["weight_bytes"] * speed.decode_rate / bandwidth
        lines.append(
            f"| {speed.name} | {speed.prefill_rate:.0f} ({speed.spread('prefill'):.0%})"
            f" | {speed.prompt_tokens / speed.prefill_rate * 1e3:.0f}"
            f" | {speed.decode_rate:.1f} ({speed.spread('decode'):.0%}) | {1e3 / speed.decode_rate:.1f}"
            f" | {'(other weights)' if 'llama.cpp' in speed.name else f'{share:.0%}'} |"
        )
    eager = speeds[1]
    lines.append(
        f"| effc / {eager.name} | {first.prefill_rate / eager.prefill_rate:.2f}x | "
        f"| {first.decode_rate / eager.decode_rate:.2f}x | | |"
    )
    lines.append("")
    for name, startup in result["startups"].items():
        lines.append(
            f"{name} start: compiled in {startup['compile']:.2f} s,"
            f" first token {startup['total']:.2f} s after the process began"
        )
    return "\n".join([*lines, "", *result["receipt_text"].splitlines()])


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
