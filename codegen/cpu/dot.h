// tt.dot on one thread: acc[BM][BN] += a[BM][BK] * b[BK][BN], in vectors of words as dot_products.h describes them.
//
// multiply_tile() keeps Rows x Vecs vectors of acc in registers and adds one word of k to each per turn. It wants rows
// of a as words along k, and b as rows of words along n. accumulate() hands it the caller's memory where that is so, and
// packed copies where it is not: b whole, once per call; a in blocks of rows.
// With few rows, b stored along k is not transposed: multiply_row() takes dot products along k instead.
#ifndef EFFC_DOT_H
#define EFFC_DOT_H

namespace dot {

// One step of a butterfly over the bit Half of the lane number: exchange the lanes of x that have it with those of y
// that have not. The steps Lanes/2, Lanes/4, ..., 1 over vectors (i, i + Half) transpose a square of vectors.
template <int Half, int Lanes, typename V, int... Lane>
static inline void exchange(V &x, V &y, std::integer_sequence<int, Lane...>) {
  V low = DOT_SHUFFLE(Lanes, x, y, (Lane & Half ? Lanes + Lane - Half : Lane)...);
  y = DOT_SHUFFLE(Lanes, x, y, (Lane & Half ? Lanes + Lane : Lane + Half)...);
  x = low;
}

// v[i][l] --> v[l][i]
template <int Lanes, int Half = Lanes / 2, typename V>
static inline void transpose(V *v) {
  if constexpr (Half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Lanes; ++i)
      if (!(i & Half)) exchange<Half, Lanes>(v[i], v[i + Half], std::make_integer_sequence<int, Lanes>());
    transpose<Lanes, Half / 2>(v);
  }
}

// The sums of Lanes vectors, lane i for vector i. Overwrites v.
template <int Lanes, int Half = Lanes / 2, typename V>
static inline V sum_lanes(V *v) {
  if constexpr (Half > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Half; ++i) {
      exchange<Half, Lanes>(v[i], v[i + Half], std::make_integer_sequence<int, Lanes>());
      v[i] += v[i + Half];
    }
    return sum_lanes<Lanes, Half / 2>(v);
  }
  return v[0];
}

// An operand in memory: element (k, x) is from[k * k_stride + x * x_stride], where x is a row of a, a column of b.
template <typename S>
struct Operand {
  const S *from;
  int64_t k_stride, x_stride, depth, count;

  const S *at(int64_t k, int64_t x) const { return from + k * k_stride + x * x_stride; }
};

// The word of elements (k, x), (k + 1, x), ...; zeros stand for those outside.
template <typename P, Side side, typename S>
static inline typename P::Word word_at(Operand<S> o, int64_t k, int64_t x) {
  const S zero = {};
  typename P::Element elements[P::group];
  for (int g = 0; g < P::group; ++g)
    elements[g] = P::template element<side>(k + g < o.depth && x < o.count ? o.at(k + g, x) : &zero);
  typename P::Word word;
  __builtin_memcpy(&word, elements, sizeof(word));
  return word;
}

// Copy a block of a to panel[count][words], words of k along k.
template <typename P, int Lanes, typename S>
static __attribute__((noinline)) void pack_rows(Operand<S> a, typename P::Word *panel, int64_t words) {
  int64_t whole = a.k_stride == 1 ? a.depth / (P::group * Lanes) * Lanes : 0;
  for (int64_t x = 0; x < a.count; ++x, panel += words) {
    for (int64_t w = 0; w < whole; w += Lanes)
      store<typename P::Word, Lanes>(panel + w, P::template along_k<left, Lanes>(a.at(w * P::group, x)));
    for (int64_t w = whole; w * P::group < a.depth; ++w) panel[w] = word_at<P, left>(a, w * P::group, x);
  }
}

