"""Small tokenizers of the two kinds that language models use, made without a download."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello world, hello there.",
    "Grüße aus Köln: café, naïve, 10 €.",
    "  indented\n\nlines  ",
    "日本語と emoji 🙂",
]
CHATML = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{% generation %}<|im_start|>assistant\n{% endgeneration %}{% endif %}"
)


def byte_level() -> Tokenizer:
    """Byte-level BPE, as GPT-2 and most newer models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE over words that start with a space mark, unknown characters as bytes, as Llama 2."""
    letters = sorted(set("".join(CORPUS[:2])) - {" ", "€"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    merges = [("▁", "H"), ("▁H", "e"), ("▁", "w"), ("l", "l"), ("o", "r"), ("▁", "▁")]
    tokens += ["".join(pair) for pair in merges]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def save(tokenizer: Tokenizer, folder, **options: object) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    wrapped.save_pretrained(folder)
    return wrapped


def save_chat(folder: Path) -> Path:
    """A byte-level tokenizer with the special tokens and the template of ChatML."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    save(tokenizer, folder, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=CHATML)
    return folder
