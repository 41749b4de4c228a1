// What generated kernels stand on besides vectors: loads and stores that never touch masked-off elements, floats of 16
// bits, spans of addresses, atomics, threads.

namespace tt {

// Memory: T is the type in memory. An `n` version touches the first n elements only.
template <typename T, int N> struct InMemory {
  typedef T type __attribute__((vector_size(sizeof(T) * N), aligned(alignof(T)), may_alias));
};
template <typename V, typename T> static inline V load(const T *p) {
  return convert<V>((Like<V, T>)*(const typename InMemory<T, Lanes<V>::count>::type *)p);
}
template <typename V, typename T> static inline V load_n(const T *p, int32_t n, V other) {
  if (n >= Lanes<V>::count) return load<V>(p);
  if (n <= 0) return other;
  return select(below<Like<V, int32_t>>(n), convert<V>(load_first<Like<V, T>>(p, n)), other);
}
template <typename V, typename T> static inline void store(T *p, V v) {
  *(typename InMemory<T, Lanes<V>::count>::type *)p = convert<Like<V, T>>(v);
}
template <typename V, typename T> static inline void store_n(T *p, V v, int32_t n) {
  if (n >= Lanes<V>::count) return store(p, v);
  if (n > 0) store_first<Like<V, T>>(p, convert<Like<V, T>>(v), n);
}
// m: Like<V, int32_t>, lanes that are 0 touch nothing; n: lanes past it neither.
template <typename V, typename T, typename M> static inline V load_where(const T *p, M m, int32_t n, V other) {
  if (n < Lanes<V>::count) m &= below<M>(n);
  if (all_lanes(m)) return load<V>(p);
  return select(m, convert<V>(load_masked<Like<V, T>>(p, m)), other);
}
template <typename T, typename M, typename V> static inline void store_where(T *p, M m, int32_t n, V v) {
  if (n < Lanes<V>::count) m &= below<M>(n);
  if (all_lanes(m)) store(p, v); else store_masked<Like<V, T>>(p, convert<Like<V, T>>(v), m);
}
template <typename V, typename T> static inline V load_strided(const T *p, int64_t stride, int32_t n, V other) {
  const int N = Lanes<V>::count;
  if (n >= N) {
    UNROLL for (int k = 0; k < N; ++k) other[k] = (Element<V>)p[k * stride];
    return other;
  }
  for (int k = 0; k < n; ++k) other[k] = (Element<V>)p[k * stride];
  return other;
}
template <typename V, typename T> static inline void store_strided(T *p, int64_t stride, V v, int32_t n) {
  for (int k = 0; k < n; ++k) p[k * stride] = (T)v[k];
}
// Lanes of addresses, m and n as above. Scalar loads are at least as fast as a gather instruction, unless each needs a
// branch.
template <typename V, typename T, typename A, typename M>
static inline V gather(A address, M m, int32_t n, V other) {
  const int N = Lanes<V>::count;
  if (n < N) m &= below<M>(n);
  if (all_lanes(m)) {
    UNROLL for (int k = 0; k < N; ++k) other[k] = (Element<V>)*(const T *)address[k];
    return other;
  }
  return select(m, convert<V>(gather_masked<Like<V, T>>(address, m)), other);
}
template <typename T, typename A, typename M, typename V>
static inline void scatter(A address, M m, int32_t n, V v) {
  const int N = Lanes<V>::count;
  if (n < N) m &= below<M>(n);
  if (all_lanes(m)) {
    UNROLL for (int k = 0; k < N; ++k) *(T *)address[k] = (T)v[k];
  } else {
    scatter_masked<Like<V, T>>(address, m, convert<Like<V, T>>(v));
  }
}

// bf16 is uint16_t in memory and float (exactly that value) in registers, as fp16 is.
template <typename F> static inline F from_bf16(Like<F, uint16_t> h) {
  return bits<F>(convert<Like<F, uint32_t>>(h) << 16);
}
template <typename F> static inline Like<F, uint16_t> to_bf16(F x) {
  typedef Like<F, uint32_t> U;
  U u = bits<U>(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return convert<Like<F, uint16_t>>(x != x ? (u >> 16) | 0x40 : rounded);
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
  template <typename V, typename M> static inline V load_##KIND##_where(const CODE *p, M m, int32_t n, V other) { \
    return from_##KIND<V>(load_where<Like<V, CODE>>(p, m, n, to_##KIND(other)));                                 \
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
// Whether two elements of a tile of N dimensions have one address.
template <int N> static inline bool lanes_meet(const int64_t (&strides)[N], const int64_t (&sizes)[N]) {
  bool done[N] = {};
  for (int64_t turn = 0, reach = 0; turn < N; ++turn) {  // from the smallest stride: each must pass what is below it
    int next = -1;
    int64_t least = INT64_MAX;
    for (int k = 0; k < N; ++k)
      if (int64_t stride = strides[k] < 0 ? -strides[k] : strides[k]; !done[k] && stride < least)
        least = stride, next = k;
    if (next < 0 || least <= reach) return true;
    done[next] = true, reach += least * (sizes[next] - 1);
  }
  return false;
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
template <typename T> static inline T atomic_read(T *p) {
  T value;
  __atomic_load(p, &value, __ATOMIC_ACQUIRE);
  return value;
}
template <typename T> static inline T compare_exchange(T *p, T expected, T value) {
  __atomic_compare_exchange(p, &expected, &value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return expected;
}

// What the arrays of a program lie in where they are too large for a thread's stack.
struct Scratch {
  char *whole, *at;
  explicit Scratch(int64_t bytes) : whole((char *)__builtin_malloc(bytes + 63)) {
    if (!whole) __builtin_trap();
    at = whole + (-(uint64_t)whole & 63);
  }
  Scratch(const Scratch &) = delete;
  ~Scratch() { __builtin_free(whole); }
};

}  // namespace tt
using namespace tt;
