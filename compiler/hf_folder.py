"""A Hugging Face folder as a source of tensors: config.json beside safetensors, in one file or in shards."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ModelError
from .safetensors_file import DTYPES
from .weights import Shape, Weight, read

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Files that decide what a folder means; with the safetensors they make up its identity.
TOKENIZER_SOURCES = ("tokenizer.model", "vocab.json", "spiece.model")
# Older checkpoints describe their quantization in a file of its own, by method.
QUANTIZATION_FILES = {"gptq": "quantize_config.json", "awq": "quant_config.json"}
DESCRIPTIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", *TOKENIZER_SOURCES,
    *QUANTIZATION_FILES.values(),
)  # fmt: skip


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder, shards in the order of the index.

    Raises ModelError where there are none, or where the index names a shard that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / shard for shard in _json(index)["weight_map"].values()})
        for file in files:
            if not file.is_file():
                raise ModelError(f"{folder}: expected {file.name}, which {index.name} lists, found no such file")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ModelError(f"{folder}: expected model.safetensors or {index.name}, found neither")


def folder_config(folder: Path) -> PretrainedConfig:
    """The transformers config of the folder. Raises ModelError where it is missing or names an unknown model."""
    description = _json(folder / "config.json")
    kind = description.get("model_type")
    from transformers import CONFIG_MAPPING, AutoConfig

    if kind not in CONFIG_MAPPING:
        raise ModelError(f"{folder}: unsupported architecture {kind!r}: transformers has no such model_type")
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def stored_dtype(folder: Path) -> torch.dtype:
    """bf16 where the folder says so, else fp32."""
    description = _json(folder / "config.json")
    name = description.get("dtype") or description.get("torch_dtype")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What the folder says about how its weights are quantized; None where they are not."""
    description = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in ("quantization_config", "compression_config"):
        if description.get(key):
            return description[key]
    for method, name in QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            return {"quant_method": method, **_json(folder / name)}
    return None


def check_not_packed(source: SafetensorsSource) -> None:
    """Raises ModelError for packed matrices in a folder that does not say how they are quantized."""
    for name in source.names:
        if name.endswith((".qweight", ".weight_packed")):
            raise ModelError(f"{source.folder}: expected a quantization_config beside {name}, found none")


class SafetensorsSource:
    """The tensors of a folder under the names of its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: file for file in tensor_files(folder) for name in self._open(file).keys()}  # noqa: SIM118

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def shape(self, name: str) -> Shape:
        return tuple(self._open(self._files[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._open(self._files[name]).get_slice(name).get_dtype()]

    def read(self, name: str) -> Tensor:
        return self._open(self._files[name]).get_tensor(name)

    def stored(self, name: str) -> Weight | None:
        """The recipe for the tensor `name`; None where there is no such tensor."""
        return read(self, name) if name in self._files else None

    @cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            from safetensors import SafetensorError, safe_open

            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is truncated or no safetensors file: {error}; get the file again") from error
        return self._handles[file]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path.parent}: expected a Hugging Face folder with {path.name}, found none") from error
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{path}: expected JSON, found a file that does not parse ({error})") from error
