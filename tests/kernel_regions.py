"""Statements of random kernels with something inside: reductions, scans, dots, sorts, loops, branches."""

import math

from .kernel_memory import MemoryStatements
from .kernel_text import BYTES, MANTISSA, TRITON_NAME, Domain, Tile, whole_range

COMBINERS = {
    "affine": "def affine(a, b, c, d):\n    return a * c, b * c + d\n",
    "smaller": "def smaller(a, i, b, j):\n    left = (a < b) | ((a == b) & (i < j))\n"
    "    return tl.where(left, a, b), tl.where(left, i, j)\n",
    "product": "def product(a, b):\n    return a * b\n",
    "union": "def union(a, b):\n    return a | b\n",
}
SLOW = 128  # elements that the interpreter combines one by one


class RegionStatements(MemoryStatements):
    def combiner(self, name: str) -> str:
        return self.helper(name, COMBINERS[name])

    # -- reductions

    def axis(self, tile: Tile) -> tuple[int | None, tuple[int, ...]]:
        """An axis, or None for all, and the shape of the result."""
        if self.chance(25):
            return None, ()
        axis = self.numbers.randrange(len(tile.shape))
        return axis, tile.shape[:axis] + tile.shape[axis + 1 :]

    def reduce(self) -> Tile | None:
        a = self.tile(lambda t: t.shape and t.dtype in ("i32", "i64", "u32", "u64", "f32", "f64", "f16", "i1", "i8"))
        if a is None:
            return None
        axis, shape = self.axis(a)
        at = "" if axis is None else f", {axis}"
        if axis is not None and self.chance(15):
            at, shape = f", {axis}, keep_dims=True", (*a.shape[:axis], 1, *a.shape[axis + 1 :])
        if a.is_float:
            return self.reduce_floats(a, axis, at, shape)
        text = a.text if BYTES[a.dtype] >= 4 else f"{a.text}.to(tl.int32)"
        dtype = a.dtype if BYTES[a.dtype] >= 4 else "i32"
        op = self.choose(("sum", "max", "min", "xor_sum", "argmax", "argmin", "custom"))
        if op == "custom":
            return self.reduce_custom(a, axis)
        if op in ("argmax", "argmin"):
            if axis is None or dtype == "u64":
                return None
            return self.let(f"tl.{op}({text}{at})", "i32", shape, Domain(0, a.shape[axis] - 1))
        domain = whole_range(dtype) if op in ("sum", "xor_sum") else a.domain
        if op == "sum" and a.dtype == "i1":
            domain = Domain(0, math.prod(a.shape))
        return self.let(f"tl.{op}({text}{at})", dtype, shape, domain)

    def reduce_floats(self, a: Tile, axis: int | None, at: str, shape: tuple[int, ...]) -> Tile | None:
        op, own = self.choose(("sum", "sum", "max", "min", "argmax")), a.domain
        count = math.prod(a.shape) if axis is None else a.shape[axis]
        if op == "argmax":
            if axis is None or not own.exact or own.special:
                return None
            return self.let(f"tl.argmax({a.text}{at})", "i32", shape, Domain(0, a.shape[axis] - 1))
        if op in ("max", "min"):
            dtype = "f32" if a.dtype == "f16" else a.dtype
            return self.let(f"tl.{op}({a.text}{at})", dtype, shape, own)
        size, error = own.size * count, own.error * count
        if error or size * 2**own.grain >= 2 ** MANTISSA[a.dtype]:
            error += size * count * 2.0 ** -MANTISSA[a.dtype]
        if error > 0.02 * size or size > 3e4:
            return None
        domain = Domain(min(own.low * count, own.low), max(own.high * count, own.high), own.grain, error, own.special)
        return self.let(f"tl.sum({a.text}{at})", a.dtype, shape, domain)

    def reduce_custom(self, a: Tile, axis: int | None) -> Tile | None:
        if axis is None or math.prod(a.shape) > SLOW or a.dtype not in ("i32", "i64"):
            return None
        shape = a.shape[:axis] + a.shape[axis + 1 :]
        kind = self.choose(("smaller", "product", "union"))
        name = self.combiner(kind)
        if kind != "smaller":
            return self.let(f"tl.reduce({a.text}, {axis}, {name})", a.dtype, shape, whole_range(a.dtype))
        index = f"tl.arange(0, {a.shape[axis]})"
        if len(a.shape) > 1:
            index += f"[{', '.join(':' if d == axis else 'None' for d in range(len(a.shape)))}]"
        names = [self.fresh("x"), self.fresh("x")]
        self.line(
            f"{names[0]}, {names[1]} = tl.reduce(({a.text}, tl.broadcast_to({index}, {a.shape})), {axis}, {name})"
        )
        self.tiles.append(Tile(names[0], a.dtype, shape, a.domain))
        self.tiles.append(Tile(names[1], "i32", shape, Domain(0, a.shape[axis] - 1)))
        return self.tiles[-1]

    def scan(self) -> Tile | None:
        a = self.tile(lambda t: t.shape and t.dtype in ("i32", "i64", "u32", "f32"))
        if a is None:
            return None
        axis, own = self.numbers.randrange(len(a.shape)), a.domain
        reverse = ", reverse=True" if self.chance(40) else ""
        if a.is_float:
            size = own.size * a.shape[axis]
            if not own.exact or own.special or size * 2**own.grain >= 2 ** MANTISSA[a.dtype]:
                return None
            return self.let(f"tl.cumsum({a.text}, {axis}{reverse})", a.dtype, a.shape, Domain(-size, size, own.grain))
        whole = whole_range(a.dtype)
        kind = self.choose(("cumsum", "cumprod", "affine", "union"))
        if kind in ("cumsum", "cumprod"):
            return self.let(f"tl.{kind}({a.text}, {axis}{reverse})", a.dtype, a.shape, whole)
        if math.prod(a.shape) > SLOW:
            return None
        name = self.combiner(kind)
        if kind == "union":
            return self.let(f"tl.associative_scan({a.text}, {axis}, {name}{reverse})", a.dtype, a.shape, whole)
        b = self.tile(lambda t: t.dtype == a.dtype and t.shape == a.shape)
        names = [self.fresh("x"), self.fresh("x")]
        self.line(f"{', '.join(names)} = tl.associative_scan(({a.text}, {b.text}), {axis}, {name}{reverse})")
        self.tiles += [Tile(name, a.dtype, a.shape, whole) for name in names]
        return self.tiles[-1]

    def sort(self) -> Tile | None:
        a = self.tile(lambda t: t.shape and 2 <= t.shape[-1] <= 32 and t.dtype in ("i32", "u32", "f32", "i16", "f16"))
        if a is None or not a.domain.exact or a.domain.special or math.prod(a.shape) > 256:
            return None
        if self.chance(40):
            dim = self.numbers.randrange(len(a.shape))
            return self.let(f"tl.flip({a.text}, {dim})", a.dtype, a.shape, a.domain)
        more = ", descending=True" if self.chance(50) else ""
        return self.let(f"tl.sort({a.text}{more})", a.dtype, a.shape, a.domain)

    def dot(self) -> Tile | None:
        kinds = ("f32", "f16", "bf16", "i8")
        a = self.tile(lambda t: len(t.shape) == 2 and t.dtype in kinds and not t.domain.special)
        if a is None or max(a.shape) > 32:
            return None
        b = self.tile(
            lambda t: t.dtype == a.dtype and len(t.shape) == 2 and t.shape[1] == a.shape[1] and not t.domain.special
        )
        if b is None or max(b.shape) > 32:
            return None
        m, k, n = *a.shape, b.shape[0]
        dtype = {"i8": "i32", "f64": "f64"}.get(a.dtype, "f32")
        acc = self.tile(lambda t: t.dtype == dtype and t.shape == (m, n)) if self.chance(40) else None
        if dtype == "i32":
            domain = whole_range("i32")
        else:
            size = k * a.domain.size * b.domain.size
            error = k * (a.domain.size * b.domain.error + b.domain.size * a.domain.error)
            if acc:
                size, error = size + acc.domain.size, error + acc.domain.error
            grain = max(a.domain.grain + b.domain.grain, acc.domain.grain if acc else 0)
            if error or size * 2**grain >= 2**24:
                error += size * k * 2.0**-23
            if size > 1e20 or error > 0.02 * size or (acc and acc.domain.special):
                return None
            domain = Domain(-size, size, grain, error)
        more = f", {acc.text}" if acc else ""
        more += ", input_precision='ieee'" if a.dtype == "f32" else ""
        more += f", out_dtype=tl.{TRITON_NAME[dtype]}" if dtype != "f32" else ""
        return self.let(f"tl.dot({a.text}, tl.trans({b.text}){more})", dtype, (m, n), domain)

    # -- atomics

    def atomic(self) -> bool | None:
        """Updates whose order does not matter; several lanes and programs may meet."""
        value = self.tile(lambda t: t.dtype in ("i32", "i64", "u32", "f32") and t.plain)
        if value is None or (value.is_float and (value.domain.size > 64 or value.domain.grain > 3)):
            return None
        ops = ("add",) if value.is_float else ("add", "max", "min", "and", "or", "xor")
        found = self.address(value.shape, False)
        if found is None:
            return None
        text, masks, low, high = found
        if self.pid and self.chance(50):
            text, low, high = self.per_program(text, low, high, 4)
        buffer = self.buffer(value.dtype, Domain(-4, 4) if value.is_float else whole_range(value.dtype), "at")
        if low <= high:
            buffer.touch(low, high)
        mask = self.mask_text(masks, value.shape)
        self.line(
            f"tl.atomic_{self.choose(ops)}({buffer.name} + {text}, {value.text}{f', mask={mask}' if mask else ''})"
        )
        return True

    # -- control flow

    def body(self, statements: int) -> None:
        self.depth += 1
        self.indent += 1
        self.line("pass")
        for _ in range(self.numbers.randint(1, statements)):
            self.statement()

    def leave(self, known: list[Tile]) -> None:
        """Forget what was made inside."""
        self.tiles = list(known)
        self.depth -= 1
        self.indent -= 1

    def carried(self) -> list[Tile]:
        """Variables that a loop or a branch changes, as copies of tiles in scope, with the domain they may grow to.

        No two start as the same value: Triton's front end (MLIR's folding of scf.for) then takes one for the other
        where the loop swaps them, on every target.
        """
        made, starts = [], set()
        for _ in range(self.numbers.randint(1, 3)):
            start = self.tile(lambda t: t.domain.exact and t.dtype not in ("f16", "bf16"))
            if start is None:
                continue
            domain = Domain(-64, 64, 3) if start.is_float else whole_range(start.dtype)
            inside = self.into(start, domain)
            origin = self.origins.get(start.text, start.text)
            if inside is None or origin in starts:
                continue
            starts.add(origin)
            made.append(self.let(inside.text, start.dtype, start.shape, domain, "c"))
            self.origins[made[-1].text] = origin
        return made

    def changes(self, carried: list[Tile]) -> None:
        """Give carried variables their next values."""
        if len(carried) > 1 and carried[0].dtype == carried[1].dtype and carried[0].shape == carried[1].shape:
            a, b = carried[:2]
            if self.chance(50):
                name = self.fresh("t")
                self.line(f"{name} = {a.text}")
                self.line(f"{a.text} = {b.text}")
                self.line(f"{b.text} = {name}")
        for variable in carried:
            value = self.tile(lambda t: t.dtype == variable.dtype and t.shape == variable.shape)  # noqa: B023
            new = self.into(value, variable.domain) if value else None
            if new is None or self.chance(30):
                new = self.into(self.advanced(variable), variable.domain)
            if new.text != variable.text:
                self.line(f"{variable.text} = {new.text}")

    def advanced(self, variable: Tile) -> Tile:
        """variable + something of its type."""
        if variable.dtype == "i1":
            return Tile(f"~{variable.text}", "i1", variable.shape, Domain(0, 1))
        text, step = "1", Domain(1, 1)
        other = self.tile(lambda t: t.dtype == variable.dtype and t.plain and self.fit(t, variable.shape) is not None)
        own = variable.domain
        if other and (not variable.is_float or (other.domain.size < 1000 and other.domain.grain <= own.grain)):
            text, step = self.fit(other, variable.shape), other.domain
        low, high = variable.domain.low + step.low, variable.domain.high + step.high
        domain = Domain(low, high, variable.domain.grain) if variable.is_float else variable.domain
        return Tile(f"({variable.text} + {text})", variable.dtype, variable.shape, domain)

    def loop(self) -> bool:
        carried, known = self.carried(), list(self.tiles)
        name = self.fresh("k")
        first, count, step = self.choose((0, 0, 0, 1, 4)), self.numbers.randint(0, 4), self.choose((1, 1, 2, 8))
        last = first + max(count - 1, 0) * step
        if self.chance(15) and count:
            self.line(f"for {name} in tl.static_range({count}):")
            first, last = 0, count - 1
        else:
            bounds = [self.integer(first), self.integer(first + count * step), str(step) if step != 1 else ""]
            bounds = bounds[1:2] if first == 0 and step == 1 else [b for b in bounds if b]
            self.line(f"for {name} in range({', '.join(bounds)}):")
        self.loops.append((name, Domain(first, last)))
        self.body(4)
        self.changes(carried)
        self.loops.pop()
        self.leave(known)
        return True

    def while_loop(self) -> bool:
        start = self.argument(self.numbers.randint(0, 9))
        carried, known = self.carried(), list(self.tiles)
        name = self.fresh("w")
        self.line(f"{name} = {start} + 0")
        self.line(f"while {name} > 0:")
        self.body(3)
        self.changes(carried)
        self.line(f"{name} = {name} - {self.choose((2, 3, 5))}")
        self.leave(known)
        return True

    def condition(self) -> str:
        scalar = self.tile(lambda t: not t.shape and t.dtype in ("i32", "i64", "u32", "i1"))
        if self.loops and self.chance(50):
            return f"{self.loops[-1][0]} % 2 == {self.choose((0, 1))}"
        if scalar is None:
            return f"{self.argument(self.numbers.randint(-3, 9))} > {self.choose((0, 4))}"
        return (
            scalar.text
            if scalar.dtype == "i1"
            else f"{scalar.text} {self.choose(('<', '>', '=='))} {self.choose((0, 5))}"
        )

    def branch(self) -> bool:
        carried, known = self.carried(), list(self.tiles)
        self.line(f"if {self.condition()}:")
        self.body(3)
        self.changes(carried)
        self.leave(known)
        if self.chance(50):
            self.line("else:")
            self.body(3)
            self.changes(carried)
            self.leave(known)
        return True
