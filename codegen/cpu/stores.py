"""Print stores. All pointers may alias: what a store may overtake inside its own value goes through an array first."""

from dataclasses import replace

from .affine import Affine, conjuncts
from .c_types import BYTES
from .cells import Stored
from .evaluate import Evaluator
from .ir import Op, Type, Value


class StorePrinter:
    """tt.store of RootPrinter."""

    def store(self, op: Op) -> None:
        pointer, value = op.operands[:2]
        if not pointer.type.is_tensor:
            self.kernel.scalar_store(op)
            return
        identity = tuple(range(len(pointer.type.shape)))
        hazards = self.hazards(op)
        target = self.analysis.of(pointer, identity)
        shape = pointer.type.shape
        vector_dim, width = self.vector_dim(shape, [value], pointer)
        contiguous = target is not None and vector_dim is not None and target.coefficient(vector_dim) == 1 and width > 1
        if hazards and (None in hazards or not contiguous):
            parts = conjuncts(op.operands[2], identity, self.analysis) if len(op.operands) > 2 else []
            self.copy_out(value, [part for part in parts if part.dim is not None])  # past them, indices may be unset
            hazards = []
        if not hazards:
            self.store_nest(op, value, vector_dim, width, None)
            return
        self.kernel.emit("{")
        self.kernel.indent += 1
        shared = self.kernel.fresh("shared")
        checks = " || ".join(dict.fromkeys(hazards))
        self.kernel.emit(f"const bool {shared} = {checks};  // what is stored may be read again: go through an array")
        aside = self.kernel.array(Type(value.type.element, shape), value.name + "_aside")
        aside = replace(aside, type=Type(value.type.element, shape))
        self.store_nest(op, value, vector_dim, width, (shared, aside))
        saved = self.kernel.storage.get(value)
        self.kernel.storage[value] = aside
        self.kernel.emit(f"if ({shared}) {{")
        self.kernel.indent += 1
        self.store_nest(op, value, vector_dim, width, None)
        self.kernel.indent -= 1
        self.kernel.emit("}")
        if saved is None:
            del self.kernel.storage[value]
        else:
            self.kernel.storage[value] = saved
        self.kernel.indent -= 1
        self.kernel.emit("}")

    def hazards(self, op: Op) -> list[str | None]:
        """When the store itself may overtake a load inside its value: C++ conditions, None for one that is unknown.

        Where both address the same elements, that is when several lanes do: all of them read before any writes.
        """
        pointer, value = op.operands[:2]
        shape = pointer.type.shape
        identity = tuple(range(len(shape)))
        found: list[str | None] = []
        target = self.analysis.of(pointer, identity)
        for read, at in self.reads(value, identity):
            if read in self.kernel.storage:
                continue
            form = self.analysis.of(read.op.operands[0], at)
            if form is None or target is None:
                found.append(None)
            elif form == target:
                check = meeting_check(target, shape)
                found += [check] if check != "false" else []
            else:
                found.append(overlap_check(form, read.op, target, op, shape))
        return [None if check == "true" else check for check in found]

    def store_nest(
        self, op: Op, value: Value, vector_dim: int | None, width: int, aside: tuple[str, Stored] | None
    ) -> None:
        pointer, _, *masks = op.operands
        shape = pointer.type.shape
        nest = self.nest(shape, vector_dim, width)
        identity = tuple(range(len(shape)))
        guards = self.clip(nest, conjuncts(masks[0], identity, self.analysis)) if masks else []
        evaluator = Evaluator(self.kernel, nest)

        def body(_copy: int) -> None:
            at = nest.indices()
            mask = evaluator.at(masks[0], at) if masks else None
            cell = evaluator.at(value, at)
            to = evaluator.at(pointer, at)
            lines = evaluator.store(to, cell, mask, value.type)
            if aside is not None:
                shared, stored = aside
                lines = [f"if ({shared}) {line}" for line in evaluator.write(stored, at, cell)] + [
                    f"else {line}" for line in lines
                ]
            for line in lines:
                nest.add(nest.depth, line)

        self.finish(nest.render(body), guards)


def overlap_check(form: Affine, load: Op, target: Affine, store: Op, shape: tuple[int, ...]) -> str:
    """C++: whether the bytes of a load and of a store meet, other than element on element."""
    source_pointer, target_pointer = load.operands[0].type, store.operands[0].type
    check = f"overlap({span(form, shape)}, {span(target, shape)})"
    same_size = BYTES.get(source_pointer.pointee) == BYTES.get(target_pointer.pointee)
    if same_size and form.coefficients == target.coefficients:
        differ = f"(const void *)({form.base()}) != (const void *)({target.base()})"
        meet = meeting_check(target, shape)
        return f"(({differ}{'' if meet == 'false' else f' || {meet}'}) && {check})"
    return check


def meeting_check(form: Affine, shape: tuple[int, ...]) -> str:
    """C++: whether two elements of a tile may have one address."""
    wide = [(form.coefficient(dim), size) for dim, size in enumerate(shape) if size > 1]
    if all(isinstance(coefficient, int) for coefficient, _ in wide):
        reach = 0
        for coefficient, size in sorted((abs(coefficient), size) for coefficient, size in wide):
            if coefficient <= reach:
                return "true"
            reach += coefficient * (size - 1)
        return "false"
    strides, sizes = zip(*wide, strict=True)
    return f"lanes_meet<{len(wide)}>({{{', '.join(map(str, strides))}}}, {{{', '.join(map(str, sizes))}}})"


def span(form: Affine, shape: tuple[int, ...]) -> str:
    reaches = []
    for dim, coefficient in form.coefficients:
        steps = shape[dim] - 1
        reaches.append(
            str(coefficient * steps) if isinstance(coefficient, int) else f"(int64_t)({coefficient}) * {steps}"
        )
    return f"span({', '.join([form.base(), *reaches])})"
