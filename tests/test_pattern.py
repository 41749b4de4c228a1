"""Patterns and rewriting: what binds, what is tried in which order, what a rewrite leaves behind."""

from __future__ import annotations

import pytest
import torch
from effc.compiler.graph import Graph
from effc.compiler.pattern import (
    Bindings,
    Part,
    Pattern,
    any_,
    call_of,
    cast,
    closed,
    const,
    maybe_cast,
    op,
    part,
    tensor,
    weight,
)
from effc.compiler.rewrite import Rule, add_weight, insert, rewrite, source_line
from effc.compiler.weights import Read
from effc.passes.normalize import normalize
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

aten = torch.ops.aten
X, Y = tensor("x"), tensor("y")


def graph(function, normalized: bool = True) -> Graph:
    """The graph of function(w, x, y) with a weight w [8] and inputs x and y [B, S, 8], B and S symbolic."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x, y = (mode.from_tensor(torch.ones(2, 5, 8), symbolic_context=sizes) for _ in "xy")
    module = make_fx(function)(mode.from_tensor(torch.ones(8)), x, y)
    result = Graph(module, weights={"w": Read("w", (8,), torch.float32)})
    for node, name in zip(result.placeholders, ("w", "x", "y")):
        node._rename(name)
        node.target = name
    for node in result.nodes:
        node.meta["stack_trace"] = f'File "/models/tiny.py", line 7, in forward\n    {node.name} = ...\n'
    (output,) = (node for node in result.nodes if node.op == "output")
    output.args = ((output.args[0],),)
    if normalized:
        normalize(result)
    return result


def found(function, pattern: Pattern) -> list[dict]:
    """The bindings of every match at the node that the graph returns, nodes as their names."""
    g = graph(function)
    matches = pattern.match(g.outputs[0], Bindings(g, {}, ()))
    return [{name: getattr(value, "name", value) for name, value in match.names.items()} for match in matches]


def test_a_commutative_op_is_tried_in_both_orders():
    pattern = op(aten.mul.Tensor, tensor("a"), op(aten.exp.default, tensor("b")))
    assert found(lambda w, x, y: x * y.exp(), pattern) == [{"a": "x", "b": "y"}]
    assert found(lambda w, x, y: y.exp() * x, pattern) == [{"a": "x", "b": "y"}]


def test_a_choice_that_fails_later_is_taken_back():
    product = op(aten.mul.Tensor, tensor("a"), tensor("b"))
    pattern = op(aten.sub.Tensor, product, op(aten.neg.default, tensor("b")))
    assert found(lambda w, x, y: x * y - (-y), pattern) == [{"a": "x", "b": "y"}]
    assert found(lambda w, x, y: x * y - (-x), pattern) == [{"a": "y", "b": "x"}]
    assert found(lambda w, x, y: x * y - (-w), pattern) == []


def test_subtraction_keeps_its_order():
    pattern = op(aten.sub.Tensor, op(aten.exp.default, tensor("a")), tensor("b"))
    assert found(lambda w, x, y: x.exp() - y, pattern) == [{"a": "x", "b": "y"}]
    assert found(lambda w, x, y: y - x.exp(), pattern) == []


def test_a_name_that_occurs_twice_stands_for_one_node():
    pattern = op(aten.mul.Tensor, X, op(aten.sigmoid.default, X))
    assert found(lambda w, x, y: x.sigmoid() * x, pattern) == [{"x": "x"}]
    assert found(lambda w, x, y: x.sigmoid() * y, pattern) == []


def test_arguments_that_the_pattern_leaves_out_have_their_defaults():
    assert found(lambda w, x, y: torch.add(x, y, alpha=2), op(aten.add.Tensor, X, Y)) == []
    assert len(found(lambda w, x, y: torch.add(x, y, alpha=2), op(aten.add.Tensor, X, Y, alpha=const("alpha")))) == 2
    gelu = nn.functional.gelu
    assert found(lambda w, x, y: gelu(x, approximate="tanh"), op(aten.gelu.default, X)) == []
    assert len(found(lambda w, x, y: gelu(x), op(aten.gelu.default, X, approximate="none"))) == 1


def test_constants_bind_numbers_and_weights_bind_weights():
    pattern = op(aten.mul.Tensor, op(aten.add.Tensor, X, const("eps")), weight("w"))
    (match,) = found(lambda w, x, y: (x + 1e-5) * w, pattern)
    assert match["eps"] == 1e-5
    assert match["w"] == "w"
    assert found(lambda w, x, y: (x + y) * w, pattern) == []
    assert found(lambda w, x, y: (x + 1e-5) * y, pattern) == []


def test_literals_distinguish_numbers_from_booleans():
    pattern = op(aten.mean.dim, X, any_("dims"), True)
    assert len(found(lambda w, x, y: x.mean(-1, keepdim=True), pattern)) == 1
    assert found(lambda w, x, y: x.mean(-1), pattern) == []


def test_a_cast_changes_the_dtype_and_nothing_else():
    exp = op(aten.exp.default, cast(X))
    assert found(lambda w, x, y: x.double().exp(), exp) == [{"x": "x"}]
    assert found(lambda w, x, y: x.exp(), exp) == []
    maybe = op(aten.exp.default, maybe_cast(X))
    assert found(lambda w, x, y: x.exp(), maybe) == [{"x": "x"}]
    assert found(lambda w, x, y: x.double().exp(), op(aten.exp.default, cast(X, torch.float16))) == []


def test_parts_of_the_last_axis_are_named_however_they_are_cut():
    pattern = op(aten.neg.default, part(X, "part"))
    assert found(lambda w, x, y: -x[..., 2:6], pattern) == [{"x": "x", "part": Part(2, 6, 1, 8)}]
    assert found(lambda w, x, y: -x[..., 1::2], pattern) == [{"x": "x", "part": Part(1, 8, 2, 8)}]
    assert found(lambda w, x, y: -x.chunk(2, -1)[1], pattern) == [{"x": "x", "part": Part(4, 8, 1, 8)}]
    assert found(lambda w, x, y: -x.split([3, 5], -1)[0], pattern) == [{"x": "x", "part": Part(0, 3, 1, 8)}]
    assert found(lambda w, x, y: -x[:, :2], pattern) == []


def test_a_call_of_many_targets_takes_any_arguments():
    pattern = op(aten.neg.default, call_of([aten.add.Tensor, aten.sub.Tensor]).named("sum"))
    assert found(lambda w, x, y: -torch.add(x, y, alpha=2), pattern) == [{"sum": "add"}]
    assert found(lambda w, x, y: -(x * y), pattern) == []


def test_a_name_may_ask_for_more():
    pattern = op(aten.mul.Tensor, X, any_("y", lambda graph, value: getattr(value, "name", "") != "x"))
    assert found(lambda w, x, y: x * y, pattern) == [{"x": "x", "y": "y"}]
    assert found(lambda w, x, y: x * x.neg(), op(aten.mul.Tensor, X, any_("n", lambda *_: False))) == []


def test_alternatives_know_their_targets():
    either = op(aten.exp.default, X) | op(aten.log.default, X)
    assert either.targets == {aten.exp.default, aten.log.default}
    assert (either | X).targets is None


SILU = Rule(
    "silu", op(aten.mul.Tensor, X, op(aten.sigmoid.default, X)), lambda match: match.call(aten.silu.default, match["x"])
)


def test_a_rewrite_keeps_shape_source_line_and_origins():
    g = graph(lambda w, x, y: x * x.sigmoid() + y)
    old = [node.name for node in g.nodes if node.target in (aten.mul.Tensor, aten.sigmoid.default)]
    assert rewrite(g, (SILU,)).matches == 1
    (silu,) = (node for node in g.nodes if node.target is aten.silu.default)
    assert silu.meta["val"].shape == g.placeholder("x").meta["val"].shape
    assert set(silu.meta["origins"]) == set(old)
    assert source_line(silu) == "tiny.py:7: mul = ..."
    assert g.count(aten.sigmoid.default) == 0
    g.fx.lint()


def test_a_declined_match_leaves_the_graph_alone_and_says_why():
    def decline(match):
        match.call(aten.silu.default, match["x"])
        return match.decline("only for the test")

    g = graph(lambda w, x, y: x * x.sigmoid())
    before = str(g.fx)
    result = rewrite(g, (Rule("silu", SILU.pattern, decline),))
    assert str(g.fx) == before
    assert result.matches == 0
    (miss,) = result.misses
    assert (miss.rule, miss.reason) == ("silu", "only for the test")
    assert miss.source == "tiny.py:7: mul = ..."


def left_alone(function, pattern: Pattern) -> str | None:
    """Why a rule with this pattern declines the function's graph; None if it applies."""
    g = graph(function)
    result = rewrite(g, (Rule("rule", pattern, lambda match: match.call(aten.silu.default, match["x"])),))
    assert result.matches + len(result.misses) == 1
    return None if result.matches else result.misses[0].reason


