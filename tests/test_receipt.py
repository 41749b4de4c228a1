"""Receipts: what agreement counts, which differences it excuses, and that speeds know about a busy machine."""

import math
import time

import pytest
import torch
from effc import receipt, speed
from effc.receipt import Agreement, Difference, agreement, continued, greedy, kl
from effc.speed import CompiledEngine

from .tiny_llama import TinyProgram, tiny_llama

PROMPTS = ([3], [5, 7, 11, 13, 17], list(range(3, 40)))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def held(program, reference) -> Agreement:
    engine = CompiledEngine(program, 64)
    return agreement(engine, continued(engine, reference, PROMPTS, new_tokens=6))


def test_a_program_equal_to_eager_agrees_everywhere(model):
    found = held(TinyProgram(model), model)
    assert (found.prompts, found.tokens, found.agreeing) == (3, 18, 18)
    assert found.max_logit_error < 1e-4
    assert 0 <= found.mean_kl <= found.max_kl < 1e-8
    assert found.differences == ()
    assert "18 of 18" in str(found)


def test_tokens_are_those_of_generate(model):
    prompt = torch.tensor([PROMPTS[1]])
    tokens = greedy(CompiledEngine(TinyProgram(model), 16), prompt, 6)
    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)) or (
        model.config.eos_token_id in tokens[0, 5:]
    )


def test_another_model_does_not_agree(model):
    found = held(TinyProgram(model), tiny_llama(seed=1))
    assert found.agreeing < found.tokens
    assert found.max_logit_error > 0.1
    assert found.max_kl > 0.01
    assert len(found.differences) == found.tokens - found.agreeing
    for difference in found.differences:
        assert difference.token != difference.eager_token
        assert str(difference) in str(found)


def test_only_a_margin_below_the_error_explains_a_difference():
    near, far = Difference(0, 3, 5, 6, 1e-4), Difference(1, 0, 7, 8, 0.5)
    found = Agreement(2, 8, 6, max_logit_error=1e-3, max_kl=0.0, mean_kl=0.0, differences=(near, far))
    assert found.unexplained == [far]
    assert "margin of 1.00e-04, within the logit error" in str(found)
    assert "margin of 5.00e-01, more than the logit error" in str(found)


def test_kl_of_two_coins():
    expected, found = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl(expected, found).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl(expected, expected).item() == 0


def test_prompts_are_of_different_lengths():
    assert len({len(prompt) for prompt in receipt.PROMPTS}) == len(receipt.PROMPTS) >= 8


@pytest.mark.parametrize("capacity", [None, 64], ids=["growing", "static"])
def test_engines_say_the_same(model, capacity):
    prompt = torch.tensor([PROMPTS[2]])
    engines = [
        speed.CompiledEngine(TinyProgram(model), 64),
        speed.TransformersEngine(model, capacity, "eager"),
    ]
    with torch.no_grad():
        for _ in range(2):  # the second time with a cache that was used before
            first, second = ([engine.prefill(prompt), engine.decode(torch.tensor([[9]]))] for engine in engines)
            torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_compare_times_engines_in_turns(model):
    engines = [speed.TransformersEngine(model, None, "one"), speed.TransformersEngine(model, None, "two")]
    said = []
    (one, two), _ = speed.compare(engines, torch.tensor([PROMPTS[1]]), 3, 2, said.append)
    assert said[-4:] == [f"measuring {name}, {turn} of 2" for turn in (1, 2) for name in ("one", "two")]
    for found in (one, two):
        assert len(found.prefill) == len(found.decode) == 2
        assert found.prefill_rate == pytest.approx(5 / (sum(found.prefill) / 2))


def test_each_phase_is_told_in_its_best_way():
    growing = speed.Speed("growing", 10, 4, prefill=[1.0, 1.2, 1.1], decode=[0.1, 0.1, 0.1])
    static = speed.Speed("static", 10, 4, prefill=[2.0, 2.0, 2.0], decode=[0.05, 0.07, 0.06])
    best = speed.best_of("eager", [growing, static])
    assert (best.prefill, best.decode) == (growing.prefill, static.decode)
    assert best.prefill_rate == pytest.approx(10 / 1.1)
    assert best.spread("decode") == pytest.approx(0.02 / 0.06)


def test_a_busy_machine_is_told():
    assert "DISTURBED: other processes used 0.9 cores" in str(speed.Surroundings(0.9))
    assert "quiet" in str(speed.Surroundings(0.02))
    assert not speed.Surroundings(None).disturbed


def test_own_work_is_not_a_disturbance(monkeypatch):
    clock = iter([100.0, 103.0])
    monkeypatch.setattr(speed, "machine_seconds", lambda: next(clock))
    own = iter([10.0, 12.5])
    monkeypatch.setattr(speed, "own_seconds", lambda: next(own))
    moments = iter([0.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    with speed.surroundings() as found:
        pass
    monkeypatch.undo()
    assert found.others == pytest.approx(0.25)
    assert found.disturbed
