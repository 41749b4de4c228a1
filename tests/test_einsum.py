"""einsum of two tensors as a product of matrices, and those that are none."""

import pytest
import torch

from .test_normalize import check

A, B = (
    torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate([(2, 3, 4, 5)] * 2)
)


@pytest.mark.parametrize(
    ("equation", "calls"),
    [
        ("bqhd,bkhd->bhqk", {"permute": 2, "matmul": 1}),
        ("bhqd,bhkd->bhqk", {"permute": 1, "matmul": 1}),
        ("b h d q, b h d k -> b q h k", {"permute": 2, "matmul": 1}),
    ],
)
def test_products_of_matrices(equation: str, calls: dict[str, int]) -> None:
    check(lambda a, b: torch.einsum(equation, a, b), (A, B), calls)


@pytest.mark.parametrize(
    "equation", ["bhqd,bhkd", "...d,...d->...", "bhqd,bhqd->bhqd", "bhqd,bhkd->bqk", "bhqd,bhkd->bhk"]
)
def test_others_are_left_alone(equation: str) -> None:
    check(lambda a, b: torch.einsum(equation, a, b), (A, B), {"einsum": 1})


def test_a_diagonal_is_left_alone() -> None:
    check(lambda a, b: torch.einsum("bhh,bhk->bk", a, b), (A[0, :, :3, :3], B[0, :, :3]), {"einsum": 1})
