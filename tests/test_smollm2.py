"""The default model end to end: the same tokens as Hugging Face eager, cached or not, alone or in a padded batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import effc
import pytest
import torch
from effc.program import Program
from effc.receipt import receipt
from effc.runtime import decode
from effc.runtime.kv_cache import KVCache
from torch import nn

NEW_TOKENS = 64

PROMPTS = {
    "one token": "Hello",
    "question": "What is the capital of France?",
    "story": "Once upon a time, in a village by the sea, there lived a clockmaker who",
    "code": "def fibonacci(n):\n    '''Return the n-th Fibonacci number.'''\n",
    "list": "1. apple\n2. banana\n3. cherry\n4.",
    "numbers": "2, 3, 5, 7, 11, 13, 17,",
    "other script": "Übung macht den Meister. 東京は日本の首都です。",
    "300 tokens": "The quick brown fox jumps over the lazy dog. " * 30,
    "1000 tokens": "In the beginning the universe was created. This has made a lot of people very angry. " * 53,
}


@pytest.fixture(scope="module")
def program(smollm2_path: Path) -> Program:
    return effc.compile(smollm2_path)


@pytest.fixture(scope="module")
def eager(program: Program) -> nn.Module:
    return program.model.module(torch.float32)


@pytest.fixture(scope="module", autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def ids_of(program: Program, text: str) -> torch.Tensor:
    return program.model.tokenizer(text, return_tensors="pt")["input_ids"]


def check_greedy(program: Program, eager: nn.Module, prompt: torch.Tensor) -> None:
    """Every token is the one that eager would choose after the same tokens, unless eager hardly prefers its own.

    Eager reads the whole sequence at once. A choice may differ only where eager's two best logits are closer than
    the largest difference between effc's logits and eager's on this sequence.
    """
    sequence = program.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    expected = eager(sequence, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    error = (program(sequence)[0, prompt.shape[1] - 1 : -1] - expected).abs().max()
    chosen = sequence[0, prompt.shape[1] :]
    margin = expected.topk(2).values.diff(dim=-1).abs()[:, 0]
    for step in (chosen != expected.argmax(-1)).nonzero()[:, 0].tolist():
        print(f"step {step}: margin {margin[step]:.2g} below the logit error {error:.2g}")
        assert margin[step] < error, f"step {step}: effc {chosen[step]}, eager {expected[step].argmax()}"


@pytest.mark.parametrize("name", ["one token", "question", "300 tokens"])
def test_greedy_tokens_equal_eagers(program: Program, eager: nn.Module, name: str) -> None:
    check_greedy(program, eager, ids_of(program, PROMPTS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PROMPTS) - {"one token", "question", "300 tokens"}))
def test_greedy_tokens_equal_eagers_on_more_prompts(program: Program, eager: nn.Module, name: str) -> None:
    check_greedy(program, eager, ids_of(program, PROMPTS[name]))


def test_no_aten_call_is_left_in_prefill_and_decode(program: Program) -> None:
    for kind in ("prefill", "decode"):
        assert program.built(kind).summary.fallbacks == ()


def test_cached_logits_equal_cache_free_ones_at_every_step(program: Program) -> None:
    prompt = ids_of(program, PROMPTS["story"])
    steps = 12
    cache = KVCache.allocate(program.config.cache_layout, 1, prompt.shape[1] + steps)
    logits = [decode.prefill(program, prompt, None, cache)]
    sequence = prompt
    for _ in range(steps):
        token = logits[-1].argmax(-1)
        sequence = torch.cat([sequence, token.view(1, 1)], dim=1)
        logits.append(decode.decode_one(program, token.view(1, 1), cache))
    expected = program(sequence)[0, prompt.shape[1] - 1 :]
    torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=2e-3)
    assert torch.cat(logits).argmax(-1).tolist() == expected.argmax(-1).tolist()


def test_a_left_padded_batch_equals_single_runs(program: Program) -> None:
    prompts = [ids_of(program, PROMPTS[name]) for name in ("one token", "question", "code", "story")]
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt
        mask[row, longest - prompt.shape[1] :] = 1
    together = program.generate(ids, mask, max_new_tokens=16, ignore_eos=True)[:, longest:]
    for row, prompt in enumerate(prompts):
        alone = program.generate(prompt, max_new_tokens=16, ignore_eos=True)[:, prompt.shape[1] :]
        assert together[row].tolist() == alone[0].tolist()


def test_logits_equal_eagers_also_with_padding(program: Program, eager: nn.Module) -> None:
    prompt = ids_of(program, PROMPTS["question"])
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.int64), prompt], dim=1).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = program(ids, mask)
    expected = eager(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_the_blocks_of_the_file_say_nearly_what_their_values_say(smollm2_path: Path, eager: nn.Module) -> None:
    """Linears compute with the file's 4-bit codes and with activations of 8 bits."""
    found = effc.compile(smollm2_path, quantize="stored")
    prompts = [ids_of(found, PROMPTS[name])[0].tolist() for name in ("question", "story", "code", "300 tokens")]
    evidence = receipt(found, eager, prompts, new_tokens=24)
    print(evidence)
    assert evidence.formats == ("q8_0", "q4_1", "int8_g32")
    assert evidence.fallbacks == 0
    assert evidence.agreement.mean_kl < 0.02
    assert evidence.agreement.agreeing > 0.85 * evidence.agreement.tokens


def test_the_answer_is_paris(program: Program, smollm2_path: Path) -> None:
    llm = effc.LLM(smollm2_path)
    (answer,) = llm.generate("What is the capital of France?", chat=True, max_new_tokens=20)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "eos"
