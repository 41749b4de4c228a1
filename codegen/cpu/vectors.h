// Vectors of 2 to 16 lanes in GCC vector types, masks of them, conversions and bit patterns. What comes first in C++ that
// generated kernels stand on; no system headers but stdint.h: they cost more to compile than a kernel.
#include <stdint.h>

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace tt {

#define VECTORS(N)                                                   \
  typedef float f32x##N __attribute__((vector_size(4 * N)));         \
  typedef double f64x##N __attribute__((vector_size(8 * N)));        \
  typedef int8_t i8x##N __attribute__((vector_size(N)));             \
  typedef int16_t i16x##N __attribute__((vector_size(2 * N)));       \
  typedef int32_t i32x##N __attribute__((vector_size(4 * N)));       \
  typedef int64_t i64x##N __attribute__((vector_size(8 * N)));       \
  typedef uint8_t u8x##N __attribute__((vector_size(N)));            \
  typedef uint16_t u16x##N __attribute__((vector_size(2 * N)));      \
  typedef uint32_t u32x##N __attribute__((vector_size(4 * N)));      \
  typedef uint64_t u64x##N __attribute__((vector_size(8 * N)));
VECTORS(2) VECTORS(4) VECTORS(8) VECTORS(16)
#undef VECTORS
typedef int8_t i8x32 __attribute__((vector_size(32)));  // bytes alone come in vectors as wide as registers
typedef int8_t i8x64 __attribute__((vector_size(64)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

// Vec<T, N>: N lanes of T; Vec<T, 1> is T itself.
template <typename T, int N> struct VecOf { typedef T type __attribute__((vector_size(sizeof(T) * N))); };
template <typename T> struct VecOf<T, 1> { typedef T type; };
template <typename T, int N> using Vec = typename VecOf<T, N>::type;
template <typename T> struct Same { typedef T type; };

// Element and number of lanes of a vector or a scalar.
template <typename T> struct Plain { typedef T type; };
template <typename T> struct Plain<T &> { typedef T type; };
template <typename V, typename = void> struct Lanes { typedef V element; static const int count = 1; };
template <typename V> struct Lanes<V, decltype(void((V{} + V{})[0]))> {
  typedef typename Plain<decltype(((V *)0)[0][0])>::type element;
  static const int count = sizeof(V) / sizeof(element);
};
template <typename V> using Element = typename Lanes<V>::element;
template <typename V, typename T> using Like = Vec<T, Lanes<V>::count>;  // lanes of T, as many as V has

template <typename To, typename From> static inline To convert(From from) {
  if constexpr (Lanes<To>::count == 1) return (To)from; else return __builtin_convertvector(from, To);
}
template <typename To, typename From> static inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}
template <typename V> static inline V splat(Element<V> value) { return value - V{}; }
template <> inline f32x2 splat<f32x2>(float v) { return f32x2{v, v}; }
template <> inline f32x4 splat<f32x4>(float v) { return f32x4{v, v, v, v}; }
template <> inline f32x8 splat<f32x8>(float v) { return f32x8{v, v, v, v, v, v, v, v}; }
template <> inline f32x16 splat<f32x16>(float v) { return f32x16{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }

template <typename V> static inline V iota() {
  V v{};
  for (int k = 0; k < Lanes<V>::count; ++k) v[k] = k;
  return v;
}
template <> inline i32x2 iota<i32x2>() { return i32x2{0, 1}; }
template <> inline i32x4 iota<i32x4>() { return i32x4{0, 1, 2, 3}; }
template <> inline i32x8 iota<i32x8>() { return i32x8{0, 1, 2, 3, 4, 5, 6, 7}; }
template <> inline i32x16 iota<i32x16>() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
// base + stride * lane
template <typename V> static inline V ramp(Element<V> base, Element<V> stride) {
  return splat<V>(base) + splat<V>(stride) * convert<V>(iota<Like<V, int32_t>>());
}

// Masks are bool, or lanes of int32_t that are 0 or -1 whatever they select.
template <typename M> static inline Like<M, int32_t> mask(M m) { return convert<Like<M, int32_t>>(m); }
template <> inline int32_t mask<bool>(bool m) = delete;
template <typename I, typename M> static inline I lanes_mask(M m) {  // as mask, and of a bool 0 or -1
  if constexpr (Lanes<I>::count == 1) return -(I)m; else return convert<I>(m);
}
template <typename M> static inline M below(int32_t count) { return iota<M>() < splat<M>(count); }
template <typename V> static inline V select(bool m, V a, V b) { return m ? a : b; }
template <typename V, typename M> static inline V select(M m, V a, V b) {
  return convert<decltype(a == b)>(m) ? a : b;
}

static inline int32_t clip(int64_t count, int32_t size) { return count < 0 ? 0 : count > size ? size : (int32_t)count; }
// Keeps an array out of registers here: gcc would hold it in them around a loop and spill what that loop works with.
template <typename T, int N> static inline void in_memory(T (&array)[N]) { asm volatile("" : "+m"(array)); }

static inline int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

}  // namespace tt
