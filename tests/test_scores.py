"""Ways to write attention scores (passes/scores.py, passes/heads.py): each becomes one op, near-misses stay."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.graph import sizes
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .test_fuse_attention import LOWEST, H, aten, attention, causal, check, meaning, padded, repeated


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ repeated(k).mT * 0.3


def hiding(condition: Tensor, lowest: float = LOWEST) -> Tensor:
    return torch.where(condition, 0.0, lowest)


def merged(x: Tensor) -> Tensor:
    """[B, H, S, D] --> [B * H, S, D]."""
    return x.reshape(-1, x.shape[2], x.shape[3])


def apart(x: Tensor) -> Tensor:
    """[B * H, S, D] --> [B, H, S, D]."""
    return x.reshape(-1, H, x.shape[1], x.shape[2])


def with_sinks(x: Tensor, sinks: Tensor, first: bool = False, shift: bool = True) -> Tensor:
    """The weights of the keys, beside one more key per head."""
    column = sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[2], -1)
    joined = torch.cat((column, x) if first else (x, column), dim=-1)
    if shift:
        joined = joined - joined.max(dim=-1, keepdim=True).values
    weights = joined.softmax(-1, dtype=torch.float32)
    return weights[..., 1:] if first else weights[..., :-1]


def baddbmm(q: Tensor, k: Tensor, added: Tensor, **options: float) -> Tensor:
    return apart(torch.baddbmm(added, merged(q), merged(repeated(k)).mT, **options))


def attended(weights: Tensor, v: Tensor) -> Tensor:
    """The weighted sum over values of which batch and heads are one dimension."""
    return apart(merged(weights) @ merged(repeated(v)))


FORMS = {
    "softcap": (
        lambda tri, q, k, v, am: (
            (torch.tanh(scores(q, k) / 2.0) * 2.0 + hiding(causal(k) & padded(am))).softmax(-1) @ repeated(v)
        ),
        {"scale": 0.3, "softcap": 2.0, "key_mask": "attention_mask"},
    ),
    "tanh of another slope": (
        lambda tri, q, k, v, am: (
            (3 * (q @ repeated(k).mT).tanh()).masked_fill(~causal(k), -1e9).softmax(-1) @ repeated(v)
        ),
        {"scale": 3.0, "softcap": 3.0},
    ),
    "sinks": (
        lambda tri, q, k, v, am: with_sinks(scores(q, k) + hiding(causal(k) & padded(am)), q[0, :, 0, 0]) @ repeated(v),
        {"scale": 0.3, "sinks": "select_2", "key_mask": "attention_mask"},
    ),
    "sinks in the first column": (
        lambda tri, q, k, v, am: (
            with_sinks(scores(q, k) + hiding(causal(k)), q[0, :, 0, 0], first=True, shift=False) @ repeated(v)
        ),
        {"scale": 0.3, "sinks": "select_2"},
    ),
    "a triangle of numbers": (
        lambda tri, q, k, v, am: (
            (scores(q, k) * (m := tri[: q.shape[2], : q.shape[2]].float()) + (1 - m) * -1e4).softmax(-1) @ repeated(v)
        ),
        {"scale": 0.3},
    ),
    "replaced by a tensor of one element": (
        lambda tri, q, k, v, am: (
            torch.where(tri[: q.shape[2], : q.shape[2]], scores(q, k), torch.full([], -1e4)).softmax(-1) @ repeated(v)
        ),
        {"scale": 0.3},
    ),
    "the lowest where a key is not visible": (
        lambda tri, q, k, v, am: torch.where(~causal(k), LOWEST, scores(q, k)).softmax(-1) @ repeated(v),
        {"scale": 0.3},
    ),
    "heads in the batch": (
        lambda tri, q, k, v, am: attended(
            (baddbmm(q, k, hiding(causal(k))[0], alpha=0.3) + hiding(padded(am))).softmax(-1), v
        ),
        {"scale": 0.3, "key_mask": "attention_mask"},
    ),
    "heads in the batch, to the end": (
        lambda tri, q, k, v, am: apart(
            ((merged(q) @ merged(repeated(k)).mT) * 0.3 + hiding(causal(k))[0]).softmax(-1) @ merged(repeated(v))
        ),
        {"scale": 0.3},
    ),
    "heads in the batch of SDPA": (
        lambda tri, q, k, v, am: apart(
            sdpa(merged(q), merged(repeated(k)), merged(repeated(v)), is_causal=True, scale=0.3)
        ),
        {"scale": 0.3},
    ),
    "no lower than the lowest": (
        lambda tri, q, k, v, am: (
            torch.max(scores(q, k) + hiding(causal(k)), torch.full([], LOWEST)).softmax(-1) @ repeated(v)
        ),
        {"scale": 0.3},
    ),
    "einsum": (
        lambda tri, q, k, v, am: torch.einsum(
            "bhqk,bhkd->bhqd",
            (torch.einsum("bhqd,bhkd->bhqk", q, repeated(k)) * 0.3).masked_fill(~causal(k), LOWEST).softmax(-1),
            repeated(v),
        ),
        {"scale": 0.3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_scores_become_arguments(name):
    function, expected = FORMS[name]
    gone = (aten.softmax.int, aten.bmm.default, aten.matmul.default, aten.baddbmm.default, aten.cat.default)
    named = check(function, gone=gone, present={attention: 1})
    assert meaning(named) == (True, expected.get("key_mask"), False)
    assert named["scale"] == pytest.approx(expected["scale"])
    for argument in ("softcap", "sinks"):
        found = named[argument]
        assert (found.name if hasattr(found, "name") else found) == expected.get(argument)


def test_a_head_of_its_own_for_each_row_of_the_batch():
    """Rank 3 and nothing that tells heads from the batch: one head."""
    named = check(lambda tri, q, k, v, am: sdpa(q[:, 0], k[:, 0], v[:, 0], is_causal=True))
    assert [sizes(named[name])[1] for name in "qkv"] == [1, 1, 1]


def test_scores_in_fp32_of_halves():
    def function(tri, q, k, v, am):
        q, k, v = (x.bfloat16() for x in (q, k, v))
        weights = (q.float() @ repeated(k).float().mT).masked_fill(~causal(k), LOWEST).softmax(-1)
        return weights.to(v.dtype) @ repeated(v)

    named = check(function, present={attention: 1}, atol=0.02)
    assert {named[name].meta["val"].dtype for name in "qkv"} == {torch.bfloat16}


ALONE = {
    "a column of data": (
        lambda tri, q, k, v, am: (
            torch.cat((scores(q, k), q.mean(-1, keepdim=True)), dim=-1).softmax(-1)[..., :-1] @ repeated(v)
        ),
        "not one number per head",
    ),
    "another column cut off": (
        lambda tri, q, k, v, am: (
            torch.cat((scores(q, k), q.mean((0, 2, 3)).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)), -1)
            .softmax(-1)[..., 1:] @ repeated(v)
        ),
        "the column of sinks is used",
    ),
    "a part of the keys": (
        lambda tri, q, k, v, am: scores(q, k).softmax(-1)[..., 1:] @ repeated(v)[:, :, 1:],
        "a part of the softmax's columns",
    ),
    "two columns": (
        lambda tri, q, k, v, am: torch.cat((scores(q, k), q[..., :2]), -1).softmax(-1)[..., :-2] @ repeated(v),
        "not with one of sinks",
    ),
    "scaled after tanh and mask": (
        lambda tri, q, k, v, am: (torch.tanh(scores(q, k) + hiding(causal(k))) * 2).softmax(-1) @ repeated(v),
        "capped or masked before",
    ),
    "less than the maximum of another": (
        lambda tri, q, k, v, am: (scores(q, k) - scores(q, k).amax(-2, keepdim=True)).softmax(-1) @ repeated(v),
        "not their maximum",
    ),
    "replaced by what weighs something": (
        lambda tri, q, k, v, am: scores(q, k).masked_fill(~causal(k), -100.0).softmax(-1) @ repeated(v),
        "does not hide them",
    ),
    "no lower than a score": (
        lambda tri, q, k, v, am: scores(q, k).clamp_min(0.0).softmax(-1) @ repeated(v),
        "raises scores to 0.0",
    ),
    "a triangle that is not of ones": (
        lambda tri, q, k, v, am: (
            (scores(q, k) * (m := tri[: q.shape[2], : q.shape[2]] * 0.5) + (1 - m) * -1e4).softmax(-1) @ repeated(v)
        ),
        "scales the scores by what is no number",
    ),
    "a sum that is scaled": (
        lambda tri, q, k, v, am: attended(baddbmm(q, k, hiding(causal(k))[0], beta=0.5).softmax(-1), v),
        "scales what it adds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_near_misses_are_left_alone(name):
    function, reason = ALONE[name]
    check(function, matches=0, misses=(reason,))
