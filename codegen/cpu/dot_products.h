// How tt.dot multiplies: one table per kind of operand and instruction set, behind one interface.
//
// Operands of a dot are made of 32-bit words, which hold `group` elements that follow each other along k. A lane of
// the register tile takes one word of a and one of b:
//
//     Floats        1 fp32         sum + a * b                      any target; 16-bit floats widen
//     BfloatPairs   2 bf16         vdpbf16ps                        AVX512_BF16
//     Ints          1 int32        sum + a * b                      any target; int8 widens
//     ShortPairs    2 int16        vpmaddwd, vpaddd                 AVX2, AVX-512; int8 widens
//     ByteQuads     4 int8, uint8  vpdpbusd                         AVX512_VNNI, AVX_VNNI
//
// A product P has the types Sum, Word and Element (of a word), step() on lanes, element() that turns an operand's
// element into what a word holds, total() that turns sums into what they stand for, and two ways to make vectors of words
// from memory: along_k(), where k is contiguous, and across(), where the other dimension is. b's elements are
// `right_offset` larger in words than they are.
//
// Sums of int8 products are exact modulo 2^32: all of these widen before they add, none saturates. Products of bf16 are
// exact and sums are fp32 everywhere. vdpbf16ps takes subnormal operands for zero: accumulate() looks for them, and
// multiplies as Floats where there are any. It also flushes sums below 2^-126, an absolute error of that size.
#ifndef EFFC_DOT_PRODUCTS_H
#define EFFC_DOT_PRODUCTS_H
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
  typedef T in_memory __attribute__((vector_size(sizeof(T) * Lanes), aligned(1), may_alias));
};
template <typename T, int Lanes>
using Vec = typename Vector<T, Lanes>::type;

// From memory of any type that holds the bits of Lanes elements of T.
template <typename T, int Lanes>
static inline Vec<T, Lanes> load(const void *p) {
  return *(const typename Vector<T, Lanes>::in_memory *)p;
}
template <typename T, int Lanes>
static inline void store(T *p, Vec<T, Lanes> v) {
  *(typename Vector<T, Lanes>::in_memory *)p = v;
}

#if defined(__clang__) || __GNUC__ >= 12
#define DOT_SHUFFLE(Lanes, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define DOT_SHUFFLE(Lanes, x, y, ...) __builtin_shuffle(x, y, (Vec<int32_t, Lanes>){__VA_ARGS__})
#endif

// Instructions for which compilers, and versions of one, have different names or none are given in assembly, for
// vectors of these sizes in bytes.
#ifdef __AVX512F__
template <int Size>
constexpr bool in_registers = Size == 16 || Size == 32 || Size == 64;
#elif defined(__AVX2__)
template <int Size>
constexpr bool in_registers = Size == 16 || Size == 32;
#else
template <int Size>
constexpr bool in_registers = false;
#endif

// Lanes numbers in memory as wider ones, which gcc 12 would take one by one or in two halves.
#define DOT_WIDEN(From, To, instruction)                                                           \
  template <int Lanes>                                                                             \
  static inline Vec<To, Lanes> widen(const From *p, To) {                                          \
    typedef typename Vector<From, Lanes>::in_memory Narrow;                                        \
    if constexpr (in_registers<Lanes * sizeof(To)>) {                                              \
      Vec<To, Lanes> wide;                                                                         \
      asm(instruction " %1, %0" : "=v"(wide) : "m"(*(const Narrow *)p));                           \
      return wide;                                                                                 \
    } else {                                                                                       \
      return __builtin_convertvector(load<From, Lanes>(p), Vec<To, Lanes>);                        \
    }                                                                                              \
  }
DOT_WIDEN(int8_t, int16_t, "vpmovsxbw")
DOT_WIDEN(int8_t, int32_t, "vpmovsxbd")
DOT_WIDEN(uint8_t, uint32_t, "vpmovzxbd")
DOT_WIDEN(uint16_t, uint32_t, "vpmovzxwd")
#undef DOT_WIDEN
template <typename To, int Lanes, typename From>
static inline Vec<To, Lanes> load_as(const From *p) {
  return widen<Lanes>(p, To());
}

// Lanes elements of an operand as fp32.
template <int Lanes>
static inline Vec<float, Lanes> load_floats(const float *p) {
  return load<float, Lanes>(p);
}
template <int Lanes>
static inline Vec<float, Lanes> load_floats(const bfloat16 *p) {
  return (Vec<float, Lanes>)(load_as<uint32_t, Lanes>(&p->bits) << 16);
}
template <int Lanes>
static inline Vec<float, Lanes> load_floats(const float16 *p) {
#ifdef __F16C__
  if constexpr (in_registers<Lanes * 4>) {
    Vec<float, Lanes> wide;
    asm("vcvtph2ps %1, %0" : "=v"(wide) : "m"(*(const typename Vector<uint16_t, Lanes>::in_memory *)p));
    return wide;
  }
#endif
  typedef Vec<uint32_t, Lanes> Bits;
  Bits bits = load_as<uint32_t, Lanes>(&p->bits), magnitude = (bits & 0x7fff) << 13;
  magnitude += (Bits)((bits & 0x7c00) == 0x7c00) & 0x70000000;  // infinity and NaN keep an all-ones exponent
  Vec<float, Lanes> value = (Vec<float, Lanes>)magnitude * 0x1p112f;
  return (Vec<float, Lanes>)((Bits)value | (bits & 0x8000) << 16);
}

