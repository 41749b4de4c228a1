"""Print tt.map_elementwise: a scalar function, with control flow of its own, over the elements of blocks."""

from .cells import Stored, row_major
from .ir import Op, Value


class MapPrinter:
    """The part of RootPrinter that maps a region over elements, `pack` neighbours in row-major order at a time."""

    def map_elementwise(self, op: Op) -> None:
        kernel, block, pack = self.kernel, op.blocks[0], op.attrs["pack"]
        sources = [self.packed(operand) for operand in op.operands]
        results = [kernel.array(result.type, f"{result.name}_a") for result in op.results]
        element = kernel.fresh("element")
        size = op.operands[0].type.numel
        kernel.emit(f"for (int32_t {element} = 0; {element} < {size}; {element} += {pack}) {{")
        kernel.indent += 1
        for k, arg in enumerate(block.args):
            source = sources[k // pack]
            kernel.let(arg, f"{source.array}[{element} + {source.offset + k % pack}]")
        kernel.block(block)
        for k, value in enumerate(block.ops[-1].operands):
            kernel.emit(f"{results[k // pack].array}[{element} + {k % pack}] = {kernel.text(value)};")
        kernel.indent -= 1
        kernel.emit("}")
        kernel.storage.update(zip(op.results, results, strict=True))

    def packed(self, value: Value) -> Stored:
        """`value` in an array without gaps, in row-major order."""
        stored = self.kernel.storage.get(value) or self.materialize(value)
        if stored.strides == row_major(value.type.shape):
            return stored
        copy = self.kernel.array(value.type, f"{value.name}_packed")
        self.assign(copy, value)
        return copy
