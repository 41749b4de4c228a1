"""What random kernels are made of: tiles with the numbers they may hold, buffers, and the kernel's text as it grows.

Integers wrap and compare exactly. Floats are made of few bits (multiples of 2^-grain below some magnitude), so that
most sums and products are exact and branches on them mean the same everywhere; what is rounded in an order that an
implementation may choose carries a bound of its error, and is neither compared nor cast to an integer.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .kernel_workers import Job

SIGNED = ("i8", "i16", "i32", "i64")
UNSIGNED = ("u8", "u16", "u32", "u64")
INTEGERS = SIGNED + UNSIGNED
FLOATS = ("f16", "bf16", "f32", "f64")
TRITON_NAME = {"i1": "int1", "f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}
TRITON_NAME |= {t: ("uint" if t[0] == "u" else "int") + t[1:] for t in INTEGERS}
POINTER = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "f64": "*fp64"} | {t: f"*{t}" for t in ("i1", *INTEGERS)}
BYTES = {"i1": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8} | {t: int(t[1:]) // 8 for t in INTEGERS}
MANTISSA = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}
LARGEST = {"f16": 3e4, "bf16": 1e30, "f32": 1e30, "f64": 1e100}
MARGIN = 96  # bytes around every buffer that no kernel may change


@dataclass(frozen=True)
class Domain:
    """Where finite values of a tile lie. Floats: multiples of 2^-grain, up to `error` off; special: inf, NaN too."""

    low: float
    high: float
    grain: int = 0
    error: float = 0.0
    special: bool = False

    @property
    def size(self) -> float:
        return max(abs(self.low), abs(self.high))

    @property
    def exact(self) -> bool:
        return self.error == 0

    def join(self, other: "Domain") -> "Domain":
        low, high = min(self.low, other.low), max(self.high, other.high)
        grain, error = max(self.grain, other.grain), max(self.error, other.error)
        return Domain(low, high, grain, error, self.special or other.special)


def whole_range(dtype: str) -> Domain:
    if dtype == "i1":
        return Domain(0, 1)
    bits = int(dtype[1:])
    return Domain(0, 2**bits - 1) if dtype[0] == "u" else Domain(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def wrapped(dtype: str, low: float, high: float) -> Domain:
    """The interval if the type holds it, else everything."""
    whole = whole_range(dtype)
    return Domain(low, high) if whole.low <= low and high <= whole.high else whole


@dataclass(frozen=True)
class Tile:
    """A value of the kernel: its expression, type, shape and domain."""

    text: str
    dtype: str
    shape: tuple[int, ...]
    domain: Domain

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def plain(self) -> bool:
        """Exact and finite."""
        return self.domain.exact and not self.domain.special


@dataclass
class Buffer:
    """Memory that a kernel gets a pointer to; `low` and `high` are the elements that it may touch, relative to it."""

    name: str
    dtype: str
    content: Domain
    low: int = 0
    high: int = 0
    error: float = 0.0
    region: int = 0  # elements that each program reads and writes alone
    aliases: dict[str, int] = field(default_factory=dict)  # further pointers into it, and how many elements ahead
    aligned: bool = False
    skew: int = 0  # elements that the memory is away from an aligned address

    def touch(self, low: int, high: int) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def offset(self, ahead: int = 0) -> int:
        """Bytes from the start of the memory to the element a pointer points to."""
        place = MARGIN + (ahead - self.low) * BYTES[self.dtype]
        return -(-place // 64) * 64 if self.aligned else place + self.skew * BYTES[self.dtype]

    @property
    def total(self) -> int:
        return self.offset() + (self.high + 1) * BYTES[self.dtype] + MARGIN

    def fill(self, numbers: np.random.Generator) -> np.ndarray:
        memory = numbers.integers(0, 256, self.total, dtype=np.uint8)
        start, count = self.offset() + self.low * BYTES[self.dtype], self.high - self.low + 1
        low, high = self.content.low, self.content.high
        if self.dtype in INTEGERS or self.dtype == "i1":
            kind = "u1" if self.dtype == "i1" else self.dtype[0] + str(BYTES[self.dtype])
            values = numbers.integers(int(low), int(high), count, dtype=kind, endpoint=True)
        else:
            scale = 2**self.content.grain
            values = numbers.integers(int(low * scale), int(high * scale), count, endpoint=True) / scale
            if self.content.special:
                places = numbers.random(count) < 0.2
                values[places] = numbers.choice([math.inf, -math.inf, math.nan], int(places.sum()))
            values = float_bytes(values, self.dtype)
        memory[start : start + count * BYTES[self.dtype]] = np.ascontiguousarray(values).view(np.uint8)
        return memory


def float_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values that the type holds exactly, as it keeps them."""
    if dtype == "bf16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"f16": np.float16, "f32": np.float32, "f64": np.float64}[dtype])


