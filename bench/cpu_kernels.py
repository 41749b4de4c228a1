"""Triton kernels on the CPU beside PyTorch: one table, for the machine as it is and for AVX2 on both sides.

Each row is one kernel, compiled by effc and run as a step of its programs runs, beside the fastest of several ways to
do the same in eager PyTorch. They take turns. The receipt is the largest error against fp64 and eager's own. Each
instruction set has a process of its own, since libraries choose theirs when they are loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import measure
import torch
from bandwidth import multiply_add_peak, read_bandwidth
from effc.speed import surroundings
from kernels.case import Case, Function
from torch import Tensor

MODULES = ("elementwise", "attention", "matmul", "gemv", "launch")
HELD_TO_AVX2 = {
    "EFFC_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
ISAS: dict[str, dict[str, str]] = {"native": {}, "avx2": HELD_TO_AVX2}
BATCH = 2e-3
"""Seconds that one turn of a function takes at least: calls are repeated to fill it."""
PATIENCE = 1.0
"""Seconds that a function's turns take about: what takes longer has fewer, three at least. A way to do it in PyTorch
whose first call takes longer, and ten times as long as the best, is left out."""


@dataclass
class Times:
    """Seconds per call, one entry per turn."""

    name: str
    calls: int
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(third quartile - first) / median: a turn that lost its core does not count."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return (third - first) / self.median


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench/cpu_kernels.py", description=__doc__.split("\n\n")[0])
    found.add_argument(
        "--only", default="", metavar="TEXT", help="only rows whose kernel or shape contains one of these (a,b)"
    )
    found.add_argument("--module", choices=MODULES, help="only this module of kernels")
    found.add_argument("--isa", choices=tuple(ISAS), help="only this part of the table")
    found.add_argument("--turns", type=int, default=15, metavar="N", help="turns of each side")
    found.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of both sides")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--save", action="store_true", help="write the result to bench/results, as JSON and Markdown")
    found.add_argument("--build", action="store_true", help="compile the kernels into the cache and measure nothing")
    found.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return found


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.child:
        torch.set_num_threads(options.threads)
        print(json.dumps(run(options)))
        return 0
    parts = {isa: part(isa, arguments) for isa in ISAS if options.isa in (None, isa)}
    if options.build:
        return 0
    result = {
        **measure.head(options.threads),
        "turns": options.turns,
        "parts": parts,
    }
    measure.report(result, markdown(result), "cpu_kernels", as_json=options.json, save=options.save)
    return 0


def part(isa: str, arguments: list[str]) -> dict[str, Any]:
    """The rows of one instruction set, measured by a process that sees no other."""
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, env={**os.environ, **ISAS[isa]}, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the process for {isa} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen rows in this process."""
    wanted = [word for word in options.only.split(",") if word]
    rows = []
    repeats = 1 if options.build else 12
    bandwidth, peak = read_bandwidth(repeats=repeats), multiply_add_peak(repeats=repeats)
    with torch.inference_mode(), surroundings() as around:
        for make in case_makers(options.module):
            for case in make():
                if not wanted or any(word in f"{case.kernel}, {case.shape}" for word in wanted):
                    say(f"{case.kernel}, {case.shape}")
                    if not options.build:
                        rows.append(row(case, options.turns))
    say("")
    return {
        "surroundings": str(around),
        "others_cores": around.others,
        "read_bandwidth": bandwidth,
        "multiply_add_peak": peak,
        "rows": rows,
    }


def case_makers(only: str | None) -> list[Callable[[], list[Case]]]:
    """`cases` of each module of kernels that is there."""
    here = Path(__file__).parent / "kernels"
    names = [name for name in MODULES if (only is None or name == only) and (here / f"{name}.py").exists()]
    return [import_module(f"kernels.{name}").cases for name in names]


def row(case: Case, turns: int) -> dict[str, Any]:
    """Everything the table says of a case."""
    if case.measure is not None:
        ours, theirs = Times("effc", 1, [case.measure()]), []
    else:
        ours, *theirs = take_turns({"effc": case.effc, **case.baselines, **case.aside}, turns)
    entries = [asdict(t) | {"median": t.median / case.per, "spread": t.spread} for t in theirs]
    found = {
        "kernel": case.kernel,
        "shape": case.shape,
        "effc": asdict(ours) | {"median": ours.median / case.per, "spread": ours.spread},
        "baselines": entries[: len(case.baselines)],
        "aside": entries[len(case.baselines) :],
        "goal": asdict(case.goal) if case.goal else None,
        "moved": case.moved,
        "flops": case.flops,
        "notes": case.notes,
    }
    if case.exact is not None:
        exact = case.exact()
        found["error"] = error(case.effc(), exact)
        if case.baselines:
            others = (function() for function in (case.baselines | case.aside).values())
            if (theirs := next((other for other in others if isinstance(other, Tensor)), None)) is not None:
                found["eager_error"] = error(theirs, exact)
    return found


