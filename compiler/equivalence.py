"""Whether a pass kept what a graph computes: both graphs interpreted on small random values, change by change.

    check(before, after, "fuse_norm")       raises VerificationError at the first change that is none of rounding

Two claims are held. In fp64, where rounding is out of the way, old and new value agree. In the graph's own precision
the new value's error is at most twice the old one's, plus one ulp of the row's maximum. Equal changes (the layers of a
model) are looked at once, and no model file is read, so large models stay affordable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import interpret
from .errors import one_line
from .graph import Graph
from .regions import Change, Cutter, Kept, Region, changes, fingerprint
from .reproduce import write_script
from .rewrite import source_line
from .samples import Sampler, Sizes, small_sizes, traced_sizes, widened
from .verify import VerificationError
from .weights import Constant

EXACT = 1e-9
"""What two ways of computing one value in fp64 may differ by, relative to the largest of a row."""

EXACT_OF_TABLES = 1e-7
"""The same where a pass made a table of what the graph computes from constants: a table is rounded to fp32."""

SEEDS = 4
"""How many samples a change that seems to round wrongly is given: eager is now and then lucky in its rounding."""


class Wrong(NamedTuple):
    """What is wrong with a value. kind: "value", "rounding" (right in fp64) or "error"."""

    kind: str
    what: str


@dataclass(frozen=True)
class Difference:
    """How far a new value is off, what it may be off by, and at which sizes and seed."""

    wrong: Wrong
    sizes: dict[str, int]
    seed: int

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return f"{self.wrong.what}, at sizes {sizes or 'fixed'} and seed {self.seed}"


@dataclass
class Checked:
    """What the verification of one pass looked at: distinct changes, and those it could not run, with the reason."""

    changes: int = 0
    unchecked: list[str] = field(default_factory=list)


class CannotRun(Exception):
    """The graph before the pass runs at none of the sizes that were tried."""


def check(before: Graph, after: Graph, name: str, folder: Path | None = None) -> Checked:
    """Raise VerificationError at the first node that a pass gave another value.

    name: of the pass. folder: for a script with the two small graphs that differ; none is written without one.
    """
    samples = Samples(before, after)
    kept, result, seen = samples.kept, Checked(), set()
    for change in changes(before, after):
        nearest = samples.regions(change, kept.cut_above(change))
        key = fingerprint(*nearest, kept)
        if key in seen:
            continue
        seen.add(key)
        result.changes += 1
        try:
            if agrees(Pair.of(nearest), samples):
                continue
            pair, difference = smallest_difference(change, samples)
        except CannotRun as reason:
            result.unchecked.append(f"{change.new.name}: {reason}")
            continue
        if difference is not None:
            raise changed(before, change, name, difference, folder, pair, samples)
    return result


class Pair(NamedTuple):
    """The two graphs of one change, each with one output."""

    old: Graph
    new: Graph

    @classmethod
    def of(cls, regions: tuple[Region, Region]) -> Pair:
        return cls(*(region.build() for region in regions))


def agrees(pair: Pair, samples: Samples) -> bool:
    """Whether a change cut out as near as can be holds; if not, the numbers at the cuts may be to blame."""
    try:
        return compare(pair, samples) is None
    except CannotRun:
        return False


def smallest_difference(change: Change, samples: Samples) -> tuple[Pair, Difference | None]:
    """How a change differs with all that leads to it computed, and the graphs: cut again if they still show it."""
    whole = Pair.of(samples.regions(change, lambda node: False))
    difference = compare(whole, samples)
    if difference is None:
        return whole, None
    small = Pair.of(samples.regions(change, samples.kept.cut_above(change, known=False)))
    try:
        cut = compare(small, samples)
    except CannotRun:
        cut = None
    return (small, cut) if cut is not None and cut.wrong.kind == difference.wrong.kind else (whole, difference)


class Samples:
    """The values that a comparison is made on, by sizes and seed; what follows from inputs alone is computed once."""

    def __init__(self, before: Graph, after: Graph) -> None:
        self.before, self.kept = Cutter(before), Kept(before, after)
        self.after = Cutter(after)
        self.gone = set(before.inputs) - set(after.inputs)  # a pass may drop a mask that hides nothing
        self.weights = [*before.weights.values(), *after.weights.values()]
        self.choices = (small_sizes(before), traced_sizes(before))
        self.made: dict[tuple[int, ...], tuple[Sampler, dict[str, Any]]] = {}

    def at(self, sizes: Sizes, seed: int) -> tuple[Sampler, dict[str, Any]]:
        key = (*sizes.values(), seed)
        if key not in self.made:
            sampler = Sampler(sizes, seed).learn(self.weights)
            try:
                known = sampler.inputs(self.before.graph, self.gone) | self.follow(sampler)
            except Exception as error:
                raise CannotRun(one_line(error)) from error
            self.made[key] = sampler, known
        return self.made[key]

    def follow(self, sampler: Sampler) -> dict[str, Any]:
        """What the kept nodes that depend on no weight hold."""
        calls = [node for node in self.kept.known.values() if node.op == "call_function"]
        part = self.before.region(calls).build()
        values = interpret.run(part, sampler.inputs(part, self.gone), sampler, states_of(part, sampler))
        return {node.name: value for node, value in zip(calls, values)}

    def regions(self, change: Change, ends: Callable[[fx.Node], bool]) -> tuple[Region, Region]:
        return self.before.region([change.old], ends), self.after.region([change.new], ends)


def states_of(graph: Graph, sampler: Sampler) -> dict[str, Any]:
    return {name: sampler.placeholder(graph.placeholder(name)) for name in graph.states}


def compare(pair: Pair, samples: Samples) -> Difference | None:
    """How two graphs with one output differ beyond rounding, or None. Raises CannotRun if the old one cannot be run."""
    reasons = []
    for sizes in samples.choices:
        eager_error = 0.0
        try:
            for seed in range(SEEDS):
                sampler, known = samples.at(sizes, seed)
                wrong, eager_error = compare_once(pair, sampler, known, eager_error)
                if wrong is None:
                    return None
                if wrong.kind != "rounding":
                    break
        except CannotRun as reason:
            reasons.append(str(reason))
            continue
        return Difference(wrong, {str(symbol): size for symbol, size in sizes.items()}, seed)
    raise CannotRun("; ".join(dict.fromkeys(reasons)))


def compare_once(pair: Pair, sampler: Sampler, known: dict[str, Any], eager_error: float) -> tuple[Wrong | None, float]:
    """What is wrong on one sample (None if nothing is), and the largest error of the old graph so far."""
    try:
        expected, truth = values(pair.old, sampler, known), values(pair.old, sampler, known, torch.float64)
    except Exception as error:  # its own code may want other sizes
        raise CannotRun(one_line(error)) from error
    try:
        found, exact = values(pair.new, sampler, known), values(pair.new, sampler, known, torch.float64)
    except Exception as error:
        return Wrong("error", f"an error: {one_line(error)}"), eager_error
    if not len(expected) == len(truth) == len(found) == len(exact):
        return Wrong("error", f"{len(found)} values, {len(expected)} before"), eager_error
    limit = EXACT_OF_TABLES if has_new_table(pair) else EXACT
    for quadruple in zip(expected, truth, found, exact):
        wrong, eager_error = beyond_rounding(*quadruple, eager_error, limit)
        if wrong is not None:
            return wrong, eager_error
    return None, eager_error


def has_new_table(pair: Pair) -> bool:
    """Whether the new graph reads a floating-point constant that the old one does not."""
    known = {recipe.key() for recipe in pair.old.weights.values()}
    return any(
        isinstance(recipe, Constant) and recipe.dtype.is_floating_point and recipe.key() not in known
        for recipe in pair.new.weights.values()
    )


def values(graph: Graph, sampler: Sampler, known: dict[str, Any], dtype: torch.dtype | None = None) -> list[Any]:
    """The outputs of a region, flat."""
    given = inputs_of(graph, sampler, known)
    graph = recipes_in_fp64(graph, dtype)
    return pytree.tree_leaves(interpret.run(graph, given, sampler, states_of(graph, sampler), dtype=dtype))


def recipes_in_fp64(graph: Graph, dtype: torch.dtype | None) -> Graph:
    """The graph with weights that are computed in fp64, if `dtype` says so."""
    if dtype is None:
        return graph
    recipes = {name: widened(w) if w.dtype.is_floating_point else w for name, w in graph.weights.items()}
    return replace(graph, weights=recipes)


def inputs_of(graph: Graph, sampler: Sampler, known: dict[str, Any]) -> dict[str, Any]:
    """A value for each input of a region: what is known to stand there, or random numbers."""
    given = {}
    for node in graph.placeholders:
        if node.name in graph.inputs:
            value = known[node.name] if node.name in known else sampler.placeholder(node)
            given[node.name] = value.clone() if isinstance(value, Tensor) else value
    return given


def beyond_rounding(
    expected: Any, truth: Any, found: Any, exact: Any, eager_error: float, limit: float = EXACT
) -> tuple[Wrong | None, float]:
    """Why a new value is not the old one, or None; and the largest error of the old one so far.

    expected, truth: the old value in its own precision and in fp64; found, exact: the new one. limit: what the two may
    differ by in fp64, relative to the largest of a row.
    """
    if not isinstance(expected, Tensor):
        return (None if expected == found else Wrong("value", f"{found} instead of {expected}")), eager_error
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return Wrong("value", f"{describe(found)} instead of {describe(expected)}"), eager_error
    if not expected.dtype.is_floating_point:
        wrong = int((truth != exact).sum())
        return (Wrong("value", f"{wrong} of {exact.numel()} elements differ") if wrong else None), eager_error
    if not truth.numel():
        return None, eager_error
    finite = truth.isfinite()
    if not torch.equal(finite, exact.isfinite()) or not torch.equal(truth.isnan(), exact.isnan()):
        return Wrong("value", "NaN or infinity in other places"), eager_error
    truth, exact = truth.masked_fill(~finite, 0.0), exact.masked_fill(~finite, 0.0)
    largest = truth.abs().amax(-1, keepdim=True) if truth.ndim else truth.abs()
    off = (exact - truth).abs()
    if (off > limit * largest + torch.finfo(torch.float64).tiny).any():
        text = f"off by up to {off.max():.3g} in fp64, of values up to {largest.max():.3g}"
        return Wrong("value", text), eager_error
    if expected.dtype == torch.float64:  # its rounding cannot be told from that of the reference
        return None, eager_error
    precise = finite & expected.isfinite() & found.isfinite()
    error, error_before = (((x.double() - truth).abs() * precise).nan_to_num(0.0, 0.0, 0.0) for x in (found, expected))
    info = torch.finfo(expected.dtype)
    ulp = info.eps * torch.exp2(torch.floor(torch.log2(largest.clamp(min=info.tiny))))
    eager_error = max(eager_error, error_before.max().item())
    if (error > 2 * eager_error + ulp).any():
        return Wrong("rounding", f"rounding errors up to {error.max():.3g}, {eager_error:.3g} before"), eager_error
    return None, eager_error


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.dtype}{list(value.shape)}".removeprefix("torch.")


def changed(
    graph: Graph,
    change: Change,
    name: str,
    difference: Difference,
    folder: Path | None,
    pair: Pair,
    samples: Samples,
) -> VerificationError:
    """The error of a pass that changed a value; its script lies in `folder`."""
    node = change.new if change.new.op == "call_function" else change.old
    line = source_line(node) or source_line(change.old)
    op = node.target if node.op == "call_function" else node.op
    where = f"graph {graph.name}, node {node.name} ({op})" + (f" from {line}" if line else "")
    text = f"after {name}: {where}: expected the value that {change.old.name} had before, found {difference}"
    if folder is None:
        return VerificationError(text)
    sizes = next(sizes for sizes in samples.choices if {str(k): v for k, v in sizes.items()} == difference.sizes)
    sampler, known = samples.at(sizes, difference.seed)
    inputs = inputs_of(pair.old, sampler, known) | inputs_of(pair.new, sampler, known)
    path = write_script(folder / f"{name}_{node.name}.py", text, *pair, inputs, difference.seed)
    return VerificationError(f"{text}; python {path} shows it")
