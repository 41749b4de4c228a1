"""Text in, text out: `LLM("smollm2").generate(["Hello"])`, over a compiled program and its tokenizer."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .compiler.errors import InputError, ModelError
from .runtime.decode import Runnable, check_prompt, stream
from .runtime.kv_cache import KVCache, keeps_first, reuse_or_allocate
from .runtime.sampling_params import SamplingParams, check_max_new_tokens
from .runtime.text import Message, StopStrings, TextCodec

if TYPE_CHECKING:
    from .compiler.load import LoadedModel

__all__ = ["LLM", "Completion", "TextStream"]

DEFAULT_NEW_TOKENS = 256

Prompt = str | Sequence[Message]
"""Text, or the messages of a chat."""


@dataclass(frozen=True)
class Completion:
    """What a model said to one prompt.

    text: without the prompt, and without the stop string or eos token that ended it. tokens: all that were made, an eos
    token included. finish_reason: "eos", "stop" (a stop string) or "length". prompt_tokens: how many were read.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int

    def __str__(self) -> str:
        return self.text


class Answer:
    """One row while it is made: tokens in, text out, and why it ended."""

    def __init__(self, codec: TextCodec, prompt: Sequence[int], eos: Sequence[int], stops: Sequence[str]) -> None:
        self.detokenizer = codec.detokenizer(prompt)
        self.stops = StopStrings(stops)
        self.eos = frozenset(eos)
        self.prompt_tokens = len(prompt)
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Take the next token, unless the row has ended; returns the text that is safe to show."""
        if self.finish_reason is not None:
            return ""
        self.tokens.append(token)
        if token in self.eos:
            return self.finish("eos")
        shown = self.stops.push(self.detokenizer.push(token))
        self.text += shown
        if self.stops.stopped:
            self.finish_reason = "stop"
        return shown

    def finish(self, reason: str) -> str:
        """End the row, unless it has ended; returns the text that was held back."""
        if self.finish_reason is not None:
            return ""
        shown = self.stops.push(self.detokenizer.flush()) + self.stops.flush()
        self.text += shown
        self.finish_reason = "stop" if self.stops.stopped else reason
        return shown

    def completion(self) -> Completion:
        return Completion(self.text, tuple(self.tokens), self.finish_reason or "length", self.prompt_tokens)


class TextStream(Iterator[str]):
    """Pieces of one answer, none of them empty; `tokens` and `finish_reason` tell how far it is, `close` ends it."""

    def __init__(self, answer: Answer, pieces: Generator[str]) -> None:
        self.answer = answer
        self.pieces = pieces

    def __next__(self) -> str:
        return next(self.pieces)

    def close(self) -> None:
        self.pieces.close()

    @property
    def tokens(self) -> list[int]:
        return self.answer.tokens

    @property
    def prompt_tokens(self) -> int:
        return self.answer.prompt_tokens

    @property
    def finish_reason(self) -> str | None:
        return self.answer.finish_reason


class LLM:
    """A compiled model with its tokenizer.

        llm = LLM("smollm2")
        print(llm.generate("What is the capital of France?", chat=True)[0])
        for piece in llm.stream("Once upon a time", temperature=0.8, seed=1): print(piece, end="")

    model: a known name, a GGUF file, a Hugging Face folder, or what `effc.load` gave. dtype: of the weights. Other
    options (`ring`, `stream`, `skip`, ...) go to `effc.compile`. Raises ModelError for a model without a tokenizer.
    """

    def __init__(self, model: str | Path | LoadedModel, dtype: torch.dtype | None = None, **options: object) -> None:
        if isinstance(model, str | Path):
            from . import load

            model = load(model, dtype)
        if model.tokenizer_folder is None:
            raise ModelError(f"{model.name} brings no tokenizer.json: use effc.compile and token ids, or add one")
        from . import compile as compile_model

        self._set(compile_model(model, **options), TextCodec(model.tokenizer_folder))

    @classmethod
    def of(cls, program: Runnable, codec: TextCodec) -> LLM:
        """From a program that is compiled already, and its tokenizer."""
        llm = cls.__new__(cls)
        llm._set(program, codec)
        return llm

    def _set(self, program: Runnable, codec: TextCodec) -> None:
        self.program = program
        self.codec = codec
        self.device = torch.device(getattr(program, "device", "cpu"))
        self.eos_ids = tuple(dict.fromkeys((*program.config.eos_token_ids, *codec.eos_ids)))
        self._spare_cache: KVCache | None = None

    def encode(self, prompt: Prompt, chat: bool = False, system: str | None = None) -> list[int]:
        """Token ids of a prompt: plain text, or (with `chat`, or given messages) through the chat template."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty: give at least one word")
            if not chat:
                if system is not None:
                    raise InputError("a system message needs the chat template: ask with chat=True")
                return self.codec.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        return self.codec.chat([*([{"role": "system", "content": system}] if system else []), *prompt])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        chat: bool = False,
        system: str | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: float | int | None,
    ) -> list[Completion]:
        """Answer one prompt or several at once, in order.

        prompts: text, or the messages of a chat, or a list of either. chat: put text through the chat template, as
        what the user says. max_new_tokens: None for 256, or what the context has room for. stop: strings that end
        the text. sampling: see `SamplingParams`; greedy if none is given.
        """
        rows = [self.encode(prompt, chat, system) for prompt in listed(prompts)]
        answers = [Answer(self.codec, row, () if ignore_eos else self.eos_ids, texts(stop)) for row in rows]
        finished = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        made: list[Tensor] = []
        for tokens in self._tokens(rows, max_new_tokens, SamplingParams(**sampling), ignore_eos, finished):
            if not stop:  # nobody waits for the text: one row at a time at the end is cheaper
                made.append(tokens)
                continue
            for row, (answer, token) in enumerate(zip(answers, tokens.tolist(), strict=True)):
                answer.push(token)
                if answer.finish_reason is not None:
                    finished[row] = True
        columns = torch.stack(made).T.tolist() if made else [[] for _ in rows]
        for answer, column in zip(answers, columns, strict=True):
            for token in column:
                answer.push(token)
            answer.finish("length")
        return [answer.completion() for answer in answers]

    def stream(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        system: str | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        **sampling: float | int | None,
    ) -> TextStream:
        """Answer one prompt piece by piece; arguments as in `generate`, and checked before the first piece."""
        ids = self.encode(prompt, chat, system)
        answer = Answer(self.codec, ids, () if ignore_eos else self.eos_ids, texts(stop))
        tokens = self._tokens([ids], max_new_tokens, SamplingParams(**sampling), ignore_eos, None)

        def pieces() -> Generator[str]:
            try:
                for token in tokens:
                    if piece := answer.push(int(token)):
                        yield piece
                    if answer.finish_reason is not None:
                        return
                if piece := answer.finish("length"):
                    yield piece
            finally:
                tokens.close()

        return TextStream(answer, pieces())

    def _tokens(
        self,
        rows: list[list[int]],
        max_new_tokens: int | None,
        params: SamplingParams,
        ignore_eos: bool,
        finished: Tensor | None,
    ) -> Generator[Tensor]:
        """The loop over one batch, with a cache that is handed back for the next call.

        Rows are padded at the left; at the right, each with its own length, where the cache keeps the first tokens.
        """
        config = self.program.config
        lengths = attention_mask = None
        if keeps_first(config.cache_layout):
            input_ids, lengths = pad_right(rows, self.device)
        else:
            input_ids, attention_mask = pad_left(rows, self.device)
        length = input_ids.shape[1]
        if max_new_tokens is None:
            room = DEFAULT_NEW_TOKENS if config.max_position is None else config.max_position - length
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
        check_max_new_tokens(max_new_tokens)
        check_prompt(input_ids, attention_mask, max_new_tokens, config.vocab_size, config.max_position)

        def loop() -> Generator[Tensor]:
            spare, self._spare_cache = self._spare_cache, None  # two streams at once do not share a cache
            cache = reuse_or_allocate(spare, config.cache_layout, len(rows), length + max_new_tokens, self.device)
            try:
                yield from stream(
                    self.program,
                    input_ids,
                    attention_mask,
                    max_new_tokens=max_new_tokens,
                    params=params,
                    eos_token_id=self.eos_ids or None,
                    ignore_eos=ignore_eos,
                    cache=cache,
                    finished=finished,
                    lengths=lengths,
                )
            finally:
                self._spare_cache = cache

        return loop()


def listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt or several."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict)):
        return [prompts]
    if len(prompts) == 0:
        raise InputError("there is no prompt: give at least one")
    return list(prompts)


def texts(stop: str | Sequence[str]) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop)


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts of different lengths as one batch: ids [B, S] and attention_mask [B, S] (None if all are as long)."""
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == length for row in rows):
        return input_ids, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return input_ids, (torch.arange(length, device=device) >= length - lengths[:, None]).long()


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts of different lengths as one batch: ids [B, S] and lengths [B] (None if all are as long)."""
    length = max(len(row) for row in rows)
    input_ids = torch.tensor([list(row) + [0] * (length - len(row)) for row in rows], device=device)
    if all(len(row) == length for row in rows):
        return input_ids, None
    return input_ids, torch.tensor([len(row) for row in rows], device=device)
