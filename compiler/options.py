"""Options of a compilation that both front ends take, `effc.compile` and torch.compile."""

from __future__ import annotations

from .errors import InputError

ROUNDINGS = ("eager", "fp32")
"""Where 16-bit values are rounded within a kernel: where eager rounds, or nowhere but where they are stored."""


def check_rounding(rounding: str) -> str:
    if rounding not in ROUNDINGS:
        raise InputError(f"expected a rounding of {', '.join(ROUNDINGS)}, found {rounding!r}")
    return rounding
