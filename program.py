"""A compiled model: `program = effc.compile(model)`, then `program(input_ids)` or `program.generate(input_ids)`.

The four graphs of a model are made one after the other, each only when it is first run:

    model --trace--> forward --passes--> forward (fused) --materialize_kv--> prefill, extend, decode
          --schedule--> kernels --build--> native code

What was built lies in the cache under a key of everything that it depends on. A warm start reads it from there; it
traces and compiles nothing and imports neither transformers nor sympy.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .codegen.executable import Executable, NativeExecutable
from .compiler.errors import InputError, ModelError, OptionWarning
from .compiler.evaluate import evaluate
from .compiler.files import read_sealed, sealed, unsealed, write_atomically
from .compiler.load import LoadedModel
from .compiler.options import check_ring, check_rounding, check_stream
from .compiler.schemes import scheme_of
from .compiler.weights import Weight
from .runtime import decode, store
from .runtime.kv_cache import Ring, State
from .stages import Built, Options, Stages, build

if TYPE_CHECKING:
    from .codegen.cpu import CpuTarget
    from .compiler.graph import Graph
    from .passes.pipeline import Pass
    from .report import Explanation

DEFAULT_SPARE = 256
"""Slots beside the window, where a streaming cache asks for none: what prefill runs at a time, less one."""

KINDS = ("forward", "prefill", "extend", "decode")
"""The graphs of a program. forward has no cache; the others read and write one."""


@dataclass(frozen=True)
class ProgramConfig:
    """What decoding needs to know of a model.

    cache_layout: what each buffer of the cache is. max_position: the context length, if the
    model has one. inputs: what a call without a cache takes. cache_refusal: why there is no cache, where that is so.
    """

    vocab_size: int
    max_position: int | None
    eos_token_ids: tuple[int, ...]
    cache_layout: tuple[State, ...]
    inputs: tuple[str, ...]
    cache_refusal: str | None = None


class Program:
    """A causal language model, compiled. Made by `effc.compile`."""

    def __init__(self, model: LoadedModel, options: Options, dump: Path | None = None) -> None:
        self.model, self.options = model, options
        self.stages = Stages(model, options, dump)
        self.target = host_target()
        self.cache = store.cache_dir()
        self._executables: dict[tuple[str, bool], Executable] = {}
        self._built: dict[tuple[str, bool], Built] = {}
        self._weights: dict[str, Tensor] = {}
        self._bound: dict[tuple[str, bool], dict[str, Tensor]] = {}

    def __reduce__(self) -> str:
        raise TypeError("a Program holds native code and cannot be copied or pickled: compile again, the cache has it")

    # --- running -----------------------------------------------------------------------------------------------

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] of input_ids [B, S]. attention_mask [B, S] hides keys where it is 0, at the left only.

        Positions count what is visible, as in Hugging Face's `generate`, so a padded row equals that row alone.

        Raises InputError for ids out of the vocabulary or more of them than the model has positions for.
        """
        decode.check_prompt(input_ids, attention_mask, 0, self.config.vocab_size, self.config.max_position)
        decode.check_padding(self.config, attention_mask)
        padded = attention_mask is not None and not bool(attention_mask.all())
        visible = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        inputs = {"input_ids": input_ids.long(), "position_ids": (visible.cumsum(-1) - 1).clamp(min=0)}
        if attention_mask is not None:
            inputs["attention_mask"] = visible
        return self.run("forward", inputs, {}, padded)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue input_ids [B, S]; returns ids [B, S + new]. Options as in `runtime.decode.generate`.

        Raises ModelError for a model that no KV cache can be made for; its logits are there without one.
        """
        return decode.generate(self, input_ids, attention_mask, **options)

    def generate_each(self, prompts: Sequence[Tensor], **options: Any) -> list[Tensor]:
        """Continue prompts [S_b] of any lengths as one batch without padding; see `runtime.decode.generate_each`."""
        return decode.generate_each(self, prompts, **options)

    def run(self, kind: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor], padded: bool) -> Tensor:
        """Run one of the four graphs; states are updated in place. Returns logits."""
        executable = self._executables.get((kind, padded)) or self._load(kind, padded)
        tensors = {name: tensor.contiguous() for name, tensor in inputs.items()}
        return executable({**tensors, **states}, self._bound[kind, padded])[0]

    # --- building ----------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> ProgramConfig:
        found = self._cached("config")
        if found is None:
            found = program_config(self.model, self.stages, self.options.ring)
            self._remember("config", found)
        if self.options.ring is not None and found.cache_layout and not any(state.ring for state in found.cache_layout):
            message = f"ring has no effect: {self.model.name} has no attention that sees a window only"
            warnings.warn(message, OptionWarning, stacklevel=2)
        return found

    @cached_property
    def key(self) -> str | None:
        """Everything that the native code depends on, hashed; None for a model or pass in memory, which has no name."""
        if self.model.identity is None or self.options.identity is None:
            return None
        versions = tuple(version(package) for package in ("torch", "triton", "transformers"))
        parts = (
            self.model.identity,
            self.model.dtype,
            self.options.identity,
            self.target,
            versions,
            source_digest(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def built(self, kind: str, padded: bool = False) -> Built:
        """One graph as native code: from the cache, or compiled now."""
        key = (kind, padded)
        if key not in self._built:
            name = f"{kind}-padded" if padded else kind
            found = self._cached(name)
            if found is None or unsealed(self.libraries / found.library) is None:
                found = build(self.stages, kind, padded, self.target, self.libraries)
                self._remember(name, found)
            self._built[key] = found
        return self._built[key]

    def weights(self, kind: str, padded: bool = False) -> dict[str, Tensor]:
        """The weights of a graph as its kernels read them, by buffer."""
        if (kind, padded) not in self._executables:
            self._load(kind, padded)
        return self._bound[kind, padded]

    def _load(self, kind: str, padded: bool) -> Executable:
        built = self.built(kind, padded)
        self._evaluate(built.recipes.values())
        weights = {buffer: self._weights[recipe.key()] for buffer, recipe in built.recipes.items()}
        fallbacks = ()
        if built.summary.fallbacks:
            from .codegen.launcher import fallback_calls

            fallbacks = fallback_calls(self.stages.scheduled(kind, padded))
        executable = NativeExecutable(built.manifest, self.libraries / built.library, fallbacks)
        self._bound[kind, padded] = weights
        self._executables[kind, padded] = executable
        return executable

    def _evaluate(self, recipes: Iterable[Weight]) -> None:
        """Read the weights that no other graph has read yet, several at a time: unpacking blocks is numpy's work."""
        missing = {recipe.key(): recipe for recipe in recipes if recipe.key() not in self._weights}
        source = self.model.base
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            tensors = pool.map(lambda recipe: evaluate(recipe, source).contiguous(), missing.values())
            self._weights.update(zip(missing, tensors))

    @property
    def libraries(self) -> Path:
        return self.cache / "libraries"

    def _cached(self, name: str) -> Any:
        if self.key is None:
            return None
        return read_record(self.cache / "programs" / self.key / f"{name}.pickle")

    def _remember(self, name: str, value: Any) -> None:
        if self.key is not None:
            write_record(self.cache / "programs" / self.key / f"{name}.pickle", value)

    # --- looking -----------------------------------------------------------------------------------------------

    @property
    def graphs(self) -> dict[str, Graph]:
        """The four graphs after all passes, by kind; traces the model if a warm start has not."""
        return {kind: self.stages.graph(kind, False) for kind in KINDS}

    @property
    def kernels(self) -> dict[str, str]:
        """Triton source of each distinct kernel of prefill and decode, by symbol."""
        from .codegen.build import kernel_file

        found = {}
        for kind in ("prefill", "decode"):
            scheduled = self.stages.scheduled(kind, False)
            for kernel in scheduled.schedule.kernels:
                found[kernel.symbol] = kernel_file(kernel)
        return found

    def explain(self) -> Explanation:
        """What the passes matched and missed, the kernels of prefill and decode, and what runs through ATen."""
        from .report import explain_program

        return explain_program(self)

    def __str__(self) -> str:
        """A table of the graphs; prefill and decode are built for it if they have not been yet."""
        passes = self.built("prefill").summary.passes
        self.built("decode")
        lines = [f"{self.model.name}: {len(KINDS)} graphs on {self.target.isa}, {self.config.vocab_size} tokens"]
        lines.append(f"{'graph':10} {'calls traced':>12} {'kernels':>8} {'launches':>9} {'through ATen':>13}")
        for kind in KINDS:
            if (kind, False) not in self._built and self._cached(kind) is None:
                lines.append(f"{kind:10} {'built when it is first run':>12}")
                continue
            summary = self.built(kind).summary
            lines.append(
                f"{kind:10} {summary.traced_calls:12} {len(summary.kernels):8} {summary.launches:9}"
                f" {len(summary.fallbacks):13}"
            )
        lines.append("passes     " + ", ".join(f"{name} {matches}" for name, matches, _ in passes))
        return "\n".join(lines)


