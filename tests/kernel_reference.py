"""Triton's interpreter with what is known to be wrong in it put right. Import after setting TRITON_INTERPRET.

It keeps bf16 as uint16, but adds, compares and converts these as integers and rounds to them by cutting off; its
maximum and minimum propagate NaN where Triton's default drops it. Constants of bf16, and ~ of unsigned integers, it
cannot make; its atomics read flipped or transposed operands in the order of memory, and sums past the type raise.
Scalars compared are of the operands' type, and splat as such. Triton 3.6's cannot count up to a scalar under NumPy 2.4.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ReduceScanOpInterface, TensorHandle, _get_np_dtype


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    """bf16 as the float32 it stands for; anything else as it is."""
    if not is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, in one step: float32 first, with the last bit set where that was not exact."""
    narrow = values.astype(np.float32)
    beyond = np.abs(narrow).astype(np.float64) > np.abs(values)
    narrow = np.where(beyond, np.nextafter(narrow, np.float32(0)), narrow).astype(np.float32)
    bits = narrow.view(np.uint32) | (narrow != values).astype(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def narrowed(data: np.ndarray, like: TensorHandle) -> TensorHandle:
    if data.dtype.kind == "b":
        return TensorHandle(data, tl.int1)
    return TensorHandle(to_bf16(data) if is_bf16(like) else data, like.dtype.scalar)


def mend() -> None:
    original = {
        name: getattr(InterpreterBuilder, name) for name in ("binary_op", "ternary_op", "unary_op", "create_dot")
    }

    def binary_op(self, lhs, rhs, op):
        if is_bf16(lhs):
            return narrowed(op(widened(lhs).data, widened(rhs).data), lhs)
        result = original["binary_op"](self, lhs, rhs, op)
        return TensorHandle(result.data, tl.int1) if result.data.dtype.kind == "b" else result

    def ternary_op(self, lhs, rhs, other, op):
        if is_bf16(other) and op is not np.where:
            return narrowed(op(widened(lhs).data, widened(rhs).data, widened(other).data), other)
        return original["ternary_op"](self, lhs, rhs, other, op)

    def unary_op(self, arg, op):
        return narrowed(op(widened(arg).data), arg) if is_bf16(arg) else original["unary_op"](self, arg, op)

    def cast_impl(self, src, dst_type):
        data = widened(src).data
        if dst_type.scalar == tl.bfloat16:
            wide = data if data.dtype.kind == "f" and data.itemsize >= 4 else data.astype(np.float64)
            return TensorHandle(to_bf16(wide), tl.bfloat16)
        return TensorHandle(data.astype(_get_np_dtype(dst_type)), dst_type.scalar)

    def create_dot(self, a, b, d, *more):
        return original["create_dot"](self, widened(a), widened(b), d, *more)

    def create_fma(self, x, y, z):
        return narrowed(widened(x).data * widened(y).data + widened(z).data, z)

    def get_all_ones_value(self, type_):
        data = np.zeros(1, _get_np_dtype(type_))
        return TensorHandle(~data, type_.scalar)

    def get_bf16(self, value):
        return TensorHandle(to_bf16(np.array([value], np.float32)), tl.bfloat16)

    fixes = [binary_op, ternary_op, unary_op, cast_impl, create_dot, create_fma, get_all_ones_value, get_bf16]
    for fix in fixes:
        setattr(InterpreterBuilder, fix.__name__, fix)
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        setattr(InterpreterBuilder, name, contiguous(getattr(InterpreterBuilder, name)))
    ReduceScanOpInterface.to_tensor = to_tensor
    interpreter._patch_lang_tensor = with_index(interpreter._patch_lang_tensor)
    quicken()


def to_tensor(_self, values, dtype) -> tl.tensor:
    """The results of reductions and scans; integers wrap, where the interpreter raises OverflowError."""
    data = np.asarray(values).astype(_get_np_dtype(dtype))
    type_ = tl.block_type(dtype, list(data.shape)) if data.shape else dtype
    return tl.tensor(TensorHandle(data if data.shape else data.reshape(1), dtype.scalar), type_)


def with_index(patch_tensor):
    """Scalars, which are arrays of one element there, as counts of a loop."""

    def patch(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def contiguous(method):
    """An atomic operation that reads its operands in the order of their elements, also where they are views."""

    def call(self, *operands):
        arrays = [
            TensorHandle(np.ascontiguousarray(item.data), item.dtype) if isinstance(item, TensorHandle) else item
            for item in operands
        ]
        return method(self, *arrays)

    return call


def quicken() -> None:
    """Exclusive or over an axis, which sorting does all the time, at once instead of pair by pair."""
    slow = ReduceOps.apply_impl

    def apply_impl(self, inputs):
        if self.combine_fn == tl.standard._xor_combine and self.axis is not None:
            data = np.bitwise_xor.reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(data, inputs[0].dtype)
        return slow(self, inputs)

    ReduceOps.apply_impl = apply_impl
