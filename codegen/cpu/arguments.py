"""From the arguments of `kernel[grid](...)` to one native call: what Triton calls a launcher.

A signature such as

    {"x": "*fp32", "n": "i32", "BLOCK": "constexpr", "pair": ("*bf16", "fp32")}

becomes a Python function of its own, written once a kernel, so that a launch costs little more than its `data_ptr()`s:

    def call(num_x, num_y, num_z, ..., a0, a1, a2, a3):
        (a3_0, a3_1,) = a3
        try:
            if a0.is_cpu and a3_0.is_cpu:
                packed = pack(num_x, num_y, num_z, threads(), a0.data_ptr(), a1, a3_0.data_ptr(), a3_1)
            else:
                packed = convert((num_x, num_y, num_z), (a0, a1, a3_0, a3_1))
        ...
        native(packed)

Whatever does not go this way (`convert`) is looked at argument by argument, and refused by name if it has to be.
"""

import operator
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime.cache import get_cache_manager

from ...compiler.errors import CacheError, InputError
from .check import extent
from .launch import EXTENT_CODES, available_threads, cache_folder, load_launcher, packer, struct_code
from .target import host_target

CODES = {"i1": "?", "u1": "?", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q"}
CODES |= {"u64": "Q", "fp16": "f", "f16": "f", "bf16": "f", "fp32": "f", "f32": "f", "fp64": "d", "f64": "d"}
"""Triton's type of an argument -> code of Python's struct module."""

ROUNDED = {"fp16": torch.float16, "f16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDED |= {"f32": torch.float32}
DESCRIPTOR = re.compile(r"tensordesc\w*<(\w+)\[([^\]]*)\]")


@dataclass(frozen=True)
class Argument:
    """One value of the packed struct. name: as the user wrote it; expression: where `call` finds it."""

    name: str
    type: str
    expression: str

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")

    @property
    def code(self) -> str:
        return "P" if self.is_pointer else CODES[self.type]


def arguments_of(name: str, type_: Any, expression: str, unpacking: list[str]) -> Iterator[Argument]:
    """The arguments that one parameter stands for: none for a constexpr, several for tuples and tensor descriptors.

    unpacking: grows by the statements that `call` needs before the expressions hold.
    """
    if type_ == "constexpr":
        return
    if isinstance(type_, tuple):
        parts = [f"{expression}_{k}" for k in range(len(type_))]
        unpacking.append(f"({''.join(f'{part}, ' for part in parts)}) = {expression}")
        for k, (part, inner) in enumerate(zip(parts, type_, strict=True)):
            yield from arguments_of(f"{name}[{k}]", inner, part, unpacking)
    elif found := DESCRIPTOR.match(type_):
        rank = found[2].count(",") + 1
        yield from descriptor_arguments(name, found[1], rank, expression)
    elif type_.startswith("*") or type_ in CODES:
        yield Argument(name, type_, expression)
    else:
        raise InputError(f"argument {name} has type {type_}, which a CPU does not take")


def descriptor_arguments(name: str, element: str, rank: int, descriptor: str) -> Iterator[Argument]:
    """What Triton's front end makes of a tensor descriptor: pointer, sizes and strides, flags, sizes and strides."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    yield Argument(name, f"*{element}", f"{descriptor}.base")
    flags = [f'{descriptor}.padding == "nan"']
    if "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__:  # since Triton 3.7
        flags.append(f"{descriptor}.round_f32_to_tf32")
    for size_type in ("i64", "i32"):
        for k in range(rank):
            yield Argument(f"{name}.shape[{k}]", size_type, f"{descriptor}.shape[{k}]")
        for k in range(rank):
            yield Argument(f"{name}.strides[{k}]", "i64", f"{descriptor}.strides[{k}]")
        for flag in flags if size_type == "i64" else ():
            yield Argument(name, "i1", flag)


CALL = """
def call(
    num_x, num_y, num_z, stream, function, kernel_metadata, launch_metadata, enter_hook, exit_hook{parameters}
):
    {unpacking}
    try:
        if {on_cpu}:
            packed = pack(num_x, num_y, num_z, threads(){values})
        else:
            packed = convert((num_x, num_y, num_z), ({plain}))
    except (AttributeError, TypeError, OverflowError, error):
        packed = convert((num_x, num_y, num_z), ({plain}))
    if enter_hook is not None:
        enter_hook(launch_metadata)
    native(packed)
    if exit_hook is not None:
        exit_hook(launch_metadata)
"""


def write_call(
    kernel: str, signature: dict, c_types: Sequence[str], native: Callable[[bytes], None], checked: bool = False
) -> Callable:
    """The Python function of the module's docstring. signature: parameter -> Triton type, constexprs included.

    checked: the native code also takes where each pointer's tensor begins and ends.
    """
    unpacking: list[str] = []
    arguments: list[Argument] = []
    for k, (name, type_) in enumerate(signature.items()):
        arguments += arguments_of(str(name), type_, f"a{k}", unpacking)
    pointers = [argument.expression for argument in arguments if argument.is_pointer]
    extents = [EXTENT_CODES] * len(pointers) if checked else []
    pack = packer([*(argument.code for argument in arguments), *extents])
    wanted = [struct.calcsize(struct_code(c_type)) for c_type in c_types]
    if [struct.calcsize(argument.code) for argument in arguments] != wanted:
        found = ", ".join(argument.type for argument in arguments)
        raise InputError(f"kernel {kernel}: arguments ({found}) are not what its code takes ({', '.join(c_types)})")
    values = [f"{a.expression}.data_ptr()" if a.is_pointer else rounded_text(a) for a in arguments]
    source = CALL.format(
        parameters="".join(f", a{k}" for k in range(len(signature))),
        unpacking="; ".join(unpacking) or "pass",
        on_cpu=" and ".join(f"{a.expression}.is_cpu" for a in arguments if a.is_pointer) or "True",
        values="".join(f", {value}" for value in [*values, *(f"*extent({p})" for p in pointers if checked)]),
        plain="".join(f"{a.expression}, " for a in arguments),
    )
    scope = {"pack": pack, "threads": available_threads, "native": native, "rounded": rounded, "error": struct.error}
    scope["extent"] = extent
    scope["convert"] = lambda grid, plain: convert(kernel, arguments, pack, grid, plain, checked)
    exec(source, scope)
    return scope["call"]


def rounded_text(argument: Argument) -> str:
    return f"rounded({argument.expression}, {argument.type!r})" if "16" in argument.type[-2:] else argument.expression


def rounded(value: float, type_: str) -> float:
    """A float as the nearest one of a narrower type."""
    return torch.tensor(value, dtype=ROUNDED[type_]).item() if type_ in ROUNDED else value


def convert(
    kernel: str, arguments: Sequence[Argument], pack: Callable, grid: tuple, values: tuple, checked: bool = False
) -> bytes:
    """Pack what is not plain: objects around tensors, addresses, numbers that need rounding. Raises InputError."""
    found: list[Any] = []
    for argument, value in zip(arguments, values, strict=True):
        where = f"kernel {kernel}: argument {argument.name}"
        if argument.is_pointer:
            found.append(address(where, value))
        elif argument.code in "fd":
            if not isinstance(value, int | float):
                raise InputError(f"{where} is {type(value).__name__}, expected a number ({argument.type})")
            found.append(rounded(float(value), argument.type))
        else:
            try:
                struct.pack(argument.code, operator.index(value))
            except (TypeError, struct.error) as error:
                raise InputError(f"{where} is {value!r}, expected a number of type {argument.type}") from error
            found.append(operator.index(value))
    try:
        sizes = [operator.index(size) for size in grid]
        if checked:
            found += [end for a, value in zip(arguments, values, strict=True) if a.is_pointer for end in extent(value)]
        return pack(*sizes, available_threads(), *found)
    except (TypeError, struct.error) as error:
        raise InputError(f"kernel {kernel}: grid {grid} is not made of integers below 2**31") from error


def address(where: str, value: Any) -> int:
    """Where a pointer argument points to: a CPU tensor, something around one, or a number that is the address."""
    if isinstance(value, int):
        return value
    device = getattr(value, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        raise InputError(f"{where} is on {device}, and this launch runs on the CPU: move all arguments to one device")
    if not hasattr(value, "data_ptr"):
        raise InputError(f"{where} is {type(value).__name__}, expected a tensor")
    return value.data_ptr()


def make_launcher(source: Any, metadata: Any) -> Callable:
    """What Triton calls to run a compiled kernel: loads the library, built again where the cache has lost it."""
    name = f"{source.name[:150]}.cpp"
    path = get_cache_manager(metadata.hash).get_file(name)
    if path is None:
        raise CacheError(f"{name} is gone from Triton's cache (TRITON_CACHE_DIR): remove the folder {metadata.hash}")
    target = host_target(metadata.arch, checked=False)  # but where its name says so
    native = load_launcher(Path(path).read_text(), target, cache_folder())
    return write_call(metadata.name, dict(source.signature), metadata.params, native, target.checked)
