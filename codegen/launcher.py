"""From a schedule to an executable: its manifest, its calls of ATen, and launches through Triton itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .build import jit_function
from .emit import run_buffers, segments
from .executable import Executable, Frame, Manifest, Output, RunBuffer, size_function, strided
from .expr import python_text
from .kernel import Choice, Fallback, Launch, Layout, Pointer, Schedule
from .schedule import Scheduled


def manifest_of(schedule: Schedule, names: dict) -> Manifest:
    """What calls of a schedule need to know, without the schedule. names: runtime size -> its name in code."""

    def text(expr: Any) -> str:
        return python_text(expr, names)

    return Manifest(
        schedule.name,
        tuple((names[symbol], name, axis) for symbol, (name, axis) in schedule.symbols.items()),
        tuple(RunBuffer(b.name, b.kind, b.dtype, text(b.elements)) for b in run_buffers(schedule)),
        tuple(
            Output(o.buffer.name, tuple(map(text, o.sizes)), tuple(map(text, o.strides)), text(o.offset))
            for o in schedule.outputs
        ),
        len(segments(schedule)),
    )


class TritonExecutable(Executable):
    """A graph whose kernels Triton launches one by one: on a GPU, or in Triton's interpreter."""

    def __init__(
        self,
        schedule: Schedule,
        names: dict,
        manifest: Manifest,
        fallbacks: Sequence[FallbackCall] = (),
        device: str = "cpu",
    ) -> None:
        self.device = device
        super().__init__(manifest, fallbacks)
        order = tuple(name for name, _, _ in manifest.sizes)
        self.segments = segments(schedule)
        self.size = lambda expr: size_function(order, python_text(expr, names))
        self.cache: dict[Any, Any] = {}

    def evaluate(self, expr: Any, frame: Frame) -> int:
        if expr not in self.cache:
            self.cache[expr] = self.size(expr)
        return self.cache[expr](*frame.sizes)

    def run_segment(self, position: int, frame: Frame) -> None:
        for step in self.segments[position].steps:
            if isinstance(step, Choice):
                launches = next(found for condition, found in step.cases if self.evaluate(condition, frame))
            else:
                launches = (step,)
            for launch in launches:
                self.launch(launch, frame)

    def launch(self, launch: Launch, frame: Frame) -> None:
        arguments = []
        for argument in launch.arguments:
            if isinstance(argument, Pointer):
                arguments.append(self.tensor(argument, frame))
            else:
                arguments.append(self.evaluate(argument, frame))
        grid = tuple(self.evaluate(extent, frame) for extent in launch.grid)
        if 0 not in grid:
            jit_function(launch.kernel)[grid](*arguments, **dict(launch.kernel.constants))

    def tensor(self, pointer: Pointer, frame: Frame) -> Tensor:
        """What Triton takes for a pointer: a tensor that starts there."""
        buffer = pointer.buffer
        if buffer.name not in frame.buffers:
            elements = self.evaluate(buffer.elements, frame)
            frame.buffers[buffer.name] = torch.empty(elements, dtype=buffer.dtype, device=self.device)
        tensor = frame.buffers[buffer.name]
        return strided(tensor, (1,), (1,), self.evaluate(pointer.offset, frame)) if tensor.numel() else tensor


class FallbackCall:
    """Calls an ATen op on the buffers of a run."""

    def __init__(self, step: Fallback, names: dict, order: tuple[str, ...]) -> None:
        def layout_function(layout: Layout) -> Callable[..., Any]:
            sizes, strides = ([python_text(x, names) for x in part] for part in (layout.sizes, layout.strides))
            parts = ["(" + "".join(f"{x}, " for x in part) + ")" for part in (sizes, strides)]
            return size_function(order, f"({parts[0]}, {parts[1]}, {python_text(layout.offset, names)})")

        self.node, self.results = step.node, step.results
        tensors = [node for node in step.node.all_input_nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        self.arguments = {
            node: (layout.buffer.name, layout_function(layout)) for node, layout in zip(tensors, step.arguments)
        }
        self.size = lambda value: size_function(order, python_text(value, names))

    def __call__(self, frame: Frame) -> None:
        def value(node: fx.Node) -> Any:
            if node in self.arguments:
                buffer, view = self.arguments[node]
                sizes, strides, offset = view(*frame.sizes)
                return strided(frame.buffers[buffer], sizes, strides, offset)
            scalar = node.meta["val"]
            return self.size(scalar.node.expr)(*frame.sizes) if isinstance(scalar, torch.SymInt) else scalar

        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), value)
        produced = self.node.target(*args, **kwargs)
        for layout, tensor in zip(self.results, produced if isinstance(produced, tuple | list) else (produced,)):
            frame.buffers[layout.buffer.name] = tensor.contiguous()


def fallback_calls(scheduled: Scheduled) -> list[FallbackCall]:
    """The calls of ATen of a schedule, in order."""
    names = scheduled.scope.names
    order = tuple(names[symbol] for symbol in scheduled.schedule.symbols)
    return [FallbackCall(step, names, order) for step in scheduled.schedule.fallbacks]
