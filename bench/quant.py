"""What quantization costs in quality: perplexity on held-out text, KL from fp32 and equal greedy tokens.

    python bench/quant.py --methods      ways of rounding the linears beside each other, at the same formats

All on the weights that the file stands for, in fp32, through the interpreter: what is measured is the rounding of
weights and nothing else. The head and the embedding stay as they are, as in the papers. Calibration and held-out text
are parts of Python's manual that share no paragraph.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure
import torch
from effc.compiler.errors import InputError
from effc.compiler.formats import Format, find
from effc.compiler.load import LoadedModel
from effc.compiler.trace import trace
from effc.passes import run as run_passes
from effc.passes.calibrate import (
    METHODS,
    Calibration,
    Quality,
    Reference,
    calibrate,
    everywhere,
    find_sites,
    inputs_of,
    text_parts,
    token_rows,
)
from effc.passes.calibrate.methods import find_method
from effc.program import load
from effc.runtime.store import DEFAULT_MODEL
from effc.runtime.text import TextCodec


@dataclass(frozen=True)
class Row:
    """One format by one method. bits: per weight of the rounded matrices. seconds: that calibration took."""

    format: str
    method: str
    bits: float
    perplexity: float
    kl: float
    agreement: float
    seconds: float


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="quant.py", description=__doc__.split("\n\n")[0])
    found.add_argument("--methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; all without a name")
    found.add_argument("--model", default=DEFAULT_MODEL, help="a known name, a GGUF file or a Hugging Face folder")
    found.add_argument("--formats", nargs="+", default=["int4_g128", "int3_g64"], metavar="FORMAT")
    found.add_argument("--calibration", type=int, default=16, metavar="N", help="texts that methods look at")
    found.add_argument("--held-out", type=int, default=8, metavar="N", help="texts that are measured on")
    found.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a text")
    found.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--save", action="store_true", help="write the result to bench/results, as JSON and Markdown")
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    formats, methods = [find(name) for name in options.formats], options.methods or list(METHODS)
    for method in methods:
        find_method(method)
    model = load(options.model, torch.float32)
    graph, _ = run_passes(trace(model))
    parts, encode = text_parts(), TextCodec(model.tokenizer_folder).encode
    texts = inputs_of(graph, token_rows(parts.calibration, encode, options.calibration, options.length))
    held_out = inputs_of(graph, token_rows(parts.held_out, encode, options.held_out, options.length))
    reference = Reference(graph, model.source, held_out)
    before, rows = reference.quality(), []
    for format in formats:
        for method in methods:
            start = time.perf_counter()
            found = calibrate(graph, model.source, texts, everywhere(format), method, show_progress)
            seconds = time.perf_counter() - start
            rows.append(row(format, method, found, measured(reference, model, found), seconds))
            print(f"{method} at {format.name}: perplexity {rows[-1].perplexity:.3f}", file=sys.stderr)
    sites = [site for site in find_sites(graph)[0] if not site.shared]
    return {
        **measure.head(options.threads),
        "model": model.name,
        "weights": sum(site.numel for site in sites),
        "matrices": len(sites),
        "text": parts.source,
        "calibration_tokens": options.calibration * options.length,
        "before": {**asdict(before), "perplexity": before.perplexity},
        "rows": [asdict(found) for found in rows],
    }


def measured(reference: Reference, model: LoadedModel, found: Calibration) -> Quality:
    return reference.measure(found.graph, model.source, found.assignments)


def row(format: Format, method: str, found: Calibration, quality: Quality, seconds: float) -> Row:
    sites = [site for site in find_sites(found.graph)[0] if site.name in found.assignments]
    bits = sum(format.bits(site.rows, site.columns) * site.numel for site in sites)
    weights = sum(site.numel for site in sites)
    return Row(format.name, method, bits / weights, quality.perplexity, quality.kl, quality.agreement, seconds)


def show_progress(done: int, total: int, what: str) -> None:
    print(f"\r\033[K{done} of {total}: {what}" if done < total else "\r\033[K", end="", file=sys.stderr, flush=True)


def markdown(result: dict[str, Any]) -> str:
    rows, before = [Row(**found) for found in result["rows"]], result["before"]
    nearest = {row.format: row.perplexity - before["perplexity"] for row in rows if row.method == "rtn"}
    lines = [
        f"{result['model']}, the {result['matrices']} matrices of its layers ({result['weights'] / 1e6:.0f} M weights),"
        f" calibrated on {result['calibration_tokens']} tokens and measured on {before['tokens']} others of"
        f" {result['text']}; fp32 has a perplexity of {before['perplexity']:.3f} there."
        f" {result['machine']['cpu']}, {result['date']}, commit {result['commit']}.",
        "",
        "| format | bits a weight | method | perplexity | increase | of RTN's | KL from fp32, nats"
        " | greedy tokens equal | calibration, s |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        increase = row.perplexity - before["perplexity"]
        part = f"{increase / nearest[row.format]:.2f}" if row.format in nearest else ""
        lines.append(
            f"| {row.format} | {row.bits:.2f} | {row.method} | {row.perplexity:.3f} | {increase:+.3f} | {part} |"
            f" {row.kl:.4f} | {row.agreement:.1%} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.methods is None:
        raise InputError("expected a part to run: --methods")
    torch.set_num_threads(options.threads)
    result = run(options)
    measure.report(result, markdown(result), "quant_methods", as_json=options.json, save=options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
