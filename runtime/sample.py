"""Choose the next token from logits: greedy, or by temperature, top-k, top-p, min-p and a repetition penalty.

The filters and their order are those of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p,
min-p. What differs: padding never counts as a repeated token, and top-k is off unless asked for.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .sampling_params import SamplingParams

SHORTLISTS = (64, 1024)
"""How many candidates top-p looks at before all: of 49,152, selecting 64 takes 0.05 ms, 1,024 0.2 ms, sorting 3 ms."""

NEVER = float("-inf")


class UniformStream:
    """Uniform numbers in [0, 1), one per row and step, that depend on the seed, the row and the step alone.

    Row r draws from a counter-based generator keyed by (seed, r) (Philox; Salmon et al., 2011), so a row's tokens do
    not change with the number of rows, with what the other rows hold, or with how many tokens were asked for.
    """

    BLOCK = 64

    def __init__(self, seed: int | None, batch: int, device: torch.device | str = "cpu") -> None:
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        self.seed = int(seed)
        self.device = torch.device(device)
        keys = ([self.seed, row] for row in range(batch))
        self.rows = [np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64))) for key in keys]
        self.block = torch.empty(0, batch)
        self.used = 0

    def next(self) -> Tensor:
        """The next number of every row: [B] float64."""
        if self.used == len(self.block):
            drawn = np.stack([row.random(self.BLOCK) for row in self.rows], axis=1)
            # One ulp below 1 at most, so that a number times a total stays below the total in float64.
            self.block = torch.from_numpy(drawn * (1 - 2.0**-52)).to(self.device)
            self.used = 0
        self.used += 1
        return self.block[self.used - 1]


def sample(
    logits: Tensor, params: SamplingParams, uniforms: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """Choose one token per row: logits [B, V] -> [B] int64.

    uniforms [B] float64 from `UniformStream.next` (greedy needs none); seen [B, V] bool, true for the tokens of the
    row so far (needed if `params.penalizes`). Greedy takes the first index of the largest logit.
    """
    if params.greedy:
        return penalize(logits, params, seen).argmax(-1)
    scores = filtered(logits, params, seen)
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def filtered(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """Scores whose softmax is the distribution that `sample` draws from: logits [B, V] -> [B, V], -inf where cut."""
    scores = penalize(logits, params, seen).float() / params.temperature
    if params.top_k:
        scores = keep_top_k(scores, params.top_k)
    if params.top_p < 1:
        scores = keep_top_p(scores, params.top_p)
    if params.min_p > 0:
        scores = keep_min_p(scores, params.min_p)
    return scores


def penalize(logits: Tensor, params: SamplingParams, seen: Tensor | None) -> Tensor:
    """Make the tokens that `seen` marks less likely (more likely if the penalty is below 1)."""
    if not params.penalizes:
        return logits
    penalty = params.repetition_penalty
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Cut every score [B, V] below the row's k-th largest; ties with it stay."""
    smallest = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < smallest, NEVER)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Cut every score [B, V] whose more probable tokens already hold a mass of p; the most probable always stays."""
    vocabulary = scores.shape[-1]
    log_total = scores.logsumexp(-1, keepdim=True)
    for size in (*SHORTLISTS, vocabulary):
        values, tokens = scores.topk(min(size, vocabulary))
        probabilities = (values - log_total).exp()
        before = probabilities.cumsum(-1) - probabilities
        if size >= vocabulary or bool((before[:, -1] >= p).all()):
            break
    before[:, 0] = 0
    kept = values.masked_fill(before >= p, NEVER)
    return torch.full_like(scores, NEVER).scatter(-1, tokens, kept)


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Cut every score [B, V] whose probability is below min_p times the row's largest."""
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(min_p), NEVER)