def float_values(memory: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        return (memory.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return memory.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[dtype]).astype(np.float64)


@dataclass
class Kernel:
    """A random kernel. `arguments`: (name, type, value); of pointers the value is (buffer, byte offset)."""

    name: str
    source: str
    arguments: list[tuple[str, str, object]]
    buffers: list[Buffer]
    grid: tuple[int, int, int]
    seed: int
    divisible: tuple[str, ...] = ()

    def job(self) -> Job:
        extents = []
        for buffer in self.buffers:
            start = buffer.offset() + buffer.low * BYTES[buffer.dtype]
            extents.append((start, start + (buffer.high - buffer.low + 1) * BYTES[buffer.dtype]))
        return Job(self.name, self.source, self.arguments, self.memories(), self.grid, self.divisible, tuple(extents))

    def memories(self) -> list[np.ndarray]:
        numbers = np.random.default_rng(self.seed)
        return [buffer.fill(numbers) for buffer in self.buffers]

    def mismatch(self, got: list[np.ndarray], want: list[np.ndarray]) -> str | None:
        """The first element in which two runs differ by more than the kernel's arithmetic allows."""
        for buffer, found, expected in zip(self.buffers, got, want, strict=True):
            start = buffer.offset() + buffer.low * BYTES[buffer.dtype]
            stop = start + (buffer.high - buffer.low + 1) * BYTES[buffer.dtype]
            for side in (slice(0, start), slice(stop, None)):
                if not np.array_equal(found[side], expected[side]):
                    return f"{buffer.name}: memory around it was changed"
            a, b = found[start:stop], expected[start:stop]
            if buffer.dtype in FLOATS:
                a, b = float_values(a, buffer.dtype), float_values(b, buffer.dtype)
                with np.errstate(invalid="ignore"):
                    wrong = ~((a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= buffer.error))
            else:
                kind = "u1" if buffer.dtype == "i1" else buffer.dtype[0] + str(BYTES[buffer.dtype])
                a, b = a.view(kind), b.view(kind)
                wrong = a != b
            if wrong.any():
                k = int(np.flatnonzero(wrong)[0])
                bound = f" (within {buffer.error:.3g})" if buffer.dtype in FLOATS else ""
                return (
                    f"{buffer.name}[{k + buffer.low}] is {a[k]}, expected {b[k]}{bound};"
                    f" {int(wrong.sum())} of {len(a)} elements differ"
                )
        return None

    def __str__(self) -> str:
        lines = [f"grid {self.grid}, numpy seed {self.seed}, divisible by 16: {', '.join(self.divisible) or 'none'}"]
        lines += [f"  {name}: {kind} = {value}" for name, kind, value in self.arguments]
        lines += [f"  {b}" for b in self.buffers]
        return "\n".join([self.source, *lines])


class Writer:
    """The text of a kernel as it grows, its arguments, and which tiles are in scope."""

    def __init__(self, numbers: random.Random, name: str = "kernel"):
        self.numbers, self.name = numbers, name
        self.lines: list[str] = []
        self.indent = 1
        self.count = 0
        self.arguments: list[tuple[str, str, object]] = []
        self.buffers: list[Buffer] = []
        self.helpers: dict[str, str] = {}
        self.tiles: list[Tile] = []
        self.depth = 0
        self.origins: dict[str, str] = {}  # variables that started as copies, and of what

    # -- choices

    def chance(self, percent: int) -> bool:
        return self.numbers.randint(0, 99) < percent

    def choose(self, items: Iterable):
        return self.numbers.choice(list(items))

    def tile(self, accept: Callable[[Tile], bool] = lambda tile: True) -> Tile | None:
        """A tile in scope, more likely one of the last."""
        found = [tile for tile in self.tiles if accept(tile)]
        if not found:
            return None
        last = found[-6:]
        return self.choose(last if self.chance(70) else found)

    # -- text

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    def fresh(self, hint: str) -> str:
        self.count += 1
        return f"{hint}{self.count}"

    def let(self, text: str, dtype: str, shape: tuple[int, ...], domain: Domain, hint: str = "x") -> Tile:
        name = self.fresh(hint)
        self.line(f"{name} = {text}")
        tile = Tile(name, dtype, shape, domain)
        self.tiles.append(tile)
        return tile

    def argument(self, value: int, hint: str = "n") -> str:
        """A scalar that the kernel gets at run time."""
        for name, kind, known in self.arguments:
            if kind == "i32" and known == value and self.chance(70):
                return name
        name = self.fresh(hint)
        self.arguments.append((name, "i32", value))
        return name

    def integer(self, value: int) -> str:
        """`value`, as an argument or as a literal."""
        return self.argument(value) if self.chance(50) else str(value)

    def buffer(self, dtype: str, content: Domain, hint: str = "p", **fields) -> Buffer:
        aligned, skew = self.chance(50), self.numbers.randint(0, 3)
        buffer = Buffer(self.fresh(hint), dtype, content, aligned=aligned, skew=skew, **fields)
        self.buffers.append(buffer)
        return buffer

    def helper(self, name: str, text: str) -> str:
        self.helpers[name] = f"@triton.jit\n{text}"
        return name

    # -- shapes and types

    def fit(self, tile: Tile, shape: tuple[int, ...]) -> str | None:
        """`tile` as an expression that broadcasts to `shape`; None where it does not."""
        if not tile.shape or tile.shape == shape:
            return tile.text
        if len(tile.shape) == len(shape):
            return tile.text if all(s in (1, t) for s, t in zip(tile.shape, shape, strict=True)) else None
        if len(tile.shape) > len(shape):
            return None
        places = [p for p in embeddings(tile.shape, shape) if p]
        if not places:
            return None
        kept = self.choose(places)
        return f"{tile.text}[{', '.join(':' if d in kept else 'None' for d in range(len(shape)))}]"

    def cast(self, tile: Tile, dtype: str) -> Tile | None:
        """`tile` as `dtype`, where the conversion is defined for all its values."""
        if tile.dtype == dtype:
            return tile
        domain = cast_domain(tile, dtype)
        if domain is None:
            return None
        return Tile(f"{tile.text}.to(tl.{TRITON_NAME[dtype]})", dtype, tile.shape, domain)

    def into(self, tile: Tile, domain: Domain) -> Tile | None:
        """`tile`, clamped into a domain that holds at every turn of a loop; None where it cannot be."""
        if tile.dtype not in FLOATS:
            whole = whole_range(tile.dtype)
            return tile if (domain.low, domain.high) == (whole.low, whole.high) else None
        own = tile.domain
        if not own.exact or (own.special and not domain.special):
            return None
        text = tile.text
        if own.grain > domain.grain:
            if tile.dtype == "f16" or domain.size * 2**domain.grain >= 2 ** MANTISSA[tile.dtype]:
                return None
            scale = float(2**domain.grain)
            if own.size * scale > LARGEST[tile.dtype] or tile.dtype == "bf16":
                return None
            text = f"(tl.floor({text} * {scale}) / {scale})"
        if own.low < domain.low or own.high > domain.high or own.special:
            if own.special:
                return dataclasses.replace(tile, domain=domain) if own.size <= domain.size else None
            text = f"tl.minimum(tl.maximum({text}, {float(domain.low)}), {float(domain.high)})"
            text += f".to(tl.{TRITON_NAME[tile.dtype]})" if tile.dtype in ("f16", "bf16") else ""
        return Tile(text, tile.dtype, tile.shape, domain)

    def finish(self, grid: tuple[int, int, int], seed: int) -> Kernel:
        arguments: list[tuple[str, str, object]] = []
        divisible = []
        for k, buffer in enumerate(self.buffers):
            for name, ahead in {buffer.name: 0, **buffer.aliases}.items():
                offset = buffer.offset() + ahead * BYTES[buffer.dtype]
                arguments.append((name, POINTER[buffer.dtype], (k, offset)))
                if offset % 16 == 0 and buffer.aligned:
                    divisible.append(name)
        divisible += [name for name, _, value in self.arguments if value % 16 == 0 and self.chance(50)]
        arguments += self.arguments
        names = ", ".join(name for name, _, _ in arguments)
        head = ["import triton", "import triton.language as tl", "", *self.helpers.values()]
        source = "\n".join([*head, "@triton.jit", f"def {self.name}({names}):", *self.lines, ""])
        return Kernel(self.name, source, arguments, self.buffers, grid, seed, tuple(divisible))


def embeddings(inner: tuple[int, ...], outer: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Which dimensions of `outer` those of `inner` may become, in order."""
    if not inner:
        return [()]
    found = []
    for d in range(len(outer) - len(inner) + 1):
        if inner[0] in (1, outer[d]):
            found += [(d, *(d + 1 + e for e in rest)) for rest in embeddings(inner[1:], outer[d + 1 :])]
    return found


def cast_domain(tile: Tile, dtype: str) -> Domain | None:
    own = tile.domain
    if dtype in FLOATS:
        if own.size > LARGEST[dtype]:
            return None
        if not own.exact and not tile.is_float:
            return None
        error = own.error + (own.size * 2.0 ** -MANTISSA[dtype] if not own.exact else 0)
        if dtype == "f16" and own.grain > 20:
            return None
        grow = 1 if own.size * 2**own.grain <= 2 ** MANTISSA[dtype] else 1 + 2.0 ** -MANTISSA[dtype]
        return Domain(own.low * grow, own.high * grow, own.grain, error, own.special)
    if not own.exact or own.special:
        return None
    if dtype == "i1":
        return Domain(0, 1)
    if tile.is_float:
        whole = whole_range(dtype)
        low, high = math.trunc(own.low), math.trunc(own.high)
        return Domain(low, high) if whole.low <= low and high <= whole.high and own.size < 2**53 else None
    return wrapped(dtype, own.low, own.high)
