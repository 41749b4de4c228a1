"""What stands beside every speed: what a program is made of, and how far its logits are from eager PyTorch's.

print(receipt(program, eager_model, [codec.encode(text) for text in PROMPTS]))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .runtime.decode import Runnable, decode_one, prefill
from .runtime.kv_cache import KVCache

if TYPE_CHECKING:
    from .program import Program

STORY = (
    "The lighthouse keeper had counted ships for thirty years, and on the first of November he counted one too many. "
    "It came out of the fog without a light, turned once around the reef as if it read the water, and lay still. "
    "He wrote down the hour, the wind and the height of the tide, as he always did, and only then did he look again. "
)

PROMPTS = (
    "Hello",
    "What is the capital of France?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Une pomme, deux poires, trois",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    '{"name": "Ada", "born": 1815, "languages": [',
    "Q: Why is the sky blue?\nA:",
    STORY * 3,
)
"""Text of different kinds and lengths, from one token to a few hundred."""


@dataclass(frozen=True)
class Difference:
    """A greedy token that is not eager's. margin: by how much eager prefers its own over its second choice."""

    prompt: int
    position: int
    token: int
    eager_token: int
    margin: float

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt}, token {self.position}: {self.token}, eager {self.eager_token}"
            f" by a margin of {self.margin:.2e}"
        )


@dataclass(frozen=True)
class Agreement:
    """A program decoding greedily through its cache, beside eager PyTorch reading the same tokens at once.

    tokens: positions compared. agreeing: how many of the program's greedy tokens are eager's too; where all are, both
    would write the same text. max_logit_error: over all positions and the whole vocabulary. KL in nats, of the
    program's distribution from eager's.
    """

    prompts: int
    tokens: int
    agreeing: int
    max_logit_error: float
    max_kl: float
    mean_kl: float
    differences: tuple[Difference, ...] = ()

    @property
    def unexplained(self) -> list[Difference]:
        """Differences where eager's own two best tokens are further apart than the logit error."""
        return [difference for difference in self.differences if difference.margin >= self.max_logit_error]

    def __str__(self) -> str:
        lines = [
            f"greedy tokens equal to eager's: {self.agreeing} of {self.tokens}, over {self.prompts} prompts",
            f"max logit error {self.max_logit_error:.2e}, KL from eager at most {self.max_kl:.2e} nats",
        ]
        for difference in self.differences:
            excuse = "more than the logit error" if difference in self.unexplained else "within the logit error"
            lines.append(f"  {difference}, {excuse}")
        return "\n".join(lines)


@dataclass(frozen=True)
class GraphFacts:
    """One graph: ATen calls as traced, distinct kernels, kernel launches per run, and calls left to ATen."""

    name: str
    traced_calls: int
    kernels: int
    launches: int
    fallbacks: tuple[str, ...]


@dataclass(frozen=True)
class Receipt:
    """passes: (name, matches, seconds) in order."""

    passes: tuple[tuple[str, int, float], ...]
    graphs: tuple[GraphFacts, ...]
    agreement: Agreement

    @property
    def fallbacks(self) -> int:
        return sum(len(graph.fallbacks) for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        names = " and ".join(graph.name for graph in self.graphs)
        fired = ", ".join(f"{name} {matches}" for name, matches, _ in self.passes)
        left = [f"  {graph.name}: {call}" for graph in self.graphs for call in graph.fallbacks]
        return "\n".join(
            [f"passes: {fired}", str(self.agreement), f"ATen calls left in {names}: {self.fallbacks}", *left]
        )


def receipt(program: Program, reference: nn.Module, prompts: Iterable[Sequence[int]], new_tokens: int = 32) -> Receipt:
    """The receipt of a program beside the eager model that it was compiled from.

    reference: returns an object with `logits` [B, S, V]. prompts: token ids; each is continued by `new_tokens`.
    """
    summaries = {kind: program.built(kind).summary for kind in ("prefill", "decode")}
    graphs = tuple(
        GraphFacts(kind, summary.traced_calls, len(summary.kernels), summary.launches, summary.fallbacks)
        for kind, summary in summaries.items()
    )
    return Receipt(summaries["decode"].passes, graphs, agreement(program, reference, prompts, new_tokens))


@torch.no_grad()
def agreement(
    program: Runnable, reference: nn.Module, prompts: Iterable[Sequence[int]], new_tokens: int = 32
) -> Agreement:
    """Continue each prompt by `new_tokens` greedy tokens with the program and hold every step against eager."""
    count = agreeing = 0
    errors, divergences, differences = [], [], []
    for index, prompt in enumerate(prompts):
        tokens, found = greedy(program, torch.tensor([list(prompt)]), new_tokens)
        expected = reference(tokens[:, :-1], use_cache=False).logits[0, -new_tokens:].float()  # [new, V]
        written = tokens[0, -new_tokens:]
        errors.append((found - expected).abs().max().item())
        divergences.append(kl(expected, found))
        same = written == expected.argmax(-1)
        count, agreeing = count + new_tokens, agreeing + int(same.sum())
        best = expected.topk(2, dim=-1)
        for position in (~same).nonzero()[:, 0].tolist():
            margin = (best.values[position, 0] - best.values[position, 1]).item()
            differences.append(
                Difference(index, position, int(written[position]), int(best.indices[position, 0]), margin)
            )
    steps = torch.cat(divergences)
    return Agreement(
        prompts=len(errors),
        tokens=count,
        agreeing=agreeing,
        max_logit_error=max(errors),
        max_kl=steps.max().item(),
        mean_kl=steps.mean().item(),
        differences=tuple(differences),
    )


def greedy(program: Runnable, input_ids: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Decode greedily without stopping: ids [1, S] -> (ids [1, S + new], logits [new, V] that chose the new ones)."""
    cache = KVCache.allocate(program.config.cache_layout, 1, input_ids.shape[1] + new_tokens)
    logits = prefill(program, input_ids, None, cache)
    steps = [logits[0].float()]
    tokens = [logits.argmax(-1, keepdim=True)]
    for _ in range(new_tokens - 1):
        logits = decode_one(program, tokens[-1], cache)
        steps.append(logits[0].float())
        tokens.append(logits.argmax(-1, keepdim=True))
    return torch.cat([input_ids, *tokens], dim=1), torch.stack(steps)


def kl(expected: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(found) from softmax(expected), in nats: two [N, V] -> [N]."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)
