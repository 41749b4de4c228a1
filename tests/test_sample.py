"""Sampling agrees with transformers' own processors, and is reproducible row by row."""

import math

import pytest
import torch
from effc.compiler.errors import InputError
from effc.runtime.sample import NEVER, UniformStream, filtered, sample
from effc.runtime.sampling_params import SamplingParams
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.95},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "top_k": 200, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 0.8},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-9},
]


def processors(temperature, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) -> LogitsProcessorList:
    """What transformers' `generate` would apply, in its order."""
    chain = LogitsProcessorList()
    if repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        chain.append(MinPLogitsWarper(min_p))
    return chain


@pytest.mark.parametrize("vocabulary", [50, 5000])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_filters_equal_those_of_transformers(setting, vocabulary):
    seed = 11
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, vocabulary, generator=generator) * 3
    history = torch.randint(vocabulary, (6, 12), generator=generator)
    seen = torch.zeros(6, vocabulary, dtype=torch.bool).scatter_(1, history, True)

    expected = processors(**setting)(history, logits.clone()).softmax(-1)
    found = filtered(logits, SamplingParams(**setting), seen).softmax(-1)

    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_flat_distribution_needs_more_than_the_shortlist():
    logits = torch.linspace(0, 0.01, 4000)[None]
    kept = filtered(logits, SamplingParams(1.0, top_p=0.9)) > NEVER
    assert abs(int(kept.sum()) - 3600) < 10
    assert bool(kept[0, -3500:].all())


def test_ties_at_the_k_th_place_stay():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    assert (filtered(logits, SamplingParams(1.0, top_k=2)) > NEVER).tolist() == [[True, False, True, True, False]]


def test_greedy_takes_the_first_of_equal_logits():
    logits = torch.tensor([[0.0, 5.0, 5.0], [7.0, 7.0, 1.0]])
    assert sample(logits, SamplingParams()).tolist() == [1, 0]


def test_greedy_with_repetition_penalty_leaves_a_seen_token():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert sample(logits, SamplingParams(repetition_penalty=1.2), seen=seen).tolist() == [1]
    negative = torch.tensor([[-1.0, -1.1]])
    assert sample(negative, SamplingParams(repetition_penalty=1.2), seen=seen[:, :2]).tolist() == [1]


def test_frequencies_follow_the_distribution():
    seed = 5
    print("seed", seed)
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log()[None].expand(512, 4)
    stream, params = UniformStream(seed, 512), SamplingParams(1.0)
    draws = torch.cat([sample(logits, params, stream.next()) for _ in range(100)])
    frequencies = draws.bincount(minlength=4) / len(draws)
    assert (frequencies - probabilities).abs().max() < 4 * math.sqrt(0.25 / len(draws))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-52])
def test_cut_tokens_are_never_drawn(uniform):
    logits = torch.tensor([[NEVER, 0.0, NEVER, 0.1, NEVER]])
    drawn = sample(logits, SamplingParams(1.0), torch.tensor([uniform], dtype=torch.float64))
    assert drawn.item() == (1 if uniform == 0 else 3)


def test_half_precision_logits_are_filtered_in_fp32():
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    params = SamplingParams(0.7, top_p=0.9)
    assert torch.equal(filtered(logits, params), filtered(logits.float(), params))


def test_same_seed_gives_the_same_numbers_and_another_seed_others():
    def draw(seed):
        stream = UniformStream(seed, 3)
        return torch.stack([stream.next() for _ in range(200)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(None), draw(None))
    assert draw(2**64 - 1).min() >= 0
    assert draw(0).max() < 1


def test_a_row_draws_the_same_numbers_in_any_batch():
    alone, together = UniformStream(9, 1), UniformStream(9, 4)
    for _ in range(150):
        assert alone.next()[0] == together.next()[0]


def test_rows_draw_different_numbers():
    rows = torch.stack([UniformStream(9, 4).next() for _ in range(1)])[0]
    assert len(set(rows.tolist())) == 4


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, True, "1", None]),
        ("top_k", [-1, 1.5, True, None]),
        ("top_p", [0, -0.5, 1.01, math.nan, False, "x"]),
        ("min_p", [-0.1, 1, 1.5, math.nan, True]),
        ("repetition_penalty", [0, -1, math.nan, math.inf, True]),
        ("seed", [-1, 2**64, 1.0, True]),
    ],
)
def test_nonsense_is_refused_in_one_line(name, values):
    for value in values:
        with pytest.raises(InputError) as caught:
            SamplingParams(**{name: value})
        message = str(caught.value)
        assert message.startswith(name)
        assert repr(value) in message
        assert "\n" not in message
