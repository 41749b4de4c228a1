"""effc as a backend of torch.compile: any model in inference mode, without importing effc.

python examples/compile_backend.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    with torch.no_grad():
        logits = model(prompt).logits
        tokens = model.generate(prompt, **options)

        model.forward = torch.compile(model.forward, backend="effc")

        error = (model(prompt).logits - logits).abs().max().item()
        print(f"largest difference of a logit from eager: {error:.1e}")
        print(f"the same tokens from generate: {torch.equal(model.generate(prompt, **options), tokens)}")


if __name__ == "__main__":
    main()
