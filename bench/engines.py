"""Engines that only a benchmark runs beside effc and eager: Inductor and llama.cpp."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
from pathlib import Path

import numpy
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
    """llama.cpp on the weights as the GGUF file stores them, through its C functions: no Python per token but this."""

    def __init__(self, path: Path, capacity: int, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise InputError("--llama-cpp needs the package llama-cpp-python: pip install 'effc[bench]'") from error
        if path.suffix != ".gguf":
            raise InputError(f"--llama-cpp needs a GGUF file, found {path.name}")
        self.name, self.library = "llama.cpp, weights as stored", llama_cpp
        self.model = llama_cpp.Llama(
            str(path), n_ctx=capacity, n_batch=capacity, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.context = self.model.ctx

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        return self.decode(input_ids)

    def decode(self, tokens: Tensor) -> Tensor:
        ids = tokens[0].to(torch.int32).numpy()
        batch = self.library.llama_batch_get_one(ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(ids))
        if self.library.llama_decode(self.context, batch) != 0:
            raise InputError(f"llama.cpp cannot read {len(ids)} tokens more")
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(numpy.ctypeslib.as_array(logits, (self.model.n_vocab(),)).copy())[None]
