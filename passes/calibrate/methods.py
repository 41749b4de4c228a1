"""Quantize a graph's linears by what they see of a text: the methods as a table, and what runs one of them.

    calibration = calibrate(graph, source, inputs_of(graph, rows), everywhere(find("int4_g128")), "gptq")
    calibration.graph         the graph, scales and rotations folded into its recipes; the same function
    calibration.assignments   weight placeholder --> its format and parts

First the graph is rewritten into one that loses less when it is rounded (`prepare`), then matrix after matrix is
rounded for the inputs that it sees, those of layers that are rounded already (`round`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...compiler.errors import InputError
from ...compiler.formats import Format
from ...compiler.graph import Graph
from ...compiler.rewrite import Miss, PassResult
from ...compiler.weights import TensorSource
from .assignment import Assignment, Choice, Progress, no_progress
from .awq import search_scaling
from .folds import Fold, apply_fold, find_folds
from .gptq import round_gptq
from .layers import Inputs, Walk
from .rotate import rotate
from .rtn import round_clipped, round_nearest
from .sites import find_sites
from .smoothquant import smoothing
from .statistics import InputStatistics, relative_error

Round = Callable[[Tensor, Tensor | None, Format], tuple[Tensor, ...]]
"""(weight [N, K], hessian [K, K] of its inputs if they are known, format) -> parts."""

Prepare = Callable[[Graph, TensorSource | None, Sequence[Inputs], Choice, Progress], PassResult]
"""Rewrites a graph into one that computes the same function."""


@dataclass(frozen=True)
class Method:
    """What is done to the graph, in order, how matrices are rounded, and whether that looks at their inputs."""

    prepare: tuple[Prepare, ...]
    round: Round
    measures: bool = True


@dataclass
class Calibration:
    """graph: with what was folded into its recipes. errors: per site, mean squared error of its outputs by their mean
    square, for the inputs that the rounded model gives it. misses: what was left alone, with the reason."""

    graph: Graph
    assignments: dict[str, Assignment] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)


def scale_by_awq(
    graph: Graph, source: TensorSource | None, texts: Sequence[Inputs], choice: Choice, progress: Progress = no_progress
) -> PassResult:
    """Fold AWQ's scales into the graph."""

    def scale(walk: Walk, fold: Fold) -> Tensor:
        chosen = [(walk.weight(site.name), choice(site)) for site in fold.sites if choice(site) is not None]
        return search_scaling(chosen, InputStatistics.of(walk.values(fold.x)), fold.tied).scale

    return scale_inputs(graph, source, texts, choice, progress, scale, "awq")


def scale_by_smoothquant(
    graph: Graph, source: TensorSource | None, texts: Sequence[Inputs], choice: Choice, progress: Progress = no_progress
) -> PassResult:
    """Fold SmoothQuant's scales into the graph."""

    def scale(walk: Walk, fold: Fold) -> Tensor:
        largest = torch.stack([x.reshape(-1, x.shape[-1]).abs().amax(0) for x in walk.values(fold.x)]).amax(0)
        return fold.tied(smoothing(torch.cat([walk.weight(site.name) for site in fold.sites]), largest))

    return scale_inputs(graph, source, texts, choice, progress, scale, "smoothquant")


def scale_inputs(
    graph: Graph,
    source: TensorSource | None,
    texts: Sequence[Inputs],
    choice: Choice,
    progress: Progress,
    scale: Callable[[Walk, Fold], Tensor],
    name: str,
) -> PassResult:
    """Divide the input of every fold that a format is chosen for by `scale` of it, found on the graph as it was."""
    found, misses = find_folds(graph)
    folds = [fold for fold in found if any(choice(site) is not None for site in fold.sites)]
    walk, scales = Walk(graph, source, texts), []
    for index, fold in enumerate(folds):
        walk.to(fold.x)
        scales.append(scale(walk, fold))
        progress(index + 1, len(folds), f"{name}: {fold.sites[0].name}")
    for fold, factor in zip(folds, scales):
        apply_fold(graph, fold, factor)
    return PassResult(len(folds), misses)


def rotate_stream(
    graph: Graph, source: TensorSource | None, texts: Sequence[Inputs], choice: Choice, progress: Progress = no_progress
) -> PassResult:
    """Rotate the residual stream; needs no text."""
    return rotate(graph)


METHODS: dict[str, Method] = {
    "rtn": Method((), round_nearest, measures=False),
    "clip": Method((), round_clipped),
    "awq": Method((scale_by_awq,), round_clipped),
    "gptq": Method((), round_gptq),
    "gptq-stored-order": Method((), partial(round_gptq, by_activation=False)),
    "awq+gptq": Method((scale_by_awq,), round_gptq),
    "smoothquant": Method((scale_by_smoothquant,), round_clipped),
    "rotate": Method((rotate_stream,), round_clipped),
    "rotate+gptq": Method((rotate_stream,), round_gptq),
}


def find_method(name: str) -> Method:
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def calibrate(
    graph: Graph,
    source: TensorSource | None,
    texts: Sequence[Inputs],
    choice: Choice,
    method: str = "gptq",
    progress: Progress = no_progress,
) -> Calibration:
    """A copy of a fused graph and the parts of every matrix that `choice` gives a format, by one of `METHODS`.

    texts: values for the graph's inputs, one entry a text (`inputs_of`). Memory beyond the parts: one matrix, its
    hessian, and of each text what is alive at one place of the graph. Raises InputError for an unknown method, for a
    matrix that its format cannot hold and for inputs that are not finite.
    """
    chosen = find_method(method)
    graph = graph.copy()
    misses = []
    for prepare in chosen.prepare:
        misses += prepare(graph, source, texts, choice, progress).misses
    calibration = round_sites(graph, source, texts, choice, chosen, progress)
    calibration.misses[:0] = misses
    return calibration


def round_sites(
    graph: Graph,
    source: TensorSource | None,
    texts: Sequence[Inputs],
    choice: Choice,
    method: Method,
    progress: Progress = no_progress,
) -> Calibration:
    """Round the matrices in the order of the graph, each for the inputs that those before it leave it.

    A matrix that something before its linear reads too (a tied embedding) is rounded first, without its inputs.
    """
    sites, misses = find_sites(graph)
    formats: Mapping[str, Format] = {site.name: format for site in sites if (format := choice(site)) is not None}
    sites = sorted((site for site in sites if site.name in formats), key=lambda site: not site.shared)
    calibration = Calibration(graph, misses=misses)
    walk = Walk(graph, source, texts, calibration.assignments)
    for index, site in enumerate(sites):
        format, weight = formats[site.name], walk.weight(site.name)
        measured = method.measures and not site.shared
        hessian = InputStatistics.of(walk.values(site.x)).hessian if measured else None
        assignment = Assignment(format, method.round(weight, hessian, format))
        if hessian is not None:
            calibration.errors[site.name] = relative_error(assignment.values(weight.dtype), weight, hessian)
        calibration.assignments[site.name] = walk.assignments[site.name] = assignment
        progress(index + 1, len(sites), site.name)
    return calibration
