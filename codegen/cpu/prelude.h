// What generated kernels stand on: vectors of 2 to 16 lanes in GCC vector types, loads and stores that never touch
// masked-off elements, conversions. No system headers but stdint.h: they cost more to compile than a kernel.
#ifndef EFFC_CPU_PRELUDE_H
#define EFFC_CPU_PRELUDE_H
#include <stdint.h>

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

// Vec<T, N>: N lanes of T; Vec<T, 1> is T itself.
template <typename T, int N> struct VecOf { typedef T type __attribute__((vector_size(sizeof(T) * N))); };
template <typename T> struct VecOf<T, 1> { typedef T type; };
template <typename T, int N> using Vec = typename VecOf<T, N>::type;
template <typename T> struct Same { typedef T type; };

// Element and number of lanes of a vector or a scalar.
template <typename V> struct Lanes { typedef V element; static const int count = 1; };
#define LANES(T, E, N) template <> struct Lanes<T##x##N> { typedef E element; static const int count = N; };
#define LANES_OF(T, E) LANES(T, E, 2) LANES(T, E, 4) LANES(T, E, 8) LANES(T, E, 16)
LANES_OF(f32, float) LANES_OF(f64, double) LANES_OF(i8, int8_t) LANES_OF(i16, int16_t) LANES_OF(i32, int32_t)
LANES_OF(i64, int64_t) LANES_OF(u8, uint8_t) LANES_OF(u16, uint16_t) LANES_OF(u32, uint32_t) LANES_OF(u64, uint64_t)
#undef LANES
#undef LANES_OF
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

template <typename V> static inline V iota();
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
  return __builtin_convertvector(m, decltype(a == b)) ? a : b;
}

static inline int32_t clip(int64_t count, int32_t size) { return count < 0 ? 0 : count > size ? size : (int32_t)count; }
static inline int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

// Memory: T is the type in memory. An `n` version touches the first n elements only.
template <typename T, int N> struct InMemory {
  typedef T type __attribute__((vector_size(sizeof(T) * N), aligned(alignof(T)), may_alias));
};
template <typename V, typename T> static inline V load(const T *p) {
  return convert<V>((Like<V, T>)*(const typename InMemory<T, Lanes<V>::count>::type *)p);
}
template <typename V, typename T> static inline V load_n(const T *p, int32_t n, V other) {
  const int N = Lanes<V>::count;
  if (n >= N) return load<V>(p);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4 && N == 16)
    if constexpr (sizeof(Element<V>) == 4)
      return bits<V>(__builtin_ia32_loaddqusi512_mask((const int *)p, bits<i32x16>(other), n > 0 ? (1u << n) - 1 : 0));
#endif
  for (int k = 0; k < n; ++k) other[k] = (Element<V>)p[k];
  return other;
}
template <typename V, typename T> static inline void store(T *p, V v) {
  *(typename InMemory<T, Lanes<V>::count>::type *)p = convert<Like<V, T>>(v);
}
template <typename V, typename T> static inline void store_n(T *p, V v, int32_t n) {
  const int N = Lanes<V>::count;
  if (n >= N) return store(p, v);
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4 && N == 16)
    if constexpr (sizeof(Element<V>) == 4)
      return __builtin_ia32_storedqusi512_mask((int *)p, bits<i32x16>(v), n > 0 ? (1u << n) - 1 : 0);
