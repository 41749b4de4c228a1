"""Text in and out: the tokenizer of a folder, chat templates, detokenizing a stream, stop strings.

Only `tokenizers` and `jinja2` are used: importing transformers would double the start-up time of a warm start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compiler.errors import InputError, ModelError

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not (yet) a character."""

CONTEXT = 6
"""Tokens of the prompt that a detokenizer decodes along, so that a leading space is kept or dropped rightly."""

Message = dict[str, Any]
"""One turn of a chat: {"role": "user", "content": "..."}."""


class TextCodec:
    """The tokenizer of a folder that `save_pretrained` wrote: text to token ids and back, and the chat template."""

    def __init__(self, folder: Path | str) -> None:
        from tokenizers import Tokenizer

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{self.folder} has no tokenizer.json: save the tokenizer there with save_pretrained")
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.config = read_json(self.folder / "tokenizer_config.json")

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens, as text: {"bos_token": "<s>", ...}."""
        entries = read_json(self.folder / "special_tokens_map.json") | self.config
        texts = {name: value["content"] if isinstance(value, dict) else value for name, value in entries.items()}
        return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: the tokenizer's own and those of generation_config.json."""
        tokens = read_json(self.folder / "generation_config.json").get("eos_token_id")
        found = [tokens] if isinstance(tokens, int) else list(tokens or ())
        text = self.special_tokens.get("eos_token")
        token = self.tokenizer.token_to_id(text) if text else None
        return tuple(dict.fromkeys(found if token is None else [token, *found]))

    @cached_property
    def chat_template(self) -> str | None:
        """The source of the chat template (its default, if there are several); None if the model has none."""
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):
            return next((entry["template"] for entry in template if entry["name"] == "default"), None)
        return template

    @cached_property
    def compiled_template(self) -> Template:
        if self.chat_template is None:
            raise InputError(f"{self.folder} has no chat template: give plain text prompts, without chat")
        return compile_template(self.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with the special tokens that the model wants around it (a leading bos, often)."""
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not ids:
            raise InputError("the prompt is empty: give at least one token of text")
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The chat template filled with messages, ending where the model is to answer."""
        if not messages:
            raise InputError("the chat is empty: give at least one message with a role and a content")
        for message in messages:
            if not isinstance(message, dict) or "role" not in message:
                raise InputError(f"a chat message must be a dict with a role and a content, found {message!r}")
        from jinja2 import TemplateError

        template = self.compiled_template
        names = {"tools": None, "documents": None} | self.special_tokens | variables
        try:
            return template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **names)
        except (TemplateError, TypeError) as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error

    def chat(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Token ids of a rendered chat; the template writes the special tokens itself."""
        return self.encode(self.render(messages, **variables), add_special_tokens=False)

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        return Detokenizer(self.tokenizer, prompt)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error


def compile_template(source: str) -> Template:
    """A chat template in the environment that templates are written for (that of transformers)."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}` marks the assistant's part for training; here its content stands as it is."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ModelError(f"the chat template cannot be parsed: {error}") from error


class Detokenizer:
    """Turn a stream of tokens into pieces of text that never split a character.

    Decoding a suffix alone gets leading spaces and split characters wrong, so each step decodes a short window twice,
    with and without the new tokens, and emits the difference once it ends in whole characters. The window starts
    at tokens that decoded to text; its first tokens are the end of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.window = self.end_of(list(prompt))
        self.emitted = len(self.window)
        self.emitted_text = self.decode(self.window)

    def end_of(self, prompt: list[int]) -> list[int]:
        """The last tokens of the prompt, starting at a whole character (of at most four bytes)."""
        windows = [prompt[-size:] for size in range(CONTEXT, CONTEXT + 4)]
        return next((window for window in windows if REPLACEMENT not in self.decode(window)), windows[0])

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self.window.append(int(token))
        text = self.decode(self.window)
        if len(text) <= len(self.emitted_text) or text.endswith(REPLACEMENT):
            return ""
        return self.emit(text)

    def flush(self) -> str:
        """What is held back at the end of the stream, bytes that make no character included."""
        text = self.decode(self.window)
        return self.emit(text) if len(text) > len(self.emitted_text) else ""

    def emit(self, text: str) -> str:
        new = text[len(self.emitted_text) :]
        self.window = self.window[self.emitted :]
        self.emitted = len(self.window)
        self.emitted_text = self.decode(self.window)
        return new


class StopStrings:
    """Cut a stream of text before the first stop string, which may span pieces.

    Text that could be the start of a stop string is held back. Of several stop strings the one that is complete
    first wins, so the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise InputError(f"a stop string must be text of at least one character, found {stop!r}")
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now safe to show; after a stop string has been met, always empty."""
        if self.stopped:
            return ""
        self.held += text
        matches = [(self.held.find(stop), stop) for stop in self.stops]
        ends = [(start + len(stop), start) for start, stop in matches if start >= 0]
        if ends:
            _, start = min(ends)
            self.stopped = True
            shown, self.held = self.held[:start], ""
            return shown
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back when the stream ends without a stop string."""
        shown, self.held = self.held, ""
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
