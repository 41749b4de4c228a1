// Elementwise functions over float, double and vectors of them. fp32: polynomials, infinities, NaN and signs of zero as
// IEEE; fp64: the C library, lane by lane. Polynomials not said to be minimax are those of Cephes (S. Moshier).
// Largest errors in ulp over 3 million arguments of all sizes, on every instruction set: log 0.9, exp and exp2 1.5 (but
// see there), tanh 1.4, rsqrt 1.5, sin and cos 1.6, log2 1.8, erf 1.95; sqrt, division and fma are exact.
#ifndef EFFC_CPU_MATH_H
#define EFFC_CPU_MATH_H

namespace tt {

template <typename F> using Int = Like<F, int32_t>;
template <typename F> using IsFloat = typename Same<char[sizeof(Element<F>) == 4 ? 1 : -1]>::type;

template <typename F> static inline F absolute(F x) {
  typedef decltype(bits<Like<F, int64_t>>(Like<F, double>{})) I64;
  if constexpr (sizeof(Element<F>) == 8) return bits<F>(bits<I64>(x) & INT64_MAX);
  else return bits<F>(bits<Int<F>>(x) & 0x7fffffff);
}
template <typename F> static inline F copy_sign(F x, F sign) {
  return bits<F>((bits<Int<F>>(x) & 0x7fffffff) | (bits<Int<F>>(sign) & (int32_t)0x80000000));
}

#define LANEWISE(NAME, CALL)                                             \
  template <typename F> static inline F NAME(F x) {                      \
    if constexpr (Lanes<F>::count == 1) return CALL(x);                  \
    else {                                                               \
      for (int k = 0; k < Lanes<F>::count; ++k) x[k] = CALL(x[k]);       \
      return x;                                                          \
    }                                                                    \
  }
LANEWISE(exp_f64, __builtin_exp) LANEWISE(exp2_f64, __builtin_exp2) LANEWISE(log_f64, __builtin_log)
LANEWISE(log2_f64, __builtin_log2) LANEWISE(sin_f64, __builtin_sin) LANEWISE(cos_f64, __builtin_cos)
LANEWISE(tanh_f64, __builtin_tanh) LANEWISE(erf_f64, __builtin_erf)
LANEWISE(sin_large, __builtin_sinf) LANEWISE(cos_large, __builtin_cosf)
#undef LANEWISE
template <typename F> static inline F float_remainder(F x, F y) {
  if constexpr (Lanes<F>::count > 1) {
    for (int k = 0; k < Lanes<F>::count; ++k) x[k] = float_remainder<Element<F>>(x[k], y[k]);
    return x;
  } else if constexpr (sizeof(F) == 8) return __builtin_fmod(x, y); else return __builtin_fmodf(x, y);
}
template <typename F> static inline F reciprocal_root(F x) { return 1 / square_root(x); }

// NaN in either operand: `*_number` gives the other one, `*_nan` gives NaN.
template <typename F> static inline F max_number(F a, F b) { F m = greater(a, b); return b != b ? a : m; }
template <typename F> static inline F min_number(F a, F b) { F m = lesser(a, b); return b != b ? a : m; }
template <typename F> static inline F max_nan(F a, F b) { F m = greater(a, b); return a != a ? a : m; }
template <typename F> static inline F min_nan(F a, F b) { F m = lesser(a, b); return a != a ? a : m; }

// 2^n y, where n stands in the low bits of `counter` = 1.5 * 2^23 + n; right where the result is a normal number
template <typename F> static inline F scale_by(F y, F counter) {
  typedef Int<F> I;
  return bits<F>(bits<I>(y) + (bits<I>(counter) << 23));
}
// Results below 2^-126 are 0. The polynomials (minimax, 2e-9) are summed in pairs, which shortens the chain.
template <typename F> static inline F exponential(F x) {
  if constexpr (sizeof(Element<F>) == 8) return exp_f64(x);
  else {
    F counter = x * 1.44269504088896341f + 12582912.0f, n = counter - 12582912.0f;
    F r = x - n * 0.693359375f + n * 2.12194440e-4f, z = r * r;
    F high = z * (r * 1.38436537e-3f + 8.37415550e-3f) + (r * 4.16680016e-2f + 1.66664317e-1f);
    F y = scale_by<F>(z * (high * r + 4.99999940e-1f) + (r + 1), counter);
    y = x < -87.3365402f ? F{} : y;
    return x <= 88.7228317f ? y : x + __builtin_inff();  // NaN stays NaN
  }
}
template <typename F> static inline F exponential2(F x) {
  if constexpr (sizeof(Element<F>) == 8) return exp2_f64(x);
  else {
    F counter = x + 12582912.0f, r = x - (counter - 12582912.0f), z = r * r;
    F high = z * (r * 1.53533620e-4f + 1.33988739e-3f) + (r * 9.61843692e-3f + 5.55033237e-2f);
    F y = scale_by<F>(z * (high * r + 2.40226477e-1f) + (r * 6.93147182e-1f + 1), counter);
    y = x < -126.0f ? F{} : y;
    return x < 128.0f ? y : x + __builtin_inff();
  }
}

// x = 2^exponent * (1 + m), sqrt(1/2) <= 1 + m < sqrt(2); returns log(1 + m)
template <typename F> static inline F log_mantissa(F x, F &exponent) {
  typedef Int<F> I;
  F scaled = x < 0x1p-126f ? x * 0x1p25f : x;
  I i = bits<I>(scaled);
  I e = (i - 0x3f3504f3) >> 23;
  exponent = convert<F>(e) - (x < 0x1p-126f ? F{} + 25.0f : F{});
  F m = bits<F>(i - (e << 23)) - 1;
  F p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  F z = m * m;
  return m + (m * z * p - 0.5f * z);
}
template <typename F> static inline F log_edges(F x, F y) {
  const float infinity = __builtin_inff();
  y = x == infinity ? x : y;
  y = x < 0 ? F{} + __builtin_nanf("") : y;
  y = x == 0 ? F{} - infinity : y;
  return x != x ? x : y;
}
template <typename F> static inline F logarithm(F x) {
  if constexpr (sizeof(Element<F>) == 8) return log_f64(x);
  else {
    F e, m = log_mantissa(x, e);
    return log_edges<F>(x, e * 0.693359375f + (m - e * 2.12194440e-4f));
  }
}
template <typename F> static inline F logarithm2(F x) {
  if constexpr (sizeof(Element<F>) == 8) return log2_f64(x);
  else {
    F e, m = log_mantissa(x, e);
    return log_edges<F>(x, e + (m * 1.44269504088896341f));
  }
}

// The angle is reduced by pi/2 in double, in two parts of which the first has 33 bits: exact enough to 1e9 where products
// are fused with sums, else to 1e6; past that the C library reduces it.
#ifdef __FP_FAST_FMA
const float REDUCED_HERE = 1e9f;
#else
const float REDUCED_HERE = 1e6f;
#endif
template <bool COSINE, typename F> static inline F sin_or_cos(F x) {
  typedef Like<F, double> D;
  typedef Int<F> I;
  D d = convert<D>(absolute(x));
  D n = (d * 0.636619772367581343 + 6755399441055744.0) - 6755399441055744.0;
  F r = convert<F>(d - n * 1.57079632673412561417 - n * 6.07710050650619224932e-11);
  I q = convert<I>(n) + (COSINE ? 1 : 0);
  F z = r * r;
  F s = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
  F c = 1 - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  I sign = COSINE ? I{} : bits<I>(x) & INT32_MIN;  // of the angle, -0 too
  F y = bits<F>(bits<I>((q & 1) != 0 ? c : s) ^ ((q & 2) << 30) ^ sign);
  I large = mask((absolute(x) > REDUCED_HERE) - I{});
  if (__builtin_expect(any_lane(large), 0)) return large != 0 ? (COSINE ? cos_large(x) : sin_large(x)) : y;
  return y;
}
template <typename F> static inline F sine(F x) {
  if constexpr (sizeof(Element<F>) == 8) return sin_f64(x); else return sin_or_cos<false>(x);
}
template <typename F> static inline F cosine(F x) {
  if constexpr (sizeof(Element<F>) == 8) return cos_f64(x); else return sin_or_cos<true>(x);
}

template <typename F> static inline F hyperbolic_tangent(F x) {
  if constexpr (sizeof(Element<F>) == 8) return tanh_f64(x);
  else {
    F a = absolute(x), z = x * x;
    F p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    F near = a + a * z * p, far = 1 - 2 / (exponential<F>(2 * a) + 1);
    return copy_sign<F>(a < 0.625f ? near : far, x);
  }
}
// |x| <= 1: x + x P(x^2); above: 1 - P(|x|)^4, which is 1 from 4 on. Minimax, 4e-8 and 9e-9; without FMA
// 2.1 ulp.
template <typename F> static inline F error_function(F x) {
  if constexpr (sizeof(Element<F>) == 8) return erf_f64(x);
  else {
    F a = lesser<F>(F{} + 4.0f, absolute(x)), z = x * x;
    F p = a * -2.20571419e-5f + 1.74802844e-4f;
    p = p * a + 7.95821950e-4f;
    p = p * a - 1.28199421e-2f;
    p = p * a + 4.39602062e-2f;
    p = p * a - 1.76768806e-2f;
    p = p * a - 9.31871757e-2f;
    p = p * a - 2.93644547e-1f;
    p = p * a + 1.00218928f;
    p = p * p;
    F far = copy_sign<F>(1 - p * p, x);
    F q = z * -5.63142064e-4f + 4.91755083e-3f;
    q = q * z - 2.67113112e-2f;
    q = q * z + 1.12801798e-1f;
    q = q * z - 3.76123250e-1f;
    q = q * z + 1.28379121e-1f;
    return a > 1.0f ? far : x * q + x;
  }
}

// Integers. Division by zero is undefined in Triton: any result, but no trap.
template <typename V> static inline V divide(V a, V b) {
  typedef Element<V> E;
  if constexpr (Lanes<V>::count == 1) return b == 0 || (b == (E)-1 && (E)-1 < (E)0) ? (E)(0 - a) : (E)(a / b);
  else if constexpr (sizeof(E) <= 4) {
    typedef Like<V, double> D;
    return convert<V>(convert<D>(a) / convert<D>(b));  // exact: quotients of 32-bit integers survive rounding to 53 bits
  } else {
    for (int k = 0; k < Lanes<V>::count; ++k) a[k] = divide<E>(a[k], b[k]);
    return a;
  }
}
template <typename V> static inline V remainder(V a, V b) { return a - divide<V>(a, b) * b; }
// By the width or more: all bits are gone, or copies of the sign, as PTX has it (Triton leaves it open).
template <typename V> static inline V shift_left(V a, V b) {
  const Element<V> last = 8 * sizeof(Element<V>) - 1;
  if constexpr (Lanes<V>::count == 1) return (b & last) == b ? (V)((uint64_t)a << (b & last)) : 0;
  else return (b & last) == b ? a << (b & last) : V{};
}
template <typename V> static inline V shift_right(V a, V b) {
  const Element<V> last = 8 * sizeof(Element<V>) - 1;
  if constexpr ((Element<V>)-1 < 0) return a >> ((b & last) == b ? b : V{} + last);
  else return (b & last) == b ? a >> (b & last) : V{};
}
template <typename V> static inline V multiply_high(V a, V b) {
  if constexpr (sizeof(Element<V>) == 4) return multiply_high_u32(a, b);
  else if constexpr (Lanes<V>::count == 1) return (V)(((unsigned __int128)(uint64_t)a * (uint64_t)b) >> 64);
  else {
    for (int k = 0; k < Lanes<V>::count; ++k) a[k] = multiply_high<Element<V>>(a[k], b[k]);
    return a;
  }
}
// float to integer, saturating, as CUDA's cvt does; NaN gives 0
template <typename To, typename F> static inline To to_integer(F x) {
  typedef Element<To> E;
  const bool is_signed = (E)-1 < (E)0;
  const int width = sizeof(E) * 8 - (is_signed ? 1 : 0);
  const Element<F> high = (Element<F>)(width == 64 ? 0x1p64 : (double)(1ull << (width & 63)));
  const Element<F> low = is_signed ? -high : 0;
  if constexpr (Lanes<F>::count == 1) {
    if (x != x) return 0;
    if (x <= low) return is_signed ? (E)((E)1 << (sizeof(E) * 8 - 1)) : (E)0;
    if (x >= high) return is_signed ? (E) ~((E)1 << (sizeof(E) * 8 - 1)) : (E)-1;
    return (E)x;
  } else if constexpr (sizeof(E) == 4 && is_signed && sizeof(Element<F>) == 4) {
    To i = convert<To>(x);
    i = x >= high ? To{} + INT32_MAX : i;
    return x != x ? To{} : i;
  } else if constexpr (sizeof(E) < 4 && sizeof(Element<F>) == 4) {
    F inside = x > low ? (x < high - 1 ? x : F{} + (high - 1)) : F{} + low;
    return convert<To>(x != x ? Like<F, int32_t>{} : convert<Like<F, int32_t>>(inside));
  } else {
    To i{};
    for (int k = 0; k < Lanes<F>::count; ++k) i[k] = to_integer<E>((Element<F>)x[k]);
    return i;
  }
}

}  // namespace tt
#endif
