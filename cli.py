"""The commands: `effc pull | generate | quantize | dump | explain | profile | ablate | bench`.

Nothing heavy is imported before the arguments are known to be good. What the model says, paths and tables go to
standard output; progress and statistics go to standard error, and only where that is a terminal.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .compiler.errors import EffcError, InputError, OptionWarning
from .compiler.options import check_ring, check_stream
from .runtime.sampling_params import SamplingParams, check_integer, check_max_new_tokens
from .runtime.store import DEFAULT_MODEL, MODELS, Progress, pull, resolve

if TYPE_CHECKING:
    import torch

    from .llm import TextStream

app = typer.Typer(
    name="effc",
    help="A compiler for LLM inference: fx graphs, rewrite passes, generated Triton kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dtype(StrEnum):
    """What the weights become."""

    fp32 = "fp32"
    bf16 = "bf16"

    def torch_dtype(self) -> torch.dtype:
        import torch

        return {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}[self]


ModelOption = Annotated[str, typer.Option("--model", "-m", help="A known name, a GGUF file or a Hugging Face folder.")]
ModelArgument = Annotated[str, typer.Argument(help="A known name, a GGUF file or a Hugging Face folder.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="What the weights become; fp32 unless the model says bf16.")]
RingOption = Annotated[
    int | None,
    typer.Option(metavar="R", help="Layers with a window cache it and R tokens more, instead of every token."),
]
StreamOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEPT,WINDOW",
        help="See, and cache, the first KEPT tokens and the last WINDOW only: bounded memory, other results.",
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME",
        help="Compute in fewer bits: stored (the blocks of the file), w8a8, w4a8, w8, w4, a format, or none.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Options of every command; `run` reads --traceback itself, wherever it stands."""


@app.command("pull")
def pull_command(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(MODELS)}.")] = DEFAULT_MODEL,
) -> None:
    """Fetch a known model into the cache and print its path."""
    with progress_bar() as progress:
        path = pull(name, progress)
    print(path)


