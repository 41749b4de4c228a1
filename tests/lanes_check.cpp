// Every lane operation against the same on one element at a time, for all lane types and numbers of lanes. Memory ends at
// a page that must not be touched. Stands behind the prelude; prints what differs and exits with 1.
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static int failures;
static void expect(bool right, const char *operation, const char *type, int detail) {
  if (right || ++failures > 20) return;
  printf("%s of %s: %d\n", operation, type, detail);
}
static uint64_t random_bits() {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}
template <typename V> V random_lanes() {
  V v;
  for (unsigned k = 0; k < sizeof(V) / sizeof(int16_t); ++k) ((int16_t *)&v)[k] = random_bits() >> 20;
  return v;
}
template <typename M> M random_mask() {
  M m;
  for (int k = 0; k < Lanes<M>::count; ++k) m[k] = -(int)(random_bits() >> 33 & 1);
  return m;
}
template <typename V> V small_numbers() {  // that all lane types hold
  V v;
  for (int k = 0; k < Lanes<V>::count; ++k) v[k] = (Element<V>)(random_bits() >> 40 & 127);
  return v;
}
template <typename T> bool same(T a, T b) { return memcmp(&a, &b, sizeof(T)) == 0; }

static char *page_end;  // 4096 bytes before it are ours, none behind

template <typename V> void check_memory(const char *type) {
  typedef Element<V> T;
  typedef Like<V, int32_t> I;
  typedef Like<V, int64_t> A;
  const int N = Lanes<V>::count;
  for (int n = -1; n <= N + 1; ++n) {
    const int count = n < 0 ? 0 : n > N ? N : n;
    T *p = (T *)page_end - count, got[2 * N];
    V v = random_lanes<V>(), other = random_lanes<V>();
    I m = random_mask<I>();
    for (int k = 0; k < count; ++k) p[k] = (T)v[k];
    V loaded = load_n(p, n, other), chosen = load_where(p, m, n, other), strided = load_strided(p, 1, n, other), picked;
    A address;
    for (int k = 0; k < N; ++k) address[k] = (int64_t)(p + (N - 1 - k));
    picked = gather<V, T>(address, (I)(m & (iota<I>() >= N - count)), N, other);
    for (int k = 0; k < N; ++k) {
      expect(same<T>(loaded[k], k < n ? v[k] : other[k]), "load_n", type, n);
      expect(same<T>(strided[k], k < n ? v[k] : other[k]), "load_strided", type, n);
      expect(same<T>(chosen[k], k < n && m[k] ? v[k] : other[k]), "load_where", type, n);
      expect(same<T>(picked[k], m[k] && k >= N - count ? v[N - 1 - k] : other[k]), "gather", type, n);
    }
    memcpy(got, &other, sizeof(V)), memset(p, 0, count * sizeof(T));
    store_n(p, other, n);
    expect(!memcmp(p, got, count * sizeof(T)), "store_n", type, n);
    store_n(p, v, n), store_where(p, m, n, other);
    for (int k = 0; k < count; ++k) expect(same<T>(p[k], m[k] ? other[k] : v[k]), "store_where", type, n);
    store_n(p, v, n), scatter<T>(address, (I)(m & (iota<I>() >= N - count)), N, other);
    for (int k = 0; k < count; ++k)
      expect(same<T>(p[k], m[N - 1 - k] ? other[N - 1 - k] : v[k]), "scatter", type, n);
    memset(got, 77, sizeof(got)), store_n(got + N / 2, v, n);  // neighbours on both sides stay
    for (int k = 0; k < 2 * N; ++k) {
      T untouched;
      memset(&untouched, 77, sizeof(T));
      expect(same<T>(got[k], k >= N / 2 && k < N / 2 + count ? v[k - N / 2] : untouched), "store_n outside", type, n);
    }
  }
  V v = random_lanes<V>(), w = random_lanes<V>(), turned = rotate<1>(v), chosen;
  I m = random_mask<I>();
  chosen = select(m, v, w);
  for (int k = 0; k < N; ++k) {
    expect(same<T>(turned[k], v[(k + 1) % N]), "rotate", type, k);
    expect(same<T>(chosen[k], m[k] ? v[k] : w[k]), "select", type, k);
  }
  for (int k = 0; k < N; ++k) {
    I one{};
    one[k] = -1;
    expect(any_lane(one) && !all_lanes(one), "any_lane", type, k);
    expect(any_lane((I)~one) && !all_lanes((I)~one), "all_lanes", type, k);
  }
  expect(all_lanes((I)(I{} - 1)) && !any_lane(I{}), "all_lanes", type, -1);
}

