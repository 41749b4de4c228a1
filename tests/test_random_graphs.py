"""1,001 random programs through torch.compile(backend="effc") beside eager in the same precision and in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from effc.backend import COMPILED

from .random_graphs import SIZES, Program, function, in_fp64, program, reproduction, source
from .tolerance import assert_close_to_reference

COUNT, TOGETHER, QUICK = 1001, 13, 5
"""Programs, programs that are compiled together, and how many such batches `make test` runs."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def check(programs: Sequence[Program], sizes: Sequence[int] = range(len(SIZES))) -> None:
    """Results and inputs afterwards are those of eager, at each of the runtime sizes."""
    text = source(programs)
    eager, exact = function(text), function(in_fp64(text))
    compiled = torch.compile(function(text), backend="effc", dynamic=None)
    for at in sizes:
        given = {name: made.tensor(at) for one in programs for name, made in one.inputs.items()}
        runs = []
        with torch.no_grad():
            for run in (compiled, eager, exact):
                inputs = {name: x.double() if run is exact else copied(x) for name, x in given.items()}
                runs.append([*run(**inputs), *inputs.values()])
        labels = [f"{name} of {one.seed}" for one in programs for name in one.results] + list(given)
        for label, ours, theirs, truth in zip(labels, *runs, strict=True):
            assert_close_to_reference(ours, theirs, truth, f"{label} at {SIZES[at]}", luck(theirs))


def luck(eager: torch.Tensor) -> float:
    """What eager is granted to have been spared where an element or two cannot tell: ulps of the values of programs,
    which lie about 1 (a sum of values that cancel may be 0)."""
    if not eager.is_floating_point() or not eager.numel():
        return 0.0
    ulps = 8 if eager.dtype == torch.float32 else 2
    return ulps * torch.finfo(eager.dtype).eps * max(1.0, eager.abs().max().item())


def copied(x: torch.Tensor) -> torch.Tensor:
    """A copy that Dynamo knows as much about."""
    copy = x.clone()
    copy.__dict__.update(x.__dict__)
    return copy


def check_batch(programs: Sequence[Program]) -> None:
    try:
        check(programs)
    except Exception as together:
        for one in programs:
            torch._dynamo.reset()
            try:
                check([one])
            except Exception as alone:
                raise AssertionError(f"a file that shows it:\n{reproduction(one, first_line(alone))}") from alone
        seeds = f"{programs[0].seed} to {programs[-1].seed}"
        raise AssertionError(
            f"each of the seeds {seeds} is right alone; together: {first_line(together)}"
        ) from together


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:2])[:300]}"


@pytest.mark.parametrize(
    "first",
    [
        first if number < QUICK else pytest.param(first, marks=pytest.mark.slow)
        for number, first in enumerate(range(0, COUNT, TOGETHER))
    ],
)
def test_random_programs(first: int) -> None:
    before = len(COMPILED)
    check_batch([program(seed) for seed in range(first, min(first + TOGETHER, COUNT))])
    assert len(COMPILED) > before


def test_programs_have_what_they_are_said_to_have() -> None:
    """A seed gives the same program again, and the kinds of lines are all there."""
    assert program(5) == program(5)
    programs = [program(seed) for seed in range(60)]
    text = source(programs)
    for needed in ("softmax(", "@ ", ".transpose(", ".flip(", ".var(", "_(", "torch.cat(", ".cumsum("):
        assert needed in text, needed
    assert any(len(set(one.results)) < len(one.results) or set(one.results) & set(one.inputs) for one in programs)
    assert any("B" in given.sizes for one in programs for given in one.inputs.values())
    assert any(unread(one) for one in programs)


def unread(one: Program) -> set[str]:
    """Names that neither a later line nor the caller reads."""
    made = [line.split(" = ")[0] for line in one.lines if " = " in line and "[" not in line.split(" = ")[0]]
    text = " ".join([*(line.split(" = ", 1)[-1] for line in one.lines), *one.results])
    return {name for name in made if text.split().count(name) == 0 and name not in text}


def test_a_failure_shows_a_file_that_runs() -> None:
    text = reproduction(program(3), "an example")
    compile(text, "reproduction.py", "exec")
    assert "torch.compile(programs" in text
