"""Find a model and open it, reading no weight: a file, a Hugging Face folder, or a module in memory.

What a LoadedModel offers is made on first use, so a warm start that only needs the file's tensors and the converted
tokenizer imports neither transformers nor builds a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint_source import CheckpointSource, of_method
from .converted import config_of_gguf, converted, write_tokenizer
from .errors import InputError, ModelError
from .gguf_file import GgufNames, GgufSource, check_architecture
from .hf_folder import (
    DESCRIPTIONS,
    TOKENIZER_SOURCES,
    SafetensorsSource,
    check_not_packed,
    folder_config,
    quantization_of,
    stored_dtype,
    tensor_files,
)
from .quantized_file import QuantizedSource, is_safetensors
from .skeleton import on_meta, scale_rope, skeleton_of
from .sources import MappedSource, ModuleSource
from .weights import Cast, Constant, TensorSource, Weight, read

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

ROPE_FACTORS = "rope_freqs.weight"
"""What a file divides the frequencies of rope by, beside the parameters."""


@dataclass
class LoadedModel:
    """A model that is opened, not read.

    name: for people. identity: text that changes when the files do, None for a module in memory. dtype: of the weights.
    notes: what a user should hear about the loading, one line each.
    """

    name: str
    identity: str | None
    dtype: torch.dtype
    cache: Path | None = None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> PretrainedConfig | None:
        """The transformers config."""
        raise NotImplementedError

    @cached_property
    def base(self) -> TensorSource:
        """The tensors as they are stored, under the names of the file; needs neither transformers nor a model."""
        raise NotImplementedError

    @cached_property
    def source(self) -> TensorSource:
        """The tensors under the names of the skeleton's state dict, in `dtype`."""
        return MappedSource(self.base, self._recipes())

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model to trace, in eval mode: parameters on the meta device, computed buffers (inv_freq) real."""
        raise NotImplementedError

    @cached_property
    def tokenizer_folder(self) -> Path | None:
        """A folder with tokenizer.json and tokenizer_config.json; None where the model brings no tokenizer."""
        return None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        if self.tokenizer_folder is None:
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_folder, local_files_only=True)

    def module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The transformers model with its weights read, in eval mode: the eager reference.

        dtype: fp32, bf16, ...; None for the dtype that the model was loaded in.
        """
        skeleton = on_meta(self.skeleton, dtype or self.dtype)
        expected = skeleton.state_dict(keep_vars=True)
        by_recipe: dict[int, Tensor] = {}
        tensors = {}
        for name, slot in expected.items():
            if id(slot) not in by_recipe:
                tensor = self.source.read(name).to(slot.dtype).contiguous()
                by_recipe[id(slot)] = tensor if isinstance(slot, nn.Parameter) else tensor.clone()
            tensors[name] = by_recipe[id(slot)]
        skeleton.load_state_dict(tensors, assign=True)
        if hasattr(skeleton, "tie_weights"):
            skeleton.tie_weights()
        return skeleton.requires_grad_(False).eval()

    def _converted(self, kind: str, write: Callable[[Path], object]) -> Path:
        return converted(self.cache, f"{self.name}-{self.identity}", kind, write)

    def _find(self, name: str) -> Weight | None:
        """The recipe over `base` for one parameter of the skeleton; None where the file does not hold it."""
        raise NotImplementedError

    def _recipes(self) -> dict[str, Weight]:
        slots = self.skeleton.state_dict(keep_vars=True)
        aliases: dict[int, list[str]] = {}
        for name, slot in slots.items():
            aliases.setdefault(id(slot), []).append(name)
        recipes = {}
        for name, slot in slots.items():
            found = next((weight for alias in aliases[id(slot)] if (weight := self._find(alias)) is not None), None)
            if found is None and slot.device.type != "meta":
                found = Constant.of(slot)
            if found is None:
                raise ModelError(f"{self.name}: expected a tensor for {name}, found none in the file")
            if found.shape != tuple(slot.shape):
                raise ModelError(f"{self.name}: expected {name} to be {list(slot.shape)}, found {list(found.shape)}")
            recipes[name] = found if found.dtype == slot.dtype else Cast(found, slot.dtype)
        self._note_unread(recipes.values())
        return recipes

    def _note_unread(self, recipes: Iterable[Weight]) -> None:
        used = {name for weight in recipes for name in weight.names()}
        unread = [name for name in self.base.names if name not in used and name != ROPE_FACTORS]
        if unread:
            shown = ", ".join(unread[:4]) + (", ..." if len(unread) > 4 else "")
            self.notes.append(f"{len(unread)} tensors of the file belong to no parameter: {shown}")


