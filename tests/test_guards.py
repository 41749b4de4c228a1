"""Guard fuzzing: mutants of graphs that a rule matches are left alone, or rewritten to what computes the same.

The graphs are sampled from the rules' own patterns, so that a new rule is fuzzed as soon as it stands in its RULES.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from effc.compiler.equivalence import check
from effc.compiler.graph import Graph
from effc.compiler.masks import Masks
from effc.compiler.rewrite import Rule, rewrite
from effc.compiler.verify import verify
from effc.passes import fuse_activation, fuse_attention, fuse_linear, fuse_mlp, fuse_norm, fuse_rope
from torch import Tensor, nn

from .pass_checks import example, graph_of
from .pattern_samples import Mismatch, mutants, rebuild, sample

TRIALS = 3000
"""How often a sample is drawn before a rule counts as one that nothing matches."""

SHARE = 25
"""How many mutants of a graph `make test` looks at; the slow tests look at all."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Shape rules that refuse a mutant log what they refuse."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def attention_rule(name: str) -> Rule:
    """A rule of fuse_attention, whose masks belong to the graph that it is applied to."""
    pattern, build = fuse_attention.RULES[name]
    return Rule(f"attention from {name}", pattern, lambda match: build(Masks(match.graph), match))


RULES = {
    rule.name: rule
    for rule in (
        *fuse_norm.RULES,
        *fuse_rope.RULES,
        *fuse_linear.RULES,
        *fuse_mlp.RULES,
        *fuse_activation.RULES,
        attention_rule("sdpa"),
    )
    if rule.name not in ("permute", "rope without rest")  # both clean up: what they want around them is in no pattern
}


class WrittenAttention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * 0.25
        hidden = torch.arange(5) > torch.arange(5)[:, None]
        return (
            scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        )


def written_attention() -> Graph:
    graph = graph_of(WrittenAttention(), *(example(2, 4, 5, 16, seed=seed) for seed in range(3)))
    leaves = {node.name: torch.empty(2, 4, 5, 16) for node in graph.placeholders if node.name in "xyz"}
    return rebuild(graph.fx, leaves, [])


def equal_rows(graph: Graph) -> bool:
    """Whether x has rows of equal numbers (one each, perhaps expanded), of which a norm makes but their rounding."""
    return any(node.name == "x" and tuple(node.meta["val"].shape[-1:]) == (1,) for node in graph.placeholders)


def hold(rule: Rule, graph: Graph, share: int | None, seed: int) -> int:
    """Apply the rule to mutants of a graph that it matches; how many it matched. Raises where one computes another."""
    chosen = list(mutants(graph))
    if share is not None and len(chosen) > share:
        chosen = random.Random(seed).sample(chosen, share)
    matched = 0
    for label, make in chosen:
        try:
            mutant = make()
        except Mismatch:  # no graph that eager could run
            continue
        if rule in fuse_norm.RULES and equal_rows(mutant):
            continue
        before = mutant.copy()
        try:
            if not rewrite(mutant, (rule,)).matches:
                continue
            matched += 1
            verify(mutant)
            assert check(before, mutant, rule.name).unchecked == []
        except Exception as error:
            raise AssertionError(
                f"{rule.name}, seed {seed}, {label}: {error}\n{before}--- becomes ---\n{mutant}"
            ) from error
    return matched


@pytest.mark.parametrize("name", RULES)
def test_a_mutant_is_left_alone_or_computes_the_same(name):
    graph = sample(RULES[name], seed=1, trials=TRIALS)
    assert graph is not None, f"no graph that {name} matches was sampled from its pattern"
    assert hold(RULES[name], graph, SHARE, seed=1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("name", RULES)
def test_all_mutants_of_more_samples(name, seed):
    graph = sample(RULES[name], seed, TRIALS)
    assert graph is not None
    hold(RULES[name], graph, None, seed)


@pytest.mark.parametrize(("name", "make"), [("softmax", written_attention)])
def test_mutants_of_forms_that_are_followed_beyond_their_pattern(name: str, make: Callable[[], Graph]):
    rule = attention_rule(name)
    graph = make()
    assert rewrite(graph.copy(), (rule,)).matches == 1
    hold(rule, graph, 3 * SHARE, seed=1)
