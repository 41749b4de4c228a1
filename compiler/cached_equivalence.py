"""Whether a graph with a KV cache gives the logits of the graph without one: both interpreted on a few tokens.

The graph without a cache reads all tokens at once; the one with a cache in two parts, or one by one where it takes one.
Slots of the cache that nothing was written to hold random numbers, which must not matter.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from . import interpret
from .equivalence import Checked, beyond_rounding, recipes_in_fp64
from .graph import Graph, sizes
from .samples import Sampler, shape_at, small_sizes
from .verify import VerificationError

LARGEST = 64 << 20
"""Bytes of weights above which a whole model is not run."""

GIVEN = {"input_ids", "position_ids", "past", "padding"}
"""The inputs of a graph with a cache that are understood here; padding [B] counts hidden tokens at the left."""

SPARE = 2
"""Slots of the cache that stay empty."""

SEED = 1


def check_cached(before: Graph, after: Graph, name: str) -> Checked:
    """Raise VerificationError where the logits of `after`, which has a cache, are not those of `before`."""
    reason = cannot_run(before, after)
    if reason is not None:
        return Checked(0, [f"{after.name}: {reason}"])
    bindings = small_sizes(before)
    sampler = Sampler(bindings, SEED).learn([*before.weights.values(), *after.weights.values()])
    inputs, visible = model_inputs(before, after, sampler)
    whole = {dtype: interpret.run(recipes_in_fp64(before, dtype), inputs, sampler, dtype=dtype)[0] for dtype in RUNS}
    steps = {dtype: by_parts(recipes_in_fp64(after, dtype), inputs, sampler, dtype) for dtype in RUNS}
    places = steps[None][0]
    seen = visible[:, places]
    (expected, found), (truth, exact) = ((whole[dtype][:, places][seen], steps[dtype][1][seen]) for dtype in RUNS)
    wrong, _ = beyond_rounding(expected, truth, found, exact, 0.0)
    if wrong is not None:
        numbers = " ".join(f"{symbol}={size}" for symbol, size in bindings.items())
        raise VerificationError(
            f"after {name}: graph {after.name}: expected the logits of the graph without a cache, found {wrong.what},"
            f" at sizes {numbers} and seed {SEED}"
        )
    return Checked(1)


def model_inputs(before: Graph, after: Graph, sampler: Sampler) -> tuple[dict[str, Any], Tensor]:
    """The inputs of the graph without a cache, and which tokens are no padding: bool [B, S]."""
    inputs = sampler.inputs(before)
    batch, length = inputs["input_ids"].shape
    padding = torch.arange(batch) % 2 if "padding" in after.inputs else torch.zeros(batch, dtype=torch.int64)
    visible = torch.arange(length) >= padding[:, None]
    given = {"attention_mask": visible.long(), "position_ids": (visible.cumsum(-1) - 1).clamp(min=0)}
    return inputs | {name: given[name] for name in before.inputs if name in given}, visible


RUNS = (None, torch.float64)
"""The precisions of a comparison: the graph's own, then fp64."""


def cannot_run(before: Graph, after: Graph) -> str | None:
    """Why the two graphs are not compared; None if they can be."""
    if unknown := sorted(set(after.inputs) - GIVEN):
        return f"its inputs {', '.join(unknown)} are not known here"
    weights = sum(recipe.nbytes for recipe in before.weights.values())
    if weights > LARGEST:
        return f"its weights have {weights >> 20} MB, a whole model of more than {LARGEST >> 20} MB is not run"
    return None


def by_parts(
    graph: Graph, inputs: dict[str, Any], sampler: Sampler, dtype: torch.dtype | None
) -> tuple[list[int], Tensor]:
    """The places of the tokens after which logits are given, and the logits, one part of the tokens after another."""
    ids = inputs["input_ids"]
    batch, length = ids.shape
    states = cache_of(graph, sampler, length + SPARE, dtype)
    padding = torch.arange(batch) % 2
    positions = inputs.get("position_ids", torch.zeros_like(ids))
    one_by_one = sizes(graph.placeholder("input_ids"))[1] == 1
    bounds = list(range(length + 1)) if one_by_one else [0, length // 2, length]
    places, logits = [], []
    for start, stop in itertools.pairwise(bounds):
        given = {
            "input_ids": ids[:, start:stop],
            "position_ids": positions[:, start:stop],
            "past": torch.full((batch,), start),
            "padding": padding,
        }
        given = {name: given[name] for name in graph.inputs}
        result = interpret.run(graph, given, sampler, states, dtype=dtype)[0]
        places += range(stop - result.shape[1], stop)
        logits.append(result)
    return places, torch.cat(logits, dim=1)


def cache_of(graph: Graph, sampler: Sampler, capacity: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A cache full of random numbers; its capacity is the one size that the sampler does not know."""
    states = {}
    for name in graph.states:
        value = graph.placeholder(name).meta["val"]
        unknown = {symbol for size in sizes(value) for symbol in size.free_symbols if symbol not in sampler.sizes}
        known = sampler.sizes | dict.fromkeys(unknown, capacity)
        states[name] = sampler.floats(name, shape_at(value, known), value.dtype).to(dtype or value.dtype)
    return states
