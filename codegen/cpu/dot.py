"""Print `tt.dot` as C++: acc[BM][BN] += A[BM][BK] * B[BK][BN] for one tile, on one thread.

The code is a call of small static helper functions, which several dots share: `DotCode.helpers` go before the kernel's
function (each carries its own include guard, so a translation unit may hold the same one many times), `DotCode.body`
goes where the dot stands. dot.h is the algorithm; dot_products.h has the tables of instructions that it multiplies
with, one for each kind of operand and instruction set.

Where b's rows run along n, they are read in place, or packed once per call where an instruction takes several elements
along k. Where they run along k (a row-major weight [N, K], k^T in attention), each call transposes b into a local
panel, so BM should be large; with `rows` <= 4 it takes dot products along k instead.

GFLOP/s of [512, 576] x [576, 1536] on two threads, b packed as [N / 64][K][64], tiles 256 x 64 x 64 (AMD Zen 5, median;
beside it what the machine can do at most with that instruction):

                             AVX2                  AVX-512
    fp32                     257  of 276           483  of 546   (torch.mm, MKL: 222, 222)
    bf16                     233  widened          864  of 1092  (torch: 49, 932)
    int8 (BK 256)            414  of 552           1612 of 2184  (torch._int_mm: 420, 1755)

BK 128 gains up to 3 % over 64 in fp32, BK 32 loses 5 %, BN 32 to 128 differ by less than 3 %. A first dot adds 0.1 to
0.3 s of compile time to a translation unit, each further shape about 15 ms.
"""

from dataclasses import dataclass
from pathlib import Path

TYPES = {"fp32": "float", "bf16": "dot::bfloat16", "fp16": "dot::float16", "i8": "int8_t"}
HELPERS = "".join(Path(__file__).with_name(name).read_text() for name in ("dot_products.h", "dot.h", "dot_words.h"))


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
    values: str = ""  # a narrower dtype that holds each element exactly, where there is one

    @property
    def narrowest(self) -> str:
        return self.values or self.dtype


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
    fresh: bool = False,
    indent: str = "",
) -> DotCode:
    """Print acc += a @ b, or, if `fresh`, acc = a @ b.

    a: [BM, BK], b: [BK, BN]; both fp32, bf16 or fp16 (mixed is fine), or both i8.
    shape: (BM, BN, BK), powers of two.
    acc: `float *` (`int32_t *` for i8 operands), the first element of a 64-byte aligned row-major [BM][BN] array.
    lanes: fp32 lanes of the target, 16, 8 or 4.
    rows, cols, depth: C integer expressions for how much of BM, BN and BK is there. Elements at or past them are never
    read and count as zeros, as with `tl.load(..., mask, other=0.0)`: acc's rows past `rows` are left alone, acc's
    columns past `cols` are left alone or get a * 0 added (NaN where a is not finite). Both are zeros in a
    fresh acc. None means all. Values above the tile's size or below 0 are clamped.

    Products of bf16 and fp16 are exact, sums are fp32; those of i8 are exact modulo 2^32. The order of summation is not
    specified. With AVX512_BF16, products and sums of bf16 below 2^-126 become zeros; subnormal operands count.
    """
    bm, bn, bk = shape
    common = {a.narrowest, b.narrowest}
    values = TYPES[common.pop() if len(common) == 1 else "fp32"]
    left, right = (f"(const {TYPES[x.dtype]} *)({x.pointer}), {x.row_stride}, {x.col_stride}" for x in (a, b))
    limits = ", ".join(str(size) if given is None else given for size, given in zip(shape, (rows, cols, depth)))
    call = f"dot::accumulate<{lanes}, {bm}, {bn}, {bk}, {values}, {'true' if fresh else 'false'}>"
    return DotCode((HELPERS,), [f"{indent}{call}({left}, {right}, {acc}, {limits});"])


def emit_dot_of_words(
    a: Operand, b: Operand, acc: str, shape: tuple[int, int, int], *, lanes: int, most: int, rows: str, depth: str
) -> DotCode:
    """Print acc += a @ b, where b [BK / 4, BN] is words of 4 bytes that follow each other along k, contiguous along n.

    most: what b's bytes are at most, from 0 up; 255 where they are int8. rows, depth: how much of a there is, as for
    `emit_dot`.
    """
    bm, bn, bk = shape
    call = f"dot::accumulate_words<{lanes}, {bm}, {bn}, {bk}, {most}>"
    return DotCode((HELPERS,), [f"{call}({operands_of_words(a, b)}, {rows}, {depth}, {acc});"])


def operands_of_words(a: Operand, b: Operand) -> str:
    left = f"(const int8_t *)({a.pointer}), {a.row_stride}, {a.col_stride}"
    return f"{left}, (const int32_t *)({b.pointer}), {b.row_stride}"


def clipped(ends: list[str], size: int) -> str | None:
    """C text of the least of some ends within 0 .. size; None where nothing ends early."""
    text = None
    for end in ends:
        one = f"clip({end}, {size})"
        text = one if text is None else f"least({text}, {one})"
    return text
