"""Engines that only a benchmark runs beside effc and eager: Inductor and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from effc.compiler.errors import InputError
from effc.speed import TransformersEngine
from torch import Tensor, nn


class InductorEngine(TransformersEngine):
    """A transformers model under torch.compile with a static cache, and with weights packed for its kernels."""

    def __init__(self, model: nn.Module, capacity: int) -> None:
        super().__init__(torch.compile(model, dynamic=False), capacity, "Inductor, static cache")

    def decode(self, tokens: Tensor) -> Tensor:
        with packed_weights():
            return super().decode(tokens)


def packed_weights() -> AbstractContextManager[None]:
    """Inductor's freezing, which lays weights out for oneDNN; it is off by default."""
    import torch._inductor.config

    return torch._inductor.config.patch(freezing=True)


class LlamaCppEngine:
    """llama.cpp through llama-cpp-python, on the weights as the GGUF file stores them."""

    def __init__(self, path: Path, capacity: int, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise InputError("--llama-cpp needs the package llama-cpp-python: pip install 'effc[bench]'") from error
        if path.suffix != ".gguf":
            raise InputError(f"--llama-cpp needs a GGUF file, found {path.name}")
        self.name = "llama.cpp, weights as stored"
        self.model = llama_cpp.Llama(
            str(path), n_ctx=capacity, n_batch=capacity, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.logits: Callable = llama_cpp.llama_get_logits_ith

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.model.reset()
        return self.decode(input_ids)

    def decode(self, tokens: Tensor) -> Tensor:
        self.model.eval(tokens[0].tolist())
        pointer = self.logits(self.model.ctx, -1)
        return torch.tensor(pointer[: self.model.n_vocab()])[None]
