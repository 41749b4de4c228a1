"""tl.rand and its family against Philox in NumPy, tl.map_elementwise against Python, and what has no meaning here."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from effc.codegen.cpu import launch, lower

from .on_cpu import randint, run

SIZE = 256


def philox(counter: list[np.ndarray], key: list[int], rounds: int = 10) -> list[np.ndarray]:
    """Philox4x32 (Salmon et al., 2011) in uint64 arithmetic."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    mask, shift = np.uint64(2**32 - 1), np.uint64(32)
    for k in range(rounds):
        k0, k1 = (np.uint64((key[j] + k * step) % 2**32) for j, step in enumerate((0x9E3779B9, 0xBB67AE85)))
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ k0, b & mask, (a >> shift) ^ c3 ^ k1, a & mask
    return [c.astype(np.uint32) for c in (c0, c1, c2, c3)]


def uniform(bits: np.ndarray) -> np.ndarray:
    signed = bits.view(np.int32)
    return np.where(signed < 0, ~signed, signed).astype(np.float32) * np.float32(4.6566127342e-10)


def normal(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.sqrt(-2 * np.log(np.maximum(u.astype(np.float64), 1e-7)))
    return radius * np.cos(2 * np.pi * v.astype(np.float64)), radius * np.sin(2 * np.pi * v.astype(np.float64))


@triton.jit
def random_kernel(seed, i_ptr, j_ptr, u_ptr, v_ptr, n_ptr, m_ptr, p_ptr, q_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(i_ptr + at, tl.randint(seed, at))
    a, b, c, d = tl.randint4x(seed, at.to(tl.int64) * 12345678901, 7)
    tl.store(j_ptr + at, a)
    tl.store(j_ptr + SIZE + at, b)
    tl.store(j_ptr + 2 * SIZE + at, c)
    tl.store(j_ptr + 3 * SIZE + at, d)
    tl.store(u_ptr + at, tl.rand(seed, at))
    a, b, c, d = tl.rand4x(seed, at)
    tl.store(v_ptr + at, a)
    tl.store(v_ptr + SIZE + at, b)
    tl.store(v_ptr + 2 * SIZE + at, c)
    tl.store(v_ptr + 3 * SIZE + at, d)
    tl.store(n_ptr + at, tl.randn(seed, at))
    a, b, c, d = tl.randn4x(seed, at)
    tl.store(m_ptr + at, a)
    tl.store(m_ptr + SIZE + at, b)
    tl.store(m_ptr + 2 * SIZE + at, c)
    tl.store(m_ptr + 3 * SIZE + at, d)
    a, b, c, d = tl.philox(seed, at, at + 1, at * 2, at - 5)
    tl.store(p_ptr + at, tl.uint_to_uniform_float(a))
    x, _ = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(b), tl.uint_to_uniform_float(c))
    tl.store(q_ptr + at, x)
    a, b, c, d = tl.philox_impl(a, b, c, d, a, b, 3)
    tl.store(q_ptr + SIZE + at, tl.uint_to_uniform_float(d))


@pytest.mark.parametrize("seed", [0, 0x123456789ABCDEF, -3])
def test_random_numbers_are_those_of_philox(seed, isa):
    kinds = ["i32", "i32", "fp32", "fp32", "fp32", "fp32", "fp32", "fp32"]
    sizes = [SIZE, 4 * SIZE, SIZE, 4 * SIZE, SIZE, 4 * SIZE, SIZE, 2 * SIZE]
    outs = [
        torch.zeros(n, dtype=torch.int32 if k == "i32" else torch.float32) for k, n in zip(kinds, sizes, strict=True)
    ]
    names = [name for name in random_kernel.arg_names if name.endswith("_ptr")]
    signature = {"seed": "i64"} | {name: f"*{kind}" for name, kind in zip(names, kinds, strict=True)}
    launch(lower(random_kernel, signature, {"SIZE": SIZE}), (1,), seed, *outs)
    i, j, u, v, n, m, p, q = (out.numpy() for out in outs)
    at, zero, key = np.arange(SIZE), np.zeros(SIZE), [seed % 2**32, seed % 2**64 >> 32]
    r = philox([at, zero, zero, zero], key)
    assert np.array_equal(i.view(np.uint32), r[0])
    wide = at.astype(np.int64) * 12345678901
    assert np.array_equal(j.view(np.uint32), np.concatenate(philox([wide % 2**32, wide >> 32, zero, zero], key, 7)))
    assert np.array_equal(u, uniform(r[0]))
    assert np.array_equal(v, np.concatenate([uniform(x) for x in r]))
    pairs = [*normal(uniform(r[0]), uniform(r[1])), *normal(uniform(r[2]), uniform(r[3]))]
    np.testing.assert_allclose(n, pairs[0], rtol=0, atol=3e-6)  # the angle is rounded to fp32 first
    np.testing.assert_allclose(m, np.concatenate(pairs), rtol=0, atol=3e-6)
    s = philox([at, at + 1, at * 2, (at - 5) % 2**32], key)
    assert np.array_equal(p, uniform(s[0]))
    np.testing.assert_allclose(q[:SIZE], normal(uniform(s[1]), uniform(s[2]))[0], rtol=0, atol=3e-6)
    last = [philox([c[k] for c in s], [int(s[0][k]), int(s[1][k])], 3)[3] for k in range(SIZE)]
    assert np.array_equal(q[SIZE:], uniform(np.array(last, dtype=np.uint32)))


@triton.jit
def collatz(x, limit):
    steps = 0
    while (x != 1) & (steps < limit):
        if x % 2 == 0:
            x = x // 2
        else:
            x = 3 * x + 1
        steps += 1
    return steps


@triton.jit
def ordered(a0, a1, b0, b1):
    return min(a0, b0), min(a1, b1), max(a0, b0), max(a1, b1)


@triton.jit
def map_kernel(x_ptr, y_ptr, steps_ptr, low_ptr, high_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(steps_ptr + at, tl.map_elementwise(collatz, x, y % 50))
    low, high = tl.map_elementwise(ordered, x, y, pack=2)
    tl.store(low_ptr + at, low)
    tl.store(high_ptr + at, high)


def test_map_elementwise_runs_a_scalar_function_with_loops(isa):
    generator = torch.Generator().manual_seed(4)
    print("seed 4")
    x, y = (torch.randint(1, 1000, (64,), generator=generator, dtype=torch.int32) for _ in range(2))
    steps, low, high = (torch.zeros_like(x) for _ in range(3))
    names = ("x_ptr", "y_ptr", "steps_ptr", "low_ptr", "high_ptr")
    launch(lower(map_kernel, dict.fromkeys(names, "*i32"), {"SIZE": 64}), (1,), x, y, steps, low, high)

    def count(value: int, limit: int) -> int:
        done = 0
        while value != 1 and done < limit:
            value, done = (value // 2 if value % 2 == 0 else 3 * value + 1), done + 1
        return done

    assert steps.tolist() == [count(v, w % 50) for v, w in zip(x.tolist(), y.tolist(), strict=True)]
    assert torch.equal(low, torch.minimum(x, y))
    assert torch.equal(high, torch.maximum(x, y))


@triton.jit
def sign_and_rest(x, y):
    if x > 0:
        return x, y
    if x < -500:
        return y, x
    else:
        return x + y, x - y


@triton.jit
def early_kernel(x_ptr, y_ptr, first_ptr, second_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    first, second = tl.map_elementwise(sign_and_rest, tl.load(x_ptr + at), tl.load(y_ptr + at))
    tl.store(first_ptr + at, first)
    tl.store(second_ptr + at, second)


def test_map_elementwise_of_a_function_that_returns_early():
    x, y = randint(-1000, 1000, (64,)), randint(0, 9, (64,), seed=1)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    run(early_kernel, (1,), x, y, first, second, SIZE=64)
    between = (x <= 0) & (x >= -500)
    assert torch.equal(first, torch.where(x > 0, x, torch.where(between, x + y, y)))
    assert torch.equal(second, torch.where(x > 0, y, torch.where(between, x - y, x)))
