// tt.dot on one thread: acc[BM][BN] += a[BM][BK] * b[BK][BN], all row-major, in GCC vector types.
//
// multiply_tile() keeps Rows x Vecs vectors of acc in registers and adds one rank-1 update per k. It wants rows of a
// that run along k in the type of acc, and rows of b that run along n. accumulate() hands it the caller's memory where
// that is so, and packed copies where it is not: b whole, once per call; a in blocks of rows.
// With few rows, b stored along k is not transposed: multiply_row() takes dot products along k instead.
#ifndef EFFC_DOT_H
#define EFFC_DOT_H
#include <cstdint>
#include <type_traits>
#include <utility>

namespace dot {

struct bfloat16 {
  uint16_t bits;
} __attribute__((may_alias));
struct float16 {
  uint16_t bits;
} __attribute__((may_alias));

template <typename T, int Lanes>
struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * Lanes)));
  typedef T in_memory __attribute__((vector_size(sizeof(T) * Lanes), aligned(alignof(T)), may_alias));
};
template <typename T, int Lanes>
using Vec = typename Vector<T, Lanes>::type;

template <typename T, int Lanes>
static inline Vec<T, Lanes> load(const T *p) {
  return *(const typename Vector<T, Lanes>::in_memory *)p;
}
template <typename T, int Lanes>
static inline void store(T *p, Vec<T, Lanes> v) {
  *(typename Vector<T, Lanes>::in_memory *)p = v;
}

// Lanes elements of an operand as T: fp32, or int32 for int8.
template <typename T, int Lanes>
static inline Vec<T, Lanes> load_as(const T *p) {
  return load<T, Lanes>(p);
}
template <typename T, int Lanes>
static inline Vec<int32_t, Lanes> load_as(const int8_t *p) {
  return __builtin_convertvector(load<int8_t, Lanes>(p), Vec<int32_t, Lanes>);
}
template <typename T, int Lanes>
static inline Vec<float, Lanes> load_as(const bfloat16 *p) {
  typedef Vec<uint32_t, Lanes> Bits;
  Vec<uint16_t, Lanes> half = load<uint16_t, Lanes>(&p->bits);
#if defined(__AVX2__) && !defined(__clang__)  // gcc 12 widens in two halves: 1.5 times slower in multiply_tile
  if constexpr (Lanes == 8) return (Vec<float, 8>)((Bits)__builtin_ia32_pmovzxwd256((Vec<int16_t, 8>)half) << 16);
#endif
#if defined(__AVX512F__) && !defined(__clang__)
  if constexpr (Lanes == 16)
    return (Vec<float, 16>)((Bits)__builtin_ia32_pmovzxwd512_mask((Vec<int16_t, 16>)half, (Vec<int32_t, 16>){}, -1)
                            << 16);
#endif
  return (Vec<float, Lanes>)(__builtin_convertvector(half, Bits) << 16);
}
template <typename T, int Lanes>
static inline Vec<float, Lanes> load_as(const float16 *p) {
#if defined(__F16C__) && defined(__clang__)
  return __builtin_convertvector(load<_Float16, Lanes>((const _Float16 *)p), Vec<float, Lanes>);
#else
  typedef Vec<uint32_t, Lanes> Bits;
  Vec<uint16_t, Lanes> half = load<uint16_t, Lanes>(&p->bits);
#ifdef __F16C__
  if constexpr (Lanes == 8) return __builtin_ia32_vcvtph2ps256((Vec<int16_t, 8>)half);
#endif
#ifdef __AVX512F__
  if constexpr (Lanes == 16)
    return __builtin_ia32_vcvtph2ps512_mask((Vec<int16_t, 16>)half, (Vec<float, 16>){}, (uint16_t)-1, 4);
#endif
  Bits bits = __builtin_convertvector(half, Bits), magnitude = (bits & 0x7fff) << 13;
  magnitude += (Bits)((bits & 0x7c00) == 0x7c00) & 0x70000000;  // infinity and NaN keep an all-ones exponent
  Vec<float, Lanes> value = (Vec<float, Lanes>)magnitude * 0x1p112f;
  return (Vec<float, Lanes>)((Bits)value | (bits & 0x8000) << 16);
#endif
}
template <typename T, typename S>
static inline T element_as(const S *p) {
  return load_as<T, 1>(p)[0];
}

