"""What this machine can do at most: the rate at which its threads read memory, and their fp32 multiply-adds.

Both are small C++ loops built for the same target as generated kernels, over as many threads as torch uses; the best of
several runs counts. Run as a script it prints the two figures.
"""

import ctypes
import functools
import time
from collections.abc import Callable

import torch
from effc.codegen.cpu import CpuTarget, build_library, host_target
from effc.codegen.cpu.launch import cache_folder

PROBES = """
#include <stdint.h>
enum { LANES = %d, CHAINS = 12, STEPS = 1000 };
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES), may_alias));

extern "C" __attribute__((visibility("default"))) int32_t read_all(const char *data, int64_t bytes) {
  int32_t found = 0;
#pragma omp parallel for schedule(static) reduction(| : found)
  for (int64_t page = 0; page < bytes; page += 4096) {
    Words seen[8] = {};
    const Words *words = (const Words *)(data + page);
    for (int k = 0; k < 4096 / (int)sizeof(Words); k += 8)
      for (int chain = 0; chain < 8; ++chain) seen[chain] |= words[k + chain];
    for (int chain = 1; chain < 8; ++chain) seen[0] |= seen[chain];
    for (int lane = 0; lane < LANES; ++lane) found |= seen[0][lane];
  }
  return found;
}

extern "C" __attribute__((visibility("default"))) float multiply_add(int64_t turns) {
  float total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
  for (int64_t turn = 0; turn < turns; ++turn) {
    Floats sum[CHAINS], factor = Floats{} + 0.5f + (float)turn;
#pragma GCC unroll 12
    for (int chain = 0; chain < CHAINS; ++chain) sum[chain] = Floats{} + (float)chain;
    for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 12
      for (int chain = 0; chain < CHAINS; ++chain) sum[chain] = sum[chain] * factor + factor;
    for (int chain = 0; chain < CHAINS; ++chain) total += sum[chain][0];
  }
  return total;
}
"""
CHAINS, STEPS = 12, 1000


@functools.cache
def probes(target: CpuTarget) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_library(PROBES % target.lanes, target, cache_folder())))
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.multiply_add.argtypes = [ctypes.c_int64]
    library.multiply_add.restype = ctypes.c_float
    return library


def best_of(call: Callable[[], object], repeats: int) -> float:
    """Least seconds of `repeats` calls after a first one."""
    best = float("inf")
    call()
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def read_bandwidth(megabytes: int = 512, repeats: int = 12, target: CpuTarget | None = None) -> float:
    """Bytes per second that all threads read from memory, far more of it than caches hold."""
    data = torch.ones(megabytes << 20, dtype=torch.uint8)
    library = probes(target or host_target())
    return data.numel() / best_of(lambda: library.read_all(data.data_ptr(), data.numel()), repeats)


def multiply_add_peak(repeats: int = 12, target: CpuTarget | None = None) -> float:
    """fp32 operations per second of all threads, two for a multiply-add, with operands in registers."""
    target = target or host_target()
    library, turns = probes(target), 2000
    operations = 2 * target.lanes * CHAINS * STEPS * turns
    return operations / best_of(lambda: library.multiply_add(turns), repeats)


if __name__ == "__main__":
    print(f"{read_bandwidth() / 1e9:.1f} GB/s read, {multiply_add_peak() / 1e9:.0f} GFLOP/s of fp32 multiply-adds")
