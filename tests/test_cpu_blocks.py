"""Tensor descriptors and block pointers on the CPU target: tiles that stick out are cut, and padded as asked."""

import pytest
import torch
import triton
import triton.language as tl

from .on_cpu import randn, run


def has_block_pointers() -> bool:
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


needs_block_pointers = pytest.mark.skipif(not has_block_pointers(), reason="this Triton has no block pointers")


@triton.jit
def tiles_kernel(x_ptr, out_ptr, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[rows, columns], strides=[columns, 1], block_shape=[BM, BN])
    out = tl.make_tensor_descriptor(out_ptr, shape=[rows, columns], strides=[columns, 1], block_shape=[BM, BN])
    row = tl.program_id(0) * BM
    for column in range(0, columns, BN):
        tile = tl.load_tensor_descriptor(x, [row, column])
        out.store([row, column], tile * 2 + tl.sum(tile))
    out.atomic_add([row, 0], x.load([row, 0]))
    tl.store_tensor_descriptor(out, [row, columns - 2], x.load([row, 0]))


def test_descriptors_cut_tiles_at_the_edges(isa):
    x, out = randn(13, 20), torch.zeros(14, 20)
    run(tiles_kernel, (2,), x, out, 13, 20, BM=8, BN=16)
    want = torch.zeros(14, 20)
    for row in (0, 8):
        for column in (0, 16):
            tile = x[row : row + 8, column : column + 16]
            want[row : row + len(tile), column : column + 16] = tile * 2 + tile.sum()
    want[:13, :16] += x[:, :16]
    want[:13, 18:] = x[:, :2]
    torch.testing.assert_close(out, want)


@triton.jit
def rows_kernel(x_ptr, out_ptr, rows_ptr, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[rows, columns], strides=[columns, 1], block_shape=[1, BN])
    out = tl.make_tensor_descriptor(out_ptr, shape=[rows, columns], strides=[columns, 1], block_shape=[1, BN])
    chosen = tl.load(rows_ptr + tl.arange(0, BM))
    out.scatter(x.gather(chosen, 4), chosen, 4)


def test_descriptors_gather_and_scatter_rows():
    x, out = randn(40, 24), torch.zeros(40, 24)
    chosen = torch.tensor([3, 5, 39, 0, 7, 22, 10, 41], dtype=torch.int32)
    run(rows_kernel, (1,), x, out, chosen, 40, 24, BM=8, BN=16)
    want = torch.zeros(40, 24)
    want[chosen[:7].long(), 4:20] = x[chosen[:7].long(), 4:20]
    assert torch.equal(out, want)


@triton.jit
def row_sums_kernel(x_ptr, out_ptr, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    tile_ptr = tl.make_block_ptr(
        x_ptr, (rows, columns), (columns, 1), (tl.program_id(0) * BM, 0), (BM, BN), order=(1, 0)
    )
    total = tl.zeros([BM], tl.float32)
    for _ in range(0, columns, BN):
        total += tl.sum(tl.load(tile_ptr, boundary_check=(0, 1), padding_option="zero"), 1)
        tile_ptr = tl.advance(tile_ptr, (0, BN))
    out_block = tl.make_block_ptr(out_ptr, (rows,), (1,), (tl.program_id(0) * BM,), (BM,), order=(0,))
    tl.store(out_block, total, boundary_check=(0,))


@triton.jit
def padding_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (n, n), (n, 1), (0, 0), (BLOCK, BLOCK), order=(1, 0))
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + place, tl.load(x, boundary_check=(0, 1), padding_option="nan"))


@needs_block_pointers
@pytest.mark.filterwarnings("ignore:.*make_block_ptr is deprecated")
def test_block_pointers_advance_and_are_padded(isa):
    x, out = randn(13, 50), torch.zeros(16)
    run(row_sums_kernel, (2,), x, out, 13, 50, BM=8, BN=16)
    torch.testing.assert_close(out[:13], x.sum(1))
    assert (out[13:] == 0).all()
    square = randn(13, 13)
    padded = torch.zeros(16, 16)
    run(padding_kernel, (1,), square, padded, 13, BLOCK=16)
    assert torch.equal(padded[:13, :13], square)
    assert padded[13:].isnan().all()
    assert padded[:, 13:].isnan().all()
