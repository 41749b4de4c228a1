"""Triton kernels on CPU tensors, natively: anyone's `@triton.jit` functions, as they are.

    import effc.triton_cpu

    effc.triton_cpu.enable()                      for the rest of the process, or until disable()
    with effc.triton_cpu.enable(): ...            for a while
    python -m effc.triton_cpu FILE ARGUMENTS...   for a script that knows nothing of effc

Afterwards `kernel[grid](...)` runs on CPU tensors, with `triton.autotune`, heuristics and `triton.testing.do_bench`,
for kernels defined before or after. Kernels on a GPU's tensors go where they went before.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .codegen.cpu.switch import Switch

ENABLED: list[Switch] = []
"""What is in Triton now, the last one on top."""


class Enabled:
    """What `enable` returns: leaving its block takes the backend out again."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        while self.switch in ENABLED:
            disable()


def enable(isa: str | None = None, checked: bool | None = None) -> Enabled:
    """Let Triton run kernels on the CPU.

    isa: an instruction set below the CPU's ("avx2", "generic"); the default is the best one, or $EFFC_ISA. checked:
    every access to memory is compared with its tensor's bounds, and `tl.device_assert` holds; the launch raises what
    it finds, with the line of the kernel. The default is what $EFFC_TRITON_CHECK says, else False.
    Raises ToolchainError without a C++ compiler, InputError for an isa that is unknown or more than the CPU has.
    """
    from .codegen.cpu.switch import Switch
    from .codegen.cpu.target import host_target

    switch = Switch(host_target(isa, checked))
    switch.turn_on()
    ENABLED.append(switch)
    return Enabled(switch)


def disable() -> None:
    """Undo the last `enable`; nothing where there is none."""
    if ENABLED:
        ENABLED.pop().turn_off()


def is_enabled() -> bool:
    return bool(ENABLED)


def main() -> None:
    """Run a Python file as `python FILE ARGUMENTS...` would, with the CPU enabled."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m effc.triton_cpu FILE ARGUMENTS...")
    from . import triton_cpu  # this file is __main__ now, and not what the script may import

    triton_cpu.enable()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
