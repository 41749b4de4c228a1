"""Quantize a model into a file: `effc quantize MODEL --scheme int4_g128 -o FILE`, matrices rounded to nearest.

The weights of linears and embeddings become parts of a format, one matrix at a time; the rest stays as it is. A matrix
that is stored in the format already is copied, not rounded again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from .compiler.errors import InputError, ModelError
from .compiler.evaluate import evaluate
from .compiler.formats import Format, find
from .compiler.load import ROPE_FACTORS, LoadedModel
from .compiler.quantized_file import MatrixEntry, file_tensors, metadata_of
from .compiler.quantized_weights import NotStored, formats_in, stored_parts
from .compiler.safetensors_file import Progress, Written, write_safetensors
from .compiler.schemes import Scheme, scheme_of
from .compiler.weights import Weight, read, transposed
from .passes.calibrate.parameters import Parameters

SMALL_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass
class QuantizedFile:
    """What was written. formats: how many matrices are in each. left: parameters that stay as they were, and why.
    again: formats that matrices were stored in and were rounded from. weights: how many numbers the model has.
    """

    path: Path
    formats: Counter[str] = field(default_factory=Counter)
    left: dict[str, str] = field(default_factory=dict)
    again: Counter[str] = field(default_factory=Counter)
    weights: int = 0

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    @property
    def bits(self) -> float:
        """Per weight, all told."""
        return 8 * self.nbytes / self.weights

    @property
    def summary(self) -> str:
        kept = ", ".join(f"{count} in {name}" for name, count in self.formats.items()) or "no matrix quantized"
        return f"{kept}; {self.nbytes / 1e6:.1f} MB, {self.bits:.2f} bits a weight"

    @property
    def remarks(self) -> list[str]:
        """What a user should hear, a line each."""
        again = [
            f"{count} matrices were in {name} already: they were rounded from that, not from the original weights"
            for name, count in self.again.items()
        ]
        return again + [f"{name} stays as it is: {reason}" for name, reason in self.left.items()]


def quantize_model(
    model: LoadedModel,
    scheme: str,
    output: Path,
    progress: Progress | None = None,
    calibrated: Parameters | None = None,
) -> QuantizedFile:
    """Write `model` with its weights in the formats of a scheme, or in one format, to the file `output`.

    calibrated: parameters that were rounded or changed before (`calibrate_model`); the others are rounded here.
    Raises InputError for an unknown scheme and for weights that do not fit, CacheError where the file cannot be
    written. An interrupted write leaves no file, and an earlier one as it was.
    """
    found = scheme_of(scheme)
    if found is None:
        raise InputError("scheme 'none' quantizes nothing: expected a scheme or a format")
    if model.config is None:
        raise ModelError(f"{model.name} has no config: expected a GGUF file, a Hugging Face folder or model")
    if output.is_dir():
        raise InputError(f"expected a file to write to, found the folder {output}")
    result = QuantizedFile(output)
    tensors, matrices = planned(model, found, result, calibrated or Parameters())
    write_safetensors(output, [*tensors, *small_files(model)], metadata_of(matrices, scheme), progress)
    return result


def planned(
    model: LoadedModel, scheme: Scheme, result: QuantizedFile, calibrated: Parameters
) -> tuple[list[Written], dict[str, MatrixEntry]]:
    """What the file will hold of the model's parameters, and how matrices are kept."""
    tensors: list[Written] = []
    matrices: dict[str, MatrixEntry] = {}
    kinds = matrix_kinds(model.skeleton)
    for name, recipe in parameters(model):
        result.weights += recipe.numel
        if name in calibrated.matrices:
            matrices[name] = MatrixEntry(calibrated.matrices[name].format, *calibrated.layout(name))
            tensors.append(calibrated_parts(name, recipe, calibrated, result))
        elif name in calibrated.values:
            value = calibrated.values[name].to(recipe.dtype)
            tensors.append(Written({name: (recipe.shape, recipe.dtype)}, lambda value=value: [value]))
        elif name in kinds:
            is_head, is_transposed = kinds[name]
            matrix = transposed(recipe, (1, 0)) if is_transposed else recipe
            try:
                format = format_of(matrix, scheme.head if is_head else scheme.weights)
                entry = MatrixEntry(format, matrix.shape, is_transposed)
                tensors.append(parts_of(model, name, matrix, format, result))
                matrices[name] = entry
                result.formats[format.name] += 1
            except (InputError, NotStored) as reason:
                result.left[name] = str(reason)
        elif len(recipe.shape) > 1:
            result.left[name] = "it is no weight of a linear or an embedding"
        if name not in matrices and name not in calibrated.values:
            tensors.append(Written({name: (recipe.shape, recipe.dtype)}, partial(values_of, model, recipe)))
    if ROPE_FACTORS in model.base.names:
        factors = read(model.base, ROPE_FACTORS)
        tensors.append(Written({ROPE_FACTORS: (factors.shape, factors.dtype)}, partial(values_of, model, factors)))
    return tensors, matrices


