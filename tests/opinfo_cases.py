"""Calls from torch's own OpInfo database, compiled by torch.compile(backend="effc") many at once, beside eager.

A batch is one function of straight-line calls, so that Dynamo, the scheduler and the C++ compiler run once for all of
it; a batch that fails is cut in halves until the call that is to blame stands alone.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from effc.backend import COMPILED
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from .tolerance import assert_close_to_reference

FAMILIES = {
    "elementwise": """
        abs acos acosh asin asinh atan atanh bitwise_not ceil positive cos cosh deg2rad exp frac floor log1p log
        log10 log2 logical_not nn.functional.relu nn.functional.elu nn.functional.prelu nn.functional.celu
        nn.functional.selu nn.functional.silu nn.functional.hardsigmoid nn.functional.logsigmoid
        nn.functional.mish nn.functional.softsign nn.functional.tanhshrink nn.functional.threshold
        nn.functional.softshrink nn.functional.hardshrink nn.functional.hardtanh nn.functional.relu6
        nn.functional.hardswish nn.functional.leaky_relu nn.functional.gelu nn.functional.glu neg rad2deg round
        sign sgn signbit sin sinc sinh tan tanh trunc exp2 expm1 nan_to_num reciprocal rsqrt sqrt square
        isfinite isinf isposinf isneginf isnan bfloat16 bool byte char double float half int long short fill
        sigmoid erf erfc logit nn.functional.softplus add clamp_max clamp_min mul sub atan2 bitwise_left_shift
        bitwise_right_shift copysign div true_divide eq fmax fmin fmod remainder floor_divide ge gt le ldexp
        logaddexp lt max min maximum minimum logical_and logical_or logical_xor bitwise_and bitwise_or
        bitwise_xor heaviside isclose ne pow float_power rsub hypot xlogy __radd__ __rdiv__ __rmul__ __rand__
        __ror__ __rxor__ __rmod__ __rpow__ __rsub__ addcmul addcdiv clamp lerp where masked_fill to clone
        contiguous cumsum cumprod
    """,
    "reductions": """
        all any amax amin argmax argmin count_nonzero mean nanmean std var prod sum nansum softmax log_softmax
        logsumexp var_mean std_mean aminmax median norm nn.functional.softmin topk sort argsort trace dist
        cummax cummin diff nn.functional.cosine_similarity nn.functional.normalize
    """,
    "views": """
        broadcast_to broadcast_tensors chunk expand expand_as diagonal flip fliplr flipud movedim narrow permute
        reshape reshape_as ravel roll rot90 split split_with_sizes squeeze select slice t T mT transpose unbind
        unflatten flatten unfold unsqueeze view view_as atleast_1d atleast_2d atleast_3d tensor_split hsplit
        vsplit dsplit swapaxes repeat tile repeat_interleave cat stack hstack vstack dstack column_stack
        as_strided tril triu constant_pad_nd nn.functional.pad nn.functional.pixel_shuffle
        nn.functional.channel_shuffle meshgrid zeros_like ones_like full_like new_zeros new_ones new_full
    """,
    "matmul": """
        addmm addmv addbmm baddbmm bmm mm mv dot addr matmul __rmatmul__ nn.functional.linear
        nn.functional.bilinear inner outer kron tensordot einsum torch.ops.aten._safe_softmax.default
        nn.functional.scaled_dot_product_attention nn.functional.conv1d
    """,
    "normalization": """
        nn.functional.layer_norm native_layer_norm nn.functional.rms_norm nn.functional.group_norm
        nn.functional.batch_norm nn.functional.instance_norm nn.functional.local_response_norm renorm
    """,
    "indexing": """
        __getitem__ gather index_select take take_along_dim index_put index_add index_copy index_fill scatter
        scatter_add masked_select masked_scatter nonzero select_scatter slice_scatter diagonal_scatter put
        nn.functional.embedding nn.functional.one_hot bucketize searchsorted isin argwhere
    """,
}
"""Names of the database, by the kinds that inference is made of. Variants of a name are all taken."""

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SEED = 4
LARGEST = 20_000
"""Elements of the operands of a call; larger samples are left out."""


@dataclass(frozen=True)
class Case:
    """One call of the database. op takes `leaves` unflattened by `spec`; tensors are the leaves at `places`."""

    name: str
    op: Any
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    places: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.leaves[place].clone() for place in self.places]

    def call(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that the op returns for these operands, in eager PyTorch."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        arguments, named = pytree.tree_unflatten(leaves, self.spec)
        with torch.no_grad():
            return flat(self.op(*arguments, **named))


@dataclass
class Outcome:
    """failures: case -> what went wrong. fallbacks: op that ran through ATen -> calls. refused: why eager ran."""

    cases: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    fallbacks: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


def flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def cases_of(op: Any, dtype: torch.dtype, limit: int) -> Iterator[Case]:
    """A sample of the database's calls of an op that eager PyTorch can run on dense, real tensors."""
    torch.manual_seed(SEED)
    samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 100))
    chosen = sorted(random.Random(SEED).sample(range(len(samples)), min(limit, len(samples))))
    for number in chosen:
        sample = samples[number]
        leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        case = Case(f"{op.formatted_name}[{number}] {str(dtype)[6:]}", op.op, tuple(leaves), spec, places)
        tensors = [leaves[place] for place in places]
        dense = all(t.layout == torch.strided and not t.is_complex() for t in tensors)
        if is_repeat_by_zero(op.name, leaves):
            continue
        if places and dense and sum(t.numel() for t in tensors) <= LARGEST and runs(case):
            yield case