template <typename To, typename From> void check_conversion(const char *type) {
  const bool whole = (Element<From>)0.5 == 0 && (Element<To>)0.5 == 0;  // then any value, and bits are cut off
  for (int turn = 0; turn < 8; ++turn) {
    From v = whole ? random_lanes<From>() : small_numbers<From>();
    To to = convert<To>(v);
    for (int k = 0; k < Lanes<To>::count; ++k) expect(same<Element<To>>(to[k], (Element<To>)v[k]), "convert", type, k);
  }
}
template <typename To> void check_conversions(const char *type) {
  check_conversion<To, Like<To, int8_t>>(type), check_conversion<To, Like<To, uint8_t>>(type);
  check_conversion<To, Like<To, int16_t>>(type), check_conversion<To, Like<To, uint16_t>>(type);
  check_conversion<To, Like<To, int32_t>>(type), check_conversion<To, Like<To, uint32_t>>(type);
  check_conversion<To, Like<To, int64_t>>(type), check_conversion<To, Like<To, uint64_t>>(type);
  check_conversion<To, Like<To, float>>(type), check_conversion<To, Like<To, double>>(type);
}

template <typename F> void check_float(const char *type) {
  typedef Element<F> T;
  const double infinity = __builtin_inf();
  const double edges[] = {0., -0., .5, -.5, 1.5, -1.5, 2.5, 8388607.5, -8388609., 1e30, -1e30, infinity, -infinity,
                          __builtin_nan(""), 1e-40, -1e-40};
  for (int turn = 0; turn < 200; ++turn) {
    F x;
    for (int k = 0; k < Lanes<F>::count; ++k)
      x[k] = turn < 16 ? (T)edges[(turn + k) % 16] : (T)((int64_t)random_bits() % 1000000 / 4096.);
    F down = round_down(x), up = round_up(x), even = round_to_even(x), zero = round_to_zero(x), root = square_root(x);
    for (int k = 0; k < Lanes<F>::count; ++k) {
      if (x[k] != x[k]) continue;
      expect(same<T>(down[k], (T)__builtin_floor(x[k])), "round_down", type, turn);
      expect(same<T>(up[k], (T)__builtin_ceil(x[k])), "round_up", type, turn);
      expect(same<T>(even[k], (T)__builtin_rint(x[k])), "round_to_even", type, turn);
      expect(same<T>(zero[k], (T)__builtin_trunc(x[k])), "round_to_zero", type, turn);
      if (x[k] >= 0) expect(same<T>(root[k], (T)__builtin_sqrt(x[k])), "square_root", type, turn);
    }
  }
}

template <typename F> void check_halves(const char *type) {
  typedef Like<F, uint16_t> H;
  typedef Like<F, uint32_t> U;
  for (int code = 0; code < 1 << 16; code += Lanes<F>::count) {
    H h = convert<H>(iota<Like<F, int32_t>>() + code);
    F wide = from_f16<F>(h);
    H back = to_f16(wide);
    for (int k = 0; k < Lanes<F>::count; ++k) {
      float one = from_f16<float>((uint16_t)h[k]);
      expect(one != one ? wide[k] != wide[k] : same<float>(wide[k], one), "from_f16", type, code + k);
      expect(one != one || back[k] == h[k], "to_f16 of fp16", type, code + k);
    }
    for (int near = -1; near <= 1; ++near) {  // around the middle between neighbours
      F x = bits<F>((U)(bits<U>(wide) + 0x1000 + near));
      H half = to_f16(x);
      for (int k = 0; k < Lanes<F>::count; ++k)
        expect(half[k] == to_f16<float>(x[k]) || x[k] != x[k], "to_f16", type, code + k);
    }
  }
  typedef Like<F, int32_t> I;
  I a = random_lanes<I>(), b = random_lanes<I>(), high = multiply_high_u32(a, b);
  for (int k = 0; k < Lanes<F>::count; ++k)
    expect(high[k] == (int32_t)((uint64_t)(uint32_t)a[k] * (uint32_t)b[k] >> 32), "multiply_high_u32", type, k);
}

#define INTEGERS(N)                                                                                     \
  check_memory<i8x##N>("i8x" #N), check_memory<u8x##N>("u8x" #N), check_memory<i16x##N>("i16x" #N);     \
  check_memory<u16x##N>("u16x" #N), check_memory<i32x##N>("i32x" #N), check_memory<u32x##N>("u32x" #N); \
  check_memory<i64x##N>("i64x" #N), check_conversions<i8x##N>("i8x" #N), check_conversions<u8x##N>("u8x" #N); \
  check_conversions<i16x##N>("i16x" #N), check_conversions<u16x##N>("u16x" #N);                         \
  check_conversions<i32x##N>("i32x" #N), check_conversions<u32x##N>("u32x" #N), check_conversions<i64x##N>("i64x" #N);
#define FLOATS(N)                                                                                       \
  check_memory<f32x##N>("f32x" #N), check_memory<f64x##N>("f64x" #N), check_float<f32x##N>("f32x" #N);  \
  check_float<f64x##N>("f64x" #N), check_conversions<f32x##N>("f32x" #N), check_halves<f32x##N>("f32x" #N);

#define ALL(N) INTEGERS(N) FLOATS(N)

int main() {
  page_end = (char *)mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) + 4096;
  if (mprotect(page_end, 4096, PROT_NONE)) return 2;
  ALL(LANES) ALL(HALF)
  return failures != 0;
}
