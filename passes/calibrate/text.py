"""Text to calibrate on and text to measure on: Python's own reference manual, as the interpreter ships it.

`pydoc_data.topics` (what `help("assignment")` prints) is some 400 kB of English prose, tables, grammar and code, under
the license of the Python Software Foundation, which allows to use and to redistribute it. It belongs to the standard
library, so nothing is downloaded; another version of Python has somewhat other text, which `TextParts.source` names.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.errors import InputError

LICENSE = "Python Software Foundation License 2.0"
HELD_OUT_EVERY = 4
"""One document of so many is held out."""


@dataclass(frozen=True)
class TextParts:
    """Documents to calibrate on, documents that are held out, and where both come from; no paragraph is in both."""

    calibration: tuple[str, ...]
    held_out: tuple[str, ...]
    source: str


def text_parts() -> TextParts:
    """The manual's topics without repeated paragraphs, in the order of their names; every fourth is held out.

    Raises InputError where this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(f"calibration reads Python's pydoc_data.topics: {error}") from error
    documents = without_repeats([topics[name] for name in sorted(topics)])
    return TextParts(
        tuple(text for index, text in enumerate(documents) if index % HELD_OUT_EVERY != HELD_OUT_EVERY - 1),
        tuple(documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]),
        f"pydoc_data.topics of Python {platform.python_version()}, {LICENSE}",
    )


def without_repeats(documents: Sequence[str]) -> list[str]:
    """The documents with each paragraph kept where it occurs first: topics quote one another."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph.strip("\n"))
        kept.append("\n\n".join(paragraphs))
    return [text for text in kept if text]


def token_rows(documents: Sequence[str], encode: Callable[[str], Sequence[int]], rows: int, length: int) -> Tensor:
    """Token ids [rows, length]: windows that lie evenly over the documents, one after another, and do not overlap.

    encode: the model's tokenizer. Raises InputError where the documents have too few tokens.
    """
    if rows < 1 or length < 2:
        raise InputError(f"expected at least one row of at least two tokens, found {rows} of {length}")
    tokens = torch.tensor([token for document in documents for token in encode(document)])
    windows = len(tokens) // length
    if windows < rows:
        raise InputError(f"expected text of {rows * length} tokens, found {len(tokens)}: ask for fewer or shorter rows")
    chosen = torch.arange(rows) * windows // rows
    return tokens[: windows * length].view(windows, length)[chosen]
