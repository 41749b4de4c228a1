"""Print what a kernel tells its user while it runs: device_print and device_assert (`tt.print`, `tt.assert`).

A line of device_print is as on a GPU: `pid (0, 0, 0) idx (17) prefix: 1.5 (operand 0)`, one for each element. A failed
device_assert ends its program; the launch raises after it, with the line, the program and the element.
"""

import math

from .c_types import BYTES, SMALL_FLOATS
from .cells import closed
from .evaluate import Evaluator
from .ir import Op, Type, Value
from .nest import Nest

PROGRAM_ID = "(int)pid_x, (int)pid_y, (int)pid_z"


class ReportPrinter:
    """The part of RootPrinter that prints tt.print and tt.assert."""

    def device_print(self, op: Op) -> None:
        prefix = c_format(op.attrs["text"])
        if not op.operands:
            self.kernel.emit(f'report::print("pid (%i, %i, %i){prefix}\\n", {PROGRAM_ID});')
        signs = op.attrs.get("isSigned", ())
        for k, (operand, signed) in enumerate(zip(op.operands, signs, strict=True)):
            which = f"(operand {k}) " if len(op.operands) > 1 else ""
            spec, cast = value_format(operand.type, bool(signed), op.attrs.get("hex") == "true")

            def line(value: str, places: list[str], operand=operand, which=which, spec=spec, cast=cast) -> str:
                widths = [str(math.ceil(math.log10(size))) if size > 1 else "" for size in operand.type.shape]
                index = ", ".join(f"%{width}i" for width in widths)
                form = f'"pid (%i, %i, %i) idx ({index}){prefix}{which}{spec}\\n"'
                return f"report::print({', '.join([form, PROGRAM_ID, *places, cast.format(value)])});"

            self.for_each_element(operand, line)
        self.kernel.emit("report::flush();")

    def device_assert(self, op: Op) -> None:
        condition = op.operands[0]
        path, line_number = op.location or ("?", 0)

        def line(value: str, places: list[str]) -> str:
            where = f" at [{', '.join(['%i'] * len(places))}]" if places else ""
            form = c_format(f"{path}:{line_number}: {self.kernel.name}: ") + "program (%i, %i, %i)" + where
            form += ": device_assert failed: " + c_format(op.attrs["text"])
            return (
                f"if (!{closed(value)}) report::fail({', '.join([f'{chr(34)}{form}{chr(34)}', PROGRAM_ID, *places])});"
            )

        self.for_each_element(condition, line)
        self.kernel.emit("if (report::failed()) return;")

    def for_each_element(self, value: Value, line) -> None:
        """Emit `line(value, indices)` for each element, in order."""
        if not value.type.is_tensor:
            self.kernel.emit(line(self.kernel.text(value), []))
            return
        nest: Nest = self.nest(value.type.shape, None, 1)
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            text = evaluator.at(value, at).text
            nest.add(nest.depth, line(text, [f"(int)({index.text})" for index in at]))

        self.finish(nest.render(body))


def value_format(type_: Type, signed: bool, as_hex: bool) -> tuple[str, str]:
    """printf's conversion for a value of `type_`, and the C++ cast of the argument ({} is the value)."""
    element = type_.element
    if element == "ptr":
        return "%p", "(void *)({})"
    size = BYTES[element]
    if as_hex:
        if element in SMALL_FLOATS:
            return f"0x%0{2 * size}x", f"(unsigned)to_{element}({{}})"
        word = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}[size]
        code = f"bits<{word}>({{}})" if type_.is_float else f"({word})({{}})"
        if size == 8:
            return "0x%016llx", f"(unsigned long long){code}"
        return f"0x%0{2 * size}x", f"(unsigned){code}"
    if type_.is_float:
        return "%f", "(double)({})"
    if size == 8:
        return ("%lli", "(long long)({})") if signed else ("%llu", "(unsigned long long)({})")
    if signed:
        return "%i", "(int)({})"
    return "%u", "({})" if element == "i1" else f"(unsigned)(uint{8 * size}_t)({{}})"


def c_format(text: str) -> str:
    """`text` inside a C string literal that printf reads."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "%": "%%"}
    return "".join(escapes.get(char) or (char if char.isprintable() else f"\\{ord(char):03o}") for char in text)
