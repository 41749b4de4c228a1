"""Executables: native code and Triton's interpreter run one schedule and agree; sizes change from call to call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effc.codegen.executable import size_function
from effc.codegen.launcher import manifest_of
from effc.compiler.errors import InputError
from torch import Tensor
from torch.nn import functional as F

from .graphs import Compiled, random

effc = torch.ops.effc

pytestmark = pytest.mark.usefixtures("one_thread")

INTERPRET = """
import importlib.util, sys, types
import torch
from effc.codegen.launcher import TritonExecutable, fallback_calls, manifest_of
from effc.codegen.schedule import schedule
from effc.codegen.target import CPU

tests = types.ModuleType("tests")
tests.__path__ = [{tests!r}]
sys.modules["tests"] = tests
from tests.graphs import graph_of
from tests.test_executable import DYNAMIC, layer

examples, calls = torch.load({inputs!r})
scheduled = schedule(graph_of(layer, examples, DYNAMIC), CPU)
names = scheduled.scope.names
manifest = manifest_of(scheduled.schedule, names)
executable = TritonExecutable(scheduled.schedule, names, manifest, fallback_calls(scheduled))
torch.save([executable(call, {{}}) for call in calls], {outputs!r})
"""

DYNAMIC = {"x": (0,), "q": (2,), "cos": (1,), "sin": (1,)}


def layer(x: Tensor, w: Tensor, q: Tensor, cos: Tensor, sin: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """A bit of everything: norms, products, rope, attention, joins, gathers, an op without a kernel."""
    normed = effc.rms_norm(x, None, 1e-5)
    turned = effc.rope(q, cos, sin)
    return (
        effc.linear(normed, w, None, x, "silu"),
        effc.gated_linear(normed, w, None, "gelu"),
        effc.attention(turned, turned * 2, q + 1, 0.3, True),
        torch.cat((-x[:, 3:], x.amax(-1, keepdim=True)), -1).cumprod(-1) + 1,
        F.layer_norm(x, (24,)).softmax(-1).tanh(),
        F.embedding(ids, w) + 1,
    )


def operands(rows: int, length: int) -> dict[str, Tensor]:
    angles = random(1, length, 4, seed=3).repeat(1, 1, 2)
    return {
        "x": random(24, rows).t(),  # not contiguous
        "w": random(24, 24, seed=1) / 5,
        "q": random(2, 3, length, 8, seed=2),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "ids": torch.tensor([[3, 0], [23, 7]]),
    }


def test_triton_interpreted_agrees_with_native_code(tmp_path: Path) -> None:
    examples, calls = operands(5, 7), [operands(1, 1), operands(3, 70), operands(17, 2)]
    inputs, outputs = str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")
    torch.save((examples, calls), inputs)
    script = INTERPRET.format(tests=str(Path(__file__).parent), inputs=inputs, outputs=outputs)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    compiled = Compiled(layer, examples, DYNAMIC)
    for call, interpreted in zip(calls, torch.load(outputs), strict=True):
        for ours, oracle in zip(compiled.check(**call), interpreted, strict=True):
            torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-5)


def test_the_arena_grows_and_serves_smaller_calls() -> None:
    compiled = Compiled(lambda x: (torch.softmax(x, -1).t() + 1).t().cumprod(0) * 2, {"x": random(5, 33)}, {"x": (0,)})
    for rows in (3, 400, 1, 0, 1000, 2):
        compiled.check(x=random(rows, 33))


def test_strides_that_kernels_cannot_count_are_refused_in_one_line() -> None:
    byte = torch.int8  # so that the result, never touched, takes little even of the address space
    compiled = Compiled(lambda x: x.transpose(0, 1) + 1, {"x": random(3, 5, 2, dtype=byte)}, {"x": (0, 1)})
    compiled.check(x=random(4, 6, 2, dtype=byte))
    with pytest.raises(InputError, match=r"^B = 1, S = 2147483648 take strides over 2\*\*31 elements"):
        compiled(x=torch.empty(1, 1, 2, dtype=byte).expand(1, 1 << 31, 2))


def test_a_manifest_is_plain_data() -> None:
    compiled = Compiled(lambda x, y: x * 2 + y, {"x": random(2, 3, 4), "y": random(4)}, {"x": (0, 1)})
    manifest = manifest_of(compiled.scheduled.schedule, compiled.scheduled.scope.names)
    assert manifest.sizes == (("B", "x", 0), ("S", "x", 1))
    assert [(b.name, b.kind, b.elements) for b in manifest.buffers] == [
        ("x", "input", "4*B*S"),
        ("y", "input", "4"),
        ("add", "output", "4*B*S"),
    ]
    assert [(o.buffer, o.sizes, o.strides, o.offset) for o in manifest.outputs] == [
        ("add", ("B", "S", "4"), ("4*S", "4", "1"), "0")
    ]


def test_size_code_sees_sizes_and_nothing_else() -> None:
    assert size_function(("B", "S"), "max(B*S, 4) // 3")(5, 2) == 3
    with pytest.raises(NameError):
        size_function(("B",), "open(B)")(1)
