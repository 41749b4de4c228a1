"""Causal language models that nobody has named: compiled equal to eager, or refused with a sentence that tells why."""

from __future__ import annotations

import copy

import effc
import pytest
import torch
import transformers
from effc.compiler.errors import ModelError
from torch import Tensor, nn
from torch.nn import functional as F

from .families import eager_logits
from .tolerance import assert_close_to_reference

SIZE, HEADS, WORDS, LONGEST = 32, 4, 61, 40
SLOW = pytest.mark.slow


class Stranger(nn.Module):
    """Two layers of attention and MLP side by side, each normed behind, under a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(WORDS, SIZE)
        self.mix = nn.ModuleList(nn.Linear(SIZE, 3 * SIZE) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(2))
        self.requires_grad_(False).eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for mix, mlp, norm in zip(self.mix, self.mlp, self.norms):
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in mix(x).chunk(3, dim=-1))
            x = norm(x + self.attend(q, k, v).transpose(1, 2).flatten(2) + mlp(x).square().relu())
        return x @ self.words.weight.T

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class LearnedDistances(Stranger):
    """Attention with a learned bias for each distance and head, the far ones sharing one."""

    def __init__(self) -> None:
        super().__init__()
        self.distances = nn.Parameter(torch.randn(HEADS, 8), requires_grad=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        distance = (places[:, None] - places[None, :]).clamp(0, 7)
        scores = q @ k.mT / q.shape[-1] ** 0.5 + self.distances[:, distance]
        return scores.masked_fill(places[None, :] > places[:, None], float("-inf")).softmax(-1) @ v


class OwnPositions(Stranger):
    """Attention as PyTorch has it, on positions from a table that the model counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(LONGEST, SIZE)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = self.places(torch.arange(q.shape[2])).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        return F.scaled_dot_product_attention(q + places, k + places, v, is_causal=True, scale=0.25)


class LinearAttention(Stranger):
    """No softmax: a running sum of k v^T."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = (k.exp()[..., :, None] * v[..., None, :]).cumsum(2)
        return (q[..., None, :] @ state).squeeze(-2)


class Convolution(Stranger):
    """A convolution over the last three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(SIZE // HEADS, 1, 3), requires_grad=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        channels = F.pad(v.flatten(0, 1).mT, (2, 0))
        return F.conv1d(channels, self.filter, groups=SIZE // HEADS).mT.unflatten(0, (-1, HEADS))


def greedy(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


def check_logits(model: nn.Module, program: effc.Program, lengths: tuple[int, ...]) -> None:
    exact, eager_error = copy.deepcopy(model).double(), 0.0
    for length in lengths:
        seed = length
        print(f"seed {seed}")
        ids = torch.randint(0, WORDS, (2, length), generator=torch.Generator().manual_seed(seed))
        results = (program(ids), *(eager_logits(each, {"input_ids": ids}) for each in (model, exact)))
        eager_error = assert_close_to_reference(*results, label=f"length {length}", eager_error=eager_error)


def test_a_stranger_with_attention_is_compiled_whole() -> None:
    model = OwnPositions()
    program = effc.compile(model)
    check_logits(model, program, (17, 3))
    ids = torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(4))
    assert program.generate(ids, max_new_tokens=8).tolist() == greedy(model, ids, 8).tolist()


def mpt() -> nn.Module:
    """Its bias is as long as the smaller of text and table, and so is nothing else that the scores are added to."""
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64, max_seq_len=64)
    torch.manual_seed(0)
    return transformers.MptForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param(
            LearnedDistances,
            r"attention\w* .* from test_strangers\.py:\d+: .*the mask stays an operand: index: ",
            marks=SLOW,
        ),
        pytest.param(
            LinearAttention,
            r"cumsum\w* \(aten\.cumsum\.default\) from test_strangers\.py:\d+: .*over the tokens",
            marks=SLOW,
        ),
        (Convolution, r"\(aten\.[\w.]+\) from test_strangers\.py:\d+: "),
        pytest.param(mpt, r"modeling_mpt\.py:\d+: .*the mask stays an operand", marks=SLOW),
    ],
)
def test_a_stranger_that_cannot_be_cached_gives_logits_and_tells_why_it_has_no_cache(kind, reason) -> None:
    model = kind()
    program = effc.compile(model)
    check_logits(model, program, (17, 3))
    with pytest.raises(ModelError, match=reason) as error:
        program.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2)
    assert "\n" not in str(error.value)


SMALL = {
    "vocab_size": WORDS,
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
MIXED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
STRANGERS = {
    "Apertus": GROUPED,  # xIELU, norms of q and k
    "BioGpt": SMALL,  # learned positions that count what is visible
    "Cohere2": {**GROUPED, **MIXED},  # no rope where attention is full
    "DiffLlama": GROUPED,  # the difference of two attentions
    "GPTBigCode": {"vocab_size": WORDS, "n_embd": SIZE, "n_layer": 2, "n_head": HEADS, "n_positions": 64},
    "Nemotron": GROUPED,  # layer norm by weight + 1, squared ReLU
    "Persimmon": SMALL,  # one product for q, k and v, norms of q and k, partial rope
}
"""Classes of transformers that are in no table of families."""


@pytest.mark.slow
@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_from_transformers_equals_eager(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**STRANGERS[name], initializer_range=0.2, pad_token_id=0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    program = effc.compile(model)
    check_logits(model, program, (17, 3))
    ids = torch.randint(1, WORDS, (2, 7), generator=torch.Generator().manual_seed(4))
    found = program.generate(ids, max_new_tokens=8, ignore_eos=True)
    for _ in range(8):
        ids = torch.cat((ids, eager_logits(model, {"input_ids": ids})[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert found.tolist() == ids.tolist()
    assert not program.built("decode").summary.fallbacks
