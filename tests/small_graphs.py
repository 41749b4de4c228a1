"""One small graph for each pass: what it rewrites stands beside something that only looks like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from effc.compiler.formats import find
from effc.compiler.graph import Graph
from effc.compiler.trace import trace
from effc.passes import pipeline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .pass_checks import B, S, example, graph_of, randomize, token_inputs
from .test_fuse_moe import Mixture, softmax_first

K, N, HEADS = 16, 8, 2
VOCABULARY = 11
KEPT, WINDOW = 1, 2


class Small(NamedTuple):
    """A graph as a pass gets it. expected: its outputs, where those of the graph after the pass are to differ."""

    module: nn.Module
    graph: Graph
    inputs: dict[str, Tensor]
    expected: Sequence[Tensor] | None = None


class Function(nn.Module):
    """A function of a module with some parameters, and of tensors."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def of_tensors(
    function: Callable[..., Any], *inputs: Tensor, before: Sequence[str] = (), normalized: bool = True, **parts: Any
) -> Small:
    """The graph of a function of tensors x, y, z, behind the passes named `before`."""
    module = randomize(Function(function, **parts))
    graph = graph_of(module, *inputs, normalized=normalized)
    if before:
        graph = pipeline.run(graph, before)[0]
    return Small(module, graph, dict(zip("xyz", inputs)))


def linear(columns: int, rows: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias)


# --- tensors ---------------------------------------------------------------------------------------------------------


