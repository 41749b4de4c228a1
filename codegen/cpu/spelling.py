"""How elementwise operations are spelled in C++. Tables; nothing here chooses."""

from .c_types import BYTES, SMALL_FLOATS, lanes_type, scalar_type, unsigned
from .ir import Op, unsupported
from .libdevice import spell_extern

ARITHMETIC = {
    "arith.addf": "{0} + {1}",
    "arith.subf": "{0} - {1}",
    "arith.mulf": "{0} * {1}",
    "arith.divf": "{0} / {1}",
    "tt.precise_divf": "{0} / {1}",
    "math.fma": "fused_multiply_add<{V}>({0}, {1}, {2})",
    "math.exp": "exponential<{V}>({0})",
    "math.exp2": "exponential2<{V}>({0})",
    "math.log": "logarithm<{V}>({0})",
    "math.log2": "logarithm2<{V}>({0})",
    "math.sin": "sine<{V}>({0})",
    "math.cos": "cosine<{V}>({0})",
    "math.tanh": "hyperbolic_tangent<{V}>({0})",
    "math.erf": "error_function<{V}>({0})",
    "math.sqrt": "square_root<{V}>({0})",
    "tt.precise_sqrt": "square_root<{V}>({0})",
    "math.rsqrt": "reciprocal_root<{V}>({0})",
}
FLOAT_MOVES = {  # results that need no rounding to f16 or bf16
    "arith.negf": "-{0}",
    "math.absf": "absolute<{V}>({0})",
    "math.floor": "round_down<{V}>({0})",
    "math.ceil": "round_up<{V}>({0})",
    "arith.maxnumf": "max_number<{V}>({0}, {1})",
    "arith.minnumf": "min_number<{V}>({0}, {1})",
    "arith.maximumf": "max_nan<{V}>({0}, {1})",
    "arith.minimumf": "min_nan<{V}>({0}, {1})",
}
INTEGER = {  # u0, u1: the operands without sign, of type U; S: back to type V
    "arith.addi": "{0} + {1}",
    "arith.subi": "{0} - {1}",
    "arith.muli": "{0} * {1}",
    "arith.andi": "{0} & {1}",
    "arith.ori": "{0} | {1}",
    "arith.xori": "{0} ^ {1}",
    "arith.shli": "shift_left<{V}>({0}, {1})",
    "arith.shrsi": "shift_right<{V}>({0}, {1})",
    "arith.shrui": "{S}(shift_right<{U}>({u0}, {u1}))",
    "arith.divsi": "divide<{V}>({0}, {1})",
    "arith.remsi": "remainder<{V}>({0}, {1})",
    "arith.divui": "{S}(divide<{U}>({u0}, {u1}))",
    "arith.remui": "{S}(remainder<{U}>({u0}, {u1}))",
    "arith.minsi": "({0} < {1} ? {0} : {1})",
    "arith.maxsi": "({0} > {1} ? {0} : {1})",
    "arith.minui": "({u0} < {u1} ? {0} : {1})",
    "arith.maxui": "({u0} > {u1} ? {0} : {1})",
    "math.absi": "({0} < 0 ? -{0} : {0})",
    "tt.mulhiui": "{S}(multiply_high<{U}>({u0}, {u1}))",
}
COMPARE_INT = {"eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">="}
COMPARE_UNSIGNED = {"ult": "<", "ule": "<=", "ugt": ">", "uge": ">="}
COMPARE_FLOAT = {
    "oeq": "{0} == {1}",
    "une": "{0} != {1}",
    "ogt": "{0} > {1}",
    "oge": "{0} >= {1}",
    "olt": "{0} < {1}",
    "ole": "{0} <= {1}",
    "one": "({0} < {1}) | ({0} > {1})",
    "ueq": "({0} == {1}) | ({0} != {0}) | ({1} != {1})",
    "ugt": "({0} > {1}) | ({0} != {0}) | ({1} != {1})",
    "uge": "({0} >= {1}) | ({0} != {0}) | ({1} != {1})",
    "ult": "({0} < {1}) | ({0} != {0}) | ({1} != {1})",
    "ule": "({0} <= {1}) | ({0} != {0}) | ({1} != {1})",
    "ord": "({0} == {0}) & ({1} == {1})",
    "uno": "({0} != {0}) | ({1} != {1})",
}
CASTS = frozenset(
    [
        "arith.extsi",
        "arith.extui",
        "arith.trunci",
        "arith.sitofp",
        "arith.uitofp",
        "arith.fptosi",
        "arith.fptoui",
        "arith.extf",
        "arith.truncf",
        "arith.bitcast",
        "tt.bitcast",
        "tt.fp_to_fp",
        "arith.index_cast",
        "tt.ptr_to_int",
        "tt.int_to_ptr",
    ]
)
COSTS = {"arith.divf": 4, "tt.precise_divf": 4, "math.fma": 1, "math.sqrt": 6, "math.rsqrt": 8, "tt.precise_sqrt": 6}
COSTS |= {"arith.divsi": 8, "arith.remsi": 8, "arith.divui": 8, "arith.remui": 8}


def cost(op: Op) -> int:
    """Roughly how many simple instructions a lane of `op` takes."""
    if op.name in COSTS:
        return COSTS[op.name]
    if op.name in ("math.sin", "math.cos"):
        return 30
    if (op.name.startswith("math.") and op.name in ARITHMETIC) or op.name == "tt.extern_elementwise":
        return 16
    if op.name in CASTS and op.result.type.element in SMALL_FLOATS:
        return 4
    return 1


def is_elementwise(op: Op) -> bool:
    tables = (ARITHMETIC, FLOAT_MOVES, INTEGER, CASTS)
    extra = (
        "arith.cmpi",
        "arith.cmpf",
        "arith.select",
        "tt.clampf",
        "tt.extern_elementwise",
        "arith.remf",
        "tt.addptr",
    )
    return op.name in extra or any(op.name in table for table in tables)


def spell(op: Op, args: list[str], width: int) -> str:
    """The expression of an elementwise op on `width` lanes, given its operands' expressions of the right C types."""
    type_ = op.result.type
    element = type_.element
    vector = lanes_type(element, width)
    if op.name in CASTS:
        return spell_cast(op, args[0], width)
    if op.name == "arith.cmpi":
        return spell_compare(op, args, width)
    if op.name == "arith.cmpf":
        text = COMPARE_FLOAT[op.attrs["words"][0]].format(*args)
        return text if width == 1 else f"mask({text})"
    if op.name == "arith.select":
        kind = scalar_type(op.result.type.with_shape(())) if width == 1 else vector  # one lane of pointers is a pointer
        return f"select<{kind}>({args[0]}, {args[1]}, {args[2]})"
    if op.name == "tt.clampf":
        kind = "nan" if op.attrs.get("propagateNan") == "all" else "number"
        return f"min_{kind}<{vector}>(max_{kind}<{vector}>({args[0]}, {args[1]}), {args[2]})"
    if op.name == "arith.remf":
        return rounded(f"float_remainder<{vector}>({args[0]}, {args[1]})", element)
    if op.name == "tt.extern_elementwise":
        return spell_extern(op, args, width)
    if op.name in ARITHMETIC:
        return rounded(ARITHMETIC[op.name].format(*args, V=vector), element)
    if op.name in FLOAT_MOVES:
        return FLOAT_MOVES[op.name].format(*args, V=vector)
    if op.name in INTEGER:
        if element == "i1":
            return spell_bool(op, args)
        names = {"V": vector, "U": unsigned(vector), "S": reinterpret(vector, width)}
        names |= {f"u{k}": f"{reinterpret(unsigned(vector), width)}({arg})" for k, arg in enumerate(args)}
        return INTEGER[op.name].format(*args, **names)
    raise unsupported(op, "is not supported")


def reinterpret(type_: str, width: int) -> str:
    """A cast between signed and unsigned; arithmetic of small scalars is C's int, whatever their type."""
    return f"({type_})" if width == 1 else f"bits<{type_}>"


def rounded(text: str, element: str) -> str:
    return f"round_{element}({text})" if element in SMALL_FLOATS else text


def spell_bool(op: Op, args: list[str]) -> str:
    words = {
        "arith.addi": "^",
        "arith.subi": "^",
        "arith.muli": "&",
        "arith.andi": "&",
        "arith.ori": "|",
        "arith.xori": "^",
    }
    words |= {"arith.minui": "&", "arith.maxui": "|", "arith.minsi": "|", "arith.maxsi": "&"}
    if op.name not in words:
        raise unsupported(op, "of booleans is not supported")
    return f"{args[0]} {words[op.name]} {args[1]}"


def spell_compare(op: Op, args: list[str], width: int) -> str:
    predicate = op.attrs["words"][0]
    element = op.operands[0].type.element
    if predicate in COMPARE_INT:
        text = f"{args[0]} {COMPARE_INT[predicate]} {args[1]}"
        if element == "i1" and predicate not in ("eq", "ne"):  # as signed numbers, true is -1
            text = f"{args[1]} {COMPARE_INT[predicate]} {args[0]}" if width == 1 else text
    else:
        kind = unsigned(lanes_type("i8" if element == "i1" and width == 1 else element, width))
        cast = "bits" if width > 1 else ""
        a, b = ((f"{cast}<{kind}>({arg})" if cast else f"({kind})({arg})") for arg in args)
        text = f"{a} {COMPARE_UNSIGNED[predicate]} {b}"
    return text if width == 1 else f"mask({text})"


def spell_cast(op: Op, arg: str, width: int) -> str:
    source, target = op.operands[0].type.element, op.result.type.element
    to = lanes_type(target, width)
    wide = lanes_type(source, width)
    name = op.name
    if "ptr" in (source, target):
        if width == 1:
            return f"({scalar_type(op.result.type.with_shape(()))})({arg})"
        return arg
    if name in ("arith.bitcast", "tt.bitcast"):
        if source == target:
            return arg
        arg = f"({wide})({arg})" if width == 1 else arg  # a literal is an int
        code = f"to_{source}({arg})" if source in SMALL_FLOATS else f"bits<{unsigned(wide)}>({arg})"
        if target in SMALL_FLOATS:
            return f"from_{target}<{to}>({code})"
        if source in SMALL_FLOATS:
            return f"bits<{to}>({code})"
        if "i1" in (source, target):
            return spell_truncation(arg, width) if target == "i1" else f"convert<{to}>({arg} & 1)"
        return f"bits<{to}>({arg})"
    if name == "arith.trunci" and target == "i1":
        return spell_truncation(arg, width)
    if source == "i1":
        if name in ("arith.extui", "arith.uitofp", "arith.index_cast") or (
            width == 1 and name not in ("arith.extsi", "arith.sitofp")
        ):
            text = f"convert<{to}>({arg} & 1)"
        else:
            text = f"convert<{to}>({arg})" if width > 1 else f"convert<{to}>(-(int)({arg}))"
        return rounded(text, target)
    if name in ("arith.extui", "arith.uitofp"):
        code = f"({unsigned(wide)})({arg})" if width == 1 else f"bits<{unsigned(wide)}>({arg})"
        return rounded(f"convert<{to}>({code})", target)
    if name in ("arith.fptosi", "arith.fptoui"):
        if target == "i1":
            return f"{arg} != 0" if width == 1 else f"mask({arg} != 0)"
        if name == "arith.fptoui":
            return f"bits<{to}>(to_integer<{unsigned(to)}>({arg}))"
        return f"to_integer<{to}>({arg})"
    return spell_float_cast(arg, source, target, width, op.attrs.get("rounding") == "rtz")


def spell_float_cast(arg: str, source: str, target: str, width: int, toward_zero: bool) -> str:
    """To a float type from a float or signed integer type, rounded once."""
    to = lanes_type(target, width)
    if target in SMALL_FLOATS and source == "f64":
        arg = f"narrow_to_odd<{to}>({arg})"
    elif to != lanes_type(source, width):
        if toward_zero and target == "f32":
            return f"truncate_f32<{to}>({arg})"
        arg = f"convert<{to}>({arg})"
    if source in SMALL_FLOATS and BYTES[target] > BYTES[source]:
        return arg
    return f"truncate_{target}({arg})" if toward_zero and target in SMALL_FLOATS else rounded(arg, target)


def spell_truncation(arg: str, width: int) -> str:
    return f"({arg} & 1) != 0" if width == 1 else f"mask(({arg} & 1) != 0)"
