// Lane operations in AVX2, FMA and F16C, for vectors of 8 lanes, or 4 of 64 bits (see lanes_generic.h for what each does).
#if defined(__AVX2__) && __has_builtin(__builtin_shufflevector)

namespace tt {

typedef char c8x16 __attribute__((vector_size(16)));  // what the builtins call bytes and 64-bit words
typedef char c8x32 __attribute__((vector_size(32)));
typedef long long l64x2 __attribute__((vector_size(16)));
typedef long long l64x4 __attribute__((vector_size(32)));

#define LOW4(v) __builtin_shufflevector(v, v, 0, 1, 2, 3)
#define HIGH4(v) __builtin_shufflevector(v, v, 4, 5, 6, 7)
#define JOIN4(low, high) __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7)

template <> inline bool any_lane(i32x8 m) { return __builtin_ia32_movmskps256((f32x8)m) != 0; }
template <> inline bool all_lanes(i32x8 m) { return __builtin_ia32_movmskps256((f32x8)m) == 0xff; }

// Words of 4 and of 8 bytes: vpmaskmov; gathers by 64-bit addresses, in two halves for 8 lanes.
#ifdef __clang__
#define GATHER4 __builtin_ia32_gatherq_d256
#define GATHER8 __builtin_ia32_gatherq_q256
#else
#define GATHER4 __builtin_ia32_gatherdiv4si256
#define GATHER8 __builtin_ia32_gatherdiv4di
#endif
#define FIRST(V, E, I)                                                                                           \
  template <> inline V load_first<V>(const E *p, int32_t n) { return load_masked<V>(p, below<I>(n)); }           \
  template <> inline void store_first<V>(E *p, V v, int32_t n) { store_masked<V>(p, v, below<I>(n)); }
#define WORDS(V, E)                                                                                              \
  template <> inline V load_masked<V>(const E *p, i32x8 m) {                                                     \
    return (V)__builtin_ia32_maskloadd256((const i32x8 *)p, m);                                                  \
  }                                                                                                              \
  template <> inline void store_masked<V>(E *p, V v, i32x8 m) {                                                  \
    __builtin_ia32_maskstored256((i32x8 *)p, m, (i32x8)v);                                                       \
  }                                                                                                              \
  template <> inline V gather_masked<V>(i64x8 address, i32x8 m) {                                                \
    i32x4 low = GATHER4(i32x4{}, (const int *)0, (l64x4)LOW4(address), LOW4(m), 1);                              \
    i32x4 high = GATHER4(i32x4{}, (const int *)0, (l64x4)HIGH4(address), HIGH4(m), 1);                           \
    return (V)JOIN4(low, high);                                                                                  \
  }                                                                                                              \
  FIRST(V, E, i32x8)
#define LONG_WORDS(V, E)                                                                                         \
  template <> inline V load_masked<V>(const E *p, i32x4 m) {                                                     \
    return (V)__builtin_ia32_maskloadq256((const l64x4 *)p, (l64x4)convert<i64x4>(m));                           \
  }                                                                                                              \
  template <> inline void store_masked<V>(E *p, V v, i32x4 m) {                                                  \
    __builtin_ia32_maskstoreq256((l64x4 *)p, (l64x4)convert<i64x4>(m), (l64x4)v);                                \
  }                                                                                                              \
  template <> inline V gather_masked<V>(i64x4 address, i32x4 m) {                                                \
    return (V)GATHER8(l64x4{}, (const long long *)0, (l64x4)address, (l64x4)convert<i64x4>(m), 1);               \
  }                                                                                                              \
  FIRST(V, E, i32x4)
WORDS(f32x8, float) WORDS(i32x8, int32_t) WORDS(u32x8, uint32_t)
LONG_WORDS(f64x4, double) LONG_WORDS(i64x4, int64_t) LONG_WORDS(u64x4, uint64_t)
#undef WORDS
#undef LONG_WORDS
#undef FIRST
#undef GATHER4
#undef GATHER8

template <> inline f32x8 lesser(f32x8 a, f32x8 b) { return __builtin_ia32_minps256(a, b); }
template <> inline f32x8 greater(f32x8 a, f32x8 b) { return __builtin_ia32_maxps256(a, b); }
#define ROUNDING(V, ROUND, ROOT)                                              \
  template <> inline V round_to_even(V x) { return ROUND(x, 8); }             \
  template <> inline V round_down(V x) { return ROUND(x, 9); }                \
  template <> inline V round_up(V x) { return ROUND(x, 10); }                 \
  template <> inline V round_to_zero(V x) { return ROUND(x, 11); }            \
  template <> inline V square_root(V x) { return ROOT(x); }
ROUNDING(f32x8, __builtin_ia32_roundps256, __builtin_ia32_sqrtps256)
ROUNDING(f64x4, __builtin_ia32_roundpd256, __builtin_ia32_sqrtpd256)
#undef ROUNDING
template <> inline f32x8 fused_multiply_add(f32x8 a, f32x8 b, f32x8 c) { return __builtin_ia32_vfmaddps256(a, b, c); }
template <> inline f64x4 fused_multiply_add(f64x4 a, f64x4 b, f64x4 c) { return __builtin_ia32_vfmaddpd256(a, b, c); }

#ifndef __clang__  // which finds the following by itself, where gcc 12 goes by halves or lane by lane
template <> inline i32x8 convert(i16x8 v) { return __builtin_ia32_pmovsxwd256(v); }
template <> inline u32x8 convert(u16x8 v) { return (u32x8)__builtin_ia32_pmovzxwd256((i16x8)v); }
template <> inline i32x8 convert(u16x8 v) { return __builtin_ia32_pmovzxwd256((i16x8)v); }
template <> inline i32x8 convert(i8x8 v) { return __builtin_ia32_pmovsxbd256((c8x16)l64x2{(int64_t)v, 0}); }
template <> inline i32x8 convert(u8x8 v) { return __builtin_ia32_pmovzxbd256((c8x16)l64x2{(int64_t)v, 0}); }
template <> inline u32x8 convert(u8x8 v) { return (u32x8)convert<i32x8>(v); }
template <> inline f32x8 convert(i8x8 v) { return convert<f32x8>(convert<i32x8>(v)); }
template <> inline f32x8 convert(u8x8 v) { return convert<f32x8>(convert<i32x8>(v)); }
template <> inline f32x8 convert(i16x8 v) { return convert<f32x8>(convert<i32x8>(v)); }
template <> inline f32x8 convert(u16x8 v) { return convert<f32x8>(convert<i32x8>(v)); }

// The low 16 or 8 bits of each word: moved together in each half, then the halves.
static inline i64x2 low_parts(i32x8 v, c8x32 where) {
  i64x4 parts = (i64x4)__builtin_ia32_pshufb256((c8x32)v, where);
  return __builtin_shufflevector(parts, parts, 0, 2);
}
template <> inline i16x8 convert(i32x8 v) {
  return (i16x8)low_parts(v, c8x32{0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                                   0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1});
}
template <> inline i8x8 convert(i32x8 v) {
  i32x4 halves = (i32x4)low_parts(v, c8x32{0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1});
  return (i8x8)((i64x2)__builtin_shufflevector(halves, halves, 0, 2, 1, 3))[0];
}
template <> inline u16x8 convert(i32x8 v) { return (u16x8)convert<i16x8>(v); }
template <> inline u16x8 convert(u32x8 v) { return (u16x8)convert<i16x8>((i32x8)v); }
template <> inline u8x8 convert(i32x8 v) { return (u8x8)convert<i8x8>(v); }
template <> inline u8x8 convert(u32x8 v) { return (u8x8)convert<i8x8>((i32x8)v); }

template <> inline f32x8 from_f16(u16x8 h) { return __builtin_ia32_vcvtph2ps256((i16x8)h); }
template <> inline u16x8 to_f16(f32x8 x) { return (u16x8)__builtin_ia32_vcvtps2ph256(x, 0); }

template <> inline i32x8 multiply_high_u32(i32x8 a, i32x8 b) {
  i32x8 even = (i32x8)__builtin_ia32_pmuludq256(a, b);
  i32x8 odd = (i32x8)__builtin_ia32_pmuludq256((i32x8)((i64x4)a >> 32), (i32x8)((i64x4)b >> 32));
  return __builtin_shufflevector(even, odd, 1, 9, 3, 11, 5, 13, 7, 15);
}
#endif

}  // namespace tt
#endif
