"""Print `tt.dot` as C++: acc[BM][BN] += A[BM][BK] * B[BK][BN] for one tile, on one thread.

The code is a call of small static helper functions, which several dots share: `DotCode.helpers` go before the kernel's
function (each carries its own include guard, so a translation unit may hold the same one many times), `DotCode.body`
goes where the dot stands. The algorithm is in dot.h.

Where b's rows run along n, they are read in place. Where they run along k (a row-major weight [N, K], k^T in
attention), each call transposes b into a local panel, so BM should be large; with `rows` <= 4 it takes dot products
along k instead. GFLOP/s of [512, K] x [K, N] in fp32 on one thread (CPU time, best run, AMD Zen 5), beside torch.mm
(MKL) in the same run:

    BM, BN, BK                         K 576, N 1536   K 1536, N 576   K 576, N 49152
    torch.mm                                106             105               94
    lanes 16   256, 64, 64  packed b        236             238              217      packed: [N / BN][K][BN]
                64, 64, 64  packed b        231             240              211
               512, 64, 64  b along k       223             228              208
    lanes 8    256, 64, 64  packed b        113             118              112
                64, 64, 64  packed b        117             119              111
               512, 64, 64  b along k       120             119              116

On two threads the first two read 431 and 455 (lanes 16; torch 219 and 218). BK 128 gains up to 3 % over 64, BK 32 loses
5 %, BN 32 to 128 differ by less than 3 %. bf16 and fp16 operands cost less than 5 %. A first dot adds about 0.1 s of
compile time to a translation unit, each further shape about 15 ms.
"""

from dataclasses import dataclass
from pathlib import Path

TYPES = {"fp32": "float", "bf16": "dot::bfloat16", "fp16": "dot::float16", "i8": "int8_t"}
HELPERS = Path(__file__).with_name("dot.h").read_text()


@dataclass(frozen=True)
class Operand:
    """A tile in memory: element (i, j) is `pointer[i * row_stride + j * col_stride]`.

    All fields but dtype are C expressions; strides count elements and are best given as literals ("1", "64") where they
    are known when printing. The pointer is cast; bf16 and fp16 may be any 16-bit type in C. No alignment beyond the
    element's own is assumed.
    """

    pointer: str
    row_stride: str
    col_stride: str
    dtype: str  # "fp32", "bf16", "fp16", "i8"


@dataclass(frozen=True)
class DotCode:
    """C++ of one dot: functions for file scope (guarded, free to repeat) and the statements that use them."""

    helpers: tuple[str, ...]
    body: list[str]


def emit_dot(
    a: Operand,
    b: Operand,
    acc: str,
    shape: tuple[int, int, int],
    *,
    lanes: int,
    rows: str | None = None,
    cols: str | None = None,
    depth: str | None = None,
    indent: str = "",
) -> DotCode:
    """Print acc += a @ b.

    a: [BM, BK], b: [BK, BN]; both fp32, bf16 or fp16 (mixed is fine), or both i8.
    shape: (BM, BN, BK), powers of two.
    acc: `float *` (`int32_t *` for i8 operands), the first element of a 64-byte aligned row-major [BM][BN] array.
    lanes: fp32 lanes of the target, 16, 8 or 4.
    rows, cols, depth: C integer expressions for how much of BM, BN and BK is there. Elements at or past them are never
    read and count as zeros, as with `tl.load(..., mask, other=0.0)`: acc's rows past `rows` are left alone, acc's
    columns past `cols` are left alone or get a * 0 added (NaN where a is not finite). None means all. Values above
    the tile's size or below 0 are clamped.

    Products of bf16 and fp16 are exact, sums are fp32. The order of summation is not specified.
    """
    bm, bn, bk = shape
    acc_type = "int32_t" if a.dtype == "i8" else "float"
    left, right = (f"(const {TYPES[x.dtype]} *)({x.pointer}), {x.row_stride}, {x.col_stride}" for x in (a, b))
    limits = ", ".join(str(size) if given is None else given for size, given in zip(shape, (rows, cols, depth)))
    call = f"dot::accumulate<{lanes}, {bm}, {bn}, {bk}, {acc_type}>"
    return DotCode((HELPERS,), [f"{indent}{call}({left}, {right}, {acc}, {limits});"])
