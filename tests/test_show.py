from effc.compiler.show import count_ops, differences, show, show_differences
from effc.passes.normalize import normalize

from .families import traced


def test_a_graph_prints_one_line_a_node_with_sizes_by_letter_and_source_lines():
    _, graph = traced()
    text = str(graph)
    assert text.startswith("graph forward (traced), ")
    assert "input   input_ids: i64[B, S]" in text
    assert 'weight  model_norm_weight: f32[32] = read("model.norm.weight", float32[32])' in text
    assert "f32[B, S, 32] = embedding(model_embed_tokens_weight, input_ids" in text
    assert "# modeling_llama.py:" in text
    assert "# modeling_llama.py:" not in show(graph, source=False)
    names = [node.name for node in graph.nodes if node.op != "output" and not node.name.startswith("sym_size")]
    assert all(f"{name}: " in text for name in names if "assert" not in name)


def test_ops_are_counted_and_compared():
    _, graph = traced()
    after = graph.copy()
    normalize(after)
    assert count_ops(graph)["linear"] == 15
    changes = differences(graph, after)
    assert "linear" not in changes
    assert changes["view"] < 0 < changes["reshape"]
    assert f"{changes['reshape']:+} reshape" in show_differences(changes)
    assert show_differences(differences(graph, graph)) == "nothing"