EXP = op(aten.exp.default, X)


def test_the_match_is_the_only_user():
    pattern = op(aten.neg.default, EXP.only_user())
    assert left_alone(lambda w, x, y: -x.exp(), pattern) is None
    assert left_alone(lambda w, x, y: -x.exp() * x.exp(), pattern) == "exp is used elsewhere too"
    assert left_alone(lambda w, x, y: -x.exp() * x.exp(), op(aten.neg.default, EXP)) is None


def test_users_within_the_match_are_counted_once_it_is_whole():
    pattern = op(aten.mul.Tensor, op(aten.neg.default, EXP.only_user()), op(aten.exp.default, X))
    assert left_alone(lambda w, x, y: -x.exp() * x.exp(), pattern) is None
    assert left_alone(lambda w, x, y: -x.exp() * x.exp() + x.exp(), pattern) == "exp is used elsewhere too"


def test_a_weight_may_have_to_be_of_one_use():
    pattern = op(aten.mul.Tensor, X, weight("w").only_user())
    assert left_alone(lambda w, x, y: x * w, pattern) is None
    assert left_alone(lambda w, x, y: x * w + w.exp(), pattern) == "w is used elsewhere too"


def test_what_is_closed_has_users_within_besides_its_root_and_what_may_be_shared():
    inner = op(aten.neg.default, EXP.named("inner"))
    pattern = op(aten.sigmoid.default, inner)
    assert left_alone(lambda w, x, y: x.exp().neg().sigmoid(), closed(pattern)) is None
    both = lambda w, x, y: x.exp().neg().sigmoid() + x.exp()  # noqa: E731
    assert left_alone(both, closed(pattern)) == "exp is used elsewhere too"
    assert left_alone(both, closed(pattern, "inner")) is None
    root = lambda w, x, y: x.exp().neg().sigmoid() * x.exp().neg().sigmoid().neg()  # noqa: E731
    assert left_alone(root, closed(pattern)) is None