// Copy b to panel[words of k][width], columns along n; columns past count become zeros.
template <typename P, int Lanes, typename S>
static __attribute__((noinline)) void pack_columns(Operand<S> b, typename P::Word *panel, int64_t width) {
  typedef Vec<typename P::Word, Lanes> Words;
  int64_t words = (b.depth + P::group - 1) / P::group, whole_words = 0, whole_columns = 0;
  if (b.x_stride == 1) {
    whole_words = b.depth / P::group, whole_columns = b.count / Lanes * Lanes;
    for (int64_t w = 0; w < whole_words; ++w)
      for (int64_t x = 0; x < whole_columns; x += Lanes)
        store<typename P::Word, Lanes>(panel + w * width + x,
                                       P::template across<right, Lanes>(b.at(w * P::group, x), b.k_stride));
  } else if (b.k_stride == 1) {
    whole_words = b.depth / (P::group * Lanes) * Lanes, whole_columns = whole_words ? width : 0;
    for (int64_t x = 0; x < whole_columns; x += Lanes)
      for (int64_t w = 0; w < whole_words; w += Lanes) {
        Words block[Lanes];
#pragma GCC unroll 16
        for (int l = 0; l < Lanes; ++l)
          block[l] = x + l < b.count ? P::template along_k<right, Lanes>(b.at(w * P::group, x + l))
                                     : word_at<P, right>(b, 0, b.count) - Words{};
        transpose<Lanes>(block);
#pragma GCC unroll 16
        for (int l = 0; l < Lanes; ++l) store<typename P::Word, Lanes>(panel + (w + l) * width + x, block[l]);
      }
  }
  for (int64_t w = 0; w < words; ++w)
    for (int64_t x = w < whole_words ? whole_columns : 0; x < width; ++x)
      panel[w * width + x] = word_at<P, right>(b, w * P::group, x);
}

// Rows of words of b: in a panel, or made of elements in memory where n is contiguous.
template <typename P>
struct Panel {
  const typename P::Word *words;
  int64_t width;

  void next() { words += width; }
  Panel after(int64_t columns) const { return {words + columns, width}; }
  template <int Lanes>
  Vec<typename P::Word, Lanes> at(int64_t x) const {
    return load<typename P::Word, Lanes>(words + x);
  }
};
template <typename P, typename S>
struct InPlace {
  const S *elements;
  int64_t k_stride;

  void next() { elements += P::group * k_stride; }
  InPlace after(int64_t columns) const { return {elements + columns, k_stride}; }
  template <int Lanes>
  Vec<typename P::Word, Lanes> at(int64_t x) const {
    return P::template across<right, Lanes>(elements + x, k_stride);
  }
};

// Rows of a as words along k. `excess`: what a row's sums are too large by, because of P::right_offset.
template <typename P>
struct Rows {
  const char *first;
  int64_t stride;  // in bytes
  const typename P::Sum *excess;

  template <int Lanes>
  Vec<typename P::Word, Lanes> at(int64_t row, int64_t word) const {
    return load<typename P::Word, Lanes>(first + row * stride + word * 4);
  }
  Rows after(int64_t rows) const { return {first + rows * stride, stride, excess + rows}; }
};

// What becomes of the sums of a tile of registers: finish.columns(j)(i, sum) takes those of row i, columns j, j + 1, ...
// Sums start at zero and are added to c at the end: so the error of a long sum over many calls is that of two short ones.
template <typename Sum, int Lanes>
struct AddTo {
  Sum *c;
  int64_t c_row;

  auto columns(int64_t j) const {
    return [to = c + j, row = c_row](int64_t i, Vec<Sum, Lanes> sum) {
      store<Sum, Lanes>(to + i * row, load<Sum, Lanes>(to + i * row) + sum);
    };
  }
};

// The sums are c, whose old value does not count.
template <typename Sum, int Lanes>
struct StoreTo {
  Sum *c;
  int64_t c_row;

  auto columns(int64_t j) const {
    return [to = c + j, row = c_row](int64_t i, Vec<Sum, Lanes> sum) { store<Sum, Lanes>(to + i * row, sum); };
  }
};

