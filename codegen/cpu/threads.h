// How threads share the programs of launches.
//
// Thread t begins with the t-th part of the programs: what one kernel writes is in the cache of the core on which the
// next one reads it. Who is done with his part takes shares of the others', so a thread that lost its core holds
// nobody up for longer than one share. No thread waits for a line of memory that another core writes, but once per
// launch, to see that all is done.
#ifndef EFFC_CPU_THREADS_H
#define EFFC_CPU_THREADS_H
extern "C" {
int sched_yield(void);
// Threads are those of the OpenMP runtime that PyTorch has loaded, whichever compiler this is and whatever runtime it
// would bring: the library is not linked to one, and these names, gcc's for a parallel region, are in the process.
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace tt {

template <typename F> static inline void on_threads(int threads, F body) {
  GOMP_parallel([](void *f) { (*(F *)f)(); }, &body, threads, 0);
}

struct Member {
  alignas(128) uint64_t taken;  // the launch, and how many shares of this thread's part of it were taken, by anybody
  alignas(128) uint64_t done;   // the launch, and how many shares of it this thread has done, of any part
};

// Threads that run one launch after the other. Launches count from 1; all threads run the same.
class Team {
 public:
  enum { MOST = 256, SHARES = 32, PATIENCE = 64, SPINS = 2048 };

  explicit Team(int wanted) : size(wanted < 1 ? 1 : wanted < MOST ? wanted : MOST) {
    for (int k = 0; k < size; ++k) members[k].taken = members[k].done = 0;
  }

  int threads() const { return size; }

  // program(0), ..., program(programs - 1); returns when all are done, by whichever thread. What a step has hundreds of,
  // one for each launch, is the loop over a share alone.
  template <typename F> inline void run(uint64_t launch, int64_t programs, F program) {
    share_out(launch, programs, &program, [](void *f, int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) (*(F *)f)(i);
    });
  }

 private:
  Member members[MOST];
  int size;

  __attribute__((noinline)) void share_out(uint64_t launch, int64_t programs, void *program,
                                           void (*run_from_to)(void *, int64_t, int64_t)) {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int bits = 0;  // a share is 2^bits programs
    while (programs >> bits > SHARES * threads) ++bits;
    const uint32_t shares = (uint32_t)((programs + ((int64_t)1 << bits) - 1) >> bits);
    uint32_t done = 0;
    for (int turn = 0, spins = 0;; ++spins) {
      if (turn < threads) {
        const int part = thread + turn < threads ? thread + turn : thread + turn - threads;
        const uint32_t first = start(part, shares, threads), count = start(part + 1, shares, threads) - first;
        for (uint32_t k; (k = take(members[part], launch, count)) < count; ++done) {
          const int64_t from = (int64_t)(first + k) << bits, to = from + ((int64_t)1 << bits);
          run_from_to(program, from, to < programs ? to : programs);
        }
        __atomic_store_n(&members[thread].done, launch << 32 | done, __ATOMIC_RELEASE);
        ++turn;
        // Whoever still works is given a moment before others look at what is left of his part.
        for (spins = 0; turn < threads && spins < PATIENCE && !all_done(launch, shares, threads); ++spins) pause();
      }
      if (all_done(launch, shares, threads)) return;
      if (spins < SPINS) pause(); else sched_yield();
    }
  }

  static inline uint32_t start(int part, uint32_t shares, int threads) {
    return (shares * part + threads - 1) / threads;
  }

  static inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  // The next share of a part of `count`; `count` if there is none left.
  static inline uint32_t take(Member &of, uint64_t launch, uint32_t count) {
    uint64_t seen = __atomic_load_n(&of.taken, __ATOMIC_RELAXED);
    for (;;) {
      const uint32_t next = seen >> 32 == launch ? (uint32_t)seen : 0;
      if (seen >> 32 > launch || next >= count) return count;
      const uint64_t mine = launch << 32 | (next + 1);
      if (__atomic_compare_exchange_n(&of.taken, &seen, mine, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) return next;
    }
  }

  // A thread that is at a later launch has seen that this one is done.
  inline bool all_done(uint64_t launch, uint32_t shares, int threads) const {
    uint32_t sum = 0;
    for (int k = 0; k < threads; ++k) {
      const uint64_t seen = __atomic_load_n(&members[k].done, __ATOMIC_ACQUIRE);
      if (seen >> 32 > launch) return true;
      if (seen >> 32 == launch) sum += (uint32_t)seen;
    }
    return sum >= shares;
  }
};

// program(0), ..., program(programs - 1), on threads. One thread alone asks for no team: in a forked child, the OpenMP
// runtime would wait for threads that stayed in the parent.
template <typename F> static inline void for_each(int64_t programs, int threads, F program) {
  if (threads == 1 || programs <= 1) {
    for (int64_t p = 0; p < programs; ++p) program(p);
    return;
  }
  Team team(threads);
  on_threads(team.threads(), [&] { team.run(1, programs, program); });
}

}  // namespace tt
#endif
