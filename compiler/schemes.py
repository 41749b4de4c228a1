"""What quantization makes of a model, by name: formats of weights, of heads and embeddings, and of activations."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError
from .formats import FORMATS, spelled


@dataclass(frozen=True)
class Scheme:
    """What linears become. weights: a format, or None for the blocks that the file has. head: the format of what an
    embedding reads or a result is computed with. activations: the format of what is multiplied, None leaves it.
    """

    weights: str | None
    head: str | None
    activations: str | None = None


SCHEMES: dict[str, Scheme | None] = {
    "none": None,
    "stored": Scheme(None, None, "int8_g32"),
    "w8a8": Scheme("int8", "int8", "int8"),
    "w4a8": Scheme("int4_g32", "int8_g32", "int8_g32"),
    "w8": Scheme("int8", "int8"),
    "w4": Scheme("int4_g32", "int8_g32"),
}
"""Schemes by name. "stored" keeps the blocks of a quantized file and leaves what is stored in floating point."""


def scheme_of(name: str) -> Scheme | None:
    """The scheme of a name, or of a format for weights alone; None for "none". Raises InputError for another."""
    if name in SCHEMES:
        return SCHEMES[name]
    if name in FORMATS:
        return Scheme(name, name)
    raise InputError(f"expected a scheme ({', '.join(SCHEMES)}) or a format: {spelled()}; found {name!r}")
