"""Triton's CPU target: Triton IR in, C++ out. Knows Triton and nothing of effc's ops.

The way of a kernel: `ttir` runs Triton's front end, `parse` reads its text into `ir`, `normalize` rewrites carried
pointers; `plan` decides which tensors live in arrays, with `affine` forms of addresses and masks; `emit` prints
scalars and control flow, `roots` (with `reduce`, `products`, `dots` and `clip`) one loop `nest` for each thing
computed, and `evaluate` (with `index_arithmetic` and `memory`) the expressions inside; `ranges` bounds integers.
`spelling`, `libdevice` and `c_types` hold the tables of C++; `report` prints what kernels tell. `vectors.h`,
`prelude.h`, `math.h` and `threads.h` are what the C++ stands on, with a table of lane operations per instruction set
(`lanes_generic.h` in plain C++, `lanes_avx2.h`, `lanes_avx512.h`), `dot.h` and `pair_sums.h` what products do.
`target`, `build` and `launch` find the compiler, run it and call the result.

`driver` (with `arguments` and `switch`) is the same as a backend of Triton's own, for `kernel[grid](...)`. `listing`
and `assembly` show what became of a kernel.
"""

from .build import PRELUDE, build_library, with_prelude
from .launch import CppKernel, launch, lower
from .target import CpuTarget, host_target
from .ttir import kernel_from_source

__all__ = [
    "PRELUDE", "CppKernel", "CpuTarget", "build_library", "host_target", "kernel_from_source", "launch", "lower",
    "with_prelude",
]  # fmt: skip
