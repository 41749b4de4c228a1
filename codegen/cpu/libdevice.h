// Scalar functions of NVIDIA's libdevice that the C library lacks. A kernel that names one includes this.
// fp32 results are computed in double and rounded once; fp64 results are good to a few ulp.
#ifndef EFFC_CPU_LIBDEVICE_H
#define EFFC_CPU_LIBDEVICE_H
#include <fenv.h>

namespace libdevice {

// Bessel functions of the C library, which clang has no builtins for.
extern "C" {
double j0(double), j1(double), jn(int, double), y0(double), y1(double), yn(int, double);
}

// f(args...), one lane at a time.
template <typename R, typename F, typename A, typename... B> static inline R each(F f, A a, B... b) {
  if constexpr (Lanes<R>::count == 1) return f(a, b...);
  else {
    R r{};
    for (int k = 0; k < Lanes<R>::count; ++k) r[k] = f(a[k], b[k]...);
    return r;
  }
}

// f(args...) while the machine rounds as `mode` says. The empty assembly keeps the compiler from moving f out of it.
template <typename T> static inline void pin(T &x) { asm volatile("" : "+m"(x) : : "memory"); }
template <typename F, typename... A> static inline auto rounding(int mode, F f, A... args) {
  const int before = fegetround();
  fesetround(mode);
  (pin(args), ...);
  auto result = f(args...);
  pin(result);
  fesetround(before);
  return result;
}
template <typename T> static inline T alone(T x) { pin(x); return x; }  // rounded here, never part of a fused operation

// -- bits

static inline int32_t reverse_bits(uint32_t x) {
  x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
  x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
  x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
  return (int32_t)__builtin_bswap32(x);
}
static inline int64_t reverse_bits(uint64_t x) {
  uint64_t low = (uint32_t)reverse_bits((uint32_t)x);
  return (int64_t)(low << 32 | (uint32_t)reverse_bits((uint32_t)(x >> 32)));
}
static inline int32_t byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  uint64_t bytes = (uint64_t)y << 32 | x;
  uint32_t r = 0;
  for (int k = 0; k < 4; ++k) r |= (uint32_t)(bytes >> (selector >> 4 * k & 7) * 8 & 0xff) << 8 * k;
  return (int32_t)r;
}

// -- trigonometry of multiples of pi

template <bool COSINE> static inline double sin_cos_pi(double x) {
  if (!(__builtin_fabs(x) < __builtin_inf())) return __builtin_nan("");
  double turn = x - 2 * __builtin_rint(x / 2);  // exact, in [-1, 1]
  double half = __builtin_rint(2 * turn), r = (turn - half / 2) * 3.14159265358979323846;
  int quadrant = ((int)half + (COSINE ? 1 : 0)) & 3;
  double y = quadrant & 1 ? __builtin_cos(r) : __builtin_sin(r);
  y = quadrant & 2 ? -y : y;
  return COSINE || y != 0 ? y + 0.0 : __builtin_copysign(y, x);
}

// -- the error function's relatives

const double TWO_OVER_ROOT_PI = 1.12837916709551257390;

// exp(x^2) with the rounding error of x^2 made good
static inline double exp_of_square(double x, double sign) {
  double square = x * x;
  return __builtin_exp(sign * square) * (1 + sign * __builtin_fma(x, x, -square));
}
static inline double erfcx(double x) {
  if (x < 25) return x < -26.7 ? __builtin_inf() : exp_of_square(x, 1) * __builtin_erfc(x);
  double z = 1 / (2 * x * x);  // the asymptotic series; its next term is below 3e-17
  return TWO_OVER_ROOT_PI / 2 / x * (1 - z * (1 - 3 * z * (1 - 5 * z * (1 - 7 * z * (1 - 9 * z * (1 - 11 * z))))));
}
static inline double normcdf(double x) {
  const double root_half = 0.70710678118654752440, rest = -4.83364665672645672553e-17;
  double z = -x * root_half;
  if (!(__builtin_fabs(z) < 27)) return __builtin_erfc(z) / 2;
  double lost = __builtin_fma(-x, root_half, -z) - x * rest;
  return (__builtin_erfc(z) - TWO_OVER_ROOT_PI * exp_of_square(z, -1) * lost) / 2;
}
// y > 0 with erfc(y) = x, for x < 1/2: Newton's method on the logarithm, which is nearly a parabola
static inline double erfc_inverse_tail(double x) {
  double target = __builtin_log(x), y = __builtin_sqrt(-target - 0.5 * __builtin_log(-3.14159265358979 * target));
  if (!(y > 0.4)) y = 0.5;
  for (int k = 0; k < 6; ++k) {
    double scaled = erfcx(y);  // log erfc(y) = log erfcx(y) - y^2, slope -2/sqrt(pi) / erfcx(y)
    y += (__builtin_log(scaled) - y * y - target) * scaled / TWO_OVER_ROOT_PI;
  }
  double miss = __builtin_erfc(y) - x;  // the logarithm lost digits: one plain step
  return x > 1e-290 ? y + miss / (TWO_OVER_ROOT_PI * exp_of_square(y, -1)) : y;
}
static inline double erfinv(double x) {
  double a = __builtin_fabs(x);
  if (!(a < 1)) return a == 1 ? x * __builtin_inf() : __builtin_nan("");
  if (a > 0.5) return __builtin_copysign(erfc_inverse_tail(1 - a), x);
  double y = x * 0.88622692545275801365;
  for (int k = 0; k < 5; ++k) y -= (__builtin_erf(y) - x) / (TWO_OVER_ROOT_PI * exp_of_square(y, -1));
  return a < 1e-100 ? x * 0.88622692545275801365 : y;
}
static inline double erfcinv(double x) {
  if (!(x > 0 && x < 2)) return x == 0 ? __builtin_inf() : x == 2 ? -__builtin_inf() : __builtin_nan("");
  if (x < 0.5) return erfc_inverse_tail(x);
  return x > 1.5 ? -erfc_inverse_tail(2 - x) : erfinv(1 - x);
}
static inline double normcdfinv(double p) { return -1.41421356237309504880 * erfcinv(2 * p); }

// -- modified Bessel functions of the first kind: power series, or far out the asymptotic one (Abramowitz and Stegun
// 9.6.10, 9.7.1)

template <int ORDER> static inline double bessel_i(double x) {
  double a = __builtin_fabs(x), sum, term = 1;
  if (a < 20) {
    double z = a * a / 4;
    sum = 1;
    for (int k = 1; k < 200 && term > sum * 1e-17; ++k) sum += term *= z / ((double)k * (k + ORDER));
    sum *= ORDER ? a / 2 : 1;
  } else {
    sum = 1;
    for (int k = 1; k < 30; ++k) {
      double odd = 2 * k - 1;
      sum += term *= (odd * odd - 4 * ORDER * ORDER) / (8 * a * k);
    }
    double root = __builtin_exp(a / 2);  // e^a may be too large where the result is not
    sum = a < 800 ? root / __builtin_sqrt(6.28318530717958647692 * a) * sum * root : a;
    if (a >= 800 && a == a) sum = __builtin_inf();
  }
  return ORDER && x < 0 ? -sum : sum;
}

}  // namespace libdevice
#endif