def compile(
    model: str | Path | nn.Module | LoadedModel,
    dtype: torch.dtype | None = None,
    *,
    passes: Iterable[Pass | str] | None = None,
    skip: Iterable[str] = (),
    dump: str | Path | None = None,
    ring: int | None = None,
    stream: tuple[int, int] | None = None,
    rounding: str = "eager",
    quantize: str = "none",
) -> Program:
    """Compile a causal language model for inference.

    model: a known name ("smollm2"), a GGUF file, a Hugging Face folder, a transformers model or `nn.Module` in memory
    (its weights are read once, when a graph is first run), or what `effc.load` gave. dtype: of the weights, fp32 or
    bf16. passes: functions, or names of passes in `effc.passes.PASSES`, to run instead of all of these. skip: names of
    passes to leave out. dump: a folder for the graphs before and after each pass.

    ring: layers with a sliding window cache that window and this many tokens more, instead of every token; that many
    may be taken back. stream: (kept, window): layers without one see, and cache, the first `kept` tokens and the last
    `window`; results are no longer those of the model (a warning says from where on).

    rounding: of bf16 within a kernel: "eager", where eager PyTorch rounds, or "fp32", nowhere but where values are
    stored, which is nearer to the exact result and not eager's.

    quantize: "stored" computes with the blocks that a quantized file has, and with activations of 8 bits in groups of
    32; what a file has in floating point stays so. "w8a8", "w4a8", "w8", "w4" or a format ("int4_g128") round the
    weights of linears to fewer bits, with "a8" the activations too. "none": in `dtype`, whatever the file has.

    Raises ModelError for a model that cannot be found, read or compiled.
    """
    check_rounding(rounding)
    ring = None if ring is None else check_ring(ring)
    stream = None if stream is None else check_stream(stream)
    scheme_of(quantize)
    if not isinstance(model, str | Path | nn.Module | LoadedModel):
        raise InputError(f"expected the name or path of a model, or a model, found {type(model).__name__}")
    if isinstance(skip, str):
        skip = (skip,)
    if isinstance(model, nn.Module):
        refuse_other_devices(model)
    if not isinstance(model, LoadedModel):
        model = load(model, dtype)
    elif dtype is not None and dtype != model.dtype:
        raise InputError(f"the model is loaded as {model.dtype}, compile wants {dtype}: give dtype to effc.load")
    if stream is not None:
        from .passes.stream_attention import Seen

        ring = DEFAULT_SPARE if ring is None else ring
        warnings.warn(Seen(*stream).warning, OptionWarning, stacklevel=2)
    options = Options(None if passes is None else tuple(passes), tuple(skip), ring, stream, rounding, quantize)
    return Program(model, options, None if dump is None else Path(dump))


