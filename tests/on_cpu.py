"""Run a Triton kernel through the CPU target, typed by its arguments."""

import pytest
import torch
from effc.codegen.cpu import CppKernel, launch, lower

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float8_e5m2fnuz: "fp8e5b16", torch.bool: "i1",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64",
}  # fmt: skip


def type_of(arg) -> str:
    """As Triton's signatures write it."""
    if isinstance(arg, torch.Tensor):
        return "*" + TYPES[arg.dtype]
    return "fp32" if isinstance(arg, float) else "i32"


def compiled(fn, *args, **constants) -> CppKernel:
    """`fn` lowered for these arguments."""
    names = [name for name in fn.arg_names if name not in constants]
    signature = {name: type_of(arg) for name, arg in zip(names, args, strict=True)}
    return lower(fn, signature, constants)


def run(fn, grid, *args, **constants) -> None:
    launch(compiled(fn, *args, **constants), grid, *args)


def run_over(fn, *tensors, block=256, **constants) -> None:
    """One program for each `block` elements of the first tensor; `fn` takes the tensors, their length n, and BLOCK."""
    n = tensors[0].numel()
    run(fn, ((n + block - 1) // block,), *tensors, n, BLOCK=block, **constants)


def some_slow(values, quick) -> list:
    """Parameters of a sweep: those not in `quick` are left to the slow tests."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def randn(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    print(f"seed {seed}")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randint(low, high, shape, seed=0, dtype=torch.int32) -> torch.Tensor:
    print(f"seed {seed}")
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
