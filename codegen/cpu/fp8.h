// The 8-bit floats, by conversion: uint8_t in memory and float (exactly that value) in registers, as bf16 and fp16 are.
// Converting to them rounds to nearest even and saturates, infinities too, as NVIDIA's cvt.satfinite; NaN stays NaN.
#ifndef EFFC_CPU_FP8_H
#define EFFC_CPU_FP8_H

namespace tt {

// M bits of mantissa, exponents biased by BIAS; LAST is the last code that is a number, infinity included.
template <int M, int BIAS, typename F> static inline F from_fp8(Like<F, uint8_t> code) {
  typedef Like<F, uint32_t> U;
  U w = convert<U>(code);
  const float scale = bits<float>((uint32_t)(254 - BIAS) << 23);  // 2^(127 - BIAS), so that subnormals need no case
  return bits<F>(bits<U>(bits<F>((w & 0x7f) << (23 - M)) * scale) | ((w & 0x80) << 24));
}
template <int M, int BIAS, uint32_t LAST, typename F> static inline Like<F, uint32_t> to_fp8(F x) {
  typedef Like<F, uint32_t> U;
  const uint32_t smallest_normal = (uint32_t)(128 - BIAS) << 23;
  const float last_place = bits<float>((uint32_t)(151 - BIAS - M) << 23);  // added, it rounds to the last subnormal bit
  U a = bits<U>(x) & 0x7fffffff;
  U normal = (a - ((uint32_t)(127 - BIAS) << 23) + ((1u << (22 - M)) - 1) + ((a >> (23 - M)) & 1)) >> (23 - M);
  U tiny = bits<U>(bits<F>(a) + last_place) - bits<uint32_t>(last_place);
  U code = a < U{} + smallest_normal ? tiny : normal;
  return code > U{} + LAST ? U{} + LAST : code;
}

// f8E4M3FN: no infinities, S.1111.111 is NaN. f8E5M2: IEEE.
template <typename F> static inline F from_f8E4M3FN(Like<F, uint8_t> code) {
  typedef Like<F, uint32_t> U;
  U w = convert<U>(code) & 0x7f, x = bits<U>(from_fp8<3, 7, F>(code));
  return bits<F>(w == 0x7f ? x | 0x7fc00000 : x);
}
template <typename F> static inline F from_f8E5M2(Like<F, uint8_t> code) {
  typedef Like<F, uint16_t> H;
  return from_f16<F>((H)(convert<H>(code) << 8));
}
// The FNUZ formats: one NaN, 0x80, in the place of -0; no infinities.
template <typename F> static inline F from_f8E4M3FNUZ(Like<F, uint8_t> code) {
  F nan = F{} + __builtin_nanf("");
  return convert<Like<F, uint32_t>>(code) == 0x80 ? nan : from_fp8<3, 8, F>(code);
}
template <typename F> static inline F from_f8E5M2FNUZ(Like<F, uint8_t> code) {
  F nan = F{} + __builtin_nanf("");
  return convert<Like<F, uint32_t>>(code) == 0x80 ? nan : from_fp8<2, 16, F>(code);
}
template <typename F> static inline F saturated(F x, float largest) {
  return x > largest ? F{} + largest : x < -largest ? F{} - largest : x;
}
#define TO_FP8(KIND, M, BIAS, LAST, LARGEST, NAN_CODE, SIGN)                      \
  template <typename F> static inline Like<F, uint8_t> to_##KIND(F x) {           \
    typedef Like<F, uint32_t> U;                                                  \
    U code = to_fp8<M, BIAS, LAST>(x), sign = (bits<U>(x) >> 24) & 0x80;          \
    return convert<Like<F, uint8_t>>(x != x ? U{} + (NAN_CODE) : code | (SIGN));  \
  }                                                                               \
  SMALL_FLOAT(KIND, uint8_t, saturated(x, LARGEST))
TO_FP8(f8E4M3FN, 3, 7, 0x7e, 448, 0x7f | sign, sign)
TO_FP8(f8E5M2, 2, 15, 0x7c, 57344, 0x7f | sign, sign)
TO_FP8(f8E4M3FNUZ, 3, 8, 0x7f, 240, 0x80, code != 0 ? sign : U{})
TO_FP8(f8E5M2FNUZ, 2, 16, 0x7f, 57344, 0x80, code != 0 ? sign : U{})
#undef TO_FP8

}  // namespace tt
#endif
