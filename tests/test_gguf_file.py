"""GGUF files of many families against the models they were written from; the default model; broken files."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import gguf
import pytest
import torch
import transformers
from effc.compiler.errors import CacheError, ModelError
from effc.compiler.evaluate import evaluate
from effc.compiler.gguf_file import LAYOUTS, GgufSource
from effc.compiler.load import load
from effc.compiler.weights import Pack, read
from effc.runtime import store
from torch import Tensor, nn
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

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


@dataclass
class Family:
    """A family of GGUF files: how llama.cpp names it, a small transformers config, what its converter does."""

    architecture: str
    config: Callable[[], transformers.PretrainedConfig]
    convert: Callable[[str, Tensor, transformers.PretrainedConfig], Tensor] = lambda name, tensor, config: tensor
    key: str = ""


def permuted(name: str, tensor: Tensor, config: transformers.PretrainedConfig) -> Tensor:
    """llama.cpp's LlamaModel.permute."""
    for part, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
        if part in name:
            rows = tensor.shape[0]
            split = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
            return split.swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def plus_one(name: str, tensor: Tensor, config: transformers.PretrainedConfig) -> Tensor:
    return tensor + 1 if name.endswith("norm.weight") else tensor


def gpt2_transposed(name: str, tensor: Tensor, config: transformers.PretrainedConfig) -> Tensor:
    matrices = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return tensor.T if name.endswith(matrices) else tensor


def bloom_split(name: str, tensor: Tensor, config: transformers.PretrainedConfig) -> Tensor:
    """llama.cpp's BloomModel: [heads, 3, head_dim] --> [3, heads, head_dim]."""
    if "attn_qkv" not in name:
        return tensor
    parts = tensor.reshape(config.n_head, 3, config.hidden_size // config.n_head, *tensor.shape[1:])
    return torch.cat([parts[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)])


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
FAMILIES = [
    Family("llama", lambda: transformers.LlamaConfig(**SIZES), permuted),
    Family("llama", lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), permuted),
    Family("qwen2", lambda: transformers.Qwen2Config(**SIZES)),
    Family("qwen3", lambda: transformers.Qwen3Config(**SIZES, head_dim=16)),
    Family("phi3", lambda: transformers.Phi3Config(**SIZES, pad_token_id=0)),
    Family("starcoder2", lambda: transformers.Starcoder2Config(**SIZES)),
    Family("stablelm", lambda: transformers.StableLmConfig(**SIZES)),
    Family("nemotron", lambda: transformers.NemotronConfig(**SIZES), plus_one),
    Family("gemma2", lambda: transformers.Gemma2Config(**SIZES, head_dim=16), plus_one),
    Family("gemma3", lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=16), plus_one),
    Family("gpt2", lambda: transformers.GPT2Config(**GPT2), gpt2_transposed),
    Family("bloom", lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128), bloom_split),
    Family("qwen2moe", lambda: transformers.Qwen2MoeConfig(**SIZES, **MOE), key="qwen2_moe"),
    Family(
        "qwen3moe",
        lambda: transformers.Qwen3MoeConfig(**SIZES, **MOE, head_dim=16, norm_topk_prob=True),
        key="qwen3_moe",
    ),
]


def random_model(config: transformers.PretrainedConfig, **options) -> nn.Module:
    """A model with every parameter random, norms and biases too."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gguf_tensors(model: nn.Module, family: Family) -> dict[str, Tensor]:
    """What llama.cpp's converter would write, by the file's names."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            layer = re.search(r"layers\.(\d+)\.", name)[1]
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1)):
                tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = half
            continue
        paths = (name, name.removeprefix("transformer."), name + ".weight")
        stored = next(filter(None, (names.get_name(path, (".weight", ".bias")) for path in paths)))
        if name.endswith("experts.down_proj"):
            stored += ".weight"
        if "ffn_gate_inp_shexp" in stored:
            tensor = tensor[0]
        tensors[stored] = family.convert(stored, tensor, model.config)
    return tensors


