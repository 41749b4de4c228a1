"""Trace a Dynamo graph (what a torch.compile backend is given) to the same dialect that `trace` gives.

Dynamo hands over torch-level calls in which parameters and buffers are placeholders. Running it under `make_fx` with
pre-dispatch tracing, in the fake mode of its own placeholders, keeps `linear`, `layer_norm`, attention and the like
as one node each, where AOTAutograd would take them apart.

What the graph writes in place in an input directly (a static KV cache) stays so: the write is a call that mutates a
placeholder, and what is read afterwards reads the result of the write. Other graphs with writes are functionalized,
and end with copies into the inputs that they changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .errors import ModelError
from .graph import Graph, writes
from .rewrite import fake_mode
from .trace import KEPT_META, rename_placeholder
from .verify import is_version
from .weights import Constant, Read

MODES = frozenset(
    {
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    }
)
"""Calls that set a mode: there are no gradients here, and autocast has left its casts in the trace."""


def trace_dynamo(gm: fx.GraphModule, *, name: str = "compiled") -> Graph:
    """The graph of a Dynamo graph module, with its placeholders by name, without those that nothing reads.

    Parameters and buffers that the graph does not change become weights: `Read` recipes by the name of their
    placeholder in `gm`, whose tensors come with each call. All else is an input: tensors, and sizes as SymInts.
    Python floats that Dynamo made dynamic are fixed to their value, under a guard. Raises ModelError, in one line,
    for what cannot be traced.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    examples = [node.meta["example_value"] for node in placeholders]
    try:
        module = _trace(_Values(gm).run, examples)
        _drop_casts_to_themselves(module.graph)
        if not _writes_are_direct(module.graph):
            module = _trace(_functional(_Values(gm).run), examples)
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"the graph cannot be traced: {reason}") from error
    graph = Graph(module, name=name)
    for node, origin in zip(graph.placeholders, placeholders):
        rename_placeholder(node, origin.name)
        if not node.users:
            graph.fx.erase_node(node)
        elif _is_static(origin) and not any(map(writes, node.users)):
            value = node.meta["val"]
            graph.weights[node.name] = Read(origin.name, tuple(value.shape), value.dtype)
    _lift_constants(graph)
    _tidy(graph)
    return graph


class _Values(fx.Interpreter):
    """Runs a Dynamo graph; a Python float that Dynamo passes as a tensor is its value, which gets a guard."""

    def run_node(self, node: fx.Node) -> Any:
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymFloat) and value.node.has_hint():
            return value.node.guard_float("", 0)
        return super().run_node(node)


def _trace(function: Callable[..., Any], examples: Sequence[Any]) -> fx.GraphModule:
    """The ATen graph of `function`, composite ops kept, in the fake mode of the examples."""
    mode = next((example.fake_mode for example in examples if isinstance(example, FakeTensor)), None)
    if mode is None:
        raise ModelError("it has no tensors among its inputs")
    with tracing(TracingContext(mode)), mode, torch.no_grad(), fx.traceback.preserve_node_meta():
        return make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*examples)


def _functional(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without writes in place; what it did to its arguments is copied to them at the end."""

    def wrap(value: Any) -> Any:
        return FunctionalTensor.to_functional(value) if isinstance(value, Tensor) else value

    def unwrap(value: FunctionalTensor) -> Tensor:
        torch._sync(value)
        return torch._from_functional_tensor(value.elem)

    def functional(*arguments: Any) -> Any:
        outside = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize))
        with outside, FunctionalTensorMode(pre_dispatch=True, export=True):  # export: composite ops are kept
            wrapped = [wrap(argument) for argument in arguments]
            outputs = pytree.tree_map_only(FunctionalTensor, unwrap, function(*wrapped))
            written = {
                index: unwrap(value)
                for index, value in enumerate(wrapped)
                if isinstance(value, FunctionalTensor) and torch._functionalize_has_data_mutation(value.elem)
            }
        for index, value in written.items():
            arguments[index].copy_(value)
        return outputs

    return functional


CASTS = frozenset(getattr(torch.ops.aten.to, name) for name in ("dtype", "dtype_layout", "device", "other"))


def _drop_casts_to_themselves(nodes: fx.Graph) -> None:
    """A tensor instead of its `to` the dtype and device that it has: those are one tensor, and not two."""
    for node in list(nodes.nodes):
        if node.target not in CASTS or not isinstance(node.meta.get("val"), Tensor):
            continue
        schema = node.target._schema.arguments
        given = dict(zip((argument.name for argument in schema), node.args)) | dict(node.kwargs)
        before, after = node.args[0].meta["val"], node.meta["val"]
        same = (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
        if same and not given.get("copy") and given.get("memory_format") is None:
            node.replace_all_uses_with(node.args[0])
            nodes.erase_node(node)


def _writes_are_direct(nodes: fx.Graph) -> bool:
    """Whether every write is to a placeholder, or to the result of a write, that no view shares memory with.

    (Views of what the last write returns are fine: nothing changes under them.) What is read behind a write has to
    read its result.
    """
    place = {node: position for position, node in enumerate(nodes.nodes)}
    return all(
        node.target == torch.ops.aten.detach_.default
        or (
            is_version(node.args[0])
            and not any(_may_alias(user) or place[user] > place[node] for user in node.args[0].users)
        )
        for node in nodes.nodes
        if writes(node)
    )


def _may_alias(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument: views, and composites such as reshape or to."""
    if writes(node) or not isinstance(node.target, torch._ops.OpOverload):
        return not writes(node)
    schema = node.target._schema
    return any(argument.alias_info is not None for argument in (*schema.arguments, *schema.returns))


def _is_static(origin: fx.Node) -> bool:
    """Whether Dynamo knows a placeholder as a parameter or buffer of a module."""
    return "_dynamo_static_input_type" in origin.meta.get("tensor_dict", {})


def _lift_constants(graph: Graph) -> None:
    """Tensors that the traced code made from Python numbers become weights with a constant recipe."""
    first = next(iter(graph.nodes))
    mode = fake_mode(graph)
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph.module, node.target)
        if not isinstance(tensor, Tensor):
            raise ModelError(f"the graph cannot be traced: it calls a graph of its own ({node.target})")
        with graph.fx.inserting_before(first):
            placeholder = graph.fx.placeholder(node.target.strip("_"))
        placeholder.target = placeholder.name
        placeholder.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        graph.weights[placeholder.name] = Constant.of(tensor)
        node.replace_all_uses_with(placeholder)
        graph.fx.erase_node(node)


def _tidy(graph: Graph) -> None:
    """Without calls that set modes; in-place writes whose result nobody reads come last, after all other reads."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node in list(graph.nodes):
        node.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        if node.target in MODES:
            graph.fx.erase_node(node)
        elif node.target == torch.ops.aten.detach_.default:
            node.target = torch.ops.aten.detach.default
        elif writes(node) and not node.users:
            output.prepend(node)
    if not isinstance(output.args[0], (list, tuple)):
        output.args = ((output.args[0],),)
    graph.module.recompile()
