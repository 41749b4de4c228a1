"""A pass of your own among those of effc, checked against the graph as it was.

    relu(relu(x))  -->  relu(x)

python examples/add_a_pass.py
"""

import effc
import torch
from effc.compiler import interpret
from effc.compiler.graph import Graph
from effc.compiler.pattern import op, tensor
from effc.compiler.rewrite import Match, PassResult, Rule, rewrite
from effc.compiler.sources import ModuleSource
from torch import Tensor, fx, nn

aten = torch.ops.aten

INNER = op(aten.relu.default, tensor("x"))
RELU_TWICE = op(aten.relu.default, INNER.named("inner"))


def to_inner(match: Match) -> fx.Node | None:
    """The rewrite: what stands for the outer ReLU from now on. `match.decline("why")` would leave it alone."""
    return match["inner"]


RULES = (Rule("relu twice", RELU_TWICE, to_inner),)


def fuse_relu(graph: Graph) -> PassResult:
    return rewrite(graph, RULES)


class Model(nn.Module):
    """A language model that is careless with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).relu()
        return self.head(x.relu())


def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    graph = effc.trace(model)
    rewritten, report = effc.passes.run(graph, ["normalize", fuse_relu, "fuse_linear", "cleanup"])
    print(report)
    print(rewritten)

    inputs = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    (before,), (after,) = (interpret.run(each, inputs, ModuleSource(model)) for each in (graph, rewritten))
    print(f"the same logits: {torch.equal(before, after)}")


if __name__ == "__main__":
    main()
