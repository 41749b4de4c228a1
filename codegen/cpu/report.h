// What kernels say: lines of device_print on standard output, and why a launch failed, which Python asks for after it.
#ifndef EFFC_CPU_REPORT_H
#define EFFC_CPU_REPORT_H
#include <stdio.h>

namespace report {

// The first failure of a launch.
struct Outcome {
  int state;  // 0 none, 1 being written, 2 written
  char text[1024];
};
static thread_local Outcome own;        // of launches that this thread asked for
static thread_local Outcome *launched;  // of the launch that this thread runs programs of; null where it is its own

static inline Outcome &outcome() { return launched ? *launched : own; }
static inline bool failed() { return __atomic_load_n(&outcome().state, __ATOMIC_ACQUIRE) != 0; }

// Later failures are dropped: programs run at the same time, and one message is enough.
template <typename... Values> __attribute__((noinline, cold)) static void fail(const char *format, Values... values) {
  Outcome &to = outcome();
  int none = 0;
  if (!__atomic_compare_exchange_n(&to.state, &none, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return;
  snprintf(to.text, sizeof(to.text), format, values...);
  __atomic_store_n(&to.state, 2, __ATOMIC_RELEASE);
}

// One call, one line or part of a line that no other thread breaks.
template <typename... Values> __attribute__((noinline, cold)) static void print(const char *format, Values... values) {
  printf(format, values...);
}
static inline void flush() { fflush(stdout); }

}  // namespace report

// The failure of the launch that this thread asked for last, or null. Other threads' launches have their own.
extern "C" __attribute__((visibility("default"))) const char *take_failure() {
  if (report::own.state == 0) return nullptr;
  report::own.state = 0;
  return report::own.text;
}
#endif
