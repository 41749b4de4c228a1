"""Print `tt.dot` as C++: acc[BM][BN] += A[BM][BK] * B[BK][BN] for one tile, on one thread.

The code is a call of small static helper functions, which several dots share: `DotCode.helpers` go before the kernel's
function (each carries its own include guard, so a translation unit may hold the same one many times), `DotCode.body`
goes where the dot stands.
"""

from dataclasses import dataclass
from pathlib import Path

TYPES = {"fp32": "float", "bf16": "dot::bfloat16", "fp16": "dot::float16", "i8": "int8_t"}
HELPERS = Path(__file__).with_name("dot.h").read_text()


@dataclass(frozen=True)
class Operand:
    """A tile in memory: element (i, j) is `pointer[i * row_stride + j * col_stride]`.

    All fields but dtype are C expressions; strides count elements and are best given as literals ("1", "64") where they
    are known when printing. bf16 and fp16 may be any 16-bit type in C: the pointer is cast to `const uint16_t *`.
    No alignment beyond the element's own is assumed.
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
    columns past `cols` get a sum of zeros. None means all. Values above the tile's size or below 0 are clamped.

    Products of bf16 and fp16 are exact, sums are fp32. The order of summation is not specified.
    """
    bm, bn, bk = shape
    acc_type = "int32_t" if a.dtype == "i8" else "float"
    left, right = (f"(const {TYPES[x.dtype]} *)({x.pointer}), {x.row_stride}, {x.col_stride}" for x in (a, b))
    limits = ", ".join(str(size) if given is None else given for size, given in zip(shape, (rows, cols, depth)))
    call = f"dot::accumulate<{lanes}, {bm}, {bn}, {bk}, {acc_type}>"
    return DotCode((HELPERS,), [f"{indent}{call}({left}, {right}, {acc}, {limits});"])
