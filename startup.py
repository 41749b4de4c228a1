"""How long a program takes from nothing to its first token, in a process of its own.

python -m effc.startup MODEL        prints one JSON object; `measure` starts that and reads it
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from .compiler.errors import EffcError, ModelError

QUESTION = "What is the capital of France?"
SPAWNED = "EFFC_SPAWNED_AT"


@dataclass(frozen=True)
class Startup:
    """Seconds of each stage, in order, and of the whole from the start of the process to the first token.

    start: the interpreter and imports. open: the model's file and its tokenizer. compile: prefill and decode, from the
    trace to native code (or from the cache). first_token: reading weights and the prompt.
    """

    start: float
    open: float
    compile: float
    first_token: float
    total: float


def measure(model: str | Path, cache: Path, dtype: str | None = None) -> Startup:
    """Start a process that compiles `model` with the cache folder `cache` and makes one token.

    An empty folder makes it a cold start. Raises EffcError with the last line of what the process said if it fails.
    """
    environment = {**os.environ, "EFFC_CACHE_DIR": str(cache), SPAWNED: repr(time.time())}
    command = [sys.executable, "-m", "effc.startup", str(model), *([dtype] if dtype else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise EffcError(f"compiling {model} in a process of its own failed: {said[-1]}")
    return Startup(**json.loads(done.stdout.splitlines()[-1]))


def first_token(model: str, dtype: str | None) -> Startup:
    """Open and compile a model, make one token, and say how long each stage took."""
    spawned = float(os.environ.get(SPAWNED) or time.time())
    import torch

    from .llm import LLM
    from .program import compile, load
    from .runtime.text import TextCodec

    moments = [spawned, time.time()]
    loaded = load(model, getattr(torch, dtype) if dtype else None)
    if loaded.tokenizer_folder is None:
        raise ModelError(f"{model} brings no tokenizer.json, which a question in text needs")
    codec = TextCodec(loaded.tokenizer_folder)
    moments.append(time.time())
    program = compile(loaded)
    for kind in ("prefill", "decode"):
        program.built(kind)
    llm = LLM.of(program, codec)
    moments.append(time.time())
    llm.generate(QUESTION, chat=codec.chat_template is not None, max_new_tokens=1, ignore_eos=True)
    moments.append(time.time())
    stages = [after - before for before, after in pairwise(moments)]
    return Startup(*stages, total=moments[-1] - spawned)


def main() -> None:
    model, *rest = sys.argv[1:]
    try:
        print(json.dumps(asdict(first_token(model, rest[0] if rest else None))))
    except EffcError as error:
        sys.exit(f"effc: {error}")


if __name__ == "__main__":
    main()
