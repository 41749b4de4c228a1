"""Triton's CPU target: Triton IR in, C++ out. Knows Triton and nothing of effc's ops.

The way of a kernel, file by file (examples/one_kernel_through_the_cpu_target.py prints each stage):

    front end   ttir        runs Triton's front end and its target-independent passes
                parse       reads the text that they print into the values and ops of `ir`
                structure   nests branches between blocks, inlines calls
                normalize   rewrites what later steps need not know: carried pointers, products that are `scaled` or
                            of `byte_words`; with `builder`
                check       debug mode: puts a check before every access to memory
    analyses    affine      forms of addresses and masks that are linear in the indices of a tile
                ranges      bounds of integers
                plan        which tensors live in arrays; the rest is computed where it is used
    emit        emit        prints scalars and control flow as they stand
                roots       prints what tensors are computed for, one loop nest each: `stores`, `reduce` and `scan`
                            (with `combine`), `products`, `dots` (with `dot` and `finish`), `shapes`, `atomics`,
                            `elementwise`, `report`
                clip, collapse, versions    end loops where masks do, merge short dimensions, print whole tiles twice
    nests       nest        the loops over a tile
                evaluate    expressions inside of them, as `cells`: with `index_arithmetic` and `memory`
                spelling, libdevice, c_types    tables of C++
    target      target      the CPU and the compiler
                build, launch    compile C++ and call it
                driver, arguments, switch   the same as a backend of Triton's own, for `kernel[grid](...)`
    to read     listing, assembly    what became of a kernel

The C++ stands on `vectors.h`, `prelude.h`, `math.h` and `threads.h`, with a table of lane operations per instruction
set (`lanes_generic.h` in plain C++, `lanes_avx2.h`, `lanes_avx512.h`); `dot*.h`, `plain_product.h` and `pair_sums.h`
are what products do, `fp8.h`, `libdevice.h`, `report.h` and `check.h` go with the kernels that need them.
"""

from .build import PRELUDE, build_library, with_prelude
from .launch import CppKernel, launch, lower
from .target import CpuTarget, host_target
from .ttir import kernel_from_source

__all__ = [
    "PRELUDE", "CppKernel", "CpuTarget", "build_library", "host_target", "kernel_from_source", "launch", "lower",
    "with_prelude",
]  # fmt: skip
