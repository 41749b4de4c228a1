"""One graph that runs: binds sizes and buffers at every call, then runs native code.

A warm start comes here straight from the cache, so this file knows nothing of schedules (nor of sympy).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiler.errors import InputError, ToolchainError


@dataclass(frozen=True)
class Output:
    """A result: a strided look at a buffer. sizes, strides and offset are code over the runtime sizes."""

    buffer: str
    sizes: tuple[str, ...]
    strides: tuple[str, ...]
    offset: str


@dataclass(frozen=True)
class RunBuffer:
    """A buffer that a call passes by pointer; elements is code over the runtime sizes."""

    name: str
    kind: str
    dtype: torch.dtype
    elements: str


@dataclass(frozen=True)
class Manifest:
    """What a call needs to know besides the native code. Plain data: a warm start reads it from the cache.

    sizes: (name, input, axis) of each runtime size, see `runtime_size`. segments: how many native functions there
    are.
    """

    name: str
    sizes: tuple[tuple[str, str, int | None], ...]
    buffers: tuple[RunBuffer, ...]
    outputs: tuple[Output, ...]
    segments: int

    @cached_property
    def given(self) -> tuple[RunBuffer, ...]:
        """The inputs and states, which each call brings."""
        return tuple(buffer for buffer in self.buffers if buffer.kind in ("input", "state"))


class Frame:
    """The buffers of one call by name, and its runtime sizes."""

    def __init__(self, manifest: Manifest, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        self.sizes = runtime_sizes(manifest, tensors)
        self.buffers: dict[str, Tensor] = dict(weights)
        for buffer in manifest.given:
            tensor = tensors[buffer.name]
            if tensor.dtype != buffer.dtype:
                raise InputError(f"{buffer.name} must be {buffer.dtype}, found {tensor.dtype}")
            self.buffers[buffer.name] = tensor


def runtime_sizes(manifest: Manifest, tensors: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(runtime_size(tensors[name], axis) for _, name, axis in manifest.sizes)


def runtime_size(value: Any, axis: int | None) -> int:
    """A size of a tensor; with an axis below 0, its stride along that axis; without one, the number itself."""
    if axis is None:
        return int(value)
    return value.shape[axis] if axis >= 0 else value.stride(axis)


def strided(tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    """A strided look at a tensor, from its own first element on."""
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset)


def size_function(names: tuple[str, ...], code: str) -> Callable[..., Any]:
    """Code over the runtime sizes as a function of them."""
    return eval(f"lambda {', '.join(names)}: {code}", {"__builtins__": {}, "max": max, "min": min})


class Executable:
    """A graph ready to run. `run_segment(position, frame)` is what the device does; ATen runs in between."""

    device = "cpu"

    def __init__(self, manifest: Manifest, fallbacks: Sequence[Callable[[Frame], None]] = ()) -> None:
        self.manifest = manifest
        self.fallbacks = fallbacks
        names = tuple(name for name, _, _ in manifest.sizes)
        allocated = [buffer for buffer in manifest.buffers if buffer.kind in ("output", "shared")]
        self.allocations = [(b.name, b.dtype, size_function(names, b.elements)) for b in allocated]
        self.outputs = [
            (o.buffer, size_function(names, f"(({', '.join(o.sizes)},), ({', '.join(o.strides)},), {o.offset})"))
            if o.sizes
            else (o.buffer, size_function(names, f"((), (), {o.offset})"))
            for o in manifest.outputs
        ]

    def __call__(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Run on contiguous inputs and states; returns the outputs. States are updated in place.

        weights: by buffer; the tensors of one mapping stay the same from call to call.
        """
        frame = Frame(self.manifest, tensors, weights)
        self.hold(weights)
        for name, dtype, elements in self.allocations:
            frame.buffers[name] = torch.empty(elements(*frame.sizes), dtype=dtype, device=self.device)
        for position in range(self.manifest.segments):
            self.run_segment(position, frame)
            if position < len(self.fallbacks):
                self.fallbacks[position](frame)
        results = []
        for buffer, view in self.outputs:
            sizes, strides, offset = view(*frame.sizes)
            results.append(strided(frame.buffers[buffer], sizes, strides, offset))
        return results

    def hold(self, weights: Mapping[str, Tensor]) -> None:
        """Called before each run with its weights."""

    def run_segment(self, position: int, frame: Frame) -> None:
        raise NotImplementedError


class NativeExecutable(Executable):
    """A graph compiled for the CPU: each segment is one call of a native function."""

    def __init__(self, manifest: Manifest, library: Path, fallbacks: Sequence[Callable[[Frame], None]] = ()) -> None:
        super().__init__(manifest, fallbacks)
        try:
            self.library = ctypes.CDLL(str(library))
        except OSError as error:
            raise ToolchainError(
                f"cannot load what the C++ compiler made ({error}): remove it, and set EFFC_CXX to g++ or clang++"
            ) from error
        self.functions = [getattr(self.library, f"run_{i}") for i in range(manifest.segments)]
        for function in self.functions:
            function.restype = None
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
        self.arena_bytes = self.library.arena_bytes
        self.arena_bytes.restype = ctypes.c_int64
        self.arena_bytes.argtypes = (ctypes.c_void_p,)
        self.arena = torch.empty(0, dtype=torch.uint8)
        self.size_array = (ctypes.c_int64 * max(1, len(manifest.sizes)))()
        self.pointers = (ctypes.c_void_p * max(1, len(manifest.buffers)))()
        self.weights: Mapping[str, Tensor] | None = None
        places = list(enumerate(buffer.name for buffer in manifest.buffers))
        self.of_weights = [(i, name) for i, name in places if manifest.buffers[i].kind == "weight"]
        self.of_calls = [(i, name) for i, name in places if manifest.buffers[i].kind != "weight"]
        self.bound_sizes: tuple[int, ...] | None = None
        self.lock = threading.Lock()

    def __call__(self, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
        """Run; threads that call the same graph take turns, since it has one arena."""
        with self.lock:
            return super().__call__(tensors, weights)

    def hold(self, weights: Mapping[str, Tensor]) -> None:
        """Weights are hundreds: their addresses are looked up once for each mapping of them."""
        if weights is not self.weights:
            for i, name in self.of_weights:
                self.pointers[i] = weights[name].data_ptr()
            self.weights = weights

    def run_segment(self, position: int, frame: Frame) -> None:
        if frame.sizes != self.bound_sizes:
            self.size_array[: len(frame.sizes)] = frame.sizes
            needed = self.arena_bytes(self.size_array) + 64
            if needed < 64:
                named = ", ".join(f"{name} = {x}" for (name, *_), x in zip(self.manifest.sizes, frame.sizes))
                raise InputError(
                    f"{named} take strides over 2**31 elements, more than kernels count: give less at once"
                )
            if self.arena.numel() < needed:
                self.arena = torch.empty(needed, dtype=torch.uint8)
            self.bound_sizes = frame.sizes
        for i, name in self.of_calls:
            tensor = frame.buffers.get(name)
            self.pointers[i] = None if tensor is None else tensor.data_ptr()
        arena = -(-self.arena.data_ptr() // 64) * 64
        self.functions[position](self.pointers, self.size_array, arena, torch.get_num_threads())
