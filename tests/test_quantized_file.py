"""Quantized models in one file: written, opened as a model, read by a page of code, and never half there."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import runpy
import struct
from pathlib import Path

import effc
import pytest
import torch
import transformers
from effc import cli
from effc.cli import load_script
from effc.compiler.errors import CacheError, InputError, ModelError
from effc.compiler.formats import FORMATS
from effc.compiler.load import load
from effc.compiler.quantized_file import MatrixEntry, QuantizedSource, metadata_of
from effc.compiler.quantized_weights import stored_parts
from effc.compiler.safetensors_file import Written, write_safetensors
from effc.quantize_model import quantize_model
from effc.runtime.text import TextCodec
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .test_checkpoint_folders import CHECKPOINTS, quantized_folder
from .test_gguf_file import FAMILIES, write_gguf
from .test_load import GPT2, SIZES, logits, random_model
from .tiny_tokenizers import save_chat

pytestmark = pytest.mark.usefixtures("one_thread")

READER = Path(effc.__file__).parent / "examples" / "read_quantized.py"
LINEARS = "_proj.weight"


def llama(folder: Path, tied: bool = False, **options: object) -> nn.Module:
    """A folder of a tiny Llama with a tokenizer."""
    model = random_model(
        transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=tied), **options
    )
    model.generation_config.eos_token_id = [5, 6]
    model.save_pretrained(folder)
    save_chat(folder)
    return model


def rounded(model: nn.Module, weights: str, head: str) -> nn.Module:
    """The model with its matrices as the formats have them."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                format = FORMATS[head if name in ("lm_head", "model.embed_tokens") else weights]
                module.weight.copy_(format.dequantize(format.quantize(module.weight)))
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_quantized_file_opens_as_the_model_it_was_made_of(tmp_path: Path, tied: bool):
    model = llama(tmp_path / "model", tied)
    reports = []
    written = quantize_model(
        load(tmp_path / "model"), "w4", tmp_path / "w4.safetensors", lambda *at: reports.append(at)
    )
    assert written.formats == {"int4_g32": 7, "int8_g32": 1 if tied else 2}
    assert written.remarks == []
    assert 4.5 < written.bits < 20, "the tokenizer's files are most of so small a model"
    assert reports[-1][0] == reports[-1][1] < written.nbytes
    loaded = load(tmp_path / "w4.safetensors", cache=tmp_path / "cache")
    expected = rounded(model, "int4_g32", "int8_g32")
    assert not loaded.notes
    assert torch.equal(logits(loaded.module()), logits(expected))
    assert loaded.skeleton.generation_config.eos_token_id == [5, 6]
    text = TextCodec(loaded.tokenizer_folder)
    assert text.encode("Hello") == TextCodec(tmp_path / "model").encode("Hello")
    assert text.chat_template == TextCodec(tmp_path / "model").chat_template
    kept = {stored_parts(recipe)[0] for name, recipe in loaded.source.recipes.items() if name.endswith(LINEARS)}
    assert kept == {"int4_g32"}
    assert load(tmp_path / "w4.safetensors", cache=tmp_path / "cache").identity == loaded.identity


@pytest.mark.parametrize(
    "format", ["int8", "int8a_g64", "int4_g128", "int4z_g32", "int3_g64", "q4_1", "q5_0", "nf4_g64", "fp8_e4m3"]
)
def test_a_page_of_code_reads_the_same_bits(tmp_path: Path, format: str):
    llama(tmp_path / "model")
    path = quantize_model(load(tmp_path / "model"), format, tmp_path / "q.safetensors").path
    found, loaded = load_script(READER).read(str(path)), load(path)
    assert set(found) == set(loaded.source.names)
    for name, tensor in found.items():
        assert torch.equal(tensor, loaded.source.read(name)), name


