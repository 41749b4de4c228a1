"""Print what gives elements other places: reshape, join, split, cat, gather; and histogram, which counts them."""

from dataclasses import replace

from .cells import Stored, closed, row_major
from .evaluate import Evaluator
from .ir import Op


class ShapePrinter:
    """Ops of RootPrinter that move elements, as views of an array where they can be."""

    def reshape(self, op: Op) -> None:
        source = self.kernel.storage[op.operands[0]]
        if source.strides != row_major(source.type.shape):
            packed = self.kernel.array(source.type, op.operands[0].name + "_packed")
            self.assign(packed, op.operands[0])
            source = packed
        shape = op.result.type.shape
        self.kernel.storage[op.result] = Stored(source.array, op.result.type, row_major(shape), source.offset)

    def join(self, op: Op) -> None:
        result = self.kernel.array(op.result.type, op.result.name + "_a")
        for k, operand in enumerate(op.operands):
            self.assign(Stored(result.array, operand.type, result.strides[:-1], k), operand)
        self.kernel.storage[op.result] = result

    def split(self, op: Op) -> None:
        source = self.kernel.storage[op.operands[0]]
        for k, result in enumerate(op.results):
            if result.type.is_tensor:
                self.kernel.storage[result] = Stored(
                    source.array, result.type, source.strides[:-1], source.offset + k * source.strides[-1]
                )
            else:
                self.kernel.let(result, f"{source.array}[{source.offset + k * source.strides[-1]}]")

    def cat(self, op: Op) -> None:
        result = self.kernel.array(op.result.type, op.result.name + "_a")
        offset = 0
        for operand in op.operands:
            self.assign(Stored(result.array, operand.type, row_major(operand.type.shape), offset), operand)
            offset += operand.type.numel
        self.kernel.storage[op.result] = result

    def unsplat(self, op: Op) -> None:
        source = op.operands[0]
        stored = self.kernel.storage.get(source) or self.materialize(source)
        self.kernel.let(op.result, f"{stored.array}[{stored.offset}]")

    def gather(self, op: Op) -> None:
        """result[i, j] = source[index[i, j], j] along the axis."""
        source, index = op.operands
        axis = op.attrs["axis"]
        stored = self.kernel.storage[source]
        result = self.kernel.array(op.result.type, op.result.name + "_a")
        nest = self.nest(op.result.type.shape, None, 1)
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            place = evaluator.at(index, at)
            inside = f"(uint64_t)({place.text}) < {source.type.shape[axis]}"  # elsewhere any element will do
            text = f"({inside} ? (int32_t)({place.text}) : 0)"
            moved = tuple(replace(i, text=text, level=nest.depth) if d == axis else i for d, i in enumerate(at))
            for line in evaluator.write(result, at, evaluator.read(stored, moved, source)):
                nest.add(nest.depth, line)

        self.finish(nest.render(body))
        self.kernel.storage[op.result] = result

    def histogram(self, op: Op) -> None:
        """How often each of 0 .. bins - 1 occurs; other values are not counted."""
        values, *masks = op.operands
        result = self.kernel.array(op.result.type, op.result.name + "_a")
        self.kernel.emit(f"for (int32_t bin = 0; bin < {op.result.type.numel}; ++bin) {result.array}[bin] = 0;")
        nest = self.nest(values.type.shape, None, 1)
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            value = closed(evaluator.at(values, at).text)
            counted = [f"(uint64_t){value} < {op.result.type.numel}"]
            counted += [closed(evaluator.at(mask, at).text) for mask in masks]
            nest.add(nest.depth, f"if ({' && '.join(counted)}) ++{result.array}[{value}];")

        self.finish(nest.render(body))
        self.kernel.storage[op.result] = result
