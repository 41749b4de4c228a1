"""Rows of activations rounded to codes, once for all linears that read them, with the norm before them.

    fake_quantize(rms_norm(x, g), "int8_g32")  -->  codes int8 [M, K], scales fp32 [M, groups], sums fp32 [M, runs]

One program a row, which it keeps as [runs, RUN]: a run is what one scale, or one sum, is of. What the codes and scales
are, and what becomes of NaN, `activation_formats` says.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from ..compiler.activation_formats import find_activation
from ..compiler.graph import dtype_of, sizes
from .domain import NoKernel
from .kernel import ZERO, Layout, Rounded, contiguous_strides
from .linear import DTYPES, flat_rows
from .prologue import Norm, joins_product, norm_of
from .quantized import format_of, has_parts, readers, step_of, why_not
from .scope import Scope
from .template import Arguments, power_of_two

MOST = 1 << 15
"""Elements of a row that one program can hold."""

QUANTIZE = """
@triton.jit
def {{ name }}({{ header }}):
    row = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, RUNS)
    place = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
#% if masks
    there = {{ masks }}
#% endif
    x = tl.load(x_ptr + row * {{ x_stride }} + place{{ ", mask=there, other=0.0" if masks }}).to(tl.float32)
#% for line in norm
    {{ line }}
#% endfor

    largest = tl.max(tl.abs(x), axis=1)
    unknown = tl.sum(x * 0.0, axis=1)
#% if by_row
    largest, unknown = tl.max(largest, axis=0), tl.sum(unknown, axis=0)
#% endif
    scale = largest / 127.0
    scale = tl.where(scale < {{ tiny }}, 0.0, scale) + unknown
    inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
    inverse = inverse{{ "" if by_row else "[:, None]" }}
    codes = libdevice.rint(tl.where(inverse > 0.0, x * inverse, 0.0))

    tl.store(codes_ptr + row * {{ k_stored }} + place, codes.to(tl.int8)
        {{- ", mask=run[:, None] < " ~ runs if masks_runs }})
#% if by_row
    tl.store(scales_ptr + row, scale)
#% else
    tl.store(scales_ptr + row * {{ runs }} + run, scale{{ ", mask=run < " ~ runs if masks_runs }})
#% endif
#% for part in range(parts)
#% if parts > 1
    total = tl.sum(tl.where(tl.arange(0, RUN)[None, :] // {{ part_size }} == {{ part }}, codes, 0.0), axis=1)
#% else
    total = tl.sum(codes, axis=1)
#% endif
    sums = sums_ptr + row * {{ runs * parts }} + run{{ " * " ~ parts ~ " + " ~ part if parts > 1 }}
    tl.store(sums, scale * total{{ ", mask=run < " ~ runs if masks_runs }})
#% endfor
"""


def lower(scope: Scope, node: fx.Node) -> None:
    """The launch that rounds an activation, for the linears that read it."""
    format, (*_, depth) = find_activation(node.args[1]), sizes(node)
    if format.dtype != torch.int8:
        raise NoKernel(f"activations in {format.name} have no kernel")
    if not depth.is_Integer or not 0 < depth <= MOST or dtype_of(node) not in DTYPES:
        raise NoKernel(f"rows of {depth} {dtype_of(node)} are not quantized by a kernel")
    linears = [user for user in node.users if has_parts(user) and user.args[0] is node and user not in scope.refused]
    if len(linears) < len(node.users) or node in scope.outputs or any(map(why_not, linears)):
        raise NoKernel("something other than a linear with a kernel reads the rounded values")
    k = int(depth)
    steps = [step_of(user.args[1], readers(user.args[1], scope.refused)) for user in linears]
    with_sums = [step for step, user in zip(steps, linears) if needs_sums(user)]
    run = format.group or min(steps)
    stored = -(-k // max(run, *steps)) * max(run, *steps)
    part = min([run, *with_sums])
    runs = stored // run

    x, norm = node.args[0], None
    if x not in scope.layouts and joins_product(x):
        norm = norm_of(scope, x, flat_rows(scope, x.args[0]))
    source = norm.x if norm is not None else flat_rows(scope, x)
    rows = source.sizes[0]
    by_row = format.group is None
    layout = {
        "codes": new(scope, node, "codes", (rows, stored), torch.int8),
        "scales": new(scope, node, "scales", (rows, 1 if by_row else runs), torch.float32),
        "sums": new(scope, node, "sums", (rows, stored // part), torch.float32) if with_sums else None,
    }
    scope.rounded[node] = Rounded(**layout, run=part)

    arguments = Arguments()
    arguments.pointer("x_ptr", source)
    if norm is not None:
        norm.add_pointers(arguments)
    for name, place in layout.items():
        if place is not None:
            arguments.pointer(f"{name}_ptr", place)
    x_stride = arguments.size("x_stride", source.strides[0])
    arguments.constant("RUNS", power_of_two(runs))
    arguments.constant("RUN", run)
    whole = k == stored
    masks_runs = power_of_two(runs) != runs
    masks = f"place < {k}" if not whole else f"run[:, None] < {runs}" if masks_runs else ""
    launch = arguments.launch(
        "norm_quantize" if norm is not None else "quantize",
        QUANTIZE,
        (rows, sympy.Integer(1), sympy.Integer(1)),
        (node.name,),
        x_stride=x_stride,
        norm=[] if norm is None else norm_lines(norm, bool(masks)),
        masks=masks,
        masks_runs=masks_runs,
        by_row=by_row,
        tiny=repr(torch.finfo(torch.float32).tiny),
        k_stored=stored,
        runs=runs,
        parts=run // part if with_sums else 0,
        part_size=part,
    )
    scope.add(launch)


def needs_sums(linear: fx.Node) -> bool:
    format = format_of(linear.args[1])
    return format.asymmetric or format.zero != 0


def new(scope: Scope, node: fx.Node, name: str, shape: tuple[object, ...], dtype: torch.dtype) -> Layout:
    shape = tuple(map(sympy.sympify, shape))
    return Layout(
        scope.temporary(f"{node.name}.{name}", sympy.prod(shape), dtype), ZERO, shape, contiguous_strides(shape)
    )


def norm_lines(norm: Norm, masks: bool) -> list[str]:
    """Lines that normalize the row that lies in `x` [RUNS, RUN]; what is masked stays 0."""
    lines = norm.statistics_of("x", "there" if masks else "", "tl.sum(tl.sum({}, axis=1), axis=0)")
    lines += norm.normalize(", mask=there, other=0.0" if masks else "", place="place")
    return [*lines, "x = tl.where(there, x, 0.0)"] if masks and norm.centers else lines
