"""The commands: what they print and where, and that every error is one line and a non-zero exit code."""

import contextlib
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import effc
import pytest
from effc import cli
from effc.compiler.errors import ModelError, OptionWarning
from effc.llm import LLM
from effc.report import Explanation, GraphExplanation
from effc.runtime import store
from effc.runtime.text import TextCodec

from .test_llm import saying
from .tiny_tokenizers import byte_level, save, save_chat

ANSWER = "Köln: 10 €, Hello"


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> TextCodec:
    return TextCodec(save_chat(tmp_path_factory.mktemp("chat")))


@pytest.fixture
def model(codec, tmp_path, monkeypatch) -> str:
    """A path that opens as an LLM which says ANSWER."""
    path = tmp_path / "tiny.gguf"
    path.touch()
    monkeypatch.setattr("effc.llm.LLM", lambda found, dtype=None: saying(codec, ANSWER))
    return str(path)


def fails(capsys, *arguments: str) -> str:
    """The one line that a failing command prints."""
    assert cli.run(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("effc: ")
    assert printed.err.count("\n") == 1
    return printed.err.strip()


def test_generate_prints_the_answer_alone(capsys, model):
    assert cli.run(["generate", "Hello", "-m", model]) == 0
    printed = capsys.readouterr()
    assert printed.out == ANSWER + "\n"
    assert printed.err == ""


def test_generate_uses_the_chat_template_unless_raw(capsys, model, codec):
    assert cli.run(["generate", "Hello", "-m", model, "--system", "Short.", "--json"]) == 0
    chat = codec.chat([{"role": "system", "content": "Short."}, {"role": "user", "content": "Hello"}])
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(chat)
    assert cli.run(["generate", "Hello", "-m", model, "--raw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(codec.encode("Hello"))


def test_generate_says_that_there_is_no_chat_template(capsys, model, monkeypatch, tmp_path):
    save(byte_level(), tmp_path)
    plain = TextCodec(tmp_path)
    monkeypatch.setattr("effc.llm.LLM", lambda found, dtype=None: LLM.of(saying(plain, "Hello").program, plain))
    assert cli.run(["generate", "x", "-m", model, "-n", "1"]) == 0
    assert "has no chat template: the prompt goes in as it is" in capsys.readouterr().err


def test_options_of_the_cache_reach_the_compiler_and_its_warning_is_one_line(capsys, model, codec, monkeypatch):
    asked = []

    def compiled(found, dtype=None, **options):
        asked.append(options)
        warnings.warn("results are other ones", OptionWarning, stacklevel=2)
        return saying(codec, ANSWER)

    monkeypatch.setattr("effc.llm.LLM", compiled)
    for options in (["--ring", "8", "--stream", "4,60"], ["--stream", "4, 60"], ["--ring", "0"]):
        assert cli.run(["generate", "Hello", "-m", model, *options]) == 0
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == (ANSWER + "\n", "effc: results are other ones\n")
    assert asked == [{"ring": 8, "stream": (4, 60)}, {"stream": (4, 60)}, {"ring": 0}]


def test_generate_as_json(capsys, model, codec):
    assert cli.run(["generate", "Hello", "-m", model, "--json", "--stop", ", "]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["finish_reason"]) == ("Köln: 10 €", "stop")
    assert codec.decode(result["tokens"]).startswith("Köln: 10 €, ")
    assert 0 < result["seconds_to_first_text"] <= result["seconds"]


@pytest.mark.parametrize("arguments", [["-"], []])
def test_prompt_comes_from_standard_input(capsys, model, monkeypatch, arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert cli.run(["generate", *arguments, "-m", model]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


def test_generate_tells_speed_on_a_terminal(capsys, model, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(cli, "status", lambda text: contextlib.nullcontext())
    assert cli.run(["generate", "Hello", "-m", model]) == 0
    printed = capsys.readouterr()
    assert printed.out == ANSWER + "\n"
    assert "ended by eos" in printed.err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--temperature", "-1"], "temperature must be a number at least 0 (0 is greedy), found -1.0"),
        (["-t", "nan"], "temperature must be a number at least 0 (0 is greedy), found nan"),
        (["--top-k", "-1"], "top_k must be an integer at least 0 (0 is off), found -1"),
        (["--top-p", "0"], "top_p must be a number above 0 and at most 1 (1 is off), found 0.0"),
        (["--min-p", "1"], "min_p must be a number at least 0 and below 1 (0 is off), found 1.0"),
        (["--repetition-penalty", "0"], "repetition_penalty must be a number above 0 (1 is off), found 0.0"),
        (["--seed", "-1"], "seed must be an integer at least 0 and below 2**64, found -1"),
        (["-n", "0"], "max_new_tokens must be an integer of at least 1, found 0"),
        (["-n", "999"], "a prompt of"),
        (["--stop", ""], "a stop string must be text of at least one character, found ''"),
        (["--ring", "-1"], "ring must be an integer of at least 0 (tokens that may be taken back), found -1"),
        (["--stream", "4"], "--stream expects KEPT,WINDOW, two integers of at least 1, found '4'"),
        (["--stream", "0,8"], "--stream expects KEPT,WINDOW, two integers of at least 1, found '0,8'"),
        (["--stream", "4,x"], "--stream expects KEPT,WINDOW, two integers of at least 1, found '4,x'"),
        (["-m", "gpt-17"], "unknown model 'gpt-17': expected one of smollm2"),
        (["-m", "/no/such/file.gguf"], "no such model: found no file or folder at /no/such/file.gguf"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, model, option, message):
    assert message in fails(capsys, "generate", "Hello", "-m", model, *option)


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt_is_refused(capsys, model, prompt):
    assert "the prompt is empty" in fails(capsys, "generate", prompt, "-m", model)


def test_missing_prompt_on_a_terminal_is_refused(capsys, model, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert "there is no prompt" in fails(capsys, "generate", "-m", model)


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["generate", "--what"], ["generate", "x", "-n", "many"], ["dump"]]
)
def test_wrong_use_is_told_with_exit_code_2(capsys, arguments):
    assert cli.run(arguments) == 2
    assert "Usage: effc" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    assert cli.run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("pull", "generate", "dump", "explain", "bench"))


def test_unexpected_error_is_one_line_unless_traceback(capsys, model, monkeypatch):
    def broken(path, dtype=None):
        raise RuntimeError("tile\nsize")

    monkeypatch.setattr("effc.llm.LLM", broken)
    line = fails(capsys, "generate", "Hello", "-m", model)
    assert line == "effc: internal error: RuntimeError: tile size (see it whole with --traceback)"
    for arguments in (["--traceback", "generate", "x", "-m", model], ["generate", "x", "-m", model, "--traceback"]):
        with pytest.raises(RuntimeError, match="tile"):
            cli.run(arguments)


def test_traceback_shows_errors_of_the_user_too(model):
    with pytest.raises(ModelError):
        cli.run(["generate", "x", "-m", "gpt-17", "--traceback"])


def test_text_after_two_dashes_is_a_prompt(capsys, model):
    assert cli.run(["generate", "-m", model, "--", "--traceback"]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


def test_pull_prints_the_path(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "pull", lambda name, progress: tmp_path / name)
    assert cli.run(["pull"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / store.DEFAULT_MODEL}\n"


def test_pull_of_an_unknown_name_is_refused(capsys):
    assert "unknown model 'gpt-17'" in fails(capsys, "pull", "gpt-17")


def test_progress_only_on_a_terminal(capsys, monkeypatch):
    with cli.progress_bar() as progress:
        assert progress is None
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with cli.progress_bar() as progress:
        progress("download", 1, 2)
        progress("download", 2, 2)
    assert "download" in capsys.readouterr().err


def test_dump_prints_the_index(capsys, model, monkeypatch, tmp_path):
    asked = []

    def dump(path, output, dtype=None, **options):
        asked.append((path, output, dtype, options))
        return output / "index.txt"

    monkeypatch.setattr(effc, "dump", dump, raising=False)
    assert cli.run(["dump", model, "-o", str(tmp_path / "out"), "--ring", "3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'index.txt'}\n"
    assert asked == [(Path(model), tmp_path / "out", None, {"ring": 3})]


def test_explain_prints_a_table_or_json(capsys, model, monkeypatch):
    class Explanation:
        def __str__(self) -> str:
            return "fuse_norm  61 matches"

        def to_dict(self) -> dict:
            return {"fuse_norm": 61}

        def explain(self) -> "Explanation":
            return self

    asked = []
    monkeypatch.setattr(
        effc, "compile", lambda path, dtype=None, **options: asked.append(options) or Explanation(), raising=False
    )
    assert cli.run(["explain", model, "--stream", "2,6"]) == 0
    assert "fuse_norm  61 matches" in capsys.readouterr().out
    assert asked == [{"stream": (2, 6)}]
    assert cli.run(["explain", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"fuse_norm": 61}


def test_explain_prints_the_text_of_an_explanation(capsys, model, monkeypatch):
    graph = GraphExplanation.refused("prefill", "why")
    explanation = Explanation("tiny on avx2", [graph])
    monkeypatch.setattr(explanation, "explain", lambda: explanation, raising=False)
    monkeypatch.setattr(effc, "compile", lambda path, dtype=None: explanation, raising=False)
    assert cli.run(["explain", model]) == 0
    assert capsys.readouterr().out == f"tiny on avx2\n\n{graph}\n"


def test_bench_passes_its_arguments_on(capsys, monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "decode.py").write_text("def main(arguments):\n    print(arguments)\n    return 3\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    assert cli.run(["bench", "--json", "smollm2", "--help"]) == 3
    assert capsys.readouterr().out == "['--json', 'smollm2', '--help']\n"


def test_bench_outside_a_checkout_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    assert "run it from a checkout" in fails(capsys, "bench")


def test_argument_errors_come_before_torch_is_imported():
    code = (
        "import sys; from effc import cli\n"
        "assert cli.run(['generate', 'x', '--top-p', '2']) == 1\n"
        "assert cli.run(['generate', 'x', '-m', 'gpt-17']) == 1\n"
        "assert cli.run(['generate', '--what']) == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_program_exits_with_the_code():
    done = subprocess.run([sys.executable, "-m", "effc.cli", "pull", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("effc: unknown model 'x'")


def test_a_closed_pipe_ends_quietly():
    """As in `effc generate ... | head`: the reader has gone."""
    code = (
        "import sys; from effc import cli\n"
        "def broken(name, progress): raise BrokenPipeError(32, 'Broken pipe')\n"
        "cli.pull = broken\n"
        "sys.exit(cli.run(['pull']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_an_interrupt_ends_quietly(capsys, monkeypatch):
    def interrupted(name, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "pull", interrupted)
    assert cli.run(["pull"]) == 130
    assert capsys.readouterr().err == ""