@app.command("generate")
def generate_command(
    prompt: Annotated[str | None, typer.Argument(help="What to say; - or nothing reads standard input.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="The system message of the chat.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="At most this many; 256, or what has room.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most probable tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable mass; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least probability, relative to the largest; 0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes repetition rarer.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    ring: RingOption = None,
    stream: StreamOption = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt, token by token."""
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if max_new_tokens is not None:
        check_max_new_tokens(max_new_tokens)
    chosen = compile_options(ring, stream, quantize)
    text = read_prompt(prompt)
    path = located(model)
    with status(f"opening {model}"), option_warnings():
        from .llm import LLM

        llm = LLM(path, dtype=dtype and dtype.torch_dtype(), **chosen)
    chat = not raw
    if chat and llm.codec.chat_template is None:
        chat = False
        print(f"effc: {model} has no chat template: the prompt goes in as it is", file=sys.stderr)
    options = {"chat": chat, "system": system, "max_new_tokens": max_new_tokens, "stop": stop or ()}
    answer = llm.stream(text, ignore_eos=ignore_eos, **options, **vars(params))
    show_answer(answer, as_json)


def show_answer(answer: TextStream, as_json: bool) -> None:
    """Print the pieces as they come, or one JSON object at the end; then how fast it went."""
    start = time.perf_counter()
    first: float | None = None
    pieces = []
    for piece in answer:
        first = time.perf_counter() - start if first is None else first
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    first = seconds if first is None else first
    if as_json:
        result = {
            "text": "".join(pieces),
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "seconds_to_first_text": first,
            "seconds": seconds,
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    print()
    if sys.stderr.isatty():
        made = len(answer.tokens)
        speed = f", then {(made - 1) / (seconds - first):.1f} tokens/s" if made > 1 and seconds > first else ""
        print(
            f"[{answer.prompt_tokens} tokens read, first text after {first:.2f} s; {made} written{speed};"
            f" ended by {answer.finish_reason}]",
            file=sys.stderr,
        )


@app.command("quantize")
def quantize_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, .safetensors.")],
    scheme: Annotated[
        str | None, typer.Option(help="A scheme (w4, w8, w4a8, w8a8) or a format (int4_g128, q4_1, ...).")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Calibrate on text: clip, gptq, awq, rotate, ...; rtn does not look at it."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Bits per weight to share out by what matrices cost, 4.5bpw; calibrates.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure on held-out text, print a table; calibrates.")
    ] = False,
) -> None:
    """Round the weights of a model to a scheme or a format, and write it to one file that opens like the model."""
    from .compiler.schemes import scheme_of

    if scheme is None and budget is None:
        raise InputError("expected --scheme or --budget: what the weights are to become")
    found = scheme_of(scheme or "stored")
    path = located(model)
    with status(f"opening {model}"):
        from . import load
        from .quantize_model import quantize_model

        loaded = load(path)
    calibrated = None
    with progress_bar() as progress:
        if method is not None or budget is not None or report:
            from .calibrate_model import calibrate_model
            from .passes.calibrate.budget import parse_bits

            bits = None if budget is None else parse_bits(budget)
            steps = None if progress is None else lambda done, total, what: progress("calibrating", done, total)
            calibrated = calibrate_model(loaded, found, method or "gptq", bits, progress=steps)
        told = None if progress is None else lambda done, total: progress("quantizing", done, total)
        parameters = None if calibrated is None else calibrated.parameters
        written = quantize_model(loaded, scheme or "stored", output, told, parameters)
    print(written.path)
    if calibrated is not None:
        print(calibrated.report.markdown() if report else calibrated.report.summary)
    if sys.stderr.isatty():
        print(written.summary, file=sys.stderr)
    for remark in written.remarks:
        print(f"effc: {remark}", file=sys.stderr)


@app.command("dump")
def dump_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")],
    ring: RingOption = None,
    stream: StreamOption = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Write the graphs before and after each pass, the kernels and the memory plan; print the path of the index."""
    chosen = compile_options(ring, stream, quantize)
    path = located(model)
    with status(f"compiling {model}"), option_warnings():
        from . import dump

        index = dump(path, output, dtype=dtype and dtype.torch_dtype(), **chosen)
    print(index)


@app.command("explain")
def explain_command(
    model: ModelArgument,
    ring: RingOption = None,
    stream: StreamOption = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what the passes matched and missed, the kernels, and what falls back to ATen."""
    chosen = compile_options(ring, stream, quantize)
    path = located(model)
    with status(f"compiling {model}"), option_warnings():
        from . import compile as compile_model

        explanation = compile_model(path, dtype=dtype and dtype.torch_dtype(), **chosen).explain()
    if as_json:
        print(json.dumps(explanation.to_dict(), ensure_ascii=False))
    else:
        print(explanation)


@app.command("profile")
def profile_command(
    model: ModelArgument,
    graph: Annotated[str, typer.Option(help="prefill or decode.")] = "decode",
    tokens: Annotated[int, typer.Option(help="Length of the prompt, or of the context that is decoded behind.")] = 512,
    repeats: Annotated[int, typer.Option(help="Runs; their medians are printed.")] = 10,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time every kernel of a graph: milliseconds, share, GFLOP/s and GB/s."""
    for name, value in (("tokens", tokens), ("repeats", repeats)):
        check_integer(name, value, "above 0", lambda found: found > 0)
    chosen = compile_options(None, None, quantize)
    path = located(model)
    with status(f"compiling {model}"):
        from . import compile as compile_model
        from .profiling import profile

        result = profile(compile_model(path, dtype=dtype and dtype.torch_dtype(), **chosen), graph, tokens, repeats)
    print(json.dumps(result.to_dict()) if as_json else result)


@app.command("ablate")
def ablate_command(
    model: ModelArgument,
    pairs: Annotated[bool, typer.Option("--pairs", help="Leave out every two passes as well.")] = False,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to write; at least 2.")] = 16,
    repeats: Annotated[int, typer.Option(help="Runs; their medians are printed.")] = 3,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model without each pass in turn: tokens/s, launches, and KL from the whole pipeline."""
    for name, value, least in (("tokens", tokens, 1), ("new-tokens", new_tokens, 2), ("repeats", repeats, 1)):
        check_integer(name, value, f"at least {least}", lambda found, least=least: found >= least)
    path = located(model)
    from .ablate import ablate

    def progress(what: str) -> None:
        if sys.stderr.isatty():
            print(what, file=sys.stderr)

    options = {"pairs": pairs, "prompt_tokens": tokens, "new_tokens": new_tokens, "repeats": repeats}
    table = ablate(path, dtype and dtype.torch_dtype(), progress=progress, **options)
    print(json.dumps(table.to_dict()) if as_json else table)


@app.command(
    "bench",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench_command(context: typer.Context) -> None:
    """Measure prefill and decode beside other engines: bench/decode.py, which takes all further arguments."""
    script = Path(__file__).parent / "bench" / "decode.py"
    if not script.is_file():
        raise InputError(f"effc bench runs {script}, which is not there: run it from a checkout of the repository")
    raise typer.Exit(load_script(script).main(context.args) or 0)


def load_script(path: Path) -> Any:
    """A file outside the package as a module; its `main(arguments: list[str]) -> int | None` is the command."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(f"effc_{path.parent.name}_{path.stem}", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_prompt(prompt: str | None) -> str:
    """The prompt given, or standard input; never waits for a person who did not ask for that."""
    if prompt is None and sys.stdin.isatty():
        raise InputError("there is no prompt: give it as an argument, or - to type it")
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text.strip():
        raise InputError("the prompt is empty: give at least one word")
    return text


def compile_options(ring: int | None, stream: str | None, quantize: str | None) -> dict[str, Any]:
    """--ring, --stream and --quantize as `effc.compile` takes them; those alone that were given."""
    options: dict[str, Any] = {}
    if ring is not None:
        options["ring"] = check_ring(ring)
    if stream is not None:
        try:
            options["stream"] = check_stream([int(part) for part in stream.split(",")])
        except ValueError:  # InputError is one
            raise InputError(f"--stream expects KEPT,WINDOW, two integers of at least 1, found {stream!r}") from None
    if quantize is not None:
        options["quantize"] = quantize
    return options


@contextmanager
def option_warnings() -> Iterator[None]:
    """Within, what an option does to the results is told in one line on standard error."""
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, OptionWarning):
            print(f"effc: {message}", file=sys.stderr)
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", OptionWarning)
        warnings.showwarning = tell
        yield


def located(model: str) -> Path:
    """The path of a model, pulled first if it is a known name that is not in the cache."""
    with progress_bar() as progress:
        return resolve(model, progress)


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A bar for what takes long, on a terminal; None elsewhere. It appears with the first report."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bars = Bars(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if not tasks:
            bars.start()
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner while the block runs, on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit code: 0, 1 for an error (told in one line), 2 for a wrong use, 130 if interrupted."""
    options, literal = list(arguments), []
    if "--" in options:
        cut = options.index("--")
        options, literal = options[:cut], options[cut:]
    traceback = "--traceback" in options
    options = [option for option in options if option != "--traceback"]
    try:
        app(options + literal, prog_name="effc")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        if traceback:
            raise
        print(f"effc: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def one_line(error: Exception) -> str:
    """What went wrong; an error that is not the user's says its kind and how to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, EffcError):
        return text
    return f"internal error: {type(error).__name__}: {text} (see it whole with --traceback)"


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
