"""Decoding loops over a program: equal to transformers' `generate`, whatever the batch, the padding or the chunks."""

import pytest
import torch
from effc.compiler.errors import InputError, ModelError
from effc.runtime.decode import check_prompt, decode_one, extend, generate, generate_each, prefill, stream
from effc.runtime.kv_cache import KVCache, reuse_or_allocate
from effc.runtime.sampling_params import SamplingParams

from .tiny_llama import ScriptedProgram, TinyProgram, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def program() -> TinyProgram:
    return TinyProgram(tiny_llama())


def prompt(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    print("seed", seed)
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_batch(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Prompts of those lengths, padded at the left with 0: ids [B, S], attention_mask [B, S], and each alone."""
    rows = [prompt(1, length, seed=length) for length in lengths]
    width = max(lengths)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids, mask, rows


def empty_cache(program: TinyProgram, batch: int, capacity: int) -> KVCache:
    return KVCache.allocate(program.config.cache_layout, batch, capacity)


def greedy_reference(program: TinyProgram, ids: torch.Tensor, new: int, **options: object) -> torch.Tensor:
    return program.model.generate(ids, max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_prefill_and_decode_equal_the_forward_of_the_whole_text(program, length):
    ids = prompt(2, length + 6)
    expected = program.model(ids).logits
    cache = empty_cache(program, 2, length + 6)
    logits = prefill(program, ids[:, :length], None, cache)
    torch.testing.assert_close(logits, expected[:, length - 1], rtol=1e-4, atol=1e-4)
    for at in range(length, length + 6):
        logits = decode_one(program, ids[:, at : at + 1], cache)
        torch.testing.assert_close(logits, expected[:, at], rtol=1e-4, atol=1e-4)
    assert cache.past.tolist() == [length + 6] * 2


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_prefill_in_chunks_equals_prefill_at_once(program, chunk):
    ids, mask, _ = padded_batch([11, 4])
    whole, parts = empty_cache(program, 2, 11), empty_cache(program, 2, 11)
    expected = prefill(program, ids, mask, whole)
    torch.testing.assert_close(prefill(program, ids, mask, parts, chunk=chunk), expected, rtol=1e-4, atol=1e-4)
    visible = mask.bool()[:, None, :, None]
    torch.testing.assert_close(
        parts.states["k_cache_1"][:, :, :11] * visible, whole.states["k_cache_1"][:, :, :11] * visible
    )


def test_extend_after_rollback_equals_the_forward(program):
    ids = prompt(2, 12)
    cache = empty_cache(program, 2, 16)
    prefill(program, ids[:, :6], None, cache)
    extend(program, prompt(2, 4, seed=8), cache)
    cache.rollback(4)
    logits = extend(program, ids[:, 6:], cache)
    torch.testing.assert_close(logits, program.model(ids).logits[:, 6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 30])
def test_greedy_equals_transformers(program, length):
    ids = prompt(3, length)
    expected = greedy_reference(program, ids, 20, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(program, ids, max_new_tokens=20, ignore_eos=True), expected)


def test_left_padded_batch_equals_transformers_and_single_runs(program):
    ids, mask, rows = padded_batch([9, 3, 1])
    found = generate(program, ids, mask, max_new_tokens=15, ignore_eos=True)
    expected = greedy_reference(program, ids, 15, attention_mask=mask, eos_token_id=None, pad_token_id=0)
    assert torch.equal(found, expected)
    for row, alone in zip(found, rows, strict=True):
        single = generate(program, alone, max_new_tokens=15, ignore_eos=True)
        assert row[9:].tolist() == single[0, alone.shape[1] :].tolist()


def test_prompts_of_different_lengths_equal_single_runs(program):
    _, _, rows = padded_batch([9, 3, 1, 6])
    found = generate_each(program, [row[0] for row in rows], max_new_tokens=15, ignore_eos=True)
    for row, alone in zip(found, rows, strict=True):
        assert torch.equal(row, generate(program, alone, max_new_tokens=15, ignore_eos=True)[0])


def test_prompts_of_different_lengths_end_at_their_eos(program):
    _, _, rows = padded_batch([4, 7])
    free = generate_each(program, [row[0] for row in rows], max_new_tokens=12, ignore_eos=True)
    eos = int(free[0][4 + 3])
    found = generate_each(program, [row[0] for row in rows], max_new_tokens=12, eos_token_id=eos)
    for row, whole, length in zip(found, free, (4, 7), strict=True):
        new = whole[length:].tolist()
        expected = new[: new.index(eos) + 1] if eos in new else new
        assert row.tolist() == whole[:length].tolist() + expected


def test_padding_is_refused_where_the_model_cannot_hide_it(program):
    bare = TinyProgram(program.model)
    bare.config.inputs = ("input_ids",)
    with pytest.raises(InputError, match="the model takes no attention_mask"):
        generate(bare, torch.ones(1, 3, dtype=torch.long), torch.tensor([[0, 1, 1]]), max_new_tokens=2)


def test_without_a_cache_nothing_is_decoded(program):
    bare = TinyProgram(program.model)
    bare.config.cache_refusal = "no KV cache can be made: x"
    with pytest.raises(ModelError, match="no KV cache can be made: x"):
        generate(bare, torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


def test_rows_end_at_eos_like_transformers(program):
    ids = prompt(4, 6)
    free = generate(program, ids, max_new_tokens=24, ignore_eos=True)[:, 6:]
    eos = [int(free[0, 4]), int(free[1, 9])]
    for options in ({"eos_token_id": eos, "pad_token_id": 0}, {"eos_token_id": eos[0], "pad_token_id": 5}):
        expected = greedy_reference(program, ids, 24, **options)
        assert torch.equal(generate(program, ids, max_new_tokens=24, **options), expected)


def test_repetition_penalty_equals_transformers(program):
    ids = prompt(2, 10)
    expected = greedy_reference(program, ids, 20, repetition_penalty=1.4, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(program, ids, max_new_tokens=20, repetition_penalty=1.4, ignore_eos=True), expected)


def test_padding_is_not_penalized(program):
    ids, mask, rows = padded_batch([8, 2])
    ids[mask == 0] = 7
    options = {"max_new_tokens": 12, "repetition_penalty": 2.0, "ignore_eos": True}
    found = generate(program, ids, mask, **options)
    assert found[1, 8:].tolist() == generate(program, rows[1], **options)[0, 2:].tolist()


def test_sampled_row_is_the_same_alone_and_with_others_and_for_any_number_of_tokens(program):
    ids, mask, rows = padded_batch([8, 5, 2])
    options = {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "seed": 4, "ignore_eos": True}
    batch = generate(program, ids, mask, max_new_tokens=16, **options)
    assert torch.equal(batch, generate(program, ids, mask, max_new_tokens=16, **options))
    assert torch.equal(batch[:, :-6], generate(program, ids, mask, max_new_tokens=10, **options))
    alone = generate(program, rows[0], max_new_tokens=16, **options)
    assert batch[0, 8:].tolist() == alone[0, 8:].tolist()
    other = generate(program, ids, mask, max_new_tokens=16, **(options | {"seed": 5}))
    assert not torch.equal(batch, other)


def test_finished_rows_are_padded_and_the_loop_stops_early():
    script = torch.tensor([[5, 9, 7, 7, 7], [6, 6, 6, 9, 7]])
    program = ScriptedProgram(script, eos_token_ids=(9,))
    ids = torch.ones(2, 3, dtype=torch.long)
    assert generate(program, ids, max_new_tokens=5, pad_token_id=0)[:, 3:].tolist() == [[5, 9, 0, 0], [6, 6, 6, 9]]
    assert generate(program, ids, max_new_tokens=5)[:, 3:].tolist() == [[5, 9, 9, 9], [6, 6, 6, 9]]
    assert generate(program, ids, max_new_tokens=5, ignore_eos=True)[:, 3:].tolist() == script.tolist()
    assert generate(program, ids, max_new_tokens=1)[:, 3:].tolist() == [[5], [6]]


def test_a_caller_may_finish_rows_while_streaming():
    program = ScriptedProgram(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]))
    finished = torch.zeros(2, dtype=torch.bool)
    taken = []
    for tokens in stream(program, torch.ones(2, 1, dtype=torch.long), max_new_tokens=4, finished=finished):
        taken.append(tokens.tolist())
        finished[len(taken) - 1] = True
    assert taken == [[5, 5], [0, 6]]


def test_nothing_is_run_before_the_first_token_is_asked_for(program):
    calls = len(program.calls)
    tokens = stream(program, prompt(1, 4), max_new_tokens=4)
    assert len(program.calls) == calls
    next(tokens)
    assert program.calls[calls:] == [("prefill", (1, 4))]
    next(tokens)
    assert program.calls[calls + 1 :] == [("decode", (1, 1))]


def test_a_reused_cache_gives_the_same_tokens(program):
    ids, mask, _ = padded_batch([9, 4])
    cache = empty_cache(program, 2, 40)
    expected = generate(program, ids, mask, max_new_tokens=8, ignore_eos=True)
    for _ in range(2):
        cache = reuse_or_allocate(cache, program.config.cache_layout, 2, 30)
        assert torch.equal(generate(program, ids, mask, max_new_tokens=8, ignore_eos=True, cache=cache), expected)
    plain = generate(program, ids, max_new_tokens=8, ignore_eos=True)
    cache = reuse_or_allocate(cache, program.config.cache_layout, 2, 30)
    assert torch.equal(generate(program, ids, max_new_tokens=8, ignore_eos=True, cache=cache), plain)


def test_int32_ids_and_boolean_masks_are_accepted(program):
    ids, mask, _ = padded_batch([5, 3])
    expected = generate(program, ids, mask, max_new_tokens=4, ignore_eos=True)
    assert torch.equal(generate(program, ids.int(), mask.bool(), max_new_tokens=4, ignore_eos=True), expected)


REFUSALS = {
    "the prompt is empty: input_ids is [1, 0]": {"input_ids": torch.empty(1, 0, dtype=torch.long)},
    "the prompt is empty: input_ids is [0, 4]": {"input_ids": torch.empty(0, 4, dtype=torch.long)},
    "input_ids must be int64 [batch, length], found torch.int64 [3]": {"input_ids": torch.tensor([1, 2, 3])},
    "input_ids must be int64 [batch, length], found torch.float32 [1, 2]": {"input_ids": torch.ones(1, 2)},
    "input_ids must be in [0, 96), found 96": {"input_ids": torch.tensor([[1, 96]])},
    "input_ids must be in [0, 96), found -1": {"input_ids": torch.tensor([[1, -1]])},
    "the prompt has 129 tokens and the context holds 128": {"input_ids": torch.ones(1, 129, dtype=torch.long)},
    "a prompt of 125 tokens and max_new_tokens=4 exceed the context of 128: 3 new tokens have room": {
        "input_ids": torch.ones(1, 125, dtype=torch.long)
    },
    "input_ids must be a tensor [batch, length], found list": {"input_ids": [[1, 2]]},
    "attention_mask must be a tensor [batch, length], found list": {"attention_mask": [[1, 1, 1]] * 2},
    "max_new_tokens must be an integer of at least 1, found 0": {"max_new_tokens": 0},
    "max_new_tokens must be an integer of at least 1, found True": {"max_new_tokens": True},
    "max_new_tokens must be an integer of at least 1, found 2.5": {"max_new_tokens": 2.5},
    "eos_token_id must be an integer of at least 0, found -2": {"eos_token_id": [-2]},
    "temperature must be a number at least 0": {"temperature": -1.0},
    "attention_mask must be [2, 3] like input_ids, found [2, 2]": {"attention_mask": torch.ones(2, 2)},
    "row 1 of attention_mask ends with 0: pad at the left": {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
    "row 0 of attention_mask has a 0 after a 1": {"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])},
    "the prompt is empty: row 0 of attention_mask is all zeros": {
        "attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])
    },
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused_in_one_line(program, message):
    arguments = {"input_ids": torch.ones(2, 3, dtype=torch.long), "max_new_tokens": 4} | REFUSALS[message]
    calls = len(program.calls)
    with pytest.raises(InputError) as caught:
        generate(program, **arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert len(program.calls) == calls


def test_logits_alone_may_fill_the_context():
    check_prompt(torch.ones(1, 128, dtype=torch.long), None, 0, vocab_size=96, context=128)


def test_a_cache_without_room_is_refused(program):
    cache = empty_cache(program, 1, 1)
    cache.advance(cache.capacity - 3)
    with pytest.raises(InputError, match="the KV cache holds 256 tokens per row: 253 are taken and 4 more"):
        prefill(program, prompt(1, 4), None, cache)


def test_stream_refuses_before_the_first_token(program):
    with pytest.raises(InputError, match="max_new_tokens"):
        stream(program, prompt(1, 4), max_new_tokens=-1, params=SamplingParams())
