"""`effc.LLM`: batches, streams, stop strings, chat and refusals, over programs that need no compiler."""

import effc
import pytest
import torch
from effc.compiler.errors import InputError, ModelError, OptionWarning
from effc.llm import LLM, pad_left
from effc.passes.stream_attention import Seen
from effc.runtime.text import TextCodec

from .tiny_llama import ScriptedProgram, TinyProgram, tiny_llama
from .tiny_tokenizers import save_chat

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> TextCodec:
    return TextCodec(save_chat(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def llm(codec) -> LLM:
    """A random Llama: it babbles, but the same way each time."""
    return LLM.of(TinyProgram(tiny_llama(vocab_size=codec.tokenizer.get_vocab_size(), eos_token_id=None)), codec)


def saying(codec: TextCodec, *answers: str) -> LLM:
    """An LLM whose rows say these texts, each followed by the eos token to the end."""
    ids = [codec.encode(answer) for answer in answers]
    length = max(len(row) for row in ids) + 8
    script = torch.tensor([row + list(codec.eos_ids) * (length - len(row)) for row in ids])
    return LLM.of(ScriptedProgram(script, codec.tokenizer.get_vocab_size(), codec.eos_ids, 128), codec)


def test_answers_end_at_eos_without_showing_it(codec):
    first, second = saying(codec, "Köln: 10 €", "Hello").generate(["a", "b c"], max_new_tokens=40)
    assert (first.text, first.finish_reason) == ("Köln: 10 €", "eos")
    assert (str(second), second.finish_reason) == ("Hello", "eos")
    assert second.tokens == (*codec.encode("Hello"), *codec.eos_ids)
    assert second.prompt_tokens == len(codec.encode("b c"))


def test_one_prompt_gives_a_list_of_one(codec):
    assert [str(answer) for answer in saying(codec, "Hello").generate("x")] == ["Hello"]


def test_length_ends_an_answer(codec):
    (answer,) = saying(codec, "Hello world").generate("x", max_new_tokens=2)
    assert answer.finish_reason == "length"
    assert answer.text == codec.decode(codec.encode("Hello world")[:2])


def test_stop_strings_end_each_row_alone(codec):
    llm = saying(codec, "Hello world, STOP more", "Grüße, no end here", "STOP")
    answers = llm.generate(["a", "b", "c"], stop=["STOP", "zzz"])
    assert [answer.text for answer in answers] == ["Hello world, ", "Grüße, no end here", ""]
    assert [answer.finish_reason for answer in answers] == ["stop", "eos", "stop"]
    assert llm.program.step < len(codec.encode("Grüße, no end here")) + 1


def test_a_stop_string_ends_the_loop(codec):
    llm = saying(codec, "Hello STOP and much more to say")
    assert str(llm.generate("a", stop="STOP")[0]) == "Hello "
    assert llm.program.step == len(codec.encode("Hello STOP")) - 1


@pytest.mark.parametrize("stop", [(), ("ld,",), ("nowhere",)])
def test_stream_joins_to_what_generate_gives(codec, stop):
    llm = saying(codec, "Hello world, 🙂 日本")
    stream = llm.stream("x", stop=stop)
    pieces = list(stream)
    (answer,) = llm.generate("x", stop=stop)
    assert "".join(pieces) == answer.text
    assert all(pieces)
    assert (stream.finish_reason, tuple(stream.tokens)) == (answer.finish_reason, answer.tokens)
    assert stream.prompt_tokens == answer.prompt_tokens


def test_batch_equals_single_answers(llm):
    prompts = ["Hello", "Grüße aus Köln und mehr", "x"]
    options = {"max_new_tokens": 12, "ignore_eos": True}
    assert [answer.tokens for answer in llm.generate(prompts, **options)] == [
        llm.generate(prompt, **options)[0].tokens for prompt in prompts
    ]


def test_batch_equals_single_answers_where_the_first_tokens_are_kept(codec):
    """Rows of a cache that keeps the first tokens have no padding, and the next call finds no token of the last."""
    llama = tiny_llama(vocab_size=codec.tokenizer.get_vocab_size(), eos_token_id=None)
    llm = LLM.of(TinyProgram(llama, Seen(2, 6)), codec)
    prompts = ["Hello", "Grüße aus Köln und mehr, und noch mehr", "x"]
    options = {"max_new_tokens": 12, "ignore_eos": True}
    assert [answer.tokens for answer in llm.generate(prompts, **options)] == [
        llm.generate(prompt, **options)[0].tokens for prompt in prompts
    ]


def test_options_of_the_compiler_are_checked_before_it_runs(codec):
    class Loaded:
        name, tokenizer_folder = "tiny", codec.folder

    for option, message in (({"ring": -1}, "ring must be"), ({"stream": (4,)}, r"stream must be .*, found \(4,\)")):
        with pytest.raises(InputError, match=message):
            LLM(Loaded(), **option)


@pytest.mark.slow
def test_a_model_is_streamed(codec):
    llama = tiny_llama(vocab_size=codec.tokenizer.get_vocab_size(), eos_token_id=None)
    with pytest.warns(OptionWarning, match="the first 2 tokens and the last 6 only"):
        program = effc.compile(llama, ring=3, stream=(2, 6))
    prompts, options = ["Hello", "Grüße aus Köln und mehr"], {"max_new_tokens": 8, "ignore_eos": True}
    answers = [LLM.of(each, codec).generate(prompts, **options) for each in (program, TinyProgram(llama, Seen(2, 6)))]
    assert answers[0] == answers[1]
    with pytest.warns(OptionWarning, match="ring has no effect: LlamaForCausalLM has no attention that sees a window"):
        assert effc.compile(llama, ring=3).config.cache_layout


def test_sampling_is_reproducible(llm):
    options = {"max_new_tokens": 12, "temperature": 1.2, "top_p": 0.9}
    first = llm.generate("Hello", seed=1, **options)
    assert first == llm.generate("Hello", seed=1, **options)
    assert first != llm.generate("Hello", seed=2, **options)


def test_two_streams_at_once_do_not_disturb_each_other(llm):
    options = {"max_new_tokens": 10, "ignore_eos": True}
    expected = [llm.generate(prompt, **options)[0].tokens for prompt in ("Hello", "Köln")]
    streams = [llm.stream(prompt, **options) for prompt in ("Hello", "Köln")]
    for _ in range(12):
        for stream in streams:
            next(stream, None)
    assert [tuple(stream.tokens) for stream in streams] == expected


def test_cache_buffers_are_used_again(llm):
    llm.generate("Hello", max_new_tokens=3)
    first = llm._spare_cache
    list(llm.stream("Hello world", max_new_tokens=5))
    assert llm._spare_cache is first
    stream = llm.stream("Hello", max_new_tokens=20, ignore_eos=True)
    next(stream)
    stream.close()
    assert llm._spare_cache is first


def test_chat_goes_through_the_template(codec, llm):
    expected = codec.chat([{"role": "system", "content": "Short."}, {"role": "user", "content": "Hello"}])
    assert llm.encode("Hello", chat=True, system="Short.") == expected
    assert llm.encode([{"role": "user", "content": "Hello"}], system="Short.") == expected
    messages = [{"role": "user", "content": "Hello"}]
    assert llm.generate(messages, max_new_tokens=2)[0].prompt_tokens == len(codec.chat(messages))
    assert len(llm.generate([messages, messages], max_new_tokens=2)) == 2


def test_default_length_stops_at_the_context(codec):
    llm = saying(codec, "Hello " * 100)
    (answer,) = llm.generate("x y", ignore_eos=True)
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens + len(answer.tokens) == 128


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("  \n", {}, "the prompt is empty"),
        (["x", ""], {}, "the prompt is empty"),
        ([], {}, "there is no prompt"),
        ("x" * 300, {}, "the prompt has 300 tokens and the context holds 128"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens must be"),
        ("x", {"max_new_tokens": 500}, "a prompt of 1 tokens and max_new_tokens=500 exceed the context of 128"),
        ("x", {"temperature": -1}, "temperature must be"),
        ("x", {"stop": [""]}, "a stop string must be"),
        ("x", {"system": "Short."}, "a system message needs the chat template"),
    ],
)
def test_bad_input_is_refused_at_the_call(codec, prompts, options, message):
    llm = saying(codec, "Hello")
    with pytest.raises(InputError, match=message):
        llm.generate(prompts, **options)
    if isinstance(prompts, str):
        with pytest.raises(InputError, match=message):
            llm.stream(prompts, **options)


def test_model_without_tokenizer_is_refused():
    class Loaded:
        name, tokenizer_folder = "tiny", None

    with pytest.raises(ModelError, match=r"tiny brings no tokenizer\.json"):
        LLM(Loaded())


def test_padding_goes_to_the_left():
    ids, mask = pad_left([[1, 2, 3], [4]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_left([[1], [2]], torch.device("cpu"))[1] is None
