"""Processes that run random kernels: Triton's interpreter, and the CPU target. A kernel that crashes takes only its
process along.

    with Worker("interpreter") as reference, Worker("native") as native:     or "checked", "sanitized"
        want, got = reference.run(jobs), native.run(jobs)      a list of memories, or a Failure, for each job

The interpreter wants TRITON_INTERPRET set before Triton is imported. Where it is known to be wrong it is mended here:
it reads bf16 as integers and rounds to it by cutting off, and its maximum and minimum always propagate NaN.
"""

import contextlib
import ctypes
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

TIMEOUT = 300  # seconds for one batch
ALIGN = 64
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=alignment,pointer-overflow", "-fno-sanitize-recover=all")
SANITIZERS += ("-O1", "-fexpensive-optimizations", "-g1")


@dataclass
class Job:
    """A kernel to run: its source, arguments as `kernel_text.Kernel` has them, and memory."""

    name: str
    source: str
    arguments: list[tuple[str, str, object]]
    memories: list[np.ndarray]
    grid: tuple[int, int, int]
    divisible: tuple[str, ...] = ()
    extents: tuple[tuple[int, int], ...] = ()  # first byte that the kernel may touch, and the one after the last


@dataclass
class Failure:
    text: str


# -- in the parent


class Worker:
    """A process that runs batches of jobs; started again after it dies."""

    def __init__(self, kind: str, environment: dict[str, str] | None = None):
        self.kind, self.environment = kind, environment or {}
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_exception) -> None:
        self.stop()

    def start(self) -> None:
        ours, theirs = socket.socketpair()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        environment = os.environ | {"TRITON_INTERPRET": "1" if self.kind == "interpreter" else "0"} | self.environment
        command = [sys.executable, __file__, self.kind, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stderr=self.errors)
        theirs.close()
        self.connection = Connection(ours.detach())

    def stop(self) -> None:
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.wait()
            self.errors.close()
            self.process = None

    def send(self, jobs: list[Job]) -> None:
        if self.process is None:
            self.start()
        self.connection.send([vars(job) for job in jobs])

    def receive(self) -> list[list[np.ndarray] | Failure] | Failure:
        """What `send` asked for; one Failure where the process died or took too long."""
        try:
            if not self.connection.poll(TIMEOUT):
                raise TimeoutError(f"no answer in {TIMEOUT} seconds")
            return [Failure(item) if isinstance(item, str) else item for item in self.connection.recv()]
        except (EOFError, OSError) as error:
            code = self.process.wait() if not isinstance(error, TimeoutError) else None
            self.errors.seek(0)
            text = f"{error} {self.errors.read()[-20000:].decode()}"
            self.stop()
            return Failure(f"the {self.kind} process ended with {code}: {text}")

    def run(self, jobs: list[Job]) -> list[list[np.ndarray] | Failure]:
        self.send(jobs)
        return self.finish(jobs)

    def finish(self, jobs: list[Job]) -> list[list[np.ndarray] | Failure]:
        """Results of jobs sent; one by one where the whole batch brought the process down."""
        results = self.receive()
        if not isinstance(results, Failure):
            return results
        if len(jobs) == 1:
            return [results]
        return [self.run([job])[0] for job in jobs]


# -- in the child


class Memory:
    """A copy of `data` at an aligned address."""

    def __init__(self, data: np.ndarray):
        raw = np.empty(len(data) + ALIGN, np.uint8)
        start = -raw.ctypes.data % ALIGN
        self.data = raw[start : start + len(data)]
        self.data[:] = data

    def address(self, offset: int) -> int:
        return self.data.ctypes.data + offset


class TightMemory:
    """The part of `data` that a kernel may touch, on the heap to the byte: AddressSanitizer sees what goes past it."""

    def __init__(self, data: np.ndarray, extent: tuple[int, int]):
        heap = ctypes.CDLL(None)
        heap.malloc.restype, heap.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        start, end = extent
        self.base = heap.malloc(end - start + start % ALIGN) + start % ALIGN - start
        ctypes.memmove(self.base + start, data[start:end].tobytes(), end - start)
        self.data = data

    def address(self, offset: int) -> int:
        return self.base + offset


def run_native(jobs: list[Job]) -> list[list[np.ndarray] | str]:
    from effc.codegen.cpu import host_target, lower

    target, lowered = host_target(checked=sys.argv[1] == "checked"), []
    if sys.argv[1] == "sanitized":
        target = dataclasses.replace(target, flags=target.flags + SANITIZERS)
    for job in jobs:
        try:
            signature = {name: kind for name, kind, _ in job.arguments}
            lowered.append(lower(load_kernel(job), signature, {}, target=target, divisible=job.divisible))
        except Exception:
            lowered.append(traceback.format_exc())
    good = [kernel for kernel in lowered if not isinstance(kernel, str)]
    functions = dict(zip([kernel.name for kernel in good], build(good, target), strict=True))
    return [
        kernel if isinstance(kernel, str) else call(functions[kernel.name], job)
        for job, kernel in zip(jobs, lowered, strict=True)
    ]


