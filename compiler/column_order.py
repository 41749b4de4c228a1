"""Matrices that are stored with their columns in another order: GPTQ's act-order puts those of a group side by side.

    x @ V[:, places].T  -->  x[..., order] @ V.T        order[places[j]] = j

A checkpoint's recipe puts the columns back, which takes groups apart. The same product needs no column moved where the
inputs come in the order that is stored.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .quantized_weights import NotStored
from .weights import Call, Cast, Concat, Constant, Slice, Weight

INDEX_SELECT = "aten.index_select.default"


def columns_back(values: Weight, order: torch.Tensor) -> Call:
    """`values` [N, K], which has column order[i] of a matrix as its column i, as that matrix."""
    places = Constant.of(torch.argsort(order))
    return Call(INDEX_SELECT, (values, 1, places), values.shape, values.dtype)


def as_stored(weight: Weight) -> tuple[Weight, Constant | None]:
    """The recipe with its columns in the order that they are stored in, and that order if it is another.

    Raises NotStored where some rows have one order and others another.
    """
    found: set[Constant | None] = set()
    stored = without_order(weight, found)
    if len(found) > 1:
        raise NotStored("its rows have their columns in several orders")
    (places,) = found
    return stored, None if places is None else Constant.of(torch.argsort(places.tensor))


def without_order(weight: Weight, found: set[Constant | None]) -> Weight:
    """The recipe without what moves columns; the places that it moves them to, or None, are added to `found`."""
    match weight:
        case Cast():
            return replace(weight, source=without_order(weight.source, found))
        case Slice() if weight.dim == 0:
            return replace(weight, source=without_order(weight.source, found))
        case Concat() if weight.dim == 0:
            return replace(weight, sources=tuple(without_order(source, found) for source in weight.sources))
        case Call() if weight.op == INDEX_SELECT and weight.args[1] == 1 and isinstance(weight.args[2], Constant):
            found.add(weight.args[2])
            return weight.args[0]
    found.add(None)
    return weight
