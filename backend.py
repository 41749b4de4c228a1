"""The torch.compile backend: `torch.compile(model, backend="effc")`, for inference.

Dynamo's graph goes through the same passes, schedule and build as any other. The module keeps its own parameters:
where a pass merged several into one, the parameters become views of the merged tensor, so that nothing is held twice
and an in-place change of a parameter is a change of the merged tensor too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .codegen.build import build_native
from .codegen.cpu import host_target
from .codegen.executable import Executable, NativeExecutable, runtime_sizes, size_function
from .codegen.expr import python_text
from .codegen.launcher import TritonExecutable, fallback_calls, manifest_of
from .codegen.memory import plan_memory
from .codegen.schedule import schedule
from .codegen.target import CPU, CUDA
from .compiler.dynamo import trace_dynamo
from .compiler.errors import InputError, ModelError
from .compiler.estimate import readable
from .compiler.evaluate import evaluate
from .compiler.files import write_atomically
from .compiler.graph import Graph, is_tensor, size_expr
from .compiler.load import refuse_subclasses
from .compiler.options import check_rounding
from .compiler.schemes import scheme_of
from .compiler.weights import Concat, Read, Weight
from .passes import pipeline
from .report import GraphExplanation, dump_schedule, explain_graph, shortened
from .runtime.store import cache_dir

OPTIONS = ("passes", "skip", "dump", "rounding", "quantize")


@dataclass
class Compiled:
    """One graph that torch.compile gave us, and what became of it."""

    explanation: GraphExplanation
    executable: Executable | None


COMPILED: list[Compiled] = []
"""Every graph compiled through this backend in this process, in order: what `effc.explain()` prints."""


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **unused: Any
) -> Callable[..., tuple[Any, ...]]:
    """Compile a Dynamo graph; the entry point of the backend.

    options: {"passes": functions or names of passes to run, "skip": names of those to leave out, "dump": a folder,
    "rounding": "eager" or "fp32", "quantize": a scheme}, as `torch.compile(..., options=...)` gives them (rounding and
    quantize as in `effc.compile`);
    EFFC_DUMP names the folder too. Raises InputError for a model in training mode and for an input that requires a
    gradient.
    """
    options = dict(options or {})
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise InputError(f"unknown option {unknown[0]!r} of backend effc; it takes {', '.join(OPTIONS)}")
    rounding, scheme = check_rounding(options.get("rounding", "eager")), scheme_of(options.get("quantize", "none"))
    refuse_training(example_inputs)
    folder = options.get("dump") or os.environ.get("EFFC_DUMP")
    dump = Path(folder) / f"graph{len(COMPILED)}" if folder else None

    name = f"graph{len(COMPILED)}"
    try:
        if (module := compiled_module()) is not None:
            refuse_subclasses(module)
        graph = trace_dynamo(gm, name=name)
    except ModelError as refusal:
        warnings.warn(f"effc: {name} runs in eager PyTorch: {refusal}", stacklevel=2)
        COMPILED.append(Compiled(GraphExplanation.refused(name, str(refusal)), None))
        return gm.forward
    passes = pipeline.quantized(options.get("passes", pipeline.PASSES), scheme)
    graph, report = pipeline.run(graph, passes, skip=options.get("skip", ()), dump=dump and dump / "graphs")
    device = device_of(graph)
    target = host_target() if device == "cpu" else None
    scheduled = schedule(graph, CPU if target else CUDA, pack=False, rounding=rounding)
    names = scheduled.scope.names
    manifest, fallbacks = manifest_of(scheduled.schedule, names), fallback_calls(scheduled)
    executable: Executable
    if target is not None:
        plan = plan_memory(scheduled.schedule)
        library = build_native(scheduled.schedule, plan, names, target, cache_dir() / "libraries")
        executable = NativeExecutable(manifest, library, fallbacks)
    else:
        executable = TritonExecutable(scheduled.schedule, names, manifest, fallbacks, device)
    explanation = explain_graph(scheduled, report.steps, [*graph.notes, *held_twice(scheduled.recipes)])
    if dump is not None:
        dump_schedule(scheduled, dump, target)
        write_atomically(dump / "index.txt", f"{report}\n{explanation}\n")
    COMPILED.append(Compiled(explanation, executable))
    return Runner(gm, graph, executable, scheduled.recipes, names)


class Runner:
    """What Dynamo calls: binds its arguments to the graph's inputs and weights, and runs."""

    def __init__(
        self,
        gm: fx.GraphModule,
        graph: Graph,
        executable: Executable,
        recipes: Mapping[str, Weight],
        names: Mapping[Any, str],
    ) -> None:
        positions = {node.name: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
        self.inputs = [(name, positions[name]) for name in graph.inputs]
        self.weights = LiveWeights(recipes, positions, executable.device)
        self.executable = executable
        order = tuple(name for name, _, _ in executable.manifest.sizes)
        self.outputs: list[Callable[..., Any] | None] = []  # None: the run's next tensor
        for node in graph.outputs:
            text = repr(node) if not isinstance(node, fx.Node) else ""
            if isinstance(node, fx.Node) and not is_tensor(node):
                text = python_text(size_expr(node), names)
            self.outputs.append(size_function(order, text) if text else None)

    @torch.no_grad()
    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        tensors = {name: arguments[position] for name, position in self.inputs}
        results = iter(self.executable(tensors, self.weights.bind(arguments)))
        sizes = runtime_sizes(self.executable.manifest, tensors)
        return tuple(next(results) if size is None else size(*sizes) for size in self.outputs)


@dataclass(frozen=True)
class Bound:
    """A weight as kernels read it, and what it was made of.

    sources: the tensors that it was made of, held so that no later one takes their address. versions: their version
    counters then; None where `tensor` shares their memory, and so their changes.
    """

    tensor: Tensor
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...] | None

    def is_current(self, sources: Sequence[Tensor]) -> bool:
        """Whether the weight still says what `sources` say. (Inference tensors do not count their changes.)"""
        if any(old.data_ptr() != new.data_ptr() for old, new in zip(self.sources, sources)):
            return False
        return self.versions is None or (
            not any(source.is_inference() for source in sources)
            and all(source._version == version for source, version in zip(sources, self.versions))
        )


