"""A model, text and a method in; parameters, a report and a file that opens as the calibrated model out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effc.calibrate_model import BUDGET_FORMATS, TextSizes, calibrate_model
from effc.compiler.errors import InputError
from effc.compiler.load import load
from effc.compiler.schemes import scheme_of
from effc.quantize_model import quantize_model

from .families import tiny_model
from .test_load import logits
from .tiny_tokenizers import save_chat

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = TextSizes(calibration=4, held_out=2, length=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a Llama of one layer with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("Llama", vocab_size=512, num_hidden_layers=1).save_pretrained(folder)
    save_chat(folder)
    return folder


def test_a_calibrated_model_is_written_and_opens(folder: Path, tmp_path: Path):
    model = load(folder)
    calibrated = calibrate_model(model, scheme_of("w4"), "awq", sizes=SIZES)
    written = quantize_model(model, "w4", tmp_path / "awq.safetensors", calibrated=calibrated.parameters)
    assert written.formats == {"int4_g32": 7, "int8_g32": 2}
    assert "perplexity" in calibrated.report.summary
    expected = model.module()
    state = expected.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in calibrated.parameters.values.items():
            state[name].copy_(value)
        for name, matrix in calibrated.parameters.matrices.items():
            state[name].copy_(matrix.values(torch.float32))
        table = expected.get_input_embeddings().weight
        format = calibrated.parameters.matrices["lm_head.weight"].format
        table.copy_(format.dequantize(format.quantize(table)))
    opened = load(tmp_path / "awq.safetensors", cache=tmp_path / "cache").module()
    assert torch.equal(logits(opened), logits(expected))


def test_a_budget_mixes_formats(folder: Path):
    report = calibrate_model(load(folder), scheme_of("stored"), "clip", 5.0, SIZES).report
    assert report.bits <= 5.0
    assert len({site.format for site in report.sites}) > 1
    assert {site.format for site in report.sites} <= set(BUDGET_FORMATS)
    assert all(site.kl is not None for site in report.sites)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match=r"Llama.* brings no tokenizer"):
        calibrate_model(load(tiny_model("Llama", num_hidden_layers=1)), scheme_of("w4"))


def test_an_unknown_method_is_refused_before_anything_is_traced(folder: Path):
    with pytest.raises(InputError, match="unknown method 'gtpq'"):
        calibrate_model(load(folder), scheme_of("w4"), "gtpq")
