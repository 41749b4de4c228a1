"""Where kernels of 16-bit models round: after every op, as eager PyTorch does, or only where they store.

    (x * y).to(tl.bfloat16).to(tl.float32)  -->  (x * y)        with rounding="fp32"

Kernels compute in fp32. Whatever prints them spells a rounding point in this one way, and no other code looks like it:
what is rounded on its way to memory is not turned back to fp32. So the points can be counted, and taken out.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .kernel import Choice, Fallback, Kernel, Launch, Step

POINT = re.compile(r"\.to\(tl\.(?:bfloat16|float16)\)\.to\(tl\.float32\)")


def rounding_points(kernel: Kernel) -> int:
    """How often a value is rounded within a kernel, stores aside."""
    return len(POINT.findall(kernel.source))


def in_fp32(step: Step) -> Step:
    """The same step with kernels that round nowhere but where they store."""
    if isinstance(step, Fallback):
        return step
    if isinstance(step, Choice):
        return Choice(tuple((condition, tuple(map(in_fp32, launches))) for condition, launches in step.cases))
    return without_points(step)


def without_points(launch: Launch) -> Launch:
    kernel = launch.kernel
    if not rounding_points(kernel):
        return launch
    return replace(launch, kernel=replace(kernel, source=POINT.sub("", kernel.source)))
