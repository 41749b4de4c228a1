"""Options of a compilation, checked: no torch here, so that the command line can tell at once what is wrong."""

from __future__ import annotations

from .errors import InputError

ROUNDINGS = ("eager", "fp32")
"""Where 16-bit values are rounded within a kernel: where eager rounds, or nowhere but where they are stored."""


def check_rounding(rounding: str) -> str:
    if rounding not in ROUNDINGS:
        raise InputError(f"expected a rounding of {', '.join(ROUNDINGS)}, found {rounding!r}")
    return rounding


def check_ring(ring: object) -> int:
    """The slots that a ring has beside its window: how many tokens may be taken back."""
    if not is_count(ring, 0):
        raise InputError(f"ring must be an integer of at least 0 (tokens that may be taken back), found {ring!r}")
    return ring


def check_stream(stream: object) -> tuple[int, int]:
    """What a query sees of a streamed text: the first `kept` tokens and the last `window`."""
    pair = tuple(stream) if isinstance(stream, tuple | list) else ()
    if len(pair) != 2 or not all(is_count(value, 1) for value in pair):
        raise InputError(
            f"stream must be two integers of at least 1 (tokens kept at the start, window), found {stream!r}"
        )
    return pair


def is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
