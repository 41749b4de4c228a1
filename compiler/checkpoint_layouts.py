"""How quantized checkpoints pack a matrix [N, K], with K the inputs: AWQ and GPTQ.

    AWQ      qweight int32 [K, N / 8], qzeros int32 [groups, N / 8], scales [groups, N]: columns 0 2 4 6 1 3 5 7 of
             eight lie in the nibbles of a word (AutoAWQ's GEMM version; Lin et al., 2023)
    GPTQ     qweight int32 [K * bits / 32, N], qzeros int32 [groups, N * bits / 32], scales [groups, N], g_idx [K]:
             a stream of bits along K, zeros less 1 in version 1 (AutoGPTQ; Frantar et al., 2022)

w = scale * (code - zero) in both. compressed-tensors has its own file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Matrix, Tensors, check_shape, format_for
from .errors import ModelError
from .words import codes_in_words, words_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ: where each of eight columns lies in a word."""


def awq(source: Tensors, config: Mapping[str, Any]) -> Iterator[Matrix]:
    """The matrices of an AWQ checkpoint. Raises ModelError for another version than GEMM."""
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", config.get("w_bit"))
    if version != "gemm" or bits != 4:
        raise ModelError(f"unsupported AWQ checkpoint: expected version gemm and 4 bits, found {version} and {bits}")
    group = group_of(config.get("group_size", config.get("q_group_size", -1)))
    for base in bases(source, ".qweight"):
        yield awq_matrix(source, base, group)


def awq_matrix(source: Tensors, base: str, group: int | None) -> Matrix:
    words, zeros, scales = (f"{base}.{part}" for part in ("qweight", "qzeros", "scales"))
    k, n = source.shape(words)[0], source.shape(words)[1] * 8
    groups = 1 if group is None else -(-k // group)
    check_shape(source, words, (k, n // 8), [torch.int32])
    check_shape(source, zeros, (groups, n // 8), [torch.int32])
    check_shape(source, scales, (groups, n), FLOATS)

    def columns(name: str) -> Tensor:
        codes = codes_in_words(source.read(name), 4).unflatten(-1, (-1, 8))
        return codes[..., NIBBLE_OF_COLUMN].flatten(-2).t().contiguous()

    return Matrix(
        f"{base}.weight",
        format_for(base, "int4z", group, source.dtype(scales)),
        (n, k),
        (words, zeros, scales),
        codes=lambda: columns(words),
        scales=lambda: source.read(scales).t(),
        zeros=lambda: columns(zeros),
    )


GPTQ_BITS = (2, 3, 4, 8)


def gptq(source: Tensors, config: Mapping[str, Any]) -> Iterator[Matrix]:
    """The matrices of a GPTQ checkpoint. Raises ModelError for layouts that are not AutoGPTQ's own."""
    layout, bits = config.get("checkpoint_format") or "gptq", config.get("bits")
    if layout not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        found = "marlin" if config.get("is_marlin_format") else layout
        raise ModelError(f"unsupported GPTQ checkpoint: expected checkpoint_format gptq or gptq_v2, found {found}")
    if bits not in GPTQ_BITS:
        raise ModelError(f"unsupported GPTQ checkpoint: expected 2, 3, 4 or 8 bits, found {bits}")
    for base in bases(source, ".qweight"):
        yield gptq_matrix(source, base, config, first_zero=0 if layout == "gptq_v2" else 1)


def gptq_matrix(source: Tensors, base: str, config: Mapping[str, Any], first_zero: int) -> Matrix:
    """first_zero: the zero point that is kept as 0. What a symmetric checkpoint keeps says that itself: GPTQModel 5 has
    written those of version 2 under the name of version 1 (vLLM's pull request 38966).
    """
    words, zeros, scales, index = (f"{base}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    bits, group = config["bits"], group_of(config.get("group_size", -1))
    (rows, n), symmetric = source.shape(words), bool(config.get("sym", False))
    k = rows * 32 // bits
    groups = 1 if group is None else -(-k // group)
    check_shape(source, words, (words_of(k, bits), n), [torch.int32])
    check_shape(source, zeros, (groups, words_of(n, bits)), [torch.int32])
    check_shape(source, scales, (groups, n), FLOATS)
    if index in source.names:
        check_shape(source, index, (k,), [torch.int32, torch.int64])

    def codes() -> Tensor:
        return signed(codes_in_words(source.read(words).t(), bits)[:, :k], bits)

    def zero_points() -> Tensor:
        kept, half = codes_in_words(source.read(zeros), bits)[:, :n], 1 << bits - 1
        first = half - int(kept[0, 0]) if symmetric and half - kept[0, 0] in (0, 1) else first_zero
        return signed(kept + first & (1 << bits) - 1, bits).t().contiguous()

    return Matrix(
        f"{base}.weight",
        format_for(base, f"int{bits}" if symmetric else f"int{bits}z", group, source.dtype(scales)),
        (n, k),
        (words, zeros, scales, *([index] if index in source.names else [])),
        codes=codes,
        scales=lambda: source.read(scales).t(),
        zeros=zero_points,
        groups=(lambda: source.read(index)) if index in source.names else None,
    )


def signed(codes: Tensor, bits: int) -> Tensor:
    """Codes of 8 bits as formats keep them: 0 to 255 --> -128 to 127; fewer bits stay."""
    return (codes ^ 0x80).view(torch.int8) if bits == 8 else codes


def group_of(size: int) -> int | None:
    """Checkpoints write -1 (or 0) for a scale per row."""
    return size if size > 0 else None


def bases(source: Tensors, suffix: str) -> Iterator[str]:
    """The modules that have a tensor of that suffix."""
    return (name.removesuffix(suffix) for name in source.names if name.endswith(suffix))
