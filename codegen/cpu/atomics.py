"""Print tt.atomic_rmw and tt.atomic_cas: one element at a time; other programs of the grid may run meanwhile."""

from collections.abc import Callable

from .evaluate import Evaluator
from .ir import Op, Value
from .spelling import HALF, lanes_type, pointee_type, unsupported

HALF_UPDATES = {"fadd": "was + {0}", "max": "max_number<float>(was, {0})", "min": "min_number<float>(was, {0})"}
HALF_UPDATES |= {"exch": "{0}"}


class AtomicPrinter:
    """The part of RootPrinter that prints atomics. Lanes that are masked off give 0 and touch no memory."""

    def atomic(self, op: Op) -> None:
        pointer, values, masks = op.operands[0], op.operands[1:], []
        if op.name == "tt.atomic_rmw":
            values, masks = op.operands[1:2], op.operands[2:]
        element, shape = op.result.type.element, op.result.type.shape

        def call(text: Callable[[Value], str]) -> str:
            done = atomic_call(op, text(pointer), [text(value) for value in values])
            return f"{text(masks[0])} ? {done} : {lanes_type(element, 1)}()" if masks else done

        if not shape:
            self.kernel.let(op.result, call(self.kernel.text))
            return
        for operand in op.operands:  # every read comes before the first write
            for read, _ in list(self.reads(operand, tuple(range(len(shape))))):
                if read not in self.kernel.storage:
                    self.materialize(read)
        result = self.kernel.array(op.result.type, op.result.name + "_a") if op.result.uses else None
        nest = self.nest(shape, None, 1)
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            text = call(lambda value: evaluator.at(value, at).text)
            old = nest.let(nest.depth, lanes_type(element, 1), op.result.name, text)
            if result is not None:
                place = " + ".join(f"{i.text} * {s}" for i, s in zip(at, result.strides, strict=True))
                nest.add(nest.depth, f"{result.array}[{place}] = {old};")

        self.finish(nest.render(body))
        if result is not None:
            self.kernel.storage[op.result] = result


def atomic_call(op: Op, pointer: str, values: list[str]) -> str:
    """C++ that updates one element and is its old value."""
    element, memory = op.result.type.element, pointee_type(op.operands[0].type)
    if element not in ("i8", "i16", "i32", "i64", "f32", "f64", *HALF):
        raise unsupported(op, f"of {element} is not supported")
    if op.name == "tt.atomic_cas":
        if element in HALF:
            values = [f"to_{element}({value})" for value in values]
        done = f"compare_exchange<{memory}>({', '.join([pointer, *values])})"
    elif element in HALF:
        word = op.attrs["words"][0]
        if word not in HALF_UPDATES:
            raise unsupported(op, f"{word} of {element} is not supported")
        was = f"const float was = from_{element}<float>(bits);"
        change = f"{was} return to_{element}({HALF_UPDATES[word].format(values[0])});"
        done = f"atomic_update({pointer}, [=](uint16_t bits) {{ {change} }})"
    else:
        done = f"atomic_{op.attrs['words'][0]}<{memory}>({pointer}, {values[0]})"
    return f"from_{element}<float>({done})" if element in HALF else done
