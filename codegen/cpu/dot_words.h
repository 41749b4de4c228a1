// tt.dot of bytes whose right operand lies in memory as words of four: b[BK / 4][BN], a word's bytes along k. Nothing is
// packed, and the sums need not go to memory: a lambda may take them from the registers (see finish.py).
//
//     VNNI        vpdpbusd; int8 are made uint8, 128 larger
//     AVX2        vpmaddubsw for bytes up to 127, in 16 bits as long as all of a sum fits; else vpmaddwd of 16 bits
//     others      shifts and products of int32
#ifndef EFFC_DOT_WORDS_H
#define EFFC_DOT_WORDS_H

namespace dot {

// Four int8 of a times four of b, which are words in memory, their bytes 0 .. Most, or int8 where Most is 255. A sum has
// Depth bytes. On AVX2 pairs of bytes that are not negative are multiplied and added in 16 bits, where 2 * 127 * 128 fits,
// and stay there where all of a sum does; others are widened first.
template <int Most, int Depth>
struct WordQuads {
  typedef int32_t Sum;
  typedef int32_t Word;
  typedef int8_t Element;
  static constexpr int group = 4;
  static constexpr bool is_signed = Most > 127;
#ifdef DOT_VNNI
  static constexpr int right_offset = is_signed ? 128 : 0;
  static constexpr bool in_shorts = false;
#else
  static constexpr int right_offset = 0;
#ifdef __AVX2__
  static constexpr bool in_shorts = !is_signed && Most * 128 * ((Depth + 3) / 4 * 2) <= 32767;
#else
  static constexpr bool in_shorts = false;
#endif
#endif
  static constexpr bool keeps_subnormals = true;
  template <typename S>
  static constexpr bool words_in_memory = true;

  template <int Lanes>
  static inline Vec<int32_t, Lanes> right_words(Vec<int32_t, Lanes> b) {
    return right_offset ? b ^ (int32_t)0x80808080 : b;
  }
  template <int Lanes>
  static inline Vec<int32_t, Lanes> step(Vec<int32_t, Lanes> a, Vec<int32_t, Lanes> b, Vec<int32_t, Lanes> sum) {
    if constexpr (in_registers<Lanes * 4>) {
#ifdef DOT_VNNI
      asm(DOT_VNNI " %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
      return sum;
#elif defined(__AVX2__)
      typedef Vec<int32_t, Lanes> Words;
      typedef Vec<int16_t, 2 * Lanes> Shorts;
      Words low, high;
      if constexpr (!is_signed) {
        asm("vpmaddubsw %2, %1, %0" : "=v"(low) : "v"(b), "v"(a));
        if constexpr (in_shorts) return (Words)((Shorts)sum + (Shorts)low);
        asm("vpmaddwd %2, %1, %0" : "=v"(high) : "v"(low), "v"(Words{} + 0x00010001));
        return sum + high;
      }
      asm("vpmaddwd %2, %1, %0" : "=v"(low) : "v"(even_bytes<Lanes>(a)), "v"(even_bytes<Lanes>(b)));
      asm("vpmaddwd %2, %1, %0" : "=v"(high) : "v"(odd_bytes<Lanes>(a)), "v"(odd_bytes<Lanes>(b)));
      return sum + low + high;
#endif
    }
#pragma GCC unroll 4
    for (int at = 24; at >= 0; at -= 8) sum += ((a << at) >> 24) * ((b << at) >> 24);
    return sum;
  }
  template <int Lanes>
  static inline Vec<int32_t, Lanes> total(Vec<int32_t, Lanes> sum) {
#ifdef __AVX2__
    if constexpr (in_shorts && in_registers<Lanes * 4>) {
      Vec<int32_t, Lanes> wide;
      asm("vpmaddwd %2, %1, %0" : "=v"(wide) : "v"(sum), "v"(Vec<int32_t, Lanes>{} + 0x00010001));
      return wide;
    }
#endif
    return sum;
  }
  template <int Lanes>
  static inline Vec<int32_t, Lanes> even_bytes(Vec<int32_t, Lanes> words) {
    return (Vec<int32_t, Lanes>)((Vec<int16_t, 2 * Lanes>)words << 8 >> 8);
  }
  template <int Lanes>
  static inline Vec<int32_t, Lanes> odd_bytes(Vec<int32_t, Lanes> words) {
    return (Vec<int32_t, Lanes>)((Vec<int16_t, 2 * Lanes>)words >> 8);
  }
  template <Side>
  static inline int8_t element(const int8_t *p) {
    return *p;
  }
  template <Side, int Lanes>
  static inline Vec<int32_t, Lanes> along_k(const int8_t *p) {
    return load<int32_t, Lanes>(p);
  }
};

// Rows of words of b.
template <typename P>
struct WordsInPlace {
  const int32_t *words;
  int64_t stride;