def test_the_page_of_code_prints_what_it_reads(tmp_path: Path, capsys, monkeypatch):
    llama(tmp_path / "model")
    path = quantize_model(load(tmp_path / "model"), "int4_g32", tmp_path / "q.safetensors").path
    monkeypatch.setattr("sys.argv", [str(READER), str(path)])
    capsys.readouterr()
    runpy.run_path(str(READER), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(load(path).source.names)
    assert any(line.startswith("model.layers.0.mlp.up_proj.weight: [96, 64], from -") for line in printed)


def test_a_page_of_code_reads_scales_of_scales(tmp_path: Path):
    sizes = SIZES | {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256}
    random_model(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    for format in ("q4_k", "q5_k", "q6_k"):
        path = quantize_model(load(tmp_path / "model"), format, tmp_path / "q.safetensors").path
        found, loaded = load_script(READER).read(str(path)), load(path)
        assert all(torch.equal(tensor, loaded.source.read(name)) for name, tensor in found.items())


def test_the_tensors_are_those_that_safetensors_reads(tmp_path: Path):
    """Aligned, in any order of dtypes, with odd sizes."""
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "halves": torch.randn(3, 5).half(),
        "fp8": torch.randn(3).to(torch.float8_e4m3fn),
        "floats": torch.randn(2, 1, 3),
        "long": torch.tensor(5),
        "empty": torch.empty(0, 4),
        "bf16": torch.randn(1).bfloat16(),
    }
    kept = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", [Written(kept, lambda: list(tensors.values()))], {"a": "ü"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"a": "ü"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found.float(), tensor.float())
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


# --- what a model holds ----------------------------------------------------------------------------------------


def test_linears_that_keep_their_weight_transposed(tmp_path: Path):
    model = random_model(transformers.GPT2Config(**GPT2 | {"n_layer": 1}))
    model.save_pretrained(tmp_path / "model")
    written = quantize_model(load(tmp_path / "model"), "int8", tmp_path / "q.safetensors")
    loaded = load(written.path)
    name = "transformer.h.0.attn.c_attn.weight"
    values = FORMATS["int8"].dequantize(FORMATS["int8"].quantize(model.get_parameter(name).t())).t()
    assert torch.equal(loaded.source.read(name), values)
    assert torch.equal(load_script(READER).read(str(written.path))[name], values)
    torch.testing.assert_close(logits(loaded.module()), logits(model), rtol=0.05, atol=0.05)


def test_factors_of_rope_are_kept(tmp_path: Path):
    family, factors = FAMILIES[0], torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0])
    path = write_gguf(tmp_path / "tiny.gguf", random_model(family.config()), family, rope_freqs__weight=factors)
    source = load(path, cache=tmp_path)
    loaded = load(quantize_model(source, "int8", tmp_path / "q.safetensors").path)
    inverse = [model.skeleton.model.rotary_emb.inv_freq for model in (source, loaded)]
    assert torch.equal(*inverse)
    assert not [*source.notes, *loaded.notes]
    torch.testing.assert_close(logits(loaded.module()), logits(source.module()), rtol=0.05, atol=0.05)
    codec = [TextCodec(model.tokenizer_folder) for model in (source, loaded)]
    assert codec[0].eos_ids == codec[1].eos_ids


def test_what_is_in_the_format_already_is_copied(tmp_path: Path):
    pack, config, options, format = CHECKPOINTS["packed"]
    expected = quantized_folder(tmp_path / "model", pack, config, **options)
    written = quantize_model(load(tmp_path / "model"), format, tmp_path / "same.safetensors")
    assert written.remarks == []
    loaded = load(written.path)
    for name in loaded.source.names:
        if name.endswith(LINEARS):
            assert torch.equal(loaded.source.read(name), expected.get_parameter(name))
    assert "quantization_config" not in loaded.config.to_dict()
    kept = quantize_model(load(tmp_path / "model"), "stored", tmp_path / "stored.safetensors")
    assert kept.formats == {format: 7}
    assert kept.left == dict.fromkeys(
        ("model.embed_tokens.weight", "lm_head.weight"), "it is not stored in a quantized format"
    )
    again = quantize_model(load(tmp_path / "model"), "int8", tmp_path / "again.safetensors")
    assert again.remarks == [
        "7 matrices were in int4_g32 already: they were rounded from that, not from the original weights"
    ]


def test_matrices_that_do_not_fit_stay_and_are_named(tmp_path: Path):
    random_model(
        transformers.LlamaConfig(**SIZES | {"intermediate_size": 100, "num_hidden_layers": 1})
    ).save_pretrained(tmp_path / "model")
    written = quantize_model(load(tmp_path / "model"), "q8_0", tmp_path / "q.safetensors")
    assert written.remarks == [
        "model.layers.0.mlp.down_proj.weight stays as it is: q8_0: expected rows of a multiple of 32 weights, found 100"
    ]
    assert load(written.path).source.read("model.layers.0.mlp.down_proj.weight").shape == (64, 100)


def test_weights_that_are_no_numbers_leave_no_file(tmp_path: Path):
    model = llama(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 1] = torch.nan
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "q.safetensors"
    path.write_text("before")
    with pytest.raises(InputError, match=r"mlp.up_proj.weight: int4_g32: expected finite weights, found NaN in row 3"):
        quantize_model(load(tmp_path / "model"), "w4", path)
    assert path.read_text() == "before"
    assert not list(tmp_path.glob(".q*"))


# --- files that are damaged, or no such files ------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with one matrix."""
    return write_small(tmp_path / "small.safetensors")


