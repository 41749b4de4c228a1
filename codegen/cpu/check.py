"""Debug mode: every access is looked at before it happens, against the tensor that its pointer came from.

    tt.load %x, %mask   -->   check.bounds %x, %mask {access = "load", base = x_ptr}
                              tt.load %x, %mask

    for (int32_t i = 0; i < 64; ++i)
      if (i < n && !check::inside(x_ptr + i, 4, extents[0])) report::fail("kernel.py:12: ... out of bounds: load ...");
    if (report::failed()) return;

Pointers are followed through arithmetic and views to the argument they began as; where that is not one argument, the
access must lie in any of the launch's tensors. The launch raises OutOfBounds after the program stopped.
"""

from collections.abc import Sequence

from .c_types import BYTES
from .cells import closed
from .evaluate import Evaluator
from .ir import EXTENTS, Block, Function, Op, Value
from .plan import ACCESSES
from .report import PROGRAM_ID, c_format

THROUGH = frozenset(("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans", "tt.unsplat"))
ACCESS_NAMES = {"tt.load": "load", "tt.store": "store", "tt.atomic_rmw": "atomic", "tt.atomic_cas": "atomic"}
UNKNOWN = (0, 2**63 - 1)


def insert_checks(function: Function) -> None:
    """Put a check before every access to memory and every tt.gather, in place."""
    for block in blocks_of(function.body):
        checked: list[Op] = []
        for op in block.ops:
            if op.name in ACCESSES:
                pointer, *rest = op.operands
                masks = [v for v in rest[0 if op.name == "tt.load" else 1 :][:1] if op.name != "tt.atomic_cas"]
                attrs = {"access": ACCESS_NAMES[op.name], "base": base_of(pointer, function.args)}
                checked.append(Op("check.bounds", [pointer, *masks], attrs=attrs, location=op.location))
            elif op.name == "tt.gather":
                attrs = {"size": op.operands[0].type.shape[op.attrs["axis"]]}
                checked.append(Op("check.index", op.operands[1:2], attrs=attrs, location=op.location))
            checked.append(op)
        block.ops = checked
    function.number()


def blocks_of(block: Block) -> list[Block]:
    return [block, *(inner for op in block.walk() for inner in op.blocks)]


def base_of(pointer: Value, arguments: Sequence[Value]) -> Value | None:
    """The argument that `pointer` was computed from; None where it may be one of several, or a number."""
    while pointer not in arguments:
        if pointer.op is None or pointer.op.name not in THROUGH:
            return None
        pointer = pointer.op.operands[0]
    return pointer


class CheckPrinter:
    """The part of RootPrinter that prints checks."""

    def bounds(self, op: Op) -> None:
        pointer, base = op.operands[0], op.attrs["base"]
        pointers = [arg for arg in self.kernel.function.args if arg.type.element == "ptr"]
        size = BYTES.get(pointer.type.pointee, 8)
        what = f"out of bounds: {op.attrs['access']} of {pointer.type.pointee}"
        if base is None:
            what += " at address %p, outside of all the launch's tensors"
            test, values = f"check::inside_any({{0}}, {size}, {EXTENTS}, {len(pointers)})", "(const void *)({0})"
        else:
            extent = f"{EXTENTS}[{pointers.index(base)}]"
            what += f" at element %lli of {base.name}, which has %lli (byte %lli of %lli)"
            test, values = f"check::inside({{0}}, {size}, {extent})", f"CHECK_PLACE({{0}}, {size}, {extent})"
        self.check_elements(op, what, test, values)

    def index(self, op: Op) -> None:
        size = op.attrs["size"]
        what = f"out of bounds: tl.gather of element %lli along an axis of {size}"
        self.check_elements(op, what, f"(uint64_t)({{0}}) < {size}", "(long long)({0})")

    def check_elements(self, op: Op, what: str, test: str, values: str) -> None:
        """Fail where `test` of an element of op's first operand does not hold, its mask in the second."""
        path, line_number = op.location or ("?", 0)
        head = c_format(f"{path}:{line_number}: {self.kernel.name}: ") + "program (%i, %i, %i)"

        def line(texts: list[str], places: list[str]) -> str:
            where = f" at [{', '.join(['%i'] * len(places))}]" if places else ""
            masks = "".join(f"{closed(mask)} && " for mask in texts[1:])
            arguments = ", ".join([PROGRAM_ID, *places, values.format(texts[0])])
            return f'if ({masks}!({test.format(texts[0])})) report::fail("{head}{where}: {what}", {arguments});'

        if op.operands[0].type.is_tensor:
            nest = self.nest(op.operands[0].type.shape, None, 1)
            evaluator = Evaluator(self.kernel, nest)

            def body(_copy: int) -> None:
                at = nest.indices()
                texts = [evaluator.at(value, at).text for value in op.operands]
                nest.add(nest.depth, line(texts, [f"(int)({index.text})" for index in at]))

            self.finish(nest.render(body))
        else:
            self.kernel.emit(line([self.kernel.text(value) for value in op.operands], []))
        self.kernel.emit("if (report::failed()) return;")


def extent(argument: object) -> tuple[int, int]:
    """First byte of a tensor's elements, and the one after the last; everything for what is only an address."""
    tensor = getattr(argument, "base", argument)  # triton.reinterpret wraps a tensor
    if not hasattr(tensor, "stride"):
        return UNKNOWN
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
