"""How to choose a token, checked before anything heavy is imported: no torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ..compiler.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token; every value is checked when the object is made.

    temperature: 0 is greedy, else logits are divided by it. top_k: keep the k largest (and ties), 0 is off.
    top_p: keep the most probable tokens until their mass reaches it, 1 is off (Holtzman et al., 2020).
    min_p: keep tokens at least min_p times as probable as the most probable one, 0 is off (Nguyen et al., 2024).
    repetition_penalty: divide positive and multiply negative logits of seen tokens, 1 is off (Keskar et al., 2019).
    seed: what the random numbers start from; None takes one from the operating system.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_real("temperature", self.temperature, "at least 0 (0 is greedy)", lambda value: value >= 0)
        check_integer("top_k", self.top_k, "at least 0 (0 is off)", lambda value: value >= 0)
        check_real("top_p", self.top_p, "above 0 and at most 1 (1 is off)", lambda value: 0 < value <= 1)
        check_real("min_p", self.min_p, "at least 0 and below 1 (0 is off)", lambda value: 0 <= value < 1)
        check_real("repetition_penalty", self.repetition_penalty, "above 0 (1 is off)", lambda value: value > 0)
        if self.seed is not None:
            check_integer("seed", self.seed, "at least 0 and below 2**64", lambda value: 0 <= value < 2**64)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1


def check_real(name: str, value: object, expected: str, holds: Callable[[Any], bool]) -> None:
    """Raise InputError unless `value` is a finite number (not a bool) for which `holds` is true."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not holds(value):
        raise InputError(f"{name} must be a number {expected}, found {value!r}")


def check_integer(name: str, value: object, expected: str, holds: Callable[[Any], bool]) -> None:
    """Raise InputError unless `value` is an integer (not a bool) for which `holds` is true."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not holds(value):
        raise InputError(f"{name} must be an integer {expected}, found {value!r}")


def check_max_new_tokens(value: object) -> None:
    """Raise InputError unless `value` is a number of tokens that can be asked for."""
    check_integer("max_new_tokens", value, "of at least 1", lambda number: number >= 1)
