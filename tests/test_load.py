"""Opening Hugging Face folders and modules in memory, and what cannot be opened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from effc.compiler.errors import InputError, ModelError
from effc.compiler.load import load
from safetensors.torch import save_file
from torch import Tensor, nn

SEED = 11
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
IDS = torch.arange(3, 20).view(1, -1)
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}


def random_model(config: transformers.PretrainedConfig, **options) -> nn.Module:
    """A model with every parameter random, norms and biases too."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_back_its_model(tmp_path: Path, shards: int, dtype: torch.dtype):
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    model = random_model(config, dtype=dtype)
    model.generation_config.eos_token_id = [5, 6]
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=f"{size // shards // 1000 + 1}KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    loaded = load(tmp_path)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded.module()), logits(model))
    assert loaded.skeleton.generation_config.eos_token_id == [5, 6]
    assert loaded.tokenizer is None
    assert load(tmp_path, dtype=torch.float32).module().dtype == torch.float32


def test_a_folder_that_holds_the_inner_model_is_found_by_its_prefix(tmp_path: Path):
    model = random_model(transformers.GPT2Config(**GPT2))
    model.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    assert torch.equal(logits(load(tmp_path).module()), logits(model))


def test_a_folder_whose_layout_transformers_converts_is_read_and_said(tmp_path: Path):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = random_model(config)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded.module()), logits(model))
    assert any("transformers converts the layout" in note for note in loaded.notes)


def test_a_tokenizer_in_an_older_format_is_converted_into_the_cache(tmp_path: Path):
    folder, cache = tmp_path / "model", tmp_path / "cache"
    random_model(transformers.GPT2Config(**GPT2)).save_pretrained(folder)
    words = ["<|endoftext|>", "a", "b", "ab"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    loaded = load(folder, cache=cache)
    assert loaded.tokenizer_folder.is_relative_to(cache)
    assert loaded.tokenizer("abba").input_ids == [3, 2, 1]


def test_a_module_in_memory_is_taken_as_it_is():
    model = random_model(transformers.LlamaConfig(**SIZES))
    loaded = load(model)
    assert loaded.module() is model
    assert loaded.skeleton is model
    assert loaded.identity is None
    name = "model.layers.0.mlp.up_proj.weight"
    assert loaded.source.read(name).data_ptr() == model.get_parameter(name).data_ptr()


def test_a_module_in_memory_in_another_dtype_leaves_the_original_alone():
    model = random_model(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))
    before = logits(model)
    loaded = load(model, dtype=torch.bfloat16)
    assert loaded.source.dtype("model.norm.weight") == torch.bfloat16
    assert {parameter.device.type for parameter in loaded.skeleton.parameters()} == {"meta"}
    eager = loaded.module()
    assert eager.dtype == torch.bfloat16
    assert eager.lm_head.weight is eager.model.embed_tokens.weight
    torch.testing.assert_close(logits(eager).float(), before, rtol=0.1, atol=0.1)
    assert torch.equal(logits(model), before)


def test_any_module_is_accepted():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()
    loaded = load(model)
    assert loaded.config is None
    assert loaded.tokenizer is None
    assert set(loaded.source.names) >= set(model.state_dict())


class Quantized(Tensor):
    """Stands for the tensor subclasses that quantization libraries put into modules."""


def test_weights_that_another_library_quantized_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 8)).eval()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Quantized), requires_grad=False)
    with pytest.raises(ModelError, match=r"found 0\.weight as .*\.Quantized: give the model before") as error:
        load(model)
    assert "\n" not in str(error.value)


def test_a_module_in_training_mode_is_refused():
    with pytest.raises(InputError, match=r"call model\.eval\(\) first") as error:
        load(nn.Linear(2, 2).train())
    one_line(error)


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no such model: .*missing\.gguf") as error:
        load(tmp_path / "missing.gguf")
    one_line(error)


def test_a_folder_without_a_config_or_without_tensors_is_one_line(tmp_path: Path):
    with pytest.raises(ModelError, match=r"config\.json") as error:
        load(tmp_path)
    one_line(error)
    transformers.LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"expected model\.safetensors") as error:
        load(tmp_path)
    one_line(error)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(ModelError, match="truncated or no safetensors file") as error:
        load(tmp_path)
    one_line(error)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "shard-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"expected shard-1\.safetensors") as error:
        load(tmp_path)
    one_line(error)


def test_a_folder_of_an_unknown_model_names_it(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="unsupported architecture 'nonsense'") as error:
        _ = load(tmp_path).config
    one_line(error)


def test_a_module_loads_where_gguf_and_platformdirs_are_missing():
    script = """
import sys
sys.modules.update(gguf=None, platformdirs=None, transformers=None)
from torch import nn
import effc.runtime.store as store
from effc.compiler.load import load
print(load(nn.Linear(2, 2).eval()).source.names, store._user_cache().name)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "('weight', 'bias') effc"
