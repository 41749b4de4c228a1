"""Calibration of the default model: what GPTQ saves of the perplexity that round to nearest costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from effc import passes
from effc.compiler.formats import find
from effc.compiler.load import load
from effc.compiler.trace import trace
from effc.passes.calibrate import Reference, calibrate, everywhere, inputs_of, text_parts, token_rows
from effc.runtime.text import TextCodec


@pytest.mark.slow
def test_gptq_adds_much_less_to_perplexity_than_round_to_nearest(smollm2_path: Path, tmp_path: Path):
    model = load(smollm2_path, cache=tmp_path)
    graph, _ = passes.run(trace(model), verify=False)
    parts, encode = text_parts(), TextCodec(model.tokenizer_folder).encode
    texts = inputs_of(graph, token_rows(parts.calibration, encode, 4, 256))
    reference = Reference(graph, model.source, inputs_of(graph, token_rows(parts.held_out, encode, 2, 256)))
    before, after = reference.quality().perplexity, {}
    for method in ("rtn", "gptq"):
        found = calibrate(graph, model.source, texts, everywhere(find("int4_g128")), method)
        after[method] = reference.measure(found.graph, model.source, found.assignments).perplexity - before
    print(before, after)
    assert 0 < after["gptq"] < 0.6 * after["rtn"]
