"""Weight recipes: each against the torch expression that it stands for, and what evaluation may hold in memory."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from effc.compiler.evaluate import evaluate
from effc.compiler.sources import MappedSource, ModuleSource
from effc.compiler.weights import (
    Add,
    Cast,
    Concat,
    Constant,
    Multiply,
    Pack,
    Read,
    Reshape,
    Slice,
    TensorSource,
    Transpose,
    Weight,
    read,
)
from torch import Tensor, nn

SEED = 7


class DictSource:
    """Tensors by name, counting what is read."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.reads: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]


@pytest.fixture
def source() -> DictSource:
    print("seed", SEED)
    torch.manual_seed(SEED)
    return DictSource(q=torch.randn(10, 6), k=torch.randn(3, 6), v=torch.randn(4, 6), scale=torch.randn(6))


def check(weight: Weight, expected: Tensor, source: TensorSource) -> None:
    """Shape and dtype are known beforehand, the values are right, and they are when written into a given output."""
    assert weight.shape == tuple(expected.shape)
    assert weight.dtype == expected.dtype
    assert torch.equal(evaluate(weight, source), expected)
    out = torch.full(expected.shape, torch.nan).to(expected.dtype)
    assert evaluate(weight, source, out) is out
    assert torch.equal(out, expected)


