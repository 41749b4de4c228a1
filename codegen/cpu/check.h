// Where the tensors of a launch begin and end, and whether an access stays inside: the debug mode's.
#ifndef EFFC_CPU_CHECK_H
#define EFFC_CPU_CHECK_H

namespace check {

struct Extent { int64_t low, high; };  // addresses of the first byte and of the one after the last

template <typename P> static inline bool inside(P pointer, int64_t bytes, Extent of) {
  const int64_t at = (int64_t)pointer;
  return at >= of.low && at <= of.high - bytes;
}
template <typename P> static inline bool inside_any(P pointer, int64_t bytes, const Extent *of, int32_t count) {
  for (int32_t k = 0; k < count; ++k)
    if (inside(pointer, bytes, of[k])) return true;
  return false;
}
static inline long long floor_divide(long long a, long long b) { return a / b - (a % b < 0); }

}  // namespace check

// What a message says of an access: element and number of elements, byte and number of bytes.
#define CHECK_PLACE(POINTER, BYTES, OF)                                                           \
  check::floor_divide((int64_t)(POINTER) - OF.low, BYTES), (long long)((OF.high - OF.low) / BYTES), \
      (long long)((int64_t)(POINTER) - OF.low), (long long)(OF.high - OF.low)
#endif