def test_nothing_is_read_behind_a_write_to_it():
    def written(w, x, y):
        a, b = x.neg(), x.exp()
        x.mul_(2)
        return (a - b) * x

    difference = op(aten.sub.Tensor, op(aten.neg.default, X), EXP)
    assert left_alone(lambda w, x, y: -x - x.exp(), difference) is None
    assert left_alone(written, difference) == "x is written to in between"


def copied(x: torch.Tensor) -> torch.Tensor:
    return x + 0


COPY = Rule("copy", op(aten.add.Tensor, X, 0), lambda match: match["x"])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda w, x, y: copied(x.exp()) * y, None),
        (lambda w, x, y: copied(x) * y, None),
        (lambda w, x, y: copied(x.exp()), None),
        (lambda w, x, y: copied(x), "the caller gets it, and has or gets x too"),
        (lambda w, x, y: copied(x[:, 0]), "the caller gets it, and has or gets x too"),
        (lambda w, x, y: copied(x)[:, 0], "the caller gets it, and has or gets x too"),
        (lambda w, x, y: copied(x) * x.mul_(2), "x, of which it is a copy, is written to"),
    ],
)
def test_a_copy_stays_where_a_write_to_one_would_change_the_other(function, reason):
    g = graph(function, normalized=False)
    result = rewrite(g, (COPY,))
    assert result.matches == (reason is None)
    assert [miss.reason for miss in result.misses] == [reason] * (reason is not None)


def test_the_first_rule_wins_over_one_that_matches_a_part_of_it():
    def drop(match):
        return match["x"]

    inner = Rule("inner", op(aten.sigmoid.default, X), drop)
    g = graph(lambda w, x, y: x * x.sigmoid())
    assert rewrite(g, (SILU, inner)).matches == 1
    assert g.count(aten.silu.default) == 1


def test_rules_reach_a_fixed_point():
    twice = Rule("neg neg", op(aten.neg.default, op(aten.neg.default, X)), lambda match: match["x"])
    g = graph(lambda w, x, y: x.neg().neg().neg().neg().neg())
    assert rewrite(g, (twice,)).matches == 2
    assert g.count(aten.neg.default) == 1


def test_a_shared_part_stays_for_its_other_user():
    g = graph(lambda w, x, y: x * x.sigmoid() + x.sigmoid())
    rewrite(g, (SILU,))
    assert g.count(aten.sigmoid.default) == 1
    assert g.count(aten.silu.default) == 1


def test_a_weight_that_nothing_reads_goes_with_its_recipe():
    g = graph(lambda w, x, y: (x * w).exp())
    rewrite(g, (Rule("drop", op(aten.mul.Tensor, X, weight("w")), lambda match: match["x"]),))
    assert g.weights == {}
    assert g.inputs == ["x", "y"]


def test_equal_recipes_share_a_placeholder():
    g = graph(lambda w, x, y: x * w)
    recipe = Read("other", (8,), torch.float32)
    first = add_weight(g, "other", recipe)
    assert add_weight(g, "again", Read("other", (8,), torch.float32)) is first
    assert g.weights["other"] == recipe
    assert first.meta["val"].shape == (8,)


@pytest.mark.parametrize("dialect", ["traced", "stateful"])
def test_an_effc_op_lifts_a_traced_graph_to_the_fused_dialect(dialect):
    g = graph(lambda w, x, y: x * w)
    g.dialect = dialect
    insert(g, g.outputs[0], torch.ops.effc.rms_norm.default, g.placeholder("x"), None, 1e-6)
    assert g.dialect == {"traced": "fused", "stateful": "stateful"}[dialect]