LAUNCHER = """
extern "C" __attribute__((visibility("default"))) void launch_{name}(
    {params}int32_t num_x, int32_t num_y, int32_t num_z) {{
#pragma omp parallel for schedule(dynamic) num_threads(2)
  for (int32_t p = 0; p < num_x * num_y * num_z; ++p)
    {name}({args}p % num_x, p / num_x % num_y, p / num_x / num_y, num_x, num_y, num_z);
}}
"""
CTYPES = {"float": ctypes.c_float, "double": ctypes.c_double, "bool": ctypes.c_bool}
CTYPES |= {f"int{bits}_t": getattr(ctypes, f"c_int{bits}") for bits in (8, 16, 32, 64)}


def build(kernels: list, target) -> list:
    """Launchers of kernels, all from one translation unit; a compiler's refusal is the launcher of what it refuses."""
    from effc.codegen.cpu.build import build_library, with_prelude
    from effc.codegen.cpu.launch import cache_folder
    from effc.compiler.errors import ToolchainError

    texts = []
    for kernel in kernels:
        params = "".join(f"{type_} a{k}, " for k, (_, type_) in enumerate(kernel.params))
        args = "".join(f"a{k}, " for k in range(len(kernel.params)))
        if kernel.checked:
            params += "const check::Extent *extents, "
            args += "extents, "
        texts.append(kernel.cpp + LAUNCHER.format(params=params, args=args, name=kernel.name))
    try:
        library = ctypes.CDLL(str(build_library(with_prelude("\n".join(texts)), target, cache_folder())))
    except ToolchainError as error:
        if len(kernels) == 1:
            return [str(error)]
        return [function for kernel in kernels for function in build([kernel], target)]
    functions = []
    for kernel in kernels:
        function = getattr(library, f"launch_{kernel.name}")
        function.restype = None
        types = [CTYPES.get(type_, ctypes.c_void_p) for _, type_ in kernel.params]
        types += [ctypes.c_void_p] if kernel.checked else []
        function.argtypes = types + [ctypes.c_int32] * 3
        function.failure = library.take_failure if "report::" in kernel.cpp else lambda: None
        function.failure.restype = ctypes.c_char_p
        functions.append(function)
    return functions


def call(function, job: Job) -> list[np.ndarray] | str:
    if isinstance(function, str):
        return function
    memories = [Memory(data) for data in job.memories]
    if sys.argv[1] == "sanitized":
        memories = [TightMemory(data, extent) for data, extent in zip(job.memories, job.extents, strict=True)]
    values = [memories[v[0]].address(v[1]) if isinstance(v, tuple) else v for _, _, v in job.arguments]
    if len(function.argtypes) > len(values) + 3:
        pointers = [v[0] for _, _, v in job.arguments if isinstance(v, tuple)]
        ends = [memories[k].address(place) for k in pointers for place in job.extents[k]]
        values.append((ctypes.c_int64 * len(ends))(*ends))
    function(*values, *job.grid)
    if failure := function.failure():
        return failure.decode()
    return [memory.data for memory in memories]


def load_kernel(job: Job):
    from effc.codegen.cpu import kernel_from_source

    return kernel_from_source(job.source, job.name)


def run_interpreter(jobs: list[Job]) -> list[list[np.ndarray] | str]:
    results = []
    for job in jobs:
        memories = [Memory(data) for data in job.memories]
        values = [pointer(memories[v[0]], v[1], k) if isinstance(v, tuple) else v for _, k, v in job.arguments]
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
                load_kernel(job)[job.grid](*values)
            results.append([memory.data for memory in memories])
        except Exception:
            results.append(traceback.format_exc())
    return results


def pointer(memory: Memory, offset: int, kind: str):
    """A tensor of one element at an offset of a memory."""
    import torch

    names = {"*fp16": "float16", "*bf16": "bfloat16", "*fp32": "float32", "*fp64": "float64", "*i1": "bool"}
    dtype = getattr(torch, names.get(kind) or kind.replace("*", "").replace("i", "int").replace("u", "uint"))
    return torch.from_numpy(memory.data[offset : offset + dtype.itemsize]).view(dtype)


def main() -> None:
    kind, handle = sys.argv[1], int(sys.argv[2])
    if kind == "interpreter":
        import kernel_reference

        kernel_reference.mend()
    run = {"interpreter": run_interpreter}.get(kind, run_native)
    connection = Connection(handle)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(run([Job(**fields) for fields in connection.recv()]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
