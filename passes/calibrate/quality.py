"""What rounding costs: perplexity on held-out text, KL from the model as it was, and equal greedy tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.graph import Graph
from ...compiler.weights import TensorSource
from .assignment import Assignment
from .layers import Inputs, Walk
from .sites import find_sites


@dataclass(frozen=True)
class Quality:
    """A model on held-out text, each position given the true text before it.

    tokens: positions. nll: mean negative log-likelihood of the true next token, nats. kl: mean divergence of the
    distribution from the reference's, nats; kl_p99 the value that 99 of 100 positions stay below. agreement: part of
    the positions whose most likely token is the reference's.
    """

    tokens: int
    nll: float
    kl: float
    kl_p99: float
    agreement: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


class Reference:
    """The model as it was, on the held-out texts: kept up to its last linear, so that logits are made when needed."""

    def __init__(self, graph: Graph, source: TensorSource | None, texts: Sequence[Inputs]) -> None:
        self.texts = texts
        self.walk = Walk(graph, source, texts)
        sites = find_sites(graph)[0]
        if sites:
            self.walk.to(sites[-1].x)

    def quality(self) -> Quality:
        """Of the reference itself."""
        return compare(self.walk, self)

    def measure(
        self, graph: Graph, source: TensorSource | None, assignments: Mapping[str, Assignment] | None = None
    ) -> Quality:
        """Of another graph for the same inputs, with some of its matrices rounded."""
        return compare(Walk(graph, source, self.texts, assignments), self)


def compare(walk: Walk, reference: Reference) -> Quality:
    losses, divergences, equal = [], [], []
    for text, found, expected in zip(reference.texts, walk.outputs(), reference.walk.outputs()):
        q, p = (logits[:, :-1].float().log_softmax(-1) for logits in (found, expected))
        losses.append(-q.gather(-1, text["input_ids"][:, 1:, None]).flatten())
        divergences.append((p.exp() * (p - q)).sum(-1).flatten())
        equal.append((p.argmax(-1) == q.argmax(-1)).flatten())
    loss, divergence, same = map(torch.cat, (losses, divergences, equal))
    return Quality(
        tokens=len(loss),
        nll=mean(loss),
        kl=max(mean(divergence), 0.0),
        kl_p99=max(divergence.double().quantile(0.99).item(), 0.0),
        agreement=mean(same),
    )


def mean(values: Tensor) -> float:
    return values.double().mean().item()
