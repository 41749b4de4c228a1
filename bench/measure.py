"""What a benchmark says of the machine that it ran on: its processor, its read bandwidth, and which code it was."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from effc.codegen.cpu.target import host_target

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "llama-cpp-python")
VECTOR_FLAGS = re.compile(r"avx\w*|fma|f16c|amx\w*|asimd\w*|sve\w*|i8mm|bf16")


def head(threads: int) -> dict[str, Any]:
    """What every result starts with: when, which code, on which machine, beside what, with how many threads."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "threads": threads,
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system; nothing that tells whose machine it is."""
    target = host_target()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "vector_flags": vector_flags(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "compiler": target.cxx_version,
        "isa": target.isa,
    }


def cpu_info(key: str) -> str:
    """The first value of a key of /proc/cpuinfo; empty where there is none."""
    try:
        found = re.search(rf"^{key}\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def cpu_model() -> str:
    return cpu_info("model name") or platform.processor() or platform.machine()


def vector_flags() -> list[str]:
    flags = (cpu_info("flags") or cpu_info("Features")).split()
    return sorted(flag for flag in flags if VECTOR_FLAGS.fullmatch(flag))


def versions() -> dict[str, str]:
    """Versions of what is compared; what is not installed is left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, with `-dirty` where files differ from it; "unknown" outside of a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def report(result: dict[str, Any], text: str, name: str, *, as_json: bool, save: bool) -> None:
    """Print a result, as `text` or as JSON; with `save`, write both under `bench/results/`.

    result: with "date" and "commit", which the files are named after.
    """
    print(json.dumps(result, indent=2) if as_json else text)
    if save:
        RESULTS.mkdir(exist_ok=True)
        stem = f"{name}-{result['date'][:10]}-{result['commit']}"
        (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / f"{stem}.md").write_text(text + "\n")


def read_bandwidth(megabytes: int = 512, repeats: int = 40) -> float:
    """Bytes per second at which torch's threads read memory: the best of several sums over a large tensor."""
    values = torch.ones(megabytes * 2**20 // 4)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best
