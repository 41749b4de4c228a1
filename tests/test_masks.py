"""What masks are read as: each kind, what must not be read as it, and that a reading is checked."""

from __future__ import annotations

import pytest
import sympy
import torch
from effc.compiler import masks
from effc.compiler.graph import is_tensor, sizes
from effc.compiler.mask_form import MaskForm
from effc.compiler.masks import Masks
from torch import Tensor

from .index_graphs import LOWEST, graph_of, numbers

HEADS = 4
CAUSAL, PADDING = {"causal": True}, {"key_mask": "a"}
SELF = (("a", 0), HEADS, ("a", 1), ("a", 1))
SLOPES = 0.5 ** torch.arange(1.0, 1 + HEADS)


def read(function, *inputs: Tensor, scores: tuple = SELF, symbolic: bool = True, **buffers: Tensor) -> dict | str:
    """What the masks that a function builds are read as together, for scores of sizes (input, dim) or numbers.

    The fields that a form sets, nodes by name; or why a mask stays an operand.
    """
    graph = graph_of(function, *inputs, symbolic=symbolic, **buffers)
    shape = tuple(
        sizes(graph.placeholder(size[0]))[size[1]] if isinstance(size, tuple) else sympy.Integer(size)
        for size in scores
    )
    form, rest = Masks(graph).read_together(graph.outputs, shape)
    if rest:
        return "; ".join(f"{reason.node.name}: {reason.reason}" for reason in rest.values())
    found = {name: str(value) if is_tensor(value) else value for name, value in vars(form).items() if value}
    return found | ({"tables": [str(table) for table in form.tables]} if form.tables else {})