  void next() { words += stride; }
  WordsInPlace after(int64_t columns) const { return {words + columns, stride}; }
  template <int Lanes>
  Vec<int32_t, Lanes> at(int64_t x) const {
    return P::template right_words<Lanes>(load<int32_t, Lanes>(words + x));
  }
};

// Rows i, i + 1, ... of a[rows][BK] * b[BK / 4][BN] by blocks of Count, the rest by smaller ones: of every size where a tile
// has few rows, else of 4, 2 and 1, which is less to compile.
template <typename P, int Lanes, int BM, int BN, int BK, int Count, typename F>
static inline void multiply_blocks(Operand<int8_t> a, WordsInPlace<P> b, int64_t i, F finish) {
  constexpr int wide = Count * 4 <= max_rows<Lanes> * 2 ? 4 : 2, vecs = BN / Lanes < wide ? BN / Lanes : wide;
  const int64_t words = (a.depth + 3) / 4;
  alignas(64) int32_t panel[Count * (BK / 4)], excess[Count];
  for (; i + Count <= a.count; i += Count) {
    const Operand<int8_t> part = {a.at(0, i), a.k_stride, a.x_stride, a.depth, Count};
    Rows<P> rows = {(const char *)panel, BK, excess};
    if (a.k_stride == 1 && a.depth % 4 == 0)
      rows.first = (const char *)part.from, rows.stride = a.x_stride;
    else
      pack_rows<P, 1>(part, panel, BK / 4);
    if constexpr (P::right_offset != 0) find_excess<P, Lanes>(rows, Count, words, excess);
    for (int j = 0; j < BN; j += vecs * Lanes)
      multiply_tile<P, Lanes, Count, vecs>(rows, b.after(j), words, finish, i, j);
  }
  constexpr int smaller = BM <= 16 ? Count - 1 : Count == 6 ? 4 : Count / 2;
  if constexpr (smaller > 0) multiply_blocks<P, Lanes, BM, BN, BK, smaller>(a, b, i, finish);
}

// a[BM][BK] * b, which is words of 4 bytes [BK / 4][BN], 0 .. Most or, where that is 255, int8; handed to `finish`. Only
// the first rows and depth of BM and BK are read of a.
template <int Lanes, int BM, int BN, int BK, int Most, typename F>
static inline void multiply_words(const int8_t *a, int64_t a_row, int64_t a_col, const int32_t *b, int64_t b_row,
                                  int64_t rows, int64_t depth, F finish) {
  typedef WordQuads<Most, BK> P;
  rows = rows < BM ? rows : BM;
  depth = depth < 0 ? 0 : depth < BK ? depth : BK;
  constexpr int block = BM < max_rows<Lanes> ? BM : max_rows<Lanes>;
  multiply_blocks<P, Lanes, BM, BN, BK, block>({a, a_col, a_row, depth, rows}, WordsInPlace<P>{b, b_row}, 0, finish);
}

// acc[BM][BN] += a[BM][BK] * b as words.
template <int Lanes, int BM, int BN, int BK, int Most>
static __attribute__((noinline)) void accumulate_words(const int8_t *a, int64_t a_row, int64_t a_col, const int32_t *b,
                                                       int64_t b_row, int64_t rows, int64_t depth, int32_t *acc) {
  constexpr int lanes = BN < Lanes ? BN : Lanes;
  const AddTo<int32_t, lanes> finish = {acc, BN};
  multiply_words<lanes, BM, BN, BK, Most>(a, a_row, a_col, b, b_row, rows, depth, finish);
}

// Hands sums of 0 to `columns`, of rows from `from` on.
template <int Lanes, int BM, int BN, typename F>
static __attribute__((noinline)) void finish_zeros(int64_t from, F columns) {
  for (int64_t j = 0; j < BN; j += Lanes) {
    const auto take = columns(j);
    for (int64_t i = from; i < BM; ++i) take(i, Vec<int32_t, Lanes>{});
  }
}

template <typename F>
struct Columns {
  F columns;
};
template <typename F>
static inline Columns<F> finished_by(F columns) {
  return {columns};
}
}  // namespace dot
#endif
