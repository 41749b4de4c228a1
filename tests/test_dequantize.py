"""The emitter of dequantize: an embedding of a quantized table reads the rows it needs, bit by bit what eager gives."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.formats import FORMATS
from torch import Tensor
from torch.nn import functional as F

from .graphs import Compiled, random
from .test_gathers import indices

pytestmark = pytest.mark.usefixtures("one_thread")

effc = torch.ops.effc

KINDS = ("q4_1", "q5_0", "q6_k", "q4_k", "int8", "int4_g128", "int3a_g64", "nf4_g32")
"""Each way of keeping codes, scales and mins."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_of_quantized_tables_equal_the_reference(dtype) -> None:
    tables = {name: FORMATS[name].quantize(random(9, 256, seed=at)) for at, name in enumerate(KINDS)}

    def function(ids: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        left = iter(parts)
        held = {name: [next(left) for _ in table] for name, table in tables.items()}
        return tuple(F.embedding(ids, effc.dequantize(parts, name, dtype)) for name, parts in held.items())

    parts = {f"{name}_{at}": part for name, table in tables.items() for at, part in enumerate(table)}
    compiled = Compiled(function, {"ids": indices(2, 5, limit=9), **parts}, {"ids": (0, 1)})
    assert not compiled.fallbacks
    for length in (1, 13):
        compiled.check(ids=indices(2, length, limit=9, seed=length), **parts)


def test_a_format_without_a_kernel_says_so() -> None:
    parts = FORMATS["fp8_e4m3"].quantize(random(9, 32))

    def function(ids: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return F.embedding(ids, effc.dequantize([codes, scales], "fp8_e4m3", torch.float32)) + 1

    inputs = {"ids": indices(5, limit=9), "codes": parts[0], "scales": parts[1]}
    compiled = Compiled(function, inputs, {"ids": (0,)})
    assert compiled.fallbacks
    compiled.check(**inputs)
