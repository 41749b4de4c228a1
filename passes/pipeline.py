"""The compiler as a list of passes: run in order, timed, counted, verified, and dumped when asked.

fused, report = run(graph)
fused, report = run(graph, ["normalize", "fuse_norm"], skip=["fuse_norm"], dump=Path("dump"))
print(report)
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..compiler.errors import InputError
from ..compiler.estimate import step_bytes
from ..compiler.files import refusals, write_atomically
from ..compiler.graph import Graph
from ..compiler.rewrite import Miss, PassResult
from ..compiler.schemes import Scheme
from ..compiler.show import count_ops, differences, show, show_differences
from ..compiler.verify import VerificationError
from ..compiler.verify import verify as verify_graph
from .cleanup import cleanup
from .fuse_activation import fuse_activation
from .fuse_attention import fuse_attention
from .fuse_experts import fuse_experts
from .fuse_linear import fuse_linear
from .fuse_mlp import fuse_mlp
from .fuse_moe import fuse_moe
from .fuse_norm import fuse_norm
from .fuse_rope import fuse_rope
from .materialize_kv import drop_padding, materialize_kv
from .normalize import normalize
from .quantize import quantize

if TYPE_CHECKING:
    from ..compiler.equivalence import Checked

VERIFY = "EFFC_VERIFY"
"""Environment variable: 1 has every pass checked for what it computes."""

Pass = Callable[[Graph], PassResult | Graph]
"""Mutates the graph it is given and says what it did, or returns another graph (its matches are the calls it added)."""

PASSES: tuple[Pass, ...] = (
    normalize,
    fuse_norm,
    fuse_rope,
    fuse_attention,
    fuse_activation,
    fuse_experts,
    fuse_moe,
    fuse_linear,
    fuse_mlp,
    cleanup,
)
"""From the traced graph to the fused graph `forward`."""


def quantized(passes: Iterable[Pass | str], scheme: Scheme | None) -> tuple[Pass | str, ...]:
    """The passes with `quantize` behind the fusions: before `cleanup`, or last."""
    passes = tuple(passes)
    if scheme is None:
        return passes
    at = next((i for i, item in enumerate(passes) if item in (cleanup, name_of(cleanup))), len(passes))
    return (*passes[:at], partial(quantize, scheme=scheme), *passes[at:])


UNPADDED: tuple[Pass, ...] = (drop_padding, fuse_attention, cleanup)
"""From `forward` to its form for calls without padding, in which more masks can be read."""


def cached(kind: str, ring: bool = False) -> tuple[Pass, ...]:
    """From `forward`, padded or not, to one of the graphs with a cache: "prefill", "extend" or "decode"."""
    return (partial(materialize_kv, kind=kind, ring=ring), cleanup)


@dataclass
class Step:
    """What one pass did. seconds: its own time, without verification and dumps. changes: calls that came or went.

    checked: what EFFC_VERIFY looked at, None where it is not set.
    """

    name: str
    seconds: float
    matches: int
    misses: list[Miss]
    changes: dict[str, int]
    nodes: int
    checked: Checked | None = None


@dataclass
class Report:
    """What a pipeline did to one graph, pass by pass; prints as a table."""

    graph: str
    nodes: int
    steps: list[Step] = field(default_factory=list)

    @property
    def matches(self) -> dict[str, int]:
        return {step.name: step.matches for step in self.steps}

    @property
    def misses(self) -> list[Miss]:
        return [miss for step in self.steps for miss in step.misses]

    def __str__(self) -> str:
        lines = [f"{'pass':16} {'ms':>7} {'matches':>7} {'misses':>6} {'nodes':>6}  calls that came and went"]
        lines.append(f"{'(' + self.graph + ')':16} {'':7} {'':7} {'':6} {self.nodes:6}")
        for step in self.steps:
            lines.append(
                f"{step.name:16} {step.seconds * 1e3:7.1f} {step.matches:7} {len(step.misses):6} {step.nodes:6}  "
                + show_differences(step.changes)
            )
        lines += [f"miss: {step.name}: {miss}" for step in self.steps for miss in step.misses]
        for step in self.steps:
            if step.checked is not None:
                lines.append(f"verified: {step.name}: {step.checked.changes} distinct changes")
                lines += [f"not verified: {step.name}: {what}" for what in step.checked.unchecked]
        return "\n".join(lines) + "\n"


def run(
    graph: Graph,
    passes: Iterable[Pass | str] = PASSES,
    *,
    skip: Iterable[str] = (),
    verify: bool = True,
    dump: Path | None = None,
) -> tuple[Graph, Report]:
    """A copy of `graph` after the passes, and what each did.

    passes: functions, or names of passes in `PASSES`. skip: names to leave out. verify: check the graph after each
    pass; with EFFC_VERIFY=1 in the environment, also that every value is what it was (`compiler/equivalence.py`).
    dump: a folder for the graph before and after each pass as numbered text files, with `index.txt`.
    Raises InputError for a name that no pass has, VerificationError where a pass leaves a broken or another graph.
    """
    passes = [find(item) for item in passes]
    skipped = set(skip)
    check_names(skipped, {name_of(function) for function in (*passes, *PASSES)})
    graph = graph.copy()
    report = Report(graph.name, sum(count_ops(graph).values()))
    dumps = Dumps(dump, graph) if dump else None
    for function in passes:
        if name_of(function) in skipped:
            continue
        graph, step = run_pass(graph, function, verify, dump)
        report.steps.append(step)
        if dumps:
            dumps.add(graph, step, report)
    return graph, report


def run_pass(graph: Graph, function: Pass, verify: bool, folder: Path | None = None) -> tuple[Graph, Step]:
    """The graph after one pass, and what that did. folder: for what shows a wrong value, a temporary one if None."""
    before = count_ops(graph)
    original = graph.copy() if verify and os.environ.get(VERIFY, "0") not in ("", "0") else None
    start = time.perf_counter()
    result = function(graph)
    seconds = time.perf_counter() - start
    made = result if isinstance(result, Graph) else None
    graph = made or graph
    after = count_ops(graph)
    changes = differences(before, after)
    if made is not None:
        result = PassResult(sum(count for count in changes.values() if count > 0))
    if verify:
        try:
            verify_graph(graph)
        except VerificationError as error:
            raise VerificationError(f"after {name_of(function)}: {error}") from error
    checked = None if original is None else check_values(original, graph, name_of(function), folder, result.inexact)
    misses = [miss.within(name_of(function), step_bytes(graph)) for miss in result.misses]
    step = Step(name_of(function), seconds, result.matches, misses, changes, sum(after.values()), checked)
    return graph, step


def check_values(before: Graph, after: Graph, name: str, folder: Path | None, inexact: str | None) -> Checked:
    """Hold a pass to keeping every value, or, where it made a cache, the logits. inexact: why it is let off."""
    from ..compiler.cached_equivalence import check_cached
    from ..compiler.equivalence import Checked, check

    if inexact is not None:
        return Checked(unchecked=[inexact])
    if after.dialect == "stateful" != before.dialect:
        return check_cached(before, after, name)
    return check(before, after, name, folder or Path(tempfile.gettempdir()) / "effc-verify")


def later(passes: Iterable[Pass], first: Iterable[Pass | str], skip: Iterable[str]) -> tuple[Pass, ...]:
    """The passes of a later stage without those that the first stage left out: not among `first`, or in `skip`."""
    kept = {item if isinstance(item, str) else name_of(item) for item in first} - set(skip)
    left_out = {name_of(function) for function in PASSES} - kept
    return tuple(function for function in passes if name_of(function) not in left_out)


def find(item: Pass | str) -> Pass:
    if not isinstance(item, str):
        return item
    by_name = {name_of(function): function for function in PASSES}
    check_names({item}, set(by_name))
    return by_name[item]


def name_of(function: Pass) -> str:
    """The name of a pass is that of its function, also where arguments are bound."""
    return getattr(function, "func", function).__name__


def check_names(names: set[str], known: set[str]) -> None:
    unknown = sorted(names - known)
    if unknown:
        raise InputError(f"expected names of passes ({', '.join(sorted(known))}), found {', '.join(unknown)}")


class Dumps:
    """`00_traced.txt`, `01_normalize.txt`, ... and `index.txt` in a folder."""

    def __init__(self, folder: Path, graph: Graph) -> None:
        self.folder = Path(folder)
        with refusals(self.folder):
            for old in (*self.folder.glob("[0-9][0-9]_*.txt"), self.folder / "index.txt"):
                old.unlink(missing_ok=True)
        self.files = [f"00_{graph.dialect}.txt"]
        self.write(self.files[0], show(graph))

    def add(self, graph: Graph, step: Step, report: Report) -> None:
        self.files.append(f"{len(self.files):02}_{step.name}.txt")
        self.write(self.files[-1], show(graph))
        lines = [f"{before} -> {after}" for before, after in zip(self.files, self.files[1:])]
        self.write("index.txt", f"{report}\nbefore -> after\n" + "\n".join(lines) + "\n")

    def write(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, text)
