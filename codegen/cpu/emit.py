"""Print a kernel: scalars and control flow as they stand, tensors through the nests of `roots`."""

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ...compiler.errors import TooLargeKernel
from .c_types import BYTES, SCALAR, scalar_type
from .cells import LARGE, Cell, Stored, constant_cell, constant_zero, row_major
from .ir import EXTENTS, GRID, PROGRAM, Block, Function, Op, Type, Value, unsupported
from .memory import from_memory, to_memory
from .plan import Plan, is_lazy
from .roots import RootPrinter
from .spelling import is_elementwise, spell

AXES = {"x": 0, "y": 1, "z": 2}
REGISTERS = {16: 32, 8: 16, 4: 16}  # of vectors, by their lanes
IGNORED = frozenset(("ttg.barrier", "gpu.barrier", "llvm.intr.assume", "ub.poison"))
IGNORED |= {"scf.yield", "scf.condition", "tt.map_elementwise.return", "tt.reduce.return", "tt.scan.return"}
CONTROL = {"scf.for": "print_for", "scf.if": "print_if", "scf.while": "print_while"}
CONTROL |= {"scf.execute_region": "print_region"}
# Of an integer that is computed from others: a power of two that divides it, from those that divide them; and what is
# not negative where they are not.
DIVISORS = dict.fromkeys(("arith.addi", "arith.subi", "arith.minsi", "arith.maxsi"), min)
DIVISORS |= {"arith.muli": operator.mul, "arith.extsi": lambda x: x, "arith.select": lambda _, x, y: min(x, y)}
NOT_NEGATIVE = frozenset(
    ("arith.muli", "arith.addi", "arith.divsi", "arith.remsi", "arith.minsi", "arith.maxsi", "arith.extsi")
)
STACK_LIMIT = 256 << 10  # bytes of arrays on the stack: on some systems threads have 512 KiB
SCRATCH_LIMIT = 64 << 20  # bytes of arrays of one program, wherever they lie


