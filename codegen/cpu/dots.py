"""Print tt.dot: where its operands are, how far they go, and which array it adds to. The product itself is dot.py's."""

from dataclasses import replace

from .affine import Map, conjuncts, through_view
from .c_types import HALF, lanes_type, parse_literal
from .cells import Stored
from .dot import DotCode, Operand, clipped, emit_dot, emit_dot_of_words
from .ir import Op, Value, unsupported
from .nest import indented
from .ranges import largest_byte


class DotPrinter:
    """Dots of RootPrinter."""

    def dot(self, op: Op) -> None:
        a, b, c = op.operands
        shape, element = op.result.type.shape, op.result.type.element
        if element not in ("f32", "i32", "f64"):
            raise unsupported(op, f"of {element}{list(shape)} is not supported")
        if len(shape) == 3 or element == "f64":
            self.product_of_arrays(op)
            return
        m, n = shape
        k = a.type.shape[1]
        of_words = b.type.element == "i32" and a.type.element == "i8"
        if of_words and self.puts_off(op):
            return
        target = self.dot_target(op, c) or self.kernel.array(op.result.type, op.result.name + "_a")
        fresh = is_zero(c) and not of_words
        if self.kernel.storage.get(c) is not target and not fresh:
            self.assign(target, c)
        left, limits = self.dot_operand(a, (0, 2))
        if of_words:
            rows, depth = (clipped(limits.get(dim, []), size) or str(size) for dim, size in ((0, m), (2, k)))
            code = emit_dot_of_words(
                left, self.words_operand(b), target.array, (m, n, k),
                lanes=self.kernel.lanes, most=largest_byte(b), rows=rows, depth=depth,
            )  # fmt: skip
            self.add_dot(op, code, target)
            return
        right, more = self.dot_operand(b, (2, 1))
        ends = {dim: list(dict.fromkeys(limits.get(dim, []) + more.get(dim, []))) for dim in (0, 1, 2)}
        size = {0: m, 1: n, 2: k}
        rows, cols, depth = (clipped(ends[dim], size[dim]) for dim in (0, 1, 2))
        code = emit_dot(
            left,
            right,
            target.array,
            (m, n, k),
            lanes=self.kernel.lanes,
            rows=rows,
            cols=cols,
            depth=depth,
            fresh=fresh,
        )
        self.add_dot(op, code, target)

    def add_dot(self, op: Op, code: DotCode, target: Stored) -> None:
        self.kernel.helpers.update(dict.fromkeys(code.helpers))
        self.kernel.emit_all(["{", *("  " + line for line in code.body), "}"])
        self.kernel.storage[op.result] = target

    def product_of_arrays(self, op: Op) -> None:
        """A batch of products, or one in f64: every operand goes to an array."""
        a, b, c = op.operands
        *batch, m, n = op.result.type.shape
        k = a.type.shape[-1]
        target = self.dot_target(op, c) or self.kernel.array(op.result.type, op.result.name + "_a")
        if self.kernel.storage.get(c) is not target:
            self.assign(target, c)
        left, right = self.materialize_here(a), self.materialize_here(b)
        z = self.kernel.fresh("z")
        at = {
            x.array: f"{x.array} + {z} * {x.type.numel // batch[0]}" if batch else x.array
            for x in (left, right, target)
        }
        if op.result.type.element == "f64" or m * n < 16:
            width = min(self.kernel.lanes, n)
            kinds = [lanes_type(x.type.element, 1) for x in (target, right)]
            arguments = f"{at[left.array]}, {at[right.array]}, {at[target.array]}"
            lines = [f"plain_product<{width}, {m}, {n}, {k}, {kinds[0]}, {kinds[1]}>({arguments});"]
        else:
            operands = [
                self.stored_operand(replace(x, array=at[x.array], strides=x.strides[-2:]), dims, dims)
                for x, dims in ((left, (0, 2)), (right, (2, 1)))
            ]
            code = emit_dot(*operands, at[target.array], (m, n, k), lanes=self.kernel.lanes)
            self.kernel.helpers.update(dict.fromkeys(code.helpers))
            lines = code.body
        head = f"for (int32_t {z} = 0; {z} < {batch[0]}; ++{z}) {{" if batch else "{"
        self.kernel.emit_all([head, *indented(lines), "}"])
        self.kernel.storage[op.result] = target

    def dot_target(self, op: Op, c: Value) -> Stored | None:
        """The carried array that the dot may add to in place: its old value is read by nothing later."""
        block = op.parent
        loop = block.parent if block is not None else None
        if loop is None or loop.name != "scf.for":
            return None
        for arg, yielded in zip(block.args[1:], block.ops[-1].operands, strict=True):
            if yielded is not op.result or not arg.type.is_tensor:
                continue
            stored = self.kernel.storage[arg]
            late = [use for use in self.plan.consumers(arg) if use is not op and use.position >= op.position]
            early_views = [use for use in arg.uses if use.name in ("tt.reshape", "tt.split")]
            in_operands = any(self.reads_array(operand, stored.array) for operand in op.operands[:2])
            if not late and not early_views and not in_operands and not self.reads_array(c, stored.array, moved=True):
                return stored
        return None

    def dot_operand(self, value: Value, dims: tuple[int, int]) -> tuple[Operand, dict[int, list]]:
        """Where the dot finds an operand: in memory as it was loaded, else in an array. dims: the dot's dimensions
        (0 rows, 1 columns, 2 depth) of the operand's two."""
        at: Map = dims
        source = value
        while source not in self.kernel.storage and source.op is not None:
            if (
                source.op.name == "arith.extf"
                and source.type.element == "f32"
                and source.op.operands[0].type.element in HALF
            ):
                source = source.op.operands[0]
            elif (inner := through_view(source, at)) is not None and None not in inner[1]:
                source, at = inner
            else:
                break
        if source in self.kernel.storage and source.type.element not in ("i1", "ptr"):
            return self.stored_operand(self.kernel.storage[source], at, dims), {}
        is_load = source.op is not None and source.op.name == "tt.load" and source not in self.kernel.storage
        if is_load and (found := self.loaded_operand(source.op, at, dims)) is not None:
            return found
        stored = self.kernel.storage.get(value) or self.materialize_here(value)
        return self.stored_operand(stored, dims, dims), {}

    def words_operand(self, words: Value) -> Operand:
        """Where the words of a right operand are: in memory as they were loaded, else in an array."""
        load = words.op
        if words not in self.kernel.storage and load is not None and load.name == "tt.load" and len(load.operands) == 1:
            form = self.analysis.of(load.operands[0], (0, 1))
            if form is not None and form.coefficient(1) == 1:
                return Operand(form.base(), str(form.coefficient(0)), "1", "i32")
        stored = self.kernel.storage.get(words)
        if stored is None or stored.strides[1] != 1:
            stored = self.materialize_here(words)
        return self.stored_operand(stored, (0, 1), (0, 1))

    def materialize_here(self, value: Value) -> Stored:
        stored = self.kernel.array(value.type, value.name + "_tile")
        self.assign(stored, value)
        return stored

    def stored_operand(self, stored: Stored, at: Map, dims: tuple[int, int]) -> Operand:
        stride = {dims[0]: 0, dims[1]: 0} | dict(zip(at, stored.strides, strict=True))
        dtype = {"i8": "i8"}.get(stored.type.element, "fp32")
        values = {"bf16": "bf16"}.get(stored.type.element, "")  # arrays hold 16-bit floats as fp32
        pointer = stored.array + (f" + {stored.offset}" if stored.offset else "")
        return Operand(pointer, str(stride[dims[0]]), str(stride[dims[1]]), dtype, values)

    def loaded_operand(self, load: Op, at: Map, dims: tuple[int, int]) -> tuple[Operand, dict[int, list]] | None:
        form = self.analysis.of(load.operands[0], at)
        dtype = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "i8"}.get(load.result.type.element)
        if form is None or dtype is None:
            return None
        limits: dict[int, list] = {}
        if len(load.operands) > 1:
            for part in conjuncts(load.operands[1], at, self.analysis):
                if part.dim is None:
                    if not part.uniform:
                        return None
                    limits.setdefault(2, []).append(f"({self.kernel.text(part.leaf)} ? {load.result.type.numel} : 0)")
                else:
                    limits.setdefault(part.dim, []).append(part.end)
            if len(load.operands) > 2 and not is_zero(load.operands[2]):
                return None
        strides = [str(form.coefficient(dim)) for dim in dims]
        return Operand(form.base(), strides[0], strides[1], dtype), limits


def is_zero(value: Value) -> bool:
    """Whether a value is the constant 0, or a tensor of it."""
    while value.op is not None and value.op.name in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
        value = value.op.operands[0]
    constant = value.op is not None and value.op.name == "arith.constant"
    return constant and parse_literal(value.op.attrs["value"], value.type.element) == 0