enum Side { left, right };

// What the sums of most products are: numbers of type Sum, in each lane one.
struct PlainSums {
  template <int, typename V>
  static inline V total(V sum) {
    return sum;
  }
};

struct Floats : PlainSums {
  typedef float Sum;
  typedef float Word;
  typedef float Element;
  static constexpr int group = 1, right_offset = 0;
  static constexpr bool keeps_subnormals = true;
  template <typename S>
  static constexpr bool words_in_memory = std::is_same_v<S, float>;

  template <int Lanes>
  static inline Vec<float, Lanes> step(Vec<float, Lanes> a, Vec<float, Lanes> b, Vec<float, Lanes> sum) {
#ifdef __FMA__
    if constexpr (in_registers<Lanes * 4>) {  // fused, whatever -ffp-contract says
      asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      return sum;
    }
#endif
    return a * b + sum;
  }
  template <Side, typename S>
  static inline float element(const S *p) {
    return load_floats<1>(p)[0];
  }
  template <Side, int Lanes, typename S>
  static inline Vec<float, Lanes> along_k(const S *p) {
    return load_floats<Lanes>(p);
  }
  template <Side, int Lanes, typename S>
  static inline Vec<float, Lanes> across(const S *p, int64_t) {
    return load_floats<Lanes>(p);
  }
};

struct Ints : PlainSums {
  typedef int32_t Sum;
  typedef int32_t Word;
  typedef int32_t Element;
  static constexpr int group = 1, right_offset = 0;
  static constexpr bool keeps_subnormals = true;
  template <typename S>
  static constexpr bool words_in_memory = false;

  template <int Lanes>
  static inline Vec<int32_t, Lanes> step(Vec<int32_t, Lanes> a, Vec<int32_t, Lanes> b, Vec<int32_t, Lanes> sum) {
    return a * b + sum;
  }
  template <Side>
  static inline int32_t element(const int8_t *p) {
    return *p;
  }
  template <Side, int Lanes>
  static inline Vec<int32_t, Lanes> along_k(const int8_t *p) {
    return load_as<int32_t, Lanes>(p);
  }
  template <Side side, int Lanes>
  static inline Vec<int32_t, Lanes> across(const int8_t *p, int64_t) {
    return along_k<side, Lanes>(p);
  }
};

#ifdef __AVX2__
// {vex}: AVX_VNNI's encoding.
#ifdef __AVX512VNNI__
#define DOT_VNNI "vpdpbusd"
#elif defined(__AVXVNNI__)
#define DOT_VNNI "%{vex%} vpdpbusd"
#endif

struct ShortPairs : PlainSums {
  typedef int32_t Sum;
  typedef int32_t Word;
  typedef int16_t Element;
  static constexpr int group = 2, right_offset = 0;
  static constexpr bool keeps_subnormals = true;
  template <typename S>
  static constexpr bool words_in_memory = false;

  template <int Lanes>
  static inline Vec<int32_t, Lanes> step(Vec<int32_t, Lanes> a, Vec<int32_t, Lanes> b, Vec<int32_t, Lanes> sum) {
    Vec<int32_t, Lanes> product;
    asm("vpmaddwd %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
    return sum + product;
  }
  template <Side>
  static inline int16_t element(const int8_t *p) {
    return *p;
  }
  template <Side, int Lanes>
  static inline Vec<int32_t, Lanes> along_k(const int8_t *p) {
    return (Vec<int32_t, Lanes>)load_as<int16_t, 2 * Lanes>(p);
  }
  template <Side, int Lanes>
  static inline Vec<int32_t, Lanes> across(const int8_t *p, int64_t k_stride) {
    Vec<int32_t, Lanes> even = load_as<int32_t, Lanes>(p);
    Vec<int32_t, Lanes> odd = load_as<int32_t, Lanes>(p + k_stride);
    return (even & 0xffff) | odd << 16;
  }
};
#endif

#ifdef DOT_VNNI
// b as uint8: 128 larger than it is.
struct ByteQuads : PlainSums {
  typedef int32_t Sum;
  typedef int32_t Word;
  typedef uint8_t Element;
  static constexpr int group = 4, right_offset = 128;
  static constexpr bool keeps_subnormals = true;
  template <typename S>
  static constexpr bool words_in_memory = true;

