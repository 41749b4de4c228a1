"""tt.dot in C++: exact or near-exact against float64, ragged limits, and nothing outside them read or written."""

import ctypes
import mmap
import multiprocessing
import subprocess
from pathlib import Path

import numpy as np
import pytest
from effc.codegen.cpu import CpuTarget, host_target
from effc.codegen.cpu.dot import DotCode, Operand, emit_dot
from effc.codegen.cpu.target import available_isas, machine_flags

WIDENED = "bf16 in fp32"  # stored as fp32, in elements that a bf16 holds exactly
C_TYPES = {"fp32": "float", WIDENED: "float", "bf16": "uint16_t", "fp16": "uint16_t", "i8": "int8_t"}
LAYOUTS = ("row", "column", "strided")  # contiguous along the second dimension, along the first, along neither
SHAPES = {
    ("fp32", "fp32"): [(64, 64, 64), (4, 16, 64), (1, 128, 16), (8, 8, 32), (16, 1, 1)],
    ("i8", "i8"): [(64, 64, 64), (16, 32, 128), (4, 16, 64), (8, 8, 32), (2, 2, 2)],
    ("bf16", "bf16"): [(64, 64, 64), (16, 32, 128), (4, 16, 64), (2, 2, 2)],
    (WIDENED, "bf16"): [(16, 32, 128)],
    ("bf16", WIDENED): [(4, 16, 64)],
    ("fp32", "bf16"): [(16, 32, 128), (2, 2, 4)],
    ("fp16", "fp16"): [(16, 32, 128)],
}


def storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values to `dtype`, in the type that C sees (bits for the 16-bit floats)."""
    if dtype == WIDENED:
        return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    if dtype == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "fp16":
        return values.astype(np.float16).view(np.uint16)
    return values.astype({"fp32": np.float32, "i8": np.int8}[dtype])


def as_float64(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (stored.view(np.float16) if dtype == "fp16" else stored).astype(np.float64)


def strides(shape: tuple[int, int], layout: str) -> tuple[int, int]:
    rows, cols = shape
    return {"row": (cols + 3, 1), "column": (1, rows + 5), "strided": (2 * cols + 1, 2), "pages": (4096, 1)}[layout]


def operand(pointer: str, tile: tuple[int, int], layout: str, dtype: str) -> Operand:
    row, column = map(str, strides(tile, layout))
    return Operand(pointer, row, column, *(("fp32", "bf16") if dtype == WIDENED else (dtype,)))


def function(
    name: str, shape: tuple[int, int, int], dtypes: tuple[str, str], layouts: tuple[str, str], lanes: int, fresh: bool
):
    """C++ of `name(a, b, acc, rows, cols, depth)` around one dot."""
    bm, bn, bk = shape
    a, b = map(operand, "ab", [(bm, bk), (bk, bn)], layouts, dtypes)
    limits = {"rows": "rows", "cols": "cols", "depth": "depth"}
    dot = emit_dot(a, b, "acc", shape, lanes=lanes, **limits, fresh=fresh, indent="  ")
    a_type, b_type = (C_TYPES[dtype] for dtype in dtypes)
    acc_type = "int32_t" if dtypes[0] == "i8" else "float"
    arguments = f"const {a_type} *a, const {b_type} *b, {acc_type} *acc, int rows, int cols, int depth"
    return dot, "\n".join([f'extern "C" void {name}({arguments}) {{', *dot.body, "}"])


@pytest.fixture(scope="module", params=available_isas())
def library(request, tmp_path_factory):
    """Every case of the sweep compiled into one library: (lanes, {case: C function}, and of fresh sums)."""
    target = host_target(request.param)
    tiles = [(shape, dtypes) for dtypes, shapes in SHAPES.items() for shape in shapes]
    cases = [(*tile, (x, y)) for tile in tiles for x in LAYOUTS for y in LAYOUTS]
    # Rows of b that collide in the cache.
    cases += [(shapes[0], dtypes, ("row", "pages")) for dtypes, shapes in SHAPES.items()]
    fresh = [(*tile, ("row", y)) for tile in tiles for y in LAYOUTS]
    body = ["#include <cstdint>"]
    for n, case in enumerate([*cases, *fresh]):
        dot, text = function(f"dot_{n}", *case, target.lanes, n >= len(cases))
        assert isinstance(dot, DotCode)
        body += [*(dot.helpers if n == 0 else ()), text]
    built = build("\n".join(body), target, tmp_path_factory.mktemp("dot"), len(cases) + len(fresh))
    return target.lanes, dict(zip(cases, built)), dict(zip(fresh, built[len(cases) :]))


def build(source: str, target: CpuTarget, folder: Path, functions: int) -> list:
    (folder / "dot.cpp").write_text(source)
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", *machine_flags(target.isa, target.features)]
    command = [target.cxx, *flags, str(folder / "dot.cpp"), "-o", str(folder / "dot.so")]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(folder / "dot.so"))
    return [getattr(loaded, f"dot_{n}") for n in range(functions)]


def place(values: np.ndarray, layout: str, canary: float, dtype: str) -> np.ndarray:
    """Lay `values` out in a flat buffer whose unused elements hold the canary."""
    row, col = strides(values.shape, layout)
    size = (values.shape[0] - 1) * row + (values.shape[1] - 1) * col + 1
    flat = storage(np.full(size, canary), dtype)
    np.lib.stride_tricks.as_strided(flat, values.shape, (row * flat.itemsize, col * flat.itemsize))[:] = values
    return flat


def aligned_copy(array: np.ndarray) -> np.ndarray:
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[:] = array
    return out


def check(call, shape, dtypes, layouts, limits, rng, fresh: bool = False) -> None:
    bm, bn, bk = shape
    rows, cols, depth = (max(0, min(limit, size)) for limit, size in zip(limits, shape))
    is_int = dtypes[0] == "i8"
    draw = (lambda size: rng.integers(-128, 128, size)) if is_int else rng.standard_normal
    a, b = storage(draw((bm, bk)), dtypes[0]), storage(draw((bk, bn)), dtypes[1])
    poison = 77 if is_int else np.nan  # a read past a limit shows in the result
    poisoned_a, poisoned_b = (storage(np.full(x.shape, poison), d) for x, d in zip((a, b), dtypes))
    poisoned_a[:rows, :depth], poisoned_b[:depth, :cols] = a[:rows, :depth], b[:depth, :cols]
    start = rng.integers(-9, 9, (bm, bn)).astype(np.int32 if is_int else np.float32)
    acc = aligned_copy(start)
    if fresh:
        start[:], acc[:] = 0, poison

    flats = [place(x, layout, poison, d) for x, layout, d in zip((poisoned_a, poisoned_b), layouts, dtypes)]
    call(*(ctypes.c_void_p(x.ctypes.data) for x in (*flats, acc)), *limits)

    a64, b64 = as_float64(a, dtypes[0])[:rows, :depth], as_float64(b, dtypes[1])[:depth, :cols]
    expected = start.astype(np.float64)
    expected[:rows, :cols] += a64 @ b64
    tolerance = np.zeros((bm, bn))
    if not is_int:
        tolerance[:rows, :cols] = (np.abs(a64) @ np.abs(b64) + 9) * (depth + 1) * 2.0**-24
    error = np.abs(acc - expected)
    assert (error <= tolerance).all(), f"{shape} {dtypes} {layouts} {limits}: {error.max()} > {tolerance.max()}"


def test_a_dot_is_one_call_with_literal_sizes():
    a, b = Operand("x + m * K", "K", "1", "fp32"), Operand("w + n", "1", "K", "bf16")
    dot = emit_dot(a, b, "acc", (16, 64, 32), lanes=8, rows="M - m", indent="  ")
    left, right = "(const float *)(x + m * K), K, 1", "(const dot::bfloat16 *)(w + n), 1, K"
    assert dot.body == [f"  dot::accumulate<8, 16, 64, 32, float, false>({left}, {right}, acc, M - m, 64, 32);"]


def test_operands_of_bf16_values_are_multiplied_as_such():
    a, b = Operand("p", "64", "1", "fp32", "bf16"), Operand("v", "64", "1", "bf16")
    (line,) = emit_dot(a, b, "acc", (64, 64, 64), lanes=16).body
    assert "<16, 64, 64, 64, dot::bfloat16, false>((const float *)(p)" in line


def test_whole_tiles_match_float64(library):
    seed = 1
    print(f"seed {seed}")
    for (shape, dtypes, layouts), call in library[1].items():
        check(call, shape, dtypes, layouts, shape, np.random.default_rng(seed))


def test_limits_are_kept_and_nothing_past_them_counts(library):
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for (shape, dtypes, layouts), call in library[1].items():
        for _ in range(4):
            limits = tuple(int(rng.integers(1, size + 1)) for size in shape)
            check(call, shape, dtypes, layouts, limits, rng)


def test_limits_outside_the_tile_are_clamped(library):
    rng = np.random.default_rng(0)
    for (shape, dtypes, layouts), call in library[1].items():
        check(call, shape, dtypes, layouts, (10**6, 10**6, 10**6), rng)
        for limits in ((0, *shape[1:]), (shape[0], 0, shape[2]), (*shape[:2], 0), (-1, -1, -1)):
            check(call, shape, dtypes, layouts, limits, rng)


def test_a_fresh_sum_is_the_product_whatever_was_there(library):
    rng = np.random.default_rng(2)
    for (shape, dtypes, layouts), call in library[2].items():
        ragged = [tuple(int(rng.integers(1, size + 1)) for size in shape) for _ in range(4)]
        nothing = [(0, *shape[1:]), (shape[0], 0, shape[2]), (*shape[:2], 0), (-1, -1, -1)]
        for limits in (shape, (10**6, 10**6, 10**6), *ragged, *nothing):
            check(call, shape, dtypes, layouts, limits, rng, fresh=True)


def test_infinity_and_nan_stay_in_their_row_and_column(library):
    for (shape, dtypes, layouts), call in library[1].items():
        if "i8" in dtypes:
            continue
        a, b = np.ones((shape[0], shape[2])), np.ones((shape[2], shape[1]))
        a[0, 0], b[-1, -1] = np.inf, np.nan
        acc = aligned_copy(np.zeros(shape[:2], np.float32))
        flats = [place(storage(x, d), layout, 0, d) for x, layout, d in zip((a, b), layouts, dtypes)]
        call(*(ctypes.c_void_p(x.ctypes.data) for x in (*flats, acc)), *shape)
        assert np.isnan(acc[:, -1]).all()
        assert np.isposinf(acc[0, :-1]).all()
        assert (acc[1:, :-1] == shape[2]).all()


def test_every_16_bit_float_converts_exactly(library):
    """An identity on the left copies b, subnormals too: all finite patterns in large tiles, a share in small ones."""
    for (shape, dtypes, layouts), call in library[1].items():
        if dtypes not in {("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")} or layouts[0] != "row":
            continue
        bm, bn, bk = shape
        size = min(bm, bk)
        one = place(storage(np.eye(bm, bk), dtypes[0]), layouts[0], 0, dtypes[0])
        patterns = np.arange(65536, dtype=np.uint16)
        with np.errstate(invalid="ignore"):
            values = as_float64(patterns, dtypes[1])
        finite = patterns[np.isfinite(values)]  # 0 * infinity would leave its own row
        for tile in np.resize(finite, (-(-len(finite) // (bk * bn)), bk, bn))[:: max(1, 512 // (bk * bn))]:
            acc = aligned_copy(np.zeros((bm, bn), np.float32))
            flat = place(tile, layouts[1], 0, dtypes[1])
            call(*(ctypes.c_void_p(x.ctypes.data) for x in (one, flat, acc)), *shape)
            assert (acc[:size] == as_float64(tile, dtypes[1])[:size]).all()


def test_products_of_int8_at_their_extremes_are_exact(library):
    for (shape, dtypes, layouts), call in library[1].items():
        if "i8" not in dtypes:
            continue
        bm, bn, bk = shape
        for x, y in ((-128, -128), (-128, 127), (127, 127)):
            acc = aligned_copy(np.zeros((bm, bn), np.int32))
            tiles = (np.full((bm, bk), x), np.full((bk, bn), y))
            flats = [place(tile, layout, 77, "i8") for tile, layout in zip(tiles, layouts)]
            call(*(ctypes.c_void_p(flat.ctypes.data) for flat in (*flats, acc)), *shape)
            assert (acc == x * y * bk).all()


def test_subnormal_bf16_times_a_large_one_is_no_zero(library):
    for (shape, dtypes, layouts), call in library[1].items():
        if not set(dtypes) <= {"bf16", WIDENED}:
            continue
        bm, bn, bk = shape
        for left, right in ((2.0**-130, 2.0**127), (2.0**127, 2.0**-133)):
            a, b = np.zeros((bm, bk)), np.zeros((bk, bn))
            a[-1, -1], b[-1, -1] = left, right
            acc = aligned_copy(np.zeros((bm, bn), np.float32))
            flats = [place(storage(x, d), layout, 0, d) for x, layout, d in zip((a, b), layouts, dtypes)]
            call(*(ctypes.c_void_p(flat.ctypes.data) for flat in (*flats, acc)), *shape)
            assert acc[-1, -1] == left * right


def run_before_a_guard_page(cases) -> None:
    """Both operands end where an unreadable page begins, at full and at ragged limits."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    rng = np.random.default_rng(0)
    for (shape, dtypes, layouts), call in cases.items():
        for limits in (shape, tuple(int(rng.integers(1, size + 1)) for size in shape)):
            rows, cols, depth = limits
            pointers, kept = [], []
            for tile, used, layout, dtype in zip(
                [(shape[0], shape[2]), (shape[2], shape[1])], [(rows, depth), (depth, cols)], layouts, dtypes
            ):
                row, col = strides(tile, layout)
                size = ((used[0] - 1) * row + (used[1] - 1) * col + 1) * storage(np.zeros(1), dtype).itemsize
                buffer = mmap.mmap(-1, -(-size // page) * page + page)
                end = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + len(buffer) - page
                assert libc.mprotect(end, page, 0) == 0
                pointers.append(ctypes.c_void_p(end - size))
                kept.append(buffer)
            acc = aligned_copy(np.zeros(shape[:2], np.int32 if dtypes[0] == "i8" else np.float32))
            call(*pointers, ctypes.c_void_p(acc.ctypes.data), *limits)


def test_nothing_past_the_operands_is_read(library):
    child = multiprocessing.get_context("fork").Process(target=run_before_a_guard_page, args=(library[1],))
    child.start()
    child.join()
    assert child.exitcode == 0, f"exit code {child.exitcode}: -11 means that a page past an operand was read"