@dataclass
class GgufModel(LoadedModel):
    """A GGUF file: its config and tokenizer are converted by transformers, once, into the cache."""

    path: Path = Path()

    @cached_property
    def base(self) -> GgufSource:
        source = GgufSource(self.path)
        check_architecture(source)
        return source

    @cached_property
    def config(self) -> PretrainedConfig:
        folder = self._converted("config", lambda folder: config_of_gguf(self.base).save_pretrained(folder))
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(folder, local_files_only=True)

    @cached_property
    def skeleton(self) -> nn.Module:
        check_architecture(self.base)
        skeleton = skeleton_of(self.config, self.dtype, self.name)
        if ROPE_FACTORS in self.base.names:
            scale_rope(skeleton, self.base.read(ROPE_FACTORS))
        return skeleton

    @cached_property
    def tokenizer_folder(self) -> Path:
        return self._converted("tokenizer", lambda folder: write_tokenizer(folder, self.path.parent, self.path.name))

    @cached_property
    def _names(self) -> GgufNames:
        return GgufNames(self.base, self.config)

    def _find(self, name: str) -> Weight | None:
        return self._names.recipe(name)


@dataclass
class FolderModel(LoadedModel):
    """A Hugging Face folder: config.json and safetensors, in one file or in shards."""

    path: Path = Path()

    @cached_property
    def config(self) -> PretrainedConfig:
        return folder_config(self.path)

    @cached_property
    def base(self) -> SafetensorsSource | CheckpointSource:
        source = SafetensorsSource(self.path)
        if self.quantization is not None:
            return of_method(source, self.quantization, self.path)
        check_not_packed(source)
        return source

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """What the folder says about how its weights are quantized."""
        return quantization_of(self.path)

    @cached_property
    def skeleton(self) -> nn.Module:
        skeleton = skeleton_of(self.config, self.dtype, self.name)
        if (self.path / "generation_config.json").is_file() and hasattr(skeleton, "generation_config"):
            from transformers import GenerationConfig

            skeleton.generation_config = GenerationConfig.from_pretrained(self.path, local_files_only=True)
        return skeleton

    @cached_property
    def source(self) -> TensorSource:
        try:
            return MappedSource(self.base, self._recipes())
        except ModelError as missing:
            if self.quantization is not None:
                raise
            return self._converted_by_transformers(missing)

    @cached_property
    def tokenizer_folder(self) -> Path | None:
        if (self.path / "tokenizer.json").is_file():
            return self.path
        if not any((self.path / name).is_file() for name in TOKENIZER_SOURCES):
            return None
        return self._converted("tokenizer", lambda folder: write_tokenizer(folder, self.path))

    def _find(self, name: str) -> Weight | None:
        prefix = getattr(self.skeleton, "base_model_prefix", "") + "."
        for stored in (name, prefix + name, name.removeprefix(prefix)):
            if (weight := self.base.stored(stored)) is not None:
                return weight
        return None

    def _converted_by_transformers(self, missing: ModelError) -> TensorSource:
        """Checkpoints that transformers renames or merges while it loads (Mixtral): read whole, by transformers."""
        module, report = type(self.skeleton).from_pretrained(
            self.path, config=self.config, dtype=self.dtype, local_files_only=True, output_loading_info=True
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise missing
        self.notes.append("transformers converts the layout of this folder: its weights were read whole, not lazily")
        return ModuleSource(module)


@dataclass
class QuantizedModel(FolderModel):
    """A file that `effc quantize` wrote; `path` is a folder with the small files that it holds."""

    file: Path = Path()

    @cached_property
    def base(self) -> QuantizedSource:
        return QuantizedSource(self.file)

    @cached_property
    def quantization(self) -> dict[str, Any]:
        return {"quant_method": "effc", "scheme": self.base.scheme}

    @cached_property
    def skeleton(self) -> nn.Module:
        skeleton = super().skeleton
        if ROPE_FACTORS in self.base.names:
            scale_rope(skeleton, self.base.read(ROPE_FACTORS))
        return skeleton


@dataclass
class ModuleModel(LoadedModel):
    """A module in memory: its parameters are read by reference, nothing is copied."""

    original: nn.Module = field(default_factory=nn.Module, repr=False)

    @cached_property
    def config(self) -> PretrainedConfig | None:
        return getattr(self.original, "config", None)

    @cached_property
    def base(self) -> ModuleSource:
        return ModuleSource(self.original)

    @cached_property
    def source(self) -> TensorSource:
        return self.base if self.skeleton is self.original else super().source

    @cached_property
    def skeleton(self) -> nn.Module:
        """The module itself; a copy on the meta device where another dtype was asked for."""
        return self.original if self.dtype == _dtype_of(self.original) else on_meta(self.original, self.dtype)

    def module(self, dtype: torch.dtype | None = None) -> nn.Module:
        if (dtype or self.dtype) == _dtype_of(self.original):
            return self.original
        return super().module(dtype)

    def _find(self, name: str) -> Weight | None:
        return read(self.base, name)

    def _note_unread(self, recipes: Iterable[Weight]) -> None:
        """Every parameter of a module is its own; buffers that are not kept in the state dict stay in the skeleton."""


def load(model: str | Path | nn.Module, dtype: torch.dtype | None = None, cache: Path | None = None) -> LoadedModel:
    """Open a model: the path of a GGUF file, of one that `effc quantize` wrote or of a Hugging Face folder, or a module
    in memory. No weight is read.

    dtype: of the weights; None for fp32, for bf16 where a folder says so, for a module's own. cache: the folder that
    keeps converted configs and tokenizers; None converts anew. Raises ModelError, in one line, for what cannot be
    opened and InputError for a module in training mode.
    """
    if isinstance(model, nn.Module):
        if model.training:
            raise InputError("the model is in training mode; effc compiles for inference: call model.eval() first")
        refuse_subclasses(model)
        return ModuleModel(type(model).__name__, None, dtype or _dtype_of(model), cache, original=model)
    path = Path(model).expanduser().resolve()
    if path.is_dir():
        loaded = FolderModel(path.name, None, dtype or stored_dtype(path), cache, path=path)
        _ = loaded.base
        loaded.identity = _identity(*tensor_files(path), *(path / name for name in DESCRIPTIONS))
        return loaded
    if not path.exists():
        raise ModelError(f"no such model: expected a GGUF file or a Hugging Face folder, found nothing at {path}")
    if is_safetensors(path):
        return _quantized(path, dtype, cache)
    loaded = GgufModel(path.stem, _identity(path), dtype or torch.float32, cache, path=path)
    _ = loaded.base
    return loaded


def refuse_subclasses(module: nn.Module) -> None:
    """Raise ModelError for a parameter that is not plain memory: weights that torchao or bitsandbytes quantized."""
    for name, parameter in module.named_parameters():
        kind = type(parameter)
        if kind is not nn.Parameter:
            found = f"{name} as {kind.__module__}.{kind.__name__}"
            raise ModelError(
                f"{type(module).__name__}: expected plain parameters, found {found}: give the model before it was"
                ' quantized, with quantize="w8a8" or another scheme, or a quantized folder'
            )


def _quantized(path: Path, dtype: torch.dtype | None, cache: Path | None) -> QuantizedModel:
    """Open a file of `effc quantize`; the small files that it holds are written into the cache."""
    source, identity = QuantizedSource(path), _identity(path)
    folder = converted(cache, f"{path.stem}-{identity}", "files", source.write_files)
    loaded = QuantizedModel(path.stem, identity, dtype or stored_dtype(folder), cache, path=folder, file=path)
    loaded.base = source
    return loaded


def _identity(*files: Path) -> str:
    """Changes when one of the files is replaced: from paths, sizes and times of change, since hashing takes longer."""
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            status = file.stat()
            digest.update(f"{file}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the first floating parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
