"""Prefill by length: the time of each token, and the memory that is held beside the weights and the KV cache.

Attention that holds its scores needs memory that grows with the square of the length; attention with a window has no
need to read what lies before it, nor attention within chunks what lies outside. Each model is one layer of random
weights, compiled and prefilled by effc.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import effc
import measure
import torch
import transformers
from effc.speed import CompiledEngine, peak_memory, surroundings
from torch import nn

HEADS, GROUPS, SIZE, WINDOW = 8, 2, 64, 512
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "max_position_embeddings": 65536,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def causal() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))


def window() -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=WINDOW))


def chunks() -> nn.Module:
    """Without positions: Llama 4 rotates by complex numbers."""
    config = transformers.Llama4TextConfig(
        **SHAPE,
        intermediate_size_mlp=SHAPE["intermediate_size"],
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention"],
        no_rope_layers=[0],
        moe_layers=[],
        attn_temperature_tuning=False,
    )
    return transformers.Llama4ForCausalLM(config)


def softcap() -> nn.Module:
    config = transformers.Gemma2Config(**SHAPE, sliding_window=WINDOW, layer_types=["full_attention"])
    return transformers.Gemma2ForCausalLM(config)


def alibi() -> nn.Module:
    config = transformers.BloomConfig(vocab_size=256, hidden_size=HEADS * SIZE, n_layer=1, n_head=HEADS)
    return transformers.BloomForCausalLM(config)


KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "causal": (causal, "Llama"),
    "window": (window, f"Mistral, window of {WINDOW:,}"),
    "chunks": (chunks, f"Llama 4, chunks of {WINDOW:,}"),
    "softcap": (softcap, "Gemma 2, no window"),
    "alibi": (alibi, "BLOOM"),
}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench/attention_length.py", description=__doc__.split("\n\n")[0])
    found.add_argument("--lengths", default="1024,2048,4096,8192,16384", metavar="N,N", help="prompts, in tokens")
    found.add_argument("--kinds", default="causal,window,chunks,softcap", metavar="A,B", help=f"of {', '.join(KINDS)}")
    found.add_argument("--repeats", type=int, default=3, metavar="N", help="prefills of each length")
    found.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--save", action="store_true", help="write the result to bench/results, as JSON and Markdown")
    return found


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    lengths = [int(length) for length in options.lengths.split(",")]
    with surroundings() as around:
        rows = {kind: measured(KINDS[kind][0], lengths, options.repeats) for kind in options.kinds.split(",")}
    result = {
        **measure.head(options.threads),
        "repeats": options.repeats,
        "surroundings": str(around),
        "rows": rows,
    }
    measure.report(result, markdown(result), "attention_length", as_json=options.json, save=options.save)
    return 0


def measured(make: Callable[[], nn.Module], lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = make().eval()
    return [prefill(model, length, repeats) for length in lengths]


def prefill(model: nn.Module, length: int, repeats: int) -> dict[str, Any]:
    """A row of the table. The memory is that of the first prefill: a program keeps its arena for the next."""
    program = effc.compile(model)
    engine = CompiledEngine(program, length)
    engine.prefill(torch.zeros(1, 8, dtype=torch.int64))  # weights are read, native code is loaded
    tokens = torch.randint(3, SHAPE["vocab_size"], (1, length))
    held, seconds = peak_memory(lambda: engine.prefill(tokens)), []
    for _ in range(repeats):
        start = time.perf_counter()
        engine.prefill(tokens)
        seconds.append(time.perf_counter() - start)
    return {
        "length": length,
        "seconds": statistics.median(seconds),
        "held": held,
        "scores": 4 * HEADS * length**2,
    }


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"Prefill by length: one layer, {HEADS} heads of {SIZE}, {GROUPS} of keys (BLOOM {HEADS}), fp32,"
        f" {result['threads']} threads, median of {result['repeats']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; {machine['compiler']}; commit {result['commit']},"
        f" {result['date'][:10]}; {result['surroundings']}",
        "",
        "| model | tokens | time | per token | memory | per token | scores would be |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, rows in result["rows"].items():
        lines += [table_row(KINDS[kind][1], row) for row in rows]
    return "\n".join(lines)


def table_row(name: str, row: dict[str, Any]) -> str:
    length, seconds, held = row["length"], row["seconds"], row["held"]
    cells = [
        name,
        f"{length:,}",
        f"{seconds * 1e3:.1f} ms",
        f"{seconds / length * 1e6:.1f} us",
        f"{held / 2**20:.1f} MiB",
        f"{held / length / 1024:.1f} KiB",
        f"{row['scores'] / 2**20:,.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
