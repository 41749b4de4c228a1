"""Random programs from seeds: chains, diamonds, views, reductions, matmuls, dead values, aliases, writes in place.

A program is text, made line by line by trying lines on real tensors; what fails, or leaves the range in which errors
say something, is not taken. Several programs are one function, so that Dynamo and the C++ compiler run once for all.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

SIZES = ({"B": 3, "S": 5}, {"B": 2, "S": 11})
"""Runtime sizes: what programs are compiled with, and what they run with then."""

STATIC = (1, 2, 4, 7, 8, 16)
DTYPES = (torch.float32, torch.float32, torch.bfloat16)
LARGEST = 4096
"""Elements of a value."""


def forms(text: str) -> list[str]:
    """Lines with places for names (a, b, t), axes (i, j, k) and a flag (q); `;` or a new line stands between two."""
    return [form.strip() for form in re.split(r"[;\n]", text) if form.strip()]


POINTWISE = forms(
    """
    -{a}; {a}.sin(); {a}.cos(); {a}.tanh(); {a}.sigmoid(); {a}.relu(); {a}.abs(); {a} * 0.5; 1.5 - {a}; {a} + 1
    torch.nn.functional.silu({a}); torch.nn.functional.gelu({a}); {a}.clamp(-1, 2).exp(); ({a}.abs() + 0.5).rsqrt()
    torch.nn.functional.softplus({a}); {a}.clone(); ({a}.abs() + 1).log(); {a}.pow(2); torch.zeros_like({a}) + {a}
    {a}.masked_fill(torch.arange({a}.shape[-1]) < 2, 0.25); torch.nn.functional.leaky_relu({a}, 0.1)
    {a}.square().sqrt(); {a}.to(torch.float32).sin().to({a}.dtype); torch.nn.functional.elu({a}); {a}.contiguous()
    """
)

BINARY = forms(
    """
    {a} + {b}; {a} - {b}; {a} * {b}; torch.maximum({a}, {b}); torch.minimum({a}, {b}); {a} / ({b}.abs() + 1)
    torch.add({a}, {b}, alpha=2); torch.lerp({a}, {b}, 0.25); {a}.tanh() * {b}.sigmoid() + {a}
    torch.addcmul({a}, {b}, {b}); torch.where(torch.arange({a}.shape[-1]) % 2 == 0, {a}, {b})
    torch.atan2({a}, {b}.abs() + 1); torch.hypot({a}, {b}); torch.where(({a} + {b}).isnan(), 0.0, {b})
    """
)

VIEWS = forms(
    """
    {a}.transpose({i}, {j}); {a}.unsqueeze({i}); {a}.squeeze({i}); {a}[..., ::2]; {a}[1:]; {a}[..., 1:-1]; {a}[-1]
    {a}.flip({i}); {a}.reshape(-1); {a}.flatten({i}); {a}.chunk(2, {i})[-1]; {a}.select({i}, -1); {a}.movedim({i}, {j})
    {a}.unsqueeze({i}).expand(*{a}.shape[:{i}], 2, *{a}.shape[{i}:]); torch.nn.functional.pad({a}, (1, 2))
    torch.cat(({a}, -{a}), {i}); torch.stack(({a}, {a} + 1), {i}); {a}.reshape(*{a}.shape[:-1], 2, -1); {a}.mT
    {a}.repeat_interleave(2, {i}); {a}.tril(); {a}.unflatten(-1, (-1, 2)); {a}.narrow({i}, 0, 1); {a}.view({a}.shape)
    {a}.split(3, {i})[0]; {a}.broadcast_to(2, *{a}.shape); {a}.permute(*range(1, {a}.ndim), 0); {a}.roll(1, {i})
    """
)

REDUCTIONS = forms(
    """
    {a}.sum({k}, keepdim={q}); {a}.mean({k}, keepdim={q}); {a}.amax({k}, keepdim={q}); {a}.amin({k}, keepdim={q})
    {a}.softmax({k}); {a}.log_softmax({k}); {a} - {a}.mean({k}, keepdim=True); {a}.var({k}, keepdim={q})
    {a}.logsumexp({k}); torch.nn.functional.layer_norm({a}, {a}.shape[-1:]); {a}.std({k}, keepdim={q}); {a}.sum()
    {a} * ({a}.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(); {a}.cumsum({k}); {a}.abs().amax()
    ({a} * 0 > 1).any({k}, keepdim={q}) + {a}; torch.arange({a}.shape[-1]).amax() + {a}
    (torch.arange({a}.shape[-1]) > 1).sum() * {a}; {a}.argmax({k}, keepdim=True) * 0 + {a}
    """
)

MATMULS = forms(
    """
    {a} @ {a}.mT; {a}.mT @ {a}; torch.nn.functional.linear({a}, {b}); torch.einsum("...i,...j->...ij", {a}, {a})
    """
)

IN_PLACE = forms(
    """
    {t}.add_({b}); {t}.mul_(0.5); {t}[..., 0] = 0.25; {t}[1:].sub_(1); {t}.transpose(0, -1).tanh_(); {t}.fill_(0.5)
    {t}.copy_({b}); {t}.relu_(); {t}.masked_fill_(torch.arange({t}.shape[-1]) < 1, 2.0)
    """
)

KINDS = ((POINTWISE, 5), (BINARY, 5), (VIEWS, 5), (REDUCTIONS, 3), (MATMULS, 1))


@dataclass(frozen=True)
class Input:
    """Sizes are numbers, or names of runtime sizes."""

    sizes: tuple[int | str, ...]
    dtype: torch.dtype
    seed: int

    def tensor(self, at: int) -> Tensor:
        """The input at the runtime sizes `SIZES[at]`, its runtime axes marked for Dynamo."""
        shape = [SIZES[at].get(size, size) for size in self.sizes]
        made = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        for axis, size in enumerate(self.sizes):
            if isinstance(size, str):
                torch._dynamo.maybe_mark_dynamic(made, axis)
        return made


@dataclass(frozen=True)
class Program:
    """lines over the names of inputs and of earlier lines; results: names, some of them twice, some inputs."""

    seed: int
    inputs: dict[str, Input]
    lines: tuple[str, ...]
    results: tuple[str, ...]


def program(seed: int) -> Program:
    """The program of a seed."""
    choose = Random(seed)
    dtype = choose.choice(DTYPES)
    dims = (*STATIC, *STATIC, "B", "S", "S") if choose.random() < 0.5 else STATIC
    shape = tuple(choose.choice(dims) for _ in range(choose.randint(1, 4)))
    inputs = {f"x{seed}": Input(shape, dtype, seed), f"y{seed}": Input(shape[-1:], dtype, seed + 10_000)}
    if len(shape) > 1:
        inputs[f"w{seed}"] = Input((8, shape[-1]), dtype, seed + 20_000)
    scopes = [{name: given.tensor(at) for name, given in inputs.items()} for at in range(len(SIZES))]
    lines: list[str] = []
    for _ in range(choose.randint(4, 14)):
        if choose.random() < 0.1:
            write_in_place(choose, lines, scopes, seed)
            continue
        line = f"v{seed}_{len(lines)} = {expression(choose, list(scopes[0]), scopes[0])}"
        take(line, lines, scopes)
    made = [name for name in scopes[0] if name.startswith(f"v{seed}_")] or list(inputs)
    results = [name for name in made[:-1] if choose.random() < 0.4] + made[-1:]
    if choose.random() < 0.2:
        results.append(choose.choice([*inputs, *results]))  # an alias
    return Program(seed, inputs, tuple(lines), tuple(results))


def expression(choose: Random, names: list[str], scope: dict[str, Tensor]) -> str:
    kinds, weights = zip(*KINDS, strict=True)
    (forms,) = choose.choices(kinds, weights)
    a = choose.choice(names[-4:] if choose.random() < 0.7 else names)
    rank = max(scope[a].ndim, 1)
    axis = choose.choice([-1, -1, choose.randrange(rank)])
    return choose.choice(forms).format(
        a=a, b=choose.choice(names), i=choose.randrange(rank), j=choose.randrange(rank), k=axis, q=choose.random() < 0.5
    )


def write_in_place(choose: Random, lines: list[str], scopes: list[dict[str, Tensor]], seed: int) -> None:
    """A copy of a value is changed, through a view of it or not; values that look at it change with it."""
    name, source = f"v{seed}_{len(lines)}", choose.choice(list(scopes[0]))
    if take(f"{name} = {source}.clone()", lines, scopes):
        take(choose.choice(IN_PLACE).format(t=name, b=choose.choice(list(scopes[0]))), lines, scopes)


def take(line: str, lines: list[str], scopes: list[dict[str, Tensor]]) -> bool:
    """Add a line if it gives a tensor that can be compared, at all sizes."""
    trials = [{name: value.clone() for name, value in scope.items()} for scope in scopes]
    try:
        with warnings.catch_warnings(action="error"):  # what is not meant to be: no degrees of freedom, mT of a number
            for trial in trials:
                exec(line, {"torch": torch}, trial)
    except (RuntimeError, IndexError, ValueError, TypeError, UserWarning):
        return False
    values = [value for trial in trials for value in trial.values()]
    if not all(isinstance(v, Tensor) and 0 < v.numel() <= LARGEST and usable(v) for v in values):
        return False
    for scope in scopes:
        exec(line, {"torch": torch}, scope)
    lines.append(line)
    return True


def usable(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all() and value.abs().max() < 1e3)


# --- several at once -----------------------------------------------------------------------------------------------


def source(programs: Sequence[Program]) -> str:
    """The programs as one function of all their inputs that returns all their results."""
    names = [name for one in programs for name in one.inputs]
    lines = [f"def programs({', '.join(names)}):"]
    for one in programs:
        lines += [f"    {line}" for line in one.lines]
    lines.append(f"    return [{', '.join(name for one in programs for name in one.results)}]")
    return "\n".join(lines) + "\n"


def function(text: str) -> Callable[..., list[Tensor]]:
    scope: dict[str, Any] = {"torch": torch}
    exec(text, scope)
    return scope["programs"]


def in_fp64(text: str) -> str:
    """The same function for fp64 inputs, without roundings on the way."""
    return text.replace("torch.float32", "torch.float64").replace("torch.bfloat16", "torch.float64")


def reproduction(one: Program, reason: str) -> str:
    """A file that shows what is wrong with a program."""
    tensors = "\n".join(
        f"    {name}=torch.randn({[SIZES[0].get(s, s) for s in given.sizes]}, "
        f"generator=torch.Generator().manual_seed({given.seed})).to({given.dtype}),"
        for name, given in one.inputs.items()
    )
    return f"""# seed {one.seed}: {reason}
import effc
import torch

{source([one])}
inputs = dict(
{tensors}
)
with torch.no_grad():
    found = torch.compile(programs, backend="effc")(**{{name: x.clone() for name, x in inputs.items()}})
    expected = programs(**{{name: x.clone() for name, x in inputs.items()}})
for ours, eager in zip(found, expected, strict=True):
    print(tuple(eager.shape), (ours.double() - eager.double()).abs().max().item())
print(effc.explain())
"""
