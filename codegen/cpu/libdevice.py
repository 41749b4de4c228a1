"""NVIDIA's libdevice (`triton.language.extra.libdevice`) in C++: a table from symbol to expression.

In an expression {0}, {1}, ... are the arguments, {V} the type of the first one, {R} of the result, {f} is "f" for fp32
and "" for fp64. Those in VECTORS take whole vectors; all others one lane at a time, of C types.
"""

import re

from .c_types import SCALAR, lanes_type
from .ir import Op, unsupported

VECTORS = {  # by the name without __nv_; of functions that come as fp32 and fp64, by the fp64's
    "exp": "exponential<{V}>({0})",
    "exp2": "exponential2<{V}>({0})",
    "log": "logarithm<{V}>({0})",
    "log2": "logarithm2<{V}>({0})",
    "sin": "sine<{V}>({0})",
    "cos": "cosine<{V}>({0})",
    "tanh": "hyperbolic_tangent<{V}>({0})",
    "erf": "error_function<{V}>({0})",
    "sqrt": "square_root<{V}>({0})",
    "rsqrt": "reciprocal_root<{V}>({0})",
    "fabs": "absolute<{V}>({0})",
    "floor": "round_down<{V}>({0})",
    "ceil": "round_up<{V}>({0})",
    "trunc": "round_to_zero<{V}>({0})",
    "rint": "round_to_even<{V}>({0})",
    "nearbyint": "round_to_even<{V}>({0})",
    "fma": "fused_multiply_add<{V}>({0}, {1}, {2})",
    "fast_exp": "exponential<{V}>({0})",
    "fast_log": "logarithm<{V}>({0})",
    "fast_log2": "logarithm2<{V}>({0})",
    "fast_sin": "sine<{V}>({0})",
    "fast_cos": "cosine<{V}>({0})",
    "fast_tanh": "hyperbolic_tangent<{V}>({0})",
    "fast_fdivide": "{0} / {1}",
    "fdiv_rn": "{0} / {1}",
    "ddiv_rn": "{0} / {1}",
    "frcp_rn": "1 / {0}",
    "drcp_rn": "1 / {0}",
    "fsqrt_rn": "square_root<{V}>({0})",
    "dsqrt_rn": "square_root<{V}>({0})",
    "fma_rn": "fused_multiply_add<{V}>({0}, {1}, {2})",
    "isnan": "lanes_mask<{R}>({0} != {0}) & 1",
    "isinf": "lanes_mask<{R}>(absolute<{V}>({0}) == __builtin_inf{f}()) & 1",
    "finite": "lanes_mask<{R}>(absolute<{V}>({0}) < __builtin_inf{f}()) & 1",
    "isfinited": "lanes_mask<{R}>(absolute<{V}>({0}) < __builtin_inf{f}()) & 1",
    "int_as_float": "bits<{R}>({0})",
    "uint_as_float": "bits<{R}>({0})",
    "float_as_int": "bits<{R}>({0})",
    "float_as_uint": "bits<{R}>({0})",
    "longlong_as_double": "bits<{R}>({0})",
    "double_as_longlong": "bits<{R}>({0})",
    "double2float_rn": "convert<{R}>({0})",
    "int2double_rn": "convert<{R}>({0})",
    "int2float_rn": "convert<{R}>({0})",
    "ll2float_rn": "convert<{R}>({0})",
    "ll2double_rn": "convert<{R}>({0})",
    "float2int_rz": "to_integer<{R}>({0})",
    "double2int_rz": "to_integer<{R}>({0})",
    "float2ll_rz": "to_integer<{R}>({0})",
    "double2ll_rz": "to_integer<{R}>({0})",
}
C_LIBRARY = """
    tan asin acos atan sinh cosh asinh acosh atanh cbrt expm1 log1p log10 logb round pow fmod remainder
    atan2 hypot copysign nextafter fdim fmin fmax"""
