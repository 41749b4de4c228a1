"""How Triton's types and constants are written in C++.

A value of a small float type (f16, bf16, fp8) is a float holding exactly that value; an i1 is a bool, or lanes of
int32_t (0 or -1).
"""

import math
import struct

from .ir import Type

HALF = ("f16", "bf16")
FP8 = {"f8E4M3FN": (3, 7), "f8E5M2": (2, 15), "f8E4M3FNUZ": (3, 8), "f8E5M2FNUZ": (2, 16)}  # bits of mantissa, bias
SMALL_FLOATS = (*HALF, *FP8)
SCALAR = {"i1": "bool", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t", "index": "int64_t"}
SCALAR |= {"f32": "float", "f64": "double"} | dict.fromkeys(SMALL_FLOATS, "float")
MEMORY = SCALAR | {"i1": "uint8_t"} | dict.fromkeys(HALF, "uint16_t") | dict.fromkeys(FP8, "uint8_t")
LANE = {"i1": "i32", "i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64", "ptr": "i64"}
LANE |= {"f32": "f32", "f64": "f64"} | dict.fromkeys(SMALL_FLOATS, "f32")
BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f32": 4, "f64": 8}
BYTES |= dict.fromkeys(HALF, 2) | dict.fromkeys(FP8, 1)


def scalar_type(type_: Type) -> str:
    if type_.element == "ptr":
        return f"{pointee_type(type_)} *"
    return SCALAR[type_.element]


def pointee_type(type_: Type) -> str:
    """C type in memory of what a pointer (or a tensor of pointers) points to."""
    return MEMORY.get(type_.pointee, "uint8_t")


def lanes_type(element: str, width: int) -> str:
    """C type of `width` lanes; of the scalar where width is 1."""
    if width == 1:
        return SCALAR.get(element, "int64_t")
    return f"{LANE[element]}x{width}"


def unsigned(name: str) -> str:
    return "u" + name if name.startswith("int") else name.replace("i", "u", 1)


def parse_literal(text: str, element: str) -> int | float | bool:
    """The value of a constant as Triton IR prints it."""
    if element == "i1":
        return text in ("true", "1", "-1")
    if element.startswith("i"):
        return int(text)
    if text.startswith("0x"):
        raw = int(text, 16)
        if element in FP8:
            return fp8_value(raw, element)
        if element == "bf16":
            return struct.unpack("<f", struct.pack("<I", raw << 16))[0]
        code = {"f16": ("<e", "<H"), "f32": ("<f", "<I"), "f64": ("<d", "<Q")}[element]
        return struct.unpack(code[0], struct.pack(code[1], raw))[0]
    return float(text)


def fp8_value(code: int, element: str) -> float:
    mantissa_bits, bias = FP8[element]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if element.endswith("FNUZ"):
        if code == 0x80:
            return math.nan
    elif element == "f8E5M2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    elif code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)


def literal(value: int | float | bool, element: str) -> str:
    if element == "i1":
        return "true" if value else "false"
    if element.startswith("i"):
        if value == -(2**63):
            return "INT64_MIN"
        return f"INT64_C({value})" if abs(value) > 2**31 - 1 else str(value)
    suffix = "" if element == "f64" else "f"
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
    return f"{value!r}{suffix}"
