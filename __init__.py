"""effc: a compiler for LLM inference in PyTorch.

    program = effc.compile("smollm2")           a Program: program(input_ids), program.generate(input_ids)
    llm = effc.LLM("smollm2")                   text in, text out
    torch.compile(model, backend="effc")        without importing effc
    graph = effc.trace(model)                   then effc.passes.run(graph, [...])
    effc.triton_cpu.enable()                    anyone's Triton kernels on CPU tensors

Names are imported on first use: `import effc` costs nothing that is not asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import passes, triton_cpu
    from .compiler.errors import CacheError, EffcError, InputError, ModelError, ToolchainError
    from .compiler.trace import trace
    from .llm import LLM, Completion
    from .program import Program, compile, load
    from .report import dump, explain

__version__ = "0.1.0"

HOMES = {
    "CacheError": "compiler.errors",
    "Completion": "llm",
    "EffcError": "compiler.errors",
    "InputError": "compiler.errors",
    "LLM": "llm",
    "ModelError": "compiler.errors",
    "Program": "program",
    "ToolchainError": "compiler.errors",
    "compile": "program",
    "dump": "report",
    "explain": "report",
    "load": "program",
    "trace": "compiler.trace",
}
"""Public name -> the module that defines it."""

MODULES = ("passes", "triton_cpu")
"""Modules that are public as they are."""

__all__ = [
    "LLM",
    "CacheError",
    "Completion",
    "EffcError",
    "InputError",
    "ModelError",
    "Program",
    "ToolchainError",
    "compile",
    "dump",
    "explain",
    "load",
    "passes",
    "trace",
    "triton_cpu",
]


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'effc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class Checkout(importlib.metadata.Distribution):
    """What `pip install` would record of the torch.compile backend, for a checkout that is only on the path."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Name: effc\nVersion: {__version__}\n",
            "entry_points.txt": "[torch_dynamo_backends]\neffc = effc.backend:compile_graph\n",
        }.get(filename)

    def locate_file(self, path: str) -> str:
        return str(path)

    @classmethod
    def find_spec(cls, *arguments: object) -> None:
        return None

    @classmethod
    def find_distributions(cls, context: importlib.metadata.DistributionFinder.Context) -> list[Checkout]:
        return [cls()] if context.name in (None, "effc") else []


def register_checkout() -> None:
    """Let `torch.compile(..., backend="effc")` find the backend where effc was imported without being installed."""
    try:
        importlib.metadata.distribution("effc")
    except importlib.metadata.PackageNotFoundError:
        sys.meta_path.append(Checkout)


register_checkout()
