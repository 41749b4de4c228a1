"""The cacheability report, and programs that can have no cache."""

from __future__ import annotations

import effc
import pytest
import torch
from effc.compiler.errors import ModelError
from effc.passes.cacheability import cacheability

from .test_materialize_kv import Model, attend, compiled, fused


def test_each_site_says_its_axis_its_mask_and_its_state():
    report = cacheability(fused("Llama")[1])
    assert report.refusal is None
    first, second = report.sites
    assert first.axis == "dimension 2 of q [B, 4, S, 8], k [B, 2, S, 8] and v [B, 2, S, 8]"
    assert first.mask == ("causal (k <= q)", "padding (attention_mask[b, k] != 0)")
    assert (first.states, second.states) == (("k_cache_0", "v_cache_0"), ("k_cache_1", "v_cache_1"))
    assert first.bytes_per_token == 2 * 2 * 8 * 4
    assert report.bytes_per_token == 2 * first.bytes_per_token
    assert "modeling_llama.py" in first.source
    assert str(report).startswith(
        "KV cache: 2 sites of attention, 256 bytes per token and row\n  attention  # modeling"
    )


def test_a_window_is_named():
    report = cacheability(fused("Mistral")[1])
    assert [site.mask[1] for site in report.sites] == ["window of 6 (k > q - 6)"] * 2


def test_a_refusal_names_node_op_line_and_reason():
    report = cacheability(compiled(lambda m, x, mask, places: attend(m, x, is_causal=False))[1])
    assert report.sites == ()
    assert str(report).startswith(
        "KV cache: none: no KV cache can be made for graph forward: attention (effc.attention"
    )
    assert "test_materialize_kv.py" in report.refusal
    assert report.refusal.endswith("it is not causal: a token sees those behind it")


def test_a_program_without_a_cache_still_gives_logits():
    torch.manual_seed(0)
    model = Model(lambda m, x, mask, places: attend(m, x, is_causal=False)).eval()
    program = effc.compile(model)
    ids = torch.randint(0, 97, (2, 7))
    with torch.no_grad():
        expected = model(ids, torch.ones_like(ids), torch.arange(7).expand(2, 7))
    torch.testing.assert_close(program(ids), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match="it is not causal"):
        program.generate(ids, max_new_tokens=2)
    explanation = program.explain()
    assert [graph.name for graph in explanation.graphs] == ["forward"]
    assert "KV cache: none" in str(explanation)
