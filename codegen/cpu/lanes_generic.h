// The lane operations that instruction sets have instructions for, in plain C++ and GCC vector types: these run on any
// architecture. The table of an instruction set (lanes_avx2.h, lanes_avx512.h) specializes them for its own vectors.
// All multi-byte tricks take the machine to be little-endian.

namespace tt {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "only little-endian machines");

template <typename M> static inline bool any_lane(M m) {
  bool any = false;
  if constexpr (Lanes<M>::count == 1) any = m != 0; else for (int k = 0; k < Lanes<M>::count; ++k) any |= m[k] != 0;
  return any;
}
template <typename M> static inline bool all_lanes(M m) { return !any_lane(~m); }

// Memory of V's own type. Lanes that are masked off touch nothing, and are 0 when they are loaded.

// The first `count` bytes at p, 1 to 15, as the low bytes of a number: two overlapping reads, no loop.
template <typename T> static inline T read(const void *p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}
template <typename T> static inline void write(void *p, T value) { __builtin_memcpy(p, &value, sizeof(T)); }
static inline unsigned __int128 read_bytes(const char *p, int count) {
  typedef unsigned __int128 Wide;
  if (count >= 8) return read<uint64_t>(p) | (Wide)read<uint64_t>(p + count - 8) << 8 * (count - 8);
  if (count >= 4) return read<uint32_t>(p) | (uint64_t)read<uint32_t>(p + count - 4) << 8 * (count - 4);
  if (count >= 2) return read<uint16_t>(p) | read<uint16_t>(p + count - 2) << 8 * (count - 2);
  return (uint8_t)*p;
}
static inline void write_bytes(char *p, unsigned __int128 value, int count) {
  if (count >= 8) write<uint64_t>(p, value), write<uint64_t>(p + count - 8, value >> 8 * (count - 8));
  else if (count >= 4) write<uint32_t>(p, value), write<uint32_t>(p + count - 4, value >> 8 * (count - 4));
  else if (count >= 2) write<uint16_t>(p, value), write<uint16_t>(p + count - 2, value >> 8 * (count - 2));
  else *p = value;
}

// The first n lanes, 0 < n < count.
template <typename V> static inline V load_first(const Element<V> *p, int32_t n) {
  if constexpr (sizeof(V) == 16) return bits<V>(read_bytes((const char *)p, n * sizeof(*p)));
  else if constexpr (sizeof(V) == 8) return bits<V>((uint64_t)read_bytes((const char *)p, n * sizeof(*p)));
  else {
    V v{};
    for (int k = 0; k < n; ++k) v[k] = p[k];
    return v;
  }
}
template <typename V> static inline void store_first(Element<V> *p, V v, int32_t n) {
  if constexpr (sizeof(V) == 16) write_bytes((char *)p, bits<unsigned __int128>(v), n * sizeof(*p));
  else if constexpr (sizeof(V) == 8) write_bytes((char *)p, bits<uint64_t>(v), n * sizeof(*p));
  else for (int k = 0; k < n; ++k) p[k] = v[k];
}
// A lane that is masked off reads and writes a spare element: that is cheaper than a branch that is hard to foresee.
template <typename V> static inline V load_masked(const Element<V> *p, Like<V, int32_t> m) {
  const Element<V> zero = 0;
  V v;
  UNROLL for (int k = 0; k < Lanes<V>::count; ++k) v[k] = *(m[k] ? p + k : &zero);
  return v;
}
template <typename V> static inline void store_masked(Element<V> *p, V v, Like<V, int32_t> m) {
  Element<V> spare;
  UNROLL for (int k = 0; k < Lanes<V>::count; ++k) *(m[k] ? p + k : &spare) = v[k];
}
template <typename V> static inline V gather_masked(Like<V, int64_t> address, Like<V, int32_t> m) {
  const Element<V> zero = 0;
  V v;
  UNROLL for (int k = 0; k < Lanes<V>::count; ++k) v[k] = *(m[k] ? (const Element<V> *)address[k] : &zero);
  return v;
}
template <typename V> static inline void scatter_masked(Like<V, int64_t> address, Like<V, int32_t> m, V v) {
  Element<V> spare;
  UNROLL for (int k = 0; k < Lanes<V>::count; ++k) *(m[k] ? (Element<V> *)address[k] : &spare) = v[k];
}

