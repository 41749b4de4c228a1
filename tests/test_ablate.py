"""The table of `effc ablate`, on a tiny model."""

from __future__ import annotations

import effc.ablate
import effc.passes.pipeline
import pytest
from effc.cli import run
from effc.compiler.errors import ModelError

from .families import tiny_model

NAMES = ("fuse_norm", "fuse_attention")


@pytest.fixture
def two_passes(monkeypatch):
    """The table has a row for two passes only, so that little is compiled, and the second cannot be left out."""
    compile_model = effc.ablate.compile

    def compile_some(model, skip):
        if "fuse_attention" in skip:
            raise ModelError("no KV cache can be made for it")
        return compile_model(model, skip=skip)

    monkeypatch.setattr(effc.ablate, "compile", compile_some)
    functions = [function for function in effc.passes.pipeline.PASSES if function.__name__ in NAMES]
    monkeypatch.setattr(effc.ablate, "PASSES", functions)


def test_each_pass_has_a_row_beside_the_whole_pipeline(two_passes):
    told = []
    options = {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1, "progress": told.append}
    table = effc.ablate.ablate(tiny_model(num_hidden_layers=1), **options)
    assert [row.without for row in table.rows] == [(), ("fuse_norm",), ("fuse_attention",)]
    whole, norm, refused = table.rows
    assert min(whole.prefill, whole.decode, norm.prefill, norm.decode) > 0
    assert whole.kl == 0
    assert 0 <= norm.kl < 1e-6
    assert refused.refused == "no KV cache can be made for it"
    assert told[1] == "2 of 3: without fuse_norm"
    text = str(table)
    assert "fuse_attention                     refused: no KV cache" in text
    assert "8 tokens read, 2 written" in text


def test_the_command_refuses_what_it_cannot_measure(capsys):
    assert run(["ablate", "smollm2", "--tokens", "0"]) == 1
    assert "tokens" in capsys.readouterr().err
