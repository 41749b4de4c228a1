"""An op and a kernel of your own: what a pass finds becomes the op, and the op becomes one launch.

    x / max(norm(x), eps)  -->  l2_normalize(x, eps)

An op is a row of the vocabulary (schema, shape, cost, and a reference that the interpreter runs), a pass that finds
it, a kernel as a Triton template with a function that lays out the launch, and, for a KV cache, what it does to tokens.

python examples/add_an_op.py
"""

import effc
import sympy
import torch
from effc.codegen.kernel import Layout
from effc.codegen.scope import Scope
from effc.codegen.table import TEMPLATES
from effc.codegen.template import Arguments, power_of_two
from effc.compiler.graph import Graph, sizes
from effc.compiler.pattern import any_, closed, const, op, tensor
from effc.compiler.rewrite import Match, PassResult, Rule, rewrite
from effc.compiler.vocabulary import define, numel, streamed
from effc.passes.per_token import CHECKS, rms_norm
from torch import Tensor, fx, nn

aten = torch.ops.aten

# --- the vocabulary ---


@define(
    "l2_normalize(Tensor x, float eps) -> Tensor",
    shape=lambda x, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
    cost=lambda node: streamed(node, 3 * numel(node)),
)
def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x [..., K] -> [..., K], each row divided by its length, or by eps if it is shorter."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


# --- the pass ---

LENGTH = op(aten.linalg_vector_norm.default, tensor("x"), 2, any_("dims"), True)
DIVISOR = op(aten.clamp_min.default, LENGTH, const("eps"))
SPREAD = op(aten.expand_as.default, DIVISOR, tensor("x")) | op(aten.expand.default, DIVISOR, any_("sizes")) | DIVISOR
NORMALIZED = closed(op(aten.div.Tensor, tensor("x"), SPREAD))  # whose length nothing else uses


def to_l2_normalize(match: Match) -> fx.Node | None:
    if match["dims"] not in ([-1], [match.root.meta["val"].ndim - 1]):
        return match.decline(f"it normalizes along {match['dims']}, not along the last axis")
    return match.call(torch.ops.effc.l2_normalize.default, match["x"], match["eps"])


def fuse_l2_normalize(graph: Graph) -> PassResult:
    return rewrite(graph, (Rule("l2_normalize", NORMALIZED, to_l2_normalize),))


# --- the kernel ---

KERNEL = """
@triton.jit
def {{ name }}({{ header }}):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)

    x = tl.load(x_ptr + row * {{ k }} + col, mask=col < {{ k }}, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, axis=0))
    y = x / tl.maximum(length, {{ eps }})

    tl.store(out_ptr + row * {{ k }} + col, y, mask=col < {{ k }})
"""


def lower(scope: Scope, node: fx.Node) -> None:
    """One program for each row."""
    x, eps = node.args
    source: Layout = scope.contiguous(x)
    arguments = Arguments()
    arguments.pointer("x_ptr", source)
    arguments.pointer("out_ptr", scope.result(node))
    k = int(sizes(x)[-1])
    arguments.constant("BLOCK", power_of_two(k))
    rows = sympy.prod(sizes(x)[:-1])
    scope.add(arguments.launch("l2_normalize", KERNEL, (rows, 1, 1), (node.name,), k=k, eps=eps))


TEMPLATES[torch.ops.effc.l2_normalize.default] = lower
CHECKS[torch.ops.effc.l2_normalize.default] = rms_norm  # as with that one, a row depends on no other


class Model(nn.Module):
    """Scores of a token against all others, by the angle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 24)
        self.head = nn.Linear(24, 64, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(nn.functional.normalize(self.embedding(input_ids), dim=-1))


def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    passes = ["normalize", fuse_l2_normalize, "fuse_linear", "cleanup"]
    program = effc.compile(model, passes=passes)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    print(program.explain())
    with torch.no_grad():
        print(f"largest difference from eager: {(program(ids) - model(ids)).abs().max():.1e}")


if __name__ == "__main__":
    main()
