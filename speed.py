"""How fast an engine reads a prompt and writes tokens, measured beside others on the same machine.

Engines take turns, several times, so that a change of the machine's mood meets them all; the median is told with
its spread, and so is the work of other processes meanwhile, which spoils the figures of threads that wait together.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .runtime.decode import Runnable, decode_one, prefill
from .runtime.kv_cache import reuse_or_allocate

DISTURBED = 0.15
"""Cores that other processes may use before a measurement counts as disturbed."""

WARM_UPS = 2
"""Runs that do not count: torch.compile compiles anew when it meets a cache that was used before."""


class Engine(Protocol):
    """A model that decodes one sequence."""

    name: str

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Forget what was before and read a prompt: [1, S] -> logits [1, V] after its last token."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Append one token: [1, 1] -> logits [1, V]."""


class CompiledEngine:
    """A compiled program. capacity: tokens that prompt and answer may have together."""

    def __init__(self, program: Runnable, capacity: int, name: str = "effc") -> None:
        self.name, self.program, self.capacity = name, program, capacity
        self.cache = None

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.cache = reuse_or_allocate(self.cache, self.program.config.cache_layout, 1, self.capacity)
        return prefill(self.program, input_ids, None, self.cache)

    def decode(self, tokens: Tensor) -> Tensor:
        return decode_one(self.program, tokens, self.cache)


class TransformersEngine:
    """A transformers model with its own cache: static of `capacity` tokens, or growing if that is None."""

    def __init__(self, model: nn.Module, capacity: int | None, name: str) -> None:
        self.name, self.model, self.capacity = name, model, capacity
        self.cache: Any = None

    def prefill(self, input_ids: Tensor) -> Tensor:
        from transformers import DynamicCache, StaticCache

        if self.capacity is None:
            self.cache = DynamicCache(config=self.model.config)
        elif self.cache is None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=self.capacity)
        else:
            self.cache.reset()
        return self.decode(input_ids)

    def decode(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]


@dataclass
class Speed:
    """Seconds of each repetition: to read the whole prompt, and per token written after the first."""

    name: str
    prompt_tokens: int
    new_tokens: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, median."""
        return self.prompt_tokens / statistics.median(self.prefill)

    @property
    def decode_rate(self) -> float:
        """Tokens per second while decoding, median."""
        return 1 / statistics.median(self.decode)

    def spread(self, phase: str) -> float:
        """(slowest - fastest) / median of "prefill" or "decode"."""
        seconds = getattr(self, phase)
        return (max(seconds) - min(seconds)) / statistics.median(seconds)


@dataclass
class Surroundings:
    """Cores that other processes used while something ran; None where the system does not tell."""

    others: float | None = None

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED

    def __str__(self) -> str:
        if self.others is None:
            return "the work of other processes is unknown here"
        if self.disturbed:
            return f"DISTURBED: other processes used {self.others:.1f} cores meanwhile, so the figures say little"
        return f"a quiet machine: other processes used {self.others:.2f} cores"


@contextmanager
def surroundings() -> Iterator[Surroundings]:
    """Watch what other processes do while the block runs; the result is filled in at its end."""
    found = Surroundings()
    start, busy, own = time.perf_counter(), machine_seconds(), own_seconds()
    yield found
    elapsed = time.perf_counter() - start
    end = machine_seconds()
    if busy is not None and end is not None and elapsed > 0:
        found.others = max(0.0, (end - busy) - (own_seconds() - own)) / elapsed


def machine_seconds() -> float | None:
    """CPU seconds that this machine's cores were busy, stolen ones included; None where /proc does not tell."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_memory(function: Callable[[], object]) -> int | None:
    """How many bytes more this process holds at most while a function runs; None where /proc does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be used first, unseen
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = process_bytes("VmRSS")
    except (OSError, AttributeError):
        return None
    function()
    return max(0, process_bytes("VmHWM") - before)


def process_bytes(key: str) -> int:
    """A line of /proc/self/status that counts memory."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(f"{key}:"))


@torch.no_grad()
def run_once(engine: Engine, input_ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Read a prompt [1, S] and write greedily: (seconds for the prompt, seconds per further token)."""
    start = time.perf_counter()
    token = engine.prefill(input_ids).argmax(-1, keepdim=True)
    read = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = engine.decode(token).argmax(-1, keepdim=True)
    return read - start, (time.perf_counter() - read) / (new_tokens - 1)


def compare(
    engines: Sequence[Engine],
    input_ids: Tensor,
    new_tokens: int,
    repeats: int,
    progress: Callable[[str], object] = lambda what: None,
) -> tuple[list[Speed], Surroundings]:
    """Time engines in turns on one prompt [1, S], after runs that do not count. new_tokens at least 2."""
    speeds = [Speed(engine.name, input_ids.shape[1], new_tokens) for engine in engines]
    for engine in engines:
        progress(f"warming up {engine.name}")
        for _ in range(WARM_UPS):
            run_once(engine, input_ids, min(4, new_tokens))
    with surroundings() as found:
        for repeat in range(repeats):
            for engine, speed in zip(engines, speeds):
                progress(f"measuring {engine.name}, {repeat + 1} of {repeats}")
                read, write = run_once(engine, input_ids, new_tokens)
                speed.prefill.append(read)
                speed.decode.append(write)
    return speeds, found


def best_of(name: str, speeds: Sequence[Speed]) -> Speed:
    """The speed of an engine that may be run in several ways: each phase in the way that does it fastest."""
    reading = min(speeds, key=lambda speed: statistics.median(speed.prefill))
    writing = min(speeds, key=lambda speed: statistics.median(speed.decode))
    return Speed(name, reading.prompt_tokens, reading.new_tokens, reading.prefill, writing.decode)