def is_repeat_by_zero(name: str, leaves: Sequence[Any]) -> bool:
    """PyTorch's shape rule for it is wrong (2.13): [2, 2] repeated (0, 3, 3) times is [0, 6, 6], and not [0, 2, 2]."""
    return name in ("tile", "repeat") and any(leaf == 0 for leaf in leaves if isinstance(leaf, int))


def runs(case: Case) -> bool:
    try:
        return all(x.layout == torch.strided and not x.is_complex() for x in case.call(case.tensors))
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
        return False


def sample(family: str, dtype: torch.dtype, limit: int, every: int = 1) -> list[Case]:
    """Up to `limit` calls of every op of a family that takes the dtype, or of every second, third, ... op."""
    names = set(FAMILIES[family].split())
    ops = [op for op in op_db if op.name in names and dtype in op.supported_dtypes("cpu")]
    return [case for op in ops[::every] for case in cases_of(op, dtype, limit)]


# --- running a batch ---------------------------------------------------------------------------------------------


def straight_line(cases: Sequence[Case]) -> Any:
    """A function of all operands that makes one call a line."""
    globals_: dict[str, Any] = {"flat": flat}
    lines = ["def calls(operands):"]
    for i, case in enumerate(cases):
        leaves: list[Any] = list(case.leaves)
        for position, place in enumerate(case.places):
            leaves[place] = Name(f"operands[{i}][{position}]")
        arguments, named = pytree.tree_unflatten([spelled(leaf, globals_) for leaf in leaves], case.spec)
        globals_[f"op{i}"] = case.op
        texts = [*map(literal, arguments), *(f"{name}={literal(value)}" for name, value in named.items())]
        lines.append(f"    result{i} = op{i}({', '.join(texts)})")
    lines.append(f"    return [{', '.join(f'result{i}' for i in range(len(cases)))}]")
    exec("\n".join(lines), globals_)
    return globals_["calls"]


class Name(str):
    """Code, where `repr` would quote it."""

    def __repr__(self) -> str:
        return str(self)


def spelled(leaf: Any, globals_: dict[str, Any]) -> Any:
    """Code for a leaf: numbers and text as they are, anything else by a name of its own."""
    if isinstance(leaf, Name) or leaf is None or isinstance(leaf, bool | int | str):
        return leaf if isinstance(leaf, Name) else Name(repr(leaf))
    name = f"constant{len(globals_)}"
    globals_[name] = leaf
    return Name(name)


def literal(tree: Any) -> str:
    """Code for a tree of names."""
    if isinstance(tree, tuple):
        return f"({''.join(literal(item) + ', ' for item in tree)})"
    if isinstance(tree, list):
        return f"[{', '.join(map(literal, tree))}]"
    if isinstance(tree, slice):
        return f"slice({tree.start}, {tree.stop}, {tree.step})"
    return "..." if tree is Ellipsis else repr(tree)


def check(cases: Sequence[Case], outcome: Outcome) -> None:
    """Compile the calls together, run them, compare each with eager."""
    torch._dynamo.reset()
    before = len(COMPILED)
    try:
        with torch.no_grad():
            results = torch.compile(straight_line(cases), backend="effc", dynamic=False)([c.tensors for c in cases])
    except Exception as error:
        if len(cases) == 1:
            reason = " | ".join(str(error).strip().splitlines()[:3])
            outcome.failures[cases[0].name] = f"{type(error).__name__}: {reason}"
            outcome.cases += 1
        else:
            half = len(cases) // 2
            check(cases[:half], outcome)
            check(cases[half:], outcome)
        return
    outcome.cases += len(cases)
    for graph in COMPILED[before:]:
        outcome.fallbacks.update(f"{missing.op}: {missing.reason}" for missing in graph.explanation.missing)
        outcome.refused.update(note for note in graph.explanation.notes if note.startswith("runs in eager"))
    for case, found in zip(cases, results, strict=True):
        try:
            compare(case, flat(found))
        except AssertionError as error:
            outcome.failures[case.name] = str(error)


def compare(case: Case, found: Sequence[Tensor]) -> None:
    """Results as close to those in fp64 as eager's, where the op can be computed in fp64."""
    expected = case.call(case.tensors)
    try:
        truth = case.call([t.double() if t.is_floating_point() else t for t in case.tensors])
    except (RuntimeError, ValueError):
        truth = expected
    assert len(found) == len(expected), f"{len(found)} results, eager has {len(expected)}"
    for position, (ours, theirs, exact) in enumerate(zip(found, expected, truth)):
        lucky = 0.0
        if theirs.is_floating_point() and theirs.numel():
            lucky = 2 * torch.finfo(theirs.dtype).eps * theirs.nan_to_num(0, 0, 0).abs().max().item()
        if exact.shape != theirs.shape or exact.dtype != torch.float64:
            exact = theirs
        assert_close_to_reference(ours, theirs, exact, f"result {position}", lucky)


def check_all(cases: Sequence[Case], batch: int = 32) -> Outcome:
    """Check the calls, some at a time."""
    outcome = Outcome()
    for part in batches(cases, batch):
        check(part, outcome)
    return outcome


def batches(cases: Sequence[Case], size: int) -> Iterator[Sequence[Case]]:
    for start in range(0, len(cases), size):
        yield cases[start : start + size]
