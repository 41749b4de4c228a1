"""Attention and the KV cache in the op vocabulary.

Which keys a query sees, and what is added to its scores, is told by arguments that a kernel can use: `causal` and
`window` bound the keys it has to read, `key_mask` hides padding, `visible` and `bias` are expressions over the indices
(`index_expressions`), and `mask` is what could not be inferred.

Shapes as in `ops`: B batch, S query length, T key length or cache capacity, H query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .graph import sizes
from .index_expressions import evaluate
from .vocabulary import Cost, define, nbytes, numel, streamed

SCORES = (
    "int? window=None, float? softcap=None, str? visible=None, str? bias=None, Tensor[]? tables=None, "
    "Tensor? sinks=None"
)
"""The fields of `ScoreArguments` in the schema of an op."""


@dataclass(frozen=True)
class ScoreArguments:
    """What both attention ops are told by keyword: which keys a query sees, and what its scores become.

    window: it sees keys from q - window + 1 on. visible: an expression over b, h, q, k that is true where it sees the
    key (`index_expressions`). softcap: scores become softcap * tanh(scores / softcap) (Gemma 2). bias: an expression
    that is then added. tables: what t0, t1, ... in the expressions name. sinks [H]: the score of one more key per head
    whose value is zero.
    """

    window: int | None = None
    softcap: float | None = None
    visible: str | None = None
    bias: str | None = None
    tables: Sequence[Tensor] | None = None
    sinks: Tensor | None = None

    def of_indices(
        self, batch: int, heads: int, q_position: Tensor, k_position: Tensor, causal: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(allowed, bias) that the indices decide, each broadcast to [B, H, S, T] or None.

        q_position [B or 1, 1, S, 1] and k_position [B or 1, 1, 1, T]: places in the sequence.
        """
        device = q_position.device
        indices = {
            "b": torch.arange(batch, device=device)[:, None, None, None],
            "h": torch.arange(heads, device=device)[None, :, None, None],
            "q": q_position,
            "k": k_position,
        }
        conditions = []
        if causal:
            conditions.append(k_position <= q_position)
        if self.window is not None:
            conditions.append(k_position > q_position - self.window)
        if self.visible is not None:
            conditions.append(evaluate(self.visible, indices, self.tables or ()))
        return all_of(*conditions), None if self.bias is None else evaluate(self.bias, indices, self.tables or ())


def all_of(*conditions: Tensor | None) -> Tensor | None:
    """The conjunction of the conditions that are given; None if none is."""
    result = None
    for condition in conditions:
        if condition is not None:
            result = condition if result is None else result & condition
    return result


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention in fp32 (fp64 for fp64); a row that may attend to nothing gives zeros.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, D'], allowed bool and bias float, broadcast to [B, H, S, T]. The
    arguments of the softmax are `softcap * tanh(q @ k.T * scale / softcap) + bias`; sinks [H] are one more key per
    head, with that score and a value of zero.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(ratio, dim=1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
        v = torch.where(allowed.expand(scores.shape).any(-2).unsqueeze(-1), v, 0.0)
    if sinks is not None:
        column = sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    elif allowed is not None:
        reachable = allowed.any(-1, keepdim=True)
        weights = torch.where(reachable, scores, 0.0).softmax(-1) * reachable
    else:
        weights = scores.softmax(-1)
    return (weights @ v).to(q.dtype)


def attention_shape(q: Tensor, k: Tensor, v: Tensor, *rest: object, **named: object) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def attention_cost(node: fx.Node) -> Cost:
    q, k, v = node.args[:3]
    return streamed(node, 2 * numel(q) * sizes(k)[2] + 2 * numel(node) * sizes(v)[2])


@define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? key_mask=None, Tensor? mask=None, *, "
    f"{SCORES}) -> Tensor",
    shape=attention_shape,
    cost=attention_cost,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    **scores: Any,
) -> Tensor:
    """Scaled dot product attention with grouped heads, over all keys given.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, D'] -> [B, H, S, D'].

    causal: query i sees keys up to i. key_mask [B, T]: keys whose entry is zero are hidden from every query (left
    padding). mask, broadcast to [B, H, S, T]: bool (true may attend) or float (added to the scores): what could not be
    inferred. scores: `ScoreArguments`. All of these hold together.
    """
    given = ScoreArguments(**scores)
    positions = torch.arange(max(q.shape[2], k.shape[2]), device=q.device)
    q_position, k_position = positions[None, None, : q.shape[2], None], positions[None, None, None, : k.shape[2]]
    allowed, added = given.of_indices(*q.shape[:2], q_position, k_position, causal)
    if key_mask is not None:
        allowed = all_of(allowed, (key_mask != 0)[:, None, None, :])
    if mask is not None and mask.dtype == torch.bool:
        allowed = all_of(allowed, mask)
    elif mask is not None:
        added = mask if added is None else added + mask
    return attend(q, k, v, scale, allowed=allowed, bias=added, softcap=given.softcap, sinks=given.sinks)


