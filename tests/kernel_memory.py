"""Loads and stores of random kernels: addresses of all kinds, masks, buffers that are read, written, or both."""

import math

from .kernel_text import (
    FLOATS,
    INTEGERS,
    SIGNED,
    Buffer,
    Domain,
    Tile,
    Writer,
    whole_range,
    wrapped,
)

MAX_ELEMENTS = 1024
MAX_REACH = 6000  # elements of a buffer


class MemoryStatements(Writer):
    """What goes to memory. `shape`: of most tiles; `pid`: the program's number, or nothing; `loops`: those around."""

    shape: tuple[int, ...]
    pid: str
    programs: int
    loops: list[tuple[str, Domain]]

    # -- addresses

    def arange(self, size: int) -> str:
        return f"tl.arange(0, {size})"

    def index(self, size: int, injective: bool) -> tuple[str, int, int]:
        """An expression of i32 that indexes one dimension: text, smallest and largest value."""
        plain = self.arange(size)
        kind = self.numbers.randint(0, 9)
        if kind == 0:
            return f"({size - 1} - {plain})", 0, size - 1
        if kind == 1:
            shift = self.numbers.randint(-5, 20)
            return f"({plain} + {self.integer(shift)})", shift, shift + size - 1
        if kind == 2:
            step, shift = self.choose((1, 3, 5, 7)), self.numbers.randint(0, 9)
            modulo = size if injective else self.choose((1, 3, size, 2 * size, 10))
            return f"(({plain} * {step} + {shift}) % {self.integer(modulo)})", 0, modulo - 1
        if kind == 3 and not injective:
            by = self.choose((2, 3, 4))
            return f"({plain} // {by})", 0, (size - 1) // by
        if kind == 4 and not injective:
            bound = self.numbers.randint(0, size)
            return f"tl.minimum({plain}, {self.integer(bound)})", 0, min(size - 1, bound)
        return plain, 0, size - 1

    def address(
        self, shape: tuple[int, ...], injective: bool, masked: int = 50, limit: int = MAX_REACH
    ) -> tuple[str, list[str], int, int] | None:
        """Offsets of a tile: text, masks, smallest and largest value where the masks hold (low > high: nowhere)."""
        terms, masks, low, high, span, empty = [], [], 0, 0, 1, False
        dims = list(range(len(shape)))
        self.numbers.shuffle(dims)
        wide = self.chance(20)
        for dim in dims:
            text, first, last = self.index(shape[dim], injective)
            if self.chance(40) and shape[dim] > 1:
                text = self.let(text, "i32", (shape[dim],), Domain(first, last), "i").text
            if len(shape) > 1:
                text += f"[{', '.join(':' if d == dim else 'None' for d in range(len(shape)))}]"
            if self.chance(masked):
                bound = self.choose((first, last, last + 1, last + 5, (first + last) // 2, first - 3, 0))
                form = self.choose(("{i} < {n}", "{n} > {i}", "{i} <= {n}", "{n} >= {i}", "{i} >= {n}"))
                masks.append(form.format(i=text, n=self.integer(bound)))
                if form == "{i} >= {n}":
                    first = max(first, bound)
                else:
                    last = min(last, bound - (form in ("{i} < {n}", "{n} > {i}")))
                empty |= last < first
            stride = span * self.choose((1, 1, 1, 2, -1))
            if not injective and self.chance(25):
                stride = self.choose((0, 1, 2, 3, -1, 7, 16))
            if wide:
                text = f"{text}.to(tl.int64)"
            if stride != 1 or self.chance(10):
                text = f"{text} * {self.integer(stride)}"
            terms.append(text)
            if last >= first:
                reach = sorted((first * stride, last * stride))
                low, high = low + reach[0], high + reach[1]
            span = max(span, abs(stride) * (last - first + 1 if last >= first else 1))
            span = max(span, abs(stride) * shape[dim]) if injective else span
        self.numbers.shuffle(terms)
        if self.chance(20):
            shift = self.numbers.randint(-7, 30)
            terms.append(self.integer(shift))
            low, high = low + shift, high + shift
        text = " + ".join(terms) or "0"
        if high - low > limit:
            return None
        return text, masks, (1 if empty else low), (0 if empty else high)

    def mask_text(self, masks: list[str], shape: tuple[int, ...]) -> str:
        """Structured masks and, at times, one of data, in any order."""
        parts = [f"({mask})" for mask in masks]
        extra = self.tile(lambda t: t.dtype == "i1" and self.fit(t, shape) is not None) if self.chance(20) else None
        if extra:
            parts.append(self.fit(extra, shape))
        self.numbers.shuffle(parts)
        return " & ".join(parts)

    def per_program(self, text: str, low: int, high: int, stride: int) -> tuple[str, int, int]:
        """Offsets `stride` further for each program."""
        if not self.pid or high < low:
            return text, low, high
        text = f"{text} + {self.pid} * {self.integer(stride)}"
        last = (self.programs - 1) * stride
        return text, min(low, low + last), max(high, high + last)

    def per_turn(self, text: str, low: int, high: int) -> tuple[str, int, int]:
        """Offsets that move with a loop."""
        if self.loops and self.chance(60) and low <= high:
            name, domain = self.choose(self.loops)
            stride = self.choose((1, 4, 16, self.shape[-1]))
            text = f"{text} + {name} * {stride}"
            low, high = low + int(domain.low) * stride, high + int(domain.high) * stride
        return text, low, high

    # -- memory

    def content(self, dtype: str) -> Domain:
        if dtype == "i1":
            return Domain(0, 1)
        if dtype in INTEGERS:
            return self.choose((whole_range(dtype), Domain(0, 40), wrapped(dtype, -20, 100)))
        size, grain = self.choose(((4, 1), (8, 0), (2, 2), (16, 2)))
        return Domain(-size, size, grain, 0.0, self.chance(15))

    def any_type(self) -> str:
        return self.choose(("i1", *INTEGERS, "i32", "i32", "i64", *FLOATS, "f32", "f32", "f32", "f16", "bf16"))

    def tile_shape(self) -> tuple[int, ...]:
        shape = self.shape
        if len(shape) > 1 and self.chance(30):
            dim = self.numbers.randrange(len(shape))
            return shape[:dim] + shape[dim + 1 :]
        return shape

    def load(self) -> Tile | None:
        if self.chance(3):
            return self.scalar_load()
        shape = self.tile_shape()
        shared = [b for b in self.buffers if b.region]
        buffer = self.choose(shared) if shared and self.chance(50) else None
        dtype = buffer.dtype if buffer else self.any_type()
        found = self.address(shape, False, limit=buffer.region - 1 if buffer else MAX_REACH)
        if found is None:
            return None
        text, masks, low, high = found
        if buffer is None:
            text, low, high = self.per_turn(text, low, high)
            text, low, high = self.per_program(text, low, high, self.choose((1, 8, max(high - low + 1, 1), -3)))
            if high - low > MAX_REACH:
                return None
            buffer = self.buffer(dtype, self.content(dtype))
            if low <= high:
                buffer.touch(low, high)
        elif low <= high:
            text = self.inside(buffer, text, low)
        pointer = self.pointer(buffer, text)
        return self.load_from(pointer, dtype, shape, buffer.content, masks)

    def load_from(self, pointer: str, dtype: str, shape: tuple[int, ...], domain: Domain, masks: list[str]) -> Tile:
        mask = self.mask_text(masks, shape)
        if not mask:
            return self.let(f"tl.load({pointer})", dtype, shape, domain)
        if dtype == "i1" or self.chance(30):
            return self.let(f"tl.load({pointer}, mask={mask})", dtype, shape, domain.join(Domain(0, 0)))
        other = self.tile(lambda t: t.dtype == dtype and self.fit(t, shape) is not None) if self.chance(30) else None
        if other:
            text, domain = self.fit(other, shape), domain.join(other.domain)
        elif dtype in FLOATS:
            value = self.choose((0.0, 1.0, -2.5) + ((float("-inf"), float("inf")) if domain.special else ()))
            text = str(value) if math.isfinite(value) else f'float("{value}")'
            domain = domain.join(Domain(value, value, 1) if math.isfinite(value) else domain)
        else:
            value = self.choose((0, 1, 7)) if dtype not in SIGNED else self.choose((0, 1, -1, -100))
            text, domain = str(value), domain.join(Domain(value, value))
        return self.let(f"tl.load({pointer}, mask={mask}, other={text})", dtype, shape, domain)

    def scalar_load(self) -> Tile:
        dtype = self.choose(("i32", "i64", "f32", "i1", "u8", "bf16"))
        buffer = self.buffer(dtype, self.content(dtype))
        place = self.numbers.randint(-4, 9)
        buffer.touch(place, place)
        return self.let(f"tl.load({buffer.name} + {self.integer(place)})", dtype, (), buffer.content, "s")

    def pointer(self, buffer: Buffer, text: str) -> str:
        if buffer.aliases and self.chance(50):
            name = self.choose(buffer.aliases)
            return f"{name} + ({text}) - {buffer.aliases[name]}"
        return f"{buffer.name} + {text}"

    def inside(self, buffer: Buffer, text: str, low: int) -> str:
        """Offsets moved into the region of a buffer that belongs to this program."""
        text = f"{text} + {self.integer(-low)}" if low else text
        return f"{text} + {self.pid} * {buffer.region}" if self.pid else text

    def region(self, dtype: str) -> Buffer:
        """A buffer that programs read and write, each a part of its own; further pointers may point into it."""
        found = [b for b in self.buffers if b.region and b.dtype == dtype]
        if found and self.chance(70):
            return self.choose(found)
        content = whole_range(dtype) if dtype not in FLOATS else Domain(-64, 64, 2)
        buffer = self.buffer(dtype, content, "io", region=2 * MAX_ELEMENTS)
        buffer.touch(0, buffer.region * self.programs - 1)
        if self.chance(50):
            buffer.aliases[self.fresh("alias")] = self.choose((0, 0, 1, 5, 16))
        return buffer

    def update(self) -> bool | None:
        """Store into memory that the kernel also reads."""
        value = self.tile(lambda t: t.shape and t.dtype != "i1")
        if value is None:
            return None
        shape = value.shape
        buffer = self.region(value.dtype)
        stored = self.into(value, buffer.content)
        found = self.address(shape, True, limit=buffer.region - 1)
        if stored is None or found is None:
            return None
        text, masks, low, high = found
        if low <= high:
            text = self.inside(buffer, text, low)
        mask = self.mask_text(masks, shape)
        self.line(f"tl.store({self.pointer(buffer, text)}, {stored.text}{f', mask={mask}' if mask else ''})")
        if self.chance(60):
            at = self.address(shape, False, limit=buffer.region - 1)
            if at is not None:
                text, masks, low, high = at
                text = self.inside(buffer, text, low) if low <= high else text
                self.load_from(self.pointer(buffer, text), value.dtype, shape, buffer.content, masks)
        return True

    def store(self, value: Tile | None = None) -> bool | None:
        """Store a tile to memory that nobody else touches."""
        value = value or self.tile()
        if value is None or (any(self.loops) and not value.shape):
            return None
        found = self.address(value.shape, True, masked=30)
        if found is None:
            return None
        text, masks, low, high = found
        text, low, high = self.per_program(text, low, high, max(high - low + 1, 1))
        content = Domain(-8, 8) if value.is_float else whole_range(value.dtype)
        buffer = self.buffer(value.dtype, content, "out")
        buffer.error = 2 * value.domain.error
        if low <= high:
            buffer.touch(low, high)
        mask = self.mask_text(masks, value.shape)
        self.line(f"tl.store({buffer.name} + {text}, {value.text}{f', mask={mask}' if mask else ''})")
        return True