IN_DOUBLE = "lgamma tgamma erfc"  # their fp32 versions are off by more than 2 ulp
BESSEL = "j0 j1 jn y0 y1 yn"
FLOATS = {name: f"__builtin_{name}{{f}}({{args}})" for name in C_LIBRARY.split()}
FLOATS |= {name: f"__builtin_{name}({{args}})" for name in IN_DOUBLE.split()}
FLOATS |= {name: f"libdevice::{name}({{args}})" for name in BESSEL.split()}
FLOATS |= {  # in double too
    "exp10": "__builtin_pow(10.0, {0})",
    "fast_exp10": "__builtin_pow(10.0, {0})",
    "fast_log10": "__builtin_log10({0})",
    "fast_tan": "__builtin_tan({0})",
    "fast_pow": "__builtin_pow({0}, {1})",
    "powi": "__builtin_pow({0}, {1})",
    "rcbrt": "1 / __builtin_cbrt({0})",
    "rhypot": "1 / __builtin_hypot({0}, {1})",
    "norm3d": "__builtin_hypot(__builtin_hypot({0}, {1}), {2})",
    "rnorm3d": "1 / __builtin_hypot(__builtin_hypot({0}, {1}), {2})",
    "norm4d": "__builtin_hypot(__builtin_hypot({0}, {1}), __builtin_hypot({2}, {3}))",
    "rnorm4d": "1 / __builtin_hypot(__builtin_hypot({0}, {1}), __builtin_hypot({2}, {3}))",
    "sinpi": "libdevice::sin_cos_pi<false>({0})",
    "cospi": "libdevice::sin_cos_pi<true>({0})",
    "erfcx": "libdevice::erfcx({0})",
    "erfinv": "libdevice::erfinv({0})",
    "erfcinv": "libdevice::erfcinv({0})",
    "normcdf": "libdevice::normcdf({0})",
    "normcdfinv": "libdevice::normcdfinv({0})",
    "cyl_bessel_i0": "libdevice::bessel_i<0>({0})",
    "cyl_bessel_i1": "libdevice::bessel_i<1>({0})",
    "ldexp": "__builtin_ldexp({0}, {1})",
    "scalbn": "__builtin_ldexp({0}, {1})",
    "ilogb": "{0} == 0 || {0} != {0} ? INT32_MIN : __builtin_ilogb({0})",
    "llrint": "to_integer<int64_t>(__builtin_rint({0}))",
    "llround": "to_integer<int64_t>(__builtin_round({0}))",
}
OTHERS = {
    "clz": "{0} == 0 ? 32 : __builtin_clz({0})",
    "clzll": "{0} == 0 ? 64 : __builtin_clzll({0})",
    "popc": "__builtin_popcount({0})",
    "popcll": "__builtin_popcountll({0})",
    "ffs": "__builtin_ffs({0})",
    "ffsll": "__builtin_ffsll({0})",
    "brev": "libdevice::reverse_bits((uint32_t){0})",
    "brevll": "libdevice::reverse_bits((uint64_t){0})",
    "byte_perm": "libdevice::byte_perm({0}, {1}, {2})",
    "abs": "{0} < 0 ? -{0} : {0}",
    "llabs": "{0} < 0 ? -{0} : {0}",
    "mulhi": "((int64_t){0} * {1}) >> 32",
    "umulhi": "((uint64_t)(uint32_t){0} * (uint32_t){1}) >> 32",
    "mul64hi": "((__int128){0} * {1}) >> 64",
    "umul64hi": "((unsigned __int128)(uint64_t){0} * (uint64_t){1}) >> 64",
    "mul24": "({0} << 8 >> 8) * ({1} << 8 >> 8)",
    "umul24": "((uint32_t){0} & 0xffffff) * ((uint32_t){1} & 0xffffff)",
    "sad": "({0} < {1} ? {1} - {0} : {0} - {1}) + {2}",
    "usad": "((uint32_t){0} < (uint32_t){1} ? {1} - {0} : {0} - {1}) + {2}",
    "hadd": "((int64_t){0} + {1}) >> 1",
    "uhadd": "((uint64_t)(uint32_t){0} + (uint32_t){1}) >> 1",
    "rhadd": "((int64_t){0} + {1} + 1) >> 1",
    "urhadd": "((uint64_t)(uint32_t){0} + (uint32_t){1} + 1) >> 1",
    "saturatef": "{0} > 0 ? ({0} < 1 ? {0} : 1) : 0",
    "signbitf": "__builtin_signbit({0}) != 0",
    "signbitd": "__builtin_signbit({0}) != 0",
    "rcp64h": "1 / {0}",
    "frsqrt_rn": "(float)(1 / __builtin_sqrt((double){0}))",
    "hiloint2double": "bits<double>((uint64_t)(uint32_t){0} << 32 | (uint32_t){1})",
    "double2loint": "(int32_t)bits<uint64_t>({0})",
    "double2hiint": "(int32_t)(bits<uint64_t>({0}) >> 32)",
}
MODES = {"rn": "FE_TONEAREST", "rz": "FE_TOWARDZERO", "rd": "FE_DOWNWARD", "ru": "FE_UPWARD"}
ARITHMETIC = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "rcp": "1 / {0}",
    "sqrt": "__builtin_sqrt{f}({0})",
    "fma": "__builtin_fma{f}({0}, {1}, {2})",
}
WHOLE = {"rn": "__builtin_rint({0})", "rz": "{0}", "rd": "__builtin_floor({0})", "ru": "__builtin_ceil({0})"}
C_NAMES = {
    "int": "int32_t",
    "uint": "uint32_t",
    "ll": "int64_t",
    "ull": "uint64_t",
    "float": "float",
    "double": "double",
}
ROUNDED = re.compile(r"(?:[fd](add|sub|mul|div|rcp|sqrt)|(fma)f?)_(r[nzdu])")
CONVERTED = re.compile(r"(double|float|int|uint|ll|ull)2(double|float|int|uint|ll|ull)_(r[nzdu])")


