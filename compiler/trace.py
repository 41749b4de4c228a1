"""Trace a model to a graph with symbolic batch and length: parameters lifted to lazy weights, composites kept.

    trace(model)            torch.export over `model(input_ids, attention_mask, position_ids)`; nothing is read
    trace_dynamo(gm, args)  make_fx over a Dynamo graph, for `torch.compile`

Both end in the "traced" dialect: functional ATen in which `linear`, `layer_norm`, `scaled_dot_product_attention` and
the like are still one node each.
"""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from .branches import bound_by_branches
from .errors import InputError, ModelError
from .graph import Graph, size_expr
from .rewrite import source_line
from .token_mixing import first_mixing
from .weights import Cast, Constant, Read, TensorSource, Weight

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What a causal language model is given; each [B, S] int64. Those that its `forward` accepts become inputs."""

POSITIONS: dict[str, Callable[[int], Tensor]] = {
    "attention_mask": lambda length: torch.ones(1, length, dtype=torch.int64),
    "position_ids": lambda length: torch.arange(length)[None],
}
"""The inputs that say where tokens stand: of one row without padding, by its length."""

KEPT_META = ("val", "stack_trace", "nn_module_stack")

Bounds = dict[str, dict[str, int]]
"""Size (B or S) -> "min" and "max"."""

EXAMPLE_SIZES = (2, 8)
"""Batch and length of the example that is traced; 0 and 1 would be taken for constants."""


def trace(model: Any, *, name: str = "forward") -> Graph:
    """The graph of one call of a causal language model without a cache.

    model: an `nn.Module` (transformers or not) whose `forward` takes `input_ids`, or a loaded model, whose
    parameters may be on the meta device. Inputs: those of `INPUTS` that `forward` accepts, [B, S] with B and S
    symbolic. Output: logits [B, S, V]. Weights are `Read` recipes by state dict name; tied weights are one
    placeholder. Buffers are `Constant` recipes. Where a table or a branch of the model bounds S, that is the graph's
    `max_length`, with the reason in `notes`.

    Raises InputError for a model in training mode, ModelError for one that cannot be traced.
    """
    module = model if isinstance(model, nn.Module) else model.skeleton
    source = None if isinstance(model, nn.Module) else model.source
    if module.training:
        raise InputError("expected a model in evaluation mode, found training mode: call model.eval() first")
    inputs = _example_inputs(module)
    names = _canonical_names(module)
    with torch.no_grad(), _as_it_was(module), _fake_parameters(module), _quiet():
        program = _export_with_some_attention(module, inputs)
    graph = _to_graph(program, name, iter(inputs), names, source)
    _bound_length(graph, program)
    bound_by_branches(graph, {name: POSITIONS[name] for name in inputs if name in POSITIONS})
    return graph


class _Logits(nn.Module):
    """A model called for its logits: positional arguments of the given names, no cache, one tensor out."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.options = {"use_cache": False} if takes_any or "use_cache" in parameters else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, inputs)), **self.options)
        return output if isinstance(output, Tensor) else output.logits


def _example_inputs(module: nn.Module) -> dict[str, Tensor]:
    accepted = inspect.signature(module.forward).parameters
    if "input_ids" not in accepted:
        raise InputError(
            f"expected a model whose forward takes input_ids, found {type(module).__name__}({', '.join(accepted)}): "
            "use torch.compile(model, backend='effc') for other models"
        )
    batch, length = EXAMPLE_SIZES
    device = next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))
    examples = {
        "input_ids": torch.zeros(batch, length, dtype=torch.int64, device=device),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64, device=device),
        "position_ids": torch.arange(length, device=device).repeat(batch, 1),
    }
    return {name: example for name, example in examples.items() if name in accepted}


def _canonical_names(module: nn.Module) -> dict[str, str]:
    """State dict name -> the first name under which the same tensor is known (tied weights)."""
    first: dict[int, str] = {}
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Within: what a forward sets on its modules is forgotten behind. In a trace it is no tensor of real numbers."""
    before = [(owner, dict(owner.__dict__), dict(owner._buffers)) for owner in module.modules()]
    try:
        yield
    finally:
        for owner, attributes, buffers in before:
            owner.__dict__.clear()
            owner.__dict__.update(attributes)
            owner._buffers.clear()
            owner._buffers.update(buffers)


@contextmanager
def _fake_parameters(module: nn.Module) -> Iterator[None]:
    """Within: parameters and buffers on the meta device are fake tensors on the CPU, so that no weight is needed."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[Tensor, Tensor] = {}
    replaced: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta or isinstance(tensor, FakeTensor):
                    continue
                if tensor not in fakes:
                    fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    fakes[tensor] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
                replaced.append((table, name, tensor))
    try:
        for table, name, tensor in replaced:
            table[name] = fakes[tensor]
        yield
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor


