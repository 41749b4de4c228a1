"""Cold and warm starts, the demo and the benchmark, on the default model."""

import json
import subprocess
import sys
from pathlib import Path

import effc
import pytest
from effc import startup
from effc.compiler.errors import EffcError

ROOT = Path(effc.__file__).parent

WARM = """
import sys
from effc.startup import first_token
first_token(sys.argv[1], None)
print("LOADED", *{name.split(".")[0] for name in sys.modules})
"""


def test_a_failing_process_is_one_line(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(EffcError, match=r"broken.gguf in a process of its own failed: effc: ") as caught:
        startup.measure(tmp_path / "broken.gguf", tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_warm_start_compiles_nothing(smollm2_path, tmp_path, monkeypatch):
    """In a cache of its own: other processes of tests write into theirs meanwhile."""
    monkeypatch.setenv("EFFC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    startup.measure(smollm2_path, tmp_path)
    before = set(tmp_path.rglob("*"))
    assert any(path.suffix == ".so" for path in before)
    command = [sys.executable, "-c", WARM, str(smollm2_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    assert set(line.split()).isdisjoint({"transformers", "sympy", "networkx"})
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_demo_ends_with_the_answer(smollm2_path):
    done = subprocess.run([sys.executable, "-m", "effc.demo"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("The capital of France is Paris.")
    assert "ATen calls left in prefill and decode: 0" in done.stdout
    assert "cold" in done.stdout
    assert "effc / eager" in done.stdout


@pytest.mark.slow
def test_bench_prints_json(smollm2_path):
    options = ["--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "2", "--no-startup", "--json"]
    options += ["--quantize", "none"]
    command = [sys.executable, str(ROOT / "bench" / "decode.py"), "--model", str(smollm2_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (row,) = result["rows"]
    names = ["effc, none", *(f"Hugging Face eager{how}" for how in ("", ", growing cache", ", static cache"))]
    assert [speed["name"] for speed in row["speeds"]] == names
    assert all(len(speed["decode"]) == 2 for speed in row["speeds"])
    assert not any(graph["fallbacks"] for graph in result["receipts"]["none"]["graphs"])
    assert result["agreements"]["effc, none"]["agreeing"] == result["agreements"]["effc, none"]["tokens"]
    assert result["read_bandwidth"] > 1e8


def test_bench_refuses_nonsense():
    command = [sys.executable, str(ROOT / "bench" / "decode.py"), "--new-tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "effc: --new-tokens must be at least 2, found 1"