class KernelPrinter:
    """State of printing one kernel: lines so far, arrays of stored tensors, facts about scalars."""

    def __init__(self, function: Function, name: str, lanes: int, checked: bool = False):
        self.function, self.name, self.lanes = function, name, lanes
        self.checked = checked
        tensors = (value.type for op in function.body.walk() for value in op.results if value.type.is_tensor)
        self.has_doubles = any(type_.element == "f64" for type_ in tensors)
        self.plan = Plan(function)
        self.analysis = self.plan.analysis
        self.storage: dict[Value, Stored] = {}
        self.helpers: dict[str, None] = {}
        self.lines: list[str] = []
        self.indent = 1
        self.names = {value.name for value in (*function.args, *function.body.values())} | {*PROGRAM, *GRID}
        self.nonnegative: set[Value] = set()
        self.scratch_bytes = 0
        self.arrays: list[tuple[int, str, str, int, int]] = []  # line, element, name, size, first byte in the scratch
        self.roots = RootPrinter(self)
        self.regions: list[tuple[list[Value], str]] = []  # results of the inlined functions around, and their labels
        self.last_location: tuple[str, int] | None = None
        self.analysis.divisors |= function.divisors

    # -- text

    def emit(self, line: str) -> None:
        self.lines.append("  " * self.indent + line)

    def emit_all(self, lines: list[str]) -> None:
        for line in lines:
            self.emit(line)

    def fresh(self, hint: str) -> str:
        unique, count = hint, 1
        while unique in self.names:
            count += 1
            unique = f"{hint}_{count}"
        self.names.add(unique)
        return unique

    def comment(self, op: Op) -> None:
        """The line of Triton source that the following statements stand for."""
        if op.location is None or op.location == self.last_location:
            return
        self.last_location = op.location
        path, line = op.location
        self.emit(f"// {os.path.basename(path)}:{line}{source_line(path, line)}")

    def array(self, value_type: Type, hint: str) -> Stored:
        name = self.fresh(hint)
        element, start = array_type(value_type), self.scratch_bytes
        self.scratch_bytes += -(-value_type.numel * array_bytes(value_type) // 64) * 64
        if self.scratch_bytes > SCRATCH_LIMIT:
            raise TooLargeKernel(
                f"the arrays of its blocks need more than {SCRATCH_LIMIT >> 20} MiB on CPU; use smaller blocks",
                self.scratch_bytes,
                SCRATCH_LIMIT,
            )
        self.arrays.append((len(self.lines), element, name, value_type.numel, start))
        self.emit(f"alignas(64) {element} {name}[{value_type.numel}];")
        return Stored(name, value_type, row_major(value_type.shape))

    def move_arrays(self) -> list[str]:
        """Put the arrays of a kernel that has many into memory of the heap; returns the line that asks for it."""
        if self.scratch_bytes <= STACK_LIMIT:
            return []
        scratch = self.fresh("scratch")
        for at, element, name, size, start in self.arrays:
            indent = self.lines[at][: -len(self.lines[at].lstrip())]
            self.lines[at] = f"{indent}{element} (&{name})[{size}] = *({element} (*)[{size}])({scratch}.at + {start});"
        return [f"  const Scratch {scratch}({self.scratch_bytes});"]

    @contextmanager
    def lines_aside(self) -> Iterator[list[str]]:
        """What is emitted inside goes into a list of its own."""
        outer, self.lines = self.lines, []
        indent, self.indent = self.indent, 0
        yield self.lines
        self.lines, self.indent = outer, indent

    # -- the kernel

    def print(self) -> str:
        self.block(self.function.body)
        params = [f"{declaration(scalar_type(a.type), a.name)}" for a in self.function.args]
        params += [f"const check::Extent *{EXTENTS}"] if self.checked else []
        params += [f"int32_t {name}" for name in PROGRAM + GRID]
        head = f"static void {self.name}({', '.join(params)}) {{"
        unused = "  " + " ".join(f"(void){name};" for name in PROGRAM + GRID)
        return "\n".join([*self.helpers, head, unused, *self.move_arrays(), *self.lines, "}"]) + "\n"

    @contextmanager
    def braces(self) -> Iterator[None]:
        """Inside braces of the C++: arrays that are declared there are unknown after them."""
        outside = set(self.storage)
        self.indent += 1
        yield
        self.indent -= 1
        for value in [value for value in self.storage if value not in outside]:
            del self.storage[value]

    def block(self, block: Block) -> None:
        for op in block.ops:
            self.op(op)

    def op(self, op: Op) -> None:
        if op.name in IGNORED:
            return
        if op.name in CONTROL:
            self.comment(op)
            getattr(self, CONTROL[op.name])(op)
            self.last_location = None
        elif op.name == "tt.return":
            self.print_return(op)
        elif is_lazy(op):
            if op.result in self.plan.stored:
                self.comment(op)
                self.roots.materialize(op.result)
        elif op.name in self.roots.PRINTERS:
            self.comment(op)
            self.roots.PRINTERS[op.name](self.roots, op)
        else:
            self.scalar_op(op)

    # -- scalars

    def scalar_cell(self, value: Value) -> Cell:
        if value.op is not None and value.op.name == "arith.constant":
            return constant_cell(value.op)
        if value.op is not None and value.op.name == "ub.poison":
            return constant_zero(value.type.element)
        divisor = self.analysis.divisors.get(value, 1)
        return Cell("uniform", value.name, divisor=divisor, nonnegative=value in self.nonnegative)

    def text(self, value: Value) -> str:
        return self.scalar_cell(value).text

    def let(self, value: Value, text: str) -> None:
        type_ = scalar_type(value.type)
        const = "" if type_.endswith("*") else "const "
        self.emit(f"{const}{declaration(type_, value.name)} = {text};")

    def scalar_op(self, op: Op) -> None:
        name = op.name
        if name == "arith.constant":
            return
        self.comment(op)
        if name in ("tt.get_program_id", "tt.get_num_programs"):
            axis = AXES[str(next(w for w in op.attrs["words"] if w in AXES))]
            self.let(op.result, (PROGRAM if name == "tt.get_program_id" else GRID)[axis])
            self.nonnegative.add(op.result)
            return
        if name == "tt.load":
            pointer, *rest = (self.text(operand) for operand in op.operands)
            element = op.result.type.element
            text = from_memory(element, f"*{pointer}", 1)
            if rest:
                text = f"{rest[0]} ? {text} : {rest[1] if len(rest) > 1 else SCALAR[element] + '()'}"
            self.let(op.result, text)
            return
        if name == "tt.unsplat":
            self.roots.unsplat(op)
            return
        if name == "tt.addptr":
            self.let(op.result, " + ".join(self.text(operand) for operand in op.operands))
            return
        if not is_elementwise(op):
            raise unsupported(op, "is not supported")
        self.let(op.result, spell(op, [self.text(operand) for operand in op.operands], 1))
        self.scalar_facts(op)

    def scalar_facts(self, op: Op) -> None:
        """Powers of two that divide integers, and which are not negative."""
        cells = [self.scalar_cell(operand) for operand in op.operands]
        if op.name in DIVISORS:
            divisor = DIVISORS[op.name](*(cell.divisor for cell in cells))
            self.analysis.divisors[op.result] = min(divisor, LARGE)
        if op.name in NOT_NEGATIVE and all(cell.nonnegative for cell in cells):
            self.nonnegative.add(op.result)

    def scalar_store(self, op: Op) -> None:
        pointer, value, *masks = (self.text(operand) for operand in op.operands)
        line = f"*{pointer} = {to_memory(op.operands[1].type.element, value)};"
        self.emit(f"if ({masks[0]}) {line}" if masks else line)

    # -- control flow

    def declare_results(self, values: list[Value], hint_from: list[Value]) -> None:
        for value, hint in zip(values, hint_from, strict=True):
            if value.type.is_tensor:
                self.storage[value] = self.array(value.type, hint.name + "_a")
            else:
                self.emit(f"{declaration(scalar_type(value.type), value.name)}{{}};")

    def print_for(self, op: Op) -> None:
        lower, upper, step, *inits = op.operands
        body = op.blocks[0]
        induction, *carried = body.args
        # The loop's results and its carried values are the same variables.
        for result, arg, init in zip(op.results, carried, inits, strict=True):
            if arg.type.is_tensor:
                stored = self.array(arg.type, arg.name + "_a")
                self.storage[arg] = self.storage[result] = stored
                self.roots.assign(stored, init)
            else:
                self.emit(f"{declaration(scalar_type(arg.type), arg.name)} = {self.text(init)};")
        type_ = scalar_type(induction.type)
        if op.attrs.get("unsigned"):
            type_ = "u" + type_
        name = induction.name
        cells = [self.scalar_cell(lower), self.scalar_cell(step)]
        self.analysis.divisors[induction] = min(cell.divisor for cell in cells)
        if all(cell.nonnegative for cell in cells):
            self.nonnegative.add(induction)
        self.emit(
            f"for ({type_} {name} = {self.text(lower)}; {name} < {self.text(upper)}; {name} += {self.text(step)}) {{"
        )
        with self.braces():
            self.block(body)
            self.assign_yields(body, carried)
            self.make_room(body, carried)
        self.emit("}")
        for result, arg in zip(op.results, carried, strict=True):
            if not arg.type.is_tensor:
                self.let(result, arg.name)

    def make_room(self, body: Block, carried: list[Value]) -> None:
        """Keep what a loop carries out of registers where sums inside it need that many for themselves."""
        shapes = {result.type.shape for op in body.ops if op.name == "tt.reduce" for result in op.results}
        for arg in carried:
            if arg.type.shape in shapes and arg.type.numel > REGISTERS[self.lanes] * self.lanes // 4:
                self.emit(f"in_memory({self.storage[arg].array});")

    def assign_yields(self, body: Block, targets: list[Value]) -> None:
        self.roots.assign_all(*self.roots.finish_dots(targets, body.ops[-1].operands))

    def print_if(self, op: Op) -> None:
        self.declare_results(op.results, op.results)
        self.emit(f"if ({self.text(op.operands[0])}) {{")
        for number_, block in enumerate(op.blocks):
            if number_:
                self.emit("} else {")
            with self.braces():
                self.block(block)
                if op.results and block.ops[-1].name == "scf.yield":
                    self.roots.assign_all(op.results, block.ops[-1].operands)
        self.emit("}")

    def print_region(self, op: Op) -> None:
        """What a function with several returns computes: each return sets the results and goes to the end."""
        self.declare_results(op.results, op.results)
        end = self.fresh("returned")
        self.regions.append((op.results, end))
        self.emit("{")
        with self.braces():
            self.block(op.blocks[0])
        self.emit("}")
        self.emit(f"{end}:;")
        self.regions.pop()

    def print_return(self, op: Op) -> None:
        if self.regions:
            results, end = self.regions[-1]
            self.roots.assign_all(results, op.operands)
            self.emit(f"goto {end};")
        elif op.parent is not self.function.body:
            self.emit("return;")

    def print_while(self, op: Op) -> None:
        before, after = op.blocks
        condition = before.ops[-1]
        self.declare_results(op.results, op.results)
        for arg, init in zip(before.args, op.operands, strict=True):
            if arg.type.is_tensor:
                self.storage[arg] = self.array(arg.type, arg.name + "_a")
                self.roots.assign(self.storage[arg], init)
            else:
                self.emit(f"{declaration(scalar_type(arg.type), arg.name)} = {self.text(init)};")
        self.emit("while (true) {")
        with self.braces():
            self.block(before)
            self.roots.assign_all(op.results, condition.operands[1:])
            self.emit(f"if (!{self.text(condition.operands[0])}) break;")
            for arg, result in zip(after.args, op.results, strict=True):
                if arg.type.is_tensor:
                    self.storage[arg] = self.storage[result]
                else:
                    self.let(arg, result.name)
            self.block(after)
            self.assign_yields(after, before.args)
        self.emit("}")


def array_type(type_: Type) -> str:
    return {"i1": "uint8_t", "ptr": "int64_t"}.get(type_.element) or SCALAR[type_.element]


def array_bytes(type_: Type) -> int:
    """Size of one element of an array on the stack."""
    return {"f16": 4, "bf16": 4, "ptr": 8, "index": 8}.get(type_.element) or BYTES[type_.element]


def declaration(type_: str, name: str) -> str:
    return f"{type_}{name}" if type_.endswith("*") else f"{type_} {name}"


def source_line(path: str, line: int) -> str:
    import linecache

    text = linecache.getline(path, line).strip()
    return f"  {text}".replace("\\", "") if text else ""