class LiveWeights:
    """The weights of a graph over parameters that stay the module's own.

    A recipe that only joins parameters end to end makes them views of the joined tensor. Any other recipe is
    evaluated to a copy, again whenever one of its parameters was replaced or changed in place.
    """

    def __init__(self, recipes: Mapping[str, Weight], positions: Mapping[str, int], device: str) -> None:
        self.positions, self.device = positions, device
        self.recipes = {
            buffer: (recipe, tuple(positions[name] for name in recipe.names())) for buffer, recipe in recipes.items()
        }
        self.bound: dict[str, Bound] = {}

    def bind(self, arguments: Sequence[Any]) -> dict[str, Tensor]:
        """The tensor of each weight for one call."""
        for buffer, (recipe, positions) in self.recipes.items():
            sources = [arguments[position] for position in positions]
            if buffer not in self.bound or not self.bound[buffer].is_current(sources):
                self.bound[buffer] = self.make(recipe, sources, arguments)
        return {buffer: bound.tensor for buffer, bound in self.bound.items()}

    def make(self, recipe: Weight, sources: Sequence[Tensor], arguments: Sequence[Any]) -> Bound:
        versions = None
        if isinstance(recipe, Read) and sources[0].is_contiguous():
            tensor = sources[0].detach()
        elif is_join(recipe) and all(source.is_contiguous() for source in sources):
            tensor = join(sources)
        else:
            tensor = torch.empty(recipe.shape, dtype=recipe.dtype, device=self.device)
            evaluate(recipe, Arguments(arguments, self.positions), out=tensor)
            versions = tuple(0 if source.is_inference() else source._version for source in sources)
        return Bound(tensor, tuple(source.detach() for source in sources), versions)


class Arguments:
    """The arguments of a call as a source of tensors."""

    def __init__(self, arguments: Sequence[Any], positions: Mapping[str, int]) -> None:
        self.arguments, self.positions = arguments, positions

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.positions)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.read(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name).dtype

    def read(self, name: str) -> Tensor:
        return self.arguments[self.positions[name]].detach()


def held_twice(recipes: Mapping[str, Weight]) -> list[str]:
    """What a reader should know of parameters whose copy in another form lies beside them."""
    copies = [
        recipe for recipe in recipes.values() if recipe.names() and not (isinstance(recipe, Read) or is_join(recipe))
    ]
    names = list(dict.fromkeys(name for recipe in copies for name in recipe.names()))
    total = sum(recipe.numel * recipe.dtype.itemsize for recipe in copies)
    if not copies:
        return []
    return [f"kernels read a copy of parameters in another form, {readable(total)}: {shortened(names)}"]


def is_join(recipe: Weight) -> bool:
    """Whether a recipe lays parameters end to end, each once: then they can be views of the result."""
    return (
        isinstance(recipe, Concat)
        and recipe.dim == 0
        and all(isinstance(part, Read) for part in recipe.inputs)
        and len(set(recipe.names())) == len(recipe.inputs)
    )


def join(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of several, end to end; the parameters become views of it, unless they already lie so."""
    first = parameters[0]
    rows = sum(parameter.shape[0] for parameter in parameters)
    ends = [parameter.data_ptr() + parameter.nbytes for parameter in parameters]
    same_storage = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    if len(same_storage) == 1 and all(p.data_ptr() == end for p, end in zip(parameters[1:], ends)):
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    joined = first.new_empty((rows, *first.shape[1:]))
    start = 0
    for parameter in parameters:
        part = joined[start : start + parameter.shape[0]]
        part.copy_(parameter)
        parameter.data = part
        start += parameter.shape[0]
    return joined


# --- what is refused ---------------------------------------------------------------------------------------------


def refuse_training(example_inputs: Sequence[Any]) -> None:
    """Raise for a module in training mode or an input that wants a gradient; warn once where parameters do."""
    module = compiled_module()
    if module is not None and module.training:
        raise InputError("backend effc compiles for inference, found a model in training mode: call model.eval() first")
    wants = [x for x in example_inputs if isinstance(x, Tensor) and x.requires_grad]
    if not torch.is_grad_enabled() or not wants:
        return
    if any(not isinstance(x, nn.Parameter) for x in wants):
        raise InputError("backend effc computes no gradients, found an input that requires one: detach it")
    warnings.warn(
        "effc: parameters require gradients, but outputs carry none; run under torch.no_grad() to silence this",
        stacklevel=2,
    )


def compiled_module() -> nn.Module | None:
    """The module whose forward Dynamo is compiling, if it is one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        names = InstructionTranslator.current_tx().output.root_tx.f_locals
    except AttributeError:
        return None
    found = (names.get("self"), names.get("fn"))  # fn: Dynamo compiles modules of torch.nn itself through a wrapper
    return next((module for module in found if isinstance(module, nn.Module)), None)


def device_of(graph: Graph) -> str:
    """The one device of a graph's tensors."""
    devices: Iterable[str] = {str(node.meta["val"].device) for node in graph.placeholders if is_tensor(node)} or {"cpu"}
    if len(set(devices)) > 1:
        raise InputError(f"backend effc compiles for one device, found tensors on {', '.join(sorted(devices))}")
    return next(iter(devices))
