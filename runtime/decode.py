"""Prefill, decode and generate: free functions over a program and an explicit KV cache.

    logits = prefill(program, input_ids, attention_mask, cache)      # [B, V]
    logits = decode_one(program, tokens, cache)                      # [B, V], and so on

`stream` is that loop with sampling and stopping; `generate` collects what it yields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..compiler.errors import InputError, ModelError
from .kv_cache import KVCache, Layout
from .sample import UniformStream, sample
from .sampling_params import SamplingParams, check_integer, check_max_new_tokens


class ModelFacts(Protocol):
    """What decoding asks of a program's config. max_position: the context length, None if there is no limit.

    inputs: what the model takes. cache_refusal: why it can have no cache; None if it can.
    """

    vocab_size: int
    max_position: int | None
    eos_token_ids: tuple[int, ...]
    cache_layout: Layout
    inputs: tuple[str, ...]
    cache_refusal: str | None


class Runnable(Protocol):
    """A compiled model: `run` gives logits, forward and extend [B, S, V], prefill and decode [B, 1, V]."""

    config: ModelFacts

    def run(self, kind: str, inputs: dict[str, Tensor], states: dict[str, Tensor], padded: bool) -> Tensor: ...


def run_cached(program: Runnable, kind: str, input_ids: Tensor, position_ids: Tensor, cache: KVCache) -> Tensor:
    """Run a cached graph on the next tokens of every row and count them: [B, S] -> logits [B, S or 1, V]."""
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "past": cache.past, "padding": cache.padding}
    logits = program.run(kind, inputs, cache.states, cache.padded)
    cache.advance(input_ids.shape[1])
    return logits


def prefill(
    program: Runnable,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: KVCache,
    chunk: int | None = None,
) -> Tensor:
    """Fill the cache with a prompt: input_ids [B, S] -> logits [B, V] after its last token.

    attention_mask [B, S] (left padding; None or all ones if there is none) needs an empty cache. With `chunk`, the
    prompt goes in that many tokens at a time, which bounds the memory of activations; a ring may ask for fewer.
    """
    length = input_ids.shape[1]
    cache.require(length)
    chunk = min(chunk or length, cache.at_a_time)
    if attention_mask is not None and not bool((attention_mask != 0).all()):
        cache.pad(attention_mask)
    for start in range(0, length, chunk):
        part = input_ids[:, start : start + chunk]
        logits = run_cached(program, "prefill", part, cache.positions(part.shape[1]), cache)
    return logits[:, -1]


def prefill_each(
    program: Runnable, input_ids: Tensor, lengths: Tensor, cache: KVCache, chunk: int | None = None
) -> Tensor:
    """Fill the cache with prompts of different lengths: input_ids [B, S], lengths [B] -> logits [B, V].

    Row b holds lengths[b] tokens, then anything. No mask is needed: what is behind a row's end is taken back, with the
    row's last token, which is then decoded again beside those of the others.
    """
    length = input_ids.shape[1]
    cache.require(length)
    chunk = min(chunk or length, max(1, cache.at_a_time - 1))
    held = lengths - 1
    for start in range(0, length, chunk):
        part = input_ids[:, start : start + chunk]
        run_cached(program, "prefill", part, cache.positions(part.shape[1]), cache)
        cache.rollback(cache.past - held.clamp(max=start + part.shape[1]))
    return decode_one(program, input_ids.gather(1, held[:, None]), cache)


def decode_one(program: Runnable, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append one token to every row: tokens [B, 1] -> logits [B, V]."""
    cache.require_at_once(1)
    return run_cached(program, "decode", tokens, cache.next_position(), cache)[:, -1]


