"""What stands beside every speed: what a program is made of, and how far its logits are from eager PyTorch's.

print(receipt(program, eager_model, [codec.encode(text) for text in PROMPTS]))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .speed import CompiledEngine, Engine

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
    """An engine reading texts token by token through its cache, beside eager PyTorch reading them at once.

    tokens: positions compared. agreeing: how many of the engine's greedy choices are eager's too; where all are, both
    would write the same text. max_logit_error: over all positions and the whole vocabulary. KL in nats, of the
    engine's distribution from eager's.
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
            f"max logit error {self.max_logit_error:.2e},"
            f" KL from eager {self.mean_kl:.2e} nats, at most {self.max_kl:.2e}",
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
    """passes: (name, matches, seconds) in order. formats: of quantized weights and activations, none in fp32."""

    passes: tuple[tuple[str, int, float], ...]
    graphs: tuple[GraphFacts, ...]
    agreement: Agreement
    formats: tuple[str, ...] = ()

    @property
    def fallbacks(self) -> int:
        return sum(len(graph.fallbacks) for graph in self.graphs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        names = " and ".join(graph.name for graph in self.graphs)
        fired = ", ".join(f"{name} {matches}" for name, matches, _ in self.passes)
        left = [f"  {graph.name}: {call}" for graph in self.graphs for call in graph.fallbacks]
        computed = [f"computed in {', '.join(self.formats)}"] if self.formats else []
        return "\n".join(
            [f"passes: {fired}", *computed, str(self.agreement), f"ATen calls left in {names}: {self.fallbacks}", *left]
        )


def receipt(program: Program, reference: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int = 32) -> Receipt:
    """The receipt of a program beside the eager model that it was compiled from.

    reference: returns an object with `logits` [B, S, V]. prompts: token ids; each is continued by `new_tokens`.
    """
    summaries = {kind: program.built(kind).summary for kind in ("prefill", "decode")}
    graphs = tuple(
        GraphFacts(kind, summary.traced_calls, len(summary.kernels), summary.launches, summary.fallbacks)
        for kind, summary in summaries.items()
    )
    engine = CompiledEngine(program, max(map(len, prompts)) + new_tokens)
    texts = continued(engine, reference, prompts, new_tokens)
    summary = summaries["decode"]
    return Receipt(summary.passes, graphs, agreement(engine, texts), summary.formats)


@dataclass(frozen=True)
class Text:
    """A prompt and its continuation: ids [1, S + n], and eager's logits [n, V] before each of the n new tokens."""

    ids: Tensor
    expected: Tensor

    @property
    def new_tokens(self) -> int:
        return self.expected.shape[0]


@torch.no_grad()
def continued(
    engine: Engine, reference: nn.Module, prompts: Iterable[Sequence[int]], new_tokens: int = 32
) -> list[Text]:
    """Each prompt continued greedily by an engine, with what eager makes of the same tokens."""
    texts = []
    for prompt in prompts:
        ids = greedy(engine, torch.tensor([list(prompt)]), new_tokens)
        texts.append(Text(ids, reference(ids[:, :-1], use_cache=False).logits[0, -new_tokens:].float()))
    return texts


@torch.no_grad()
def agreement(engine: Engine, texts: Sequence[Text]) -> Agreement:
    """Read texts token by token with an engine, and hold every step against eager.

    On texts that it continued itself, its choices are the tokens that it wrote.
    """
    count = agreeing = 0
    errors, divergences, differences = [], [], []
    for index, text in enumerate(texts):
        found, expected = follow(engine, text), text.expected
        errors.append((found - expected).abs().max().item())
        divergences.append(kl(expected, found))
        chosen = found.argmax(-1)
        same = chosen == expected.argmax(-1)
        count, agreeing = count + text.new_tokens, agreeing + int(same.sum())
        best = expected.topk(2, dim=-1)
        for position in (~same).nonzero()[:, 0].tolist():
            margin = (best.values[position, 0] - best.values[position, 1]).item()
            differences.append(
                Difference(index, position, int(chosen[position]), int(best.indices[position, 0]), margin)
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


def greedy(engine: Engine, input_ids: Tensor, new_tokens: int) -> Tensor:
    """Continue greedily without stopping: ids [1, S] -> [1, S + new]."""
    tokens = [engine.prefill(input_ids).argmax(-1, keepdim=True)]
    for _ in range(new_tokens - 1):
        tokens.append(engine.decode(tokens[-1]).argmax(-1, keepdim=True))
    return torch.cat([input_ids, *tokens], dim=1)


def follow(engine: Engine, text: Text) -> Tensor:
    """Logits [n, V] before each new token of a text, the tokens before it read one at a time."""
    start = text.ids.shape[1] - text.new_tokens
    steps = [engine.prefill(text.ids[:, :start])]
    steps += [engine.decode(text.ids[:, place : place + 1]) for place in range(start, text.ids.shape[1] - 1)]
    return torch.cat(steps).float()


def kl(expected: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(found) from softmax(expected), in nats: two [N, V] -> [N]."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)