def write_gguf(path: Path, model: nn.Module, family: Family, **extra: Tensor) -> Path:
    """`model` as a GGUF file with a small byte-level vocabulary."""
    writer = gguf.GGUFWriter(path, family.architecture)
    for stored, name in GGUF_CONFIG_MAPPING[family.key or family.architecture].items():
        value = getattr(model.config, {"n_ctx": "n_positions"}.get(name, name or ""), None)
        if name == "rope_theta":
            value = model.config.rope_parameters.get("rope_theta") if hasattr(model.config, "rope_parameters") else None
        if isinstance(value, bool):
            writer.add_bool(f"{family.architecture}.{stored}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{family.architecture}.{stored}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{family.architecture}.{stored}", value)
    if family.architecture.startswith("qwen3"):
        writer.add_key_length(model.config.head_dim)
    if family.architecture.endswith("moe"):
        writer.add_expert_feed_forward_length(MOE["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(MOE["shared_expert_intermediate_size"])
    words = ["<unk>", "<s>", "</s>", "!#", *(chr(33 + index) for index in range(93))]
    words += [f"token{index}" for index in range(128 - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * 125)
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    for name, tensor in {**gguf_tensors(model, family), **extra}.items():
        writer.add_tensor(name.replace("__", "."), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, nn.Module]:
    model = random_model(FAMILIES[0].config())
    return write_gguf(tmp_path / "tiny.gguf", model, FAMILIES[0]), model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_a_gguf_file_gives_back_the_model_it_was_written_from(family: Family, tmp_path: Path):
    model = random_model(family.config())
    path = write_gguf(tmp_path / "tiny.gguf", model, family)
    loaded = load(path, cache=tmp_path)
    original = model.state_dict()
    assert set(loaded.source.names) == set(original)
    for name in loaded.source.names:
        torch.testing.assert_close(loaded.source.read(name), original[name], rtol=0, atol=1e-6)
    assert loaded.notes == []
    torch.testing.assert_close(logits(loaded.module()), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_a_gguf_file_reads_as_transformers_reads_it(family: Family, tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf", random_model(family.config()), family)
    loaded = load(path, cache=tmp_path)
    read_by_transformers = load_gguf_checkpoint(path, return_tensors=True, model_to_load=loaded.skeleton)["tensors"]
    assert set(read_by_transformers) <= set(loaded.source.names)
    for name, tensor in read_by_transformers.items():
        assert torch.equal(loaded.source.read(name), tensor), name


def test_every_layout_has_a_family_here():
    assert {family.architecture for family in FAMILIES} == set(LAYOUTS)


def test_rope_factors_of_the_file_scale_the_frequencies(tmp_path: Path):
    family, factors = FAMILIES[0], torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0])
    model = random_model(family.config())
    plain = model.model.rotary_emb.inv_freq
    path = write_gguf(tmp_path / "tiny.gguf", model, family, rope_freqs__weight=factors)
    rotary = load(path).skeleton.model.rotary_emb
    assert torch.equal(rotary.inv_freq, plain / factors)


def test_opening_reads_no_weight_and_builds_a_skeleton(llama):
    path, model = llama
    loaded = load(path)
    skeleton = loaded.skeleton
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert torch.equal(skeleton.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not skeleton.training
    assert skeleton.config.vocab_size == 128


def test_a_packed_weight_comes_straight_from_the_file(llama):
    path, model = llama
    loaded = load(path)
    weight = Pack(read(loaded.source, "model.layers.1.self_attn.q_proj.weight"), 16)
    expected = model.model.layers[1].self_attn.q_proj.weight.detach().view(4, 16, 64).transpose(1, 2)
    assert torch.equal(evaluate(weight, loaded.source), expected)
    stored = loaded.source.resolve(weight)
    assert stored.names() == ("blk.1.attn_q.weight",)
    assert torch.equal(evaluate(stored, loaded.base), expected)


def test_weights_become_bf16_when_asked(llama):
    path, model = llama
    loaded = load(path, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    assert loaded.source.dtype(name) == torch.bfloat16
    assert torch.equal(loaded.source.read(name), model.state_dict()[name].bfloat16())
    assert loaded.module().dtype == torch.bfloat16
    assert loaded.module(torch.float32).dtype == torch.float32
    assert loaded.skeleton.model.rotary_emb.inv_freq.dtype == torch.float32


def test_quantized_blocks_are_read_as_gguf_reads_them(tmp_path: Path):
    print("seed", SEED)
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(SEED)).numpy()
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "F16", "BF16")]
    for kind in kinds:
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "blocks.gguf")
    for kind in kinds:
        assert source.quantization(kind.name) == kind.name
        assert source.shape(kind.name) == (8, 64)
        expected = gguf.dequantize(gguf.quantize(values, kind), kind)
        assert torch.equal(evaluate(source.stored(kind.name), source), torch.from_numpy(expected))
    parts = {name.partition(".")[2] for name in source.names if name.startswith("Q5_0.")}
    assert parts == {"codes", "high", "scales"}
    assert "Q5_0" not in source.names


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"GGU"])
def test_a_file_of_another_kind_is_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not a GGUF file") as error:
        load(path)
    one_line(error)