def _export_with_some_attention(module: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    """Export with SDPA, or with eager attention where the model has no SDPA. The model's own choice is put back."""
    select = getattr(module, "set_attn_implementation", None)
    if select is None:
        return _export(module, inputs)
    chosen = module.config._attn_implementation
    try:
        try:
            select("sdpa")
        except ValueError:
            select("eager")
        return _export(module, inputs)
    finally:
        select(chosen)


def _export(module: nn.Module, inputs: dict[str, Tensor]) -> ExportedProgram:
    """Export with batch and length symbolic; where the model bounds them, once more with the bounds it derives.

    Where the model branches on the values of its inputs, once more along the branches that the example takes.
    """
    from torch._dynamo.exc import UserError
    from torch._functorch import config
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    wrapper = _Logits(module, inputs).eval()

    def export(bounds: Bounds, follow_values: bool) -> ExportedProgram:
        batch, length = (Dim(name, **{"min": 1, **bounds.get(name, {})}) for name in ("B", "S"))
        sizes = ({0: batch, 1: length},) * len(inputs)
        with config.patch(fake_tensor_propagate_real_tensors=follow_values):
            program = torch.export.export(wrapper, tuple(inputs.values()), dynamic_shapes=(sizes,), strict=False)
            return program if _is_functional(program.graph) else program.run_decompositions({})

    bounds: Bounds = {}
    follow_values = False
    try:
        while True:
            try:
                return export(bounds, follow_values)
            except GuardOnDataDependentSymNode:
                if follow_values:
                    raise
                follow_values = True
            except UserError as error:
                tighter = _tighter_bounds(bounds, str(error))
                if tighter == bounds:
                    raise
                bounds = tighter
    except Exception as error:
        raise ModelError(_refusal(module, wrapper, inputs, error)) from error


def _is_functional(nodes: fx.Graph) -> bool:
    """Whether nothing is updated in place. Making it so costs three times the export, and few models need it."""
    for node in nodes.nodes:
        if node.target == torch.ops.aten.detach_.default:
            node.target = torch.ops.aten.detach.default
        if node.op == "get_attr" or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
            return False
    return True


def _tighter_bounds(bounds: Bounds, message: str) -> Bounds:
    """What the exporter asks for: `S = Dim('S', min=2, max=128)` --> {"S": {"min": 2, "max": 128}}

    Where the largest size takes a branch of its own (`!= 128`: it needs no slice of a table), that size is left out.
    """
    _, _, fixes = message.partition("Suggested fixes:")
    found = re.findall(r"(\w+) = Dim\('\w+'((?:, (?:min|max)=\d+)*)\)", fixes)
    unequal = {int(size) for size in re.findall(r"!= (\d+)", message)}
    bounds = {name: dict(limits) for name, limits in bounds.items()}
    for name, options in found:
        bounds[name] = {key: int(value) for key, value in re.findall(r"(min|max)=(\d+)", options)}
        if bounds[name].get("max") in unequal:
            bounds[name]["max"] -= 1
    violated = re.search(r"Constraints violated \((\w)\)", message)
    if not found and unequal and not bounds and violated:  # `64 - max(0, 64 - S) != 64`: up to where a table ends
        bounds[violated[1]] = {"max": min(unequal) - 1}
    elif not found and unequal:  # `128*S != 16384`: a product of the largest size with another
        for limits in bounds.values():
            if any(size % limits.get("max", size + 1) == 0 for size in unequal):
                limits["max"] -= 1
    return bounds


def _refusal(module: nn.Module, wrapper: nn.Module, inputs: dict[str, Tensor], error: Exception) -> str:
    """One line: what the exporter says first about the model, or about the size that it cannot keep symbolic."""
    fixed = re.search(r"^\s+([BS]) = (\d+)$", str(error), re.MULTILINE)
    if fixed:
        size = {"B": "batch size", "S": "length"}[fixed[1]]
        reason = f"the code needs a fixed {size} (it loops over it in Python, or branches on it)"
        if fixed[1] == "S" and (mixing := _mixing_of_tokens(wrapper, inputs)):
            reason += f"; tokens are mixed by {mixing}"
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        guard = next((line for line in lines if line.startswith("- Not all values of")), None)
        reason = lines[0] if guard is None else re.sub(r" = L\[\S+ in the specified range", "", guard[2:])
        reason = re.sub(r"L\['inputs'\]\[\d\]\.size\(\)\[(\d)\]", lambda size: "BS"[int(size[1])], reason)
    return f"{type(module).__name__} cannot be traced with a symbolic batch and length: {reason}"


def _mixing_of_tokens(wrapper: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """The op that mixes tokens first, and its source line; None where the model does not run at a fixed length."""
    try:
        node = first_mixing(wrapper, inputs)
    except Exception:  # whatever it is, the refusal stands
        return None
    return node and f"{node.name} ({node.target}) from {source_line(node)}"


NOISY = ("transformers", "torch._subclasses", "torch.export", "torch.fx.experimental.symbolic_shapes")
"""Loggers with warnings that a user can do nothing about."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: no warnings from PyTorch's and transformers' internals.

    (A failing export prints the graph it has so far to stderr.)
    """
    import logging
    import warnings

    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _to_graph(
    program: ExportedProgram,
    name: str,
    inputs: Iterator[str],
    names: Mapping[str, str],
    source: TensorSource | None,
) -> Graph:
    nodes = program.graph
    weights: dict[str, Weight] = {}
    placeholders = [node for node in nodes.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs):
        if spec.kind is InputKind.USER_INPUT:
            rename_placeholder(node, next(inputs))
            continue
        if not node.users:
            nodes.erase_node(node)
            continue
        target = str(spec.target).removeprefix("model.")
        is_parameter = spec.kind is InputKind.PARAMETER
        recipe = _recipe(program, node, spec.target, names.get(target, target), source, is_parameter)
        rename_placeholder(node, names.get(target, target).replace(".", "_"))
        weights[node.name] = recipe
    (output,) = (node for node in nodes.nodes if node.op == "output")
    specs = zip(output.args[0], program.graph_signature.output_specs)
    output.args = (tuple(value for value, spec in specs if spec.kind is OutputKind.USER_OUTPUT),)
    for node in nodes.nodes:
        node.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        _forget_real(node.meta.get("val"))
    module = fx.GraphModule(program.graph_module, nodes)
    return Graph(module, name=name, weights=weights, files=getattr(source, "recipes", {}))


def _forget_real(value: Any) -> None:
    """Drop the values that an export along the example's branches computed: from here on, only shapes count."""
    from torch._subclasses.fake_tensor import FakeTensor

    for fake in value if isinstance(value, list | tuple) else (value,):
        if isinstance(fake, FakeTensor):
            fake.real_tensor = None
            fake.fake_mode.propagate_real_tensors = False


def rename_placeholder(placeholder: fx.Node, name: str) -> None:
    placeholder._rename(name)
    placeholder.target = placeholder.name


def _recipe(
    program: ExportedProgram, node: fx.Node, target: str, name: str, source: TensorSource | None, is_parameter: bool
) -> Weight:
    """The recipe of a lifted parameter, buffer or constant of the traced module; all but parameters by their values."""
    from torch._subclasses.fake_tensor import FakeTensor

    fake = node.meta["val"]
    tensor = program.state_dict.get(target)
    if tensor is None:
        tensor = program.constants[target]
    held = source is not None and name in source.names
    if held and not is_parameter:
        return Constant.of(source.read(name).to(fake.dtype))
    if isinstance(tensor, nn.Parameter) or held:
        if source is None:
            return Read(name, tuple(fake.shape), fake.dtype)
        recipe = Read(name, source.shape(name), source.dtype(name))
        return recipe if recipe.dtype == fake.dtype else Cast(recipe, fake.dtype)
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        raise ModelError(f"buffer {name} is on the meta device: expected its values, which the trace needs")
    return Constant.of(tensor)


def _bound_length(graph: Graph, program: ExportedProgram) -> None:
    """Pass on what the trace found out about S."""
    from torch.utils._sympy.numbers import int_oo

    length = size_expr(graph.placeholder(INPUTS[0]).meta["val"].shape[1])
    bounds = program.range_constraints.get(length)
    if bounds is not None and bounds.upper < int_oo:
        graph.limit_length(int(bounds.upper), "a table of the model ends there")
