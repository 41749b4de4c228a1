"""Hadamard matrices: entries of +-1 / sqrt(n), orthogonal, so that a rotation spreads each channel over all."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotation(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix [size, size], fp64: a Hadamard matrix with random signs, where there is one.

    Orders are products of 2 and of q + 1 for primes q = 3 mod 4 (Paley, 1933); for others, the Q of a random matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = hadamard(size)
    if matrix is None:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return signs[:, None] * matrix / math.sqrt(size)


def hadamard(size: int) -> Tensor | None:
    """A matrix [size, size] of +-1 with orthogonal rows; None where this construction has none."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    for order in (2, *(n for n in range(4, size + 1, 4) if is_prime(n - 1))):
        if size % order == 0 and (rest := hadamard(size // order)) is not None:
            return torch.kron(SYLVESTER if order == 2 else paley(order - 1), rest)
    return None


SYLVESTER = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def paley(prime: int) -> Tensor:
    """The Hadamard matrix of order prime + 1, for a prime of the form 4 k + 3."""
    squares = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(index[None] - index[:, None]) % prime]
    return skew + torch.eye(prime + 1, dtype=torch.float64)


def is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))