def extend(program: Runnable, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append n tokens to every row: tokens [B, n] -> logits [B, n, V] after each (to check guessed tokens)."""
    cache.require_at_once(tokens.shape[1])
    return run_cached(program, "extend", tokens, cache.positions(tokens.shape[1]), cache)


def check_prompt(
    input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, vocab_size: int, context: int | None
) -> None:
    """Raise InputError unless input_ids [B, S] and attention_mask [B, S] make a prompt with room for new tokens.

    attention_mask may be None. max_new_tokens is 0 where logits alone are wanted; context None has no limit.
    """
    for name, value in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        if not (isinstance(value, Tensor) or (name == "attention_mask" and value is None)):
            raise InputError(f"{name} must be a tensor [batch, length], found {type(value).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids must be int64 [batch, length], found {input_ids.dtype} {list(input_ids.shape)}")
    batch, length = input_ids.shape
    if batch == 0 or length == 0:
        raise InputError(f"the prompt is empty: input_ids is {[batch, length]}; give at least one token")
    smallest, largest = (int(bound) for bound in torch.aminmax(input_ids))
    if smallest < 0 or largest >= vocab_size:
        wrong = smallest if smallest < 0 else largest
        raise InputError(f"input_ids must be in [0, {vocab_size}), found {wrong}: is this the model's own tokenizer?")
    if context is not None and length > context:
        raise InputError(f"the prompt has {length} tokens and the context holds {context}: shorten the prompt")
    if context is not None and length + max_new_tokens > context:
        raise InputError(
            f"a prompt of {length} tokens and max_new_tokens={max_new_tokens} exceed the context of {context}:"
            f" {context - length} new tokens have room"
        )
    if attention_mask is not None:
        check_left_padding(attention_mask, (batch, length))


def check_left_padding(attention_mask: Tensor, shape: tuple[int, int]) -> None:
    """Raise InputError unless each row of attention_mask is zeros (the padding), then at least one 1."""
    if tuple(attention_mask.shape) != shape:
        raise InputError(f"attention_mask must be {list(shape)} like input_ids, found {list(attention_mask.shape)}")
    visible = attention_mask != 0
    if not bool(visible[:, -1].all()):
        row = int((~visible[:, -1]).nonzero()[0])
        raise InputError(
            f"row {row} of attention_mask ends with 0: pad at the left (tokenizer.padding_side = 'left')"
            if bool(visible[row].any())
            else f"the prompt is empty: row {row} of attention_mask is all zeros"
        )
    holes = (visible[:, :-1] & ~visible[:, 1:]).any(-1)
    if bool(holes.any()):
        row = int(holes.nonzero()[0])
        raise InputError(f"row {row} of attention_mask has a 0 after a 1: only padding at the left is supported")


def check_padding(facts: ModelFacts, attention_mask: Tensor | None) -> None:
    """Raise InputError where a model that cannot hide padding is given some."""
    if attention_mask is not None and "attention_mask" not in facts.inputs and not bool((attention_mask != 0).all()):
        raise InputError(
            "the model takes no attention_mask, so that padding cannot be hidden: give rows of one length, or prompts"
            " of any lengths to generate_each"
        )


def eos_tokens(program: Runnable, eos_token_id: int | Sequence[int] | None, ignore_eos: bool) -> tuple[int, ...]:
    """The tokens that end a row: those given, else the model's own; none if `ignore_eos`."""
    if ignore_eos:
        return ()
    if eos_token_id is None:
        return tuple(program.config.eos_token_ids)
    tokens = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    for token in tokens:
        check_integer("eos_token_id", token, "of at least 0", lambda value: value >= 0)
    return tokens


def stream(
    program: Runnable,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    params: SamplingParams | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    ignore_eos: bool = False,
    cache: KVCache | None = None,
    finished: Tensor | None = None,
    chunk: int | None = None,
    lengths: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, [B] int64, until `max_new_tokens` or until every row is finished.

    A row is finished by an eos token (which is yielded) and then yields `pad_token_id` (None: the first eos token).
    cache: an empty one with room, else one is allocated. finished [B] bool: the rows that are done, updated in
    place; a caller may set rows too (at a stop string), which takes effect at the next token. lengths [B]: how many
    tokens each row of input_ids holds, at the left, instead of an attention_mask.
    The arguments are checked by this call, before the first token is asked for.
    """
    params = SamplingParams() if params is None else params
    if program.config.cache_refusal is not None:
        raise ModelError(program.config.cache_refusal)
    check_max_new_tokens(max_new_tokens)
    check_prompt(input_ids, attention_mask, max_new_tokens, program.config.vocab_size, program.config.max_position)
    check_padding(program.config, attention_mask)
    eos = eos_tokens(program, eos_token_id, ignore_eos)
    if pad_token_id is None:
        pad_token_id = eos[0] if eos else 0
    batch, length = input_ids.shape
    if cache is None:
        cache = KVCache.allocate(program.config.cache_layout, batch, length + max_new_tokens, input_ids.device)
    may_stop = bool(eos) or finished is not None
    if finished is None:
        finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    stop = torch.tensor(eos, device=input_ids.device)

    @torch.no_grad()
    def loop() -> Iterator[Tensor]:
        uniforms = None if params.greedy else UniformStream(params.seed, batch, input_ids.device)
        held = attention_mask if lengths is None else torch.arange(length, device=input_ids.device) < lengths[:, None]
        seen = seen_tokens(input_ids, held, program.config.vocab_size) if params.penalizes else None
        if lengths is not None:
            logits = prefill_each(program, input_ids.long(), lengths, cache, chunk)
        else:
            logits = prefill(program, input_ids.long(), attention_mask, cache, chunk)
        for step in range(max_new_tokens):
            tokens = sample(logits, params, uniforms and uniforms.next(), seen)
            if may_stop:
                tokens = tokens.masked_fill_(finished, pad_token_id)
                finished.logical_or_((tokens[:, None] == stop).any(-1))
            yield tokens
            if step + 1 == max_new_tokens or (may_stop and bool(finished.all())):
                return
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            logits = decode_one(program, tokens[:, None], cache)

    return loop()


def seen_tokens(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """Which tokens each prompt holds, padding aside: [B, S] -> bool [B, V]."""
    seen = torch.zeros(len(input_ids), vocab_size, dtype=torch.bool, device=input_ids.device)
    visible = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
    seen[rows[visible], input_ids[visible]] = True
    return seen


def generate(
    program: Runnable,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    ignore_eos: bool = False,
    cache: KVCache | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Continue every row of a prompt: input_ids [B, S] -> ids [B, S + new] int64, with Hugging Face's meanings.

    attention_mask [B, S]: zeros mark padding, at the left only; None means that every token counts. Rows that end
    early are filled with `pad_token_id`; it stops when all rows have ended. Raises InputError for what does not fit.
    """
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    tokens = stream(
        program,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        params=params,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        ignore_eos=ignore_eos,
        cache=cache,
        chunk=chunk,
    )
    return torch.cat([input_ids.long(), torch.stack(list(tokens), dim=1)], dim=1)


def generate_each(
    program: Runnable,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    params: SamplingParams | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    ignore_eos: bool = False,
) -> list[Tensor]:
    """Continue prompts [S_b] of different lengths as one batch; returns ids [S_b + new] of each, up to its eos token.

    Rows keep their own lengths in the cache: there is no padding, and a model without an attention_mask will do.
    """
    if not prompts or any(not isinstance(prompt, Tensor) or prompt.dim() != 1 or not len(prompt) for prompt in prompts):
        raise InputError("expected a list of prompts, each a tensor of at least one token [length]")
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
    input_ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    eos = eos_tokens(program, eos_token_id, ignore_eos)
    tokens = stream(
        program,
        input_ids,
        max_new_tokens=max_new_tokens,
        params=params,
        eos_token_id=eos_token_id,
        ignore_eos=ignore_eos,
        lengths=lengths,
    )
    new = torch.stack(list(tokens), dim=1)
    ends = torch.isin(new, torch.tensor(eos, device=new.device))
    kept = [int(end.nonzero()[0]) + 1 if bool(end.any()) else len(end) for end in ends]
    return [torch.cat([prompt.long(), row[:count]]) for prompt, row, count in zip(prompts, new, kept)]