// a[Count][words] * b[words][Vecs * Lanes], handed to `finish` as rows from i_0 and columns from j_0.
template <typename P, int Lanes, int Count, int Vecs, typename B, typename F>
static __attribute__((noinline)) void multiply_tile(Rows<P> a, B b, int64_t words, F finish, int64_t i_0, int64_t j_0) {
  typedef typename P::Sum Sum;
  Vec<Sum, Lanes> sum[Count][Vecs];
#pragma GCC unroll 16
  for (int i = 0; i < Count; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) {
      sum[i][j] = Vec<Sum, Lanes>{};
      if constexpr (P::right_offset != 0) sum[i][j] -= a.excess[i];
    }
  for (int64_t k = 0; k < words; ++k, b.next()) {
    Vec<typename P::Word, Lanes> b_k[Vecs];
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) b_k[j] = b.template at<Lanes>(j * Lanes);
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) {
      Vec<typename P::Word, Lanes> a_ik = a.template at<1>(i, k)[0] - Vec<typename P::Word, Lanes>{};
#pragma GCC unroll 8
      for (int j = 0; j < Vecs; ++j) sum[i][j] = P::template step<Lanes>(a_ik, b_k[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < Vecs; ++j) {
    const auto take = finish.columns(j_0 + j * Lanes);
#pragma GCC unroll 16
    for (int i = 0; i < Count; ++i) take(i_0 + i, P::template total<Lanes>(sum[i][j]));
  }
}

// The largest register tile: 8 x 2 vectors of the 32 registers of AVX-512, 6 x 2 of 16 elsewhere.
template <int Lanes>
constexpr int max_rows = Lanes >= 16 ? 8 : 6;

// a[rows][words] * b[words][BN] for rows up to Count, handed to `finish` as rows from i_0; of the columns, those of the
// register tiles that have one of the first `columns`.
template <typename P, int Lanes, int BN, int Count, typename B, typename F>
static inline void multiply_rows(int64_t rows, Rows<P> a, B b, int64_t words, F finish, int64_t i_0,
                                 int64_t columns = BN) {
  if (rows == Count) {
    constexpr int wide = Count * 4 <= max_rows<Lanes> * 2 ? 4 : 2;
    constexpr int vecs = BN / Lanes < wide ? BN / Lanes : wide;
    for (int64_t j = 0; j < columns; j += vecs * Lanes)
      multiply_tile<P, Lanes, Count, vecs>(a, b.after(j), words, finish, i_0, j);
  } else if constexpr (Count > 1) {
    multiply_rows<P, Lanes, BN, Count - 1>(rows, a, b, words, finish, i_0, columns);
  }
}

// c[Columns] += dot products of one row of a with columns x, x + 1, ... of b, which run along k.
template <typename P, int Lanes, int Columns, typename S>
static inline void multiply_columns(Rows<P> a, Operand<S> b, int64_t x, typename P::Sum *c) {
  typedef Vec<typename P::Word, Lanes> Words;
  Vec<typename P::Sum, Lanes> sum[Columns] = {};
  int64_t whole = b.depth / (P::group * Lanes) * Lanes, words = (b.depth + P::group - 1) / P::group;
  for (int64_t w = 0; w < whole; w += Lanes) {
    Words a_w = a.template at<Lanes>(0, w);
#pragma GCC unroll 16
    for (int l = 0; l < Columns; ++l)
      sum[l] = P::template step<Lanes>(a_w, P::template along_k<right, Lanes>(b.at(w * P::group, x + l)), sum[l]);
  }
  if (whole < words) {
    Words a_w = {};
    for (int64_t w = whole; w < words; ++w) a_w[w - whole] = a.template at<1>(0, w)[0];
#pragma GCC unroll 16
    for (int l = 0; l < Columns; ++l) {
      Words b_w = {};
      for (int64_t w = whole; w < words; ++w) b_w[w - whole] = word_at<P, right>(b, w * P::group, x + l);
      sum[l] = P::template step<Lanes>(a_w, b_w, sum[l]);
    }
  }
  const typename P::Sum excess = P::right_offset ? a.excess[0] : 0;
  if constexpr (Columns == Lanes) {
    store<typename P::Sum, Lanes>(c, load<typename P::Sum, Lanes>(c) + (sum_lanes<Lanes>(sum) - excess));
  } else {
    typename P::Sum total = -excess;
    for (int l = 0; l < Lanes; ++l) total += sum[0][l];
    c[0] += total;
  }
}

// c[b.count] += dot products of one row of a with the columns of b.
template <typename P, int Lanes, typename S>
static __attribute__((noinline)) void multiply_row(Rows<P> a, Operand<S> b, typename P::Sum *c) {
  const int64_t whole = b.count / Lanes * Lanes;
  for (int64_t x = 0; x < whole; x += Lanes) multiply_columns<P, Lanes, Lanes>(a, b, x, c + x);
  for (int64_t x = whole; x < b.count; ++x) multiply_columns<P, Lanes, 1>(a, b, x, c + x);
}

// excess[i]: what the sums of row i are too large by where words of b are P::right_offset larger than its elements.
template <typename P, int Lanes>
static inline void find_excess(Rows<P> a, int64_t rows, int64_t words, typename P::Sum *excess) {
  typedef Vec<typename P::Word, Lanes> Words;
  const Words ones = Words{} + 0x01010101;
  for (int64_t i = 0; i < rows; ++i) {
    Vec<typename P::Sum, Lanes> sum = {};
    int64_t w = 0;
    for (; w + Lanes <= words; w += Lanes) sum = P::template step<Lanes>(a.template at<Lanes>(i, w), ones, sum);
    Words rest = {};
    for (int l = 0; w < words; ++l, ++w) rest[l] = a.template at<1>(i, w)[0];
    sum = P::template step<Lanes>(rest, ones, sum);
    excess[i] = 0;
    for (int l = 0; l < Lanes; ++l) excess[i] += P::right_offset * sum[l];
  }
}

// Whether an operand of bf16, or of floats that hold bf16 values, has subnormal ones.
template <int Lanes, typename S>
static __attribute__((noinline)) bool has_subnormals(Operand<S> o) {
  typedef std::conditional_t<sizeof(S) == 2, uint16_t, uint32_t> Bits;
  constexpr int n = Lanes * 4 / sizeof(S);
  constexpr Bits magnitude = Bits(-1) >> 1, largest = Bits(sizeof(S) == 2 ? 0x7f : 0x7fffff);
  const int64_t lines = o.x_stride == 1 ? o.depth : o.count, line_stride = o.x_stride == 1 ? o.k_stride : o.x_stride;
  const int64_t length = o.x_stride == 1 ? o.count : o.depth, stride = o.x_stride == 1 ? 1 : o.k_stride;
  Vec<Bits, n> least = ~Vec<Bits, n>{};  // of magnitudes less one, where zero becomes the largest number
  Bits least_of_rest = -1;
  for (int64_t line = 0; line < lines; ++line) {
    const S *p = o.from + line * line_stride;
    int64_t i = 0;
    for (; stride == 1 && i + n <= length; i += n) {
      Vec<Bits, n> less_one = (load<Bits, n>(p + i) & magnitude) - 1;
      least = less_one < least ? less_one : least;
    }
    for (; i < length; ++i) {
      Bits less_one = (load<Bits, 1>(p + i * stride)[0] & magnitude) - 1;
      least_of_rest = less_one < least_of_rest ? less_one : least_of_rest;
    }
  }
  for (int l = 0; l < n; ++l) least_of_rest = least[l] < least_of_rest ? least[l] : least_of_rest;
  return least_of_rest < largest;
}

// acc[BM][BN] += a * b in words of P. Where acc is Fresh, it holds no number yet, or zeros where it has more columns than b
// or dot products along k are added to it.
template <typename P, int Lanes, int BM, int BN, int BK, bool Fresh, typename A, typename B>
static __attribute__((noinline)) void multiply(Operand<A> a, Operand<B> b, typename P::Sum *acc) {
  constexpr int block = BM < max_rows<Lanes> ? BM : max_rows<Lanes>;
  constexpr int max_words = (BK + P::group - 1) / P::group;
  constexpr int word_lanes = max_words < Lanes ? max_words : Lanes;
  alignas(64) typename P::Word a_panel[block * max_words], b_panel[max_words * BN];
  typename P::Sum excess[block];
  const int64_t words = (b.depth + P::group - 1) / P::group;
  const bool whole_words = b.depth % P::group == 0;

  const bool along_k = max_words >= Lanes && b.k_stride == 1 && a.count <= 4;
  // Rows of b 4096 bytes apart compete for the same sets of the L1 cache: many rows of a are worth a panel then, and
  // also where a word takes several elements of b. Its type alone is not: converting 16-bit b at each use was faster.
  const bool same_sets = b.k_stride != BN && b.k_stride * int64_t(sizeof(B)) % 4096 == 0;
  const bool in_place = b.x_stride == 1 && b.count == BN && whole_words &&
                        (a.count <= 2 * block || (P::group == 1 && !same_sets));
  if (!along_k && !in_place) pack_columns<P, Lanes>(b, b_panel, BN);

  for (int64_t i = 0; i < a.count; i += block) {
    Operand<A> part = {a.at(0, i), a.k_stride, a.x_stride, a.depth, a.count - i < block ? a.count - i : block};
    Rows<P> rows = {(const char *)a_panel, max_words * 4, excess};
    if (P::template words_in_memory<A> && a.k_stride == 1 && whole_words)
      rows.first = (const char *)part.from, rows.stride = a.x_stride * sizeof(A);
    else
      pack_rows<P, word_lanes>(part, a_panel, max_words);
    if constexpr (P::right_offset != 0) find_excess<P, Lanes>(rows, part.count, words, excess);
    const std::conditional_t<Fresh, StoreTo<typename P::Sum, Lanes>, AddTo<typename P::Sum, Lanes>> finish = {acc, BN};
    if (along_k)
      for (int64_t r = 0; r < part.count; ++r) multiply_row<P, Lanes>(rows.after(r), b, acc + (i + r) * BN);
    else if (in_place)
      multiply_rows<P, Lanes, BN, block>(part.count, rows, InPlace<P, B>{b.from, b.k_stride}, words, finish, i);
    else
      multiply_rows<P, Lanes, BN, block>(part.count, rows, Panel<P>{b_panel, BN}, words, finish, i, b.count);
  }
}

// acc[BM][BN] += a[BM][BK] * b[BK][BN], all of whose elements are exactly of type T; only the first rows, cols and depth
// of BM, BN and BK are read. Fresh: acc holds no number yet, and what is added to is zero.
template <int Lanes, int BM, int BN, int BK, typename T, bool Fresh, typename A, typename B, typename Sum>
static inline void accumulate(const A *a, int64_t a_row, int64_t a_col, const B *b, int64_t b_row, int64_t b_col,
                              Sum *acc, int64_t rows, int64_t cols, int64_t depth) {
  constexpr int lanes = BN < Lanes ? BN : Lanes;
  typedef typename ProductOf<T, lanes>::type P;
  rows = rows < BM ? rows : BM;
  cols = cols < BN ? cols : BN;
  depth = depth < BK ? depth : BK;
  if constexpr (Fresh) {
    const bool all_stored = rows == BM && cols == BN && depth > 0 && BM > 4;
    if (!all_stored) __builtin_memset(acc, 0, sizeof(Sum) * BM * BN);
  }
  if (rows <= 0 || cols <= 0 || depth <= 0) return;
  Operand<A> left = {a, a_col, a_row, depth, rows};
  Operand<B> right = {b, b_row, b_col, depth, cols};
  if constexpr (!P::keeps_subnormals)
    if (has_subnormals<lanes>(left) || has_subnormals<lanes>(right))
      return multiply<Floats, lanes, BM, BN, BK, Fresh>(left, right, acc);
  multiply<P, lanes, BM, BN, BK, Fresh>(left, right, acc);
}
}  // namespace dot
#endif