def spellings() -> Small:
    def function(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = x.view(*x.shape[:-1], HEADS, N).transpose(1, 2).contiguous()
        first, second = heads.float().chunk(2, dim=-1)
        squares = first * first + 0
        return torch.square(second) * 1.0 + squares.pow(2.0), x.clone()  # the caller may write to the copy of its x

    return of_tensors(function, example(B, S, K), normalized=False)


def norms() -> Small:
    def norm(m: Function, x: Tensor, dim: int) -> Tensor:
        wide = x.float()
        return m.weight * (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=True) + 1e-5)).to(x.dtype)

    def function(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm(m, x, -1), norm(m, -x, 1)

    return of_tensors(function, example(B, S, K), weight=nn.Parameter(torch.ones(K)))


def rotations() -> Small:
    def function(m: Function, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        heads = x.transpose(1, 2)
        low, high = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat((-high, low), -1) * sin, heads * cos + torch.cat((-low, high), -1) * sin

    return of_tensors(function, example(B, S, 3, N), example(B, S, N, seed=1))


def activations() -> Small:
    def function(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, shared = torch.sigmoid(x), torch.sigmoid(-x)
        return x * gate, -x * shared + shared

    return of_tensors(function, example(B, S, K))


def experts(before: Sequence[str] = ()) -> Small:
    def function(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.mixture(x), x.topk(2, largest=False)[1]

    return of_tensors(function, example(B, S, K), before=before, mixture=Mixture(softmax_first))


def mixtures() -> Small:
    return experts(["fuse_experts"])


def linears() -> Small:
    def function(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = m.q(x) + m.k(x)
        shared = m.o(hidden)
        return x + F.silu(m.up(x) + m.bias).repeat(1, 1, 2), F.relu(shared) + shared

    parts = {"q": linear(K, N, bias=True), "k": linear(K, N), "o": linear(N, K), "up": linear(K, N)}
    return of_tensors(function, example(B, S, K), bias=nn.Parameter(torch.ones(N)), **parts)


def gates() -> Small:
    def function(m: Function, x: Tensor) -> tuple[Tensor, ...]:
        shared = F.silu(m.q(x))
        return F.silu(m.gate(x)) * m.up(x), shared * m.k(x), shared

    parts = {name: linear(K, N) for name in ("gate", "up", "q", "k")}
    return of_tensors(function, example(B, S, K), before=["fuse_linear"], **parts)


def repeats() -> Small:
    def function(m: Function, x: Tensor) -> tuple[Tensor, ...]:
        x.exp()
        return x.cos() * x.cos().neg(), x.sin(), x.sin()  # the caller may write to one of the two

    return of_tensors(function, example(B, S, K), normalized=False)


def matrices() -> Small:
    def function(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.wide(x).exp(), m.narrow(x[..., :3]).exp()

    small = of_tensors(function, example(B, S, 32), before=["fuse_linear"], wide=linear(32, N), narrow=linear(3, N))
    x, (wide, narrow) = small.inputs["x"], (small.module.wide.weight, small.module.narrow.weight)
    rounded = find("int4_g32").dequantize(find("int4_g32").quantize(wide.data))
    return small._replace(expected=(F.linear(x, rounded).exp(), F.linear(x[..., :3], narrow.data).exp()))


# --- tokens ----------------------------------------------------------------------------------------------------------


def of_tokens(function: Callable[..., Tensor], before: Sequence[Any] = (), length: int = S) -> Small:
    """The graph of a model of tokens, x [B, S, K] in the middle, behind these passes; no key is hidden."""
    parts = {"embed": nn.Embedding(VOCABULARY, K), "places": nn.Embedding(32, K)}
    parts |= {"mix": linear(K, 3 * K), "head": linear(K, VOCABULARY)}
    module = randomize(Model(function, **parts))
    graph = pipeline.run(trace(module), ["normalize", *before])[0]
    inputs = {"input_ids": token_inputs(graph, VOCABULARY)["input_ids"][:, :length]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    empty = torch.zeros(B, dtype=torch.int64)
    return Small(module, graph, inputs | {"past": empty, "padding": empty})


class Model(Function):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.function(self, self.embed(input_ids), attention_mask))


def heads_of(m: Model, x: Tensor) -> list[Tensor]:
    return [part.unflatten(-1, (HEADS, N)).transpose(1, 2) for part in m.mix(x).chunk(3, dim=-1)]


def attend(m: Model, x: Tensor, allowed: Tensor) -> Tensor:
    return x + sdpa(*heads_of(m, x), attn_mask=allowed).transpose(1, 2).flatten(2)


def causal(mask: Tensor) -> Tensor:
    place = torch.arange(mask.shape[1])
    return (place[None, :] <= place[:, None])[None, None] & mask[:, None, None, :].bool()


def scores() -> Small:
    def function(m: Model, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = heads_of(m, x)
        products = q @ k.transpose(-1, -2) * N**-0.5
        weights = products.masked_fill(~causal(mask), torch.finfo(x.dtype).min).softmax(-1)
        return (weights @ v + products.softmax(-2) @ v).transpose(1, 2).flatten(2)

    small = of_tokens(function)
    small.inputs["attention_mask"][0, 2] = 0
    return small


def padded() -> Small:
    def function(m: Model, x: Tensor, mask: Tensor) -> Tensor:
        return attend(m, x * mask[:, :, None], causal(mask))

    return of_tokens(function, ["fuse_attention"])


def uncached() -> Small:
    def function(m: Model, x: Tensor, mask: Tensor) -> Tensor:
        x = x + m.places(mask.cumsum(1)) + m.places(torch.arange(mask.shape[1]))
        return attend(m, x, causal(mask))

    return of_tokens(function, ["fuse_attention"])


def one_token() -> Small:
    def function(m: Model, x: Tensor, mask: Tensor) -> Tensor:
        heads = x.unflatten(2, (HEADS, N)).transpose(1, 2)
        return heads.exp().transpose(1, 2).flatten(2) * mask.shape[1]

    return of_tokens(function, length=1)


def streamed() -> Small:
    """Beside attention to all that came before, attention that has a window already."""

    def sees(what: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def function(m: Model, x: Tensor, mask: Tensor) -> Tensor:
            key = torch.arange(mask.shape[1])
            distance = key[:, None] - key[None, :]
            before = distance >= 0
            return attend(m, attend(m, x, what(key, distance) & before), (distance < 3) & before)

        return function

    small = of_tokens(sees(lambda key, distance: distance >= 0), ["fuse_attention"])
    small.module.function = sees(lambda key, distance: (key < KEPT) | (distance < WINDOW))
    expected = small.module(small.inputs["input_ids"], small.inputs["attention_mask"])
    return small._replace(expected=(expected.detach(),))
