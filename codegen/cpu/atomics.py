"""Print atomics: one element at a time; other programs of the grid may run meanwhile."""

from collections.abc import Callable

from .c_types import HALF, lanes_type, pointee_type
from .evaluate import Evaluator
from .ir import Op, Value, unsupported

HALF_UPDATES = {"fadd": "was + {0}", "max": "max_number<float>(was, {0})", "min": "min_number<float>(was, {0})"}
HALF_UPDATES |= {"exch": "{0}"}
VALUES = {"tt.atomic_rmw": 1, "tt.atomic_cas": 2, "tt.atomic_load": 0, "tt.atomic_store": 1}  # operands before a mask


class AtomicPrinter:
    """The part of RootPrinter that prints atomics. Lanes that are masked off give 0 and touch no memory."""

    def atomic(self, op: Op) -> None:
        pointer, *values = op.operands
        masks = values[VALUES[op.name] :]
        del values[VALUES[op.name] :]
        element, shape = pointer.type.pointee, pointer.type.shape

        def call(text: Callable[[Value], str]) -> str:
            done = atomic_call(op, text(pointer), [text(value) for value in values])
            return f"{text(masks[0])} ? {done} : {lanes_type(element, 1)}()" if masks else done

        if not shape:
            done = call(self.kernel.text)
            self.kernel.let(op.result, done) if op.results else self.kernel.emit(f"(void)({done});")
            return
        for operand in op.operands:  # every read comes before the first write
            for read, _ in list(self.reads(operand, tuple(range(len(shape))))):
                if read not in self.kernel.storage:
                    self.materialize(read)
        result = self.kernel.array(op.result.type, op.result.name + "_a") if op.results and op.result.uses else None
        nest = self.nest(shape, None, 1)
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            text = call(lambda value: evaluator.at(value, at).text)
            old = nest.let(nest.depth, lanes_type(element, 1), op.result.name if op.results else "old", text)
            if result is not None:
                place = " + ".join(f"{i.text} * {s}" for i, s in zip(at, result.strides, strict=True))
                nest.add(nest.depth, f"{result.array}[{place}] = {old};")

        self.finish(nest.render(body))
        if result is not None:
            self.kernel.storage[op.result] = result


def atomic_call(op: Op, pointer: str, values: list[str]) -> str:
    """C++ that updates one element and is its old value."""
    element, memory = op.operands[0].type.pointee, pointee_type(op.operands[0].type)
    if element not in ("i8", "i16", "i32", "i64", "f32", "f64", *HALF):
        raise unsupported(op, f"of {element} is not supported")
    if op.name == "tt.atomic_load":
        done = f"atomic_read<{memory}>({pointer})"
    elif op.name == "tt.atomic_cas":
        if element in HALF:
            values = [f"to_{element}({value})" for value in values]
        done = f"compare_exchange<{memory}>({', '.join([pointer, *values])})"
    elif element in HALF:
        word = update(op)
        if word not in HALF_UPDATES:
            raise unsupported(op, f"{word} of {element} is not supported")
        was = f"const float was = from_{element}<float>(bits);"
        change = f"{was} return to_{element}({HALF_UPDATES[word].format(values[0])});"
        done = f"atomic_update({pointer}, [=](uint16_t bits) {{ {change} }})"
    else:
        done = f"atomic_{update(op)}<{memory}>({pointer}, {values[0]})"
    return f"from_{element}<float>({done})" if element in HALF else done


def update(op: Op) -> str:
    """The word of Triton IR for what tt.atomic_rmw does; a store is an exchange."""
    return "exch" if op.name == "tt.atomic_store" else str(op.attrs["words"][0])