// a * b + c, fused where the target can, whatever -ffp-contract says.
template <typename T, int Lanes>
static inline Vec<T, Lanes> multiply_add(Vec<T, Lanes> a, Vec<T, Lanes> b, Vec<T, Lanes> c) {
#if defined(__FMA__) && defined(__clang__)
  if constexpr (std::is_same_v<T, float>) return __builtin_elementwise_fma(a, b, c);
#elif defined(__FMA__)
  if constexpr (std::is_same_v<T, float> && Lanes == 8) return __builtin_ia32_vfmaddps256(a, b, c);
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float> && Lanes == 16)
    return __builtin_ia32_vfmaddps512_mask(a, b, c, (uint16_t)-1, 4);
#endif
#endif
  return a * b + c;
}

#if defined(__clang__) || __GNUC__ >= 12
#define DOT_SHUFFLE(Lanes, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define DOT_SHUFFLE(Lanes, x, y, ...) __builtin_shuffle(x, y, (Vec<int32_t, Lanes>){__VA_ARGS__})
#endif

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

// Copy a strided [rows, cols] operand into a row-major panel [rows, width] of T; columns past cols become zeros.
template <typename T, int Lanes, typename S>
static __attribute__((noinline)) void pack(const S *from, int64_t row_stride, int64_t col_stride, int64_t rows,
                                           int64_t cols, T *panel, int64_t width) {
  if (col_stride == 1) {
    int64_t whole_cols = cols / Lanes * Lanes;
    for (int64_t i = 0; i < rows; ++i, from += row_stride, panel += width) {
      for (int64_t j = 0; j < whole_cols; j += Lanes) store<T, Lanes>(panel + j, load_as<T, Lanes>(from + j));
      for (int64_t j = whole_cols; j < cols; ++j) panel[j] = element_as<T>(from + j);
      for (int64_t j = cols; j < width; ++j) panel[j] = 0;
    }
    return;
  }
  int64_t whole_rows = row_stride == 1 ? rows / Lanes * Lanes : 0;
  for (int64_t j = 0; j < width; j += Lanes)
    for (int64_t i = 0; i < whole_rows; i += Lanes) {
      Vec<T, Lanes> block[Lanes];
      const S *column = from + i + j * col_stride;
      if (j + Lanes <= cols) {
#pragma GCC unroll 16
        for (int l = 0; l < Lanes; ++l) block[l] = load_as<T, Lanes>(column + l * col_stride);
      } else {
#pragma GCC unroll 16
        for (int l = 0; l < Lanes; ++l)
          block[l] = j + l < cols ? load_as<T, Lanes>(column + l * col_stride) : Vec<T, Lanes>{};
      }
      transpose<Lanes>(block);
#pragma GCC unroll 16
      for (int l = 0; l < Lanes; ++l) store<T, Lanes>(panel + (i + l) * width + j, block[l]);
    }
  for (int64_t i = whole_rows; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j)
      panel[i * width + j] = j < cols ? element_as<T>(from + i * row_stride + j * col_stride) : T(0);
}