def write_small(path: Path, **changes: str) -> Path:
    format = FORMATS["int4_g32"]
    parts = dict(zip(format.part_names, format.quantize(torch.randn(4, 64))))
    config = json.dumps(transformers.LlamaConfig(**SIZES).to_dict()).encode()
    tensors = {f"w.{name}": part for name, part in parts.items()}
    tensors["files/config.json"] = torch.frombuffer(bytearray(config), dtype=torch.uint8)
    save_file(tensors, path, metadata_of({"w": MatrixEntry(format, (4, 64))}, "int4_g32") | changes)
    return path


def test_a_file_that_is_cut_anywhere_does_not_load(small: Path):
    whole = small.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for end in (0, 4, 8, 9, 8 + header // 2, 8 + header, len(whole) - 1):
        small.write_bytes(whole[:end])
        with pytest.raises(ModelError) as error:
            load(small)
        assert "\n" not in str(error.value)


def test_a_writer_that_dies_leaves_nothing_that_loads(tmp_path: Path, small: Path):
    """Killed while it writes the second matrix: the file is not there, and what it left is no file that loads."""
    path = tmp_path / "out" / "q.safetensors"
    one = torch.zeros(1 << 16, dtype=torch.uint8)

    def die() -> list[Tensor]:
        os._exit(9)

    groups = [
        Written({"a": ((1 << 16,), torch.uint8)}, lambda: [one]),
        Written({"b": ((1 << 16,), torch.uint8)}, die),
    ]
    child = os.fork()
    if child == 0:
        try:
            write_safetensors(path, groups, {"effc": "1"})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = path.parent.iterdir()
    assert left != path
    with pytest.raises(ModelError):
        load(left)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"effc": "2"}, r"expected a file that effc quantize wrote \(metadata effc = 1\), found version 2"),
        ({"matrices": "{"}, "its metadata does not fit this version"),
        ({"matrices": "[]"}, "its metadata does not fit this version"),
        ({"matrices": '{"w": {"format": "int4_g32", "shape": [4], "transposed": 0}}'}, "its metadata does not fit"),
        ({"formats": "{}"}, "this version means something else by the format int4_g32"),
        (
            {"matrices": '{"w": {"format": "int9", "shape": [4, 64], "transposed": false}}'},
            "its metadata does not fit this version: unknown format 'int9'",
        ),
        (
            {"matrices": '{"w": {"format": "int4_g32", "shape": [4, 96], "transposed": false}}'},
            r"expected w.codes to be torch.uint8\[4, 48\], found",
        ),
    ],
)
def test_metadata_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, str], said: str):
    with pytest.raises(ModelError, match=said) as error:
        load(write_small(tmp_path / "x.safetensors", **changes))
    assert "\n" not in str(error.value)


def test_flipped_bits_of_the_header_load_or_are_named(small: Path):
    """Never another exception, whatever a bit does to the JSON."""
    print("seed 0")
    choose = random.Random(0)
    whole = small.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[choose.randrange(8 + header)] ^= 1 << choose.randrange(8)
        small.write_bytes(damaged)
        with contextlib.suppress(ModelError):
            opened = QuantizedSource(small)
            for name in opened.matrices:
                opened.stored(name)


def test_files_of_others_are_refused(tmp_path: Path):
    save_file({"a": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(
        ModelError, match=r"expected a file that effc quantize wrote .*found none; models of Hugging Face"
    ):
        load(tmp_path / "plain.safetensors")


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_writes_a_file_and_prints_its_path(tmp_path: Path, capsys):
    llama(tmp_path / "model")
    path = tmp_path / "q.safetensors"
    capsys.readouterr()
    assert cli.run(["quantize", str(tmp_path / "model"), "--scheme", "int4_g128", "-o", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{path}\n"
    assert printed.err == ""
    assert {entry.format.name for entry in load(path).base.matrices.values()} == {"int4_g128"}


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("w5", r"expected a scheme \(none, stored, w8a8, .*\) or a format: int8, .*q4_1.*; found 'w5'"),
        ("none", "scheme 'none' quantizes nothing: expected a scheme or a format"),
    ],
)
def test_the_command_names_what_is_no_scheme(tmp_path: Path, capsys, scheme: str, said: str):
    llama(tmp_path / "model")
    capsys.readouterr()
    assert cli.run(["quantize", str(tmp_path / "model"), "--scheme", scheme, "-o", str(tmp_path / "q")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path):
    llama(tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"cannot write .*q.safetensors"):
        quantize_model(load(tmp_path / "model"), "int8", tmp_path / "file" / "q.safetensors")
    with pytest.raises(InputError, match="expected a file to write to, found the folder"):
        quantize_model(load(tmp_path / "model"), "int8", tmp_path)
    with pytest.raises(ModelError, match="has no config"):
        quantize_model(load(nn.Linear(4, 4).eval()), "int8", tmp_path / "q")
