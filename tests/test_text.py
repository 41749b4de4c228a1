"""Tokenizer, chat template, detokenizing a stream and stop strings, without transformers in `effc.runtime.text`."""

import json
import random
import subprocess
import sys

import pytest
from effc.compiler.errors import InputError, ModelError
from effc.runtime.text import REPLACEMENT, StopStrings, TextCodec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from .tiny_tokenizers import CORPUS, byte_fallback, byte_level, save, save_chat


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return save_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda make: make.__name__)
def codec(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    save(request.param(), folder)
    return TextCodec(folder)


def pieces(codec: TextCodec, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = codec.detokenizer(prompt or [])
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=30))
@example(text="10 €")
@example(text="🙂🙂")
@example(text="  two  spaces ")
def test_pieces_join_to_the_text_and_hold_whole_characters(codec, text):
    ids = codec.encode(text)
    parts = pieces(codec, ids)
    assert "".join(parts) == codec.decode(ids)
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in part for part in parts)


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.sampled_from(["Hello", " world", " café", "€", "🙂", "\n", " ", "x"]), min_size=2, max_size=12)
)
def test_a_stream_continues_its_prompt(codec, words):
    for cut in range(1, len(words)):
        ids = codec.encode("".join(words))
        prompt, new = ids[:cut], ids[cut:]
        if codec.decode(prompt).endswith(REPLACEMENT):
            continue
        assert codec.decode(prompt) + "".join(pieces(codec, new, prompt)) == codec.decode(ids)


def test_any_tokens_give_what_decoding_them_gives(tmp_path):
    """Byte-level text may hold broken characters anywhere; they come out as when decoded at once."""
    save(byte_level(), tmp_path)
    codec = TextCodec(tmp_path)
    seed = 21
    print("seed", seed)
    choose = random.Random(seed)
    for _ in range(200):
        ids = [choose.randrange(codec.tokenizer.get_vocab_size()) for _ in range(choose.randrange(1, 25))]
        assert "".join(pieces(codec, ids)) == codec.decode(ids)


def test_a_character_waits_for_its_last_byte(codec):
    ids = codec.encode("x€")
    parts = pieces(codec, ids)
    assert [part for part in parts if part] == ["x", "€"]
    assert parts[-2] == "€"


def test_bytes_that_make_no_character_come_at_the_end(codec):
    ids = codec.encode("a€")[:-1]
    detokenizer = codec.detokenizer()
    assert "".join(detokenizer.push(token) for token in ids) == "a"
    assert set(detokenizer.flush()) == {REPLACEMENT}
    assert detokenizer.flush() == ""


def test_leading_space_of_the_first_new_token_stays_after_a_prompt(tmp_path):
    save(byte_fallback(), tmp_path)
    codec = TextCodec(tmp_path)
    prompt, answer = codec.encode("Hello"), codec.encode(" world", add_special_tokens=False)[1:]
    assert codec.decode(answer) == "world"
    assert "".join(pieces(codec, answer, prompt)) == " world"


def test_special_tokens_are_not_shown(chat_folder):
    codec = TextCodec(chat_folder)
    ids = codec.encode("<|im_start|>Hello<|im_end|> world<|endoftext|>")
    assert "".join(pieces(codec, ids)) == "Hello world" == codec.decode(ids)


def test_encoding_equals_transformers(codec):
    wrapped = PreTrainedTokenizerFast.from_pretrained(codec.folder)
    for text in CORPUS:
        assert codec.encode(text) == wrapped(text)["input_ids"]
        assert codec.decode(codec.encode(text)) == wrapped.decode(wrapped(text)["input_ids"], skip_special_tokens=True)


MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Grüße <|im_end|> € 🙂?"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "world"},
]


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chat_equals_transformers(chat_folder, generation_prompt):
    codec, wrapped = TextCodec(chat_folder), PreTrainedTokenizerFast.from_pretrained(chat_folder)
    options = {"add_generation_prompt": generation_prompt}
    assert codec.render(MESSAGES, **options) == wrapped.apply_chat_template(MESSAGES, tokenize=False, **options)
    assert codec.chat(MESSAGES, **options) == wrapped.apply_chat_template(MESSAGES, **options)["input_ids"]


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ tools }}",
    "{{ thinking if thinking is defined else 'off' }}   {% if documents is none %}\n  x{% endif %}\n y",
    "{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path, template):
    wrapped = save(byte_level(), tmp_path, bos_token="<s>", chat_template=template)
    expected = wrapped.apply_chat_template(MESSAGES, tokenize=False)
    assert TextCodec(tmp_path).render(MESSAGES, add_generation_prompt=False) == expected


