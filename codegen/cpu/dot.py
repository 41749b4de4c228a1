"""Print `tt.dot` as C++: acc[BM][BN] += A[BM][BK] * B[BK][BN] for one tile, on one thread.

The code is a call of small static helper functions, which several dots share: `DotCode.helpers` go before the kernel's
function (each carries its own include guard, so a translation unit may hold the same one many times), `DotCode.body`
goes where the dot stands.
"""

from dataclasses import dataclass

C_TYPES = {"fp32": "float", "bf16": "uint16_t", "fp16": "uint16_t", "i8": "int8_t"}


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

    def limit(size: int, given: str | None) -> str:
        return str(size) if given is None else f"(({given}) < {size} ? ({given}) : {size})"

    def element(operand: Operand, i: str, j: str) -> str:
        pointer = f"((const {C_TYPES[operand.dtype]} *)({operand.pointer}))"
        value = f"{pointer}[{i} * ({operand.row_stride}) + {j} * ({operand.col_stride})]"
        wrap = {"bf16": "dot_from_bf16", "fp16": "dot_from_fp16", "i8": "(int32_t)"}.get(operand.dtype, "")
        return f"{wrap}({value})"

    body = [
        f"for (int64_t i = 0; i < {limit(bm, rows)}; ++i)",
        f"  for (int64_t j = 0; j < {limit(bn, cols)}; ++j) {{",
        f"    {acc_type} sum = 0;",
        f"    for (int64_t k = 0; k < {limit(bk, depth)}; ++k) sum += {element(a, 'i', 'k')} * {element(b, 'k', 'j')};",
        f"    ({acc})[i * {bn} + j] += sum;",
        "  }",
    ]
    return DotCode((SCALAR_CONVERSIONS,), [indent + line for line in body])


SCALAR_CONVERSIONS = """\
#ifndef DOT_SCALAR_CONVERSIONS
#define DOT_SCALAR_CONVERSIONS
#include <cstdint>
#include <cstring>
static inline float dot_from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
static inline float dot_from_fp16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, bits = (uint32_t)(half & 0x7fff) << 13;
  float value;
  bits += (half & 0x7c00) == 0x7c00 ? 0x70000000 : 0;  // infinity and NaN keep an all-ones exponent
  memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  memcpy(&bits, &value, 4);
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}
#endif
"""
