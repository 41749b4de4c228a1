// What kernels say: lines of device_print on standard output, and why a launch failed, which Python asks for after it.
#ifndef EFFC_CPU_REPORT_H
#define EFFC_CPU_REPORT_H
#include <stdio.h>

namespace report {

// The first failure of a launch: 0 none, 1 being written, 2 written.
static int state = 0;
static char text[1024];

static inline bool failed() { return __atomic_load_n(&state, __ATOMIC_ACQUIRE) != 0; }

// Later failures are dropped: programs run at the same time, and one message is enough.
template <typename... Values> __attribute__((noinline, cold)) static void fail(const char *format, Values... values) {
  int none = 0;
  if (!__atomic_compare_exchange_n(&state, &none, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
  snprintf(text, sizeof(text), format, values...);
  __atomic_store_n(&state, 2, __ATOMIC_RELEASE);
}

// One call, one line or part of a line that no other thread breaks.
template <typename... Values> __attribute__((noinline, cold)) static void print(const char *format, Values... values) {
  printf(format, values...);
}
static inline void flush() { fflush(stdout); }

}  // namespace report

// The failure since the last call, or null. Called between launches.
extern "C" __attribute__((visibility("default"))) const char *take_failure() {
  if (!report::failed()) return nullptr;
  __atomic_store_n(&report::state, 0, __ATOMIC_RELEASE);
  return report::text;
}
#endif
