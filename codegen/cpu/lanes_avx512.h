// Lane operations in AVX-512 (F, BW, DQ, VL), for vectors of 16 lanes, or 8 of 64 bits (see lanes_generic.h for what each does).
#if defined(__AVX512F__) && __has_builtin(__builtin_shufflevector)

namespace tt {

typedef long long l64x8 __attribute__((vector_size(64)));

#define LOW8(v) __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7)
#define HIGH8(v) __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)
#define JOIN8(low, high) __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)

static inline uint16_t mask_bits(i32x16 m) { return __builtin_ia32_cvtd2mask512(m); }
static inline uint16_t mask_bits(i32x8 m) { return (uint8_t)__builtin_ia32_cvtd2mask256(m); }
static inline uint16_t first_bits(int32_t n) { return n > 0 ? (1u << n) - 1 : 0; }
template <> inline bool any_lane(i32x16 m) { return mask_bits(m) != 0; }
template <> inline bool all_lanes(i32x16 m) { return mask_bits(m) == 0xffff; }

#ifdef __clang__  // what the builtins for narrow elements point to
typedef i16x16 Halves;
typedef c8x16 Bytes;
#else
typedef short Halves;
typedef char Bytes;
#endif
#define MASKED_MEMORY(V, E, M, WORDS, KIND, WORD)                                                                   \
  static inline V load_bits(const E *p, V other, uint16_t k) {                                                   \
    return (V)__builtin_ia32_loaddqu##KIND##_mask((const WORD *)p, (WORDS)other, k);                             \
  }                                                                                                              \
  static inline void store_bits(E *p, V v, uint16_t k) {                                                         \
    __builtin_ia32_storedqu##KIND##_mask((WORD *)p, (WORDS)v, k);                                                \
  }                                                                                                              \
  template <> inline V load_masked<V>(const E *p, M m) {      return load_bits(p, V{}, mask_bits(m)); }          \
  template <> inline void store_masked<V>(E *p, V v, M m) {      store_bits(p, v, mask_bits(m)); }               \
  template <> inline V load_first<V>(const E *p, int32_t n) { return load_bits(p, V{}, first_bits(n)); }         \
  template <> inline void store_first<V>(E *p, V v, int32_t n) { store_bits(p, v, first_bits(n)); }
MASKED_MEMORY(f32x16, float, i32x16, i32x16, si512, int)
MASKED_MEMORY(i32x16, int32_t, i32x16, i32x16, si512, int)
MASKED_MEMORY(u32x16, uint32_t, i32x16, i32x16, si512, int)
MASKED_MEMORY(i16x16, int16_t, i32x16, i16x16, hi256, Halves)
MASKED_MEMORY(u16x16, uint16_t, i32x16, i16x16, hi256, Halves)
MASKED_MEMORY(i8x16, int8_t, i32x16, c8x16, qi128, Bytes)
MASKED_MEMORY(u8x16, uint8_t, i32x16, c8x16, qi128, Bytes)
MASKED_MEMORY(f64x8, double, i32x8, l64x8, di512, long long)
MASKED_MEMORY(i64x8, int64_t, i32x8, l64x8, di512, long long)
MASKED_MEMORY(u64x8, uint64_t, i32x8, l64x8, di512, long long)
#undef MASKED_MEMORY

#define GATHER(V)                                                                                                \
  template <> inline V gather_masked<V>(i64x16 address, i32x16 m) {                                              \
    const uint16_t k = mask_bits(m);                                                                             \
    i32x8 low = __builtin_ia32_gatherdiv16si(i32x8{}, (const int *)0, (l64x8)LOW8(address), k & 0xff, 1);        \
    i32x8 high = __builtin_ia32_gatherdiv16si(i32x8{}, (const int *)0, (l64x8)HIGH8(address), k >> 8, 1);        \
    return (V)JOIN8(low, high);                                                                                  \
  }
#define LONG_GATHER(V)                                                                                           \
  template <> inline V gather_masked<V>(i64x8 address, i32x8 m) {                                                \
    return (V)__builtin_ia32_gatherdiv8di(l64x8{}, (const void *)0, (l64x8)address, mask_bits(m), 1);       \
  }
GATHER(f32x16) GATHER(i32x16) GATHER(u32x16) LONG_GATHER(f64x8) LONG_GATHER(i64x8) LONG_GATHER(u64x8)
#undef GATHER
#undef LONG_GATHER

#ifdef __clang__
#define ROOT(KIND, x) __builtin_ia32_sqrt##KIND##512(x, 4)
#else
#define ROOT(KIND, x) __builtin_ia32_sqrt##KIND##512_mask(x, x, -1, 4)
#endif
#define ROUNDING(V, KIND)                                                                                        \
  template <> inline V round_to_even(V x) { return __builtin_ia32_rndscale##KIND##_mask(x, 8, x, -1, 4); }       \
  template <> inline V round_down(V x) { return __builtin_ia32_rndscale##KIND##_mask(x, 9, x, -1, 4); }          \
  template <> inline V round_up(V x) { return __builtin_ia32_rndscale##KIND##_mask(x, 10, x, -1, 4); }           \
  template <> inline V round_to_zero(V x) { return __builtin_ia32_rndscale##KIND##_mask(x, 11, x, -1, 4); }      \
  template <> inline V square_root(V x) { return ROOT(KIND, x); }
ROUNDING(f32x16, ps) ROUNDING(f64x8, pd)
#undef ROUNDING
#undef ROOT

template <> inline f32x16 fused_multiply_add(f32x16 a, f32x16 b, f32x16 c) {
  return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);
}
template <> inline f64x8 fused_multiply_add(f64x8 a, f64x8 b, f64x8 c) {
  return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, 4);
}

#ifdef __clang__
template <> inline f32x16 lesser(f32x16 a, f32x16 b) { return __builtin_ia32_minps512(a, b, 4); }
template <> inline f32x16 greater(f32x16 a, f32x16 b) { return __builtin_ia32_maxps512(a, b, 4); }
#else  // clang finds the following by itself, where gcc 12 goes by halves or lane by lane
template <> inline f32x16 lesser(f32x16 a, f32x16 b) { return __builtin_ia32_minps512_mask(a, b, a, -1, 4); }
template <> inline f32x16 greater(f32x16 a, f32x16 b) { return __builtin_ia32_maxps512_mask(a, b, a, -1, 4); }

template <> inline i32x16 convert(i16x16 v) { return __builtin_ia32_pmovsxwd512_mask(v, i32x16{}, -1); }
template <> inline i32x16 convert(u16x16 v) { return __builtin_ia32_pmovzxwd512_mask((i16x16)v, i32x16{}, -1); }
template <> inline u32x16 convert(u16x16 v) { return (u32x16)convert<i32x16>(v); }
template <> inline i32x16 convert(i8x16 v) { return __builtin_ia32_pmovsxbd512_mask((c8x16)v, i32x16{}, -1); }
template <> inline i32x16 convert(u8x16 v) { return __builtin_ia32_pmovzxbd512_mask((c8x16)v, i32x16{}, -1); }
template <> inline u32x16 convert(u8x16 v) { return (u32x16)convert<i32x16>(v); }
template <> inline f32x16 convert(i8x16 v) { return convert<f32x16>(convert<i32x16>(v)); }
template <> inline f32x16 convert(u8x16 v) { return convert<f32x16>(convert<i32x16>(v)); }
template <> inline f32x16 convert(i16x16 v) { return convert<f32x16>(convert<i32x16>(v)); }
template <> inline f32x16 convert(u16x16 v) { return convert<f32x16>(convert<i32x16>(v)); }

template <> inline i16x16 convert(i32x16 v) { return __builtin_ia32_pmovdw512_mask(v, i16x16{}, -1); }
template <> inline u16x16 convert(i32x16 v) { return (u16x16)convert<i16x16>(v); }
template <> inline u16x16 convert(u32x16 v) { return (u16x16)convert<i16x16>((i32x16)v); }

template <> inline f32x16 from_f16(u16x16 h) {
  return __builtin_ia32_vcvtph2ps512_mask((i16x16)h, f32x16{}, -1, 4);
}
template <> inline u16x16 to_f16(f32x16 x) { return (u16x16)__builtin_ia32_vcvtps2ph512_mask(x, 0, i16x16{}, -1); }

template <> inline i32x16 multiply_high_u32(i32x16 a, i32x16 b) {
  i32x16 even = (i32x16)__builtin_ia32_pmuludq512_mask(a, b, l64x8{}, -1);
  i32x16 odd = (i32x16)__builtin_ia32_pmuludq512_mask((i32x16)((i64x8)a >> 32), (i32x16)((i64x8)b >> 32), l64x8{}, -1);
  return __builtin_shufflevector(even, odd, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
#endif

}  // namespace tt
#endif
