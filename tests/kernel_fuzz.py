"""Random Triton kernels: expressions over tiles, loads and stores of all kinds, loops, branches, reductions.

kernel = generate(random.Random(3), "k3")
kernel.source, kernel.arguments, kernel.memories()    what a worker of `kernel_workers` runs
kernel.mismatch(got, want)                            None, or what differs between two runs
"""

import dataclasses
import math
import random

from .kernel_memory import MAX_ELEMENTS
from .kernel_regions import RegionStatements
from .kernel_text import (
    BYTES,
    FLOATS,
    LARGEST,
    MANTISSA,
    SIGNED,
    TRITON_NAME,
    Domain,
    Kernel,
    Tile,
    whole_range,
    wrapped,
)


def generate(numbers: random.Random, name: str = "kernel", statements: int = 12) -> Kernel:
    writer = Generator(numbers, name)
    grid = writer.start()
    for _ in range(numbers.randint(3, statements)):
        writer.statement()
    writer.outputs()
    return writer.finish(grid, numbers.randint(0, 2**31 - 1))


class Generator(RegionStatements):
    def start(self) -> tuple[int, int, int]:
        rank = self.choose((1, 1, 2, 2, 2, 3))
        sizes = {1: (1, 2, 4, 8, 16, 32, 64, 128, 256), 2: (1, 2, 4, 8, 16, 32), 3: (1, 2, 4, 8)}[rank]
        self.shape = tuple(self.choose(sizes) for _ in range(rank))
        if rank == 2 and math.prod(self.shape) > 512:
            self.shape = (self.shape[0] // 2, self.shape[1])
        grid = self.choose(((1, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (3, 2, 1)))
        self.programs = grid[0] * grid[1]
        self.pid = ""
        if self.programs > 1:
            if grid[1] > 1:
                self.line("pid = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)")
            else:
                self.line("pid = tl.program_id(0)")
            self.pid = "pid"
            self.tiles.append(Tile("pid", "i32", (), Domain(0, self.programs - 1)))
        self.aranges: dict[int, str] = {}
        self.loops: list[tuple[str, Domain]] = []
        for _ in range(2):
            self.load()
        value = self.numbers.randint(-3, 40)
        scalar = self.argument(value, "s")
        self.tiles.append(Tile(scalar, "i32", (), Domain(value, value)))
        return grid

    def statement(self) -> None:
        """One more statement; where a choice cannot be made of what is in scope, another one."""
        kinds = [self.binary] * 8 + [self.unary] * 4 + [self.compare] * 3 + [self.where] * 4 + [self.convert] * 3
        kinds += [self.load] * 5 + [self.gather] * 3 + [self.view] * 4 + [self.reduce] * 5 + [self.scan] * 2
        kinds += [self.update] * 4 + [self.dot] * 2 + [self.divide] * 2 + [self.index_tile, self.store, self.atomic]
        kinds += [self.sort, self.join]
        if self.depth < 2:
            kinds += [self.loop] * 4 + [self.branch] * 3 + [self.while_loop]
        for _ in range(6):
            if self.choose(kinds)() is not None:
                return

    def outputs(self) -> None:
        written = 0
        for _ in range(12):
            value = self.tile(lambda t: self.lines and t.text in self.lines[-1]) if self.chance(10) else self.tile()
            written += self.store(value) is not None
            if written >= 3:
                break
        if not written:
            raise AssertionError("a kernel without a result")

    # -- arithmetic

    def pair(self, accept) -> tuple[str, str, str, tuple[int, ...], Domain, Domain] | None:
        """Two tiles of one type that broadcast: type, texts, shape, domains."""
        a = self.tile(accept)
        if a is None:
            return None
        b = self.tile(lambda t: t.dtype == a.dtype and (self.fit(t, a.shape) or self.fit(a, t.shape)))
        if self.chance(15):
            b = self.literal(a.dtype)
        if b is None:
            return None
        if self.chance(50) and a.shape:
            a, b = b, a
        shape = max(a.shape, b.shape, key=lambda s: (len(s), math.prod(s)))
        left, right = self.fit(a, shape), self.fit(b, shape)
        if left is None or right is None:
            return None
        return a.dtype, left, right, shape, a.domain, b.domain

    def literal(self, dtype: str) -> Tile:
        if dtype in FLOATS:
            value = self.choose((0.5, 1.0, 2.0, -1.0, 3.0, 0.0))
            return Tile(str(value), dtype, (), Domain(value, value, 1))
        value = self.choose((0, 1, 2, 3, 5, 100)) if dtype != "i1" else 1
        return Tile(str(value) if dtype != "i1" else "True", dtype, (), Domain(value, value))

    def binary(self) -> Tile | None:
        found = self.pair(lambda t: True)
        if found is None:
            return None
        dtype, a, b, shape, left, right = found
        if dtype == "i1":
            return self.let(f"{a} {self.choose('&|^')} {b}", dtype, shape, Domain(0, 1))
        if dtype in FLOATS:
            return self.binary_float(dtype, a, b, shape, left, right)
        if a.isdigit():  # a literal on the left has no type of its own
            return None
        op = self.choose(("+", "-", "*", "&", "|", "^", "<<", ">>", "minimum", "maximum"))
        bits = BYTES[dtype] * 8
        if op in ("<<", ">>"):
            if not (right.low >= 0 and right.high < bits):
                b = f"({b} & {bits - 1})"
            return self.let(f"{a} {op} {b}", dtype, shape, whole_range(dtype))
        if op in ("minimum", "maximum"):
            if dtype != "i32" and b.isdigit():  # a literal makes it an i32
                return None
            pick = min if op == "minimum" else max
            domain = Domain(pick(left.low, right.low), pick(left.high, right.high))
            return self.let(f"tl.{op}({a}, {b})", dtype, shape, domain)
        if op in "&|^":
            return self.let(f"{a} {op} {b}", dtype, shape, whole_range(dtype))
        ends = [self.apply(op, x, y) for x in (left.low, left.high) for y in (right.low, right.high)]
        return self.let(f"{a} {op} {b}", dtype, shape, wrapped(dtype, min(ends), max(ends)))

    @staticmethod
    def apply(op: str, a: float, b: float) -> float:
        return a + b if op == "+" else a - b if op == "-" else a * b

    def binary_float(
        self, dtype: str, a: str, b: str, shape: tuple[int, ...], left: Domain, right: Domain
    ) -> Tile | None:
        op = self.choose(("+", "-", "*", "*", "minimum", "maximum"))
        special = left.special or right.special
        ends = [self.apply(op, x, y) for x in (left.low, left.high) for y in (right.low, right.high)]
        epsilon = 2.0 ** -MANTISSA[dtype]
        if op in ("minimum", "maximum"):
            pick = min if op == "minimum" else max
            low, high = pick(left.low, right.low), pick(left.high, right.high)
            if special:
                low, high = min(left.low, right.low), max(left.high, right.high)
            domain = Domain(low, high, max(left.grain, right.grain), max(left.error, right.error), special)
            more = ", propagate_nan=tl.PropagateNan.ALL" if self.chance(40) else ""
            text = f"tl.{op}({a}, {b}{more})"
            text = text if dtype in ("f32", "f64") else f"{text}.to(tl.{TRITON_NAME[dtype]})"
            return self.let(text, dtype, shape, domain)
        low, high = min(ends), max(ends)
        size = max(abs(low), abs(high))
        if size > LARGEST[dtype]:
            return None
        if op in "+-":
            error, grain = left.error + right.error, max(left.grain, right.grain)
            error += size * epsilon if error else 0
        else:
            grain = left.grain + right.grain
            error = left.size * right.error + right.size * left.error + left.error * right.error
            inexact = left.size * right.size * 2.0**grain >= 2 ** MANTISSA[dtype]
            if error or (inexact and dtype in ("f32", "f64")):
                error += size * epsilon
        if grain > (16 if dtype == "f16" else 60) or error > 0.02 * max(size, 1e-3):
            return None
        return self.let(f"{a} {op} {b}", dtype, shape, Domain(low, high, grain, error, special))

    def unary(self) -> Tile | None:
        a = self.tile(lambda t: t.dtype != "i1" or self.chance(20))
        if a is None:
            return None
        own, text = a.domain, a.text
        if a.dtype == "i1":
            return self.let(f"~{text}", "i1", a.shape, Domain(0, 1))
        if not a.is_float:
            op = self.choose(("-{}", "~{}", "tl.abs({})", "{} + 1", "{} * 3", "{} >> 2", "{} & 7"))
            if op == "{} & 7":
                return self.let(op.format(text), a.dtype, a.shape, Domain(0, 7))
            if a.dtype not in SIGNED and op in ("-{}", "tl.abs({})"):
                return None
            return self.let(op.format(text), a.dtype, a.shape, whole_range(a.dtype))
        op = self.choose(("-{}", "tl.abs({})", "tl.floor({})", "tl.ceil({})", "smooth", "smooth"))
        if op == "smooth":
            return self.smooth(a)
        if op in ("tl.floor({})", "tl.ceil({})"):
            if not own.exact or a.dtype in ("f16", "bf16"):
                return None
            return self.let(
                op.format(text), a.dtype, a.shape, dataclasses.replace(own, low=own.low - 1, high=own.high + 1)
            )
        low, high = (-own.high, -own.low) if op == "-{}" else (0, own.size)
        return self.let(op.format(text), a.dtype, a.shape, dataclasses.replace(own, low=low, high=high))

    def smooth(self, a: Tile) -> Tile | None:
        """Functions that are computed by approximation."""
        own, text = a.domain, a.text
        if a.dtype not in ("f32", "f64") or own.special or own.error > 1e-3:
            return None
        name = self.choose(("exp", "exp2", "sigmoid", "sin", "cos", "erf", "sqrt", "rsqrt", "log", "log2"))
        if name in ("exp", "exp2"):
            if own.high > 12 or own.low < -60:
                return None
            high = math.exp(own.high)
            return self.let(f"tl.{name}({text})", a.dtype, a.shape, Domain(0, high, 0, high * (own.error + 3e-6)))
        if name in ("sigmoid", "sin", "cos", "erf"):
            if own.size > 60:
                return None
            text = f"tl.{name}({text})"
            return self.let(text, a.dtype, a.shape, Domain(-1, 1, 0, 1.2 * own.error + 3e-6))
        text = f"(tl.abs({text}) + 1.0)"
        high = own.size + 1
        if high > 1e6:
            return None
        scale = math.sqrt(high) if name == "sqrt" else max(1.0, math.log2(high))
        return self.let(f"tl.{name}({text})", a.dtype, a.shape, Domain(0, scale, 0, 1.5 * own.error + 3e-6 * scale))

    def divide(self) -> Tile | None:
        """Quotients and remainders; where the divisor may be 0, of a lane that nobody looks at."""
        a = self.tile(lambda t: t.dtype != "i1")
        if a is None:
            return None
        if a.is_float:
            if a.dtype not in ("f32", "f64") or a.domain.special:
                return None
            divisor = self.choose((3.0, 2.0, -7.0, 0.5))
            scaled = Domain(-a.domain.size * 2, a.domain.size * 2, 0, 2 * a.domain.error + a.domain.size * 1e-6)
            return self.let(f"{a.text} / {divisor}", a.dtype, a.shape, scaled)
        op = self.choose(("//", "%"))
        if self.chance(50):
            divisor = self.choose((1, 2, 3, 8, 16, 10))
            if op == "%":
                domain = Domain(0 if a.domain.low >= 0 else 1 - divisor, divisor - 1)
            else:
                domain = a.domain
            text = str(divisor) if BYTES[a.dtype] < 4 or self.chance(50) else None
            if text is None:
                text = self.argument(divisor)
                if a.dtype != "i32":
                    text = f"{text}.to(tl.{TRITON_NAME[a.dtype]})"
            return self.let(f"{a.text} {op} {text}", a.dtype, a.shape, domain)
        b = self.tile(lambda t: t.dtype == a.dtype and self.fit(t, a.shape) is not None)
        if b is None or not a.shape:
            return None
        text = self.fit(b, a.shape)
        guard = f"({text} != 0)" + (f" & ({text} != -1)" if a.dtype in SIGNED else "")
        return self.let(f"tl.where({guard}, {a.text} {op} {text}, {a.text})", a.dtype, a.shape, whole_range(a.dtype))

    def compare(self) -> Tile | None:
        found = self.pair(lambda t: t.domain.exact and t.dtype != "i1")
        if found is None or not (found[4].exact and found[5].exact) or found[1].isdigit():
            return None
        _, a, b, shape, _, _ = found
        return self.let(f"{a} {self.choose(('<', '<=', '>', '>=', '==', '!='))} {b}", "i1", shape, Domain(0, 1), "m")

    def where(self) -> Tile | None:
        found = self.pair(lambda t: t.shape)
        if found is None:
            return None
        dtype, a, b, shape, left, right = found
        mask = self.tile(lambda t: t.dtype == "i1" and self.fit(t, shape) is not None)
        if mask is None:
            return self.compare()
        if a[0].isdigit() or a[0] == "-" or b[0].isdigit() or b[0] == "-" or "True" in (a, b):
            return None
        return self.let(f"tl.where({self.fit(mask, shape)}, {a}, {b})", dtype, shape, left.join(right))

    def convert(self) -> Tile | None:
        a = self.tile()
        if a is None:
            return None
        if self.chance(10) and a.shape and a.dtype in ("i32", "u32", "i16", "u16", "i64", "u64"):
            dtype = ("u" if a.dtype[0] == "i" else "i") + a.dtype[1:]
            return self.let(f"{a.text}.to(tl.{TRITON_NAME[dtype]}, bitcast=True)", dtype, a.shape, whole_range(dtype))
        cast = self.cast(a, self.any_type())
        return cast and self.let(cast.text, cast.dtype, cast.shape, cast.domain)

    def index_tile(self) -> Tile:
        dim = self.numbers.randrange(len(self.shape))
        text, low, high = self.index(self.shape[dim], False)
        return self.let(text, "i32", (self.shape[dim],), Domain(low, high), "i")

    # -- shapes

    def view(self) -> Tile | None:
        a = self.tile(lambda t: t.shape)
        if a is None:
            return None
        kind = self.choose(("trans", "reshape", "broadcast", "flat", "expand"))
        if kind == "trans" and len(a.shape) == 2:
            return self.let(f"tl.trans({a.text})", a.dtype, a.shape[::-1], a.domain)
        if kind == "trans" and len(a.shape) == 3:
            order = self.choose(((0, 2, 1), (1, 0, 2), (2, 0, 1), (2, 1, 0)))
            shape = tuple(a.shape[d] for d in order)
            return self.let(f"tl.permute({a.text}, {order})", a.dtype, shape, a.domain)
        if kind == "broadcast" and a.shape != self.shape and (text := self.fit(a, self.shape)):
            return self.let(f"tl.broadcast_to({text}, {self.shape})", a.dtype, self.shape, a.domain)
        if kind == "expand" and len(a.shape) < 3:
            dim = self.numbers.randint(0, len(a.shape))
            shape = (*a.shape[:dim], 1, *a.shape[dim:])
            return self.let(f"tl.expand_dims({a.text}, {dim})", a.dtype, shape, a.domain)
        if kind in ("flat", "reshape"):
            count = math.prod(a.shape)
            shape = (count,)
            if kind == "reshape" and count > 1:
                inner = 2 ** self.numbers.randint(0, count.bit_length() - 1)
                shape = (count // inner, inner)
            if math.prod(self.shape) == count and self.chance(40):
                shape = self.shape
            return self.let(f"tl.reshape({a.text}, {shape})", a.dtype, shape, a.domain)
        return None

    def join(self) -> Tile | None:
        found = self.pair(lambda t: t.shape and len(t.shape) < 3 and math.prod(t.shape) < MAX_ELEMENTS)
        if found is None:
            return None
        dtype, a, b, shape, left, right = found
        if any(s[0].isdigit() or s[0] in "-T" for s in (a, b)) or not shape:
            return None
        domain = left.join(right)
        if self.chance(40):
            return self.let(f"tl.interleave({a}, {b})", dtype, (*shape[:-1], 2 * shape[-1]), domain)
        both = self.let(f"tl.join({a}, {b})", dtype, (*shape, 2), domain)
        if self.chance(60):
            names = [self.fresh("x"), self.fresh("x")]
            self.line(f"{names[0]}, {names[1]} = tl.split({both.text})")
            self.tiles += [Tile(name, dtype, shape, domain) for name in names]
        return both

    def gather(self) -> Tile | None:
        """Load from places that were computed from data; wild ones are masked off."""
        at = self.tile(lambda t: t.shape and t.dtype in ("i32", "i64", "u8", "i16"))
        if at is None:
            return None
        count = self.choose((1, 7, 16, 50))
        dtype = self.any_type()
        buffer = self.buffer(dtype, self.content(dtype))
        buffer.touch(0, count - 1)
        text = f"{at.text}.to(tl.int32)" if at.dtype not in ("i32", "i64") else at.text
        masks = []
        if at.domain.low >= 0 and at.domain.high < count:
            pass
        elif self.chance(50):
            text = f"(({text} % {count} + {count}) % {count})"
        else:
            text = self.let(text, at.dtype if at.dtype == "i64" else "i32", at.shape, at.domain).text
            masks = [f"{text} >= 0", f"{text} < {self.integer(count)}"]
        return self.load_from(f"{buffer.name} + {text}", dtype, at.shape, buffer.content, masks)
