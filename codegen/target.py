"""Targets as values: the tile sizes and layouts that kernels are generated with.

The algorithms are the same on every target; what differs is how much one program does at a time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a matrix tile."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class Target:
    """name: "cpu" or "cuda". linear_small and linear_large: tiles for up to `small_rows` rows and for more.

    experts: tile of many tokens' products with their experts' weights, of which each expert has a share only.
    quantized: tile of many rows by quantized weights; its depth is what the format says.
    gemv_k: depth of one step of a product of a packed weight with a vector; gemv_rows: rows of a row-major weight that
    one program multiplies with one. attention: query rows and key columns of a tile.
    decode_keys: keys per step of decode attention. splits: programs that share the keys of one head while decoding.
    min_dot_size: the smallest size that `tl.dot` takes.
    """

    name: str
    linear_small: Tile
    linear_large: Tile
    experts: Tile
    quantized: Tile
    small_rows: int
    gemv_k: int
    gemv_rows: int
    attention: tuple[int, int]
    decode_keys: int
    splits: int
    min_dot_size: int


CPU = Target(
    name="cpu",
    linear_small=Tile(16, 64, 64),
    linear_large=Tile(256, 64, 64),
    experts=Tile(64, 64, 64),
    quantized=Tile(64, 32, 32),
    small_rows=16,
    gemv_k=64,
    gemv_rows=4,
    attention=(64, 128),
    decode_keys=64,
    splits=4,
    min_dot_size=1,
)

CUDA = Target(
    name="cuda",
    linear_small=Tile(16, 64, 64),
    linear_large=Tile(64, 64, 32),
    experts=Tile(64, 64, 32),
    quantized=Tile(64, 64, 32),
    small_rows=16,
    gemv_k=64,
    gemv_rows=8,
    attention=(64, 64),
    decode_keys=64,
    splits=16,
    min_dot_size=16,
)

TARGETS: dict[str, Target] = {target.name: target for target in (CPU, CUDA)}