  template <int Lanes>
  static inline Vec<int32_t, Lanes> step(Vec<int32_t, Lanes> a, Vec<int32_t, Lanes> b, Vec<int32_t, Lanes> sum) {
    asm(DOT_VNNI " %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    return sum;
  }
  template <Side side>
  static inline uint8_t element(const int8_t *p) {
    return side == left ? *p : *p + 128;
  }
  template <Side side, int Lanes>
  static inline Vec<int32_t, Lanes> along_k(const int8_t *p) {
    Vec<int32_t, Lanes> words = load<int32_t, Lanes>(p);
    return side == left ? words : words ^ (int32_t)0x80808080;
  }
  template <Side side, int Lanes>
  static inline Vec<int32_t, Lanes> across(const int8_t *p, int64_t k_stride) {
    typedef Vec<uint32_t, Lanes> Words;
    Words words = {};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k, p += k_stride)
      words |= load_as<uint32_t, Lanes>((const uint8_t *)p) << (8 * k);
    return (Vec<int32_t, Lanes>)(side == left ? words : words ^ 0x80808080);
  }
};
#endif

#ifdef __AVX512BF16__
struct BfloatPairs : PlainSums {
  typedef float Sum;
  typedef int32_t Word;
  typedef uint16_t Element;
  static constexpr int group = 2, right_offset = 0;
  static constexpr bool keeps_subnormals = false;
  template <typename S>
  static constexpr bool words_in_memory = std::is_same_v<S, bfloat16>;

  template <int Lanes>
  static inline Vec<float, Lanes> step(Vec<int32_t, Lanes> a, Vec<int32_t, Lanes> b, Vec<float, Lanes> sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  template <Side>
  static inline uint16_t element(const bfloat16 *p) {
    return p->bits;
  }
  template <Side>
  static inline uint16_t element(const float *p) {  // a float that a bf16 holds exactly
    return load<uint32_t, 1>(p)[0] >> 16;
  }
  template <Side, int Lanes>
  static inline Vec<int32_t, Lanes> along_k(const bfloat16 *p) {
    return load<int32_t, Lanes>(p);
  }
  template <Side, int Lanes>
  static inline Vec<int32_t, Lanes> along_k(const float *p) {
    return pairs_of<Lanes>(load<uint32_t, Lanes>(p), load<uint32_t, Lanes>(p + Lanes),
                           std::make_integer_sequence<int, Lanes>());
  }
  template <int Lanes, int... Lane>
  static inline Vec<int32_t, Lanes> pairs_of(Vec<uint32_t, Lanes> x, Vec<uint32_t, Lanes> y,
                                             std::integer_sequence<int, Lane...>) {
    Vec<uint32_t, Lanes> even = DOT_SHUFFLE(Lanes, x, y, (2 * Lane)...);
    Vec<uint32_t, Lanes> odd = DOT_SHUFFLE(Lanes, x, y, (2 * Lane + 1)...);
    return (Vec<int32_t, Lanes>)(even >> 16 | (odd & 0xffff0000));
  }
  template <Side, int Lanes>
  static inline Vec<int32_t, Lanes> across(const bfloat16 *p, int64_t k_stride) {
    Vec<uint32_t, Lanes> even = load_as<uint32_t, Lanes>(&p->bits);
    return (Vec<int32_t, Lanes>)(even | load_as<uint32_t, Lanes>(&p[k_stride].bits) << 16);
  }
  template <Side, int Lanes>
  static inline Vec<int32_t, Lanes> across(const float *p, int64_t k_stride) {
    return (Vec<int32_t, Lanes>)(load<uint32_t, Lanes>(p) >> 16 | (load<uint32_t, Lanes>(p + k_stride) & 0xffff0000));
  }
};
#endif

#ifdef DOT_VNNI
typedef ByteQuads ByteProduct;
#elif defined(__AVX2__)
typedef ShortPairs ByteProduct;
#else
typedef Ints ByteProduct;
#endif
#ifdef __AVX512BF16__
typedef BfloatPairs BfloatProduct;
#else
typedef Floats BfloatProduct;
#endif
#ifdef __AVX512F__
constexpr int all_lanes = 16;
#elif defined(__AVX2__)
constexpr int all_lanes = 8;
#else
constexpr int all_lanes = 4;
#endif

// The product for two operands whose elements are values of type T, in vectors of Lanes: the tables are for whole ones.
template <typename T, int Lanes>
struct ProductOf {
  typedef Floats type;
};
template <int Lanes>
struct ProductOf<int8_t, Lanes> {
  typedef std::conditional_t<Lanes == all_lanes, ByteProduct, Ints> type;
};
template <int Lanes>
struct ProductOf<bfloat16, Lanes> {
  typedef std::conditional_t<Lanes == all_lanes, BfloatProduct, Floats> type;
};

}  // namespace dot
#endif
