"""What this machine can do at most: the rate at which its threads read memory, and their fp32 multiply-adds.

Both are small C++ loops built for the same target as generated kernels, over as many threads as torch uses; the best of
several runs counts. Run as a script it prints the two figures.
"""

import ctypes
import functools
import time
from collections.abc import Callable

import torch
from effc.codegen.cpu import PRELUDE, CpuTarget, build_library, host_target
from effc.codegen.cpu.launch import cache_folder

PROBES = """
enum { LANES = %d, CHAINS = 12, STEPS = 10000, BLOCK = 1 << 18 };
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES), may_alias));

extern "C" __attribute__((visibility("default"))) int32_t read_all(const char *data, int64_t blocks, int32_t threads) {
  int32_t found = 0;
  for_each(blocks, threads, [data, &found](int64_t block) {
    const Words *words = (const Words *)(data + block * BLOCK);
    Words seen[8] = {};
    for (int k = 0; k < BLOCK / (int)sizeof(Words); k += 8)
#pragma GCC unroll 8
      for (int chain = 0; chain < 8; ++chain) seen[chain] |= words[k + chain];
    for (int chain = 1; chain < 8; ++chain) seen[0] |= seen[chain];
    for (int lane = 0; lane < LANES; ++lane)
      if (seen[0][lane]) __atomic_store_n(&found, 1, __ATOMIC_RELAXED);
  });
  return found;
}

extern "C" __attribute__((visibility("default"))) int32_t multiply_add(int64_t turns, int32_t threads) {
  int32_t negative = 0;
  for_each(turns, threads, [&negative](int64_t turn) {
    Floats sum[CHAINS], factor = Floats{} + 0.5f + (float)turn;
#pragma GCC unroll 12
    for (int chain = 0; chain < CHAINS; ++chain) sum[chain] = Floats{} + (float)chain;
    for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 12
      for (int chain = 0; chain < CHAINS; ++chain) sum[chain] = sum[chain] * factor + factor;
    for (int chain = 0; chain < CHAINS; ++chain)
      if (sum[chain][0] < 0) __atomic_store_n(&negative, 1, __ATOMIC_RELAXED);
  });
  return negative;
}
"""
CHAINS, STEPS, BLOCK = 12, 10000, 1 << 18


@functools.cache
def probes(target: CpuTarget) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_library(PRELUDE + PROBES % target.lanes, target, cache_folder())))
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.multiply_add.argtypes = [ctypes.c_int64, ctypes.c_int32]
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


def reader(*tensors: torch.Tensor) -> Callable[[], None]:
    """A function that reads these tensors once, on all threads, as far as whole blocks go."""
    library, threads = probes(host_target()), torch.get_num_threads()

    def read() -> None:
        for tensor in tensors:
            library.read_all(tensor.data_ptr(), tensor.nbytes // BLOCK, threads)

    return read


def read_bandwidth(megabytes: int = 512, repeats: int = 12, target: CpuTarget | None = None) -> float:
    """Bytes per second that all threads read from memory, far more of it than caches hold."""
    data = torch.ones(megabytes << 20, dtype=torch.uint8)
    library, threads = probes(target or host_target()), torch.get_num_threads()
    return data.numel() / best_of(lambda: library.read_all(data.data_ptr(), data.numel() // BLOCK, threads), repeats)


def multiply_add_peak(repeats: int = 12, target: CpuTarget | None = None) -> float:
    """fp32 operations per second of all threads, two for a multiply-add, with operands in registers."""
    target = target or host_target()
    library, turns = probes(target), 200
    operations = 2 * target.lanes * CHAINS * STEPS * turns
    return operations / best_of(lambda: library.multiply_add(turns, torch.get_num_threads()), repeats)


if __name__ == "__main__":
    print(f"{read_bandwidth() / 1e9:.1f} GB/s read, {multiply_add_peak() / 1e9:.0f} GFLOP/s of fp32 multiply-adds")
