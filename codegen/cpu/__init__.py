"""Triton's CPU target: Triton IR in, C++ out. Knows Triton and nothing of effc's ops."""

from .build import PRELUDE, build_library
from .launch import CppKernel, launch, lower
from .target import CpuTarget, host_target
from .ttir import kernel_from_source

__all__ = ["PRELUDE", "CppKernel", "CpuTarget", "build_library", "host_target", "kernel_from_source", "launch", "lower"]
