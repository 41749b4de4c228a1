"""One Triton kernel through every stage of the CPU target (codegen/cpu), down to its assembly, its result and its time.

    Triton source -> Triton IR -> parsed IR -> plan -> loop nests in C++ -> assembly -> result

python examples/one_kernel_through_the_cpu_target.py
"""

import inspect
import re
import time

import effc.triton_cpu
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import host_target, lower
from effc.codegen.cpu.assembly import hot_loop
from effc.codegen.cpu.ir import Op, Type
from effc.codegen.cpu.parse import parse_module
from effc.codegen.cpu.plan import Plan, is_lazy


@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + at, mask=at < columns, other=-float("inf"))
    numerator = tl.exp((x - tl.max(x, axis=0)) * scale)
    tl.store(out_ptr + row * columns + at, numerator / tl.sum(numerator, axis=0), mask=at < columns)


SIGNATURE = {"x_ptr": "*fp32", "out_ptr": "*fp32", "columns": "i32", "scale": "fp32"}
ROWS, COLUMNS, BLOCK = 512, 576, 1024


def title(number: int, name: str, what: str) -> None:
    print(f"\n=== {number}. {name}: {what}\n")


def spelled(type_: Type) -> str:
    """f32[1024]; *f32 for a pointer."""
    element = f"*{type_.pointee}" if type_.element == "ptr" else type_.element
    return element + (f"[{', '.join(map(str, type_.shape))}]" if type_.shape else "")


def print_op(op: Op, depth: int = 1) -> None:
    results = ", ".join(f"{value.name}: {spelled(value.type)}" for value in op.results)
    operands = ", ".join(value.name for value in op.operands)
    value = f" {op.attrs['value']}" if "value" in op.attrs else ""
    place = f"line {op.location[1]}" if op.location else ""
    text = "  " * depth + (f"{results} = " if results else "") + f"{op.name}{value} {operands}"
    print(f"{text.rstrip():75} {place}".rstrip())
    for block in op.blocks:
        for inner in block.ops:
            print_op(inner, depth + 2)


def main() -> None:
    target = host_target()

    title(1, "Triton source", "what a person writes")
    print(inspect.getsource(softmax_kernel.fn))

    title(2, "Triton IR", "Triton's front end, inlined and simplified (ttir.py)")
    kernel = lower(softmax_kernel, SIGNATURE, {"BLOCK": BLOCK}, target=target)
    without_places = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", kernel.ttir)
    print("\n".join(line for line in without_places.splitlines() if line and not line.startswith("#loc")))

    title(3, "Parsed IR", "its text as values and ops (parse.py, ir.py)")
    function = parse_module(kernel.ttir)
    for op in function.body.ops:
        print_op(op)

    title(4, "Plan", "which tensors live in arrays; the rest is computed where it is used (plan.py)")
    plan = Plan(function)
    for op in function.body.walk():
        for value in op.results:
            if value in plan.stored:
                print(f"  {value.name:18} array     {plan.why[value]}")
            elif value.type.is_tensor and is_lazy(op) and op.name == "tt.load":
                uses = ", ".join(use.name for use in plan.consumers(value))
                print(f"  {value.name:18} in place  loaded again by each of: {uses}")

    title(5, "Addresses", "affine in the index i of the tile, so that the loops need no gathers (affine.py)")
    for op in function.body.walk():
        if op.name in ("tt.load", "tt.store"):
            form = plan.analysis.of(op.operands[0], (0,))
            print(f"  {op.name:9} {form.pointer} + {' + '.join(f'{c} * i' for _, c in form.coefficients)} elements")

    title(
        6, "C++", f"one loop nest for each thing computed, {target.lanes} lanes at a time (emit.py, roots.py, nest.py)"
    )
    print(kernel.cpp)

    title(7, "Assembly", f"the loop with most vector instructions, by {target.cxx_version} (assembly.py)")
    print(hot_loop(kernel, target))

    title(8, "Result", "the same kernel through Triton's own launcher (triton_cpu.py), beside PyTorch")
    torch.manual_seed(0)
    x, out, scale = torch.randn(ROWS, COLUMNS), torch.empty(ROWS, COLUMNS), 0.5
    with effc.triton_cpu.enable():
        launch = softmax_kernel[(ROWS,)]
        launch(x, out, COLUMNS, scale, BLOCK=BLOCK)
        want = torch.softmax(x * scale, -1)
        print(f"greatest difference: {(out - want).abs().max():.1e}")
        for name, run in (
            ("this kernel", lambda: launch(x, out, COLUMNS, scale, BLOCK=BLOCK)),
            ("torch.softmax", lambda: torch.softmax(x * scale, -1)),
        ):
            times = []
            for _ in range(50):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            print(f"{name:15} {min(times) * 1e6:7.1f} us at best of 50 for {ROWS} x {COLUMNS}")


if __name__ == "__main__":
    main()
