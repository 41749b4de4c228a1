"""effc: a compiler for LLM inference in PyTorch.

    program = effc.compile("smollm2")           a Program: program(input_ids), program.generate(input_ids)
    llm = effc.LLM("smollm2")                   text in, text out
    torch.compile(model, backend="effc")        without importing effc
    graph = effc.trace(model)                   then effc.passes.run(graph, [...])

Names are imported on first use: `import effc` costs nothing that is not asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import passes
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
]


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(importlib.import_module(f".{HOMES[name]}", __name__), name)
    if name == "passes":
        return importlib.import_module(".passes", __name__)
    raise AttributeError(f"module 'effc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