# --- KV cache --------------------------------------------------------------------------------------------------


@define(
    "kv_write(Tensor(a!) cache, Tensor new, Tensor past, int? ring=None) -> Tensor(a!)",
    shape=lambda cache, new, past, ring=None: cache,
    cost=lambda node: Cost(sympy.Integer(0), 2 * nbytes(node.args[1])),
    dialects=("stateful",),
)
def kv_write(cache: Tensor, new: Tensor, past: Tensor, ring: int | None = None) -> Tensor:
    """Write the keys or values of S new tokens behind those already cached; returns the cache.

    cache [B, G, T, D], new [B, G, S, D], past [B] int64: row b's tokens stand at positions past[b] .. past[b] + S - 1.
    A position is its slot; or, if `ring` is given, slots from `ring` on are used again and again, in turn.
    """
    slots = past[:, None] + torch.arange(new.shape[2], device=past.device)  # [B, S]
    if ring is not None:
        slots = torch.where(slots < ring, slots, ring + (slots - ring) % (cache.shape[2] - ring))
    rows = torch.arange(cache.shape[0], device=past.device)[:, None]
    cache[rows, :, slots] = new.transpose(1, 2).to(cache.dtype)
    return cache


def positions_of_slots(last: Tensor, capacity: int, ring: int | None) -> Tensor:
    """The position whose key each slot holds, once position `last` [B] is written: [B or 1, T].

    Slot s >= ring of a ring of R = T - ring slots holds the largest position p <= last with p = s (mod R). Where none
    has been written yet, that is below `ring`; -1 stands for it.
    """
    slots = torch.arange(capacity, device=last.device)[None]
    if ring is None:
        return slots
    newest = last[:, None] - (last[:, None] - slots) % (capacity - ring)
    return torch.where(slots < ring, slots, torch.where(newest < ring, -1, newest))


def cached_attention_cost(node: fx.Node) -> Cost:
    """At a full cache: what a run costs grows with the tokens cached, up to this."""
    return attention_cost(node)


@define(
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor past, float scale, *, int? ring=None, "
    f"{SCORES}) -> Tensor",
    shape=attention_shape,
    cost=cached_attention_cost,
    dialects=("stateful",),
)
def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, past: Tensor, scale: float, *, ring: int | None = None, **scores: Any
) -> Tensor:
    """Causal attention of S new queries over a cache that already holds their keys and values.

    q [B, H, S, D], k_cache [B, G, T, D], v_cache [B, G, T, D'], past [B] int64 -> [B, H, S, D']. Query i of row b
    stands at position past[b] + i and sees positions 0 .. past[b] + i. ring: which slots `kv_write` used in turn; a
    window or `visible` has to hide what their keys were written over, for each of the S queries: a ring of R slots
    takes a window of up to R - S + 1. scores: `ScoreArguments`.
    """
    given = ScoreArguments(**scores)
    q_position = (past[:, None] + torch.arange(q.shape[2], device=past.device))[:, None, :, None]
    k_position = positions_of_slots(past + q.shape[2] - 1, k_cache.shape[2], ring)[:, None, None, :]
    allowed, added = given.of_indices(*q.shape[:2], q_position, k_position, causal=True)
    if ring is not None:
        allowed = all_of(allowed, k_position >= 0)
    return attend(q, k_cache, v_cache, scale, allowed=allowed, bias=added, softcap=given.softcap, sinks=given.sinks)
