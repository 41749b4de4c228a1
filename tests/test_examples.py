"""The examples run, and say what their text promises."""

import re
import subprocess
import sys
from pathlib import Path

import effc
import pytest

EXAMPLES = Path(effc.__file__).parent / "examples"


def run(name: str) -> str:
    """What an example prints when a user starts it."""
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_add_a_pass():
    printed = run("add_a_pass.py")
    (row,) = (line for line in printed.splitlines() if line.startswith("fuse_relu"))
    assert row.split()[2] == "1"
    assert "-1 relu" in row
    assert "the same logits: True" in printed


def test_add_an_op():
    printed = run("add_an_op.py")
    assert "fuse_l2_normalize 1" in printed
    assert re.search(r"1 x l2_normalize_\w+ +l2_normalize$", printed, flags=re.M)
    assert "through ATen" not in printed
    assert float(printed.splitlines()[-1].rsplit(" ", 1)[1]) < 1e-6


def test_compile_backend():
    printed = run("compile_backend.py")
    error = float(printed.splitlines()[0].rsplit(" ", 1)[1])
    assert error < 1e-5
    assert "the same tokens from generate: True" in printed


def test_one_kernel_through_the_cpu_target():
    printed = run("one_kernel_through_the_cpu_target.py")
    stages = re.split(r"^=== \d\. ", printed, flags=re.M)
    assert [stage.split(":")[0] for stage in stages[1:]] == (
        ["Triton source", "Triton IR", "Parsed IR", "Plan", "Addresses", "C++", "Assembly", "Result"]
    )
    assert re.search(r"numerator\w* +array +costs \d+ and is used 2 times", stages[4])
    assert "load<f32x" in stages[6]
    error = float(re.search(r"greatest difference: (\S+)", stages[8])[1])
    assert error < 1e-6


@pytest.mark.slow
def test_generate(smollm2_path):
    printed = run("generate.py")
    assert "Paris" in printed.splitlines()[0]
    assert "logits [1, " in printed
    assert "through ATen" in printed


def test_every_example_is_tried():
    """read_quantized, which wants a file, in test_quantized_file."""
    tried = ("add_a_pass", "add_an_op", "compile_backend", "generate", "one_kernel_through_the_cpu_target")
    examples = {path.stem for path in EXAMPLES.glob("*.py")}
    assert examples == {*tried, "read_quantized"}, "add a test for the new example"
