"""Formats under a budget: never above it, and as good as the best choice but for one step."""

from __future__ import annotations

import itertools
import random

import pytest
from effc.compiler.errors import InputError
from effc.passes.calibrate.budget import Option, convex_hull, parse_bits, solve


def instance(seed: int, sites: int = 5, formats: int = 4) -> dict[str, list[Option]]:
    print(f"seed {seed}")
    numbers = random.Random(seed)
    return {
        f"site{index}": [Option(str(row), numbers.uniform(1, 9), numbers.expovariate(1)) for row in range(formats)]
        for index in range(sites)
    }


def totals(choice) -> tuple[float, float]:
    return sum(option.cost for option in choice), sum(option.error for option in choice)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_that_costs_a_step_less_is_better(seed):
    options = instance(seed)
    every = [totals(choice) for choice in itertools.product(*options.values())]
    step = max(abs(a.cost - b.cost) for found in options.values() for a, b in itertools.combinations(found, 2))
    for budget in (22.0, 27.0, 33.0):
        cost, error = totals(solve(options, budget).values())
        assert cost <= budget
        assert error <= min((error for cost, error in every if cost <= budget - step), default=float("inf")) + 1e-12


def test_a_budget_for_everything_gives_each_site_its_best():
    options = instance(1)
    chosen = solve(options, 1e9)
    assert {site: min(found, key=lambda option: option.error) for site, found in options.items()} == chosen


def test_the_site_that_matters_gets_the_bits():
    options = {
        "robust": [Option("int3", 3, 0.1), Option("int4", 4, 0.02), Option("int8", 8, 0.0)],
        "fragile": [Option("int3", 3, 9.0), Option("int4", 4, 2.0), Option("int8", 8, 0.01)],
    }
    assert {site: option.format for site, option in solve(options, 12).items()} == {"robust": "int4", "fragile": "int8"}


def test_options_that_never_pay_are_left_out():
    options = [Option("a", 1, 5), Option("b", 2, 4.9), Option("c", 3, 1), Option("d", 4, 2), Option("e", 1, 6)]
    assert [option.format for option in convex_hull(options)] == ["a", "c"]


def test_a_budget_that_is_too_small_says_what_is_needed():
    with pytest.raises(InputError, match=r"expected a budget of at least 4.25 bits, found 3 bits"):
        solve({"site": [Option("int4_g64", 4.25, 1.0)]}, 3.0, " bits")


def test_a_site_without_options_is_refused():
    with pytest.raises(InputError, match="at least one format"):
        solve({"site": []}, 3.0)


@pytest.mark.parametrize(("text", "bits"), [("4.5bpw", 4.5), ("3 bpw", 3.0), (" 4.bpw", 4.0)])
def test_a_budget_is_read(text, bits):
    assert parse_bits(text) == bits


@pytest.mark.parametrize("text", ["4.5", "bpw", "-1bpw", "0bpw", "4,5bpw", "nanbpw", "4.5 bits"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(InputError, match="bits per weight"):
        parse_bits(text)