def take_turns(functions: dict[str, Function], turns: int) -> list[Times]:
    """Time functions one after the other, `turns` times, each long enough to be timed."""
    first = {name: timed(function) for name, function in functions.items()}
    functions = {name: f for name, f in functions.items() if first[name] < max(PATIENCE, 10 * min(first.values()))}
    found = [Times(name, calls_per_turn(function)) for name, function in functions.items()]
    slowest = max(timed(function) for function in functions.values())
    for _ in range(max(3, min(turns, round(PATIENCE / slowest)))):
        for times, function in zip(found, functions.values(), strict=True):
            function()
            start = time.perf_counter()
            for _ in range(times.calls):
                function()
            times.seconds.append((time.perf_counter() - start) / times.calls)
    return found


def calls_per_turn(function: Function) -> int:
    first = timed(function)
    best = first if first > 100 * BATCH else min(timed(function) for _ in range(3))
    return max(1, round(BATCH / best))


def timed(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def error(got: Tensor, exact: Tensor) -> float:
    """The largest absolute difference."""
    return (got.double() - exact.double()).abs().max().item()


def best(found: dict[str, Any]) -> dict[str, Any] | None:
    return min(found["baselines"], key=lambda times: times["median"], default=None)


def reached(found: dict[str, Any], bandwidth: float) -> float | None:
    """What the goal of a row counts: times the baseline, share of bandwidth, or seconds."""
    if found["goal"] is None:
        return None
    seconds, other = found["effc"]["median"], best(found)
    if found["goal"]["of"] == "baseline":
        return other["median"] / seconds if other else None
    return found["moved"] / seconds / bandwidth if found["goal"]["of"] == "bandwidth" else seconds


def verdict(found: dict[str, Any], bandwidth: float) -> str:
    value, goal = reached(found, bandwidth), found["goal"]
    if value is None:
        return ""
    below = goal["of"] == "seconds"
    met = value <= goal["value"] if below else value >= goal["value"]
    bound = (
        f"<= {clock(goal['value'])}" if below else f">= {goal['value']:.2f}{'x' if goal['of'] == 'baseline' else ''}"
    )
    return f"{bound} {'yes' if met else '**no**'}"


def clock(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 0.1
        else f"{seconds * 1e3:.2f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.2f} us"
    )


def markdown(result: dict[str, Any]) -> str:
    """The result as a page: what ran where, and one table per instruction set."""
    machine = result["machine"]
    lines = [
        f"Triton kernels on the CPU beside PyTorch: {result['threads']} threads, {result['turns']} turns,"
        " median (interquartile range)",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; {machine['compiler']}; commit {result['commit']},"
        f" {result['date'][:10]}; " + ", ".join(f"{name} {found}" for name, found in result["versions"].items()),
    ]
    for isa, measured in result["parts"].items():
        bandwidth = measured["read_bandwidth"]
        title = "as the machine is" if isa == "native" else "both sides held to AVX2"
        lines += [
            "",
            f"**{title}**: read bandwidth {bandwidth / 1e9:.1f} GB/s, fp32 multiply-adds"
            f" {measured['multiply_add_peak'] / 1e9:.0f} GFLOP/s; {measured['surroundings']}",
            "",
            "| kernel | shape | effc | PyTorch | its way | ratio | goal | GB/s | GFLOP/s | error | eager's |",
            "|---|---|--:|--:|---|--:|---|--:|--:|--:|--:|",
            *(table_row(found, bandwidth) for found in measured["rows"]),
            "",
            *(note for found in measured["rows"] for note in table_notes(found)),
        ]
    return "\n".join(lines)


def table_row(found: dict[str, Any], bandwidth: float) -> str:
    ours, other = found["effc"], best(found)
    seconds = ours["median"]
    rate = (
        f"{found['moved'] / seconds / 1e9:.1f} ({found['moved'] / seconds / bandwidth:.0%})" if found["moved"] else ""
    )
    cells = [
        found["kernel"],
        found["shape"],
        f"{clock(seconds)} ({ours['spread']:.0%})",
        f"{clock(other['median'])} ({other['spread']:.0%})" if other else "",
        other["name"] if other else "",
        f"{other['median'] / seconds:.2f}x" if other else "",
        verdict(found, bandwidth),
        rate,
        f"{found['flops'] / seconds / 1e9:.0f}" if found["flops"] else "",
        *(f"{found[key]:.1e}" if key in found else "" for key in ("error", "eager_error")),
    ]
    return f"| {' | '.join(cells)} |"


def table_notes(found: dict[str, Any]) -> list[str]:
    """Lines below the table."""
    texts = [found["notes"]] if found["notes"] else []
    texts += [f"{times['name']}: {clock(times['median'])} ({times['spread']:.0%})" for times in found["aside"]]
    return [f"- {found['kernel']}, {found['shape']}: {text}" for text in texts]


def say(what: str) -> None:
    """One line of progress, on a terminal, over the one before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
