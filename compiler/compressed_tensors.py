"""Checkpoints of compressed-tensors (llm-compressor): integers packed or plain, and fp8.

    pack-quantized                    weight_packed int32 [N, K * bits / 32], weight_scale, weight_shape,
                                      (weight_zero_point int32 [N * bits / 32, groups]), (weight_g_idx [K])
    int-quantized, float-quantized    weight int8 or fp8 [N, K], weight_scale, (weight_zero_point)

Packed codes and zero points are kept with half of the range added. weight_scale is [N, groups], [N, 1], [1], or one
for each block [rows, columns]. What a module is quantized as is in the `config_groups` whose target it matches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Matrix, Reader, Tensors, check_shape, format_for
from .checkpoint_layouts import FLOATS, bases, signed
from .errors import ModelError
from .words import codes_in_words, words_of

LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
PLAIN = {torch.int8: "int8", torch.float8_e4m3fn: "fp8_e4m3"}


def compressed_tensors(source: Tensors, config: Mapping[str, Any]) -> Iterator[Matrix]:
    """The matrices of the checkpoint. Raises ModelError for layouts that have no format here."""
    groups = list(config.get("config_groups", {}).values())
    for layout in {config.get("format"), *(group.get("format") for group in groups)} - {None, "mixed-precision"}:
        if layout not in LAYOUTS:
            expected = ", ".join(LAYOUTS)
            raise ModelError(f"unsupported compressed-tensors format {layout!r}: expected one of {expected}")
    for base in bases(source, ".weight_packed"):
        yield packed(source, base, weights_of(base, groups))
    for base in bases(source, ".weight"):
        if source.dtype(f"{base}.weight") in PLAIN:
            yield plain(source, base, weights_of(base, groups))


def weights_of(base: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """How the weight of a module is quantized: a target is a module's name, "re:" and a pattern, or a class."""
    classes = []
    for group in groups:
        for target in group.get("targets", ()):
            if base == target or (target.startswith("re:") and re.match(target[3:], base)):
                return group["weights"]
            if not target.startswith("re:") and "." not in target:
                classes.append(group["weights"])
    if not classes:
        raise ModelError(f"{base}: expected a group of config_groups that targets it, found none")
    return classes[0]


def packed(source: Tensors, base: str, weights: Mapping[str, Any]) -> Matrix:
    words, size = f"{base}.weight_packed", f"{base}.weight_shape"
    bits = weights["num_bits"]
    check_shape(source, size, (2,), [torch.int64, torch.int32])
    n, k = source.read(size).tolist()
    check_shape(source, words, (n, words_of(k, bits)), [torch.int32])

    def codes() -> Tensor:
        return signed(codes_in_words(source.read(words), bits)[:, :k], bits)

    def packed_zeros() -> Tensor:
        found = codes_in_words(source.read(f"{base}.weight_zero_point").t(), bits)[:, :n]
        return signed(found, bits).t().contiguous()

    return matrix(source, base, weights, f"int{bits}", (n, k), (words, size), codes, packed_zeros)


def plain(source: Tensors, base: str, weights: Mapping[str, Any]) -> Matrix:
    name = f"{base}.weight"
    kind, shape = PLAIN[source.dtype(name)], source.shape(name)
    return matrix(source, base, weights, kind, shape, (name,), lambda: source.read(name), None)


def matrix(
    source: Tensors,
    base: str,
    weights: Mapping[str, Any],
    kind: str,
    shape: tuple[int, int],
    stored: tuple[str, ...],
    codes: Reader,
    packed_zeros: Reader | None,
) -> Matrix:
    """What packed and plain codes share. stored: the tensors of the codes."""
    scales, zeros, index = (f"{base}.{part}" for part in ("weight_scale", "weight_zero_point", "weight_g_idx"))
    group, per_scale, block_rows = scaling(base, weights, shape)
    check_shape(source, scales, per_scale, FLOATS, ones_aside=True)
    used, asymmetric = [*stored, scales], not weights.get("symmetric", True)
    if asymmetric:
        packs = packed_zeros is not None
        kept = (words_of(shape[0], weights["num_bits"]), per_scale[-1]) if packs else per_scale
        check_shape(source, zeros, kept, [torch.int32] if packs else [torch.int8], ones_aside=not packs)
        used.append(zeros)
    ordered = index in source.names
    if ordered:
        check_shape(source, index, (shape[1],), [torch.int32, torch.int64])
        used.append(index)

    def by_row(name: str) -> Tensor:
        """[N, groups], from one a tensor or a block of rows."""
        values = source.read(name).reshape(-1, per_scale[-1])
        return values.repeat_interleave(block_rows, 0)[: shape[0]]

    return Matrix(
        f"{base}.weight",
        format_for(base, f"{kind}z" if asymmetric else kind, group, source.dtype(scales)),
        shape,
        tuple(used),
        codes=codes,
        scales=lambda: by_row(scales),
        zeros=(packed_zeros or (lambda: by_row(zeros))) if asymmetric else None,
        groups=(lambda: source.read(index)) if ordered else None,
    )


def scaling(base: str, weights: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int | None, tuple[int, ...], int]:
    """What a scale is for: weights along K (None: all), the shape of weight_scale, and how many rows share one."""
    n, k = shape
    match weights.get("strategy"):
        case "tensor":
            return None, (1,), n
        case "channel":
            return None, (n, 1), 1
        case "group":
            group = weights["group_size"]
            return group, (n, -(-k // group)), 1
        case "block":
            rows, group = weights["block_structure"]
            return group, (-(-n // rows), -(-k // group)), rows
        case other:
            raise ModelError(f"{base}: expected a strategy tensor, channel, group or block, found {other}")