def parameters(model: LoadedModel) -> Iterator[tuple[str, Weight]]:
    """Each parameter once, under the first of its names, as a recipe over `model.base`."""
    recipes: Mapping[str, Weight] = getattr(model.source, "recipes", {})
    seen: set[int] = set()
    for name, slot in model.skeleton.state_dict(keep_vars=True).items():
        if id(slot) not in seen:
            seen.add(id(slot))
            yield name, recipes[name] if name in recipes else read(model.source, name)


def matrix_kinds(skeleton: nn.Module) -> dict[str, tuple[bool, bool]]:
    """Parameters that are matrices: whether each is a head or a table of embeddings, whether it is [K, N]."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(skeleton, "get_output_embeddings", lambda: None)()
    kinds = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            is_head = isinstance(module, nn.Embedding) or module is head
            kinds[f"{name}.weight"] = (is_head, isinstance(module, Conv1D))
    return kinds


def format_of(matrix: Weight, name: str | None) -> Format:
    """The format by name; without one, that which the matrix is stored in. Raises where it cannot be."""
    format = find(stored_parts(matrix)[0] if name is None else name)
    format.part_shapes(*matrix.shape)
    return format


def parts_of(model: LoadedModel, name: str, matrix: Weight, format: Format, result: QuantizedFile) -> Written:
    """The parts of a matrix: those that are stored, or what it is rounded to."""
    kept = {f"{name}.{part}": kind for part, kind in format.part_shapes(*matrix.shape).items()}
    stored = formats_in(matrix)
    if stored == (format.name,):
        try:
            return Written(kept, partial(stored_of, model, stored_parts(matrix)[1]))
        except NotStored:
            pass
    result.again.update(stored)
    return Written(kept, lambda: named_errors(name, format, evaluate(matrix, model.base)))


def calibrated_parts(name: str, recipe: Weight, calibrated: Parameters, result: QuantizedFile) -> Written:
    """The parts that calibration made of a matrix."""
    format, parts = calibrated.matrices[name].format, calibrated.matrices[name].parts
    result.formats[format.name] += 1
    result.again.update(formats_in(recipe))
    kinds = {f"{name}.{part}": (tuple(tensor.shape), tensor.dtype) for part, tensor in zip(format.part_names, parts)}
    return Written(kinds, lambda: parts)


def named_errors(name: str, format: Format, weight: Tensor) -> Sequence[Tensor]:
    try:
        return format.quantize(weight)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def stored_of(model: LoadedModel, parts: Sequence[Weight]) -> Sequence[Tensor]:
    return [evaluate(part, model.base) for part in parts]


def values_of(model: LoadedModel, recipe: Weight) -> Sequence[Tensor]:
    return [evaluate(recipe, model.base)]


def small_files(model: LoadedModel) -> list[Written]:
    """config.json, and the folder's files for tokenizing and generating."""
    contents = {"config.json": config_text(model)}
    folders = [folder for folder in (getattr(model, "path", None), model.tokenizer_folder) if folder is not None]
    for name in SMALL_FILES:
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is not None:
            contents[name] = found.read_bytes()
    return [
        Written({name: (tuple(tensor.shape), tensor.dtype)}, lambda tensor=tensor: [tensor])
        for name, tensor in file_tensors(contents)
    ]


def config_text(model: LoadedModel) -> bytes:
    """config.json of the file: the model's own, without what it said about a quantization before."""
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        description = json.loads((Path(folder) / "config.json").read_text())
    for key in ("quantization_config", "compression_config"):
        description.pop(key, None)
    description["architectures"] = [type(model.skeleton).__name__]
    description["dtype"] = str(model.dtype).removeprefix("torch.")
    return json.dumps(description, indent=2).encode()
