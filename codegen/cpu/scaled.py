"""Products of scaled blocks (OCP Microscaling Formats v1.0) as products of fp32.

    dot_scaled(a: e2m1, s: e8m0, b: bf16, c)    -->    dot(decode(a) * 2^(s - 127), extf(b), c)

Every element times its scale is exact in fp32, but for results out of its range. A scale of 255 is NaN, as the formats
have it.
"""

from .builder import Builder, replace_uses
from .ir import Block, Op, Type, Value

FP8 = {"e4m3": "f8E4M3FN", "e5m2": "f8E5M2"}
NAN_SCALE = 255


def unscale(block: Block, op: Op, builder: Builder, body: Block) -> None:
    """Replace a `tt.dot_scaled` of `block` by a `tt.dot`."""
    scaled = [" scale" in part for part in op.attrs["template"].split(",")]
    operands = iter(op.operands)
    a, a_scale = next(operands), next(operands) if scaled[0] else None
    b, b_scale = next(operands), next(operands) if scaled[1] else None
    c = next(operands)
    packed = {side: op.attrs.get(f"{side}_k_pack", "true") == "true" for side in ("lhs", "rhs")}
    lhs = decode(builder, a, op.attrs["lhs"], axis=1 if packed["lhs"] else 0)
    rhs = decode(builder, b, op.attrs["rhs"], axis=0 if packed["rhs"] else 1)
    if a_scale is not None:
        lhs = multiply(builder, lhs, factors(builder, a_scale, lhs.type.shape[1]))
    if b_scale is not None:
        rhs = multiply(builder, rhs, transposed(builder, factors(builder, b_scale, rhs.type.shape[0])))
    product = builder.make("tt.dot", [lhs, rhs, c], op.result.type, f"{op.result.name}_product", inputPrecision="ieee")
    replace_uses(body, op.result, product)
    at = block.ops.index(op)
    block.ops[at : at + 1] = builder.take()


def decode(builder: Builder, x: Value, kind: str, axis: int) -> Value:
    """`x` in fp32. axis: along which e2m1 has two elements in a byte."""
    wide = Type("f32", x.type.shape)
    if kind == "e2m1":
        return unpacked(builder, x, axis)
    if kind in FP8:
        if x.type.element != FP8[kind]:
            x = builder.make("tt.bitcast", [x], Type(FP8[kind], x.type.shape), f"{x.name}_{kind}")
        return builder.make("tt.fp_to_fp", [x], wide, f"{x.name}_wide")
    return builder.make("arith.extf", [x], wide, f"{x.name}_wide")


def unpacked(builder: Builder, x: Value, axis: int) -> Value:
    """Both e2m1 of each byte, the low four bits first, side by side along `axis`."""
    if axis == 0:
        return transposed(builder, unpacked(builder, transposed(builder, x), 1))
    rows, columns = x.type.shape
    codes = builder.make("arith.extui", [x], Type("i32", x.type.shape), f"{x.name}_codes")
    halves = [from_e2m1(builder, codes, shift, f"{x.name}_{name}") for shift, name in ((0, "low"), (4, "high"))]
    both = builder.make("tt.join", halves, Type("f32", (rows, columns, 2)), f"{x.name}_both")
    return builder.make("tt.reshape", [both], Type("f32", (rows, 2 * columns)), f"{x.name}_wide")


def from_e2m1(builder: Builder, codes: Value, shift: int, hint: str) -> Value:
    """Sign, two bits of exponent and one of mantissa, `shift` bits up: as fp32 with the exponent 126 too small."""
    shape = codes.type.shape

    def bits(name: str, value: Value, operand: int) -> Value:
        return builder.make(name, [value, builder.constant(str(operand), codes.type, f"{hint}_n")], codes.type, hint)

    code = bits("arith.shrui", codes, shift) if shift else codes
    magnitude = bits("arith.shli", bits("arith.andi", code, 7), 22)
    sign = bits("arith.shli", bits("arith.andi", code, 8), 28)
    pattern = builder.make("arith.ori", [magnitude, sign], codes.type, f"{hint}_bits")
    small = builder.make("arith.bitcast", [pattern], Type("f32", shape), f"{hint}_small")
    rescale = builder.constant(f"{2.0**126:e}", small.type, f"{hint}_scale")
    return builder.make("arith.mulf", [small, rescale], small.type, hint)


def factors(builder: Builder, scale: Value, k: int) -> Value:
    """What each element is multiplied by, [rows, k]: a scale of [rows, k // group] each `group` times."""
    rows, groups = scale.type.shape
    name, narrow = scale.name, Type("f32", scale.type.shape)
    value = powers_of_two(builder, scale) if scale.type.element == "i8" else None
    if value is None:
        value = builder.make("tt.fp_to_fp", [scale], narrow, f"{name}_wide")
    column = builder.make("tt.expand_dims", [value], Type("f32", (rows, groups, 1)), f"{name}_column", axis=2)
    each = builder.make("tt.broadcast", [column], Type("f32", (rows, groups, k // groups)), f"{name}_each")
    return builder.make("tt.reshape", [each], Type("f32", (rows, k)), f"{name}_factors")


def powers_of_two(builder: Builder, scale: Value) -> Value:
    """2^(scale - 127), from e8m0: the exponent of a float and nothing else; 2^-127 is half of its smallest."""
    name, wide = scale.name, Type("i32", scale.type.shape)

    def constant(value: int) -> Value:
        return builder.constant(str(value), wide, f"{name}_n")

    exponent = builder.make("arith.extui", [scale], wide, f"{name}_exponent")
    shifted = builder.make("arith.shli", [exponent, constant(23)], wide, f"{name}_shifted")
    pattern = builder.make("arith.maxui", [shifted, constant(1 << 22)], wide, f"{name}_bits")
    unknown = builder.make(
        "arith.cmpi", [exponent, constant(NAN_SCALE)], Type("i1", wide.shape), f"{name}_is_nan", words=["eq"]
    )
    pattern = builder.make("arith.select", [unknown, constant(0x7FC00000), pattern], wide, f"{name}_bits")
    return builder.make("arith.bitcast", [pattern], Type("f32", wide.shape), f"{name}_wide")


def multiply(builder: Builder, x: Value, by: Value) -> Value:
    return builder.make("arith.mulf", [x, by], x.type, f"{x.name}_scaled")


def transposed(builder: Builder, x: Value) -> Value:
    shape = Type(x.type.element, x.type.shape[::-1])
    return builder.make("tt.trans", [x], shape, f"{x.name}_t", order=(1, 0))