@pytest.mark.parametrize("kept", [4, 10, 23, 24, 100, 400, 3000, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_line(llama, kept: float):
    path, _ = llama
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(ModelError, match="is truncated or damaged") as error:
        load(path)
    one_line(error)


def test_a_damaged_header_is_one_line_or_read(llama, tmp_path: Path):
    print("seed", SEED)
    random = Random(SEED)
    content = llama[0].read_bytes()
    refusals = []
    for _ in range(150):
        damaged = bytearray(content)
        damaged[random.randrange(4, 600)] = random.randrange(256)
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            GgufSource(tmp_path / "damaged.gguf")
        except ModelError as error:
            refusals.append(str(error))
    assert refusals
    assert not any("\n" in refusal for refusal in refusals)


def test_an_unsupported_architecture_is_named(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"unsupported architecture 'mamba'.*llama") as error:
        load(tmp_path / "mamba.gguf")
    one_line(error)


def test_a_file_without_one_of_its_tensors_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = random_model(FAMILIES[0].config())
    tensors = gguf_tensors(model, FAMILIES[0])
    del tensors["blk.1.ffn_up.weight"]
    monkeypatch.setitem(globals(), "gguf_tensors", lambda *_: tensors)
    loaded = load(write_gguf(tmp_path / "tiny.gguf", model, FAMILIES[0]))
    with pytest.raises(ModelError, match=r"expected a tensor for model\.layers\.1\.mlp\.up_proj\.weight") as error:
        _ = loaded.source
    one_line(error)


def test_tensors_that_belong_to_no_parameter_are_said(tmp_path: Path):
    model = random_model(FAMILIES[0].config())
    path = write_gguf(tmp_path / "tiny.gguf", model, FAMILIES[0], extra__weight=torch.zeros(4))
    loaded = load(path)
    _ = loaded.source
    assert loaded.notes == ["1 tensors of the file belong to no parameter: extra.weight"]


def test_the_conversion_is_kept_in_the_cache_and_changes_with_the_file(llama, tmp_path: Path):
    path, _ = llama
    cache = tmp_path / "cache"
    first = load(path, cache=cache)
    words = first.tokenizer.convert_tokens_to_ids(["!", "token100"])
    again = load(path, cache=cache)
    assert again.identity == first.identity
    assert again.tokenizer_folder == first.tokenizer_folder
    assert (again.tokenizer_folder / "tokenizer.json").is_file()
    assert again.tokenizer.convert_tokens_to_ids(["!", "token100"]) == words
    assert again.tokenizer.eos_token_id == 2
    assert [folder.name for folder in (cache / "converted").iterdir() if folder.name.startswith(".")] == []
    path.write_bytes(path.read_bytes())
    assert load(path, cache=cache).identity != first.identity


def test_a_cache_that_cannot_be_written_is_one_line(llama, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="cannot write") as error:
        _ = load(llama[0], cache=tmp_path / "file").config
    one_line(error)


def test_a_full_disk_while_converting_is_one_line_and_leaves_nothing(llama, tmp_path: Path, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transformers.PretrainedConfig, "save_pretrained", full)
    with pytest.raises(CacheError, match="No space left on device") as error:
        _ = load(llama[0], cache=tmp_path / "cache").config
    one_line(error)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() or path.name == "config"] == []


def test_opening_a_known_file_imports_no_transformers(llama, tmp_path: Path):
    _ = load(llama[0], cache=tmp_path).tokenizer_folder
    script = f"""
import sys
from pathlib import Path
from random import Random
from effc.compiler.load import load
loaded = load({str(llama[0])!r}, cache=Path({str(tmp_path)!r}))
assert loaded.base.read("blk.0.attn_q.weight").shape == (64, 64)
assert (loaded.tokenizer_folder / "tokenizer.json").is_file()
print([name for name in ("transformers", "sympy", "networkx") if name in sys.modules])
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def smollm2():
    return load(store.pull("smollm2"), cache=store.cache_dir())


def test_the_default_model_answers(smollm2):
    model = smollm2.module()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = smollm2.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = smollm2.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_every_tensor_of_the_default_model_is_read(smollm2):
    start = time.perf_counter()
    total = sum(smollm2.source.read(name).numel() for name in smollm2.source.names if name != "lm_head.weight")
    print(f"read {total:,} values in {time.perf_counter() - start:.2f} s")
    assert total == 134_515_008
    assert smollm2.notes == []
    assert smollm2.base.quantization("blk.0.attn_q.weight") == "Q4_1"
