"""Folders of quantized checkpoints, opened as models: the values that eager sees, the blocks that passes see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effc
import pytest
import torch
import transformers
from effc.compiler import interpret
from effc.compiler.errors import ModelError
from effc.compiler.load import load
from effc.compiler.quantized_weights import NotStored, stored_parts
from effc.compiler.schemes import SCHEMES
from effc.compiler.trace import trace
from effc.passes.pipeline import run
from effc.passes.quantize import quantize
from safetensors.torch import save_file
from torch import Tensor, nn

from . import quantized_checkpoints as published
from .quantized_checkpoints import Linear, packed_config
from .test_load import IDS, logits, random_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
Pack = Callable[[Linear, str], dict[str, Tensor]]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def quantized_folder(folder: Path, pack: Pack, config: dict[str, Any] | None, **options: Any) -> nn.Module:
    """A folder of a tiny Llama whose linears are packed, beside the model with the values that these stand for."""
    model = random_model(transformers.LlamaConfig(**SIZES))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            linear = Linear(module.out_features, module.in_features, **options, seed=seed)
            del tensors[f"{name}.weight"]
            tensors |= pack(linear, name)
            module.weight = nn.Parameter(linear.values)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    described = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    described |= {} if config is None else {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(described))
    return model


FOUR = {"bits": 4, "group": 32, "symmetric": True}
CHECKPOINTS: dict[str, tuple[Pack, dict[str, Any], dict[str, Any], str]] = {
    "awq": (published.awq, AWQ, FOUR | {"symmetric": False}, "int4z_g32"),
    "gptq": (published.gptq, GPTQ, FOUR, "int4_g32"),
    "packed": (published.packed, packed_config(Linear(8, 32, **FOUR)), FOUR, "int4_g32"),
    "plain": (
        published.plain,
        packed_config(Linear(8, 32, 8, None, True), "int-quantized"),
        {"bits": 8, "group": None, "symmetric": True},
        "int8",
    ),
}
"""How linears are packed, what config.json says, what they hold, and the format it is kept in."""


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_quantized_folder_is_read_as_it_is(tmp_path: Path, kind: str):
    pack, config, options, format = CHECKPOINTS[kind]
    expected = quantized_folder(tmp_path, pack, config, **options)
    loaded = load(tmp_path)
    torch.testing.assert_close(logits(loaded.module()), logits(expected), rtol=1e-5, atol=1e-5)
    assert not loaded.notes
    matrices = {name: recipe for name, recipe in loaded.source.recipes.items() if name.endswith("_proj.weight")}
    assert len(matrices) == 7
    assert {stored_parts(recipe)[0] for recipe in matrices.values()} == {format}


def test_passes_see_the_blocks_through_merged_projections(tmp_path: Path):
    quantized_folder(tmp_path, published.gptq, GPTQ, **FOUR)
    graph = run(trace(load(tmp_path)))[0]
    assert quantize(graph, SCHEMES["stored"]).matches == 4, "qkv, o, gate and up, down"
    kept = [node.args[1] for node in graph.nodes if node.target is torch.ops.effc.dequantize.default]
    assert kept == ["int4_g32"] * 4


def test_columns_in_act_order_are_put_back(tmp_path: Path):
    expected = quantized_folder(tmp_path, published.gptq, GPTQ | {"desc_act": True}, **FOUR, act_order=True)
    loaded = load(tmp_path)
    torch.testing.assert_close(logits(loaded.module()), logits(expected), rtol=1e-5, atol=1e-5)
    recipe = loaded.source.recipes["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(NotStored, match="takes the stored rows apart"):
        stored_parts(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CHECKPOINTS, "gptq in act-order"])
def test_kernels_compute_with_the_blocks_of_a_checkpoint(tmp_path: Path, kind: str):
    """As the graph says, with activations of 8 bits, which move the logits of so random a model by a few hundredths."""
    pack, config, options, _ = CHECKPOINTS[kind.split()[0]]
    options = options | {"act_order": "act-order" in kind}
    expected = quantized_folder(tmp_path, pack, config, **options)
    program = effc.compile(tmp_path, quantize="stored")
    found, exact = program(IDS), logits(expected)
    assert (found - exact).norm() <= 0.06 * exact.norm()
    inputs = {"input_ids": IDS, "position_ids": torch.arange(IDS.shape[1])[None]}
    (meant,) = interpret.run(program.graphs["forward"], inputs, program.model.source)
    assert (found - meant).norm() <= 2e-3 * exact.norm()
    explained = str(program.explain())
    assert "through ATen" not in explained
    assert [step.matches for step in program.stages.steps("decode", False) if step.name == "quantize"][-1] == 4


@pytest.mark.parametrize(
    ("name", "pack", "config"),
    [
        ("quantize_config.json", published.gptq, {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
        ("quant_config.json", published.awq, {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_older_checkpoints_describe_themselves_in_a_file_of_its_own(tmp_path: Path, name, pack, config):
    expected = quantized_folder(tmp_path, pack, None, **FOUR | {"symmetric": config.get("sym", False)})
    (tmp_path / name).write_text(json.dumps(config))
    torch.testing.assert_close(logits(load(tmp_path).module()), logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "unsupported quant_method 'bitsandbytes'; expected one of awq, gptq, comp"),
        (GPTQ | {"bits": 6}, "unsupported GPTQ checkpoint: expected 2, 3, 4 or 8 bits, found 6"),
        (GPTQ | {"group_size": 16}, r"down_proj.qzeros: expected int32\[6, 8\], found int32\[3, 8\]"),
        (None, "expected a quantization_config beside model.layers.0.mlp.down_proj.qweight, found none"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why_when_it_is_opened(tmp_path: Path, config, said: str):
    quantized_folder(tmp_path, published.gptq, config, **FOUR)
    with pytest.raises(ModelError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_matrix_that_is_missing_is_named(tmp_path: Path):
    def without_down(linear: Linear, name: str) -> dict[str, Tensor]:
        return {} if "down" in name else published.gptq(linear, name)

    quantized_folder(tmp_path, without_down, GPTQ, **FOUR)
    with pytest.raises(ModelError, match=r"expected a tensor for model.layers.0.mlp.down_proj.weight, found none"):
        load(tmp_path).module()
