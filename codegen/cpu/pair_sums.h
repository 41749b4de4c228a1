// Sums of products of bytes, 16 columns or more at a time: a0[column] * b0 + a1[column] * b1, over and over.
//
// Bytes of the two columns are interleaved, so that an instruction can multiply neighbours and add them. That is done in
// each 16 bytes of a vector: the first half of the results belongs to columns 0-7, 16-23, ..., the other to 8-15, ...
//
//     ShortPairs   a -128 .. 127, b 16 bits: widened, vpmaddwd; sums are int32, exact modulo 2^32
//     BytePairs    a 0 .. 255, b -128 .. 127: vpmaddubsw; sums are int16 until widen(), which must come before they may
//                  overflow: the caller has proved how many pairs that is
#ifndef EFFC_PAIR_SUMS_H
#define EFFC_PAIR_SUMS_H
#include <utility>

namespace pairs {
using namespace tt;

template <int N> using Bytes = Vec<int8_t, N>;
template <int N> using Shorts = Vec<int16_t, N>;
template <int N> using Words = Vec<int32_t, N>;

template <int N>
static inline void interleave(Bytes<N> x, Bytes<N> y, Bytes<N> &low, Bytes<N> &high) {
  asm("vpunpcklbw %2, %1, %0" : "=v"(low) : "v"(x), "v"(y));
  asm("vpunpckhbw %2, %1, %0" : "=v"(high) : "v"(x), "v"(y));
}

// Lanes First, First + 1, ... of a vector.
template <int Count, int First, typename V, int... Lane>
static inline Vec<Element<V>, Count> slice(V v, std::integer_sequence<int, Lane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(v, v, (First + Lane)...);
#else
  return Vec<Element<V>, Count>{v[First + Lane]...};
#endif
}
template <int Count, int First, typename V>
static inline Vec<Element<V>, Count> slice(V v) {
  return slice<Count, First>(v, std::make_integer_sequence<int, Count>());
}

// Sums of the columns of one interleaved vector, in int32: 8 columns, then 8 of the other one's, and so on.
template <int N>
struct Sums {
  Words<N / 4> first = {}, second = {};  // of the vector's halves

  inline void store_to(int32_t *to, int32_t more) const {
    store_columns(to, first + more);
    store_columns(to + N / 2, second + more);
  }
  static inline void store_columns(int32_t *to, Words<N / 4> sums) {
    store(to, slice<8, 0>(sums));
    if constexpr (N == 64) store(to + 16, slice<8, 8>(sums));
  }
};

template <int N>
struct ShortPairs {
  Sums<N> low, high;

  static inline void add_half(Words<N / 4> &sums, Vec<int8_t, N / 2> bytes, Words<N / 4> b) {
    Words<N / 4> wide, product;
    asm("vpmovsxbw %1, %0" : "=v"(wide) : "v"(bytes));
    asm("vpmaddwd %2, %1, %0" : "=v"(product) : "v"(wide), "v"(b));
    sums += product;
  }
  inline void add(Bytes<N> a0, Bytes<N> a1, int32_t b0, int32_t b1) {
    const Words<N / 4> b = splat<Words<N / 4>>((b0 & 0xffff) | (int32_t)((uint32_t)b1 << 16));
    Bytes<N> x, y;
    interleave<N>(a0, a1, x, y);
    add_half(low.first, slice<N / 2, 0>(x), b);
    add_half(low.second, slice<N / 2, N / 2>(x), b);
    add_half(high.first, slice<N / 2, 0>(y), b);
    add_half(high.second, slice<N / 2, N / 2>(y), b);
  }
  inline void store_to(int32_t *to, int32_t more) const {
    low.store_to(to, more);
    high.store_to(to + 8, more);
  }
};

template <int N>
struct BytePairs {
  Shorts<N / 2> narrow_low = {}, narrow_high = {};
  Sums<N> low, high;

  inline void add(Bytes<N> a0, Bytes<N> a1, int32_t b0, int32_t b1) {
    const Shorts<N / 2> b = splat<Shorts<N / 2>>((int16_t)((b0 & 0xff) | b1 * 256));
    Bytes<N> x, y;
    interleave<N>(a0, a1, x, y);
    Shorts<N / 2> product_low, product_high;
    asm("vpmaddubsw %2, %1, %0" : "=v"(product_low) : "v"(x), "v"(b));
    asm("vpmaddubsw %2, %1, %0" : "=v"(product_high) : "v"(y), "v"(b));
    narrow_low += product_low;
    narrow_high += product_high;
  }
  static inline void widen(Shorts<N / 2> &narrow, Sums<N> &sums) {
    Words<N / 4> wide;
    asm("vpmovsxwd %1, %0" : "=v"(wide) : "v"(slice<N / 4, 0>(narrow)));
    sums.first += wide;
    asm("vpmovsxwd %1, %0" : "=v"(wide) : "v"(slice<N / 4, N / 4>(narrow)));
    sums.second += wide;
    narrow = Shorts<N / 2>{};
  }
  inline void widen() {
    widen(narrow_low, low);
    widen(narrow_high, high);
  }
  inline void store_to(int32_t *to, int32_t more) {
    widen();
    low.store_to(to, more);
    high.store_to(to + 8, more);
  }
};
}  // namespace pairs
#endif
