"""`effc.triton_cpu.enable()`: Triton's own launches, caches and tuning on CPU tensors."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from .on_cpu import randn
from .triton_kernels import N, add_kernel, tuned

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


def test_a_launch_by_position_by_name_by_default_and_with_options_for_gpus():
    x, y = randn(N), randn(N, seed=1)
    outs = [torch.zeros(N) for _ in range(4)]
    add_kernel[(8,)](x, y, outs[0], N)
    add_kernel[8, 1, 1](x, y, outs[1], N, 128, num_warps=8, num_stages=4, num_ctas=1, maxnreg=64)
    compiled = add_kernel[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](
        n=N, out_ptr=outs[2], y_ptr=y, x_ptr=x, BLOCK=256
    )
    add_kernel.run(x, y, outs[3], N, grid=(8,), warmup=False)
    for out in outs:
        assert torch.equal(out, x + y)
    assert "tt.func public @add_kernel" in compiled.asm["ttir"]
    assert "static void add_kernel(float *x_ptr" in compiled.asm["cpp"]
    assert compiled.asm["so"].startswith(b"\x7fELF")
    assert compiled.metadata.target.backend == "cpu"


def test_warmup_compiles_and_runs_nothing():
    compiled = add_kernel.warmup(torch.float32, torch.float32, torch.float32, N, BLOCK=64, grid=(16,))
    assert "tt.store" in compiled.asm["ttir"]
    x, y, out = randn(N), randn(N, seed=1), torch.zeros(N)
    add_kernel.warmup(x, y, out, N, BLOCK=64, grid=(16,))
    assert not out.any()
    compiled[(16, 1, 1)](x, y, out, N, 64)
    assert torch.equal(out, x + y)


def test_compile_for_a_named_target():
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(add_kernel, signature, {"BLOCK": 32})
    for arch, flag in ((0, ""), ("generic", "generic")):
        compiled = triton.compile(source, target=GPUTarget("cpu", arch, 1))
        assert compiled.metadata.arch.startswith(flag)
        x, y, out = randn(N), randn(N, seed=1), torch.zeros(N)
        compiled[(32, 1, 1)](x, y, out, N, 32)
        assert torch.equal(out, x + y)


def test_integers_are_specialized_as_triton_does():
    x = randn(N)
    texts = {}
    for n in (1, 16, 7, 2**33):
        compiled = add_kernel[(1,)](x, x, torch.empty(N), n, BLOCK=16)
        texts[n] = compiled.asm["ttir"].split("tt.func", 1)[1].splitlines()[0]
    assert "%n" not in texts[1]
    assert "tt.divisibility = 16" in texts[16].split("%n")[1]
    assert "i32" in texts[7].split("%n")[1]
    assert "tt.divisibility" not in texts[7].split("%n")[1]
    assert "i64" in texts[2**33].split("%n")[1]


@triton.jit(do_not_specialize=["a"], do_not_specialize_on_alignment=["b"])
def scalars_kernel(out_ptr, a, b, flag, x, half: tl.float16, narrow: tl.bfloat16, nothing, KIND: tl.constexpr):
    if nothing is None:
        tl.store(out_ptr + 0, a)
    tl.store(out_ptr + 1, b)
    tl.store(out_ptr + 2, x)
    tl.store(out_ptr + 3, half.to(tl.float32))
    tl.store(out_ptr + 4, narrow.to(tl.float32))
    if flag:
        tl.store(out_ptr + 5, KIND.to(tl.float32) if KIND == 3 else 0.5)


def test_scalars_of_all_kinds():
    out = torch.zeros(6, dtype=torch.float64)
    third = 1 / 3
    first = scalars_kernel[(1,)](out, 1, 48, True, third, third, third, None, KIND="name")
    want = [1, 48, *(torch.tensor(third, dtype=d).item() for d in (torch.float32, torch.float16, torch.bfloat16)), 0.5]
    assert out.tolist() == want
    out.zero_()
    again = scalars_kernel[(1,)](out, 5, 48, False, 2.0**70, third, third, None, KIND="name")
    assert first is again, "neither 1 nor True compile anew where nothing is specialized"
    assert out[0] == 5
    assert out[2] == 2.0**70
    assert out[5] == 0
    scalars_kernel[(1,)](out, 2, 48, True, 1e300, third, third, None, KIND="name")
    assert out[2] == float("inf")


@triton.jit
def containers_kernel(tensors, sizes, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(2):
        total += tl.load(tensors[k] + i, mask=i < sizes[k], other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total * sizes[2][1])


def test_tuples_of_tensors_and_numbers():
    x, y, out = randn(64), randn(64, seed=1, dtype=torch.bfloat16), torch.zeros(64)
    containers_kernel[(1,)]((x, y), (50, 33, (1, 0.5)), out, BLOCK=64)
    i = torch.arange(64)
    assert torch.equal(out, (x.where(i < 50, 0) + y.float().where(i < 33, 0)) * 0.5)


@triton.jit
def transpose_kernel(source, target, BR: tl.constexpr, BC: tl.constexpr):
    r, c = tl.program_id(0) * BR, tl.program_id(1) * BC
    target.store([c, r], source.load([r, c]).T)


def test_descriptors_made_by_the_host():
    x, out = randn(37, 52), torch.zeros(52, 40)
    source, target = TensorDescriptor.from_tensor(x, [16, 16]), TensorDescriptor.from_tensor(out, [16, 16])
    transpose_kernel[(3, 4)](source, target, 16, 16)
    assert torch.equal(out[:, :37], x.T)
    assert not out[:, 37:].any()


@triton.jit
def copy_kernel(sources, targets, n, stride, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for k in tl.static_range(COUNT):
        tl.store(targets[k] + i, tl.load(sources[k] + i * stride, mask=i < n), mask=i < n)


def test_tensors_of_all_dtypes_and_strides():
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    dtypes += [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    sources = [randn(100, seed=k).mul(50).to(torch.int8).to(dtype)[::2] for k, dtype in enumerate(dtypes)]
    targets = [torch.zeros(50, dtype=dtype) for dtype in dtypes]
    copy_kernel[(1,)](tuple(sources), tuple(targets), 50, 2, COUNT=len(dtypes), BLOCK=64)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target), source.dtype


def test_autotune_with_heuristics_restored_and_reset_arguments_and_hooks():
    calls = []
    configs = [triton.Config({"BLOCK": block}, num_warps=4, pre_hook=calls.append) for block in (64, 256)]
    kernel = tuned(configs, reset_to_zero=["total_ptr"], restore_value=["x_ptr"])
    x, total = torch.arange(500), torch.full((1,), 5)
    compiled = kernel[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](x, total, 500)
    assert torch.equal(x, torch.arange(1, 501)), "tuning left no trace, the launch one"
    assert int(total) == 500 * 499 // 2
    assert kernel.best_config in configs
    assert len(calls) > 2
    assert "atomic" in compiled.asm["ttir"]


def test_autotune_goes_on_where_a_block_is_too_large(monkeypatch):
    monkeypatch.setattr("effc.codegen.cpu.emit.SCRATCH_LIMIT", 4 << 20)
    configs = [triton.Config({"SIZE": size}) for size in (1 << 10, 16)]
    kernel = triton.autotune(configs=configs, key=[])(large_kernel)
    out = torch.zeros(1)
    kernel[(1,)](randn(1 << 11), out)
    assert kernel.best_config.kwargs == {"SIZE": 16}
    with pytest.raises(OutOfResources, match="scratch memory"):
        large_kernel[(1,)](randn(1 << 11), out, SIZE=1 << 10)


@triton.jit
def large_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i[:, None]) * tl.load(x_ptr + i[None, :])
    tl.store(out_ptr, tl.sum(tl.dot(x, x, input_precision="ieee")))


def test_do_bench_measures_milliseconds():
    x = randn(1 << 18)
    out = torch.empty_like(x)
    once = triton.testing.do_bench(lambda: add_kernel[(64,)](x, x, out, x.numel(), BLOCK=4096), warmup=1, rep=5)
    assert 1e-3 < once < 1e3


FACTOR = tl.constexpr(3)


@triton.jit
def global_kernel(out_ptr):
    tl.store(out_ptr, FACTOR)


def test_a_changed_global_is_noticed():
    global FACTOR
    out = torch.zeros(1)
    global_kernel[(1,)](out)
    assert out.item() == 3
    FACTOR = tl.constexpr(4)
    try:
        with pytest.raises(RuntimeError, match="FACTOR has changed"):
            global_kernel[(1,)](out)
    finally:
        FACTOR = tl.constexpr(3)


def test_launch_hooks_see_launches():
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    try:
        x, out = randn(N), torch.empty(N)
        add_kernel[(8,)](x, x, out, N)
    finally:
        triton.knobs.runtime.launch_enter_hook.calls.clear()
    assert seen == ["add_kernel"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles_models_to_triton_for_the_cpu():
    from torch._inductor.utils import run_and_get_code

    def model(x, w):
        return torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, x.shape[-1:]) * w).sum(-1)

    x, w = randn(64, 100), randn(100, seed=1)
    got, (code,) = run_and_get_code(torch.compile(model, options={"cpu_backend": "triton"}), x, w)
    assert "@triton.jit" in code
    torch.testing.assert_close(got, model(x, w))


@triton.jit
def specialized_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    for start in tl.range(0, n, BLOCK, num_stages=3, warp_specialize=True, flatten=True, loop_unroll_factor=2):
        i = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, 2 * tl.load(x_ptr + i, mask=i < n), mask=i < n)


def test_how_a_gpu_should_run_a_loop_changes_nothing():
    x, out = randn(N), torch.zeros(N)
    specialized_kernel[(1,)](x, out, N, BLOCK=64)
    assert torch.equal(out, 2 * x)


def test_kernels_compile_side_by_side_where_triton_is_asked_to():
    x, out = randn(N), torch.zeros(N)
    with ThreadPoolExecutor(2) as pool, triton.AsyncCompileMode(pool):
        for block in (32, 64, 512):
            add_kernel.warmup(x, x, out, N, BLOCK=block, grid=(1,))
    add_kernel[(2,)](x, x, out, N, BLOCK=512)
    assert torch.equal(out, 2 * x)