def spell_extern(op: Op, args: list[str], width: int) -> str:
    """The expression of a tt.extern_elementwise on `width` lanes."""
    symbol = str(op.attrs["symbol"])
    name = symbol.removeprefix("__nv_")
    elements = [operand.type.element for operand in op.operands]
    floats = [element for element in (*elements, op.result.type.element) if element in ("f32", "f64")]
    suffix = "f" if floats[:1] == ["f32"] else ""
    base = (
        name[:-1] if suffix and name.endswith("f") else name.replace("f_r", "_r") if name.startswith("fmaf") else name
    )
    result = lanes_type(op.result.type.element, width)
    if not symbol.startswith("__nv_"):
        raise unsupported(op, f"of {symbol} is not supported")
    for key in (name, base, base.removesuffix("d")):
        if key in VECTORS:
            return VECTORS[key].format(*args, V=lanes_type(elements[0], width), R=result, f=suffix)
    expression = scalar_expression(name, base)
    if expression is None:
        raise unsupported(op, f"of {symbol} is not supported")
    names = "abcd"[: len(args)]
    params = ", ".join(f"{SCALAR[element]} {a}" for element, a in zip(elements, names, strict=True))
    body = expression.format(*names, args=", ".join(names), f=suffix)
    returns = SCALAR[op.result.type.element]
    return f"libdevice::each<{result}>([]({params}) {{ return ({returns})({body}); }}, {', '.join(args)})"


def scalar_expression(name: str, base: str) -> str | None:
    """The expression of one lane, with placeholders; None for a symbol that is not in the tables."""
    if found := ROUNDED.fullmatch(name):
        expression, mode = ARITHMETIC[found[1] or found[2]], MODES[found[3]]
        if found[3] == "rn":
            return f"libdevice::alone({expression})"
        params = ", ".join(f"auto x{k}" for k in range(3) if f"{{{k}}}" in expression)
        inner = expression.format("x0", "x1", "x2", f="{f}")
        return f"libdevice::rounding({mode}, []({params}) {{{{ return {inner}; }}}}, {{args}})"
    if found := CONVERTED.fullmatch(name):
        source, target, mode = found.groups()
        if target not in ("float", "double"):
            return f"to_integer<{C_NAMES[target]}>({WHOLE[mode]})"
        read = f"({C_NAMES[source]})"
        if mode == "rn":
            return f"({C_NAMES[target]}){read}{{0}}"
        inner = f"[](auto x) {{{{ return ({C_NAMES[target]})x; }}}}"
        return f"libdevice::rounding({MODES[mode]}, {inner}, {read}{{0}})"
    return OTHERS.get(name) or FLOATS.get(base)