def packed(matrix: Tensor, block: int) -> Tensor:
    """The definition of the panel layout, element by element."""
    rows, columns = matrix.shape
    panels = torch.zeros(-(-rows // block), columns, block, dtype=matrix.dtype)
    for row in range(rows):
        panels[row // block, :, row % block] = matrix[row]
    return panels


def test_each_recipe_is_its_torch_expression(source: DictSource):
    q, k, v, scale = (source.tensors[name] for name in ("q", "k", "v", "scale"))
    weight = read(source, "q")
    check(weight, q, source)
    check(Cast(weight, torch.bfloat16), q.bfloat16(), source)
    check(Reshape(weight, (5, 2, 6)), q.reshape(5, 2, 6), source)
    check(Transpose(weight, (1, 0)), q.T, source)
    check(Slice(weight, 0, 2, 5), q[2:5], source)
    check(Slice(weight, -1, 0, 3), q[:, :3], source)
    check(Concat((weight, read(source, "k"), read(source, "v"))), torch.cat([q, k, v]), source)
    check(Concat((weight, weight), dim=-1), torch.cat([q, q], dim=1), source)
    check(Add(weight, Constant.of(torch.tensor(-1.0))), q - 1, source)
    check(Multiply(weight, read(source, "scale")), q * scale, source)
    check(Constant.of(scale), scale, source)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 8, 16, 32])
def test_packing_follows_its_definition(source: DictSource, block: int):
    merged = Concat(tuple(read(source, name) for name in ("q", "k", "v")))
    check(Pack(read(source, "q"), block), packed(source.tensors["q"], block), source)
    expected = torch.cat([source.tensors[name] for name in ("q", "k", "v")])
    check(Pack(merged, block), packed(expected, block), source)
    nested = Concat((Concat((read(source, "q"), read(source, "k"))), read(source, "v")))
    check(Pack(nested, block), packed(expected, block), source)
    check(Pack(Transpose(read(source, "q"), (1, 0)), block), packed(source.tensors["q"].T, block), source)
    check(Cast(Pack(merged, block), torch.bfloat16), packed(expected, block).bfloat16(), source)


def test_a_recipe_names_what_it_reads_once(source: DictSource):
    merged = Concat((read(source, "v"), read(source, "q"), read(source, "v")))
    assert Pack(merged, 4).names() == ("v", "q")
    assert Constant.of(torch.zeros(2)).names() == ()


def test_evaluation_reads_each_part_once_and_in_order(source: DictSource):
    merged = Concat(tuple(read(source, name) for name in ("q", "k", "v")))
    for weight in (merged, Pack(merged, 4), Cast(Pack(merged, 8), torch.bfloat16)):
        source.reads.clear()
        evaluate(weight, source)
        assert source.reads == ["q", "k", "v"]


def test_merging_packing_and_casting_hold_the_result_and_one_part():
    class Watched(DictSource):
        """Makes each part anew and counts how many of the earlier ones are still alive."""

        def read(self, name: str) -> Tensor:
            still_alive.append(sum(part() is not None for part in parts))
            part = torch.zeros(32, 16)
            parts.append(weakref.ref(part))
            return part

    merged = Concat(tuple(Read(f"w{index}", (32, 16), torch.float32) for index in range(8)))
    for weight in (merged, Pack(merged, 48), Cast(merged, torch.bfloat16), Cast(Pack(merged, 64), torch.bfloat16)):
        parts: list[weakref.ref] = []
        still_alive: list[int] = []
        evaluate(weight, Watched())
        assert still_alive == [0] * 8, weight


def test_equal_recipes_are_equal_and_print_alike(source: DictSource):
    first = Pack(Concat((read(source, "q"), read(source, "k"))), 4)
    second = Pack(Concat([Read("q", (10, 6), torch.float32), Read("k", [3, 6], torch.float32)]), 4)
    assert first == second
    assert hash(first) == hash(second)
    assert first.key() == repr(second)
    assert first.key() == 'pack(concat(read("q", float32[10, 6]), read("k", float32[3, 6]), dim=0), 4)'
    assert first != Pack(first.source, 8)


def test_a_constant_is_known_by_its_content():
    assert Constant.of(torch.ones(3)) == Constant.of(torch.ones(3).clone())
    assert Constant.of(torch.ones(3)) != Constant.of(torch.zeros(3))
    assert Constant.of(torch.ones(3)) != Constant.of(torch.ones(3, dtype=torch.float64))
    assert Constant.of(torch.zeros(2, 3)) != Constant.of(torch.zeros(3, 2))
    assert Constant.of(torch.ones(4, 4).T[::2]).shape == (2, 4)


def test_keys_are_the_same_in_another_process():
    script = "import torch; from effc.compiler.weights import *; print(Constant.of(torch.arange(5.0)).key())"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == Constant.of(torch.arange(5.0)).key()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda q, k: Reshape(q, (7, 7)), r"cannot reshape \[10, 6\] to \[7, 7\]"),
        (lambda q, k: Transpose(q, (0, 0)), "permutation of 2 dimensions"),
        (lambda q, k: Slice(q, 0, 4, 11), "cannot slice 4:11"),
        (lambda q, k: Concat(()), "at least one"),
        (lambda q, k: Concat((q, k), dim=1), "besides dimension 1"),
        (lambda q, k: Concat((q, Cast(k, torch.bfloat16))), "equal dtypes"),
        (lambda q, k: Add(q, Cast(q, torch.bfloat16)), "float32 and bfloat16"),
        (lambda q, k: Pack(Reshape(q, (60,)), 4), "expected a matrix"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_recipe_is_made(source: DictSource, build, message: str):
    with pytest.raises(ValueError, match=message):
        build(read(source, "q"), read(source, "k"))


def test_a_source_that_changed_its_shape_is_noticed(source: DictSource):
    with pytest.raises(ValueError, match=r"expected q to be float32\[10, 6\], found float32\[10, 5\]"):
        evaluate(read(source, "q"), DictSource(q=torch.zeros(10, 5)))
    with pytest.raises(ValueError, match="expected an output of shape"):
        evaluate(read(source, "q"), source, torch.empty(6, 10))


def test_a_module_is_read_by_reference():
    module = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    module[1].weight = module[0].weight
    module.register_buffer("table", torch.arange(3.0), persistent=False)
    source = ModuleSource(module)
    assert isinstance(source, TensorSource)
    assert source.names == ("0.weight", "1.weight", "table")
    assert source.read("1.weight").data_ptr() == module[0].weight.data_ptr()
    assert evaluate(read(source, "0.weight"), source).data_ptr() == module[0].weight.data_ptr()
    assert not source.read("0.weight").requires_grad


def test_a_mapped_source_gives_recipes_other_names(source: DictSource):
    mapped = MappedSource(source, {"qk": Concat((read(source, "q"), read(source, "k")))})
    assert isinstance(mapped, TensorSource)
    assert mapped.names == ("qk",)
    weight = Pack(read(mapped, "qk"), 4)
    assert weight.names() == ("qk",)
    expected = packed(torch.cat([source.tensors["q"], source.tensors["k"]]), 4)
    assert torch.equal(evaluate(weight, mapped), expected)
    resolved = mapped.resolve(weight)
    assert resolved.names() == ("q", "k")
    assert torch.equal(evaluate(resolved, source), expected)