// c[Rows][Vecs * Lanes] += a[Rows][depth] * b[depth][Vecs * Lanes]
template <typename T, int Lanes, int Rows, int Vecs, typename S>
static __attribute__((noinline)) void multiply_tile(const T *a, int64_t a_row, const S *b, int64_t b_row, T *c,
                                                    int64_t c_row, int64_t depth) {
  Vec<T, Lanes> sum[Rows][Vecs];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) sum[i][j] = load<T, Lanes>(c + i * c_row + j * Lanes);
  for (int64_t k = 0; k < depth; ++k, b += b_row) {
    Vec<T, Lanes> b_k[Vecs];
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) b_k[j] = load_as<T, Lanes>(b + j * Lanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      Vec<T, Lanes> a_ik = a[i * a_row + k] - Vec<T, Lanes>{};
#pragma GCC unroll 8
      for (int j = 0; j < Vecs; ++j) sum[i][j] = multiply_add<T, Lanes>(a_ik, b_k[j], sum[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vecs; ++j) store<T, Lanes>(c + i * c_row + j * Lanes, sum[i][j]);
}

// The largest register tile: 8 x 2 vectors of the 32 registers of AVX-512, 6 x 2 of 16 elsewhere.
template <int Lanes>
constexpr int max_rows = Lanes >= 16 ? 8 : 6;

// c[rows][BN] += a[rows][depth] * b[depth][BN] for rows up to max_rows.
template <typename T, int Lanes, int BN, int Rows, typename S>
static inline void multiply_rows(int64_t rows, const T *a, int64_t a_row, const S *b, int64_t b_row, T *c,
                                 int64_t depth) {
  if (rows == Rows) {
    constexpr int wide = Rows * 4 <= max_rows<Lanes> * 2 ? 4 : 2;
    constexpr int vecs = BN / Lanes < wide ? BN / Lanes : wide;
    for (int j = 0; j < BN; j += vecs * Lanes)
      multiply_tile<T, Lanes, Rows, vecs>(a, a_row, b + j, b_row, c + j, BN, depth);
  } else if constexpr (Rows > 1) {
    multiply_rows<T, Lanes, BN, Rows - 1>(rows, a, a_row, b, b_row, c, depth);
  }
}

// c[cols] += dot products of a[depth] with the columns of b, which run along k.
template <typename T, int Lanes, typename S>
static __attribute__((noinline)) void multiply_row(const T *a, const S *b, int64_t b_col, T *c, int64_t cols,
                                                   int64_t depth) {
  int64_t whole = depth / Lanes * Lanes, whole_cols = cols / Lanes * Lanes;
  for (int64_t j = 0; j < whole_cols; j += Lanes) {
    const S *columns = b + j * b_col;
    Vec<T, Lanes> sum[Lanes] = {};
    for (int64_t k = 0; k < whole; k += Lanes) {
      Vec<T, Lanes> a_k = load<T, Lanes>(a + k);
#pragma GCC unroll 16
      for (int l = 0; l < Lanes; ++l)
        sum[l] = multiply_add<T, Lanes>(a_k, load_as<T, Lanes>(columns + l * b_col + k), sum[l]);
    }
    Vec<T, Lanes> total = load<T, Lanes>(c + j) + sum_lanes<Lanes>(sum);
    for (int64_t k = whole; k < depth; ++k)
      for (int l = 0; l < Lanes; ++l) total[l] += a[k] * element_as<T>(columns + l * b_col + k);
    store<T, Lanes>(c + j, total);
  }
  for (int64_t j = whole_cols; j < cols; ++j) {
    const S *column = b + j * b_col;
    Vec<T, Lanes> sum = {};
    for (int64_t k = 0; k < whole; k += Lanes)
      sum = multiply_add<T, Lanes>(load<T, Lanes>(a + k), load_as<T, Lanes>(column + k), sum);
    T total = 0;
    for (int l = 0; l < Lanes; ++l) total += sum[l];
    for (int64_t k = whole; k < depth; ++k) total += a[k] * element_as<T>(column + k);
    c[j] += total;
  }
}

// acc[BM][BN] += a[BM][BK] * b[BK][BN]; only the first rows, cols and depth of BM, BN and BK are read.
template <int Lanes, int BM, int BN, int BK, typename T, typename A, typename B>
static __attribute__((noinline)) void accumulate(const A *a, int64_t a_row, int64_t a_col, const B *b, int64_t b_row,
                                                 int64_t b_col, T *acc, int64_t rows, int64_t cols, int64_t depth) {
  constexpr int block = BM < max_rows<Lanes> ? BM : max_rows<Lanes>;
  constexpr int lanes = BN < Lanes ? BN : Lanes;
  constexpr int k_lanes = BK < Lanes ? BK : Lanes;
  alignas(64) T a_panel[block * BK], b_panel[BK * BN];
  rows = rows < BM ? rows : BM;
  cols = cols < BN ? cols : BN;
  depth = depth < BK ? depth : BK;
  if (cols <= 0) return;

  bool along_k = b_row == 1 && rows <= 4;
  // Rows of b 4096 bytes apart compete for the same sets of the L1 cache: many rows of a are worth a panel then. Its
  // type alone is not: converting 16-bit b at each use measured faster.
  bool same_sets = b_row != BN && b_row * int64_t(sizeof(B)) % 4096 == 0 && rows > 2 * block;
  bool in_place = b_col == 1 && cols == BN && !same_sets;
  if (!along_k && !in_place) pack<T, lanes>(b, b_row, b_col, depth, cols, b_panel, BN);

  for (int64_t i = 0; i < rows; i += block) {
    int64_t block_rows = rows - i < block ? rows - i : block, block_stride = BK;
    const T *a_block = a_panel;
    if constexpr (std::is_same_v<T, A>)
      if (a_col == 1) a_block = a + i * a_row, block_stride = a_row;
    if (a_block == a_panel) pack<T, k_lanes>(a + i * a_row, a_row, a_col, block_rows, depth, a_panel, BK);
    T *c = acc + i * BN;
    if (along_k)
      for (int64_t r = 0; r < block_rows; ++r)
        multiply_row<T, k_lanes>(a_block + r * block_stride, b, b_col, c + r * BN, cols, depth);
    else if (in_place)
      multiply_rows<T, lanes, BN, block>(block_rows, a_block, block_stride, b, b_row, c, depth);
    else
      multiply_rows<T, lanes, BN, block>(block_rows, a_block, block_stride, b_panel, int64_t(BN), c, depth);
  }
}
}  // namespace dot
#endif