// v[k + S], round the end.
template <int S, typename V> static inline V rotate(V v) {
  const int N = Lanes<V>::count;
#ifdef __clang__
  V rotated;
  for (int k = 0; k < N; ++k) rotated[k] = v[(k + S) & (N - 1)];
  return rotated;
#else
  typedef Like<V, int32_t> I;
  return __builtin_shuffle(v, __builtin_convertvector((iota<I>() + S) & (N - 1), decltype(v == v)));
#endif
}

// fp16, which is uint16_t, and the float of the same value.
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

#define LANEWISE(NAME, CALL)                                                       \
  template <typename F> static inline F NAME(F x) {                                \
    if constexpr (Lanes<F>::count > 1) {                                           \
      for (int k = 0; k < Lanes<F>::count; ++k) x[k] = NAME<Element<F>>(x[k]);     \
      return x;                                                                    \
    } else if constexpr (sizeof(F) == 8) return CALL(x); else return CALL##f(x);   \
  }
LANEWISE(square_root, __builtin_sqrt) LANEWISE(floor_lanes, __builtin_floor)
LANEWISE(rint_lanes, __builtin_rint) LANEWISE(trunc_lanes, __builtin_trunc)
#undef LANEWISE

// a b + c rounded once. (Compilers fuse a * b + c only where the product has no other use.)
template <typename F> static inline F fused_multiply_add(F a, F b, F c) {
  if constexpr (Lanes<F>::count > 1) {
    for (int k = 0; k < Lanes<F>::count; ++k) c[k] = fused_multiply_add<Element<F>>(a[k], b[k], c[k]);
    return c;
  } else if constexpr (sizeof(F) == 8) return __builtin_fma(a, b, c); else return __builtin_fmaf(a, b, c);
}

// fp32 x, or `whole` with x's sign where x has a fraction, which it has not from 2^23 on
template <typename F> static inline F where_fractional(F x, F whole) {
  typedef Like<F, int32_t> I;
  I i = bits<I>(x), size = i & INT32_MAX;
  return size < 0x4b000000 ? bits<F>((bits<I>(whole) & INT32_MAX) | (i & INT32_MIN)) : x;
}
template <typename F> static inline F round_to_zero(F x) {
  if constexpr (sizeof(Element<F>) == 8) return trunc_lanes(x);
  else return where_fractional<F>(x, convert<F>(convert<Like<F, int32_t>>(x)));
}
// The second one where either is NaN.
template <typename F> static inline F lesser(F a, F b) { return a < b ? a : b; }
template <typename F> static inline F greater(F a, F b) { return a > b ? a : b; }
template <typename F> static inline F round_down(F x) {
  if constexpr (sizeof(Element<F>) == 8) return floor_lanes(x);
  else {
    F whole = convert<F>(convert<Like<F, int32_t>>(x));
    return where_fractional<F>(x, whole > x ? whole - 1 : whole);
  }
}
template <typename F> static inline F round_to_even(F x) {
  if constexpr (sizeof(Element<F>) == 8) return rint_lanes(x);
  else return where_fractional<F>(x, x < 0 ? (x - 0x1p23f) + 0x1p23f : (x + 0x1p23f) - 0x1p23f);
}
template <typename F> static inline F round_up(F x) { return -round_down<F>(-x); }

// The upper half of a product of 32-bit integers without sign
template <typename V> static inline V multiply_high_u32(V a, V b) {
  typedef Like<V, uint32_t> U;
  typedef Like<V, uint64_t> W;
  return bits<V>(convert<U>((convert<W>(bits<U>(a)) * convert<W>(bits<U>(b))) >> 32));
}

}  // namespace tt
