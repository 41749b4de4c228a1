"""How much a model loses when one matrix is rounded: what mixed precision is chosen by.

The divergence from the model as it was is measured with each matrix alone in one coarse format. In another format it is
taken to be as much less as the squared error of the matrix's outputs is less, since the divergence is quadratic in
small errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...compiler.errors import InputError
from ...compiler.formats import Format
from ...compiler.graph import Graph
from ...compiler.weights import TensorSource
from .assignment import Assignment, Choice, Progress, no_progress
from .budget import Option, solve
from .layers import Inputs, Walk
from .quality import Reference, compare
from .rtn import round_clipped
from .sites import Site, find_sites
from .statistics import InputStatistics, relative_error

Cost = Callable[[Site, Format], float]


@dataclass(frozen=True)
class Sensitivity:
    """One site. kl: in nats, with this matrix alone in `coarse`, the first of the formats. errors: by format, mean
    squared error of its outputs by their mean square."""

    site: Site
    coarse: str
    kl: float
    errors: Mapping[str, float]

    def estimate(self, format: str) -> float:
        """The divergence with this matrix alone in `format`."""
        worst = self.errors[self.coarse]
        return self.kl * self.errors[format] / worst if worst else 0.0


def sensitivities(
    graph: Graph,
    source: TensorSource | None,
    texts: Sequence[Inputs],
    formats: Sequence[Format],
    progress: Progress = no_progress,
) -> list[Sensitivity]:
    """Every matrix that the formats can hold, alone and with searched clipping, on the texts.

    formats: the coarsest first. The texts are walked once; from each site on, what follows is computed once more.
    """
    if not formats:
        raise InputError("expected at least one format")
    reference = Reference(graph, source, texts)
    walk = Walk(graph, source, texts)
    found, sites = [], [site for site in find_sites(graph)[0] if fits(site, formats)]
    for index, site in enumerate(sites):
        statistics = InputStatistics.of(walk.values(site.x))
        weight = walk.weight(site.name).float()
        hessian = statistics.hessian.float()
        errors, coarse = {}, None
        for format in formats:
            rounded = Assignment(format, round_clipped(weight, hessian, format))
            errors[format.name] = relative_error(rounded.values(torch.float32), weight, hessian)
            coarse = coarse or rounded
        alone = walk if not site.shared else Walk(graph, source, texts)
        alone.assignments[site.name] = coarse
        found.append(Sensitivity(site, formats[0].name, compare(alone, reference).kl, errors))
        alone.assignments.clear()
        progress(index + 1, len(sites), site.name)
    return found


def fits(site: Site, formats: Sequence[Format]) -> bool:
    try:
        for format in formats:
            format.check_columns(site.columns)
    except InputError:
        return False
    return True


def choose_formats(
    found: Sequence[Sensitivity],
    formats: Sequence[Format],
    budget: float,
    cost: Cost | None = None,
    unit: str = " bits per weight",
) -> Choice:
    """The formats under a budget for all sites together: those that let the divergence grow least.

    cost: of a site in a format, in the budget's unit (measured milliseconds, say); without, bits per weight of all
    sites. Raises InputError where the smallest formats need more.
    """
    cost = cost or bits_among([entry.site for entry in found])
    options = {
        entry.site.name: [
            Option(format.name, cost(entry.site, format), entry.estimate(format.name)) for format in formats
        ]
        for entry in found
    }
    by_name = {format.name: format for format in formats}
    chosen = {site: by_name[option.format] for site, option in solve(options, budget, unit).items()}
    return lambda site: chosen.get(site.name)


def bits_among(sites: Sequence[Site]) -> Cost:
    """What a site adds to the bits per weight of `sites`."""
    weights = sum(site.numel for site in sites)
    return lambda site, format: format.bits(site.rows, site.columns) * site.numel / weights
