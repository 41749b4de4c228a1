"""Threads that share the programs of launches: every program runs once, and a launch ends before the next begins."""

import ctypes

import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import build_library, host_target, launch, lower, with_prelude

STEPS = """
extern "C" __attribute__((visibility("default"))) int64_t run(int threads, int64_t programs, int64_t *counts) {
  int64_t early = 0;
  Team team(threads);
  on_threads(team.threads(), [&] {
    for (uint64_t launch = 1; launch <= 200; ++launch)
      team.run(launch, programs, [&](int64_t i) {
        const int64_t other = __atomic_load_n(&counts[programs - 1 - i], __ATOMIC_RELAXED);
        if (other + 1 < (int64_t)launch) __atomic_fetch_add(&early, 1, __ATOMIC_RELAXED);
        __atomic_store_n(&counts[i], counts[i] + 1, __ATOMIC_RELAXED);
      });
  });
  return early;
}
"""


@triton.jit
def count_kernel(out_ptr, n):
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    tl.store(out_ptr + program, tl.load(out_ptr + program) + n)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("grid", [(1,), (2,), (7, 9), (1000,)], ids=str)
def test_every_program_of_a_grid_runs_once(grid, threads):
    out = torch.zeros(grid[0] * (grid[1] if len(grid) > 1 else 1), dtype=torch.int32)
    kernel = lower(count_kernel, {"out_ptr": "*i32", "n": "i32"}, {})
    for _ in range(10):
        launch(kernel, grid, out, 3)
    assert (out == 30).all()


@pytest.mark.parametrize("programs", [0, 1, 2, 3, 64, 65, 1000])
def test_a_launch_of_a_step_begins_when_the_one_before_is_done(programs, threads, tmp_path):
    library = ctypes.CDLL(str(build_library(with_prelude(STEPS), host_target(), tmp_path.parent)))
    library.run.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_void_p)
    counts = torch.zeros(max(programs, 1), dtype=torch.int64)
    assert library.run(threads, programs, counts.data_ptr()) == 0
    assert (counts[:programs] == 200).all()
