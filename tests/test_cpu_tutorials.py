"""The kernels of Triton's public tutorials, in our words, through Triton's launcher on CPU tensors."""

import importlib.util
from pathlib import Path

import effc.triton_cpu
import pytest
import torch
from effc.codegen.cpu.target import available_isas
from torch.nn import functional as F


@pytest.fixture(scope="module")
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


BEST, *LESSER = available_isas()


@pytest.fixture(autouse=True, params=[BEST, *(pytest.param(isa, marks=pytest.mark.slow) for isa in LESSER)])
def enabled(request, two_threads):
    with effc.triton_cpu.enable(request.param):
        yield


def load(name):
    """A file beside this one, imported as its author's program would import it."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tutorials():
    with effc.triton_cpu.enable():
        return load("tutorial_kernels")


def test_softmax_sized_by_the_properties_of_the_device(tutorials, generator):
    for rows, columns in ((37, 781), (3, 64)):
        x = torch.randn(rows, columns, generator=generator)
        torch.testing.assert_close(tutorials.softmax(x), x.softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_in_groups_tuned(tutorials, generator, dtype):
    a = torch.randn(130, 96, generator=generator).to(dtype)
    b = torch.randn(170, 96, generator=generator).to(dtype).T
    got = tutorials.matmul(a, b, "leaky_relu")
    want = F.leaky_relu(a.double() @ b.double(), 0.01)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=10 * tolerance)
    assert tutorials.matmul_kernel.best_config in tutorials.matmul_kernel.configs


def test_dropout_is_the_seeds(tutorials, generator):
    x = torch.randn(5000, generator=generator)
    once, again, other = (tutorials.seeded_dropout(x, 0.3, seed) for seed in (123, 123, 512))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    kept = once != 0
    torch.testing.assert_close(once, torch.where(kept, x / 0.7, 0.0))
    assert abs(kept.float().mean().item() - 0.7) < 0.03
    assert torch.equal(once, tutorials.seeded_dropout(x, 0.3, 123, block=256)), "whatever the block"


def test_layer_norm_forward_and_backward_through_locks(tutorials, generator):
    x = torch.randn(53, 200, generator=generator, requires_grad=True)
    w = torch.rand(200, generator=generator, requires_grad=True)
    b = torch.rand(200, generator=generator, requires_grad=True)
    grad = torch.randn(53, 200, generator=generator)
    y = tutorials.LayerNorm.apply(x, w, b, 1e-5)
    got = torch.autograd.grad(y, (x, w, b), grad)
    reference = F.layer_norm(x, (200,), w, b, 1e-5)
    torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5)
    for mine, want in zip(got, torch.autograd.grad(reference, (x, w, b), grad), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


def test_libdevice(tutorials, generator):
    x = torch.rand(1000, generator=generator) * 2 - 1
    y = torch.empty_like(x)
    tutorials.asin_kernel[(1,)](x, y, 1000, BLOCK=1024)
    torch.testing.assert_close(y, torch.asin(x), rtol=1e-6, atol=1e-6)


def test_matmuls_of_different_sizes_in_one_launch(tutorials, generator):
    sizes = [(33, 40, 17), (16, 70, 48), (5, 9, 100)]
    pairs = [(torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)) for m, n, k in sizes]
    for got, (a, b) in zip(tutorials.grouped_matmul(pairs), pairs, strict=True):
        torch.testing.assert_close(got, a @ b, rtol=1e-4, atol=1e-4)


def test_persistent_matmul_with_descriptors(tutorials, generator):
    a, b = torch.randn(70, 96, generator=generator), torch.randn(50, 96, generator=generator)
    torch.testing.assert_close(tutorials.persistent_matmul(a, b), a @ b.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_forward_and_backward(generator, causal):
    attention = load("tutorial_attention").Attention
    q, k, v = (torch.randn(3, 77, 32, generator=generator, requires_grad=True) for _ in range(3))
    grad = torch.randn(3, 77, 32, generator=generator)
    out = attention.apply(q, k, v, causal, 0.25)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.25)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    for got, expected in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
