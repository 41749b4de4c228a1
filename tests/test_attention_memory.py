"""The memory of attention grows with the length, not with its square: measured, for the kernel and for a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effc.speed import peak_memory
from torch import Tensor

from .graphs import Compiled, random

effc = torch.ops.effc
ROOT = Path(__file__).parents[1]

LONG = 8192
SQUARE = LONG * LONG
"""Bytes of one byte for each query and key: what no attention here may hold."""


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
    return (
        effc.attention(q, k, v, 0.25, True, window=64, softcap=30.0, sinks=sinks),
        effc.attention(q, k, v, 0.25, True, bias="t0[h] * (k - q)", visible="(k < 9) | (k % 7 == 0)", tables=[slopes]),
    )


def operands(length: int) -> dict[str, Tensor]:
    tensors = {name: random(1, 1, length, 16, seed=seed) for seed, name in enumerate("qkv")}
    return {**tensors, "sinks": torch.zeros(1), "slopes": torch.ones(1)}


def test_attention_of_a_long_prompt_holds_no_scores() -> None:
    compiled = Compiled(attention, operands(16), dict.fromkeys("qkv", (2,)))
    assert not compiled.fallbacks
    compiled(**operands(64))
    tensors = operands(LONG)
    held = peak_memory(lambda: compiled(**tensors))
    if held is None:
        pytest.skip("this system does not tell how much memory a process holds")
    assert held < SQUARE / 16, f"{held / 2**20:.1f} MiB"


@pytest.mark.slow
def test_prefill_of_a_long_prompt_takes_memory_in_proportion() -> None:
    command = [sys.executable, str(ROOT / "bench" / "attention_length.py"), "--json", "--repeats", "1"]
    command += ["--kinds", "window,softcap", "--lengths", f"{LONG // 2},{LONG}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for kind, (half, whole) in json.loads(done.stdout)["rows"].items():
        assert whole["held"] < SQUARE, f"{kind}: {whole['held'] / 2**20:.1f} MiB"
        assert whole["held"] < 2.5 * half["held"], f"{kind}: {half['held']} bytes at half the length"