#endif
  for (int k = 0; k < n; ++k) p[k] = (T)v[k];
}
template <typename V, typename T> static inline V load_strided(const T *p, int64_t stride, int32_t n, V other) {
  const int N = Lanes<V>::count;
  if (n >= N) {
    for (int k = 0; k < N; ++k) other[k] = (Element<V>)p[k * stride];
    return other;
  }
  for (int k = 0; k < n; ++k) other[k] = (Element<V>)p[k * stride];
  return other;
}
template <typename V, typename T> static inline void store_strided(T *p, int64_t stride, V v, int32_t n) {
  for (int k = 0; k < n; ++k) p[k * stride] = (T)v[k];
}
// Lanes of addresses. m: Like<V, int32_t>, lanes that are 0 touch nothing; n: lanes past it neither.
template <typename V, typename T, typename A, typename M>
static inline V gather(A address, M m, int32_t n, V other) {
  for (int k = 0; k < n && k < Lanes<V>::count; ++k)
    if (m[k]) other[k] = (Element<V>)*(const T *)address[k];
  return other;
}
template <typename T, typename A, typename M, typename V>
static inline void scatter(A address, M m, int32_t n, V v) {
  for (int k = 0; k < n && k < Lanes<V>::count; ++k)
    if (m[k]) *(T *)address[k] = (T)v[k];
}
template <int S, typename V> static inline V rotate(V v) {
  typedef Like<V, int32_t> I;
  const int N = Lanes<V>::count;
  return __builtin_shuffle(v, __builtin_convertvector((iota<I>() + S) & (N - 1), decltype(v == v)));
}

// bf16 and fp16 are uint16_t in memory and float (exactly that value) in registers.
template <typename F> static inline F from_bf16(Like<F, uint16_t> h) {
  return bits<F>(convert<Like<F, uint32_t>>(h) << 16);
}
template <typename F> static inline Like<F, uint16_t> to_bf16(F x) {
  typedef Like<F, uint32_t> U;
  U u = bits<U>(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return convert<Like<F, uint16_t>>(x != x ? (u >> 16) | 0x40 : rounded);
}
template <typename F> static inline F from_f16(Like<F, uint16_t> h) {
  typedef Like<F, uint32_t> U;
  U w = convert<U>(h), sign = (w & 0x8000) << 16, body = (w & 0x7fff) << 13;
  U high = (w & 0x7c00) == 0x7c00 ? U{} + 0x70000000 : U{};
  return bits<F>(bits<U>(bits<F>(body + high) * 0x1p112f) | sign);
}
template <typename F> static inline Like<F, uint16_t> to_f16(F x) {
  typedef Like<F, uint32_t> U;
  U u = bits<U>(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  U normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  U tiny = bits<U>(bits<F>(a) + 0.5f) - 0x3f000000;  // the adder rounds to 2^-24, fp16's last place there
  U h = a < U{} + 0x38800000 ? tiny : a >= U{} + 0x477ff000 ? U{} + 0x7c00 : normal;
  U nan = 0x7e00 | (a >> 13 & 0x3ff);
  return convert<Like<F, uint16_t>>(sign | (a > U{} + 0x7f800000 ? nan : h));
}
// double to float so that rounding once more, to fewer bits, is exact: what is lost makes the last bit odd.
template <typename F, typename D> static inline F narrow_to_odd(D d) {
  typedef Like<F, int32_t> I;
  F f = convert<F>(d);
  D back = convert<D>(f);
  I beyond = lanes_mask<I>((back < 0 ? -back : back) > (d < 0 ? -d : d)), lost = lanes_mask<I>(back != d);
  return bits<F>((bits<I>(f) + beyond) | (lost & 1));
}
template <typename F, typename D> static inline F truncate_f32(D d) {
  typedef Like<F, int32_t> I;
  F f = convert<F>(d);
  D back = convert<D>(f);
  return bits<F>(bits<I>(f) + lanes_mask<I>((back < 0 ? -back : back) > (d < 0 ? -d : d)));
}

// What every small float has, by its to_KIND and from_KIND: rounding of a float to its values, to nearest even or toward
// zero, x being PREPAREd, and memory, where it is CODE.
#define SMALL_FLOAT(KIND, CODE, PREPARE)                                                                               \
  template <typename F> static inline F round_##KIND(F x) { return from_##KIND<F>(to_##KIND(PREPARE)); }         \
  template <typename F> static inline F truncate_##KIND(F x) {                                                   \
    typedef Like<F, CODE> C;                                                                                     \
    C code = to_##KIND(PREPARE);                                                                                 \
    F back = from_##KIND<F>(code);                                                                               \
    return from_##KIND<F>(select((back < 0 ? -back : back) > (x < 0 ? -x : x), (C)(code - 1), code));            \
  }                                                                                                              \
  template <typename V> static inline V load_##KIND(const CODE *p) {                                             \
    return from_##KIND<V>(load<Like<V, CODE>>(p));                                                               \
  }                                                                                                              \
  template <typename V> static inline V load_##KIND##_n(const CODE *p, int32_t n, V other) {                     \
    return from_##KIND<V>(load_n<Like<V, CODE>>(p, n, to_##KIND(other)));                                        \
  }                                                                                                              \
  template <typename V> static inline V load_##KIND##_strided(const CODE *p, int64_t s, int32_t n, V other) {    \
    return from_##KIND<V>(load_strided<Like<V, CODE>>(p, s, n, to_##KIND(other)));                               \
  }                                                                                                              \
  template <typename V, typename A, typename M> static inline V gather_##KIND(A a, M m, int32_t n, V other) {    \
    return from_##KIND<V>(gather<Like<V, CODE>, CODE>(a, m, n, to_##KIND(other)));                               \
  }
