"""Configs and tokenizers that transformers converts: kept in the cache, since converting takes seconds."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CacheError, EffcError, ModelError, one_line
from .gguf_file import GgufSource, complete_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def config_of_gguf(source: GgufSource) -> PretrainedConfig:
    """The transformers config of a GGUF file. Raises ModelError where transformers cannot read it."""
    from transformers import AutoConfig

    path = source.path
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{path}: transformers cannot read the config of {source.architecture!r}: {one_line(error)}"
        ) from error
    complete_config(config, source)
    return config


def write_tokenizer(folder: Path, path: Path, gguf_file: str | None = None) -> None:
    """Convert the tokenizer of the model at `path` and write it to `folder`, tokenizer.json first of all.

    Raises ModelError where transformers cannot convert it.
    """
    from transformers import AutoTokenizer

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:
        name = path if gguf_file is None else path / gguf_file
        raise ModelError(f"{name}: transformers cannot convert the tokenizer: {one_line(error)}") from error
    tokenizer.save_pretrained(folder)


def converted(cache: Path | None, model: str, kind: str, write: Callable[[Path], object]) -> Path:
    """The folder with what `write` puts there: made once per model and version of transformers where there is a cache.

    cache: None converts anew, into a folder that goes away with the process. model: a name that changes with the
    model's files. Raises CacheError where the folder cannot be written, whole: a part is never left behind.
    """
    root = _scratch() if cache is None else cache / "converted"
    folder = root / f"{model}-transformers-{version('transformers')}" / kind
    if cache is None or not folder.is_dir():
        _make(folder, write)
    return folder


@cache
def _scratch() -> Path:
    """One temporary folder for the process; removed at its end."""
    import atexit

    folder = Path(tempfile.mkdtemp(prefix="effc-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _make(folder: Path, write: Callable[[Path], object]) -> None:
    """Write into a temporary folder beside `folder` and rename it: nobody sees a part, and one of two writers wins."""
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        write(scratch)
        if not folder.is_dir():
            os.rename(scratch, folder)
    except EffcError:
        raise
    except Exception as error:  # the tokenizers library raises a bare Exception for a full disk
        if not folder.is_dir():
            raise CacheError(
                f"cannot write {folder}: {one_line(error)}; make room, or choose another cache folder"
            ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
