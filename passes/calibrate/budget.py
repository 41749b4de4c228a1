"""Choose a format for each matrix under a budget of bits or of time: spend where it lessens the error most.

    sites x formats, each with a cost and an error  -->  one format a site, costs within the budget

Each site climbs the lower convex hull of its options; the step with the most error saved by cost goes first. What this
leaves above the least possible error is at most what the one step saves that did not fit (Sinha and Zoltners, 1979).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...compiler.errors import InputError


@dataclass(frozen=True)
class Option:
    """A format that a site can have. cost: in what the budget counts. error: of the whole model, sites add up."""

    format: str
    cost: float
    error: float


def parse_bits(text: str) -> float:
    """4.5 from "4.5bpw". Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*bpw", text.strip())
    if found is None or not float(found[1]):
        raise InputError(f'expected a budget in bits per weight, "4.5bpw", found {text!r}')
    return float(found[1])


def solve(options: Mapping[str, Sequence[Option]], budget: float, unit: str = "") -> dict[str, Option]:
    """One option for each site with a small sum of errors, and a sum of costs of at most `budget`.

    Raises InputError where even the cheapest cost more; says how much.
    """
    hulls = {site: convex_hull(found) for site, found in options.items()}
    chosen = {site: hull[0] for site, hull in hulls.items()}
    spent = sum(option.cost for option in chosen.values())
    if spent > budget:
        raise InputError(f"expected a budget of at least {spent:.4g}{unit}, found {budget:.4g}{unit}")
    steps = [step for site, hull in hulls.items() for step in next_step(site, hull, 0)]
    heapq.heapify(steps)
    while steps:
        _, site, index = heapq.heappop(steps)
        option = hulls[site][index]
        cost = option.cost - chosen[site].cost
        if spent + cost > budget:
            continue
        spent += cost
        chosen[site] = option
        for step in next_step(site, hulls[site], index):
            heapq.heappush(steps, step)
    return chosen


def next_step(site: str, hull: Sequence[Option], index: int) -> list[tuple[float, str, int]]:
    """The step beyond option `index`: minus the error that it saves by its cost, and where it leads."""
    if index + 1 == len(hull):
        return []
    before, after = hull[index : index + 2]
    return [((after.error - before.error) / (after.cost - before.cost), site, index + 1)]


def convex_hull(options: Sequence[Option]) -> list[Option]:
    """The options that cost more only where they err less, and save less by cost with each step; cheapest first."""
    if not options:
        raise InputError("expected at least one format for each site")
    hull: list[Option] = []
    for option in sorted(options, key=lambda found: (found.cost, found.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and slope(hull[-2], option) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def slope(before: Option, after: Option) -> float:
    return (after.error - before.error) / (after.cost - before.cost)