SMALL_FLOAT(bf16, uint16_t, x) SMALL_FLOAT(f16, uint16_t, x)

// Bytes that a tile may touch, to tell whether a store may change what a load still has to read.
struct Span { const char *low, *high; };
template <typename T> static inline Span span(const T *p) { return Span{(const char *)p, (const char *)(p + 1)}; }
template <typename T, typename... S> static inline Span span(const T *p, int64_t reach, S... more) {
  Span s = span(p, (int64_t)more...);
  (reach < 0 ? s.low : s.high) += reach * (int64_t)sizeof(T);
  return s;
}
static inline bool overlap(Span a, Span b) { return a.low < b.high && b.low < a.high; }

// Atomics return the old value. Programs of a grid run on several threads.
template <typename T, typename F> static inline T atomic_update(T *p, F change) {
  T old;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  for (;;) {
    T next = change(old);
    if (__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return old;
  }
}
#define ATOMIC(NAME, EXPRESSION)                                                \
  template <typename T> static inline T atomic_##NAME(T *p, T b) {              \
    return atomic_update(p, [=](T a) { return (T)(EXPRESSION); });              \
  }
ATOMIC(fadd, a + b) ATOMIC(add, a + b) ATOMIC(max, a > b ? a : b) ATOMIC(min, a < b ? a : b) ATOMIC(exch, b)
ATOMIC(umax, (uint64_t)a > (uint64_t)b ? a : b) ATOMIC(umin, (uint64_t)a < (uint64_t)b ? a : b)
#undef ATOMIC
#define ATOMIC_BITS(NAME, OPERATOR) \
  template <typename T> static inline T atomic_##NAME(T *p, T b) { return __atomic_fetch_##NAME(p, b, __ATOMIC_ACQ_REL); }
ATOMIC_BITS(and, &) ATOMIC_BITS(or, |) ATOMIC_BITS(xor, ^)
#undef ATOMIC_BITS
template <typename T> static inline T compare_exchange(T *p, T expected, T value) {
  __atomic_compare_exchange(p, &expected, &value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

// Threads are those of the OpenMP runtime that PyTorch has loaded, whichever compiler this is and whatever runtime it
// would bring: the library is not linked to one, and this name, gcc's for a parallel region, is found in the process.
extern "C" void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
template <typename F> static inline void on_threads(int threads, F body) {
  GOMP_parallel([](void *f) { (*(F *)f)(); }, &body, threads, 0);
}
// body(0), ..., body(count - 1): threads take some at a time, and more when they are done with theirs.
template <typename F> static inline void for_each(int64_t count, int threads, F body) {
  const int64_t at_once = count / (32 * threads) + 1;
  int64_t next = 0;
  auto work = [count, at_once, body, &next] {
    for (int64_t i; (i = __atomic_fetch_add(&next, at_once, __ATOMIC_RELAXED)) < count;)
      for (const int64_t end = count - i < at_once ? count : i + at_once; i < end; ++i) body(i);
  };
  if (count > 1) on_threads(threads, work); else work();
}

}  // namespace tt
using namespace tt;
#endif
