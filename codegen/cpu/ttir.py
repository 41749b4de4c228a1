"""Triton's front end for the CPU target: a JITFunction to Triton IR, and kernels from source text.

Only the front end and target-independent passes of libtriton run: no LLVM, no ptxas. What moves between Triton releases
stays in this file.
"""

import functools
import hashlib
import linecache
import types
from collections.abc import Callable, Collection, Mapping
from types import ModuleType, SimpleNamespace

from ...compiler.errors import UnsupportedKernel

OPTIONS = SimpleNamespace(
    backend_name="cpu",
    arch="cpu",
    num_warps=1,
    num_ctas=1,
    num_stages=1,
    warp_size=1,
    debug=False,
    sanitize_overflow=False,
    enable_fp_fusion=True,
    supported_fp8_dtypes=("fp8e4nv", "fp8e5", "fp8e4b15", "fp8e4b8", "fp8e5b16"),
    deprecated_fp8_dot_operand_dtypes=(),
    default_dot_input_precision="ieee",
    allowed_dot_input_precisions=("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6"),
    max_num_imprecise_acc_default=0,
    extern_libs=(),
    instrumentation_mode="",
    ir_override=None,
    launch_cooperative_grid=False,
)


def make_ttir(
    fn,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    divisible: Collection[str] = (),
    checked: bool = False,
) -> str:
    """Triton IR text, with locations, of `fn` (a JITFunction) specialized to argument types and constexprs.

    Raises UnsupportedKernel with Triton's own message where its front end refuses the kernel.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import CompilationError

    missing = [name for name in fn.arg_names if name not in signature and name not in constants]
    if missing:
        raise UnsupportedKernel(f"kernel {fn.__name__}: no type and no constant given for {', '.join(missing)}")
    types_ = {name: "constexpr" if name in constants else signature[name] for name in fn.arg_names}
    attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible if name not in constants}
    source = ASTSource(fn, types_, dict(constants), attrs)
    context = ir.context()
    ir.load_dialects(context)
    try:
        module = source.make_ir(
            GPUTarget("cpu", 0, 1), options_for(fn, checked), codegen_functions(), module_map(), context
        )
    except CompilationError as error:
        reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise UnsupportedKernel(f"kernel {fn.__name__}: Triton's front end refuses it: {reason}") from error
    return optimize(module, context)


def codegen_functions() -> dict[str, Callable]:
    """What Triton's front end asks a target for."""
    return {"min_dot_size": lambda lhs, rhs: (1, 1, 1), "convert_custom_types": convert_fp8e4b15}


def module_map() -> dict[str, ModuleType]:
    """Modules of device functions that kernels import, and what stands for them."""
    from triton.language.extra.cuda import libdevice

    return {"triton.language.extra.libdevice": libdevice}


def optimize(module, context) -> str:
    """Run the target-independent passes over what the front end made; returns Triton IR text with locations."""
    from triton._C.libtriton import ir, passes

    manager = ir.pass_manager(context)
    passes.common.add_inliner(manager)
    for add in ("add_rewrite_tensor_pointer", "add_rewrite_tensor_descriptor_to_pointer"):
        if hasattr(passes.ttir, add):
            getattr(passes.ttir, add)(manager)
    passes.common.add_canonicalizer(manager)
    passes.ttir.add_combine(manager)
    passes.ttir.add_reorder_broadcast(manager)
    passes.common.add_cse(manager)
    passes.common.add_licm(manager)
    passes.ttir.add_loop_unroll(manager)
    passes.common.add_cse(manager)
    passes.common.add_symbol_dce(manager)
    manager.run(module, "make_ttir")
    return str(module)


def options_for(fn, checked: bool = False) -> SimpleNamespace:
    """What Triton's front end asks a target. Assertions and overflow checks are on as they are on a GPU: where the
    kernel says debug=True, or TRITON_DEBUG is set. Debug mode of the CPU target turns on assertions too."""
    from triton import knobs

    debug = bool(getattr(fn, "debug", False) or knobs.runtime.debug)
    return SimpleNamespace(**vars(OPTIONS) | {"debug": debug or checked, "sanitize_overflow": debug})


def convert_fp8e4b15(value, to_type, _rounding=None, _semantic=None):
    """To or from Triton's own 8-bit float, which Triton IR does not know: the arithmetic of Triton's PTX for it.

    It is fp16 without the two top bits of the exponent and the seven last of the mantissa. Down: fp16 toward zero,
    clamped to 1.75, then rounded half up.
    """
    import triton.language as tl

    def op(x, name: str, y):
        return getattr(x, name)(y, _semantic=_semantic)

    def cast(x, dtype, **kwargs):
        return x.to(dtype, _semantic=_semantic, **kwargs)

    if value.dtype == tl.float8e4b15:
        code = cast(cast(value, tl.uint8, bitcast=True), tl.uint16)
        sign = op(op(code, "__and__", 0x80), "__lshift__", 8)
        half = op(sign, "__or__", op(op(code, "__and__", 0x7F), "__lshift__", 7))
        return cast(cast(half, tl.float16, bitcast=True), to_type.scalar)
    half = value if value.dtype == tl.float16 else cast(value, tl.float16, fp_downcast_rounding="rtz")
    code = cast(half, tl.uint16, bitcast=True)
    size = tl.minimum(op(code, "__and__", 0x7FFF), 0x3F00, _semantic=_semantic)
    rounded = op(op(op(size, "__lshift__", 1), "__add__", 0x80), "__or__", op(code, "__and__", 0x8000))
    return cast(cast(op(rounded, "__rshift__", 8), tl.uint8), tl.float8e4b15, bitcast=True)


@functools.lru_cache(maxsize=512)
def kernel_from_source(source: str, name: str):
    """The JITFunction `name` defined by `source`, a module's text that imports what it uses.

    The text is registered with linecache, so that Triton's `inspect.getsource` reads it without a file.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    filename = f"<kernel {name} {digest}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType(f"kernel_{name}_{digest}")
    module.__file__ = filename
    exec(compile(source, filename, "exec"), module.__dict__)
    if name not in module.__dict__:
        raise UnsupportedKernel(f"the source given defines no kernel named {name}")
    return module.__dict__[name]