def refuse_other_devices(module: nn.Module) -> None:
    """Raise for a module whose parameters are not in main memory: a Program is native code for the CPU."""
    found = sorted({str(p.device) for p in module.parameters() if p.device.type not in ("cpu", "meta")})
    if found:
        raise InputError(
            f"effc.compile runs on the CPU, found parameters on {found[0]}: move the model with model.cpu(), or use"
            ' torch.compile(model, backend="effc")'
        )


def load(model: str | Path | nn.Module, dtype: torch.dtype | None = None) -> LoadedModel:
    """Open a model without reading its weights; a known name is fetched into the cache first."""
    from .compiler.load import load as load_model

    if isinstance(model, nn.Module):
        return load_model(model, dtype)
    return load_model(store.resolve(model), dtype, cache=store.cache_dir())


def host_target() -> CpuTarget:
    from .codegen.cpu.target import host_target

    return host_target()


def program_config(model: LoadedModel, stages: Stages, spare: int | None) -> ProgramConfig:
    from .compiler.graph import dtype_of, sizes

    graph, refusal = stages.graph("forward", True), None
    inputs = tuple(graph.inputs)
    try:
        graph = stages.graph("decode", False)
    except ModelError as error:
        refusal = str(error)
    layout = []
    for name in graph.states:
        node = graph.placeholder(name)
        _, heads, _, size = sizes(node)
        ring = Ring(*graph.rings[name], spare) if name in graph.rings else None
        layout.append(State(name, (int(heads), int(size)), dtype_of(node), ring))
    config = model.config
    limits = (getattr(config, "max_position_embeddings", None), graph.max_length)
    eos = getattr(config, "eos_token_id", None)
    (logits,) = graph.outputs
    return ProgramConfig(
        vocab_size=int(sizes(logits)[-1]),
        max_position=min(filter(None, limits), default=None),
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),),
        cache_layout=tuple(layout),
        inputs=inputs,
        cache_refusal=refusal,
    )


# --- records in the cache ----------------------------------------------------------------------------------------


def source_digest() -> str:
    """A hash of effc's own source: a changed compiler finds no old program."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for folder in (root, *(root / name for name in ("compiler", "passes", "codegen", "codegen/cpu", "runtime"))):
        for path in sorted(folder.iterdir()):
            if path.suffix in (".py", ".h"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def write_record(path: Path, value: Any) -> None:
    write_atomically(path, sealed(pickle.dumps(value)))


def read_record(path: Path) -> Any:
    """The value, or None if there is none or it is damaged (it is made again then)."""
    content = read_sealed(path)
    return None if content is None else pickle.loads(content)


__all__ = ["KINDS", "ModelError", "Program", "ProgramConfig", "compile", "load"]