def positions(a: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(a.shape[1])
    return place[None, None, None, :], place[None, None, :, None]


def causal(a: Tensor) -> Tensor:
    k, q = positions(a)
    return k <= q


def padding(a: Tensor) -> Tensor:
    return a.bool()[:, None, None, :]


def window(a: Tensor, width: int) -> Tensor:
    k, q = positions(a)
    return k > q - width


def alibi(a: Tensor, slopes: Tensor) -> Tensor:
    k, q = positions(a)
    return slopes[None, :, None, None] * (k - q)


def hidden(visible: Tensor) -> Tensor:
    return torch.where(visible, 0.0, LOWEST)


def running_count(a: Tensor) -> Tensor:
    return ((a.cumsum(-1) - 1) * a)[:, None, None, :]


def documents(a: Tensor) -> Tensor:
    start = a[:, :1] - 1
    document = a.diff(prepend=start, dim=-1).ne(1).cumsum(-1)
    return document[:, None, :, None] == document[:, None, None, :]


FORMS = {
    "causal": (causal, CAUSAL),
    "causal, the other way": (lambda a: ~(positions(a)[0] > positions(a)[1]), CAUSAL),
    "padding": (lambda a: a[:, None, None, :] != 0, PADDING),
    "causal and padding": (lambda a: causal(a) & padding(a), CAUSAL | PADDING),
    "added": (lambda a: hidden(causal(a) & padding(a)), CAUSAL | PADDING),
    "two added": (lambda a: hidden(causal(a)) + (1.0 - a[:, None, None, :]) * LOWEST, CAUSAL | PADDING),
    "two added and clamped": (
        lambda a: (hidden(causal(a)) + (1.0 - a[:, None, None, :]) * LOWEST).clamp(min=LOWEST),
        CAUSAL | PADDING,
    ),
    "minus infinity": (lambda a: torch.zeros(()).masked_fill(~causal(a), float("-inf")), CAUSAL),
    "a large number": (lambda a: (1.0 - causal(a).float()) * -1e4, CAUSAL),
    "everything": (lambda a: torch.ones(a.shape[1], a.shape[1], dtype=torch.bool), {}),
    "everything, decided by the range": (lambda a: positions(a)[0] >= 0, {}),
    "a window": (lambda a: window(a, 3), {"window": 3}),
    "causal and a window": (lambda a: causal(a) & (positions(a)[1] - positions(a)[0] <= 3), CAUSAL | {"window": 4}),
    "two windows": (lambda a: window(a, 3) & window(a, 5) & causal(a), CAUSAL | {"window": 3}),
    "a window of one": (lambda a: causal(a) & (positions(a)[0] >= positions(a)[1]), CAUSAL | {"window": 1}),
    "a long window": (lambda a: causal(a) & window(a, 300), CAUSAL | {"window": 300}),
    "prefix": (lambda a: causal(a) | (positions(a)[0] < 2), {"visible": "(k < 2) | (k <= q)"}),
    "prefix and padding": (
        lambda a: (causal(a) | (positions(a)[0] < 2)) & padding(a),
        PADDING | {"visible": "(k < 2) | (k <= q)"},
    ),
    "strictly before": (lambda a: positions(a)[0] < positions(a)[1], {"visible": "k < q"}),
    "one key ahead": (lambda a: positions(a)[0] <= positions(a)[1] + 1, {"visible": "k <= q + 1"}),
    "at least the query": (lambda a: positions(a)[0] > positions(a)[1], {"visible": "q < k"}),
    "chunks": (
        lambda a: causal(a) & (positions(a)[0] // 4 == positions(a)[1] // 4),
        CAUSAL | {"visible": "k // 4 == q // 4"},
    ),
    "documents": (
        lambda a: causal(a) & documents(a),
        CAUSAL | {"visible": "t0[b, k] == t0[b, q]", "tables": ["cumsum"]},
    ),
    "padding of queries": (
        lambda a: causal(a) & (a[:, None, :, None] != 0),
        CAUSAL | {"visible": "t0[b, q] != 0", "tables": ["a"]},
    ),
    "another limit": (lambda a: a[:, None, None, :] > 1, {"visible": "t0[b, k] >= 2", "tables": ["a"]}),
    "a soft mask": (lambda a: torch.where(causal(a), 0.0, -1.0), {"bias": "where(k <= q, 0, -1)"}),
    "a slope": (lambda a: torch.where(causal(a), positions(a)[0] * 0.5, LOWEST), CAUSAL | {"bias": "k * 0.5"}),
    "a bias of the query": (lambda a: torch.where(causal(a), positions(a)[1] * 0.5, LOWEST), CAUSAL),
    "a bias in half precision": (
        lambda a: positions(a)[0].to(torch.bfloat16) * 0.3,
        {"bias": "bfloat16(bfloat16(k) * 0.3)"},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_masks_are_read_as(name):
    function, expected = FORMS[name]
    assert read(function, numbers(2, 5)) == expected


@pytest.mark.parametrize("name", ["causal", "causal and padding", "a window", "prefix", "chunks", "two added"])
def test_masks_of_fixed_sizes(name):
    function, expected = FORMS[name]
    assert read(function, numbers(2, 5), symbolic=False) == expected


REFUSED = {
    "data for each query and key": (
        lambda a: (a.float() @ a.float().mT)[None, None].sin() > 0,
        "aten.sin.default is not index arithmetic",
    ),
    "nothing visible": (lambda a: positions(a)[0] < 0, "it hides every key"),
    "a length": (lambda a: positions(a)[0] < a.shape[1] - 1, "it depends on the size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_stay_operands_with_a_reason(name):
    function, reason = REFUSED[name]
    assert reason in read(function, numbers(2, 5))


def test_one_query_behind_all_keys_sees_them_all():
    def decode(a):
        past = a.shape[1] - 1
        return torch.arange(a.shape[1])[None, None, None, :] <= torch.arange(past, past + 1)[None, None, :, None]

    assert read(decode, numbers(2, 7), scores=(("a", 0), HEADS, 1, ("a", 1))) == {}


def test_positions_behind_a_cache_are_a_table():
    """Queries that stand behind `past` cached tokens, which is a size and no number: a [B, T], b [B, S]."""

    def chunk(a, b):
        past = a.shape[1] - b.shape[1]
        return torch.arange(a.shape[1])[None, None, None, :] <= torch.arange(past, a.shape[1])[None, None, :, None]

    scores = (("a", 0), HEADS, ("b", 1), ("a", 1))
    found = read(chunk, numbers(2, 7), numbers(2, 3), scores=scores)
    assert found == {"visible": "k <= t0[q]", "tables": ["arange_1"]}


def test_positions_given_as_an_input_are_a_table():
    """generate with a static cache: cache_position [S] against all slots."""
    place = torch.arange(3)
    scores = (2, HEADS, ("b", 0), ("a", 1))
    found = read(lambda a, b: torch.arange(a.shape[1]) <= b[:, None], numbers(2, 7), place, scores=scores)
    assert found == {"visible": "k <= t0[q]", "tables": ["b"]}


def test_a_position_in_a_tensor_of_no_dimension_stays_an_operand():
    scores = (2, HEADS, 1, ("a", 1))
    found = read(lambda a, b: torch.arange(a.shape[1])[None] <= b, numbers(2, 7), torch.tensor(3), scores=scores)
    assert "b() has no table" in found


def test_slopes_beside_inputs_that_are_sizes():
    """Under torch.compile the last input may be a size, which has no device."""

    def computed(a):
        return alibi(a, torch.pow(torch.full((), 0.5), torch.arange(1, 1 + HEADS)))

    graph = graph_of(computed, numbers(2, 5))
    mask, size = graph.outputs[0], next(node for node in graph.nodes if str(node.target) == "aten.sym_size.int")
    with graph.fx.inserting_after(graph.placeholders[-1]):
        graph.fx.placeholder("s").meta["val"] = size.meta["val"]
    batch, length = sizes(graph.placeholder("a"))
    assert Masks(graph).read(mask, (batch, sympy.Integer(HEADS), length, length)).bias == "t0[h] * k"


# --- biases ----------------------------------------------------------------------------------------------------------


def test_alibi_is_a_table_of_slopes():
    tables = {"tables": ["slopes"]}
    assert read(alibi, numbers(2, 5), slopes=SLOPES) == {"bias": "t0[h] * k"} | tables
    assert read(lambda a, s: hidden(causal(a)) - alibi(a, s), numbers(2, 5), slopes=SLOPES) == CAUSAL | tables | {
        "bias": "-t0[h] * k"
    }
    both_ways = read(
        lambda a, s: s[:, None, None] * (positions(a)[0] - positions(a)[1]).abs(), numbers(2, 5), slopes=SLOPES
    )
    assert both_ways == {"bias": "t0[h] * maximum(k - q, q - k)"} | tables


def test_slopes_that_are_computed_from_constants_are_folded():
    def computed(a):
        slopes = torch.pow(torch.full((), 0.5), torch.arange(1, 1 + HEADS))
        return alibi(a, slopes)

    found = read(computed, numbers(2, 5))
    assert (found["bias"], found["tables"]) == ("t0[h] * k", ["pow_1_table"])


def test_alibi_by_a_running_count_of_the_mask():
    """BLOOM: [B * H, 1, T] beside a mask; what is hidden does not tell the count of what is visible."""

    def bloom(a, slopes):
        added = slopes[None, :, None, None] * running_count(a)
        return added.reshape(-1, 1, a.shape[1]), hidden(causal(a) & padding(a))

    def falcon(a, slopes):
        added = slopes.to(torch.bfloat16)[None, :, None, None] * running_count(a)
        return (added / 2.0).masked_fill(~(causal(a) & padding(a)), -3e38)

    def both(function):
        return read(lambda a, s: function(a, s), numbers(2, 5), slopes=SLOPES)

    assert both(bloom) == CAUSAL | PADDING | {"bias": "t0[b, k] * t1[h]", "tables": ["cumsum", "slopes"]}
    rounded = "bfloat16(bfloat16(bfloat16(t0[b, k] - 1) * bfloat16(t1[h])) * 0.5)"
    assert both(falcon) == CAUSAL | PADDING | {"bias": rounded, "tables": ["cumsum", "slopes"]}


def test_a_bias_that_depends_on_the_query_alone_is_dropped():
    scores = (("b", 0), HEADS, ("b", 1), ("b", 1))
    assert read(lambda a, b: b.sin()[:, None, :, None], numbers(1), torch.randn(2, 5), scores=scores) == {}
    found = read(lambda a, b: b.sin()[:, None, None, :], numbers(1), torch.randn(2, 5), scores=scores)
    assert found == {"bias": "t0[b, k]", "tables": ["sin"]}


def test_a_second_padding_input_is_a_condition():
    found = read(lambda a, b: padding(a) & padding(b), numbers(2, 5), numbers(2, 5), scores=SELF)
    assert found == {"key_mask": "a", "visible": "t0[b, k] != 0", "tables": ["b"]}


def test_tables_that_are_known_are_written_out():
    """What was read of a padded batch, where the attention mask has become all ones."""

    def ones(a, slopes):
        return torch.ones_like(a).cumsum(-1), torch.ones_like(a), slopes.sin()

    graph = graph_of(ones, numbers(2, 5), slopes=SLOPES)
    count, mask, slopes = graph.outputs
    batch, length = sizes(graph.placeholder("a"))
    shape = (batch, sympy.Integer(HEADS), length, length)
    form = MaskForm(
        True, 3, mask, "(t0[b, k] == t0[b, q]) & (t0[b, k] >= 1)", "t1[b, k] * t2[h]", (mask, count, slopes)
    )
    assert Masks(graph).reread(form, shape) == MaskForm(True, 3, bias="t0[h] * k", tables=(slopes,))
    kept = MaskForm(key_mask=graph.placeholder("a"), visible="t0[b, k] != 0", tables=(count,))
    assert Masks(graph).reread(kept, shape) == MaskForm(key_mask=graph.placeholder("a"))
    unknown = MaskForm(bias="t0[h] * k", tables=(slopes,))
    assert Masks(graph).reread(unknown, shape) == unknown


# --- buffers ---------------------------------------------------------------------------------------------------------

N = 9
TRIL = torch.ones(N, N).tril()
BAND = TRIL.bool() ^ TRIL.bool().tril(-3)


def sliced(a: Tensor, buffer: Tensor) -> Tensor:
    return buffer[..., : a.shape[1], : a.shape[1]]


def alibi_buffer(sign: float = 1.0) -> Tensor:
    place = torch.arange(N, dtype=torch.float32)
    return sign * SLOPES[:, None, None] * (place[None, :] - place[:, None]) + torch.full((N, N), -torch.inf).triu(1)


BUFFERS = {
    "a triangle": (TRIL.bool(), sliced, CAUSAL),
    "a triangle of rank 4": (TRIL.bool()[None, None], sliced, CAUSAL),
    "a triangle of numbers": (TRIL, lambda a, x: (1 - sliced(a, x)) * -1e4, CAUSAL),
    "minus infinity above": (torch.full((N, N), -torch.inf).triu(1), sliced, CAUSAL),
    "a band": (BAND, sliced, CAUSAL | {"window": 3}),
    "a band beside the diagonal": (TRIL.bool().triu(-2).tril(-1), sliced, {"window": 3, "visible": "k < q"}),
    "alibi": (alibi_buffer(), sliced, CAUSAL | {"bias": "t0[h] * k", "tables": ["x_slopes"]}),
    "alibi and a mask": (
        alibi_buffer(),
        lambda a, x: sliced(a, x) + hidden(padding(a)),
        CAUSAL | PADDING | {"bias": "t0[h] * k", "tables": ["x_slopes"]},
    ),
    "alibi in rows": (SLOPES[:, None, None] * torch.arange(N), lambda a, x: x[..., : a.shape[1]],
                      {"bias": "t0[h, 0, k]", "tables": ["x"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_told_by_their_values(name):
    buffer, function, expected = BUFFERS[name]
    assert read(function, numbers(2, 5), x=buffer) == expected


def changed(tensor: Tensor, *place: int) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = ~tensor[place] if tensor.dtype == torch.bool else tensor[place] + 1
    return tensor


@pytest.mark.parametrize("buffer", [changed(TRIL.bool(), 3, 1), changed(alibi_buffer(), 1, 3, 2)])
def test_buffers_that_differ_in_one_element_stay_operands(buffer):
    assert "it has an element for each query and key" in read(sliced, numbers(2, 5), x=buffer)


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "function"),
    [
        (MaskForm(causal=True), lambda a: positions(a)[0] >= positions(a)[1]),
        (MaskForm(causal=True), lambda a: causal(a) & window(a, 300)),
        (MaskForm(causal=True, window=301), lambda a: causal(a) & window(a, 300)),
        (MaskForm(causal=True, window=4), lambda a: causal(a) & window(a, 3)),
        (MaskForm(visible="k < q"), causal),
        (MaskForm(causal=True, bias="k * 0.5"), lambda a: hidden(causal(a)) + positions(a)[0] * -0.5),
        (MaskForm(causal=True), lambda a: hidden(causal(a)) + positions(a)[0] * 0.5),
    ],
)
def test_a_reading_that_the_graph_contradicts_is_not_used(monkeypatch, wrong, function):
    monkeypatch.setattr(masks, "infer_masks", lambda inference, nodes, scores: wrong)
    assert "the graph computes another mask" in read(function, numbers(2, 5))


def test_masks_that_are_computed_alike_are_read_once(monkeypatch):
    """Layers that compute their masks themselves, from buffers of their own."""
    layers = {f"x{layer}": TRIL.bool() for layer in range(3)} | {"other": BAND}
    graph = graph_of(lambda a, *buffers: tuple(sliced(a, x) & padding(a) for x in buffers), numbers(2, 5), **layers)
    batch, length = sizes(graph.placeholder("a"))
    found, shape = Masks(graph), (batch, sympy.Integer(HEADS), length, length)
    forms = [found.read(mask, shape) for mask in graph.outputs]
    assert forms[0] is forms[1] is forms[2]
    assert forms[3].window == 3
    assert len(found.known) == 2