def test_template_variables_are_passed_on(tmp_path):
    save(byte_level(), tmp_path, chat_template=TEMPLATES[3])
    assert TextCodec(tmp_path).render(MESSAGES, thinking="on").startswith("on")


def test_default_of_several_templates_is_taken(tmp_path):
    save(byte_level(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextCodec(tmp_path).render(MESSAGES) == "yes"


def test_eos_ids_join_tokenizer_and_generation_config(chat_folder, tmp_path):
    codec = TextCodec(chat_folder)
    end, text_end = (codec.tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert codec.eos_ids == (end,)
    for path in chat_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [text_end, end]}))
    assert TextCodec(tmp_path).eos_ids == (end, text_end)


def test_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        TextCodec(tmp_path)


def test_broken_tokenizer_files_are_refused(tmp_path, chat_folder):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
        TextCodec(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((chat_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        TextCodec(tmp_path)


def test_broken_template_is_refused(tmp_path):
    save(byte_level(), tmp_path, chat_template="{% for %}")
    with pytest.raises(ModelError, match="chat template cannot be parsed"):
        TextCodec(tmp_path).render(MESSAGES)


def test_template_may_refuse_messages(tmp_path):
    save(byte_level(), tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        TextCodec(tmp_path).render(MESSAGES)


def test_template_cannot_reach_python(tmp_path):
    save(byte_level(), tmp_path, chat_template="{{ messages.append(1) }}")
    with pytest.raises(InputError, match="the chat template refuses these messages: access to attribute"):
        TextCodec(tmp_path).render(MESSAGES)


def test_empty_prompts_are_refused(codec, chat_folder):
    with pytest.raises(InputError, match="the prompt is empty"):
        codec.encode("", add_special_tokens=False)
    with pytest.raises(InputError, match="the chat is empty"):
        TextCodec(chat_folder).chat([])
    with pytest.raises(InputError, match="must be a dict with a role"):
        TextCodec(chat_folder).chat(["hello"])
    with pytest.raises(InputError, match="has no chat template"):
        codec.chat(MESSAGES)


def cut_text(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    stream = StopStrings(stops)
    shown = "".join(stream.push(part) for part in parts)
    return shown + stream.flush(), stream.stopped


@pytest.mark.parametrize(
    ("stops", "parts", "shown", "stopped"),
    [
        (["END"], ["a E", "N", "D b"], "a ", True),
        (["END"], ["a E", "N", "d b"], "a ENd b", False),
        (["aab"], ["aaab"], "a", True),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["\n\n", "User:"], ["x\n", "y Us", "er: z"], "x\ny ", True),
        (["abcd", "bc"], ["abcd"], "a", True),
        (["abcd", "bc"], ["a", "b", "c", "d"], "a", True),
        (["bc", "abc"], ["abc"], "", True),
        ([], ["a", "b"], "ab", False),
    ],
)
def test_text_ends_before_the_stop_string(stops, parts, shown, stopped):
    assert cut_text(stops, parts) == (shown, stopped)


@settings(max_examples=300, deadline=None)
@given(
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    parts=st.lists(st.text("abc", max_size=5), max_size=6),
)
def test_the_cut_does_not_depend_on_the_pieces(stops, parts):
    text = "".join(parts)
    assert cut_text(stops, parts) == cut_text(stops, list(text)) == cut_text(stops, [text])
    stream, shown = StopStrings(stops), ""
    for part in parts:
        shown += stream.push(part)
        assert not any(stop in shown for stop in stops)


@pytest.mark.parametrize("stop", ["", None, 3])
def test_nonsense_stop_strings_are_refused(stop):
    with pytest.raises(InputError, match="a stop string must be text"):
        StopStrings([stop])


def test_text_needs_no_transformers(chat_folder):
    code = (
        "import sys; from effc.runtime.text import TextCodec;"
        f"TextCodec({str(chat_folder)!r}).chat([{{'role': 'user', 'content': 'x'}}]);"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
