import pytest
import torch
from effc.compiler.errors import CacheError, InputError, ModelError
from effc.compiler.graph import Graph
from effc.compiler.load import load
from effc.compiler.rewrite import PassResult
from effc.compiler.verify import VerificationError, verify
from effc.passes import PASSES, run
from effc.stages import Options, Stages

from .families import SIZES, example_inputs, traced, worst_error

ATTENTION = torch.ops.effc.attention.default
NAMES = [function.__name__ for function in PASSES]


def test_the_passes_in_their_order():
    assert NAMES[0] == "normalize"
    assert NAMES[-1] == "cleanup"
    assert {"fuse_norm", "fuse_rope", "fuse_attention", "fuse_linear", "fuse_mlp"} < set(NAMES)
    assert NAMES.index("fuse_linear") < NAMES.index("fuse_mlp")


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma", "GPT2", "OPT", "Bloom"])
def test_all_passes_together_agree_with_eager_and_a_second_run_matches_nothing(family):
    model, graph = traced(family)
    before = str(graph)
    fused, report = run(graph)
    assert str(graph) == before
    assert [step.name for step in report.steps] == NAMES
    for batch, length in SIZES:
        error = worst_error(fused, model, example_inputs(batch, length, seed=length))
        assert error < 1e-4, f"{batch} x {length}: {error}"
    again, second = run(fused)
    assert second.matches == dict.fromkeys(NAMES, 0)
    verify(again)


def test_a_llama_is_fused_whole():
    _, report = run(traced()[1])
    assert report.matches["fuse_norm"] == 5
    assert report.matches["fuse_rope"] == 4
    assert report.matches["fuse_attention"] == 2
    assert report.matches["fuse_mlp"] == 2
    text = str(report)
    for name in NAMES:
        assert name in text


def test_passes_by_name_and_skipped_ones():
    _, graph = traced()
    _, report = run(graph, ["normalize", "fuse_norm"])
    assert list(report.matches) == ["normalize", "fuse_norm"]
    fused, report = run(graph, skip=["fuse_norm"])
    assert "fuse_norm" not in report.matches
    assert fused.count(torch.ops.effc.rms_norm.default) == 0


@pytest.mark.parametrize("options", [Options(skip=("fuse_attention",)), Options(passes=("normalize", "fuse_norm"))])
def test_what_is_left_out_is_left_out_at_every_stage(options):
    model, _ = traced()
    stages = Stages(load(model), options, None)
    assert stages.graph("forward", padded=True).count(ATTENTION) == 0
    assert stages.graph("forward", padded=False).count(ATTENTION) == 0
    assert "fuse_attention" not in [step.name for step in stages.steps("forward", padded=False)]
    with pytest.raises(ModelError, match=r"scaled_dot_product_attention.* fuse_attention was left out"):
        stages.graph("decode", padded=False)


def test_skipping_cleanup_skips_it_at_every_stage():
    stages = Stages(load(traced()[0]), Options(skip=("cleanup",)), None)
    names = [step.name for step in stages.steps("decode", padded=False)]
    assert names == [*NAMES[:-1], "drop_padding", "fuse_attention", "materialize_kv"]


def test_an_unknown_pass_is_refused():
    _, graph = traced()
    with pytest.raises(InputError, match=r"expected names of passes \(.*normalize.*\), found fuse_everything"):
        run(graph, skip=["fuse_everything"])
    with pytest.raises(InputError, match="found unroll"):
        run(graph, ["unroll"])


def break_a_shape(graph: Graph) -> PassResult:
    node = graph.outputs[0]
    node.meta["val"] = node.meta["val"].new_empty(1)
    return PassResult(1)


def test_a_pass_that_breaks_the_graph_is_named():
    _, graph = traced()
    with pytest.raises(VerificationError, match="after break_a_shape: graph forward, node linear"):
        run(graph, [break_a_shape])
    run(graph, [break_a_shape], verify=False)


def test_dumps_are_numbered_and_indexed(tmp_path):
    _, graph = traced()
    run(graph, ["normalize", "fuse_norm"], dump=tmp_path)
    folder = tmp_path
    files = ["00_traced.txt", "01_normalize.txt", "02_fuse_norm.txt", "index.txt"]
    assert sorted(path.name for path in folder.iterdir()) == files
    index = (folder / "index.txt").read_text()
    assert "01_normalize.txt -> 02_fuse_norm.txt" in index
    assert "+5 effc.rms_norm" in index
    assert "effc.rms_norm(" in (folder / "02_fuse_norm.txt").read_text()
    run(graph, ["normalize"], dump=tmp_path)
    assert not (folder / "02_fuse_norm.txt").exists()


def test_a_dump_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"cannot write .* choose a folder that you can write to"):
        run(traced()[1], ["normalize"], dump=tmp_path / "file" / "dump")
