"""Triton IR as small Python values: what the parser builds and every later step reads."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...compiler.errors import UnsupportedKernel

PROGRAM = ("pid_x", "pid_y", "pid_z")
GRID = ("num_x", "num_y", "num_z")
EXTENTS = "extents"
"""What a kernel's C++ function takes beside the kernel's arguments, by name: which program it is, of how many; and in
debug mode where each pointer's tensor begins and ends."""


@dataclass(frozen=True)
class Type:
    """`element` of `shape`; a scalar has shape (). Pointers say what they point to: element "ptr", pointee "f32"."""

    element: str  # i1 i8 i16 i32 i64 f16 bf16 f32 f64 f8E4M3FN f8E5M2 f8E4M3FNUZ f8E5M2FNUZ ptr
    shape: tuple[int, ...] = ()
    pointee: str = ""

    @property
    def is_tensor(self) -> bool:
        return bool(self.shape)

    @property
    def is_float(self) -> bool:
        return self.element.startswith(("f", "bf"))

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def with_shape(self, shape: tuple[int, ...]) -> "Type":
        return Type(self.element, shape, self.pointee)


@dataclass(eq=False)
class Value:
    """An SSA value. `name` is unique in the kernel and fit for C; `op` is None for arguments of blocks."""

    name: str
    type: Type
    op: "Op | None" = None
    uses: list["Op"] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(eq=False)
class Block:
    """A region of one block: its arguments and ops; the last op is its terminator."""

    args: list[Value] = field(default_factory=list)
    ops: list["Op"] = field(default_factory=list)
    parent: "Op | None" = None

    def walk(self) -> Iterator["Op"]:
        for op in self.ops:
            yield op
            for block in op.blocks:
                yield from block.walk()

    def values(self) -> Iterator[Value]:
        """What ops inside make, and the arguments of their regions."""
        for op in self.walk():
            yield from op.results
            for block in op.blocks:
                yield from block.args


@dataclass(eq=False)
class Op:
    """One operation, e.g. `arith.addf`. attrs holds what is not an operand: predicates, axes, constants."""

    name: str
    operands: list[Value] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)
    attrs: dict[str, object] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    parent: Block | None = None
    location: tuple[str, int] | None = None  # file and line of the Triton source
    position: int = 0  # in program order
    end: int = 0  # position of the last op inside it

    @property
    def result(self) -> Value:
        return self.results[0]


@dataclass(eq=False)
class Function:
    """A kernel: its arguments in the signature's order, without the constexprs, and its body.

    divisors: powers of two that the launch promises to divide integer arguments.
    """

    name: str
    args: list[Value]
    body: Block
    divisors: dict[Value, int] = field(default_factory=dict)

    def number(self) -> None:
        """Give every op its position in program order and every value its users."""
        position = 0
        for op in self.body.walk():
            for value in op.operands:
                value.uses.clear()

        def visit(block: Block) -> None:
            nonlocal position
            for op in block.ops:
                position += 1
                op.position, op.parent = position, block
                for value in op.operands:
                    value.uses.append(op)
                for inner in op.blocks:
                    inner.parent = op
                    visit(inner)
                op.end = position

        visit(self.body)


def unsupported(op: Op, why: str) -> UnsupportedKernel:
    place = f"{op.location[0]}:{op.location[1]}: " if op.location else ""
    return UnsupportedKernel(f"{place}{op.name} {why} on CPU; write it another way or run this kernel on a GPU")
