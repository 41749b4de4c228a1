"""Memory that two values share: what a rewrite has to know of writes in place, and of what the caller may write to.

    s = sigmoid(x); x.mul_(2); y = x_before * s    -/->  silu(x), which would read x after the write
    y = clone(x); return x, y                      -/->  return x, x

Writes go to inputs alone (`dynamo.py`); what is read of one afterwards is read from the result of the write.
"""

from __future__ import annotations

from torch import fx

from .graph import is_output, is_view, writes


class ReadTooLate(Exception):
    """A new call reads an input behind a write to it."""


def check_unwritten(node: fx.Node) -> None:
    """Raise ReadTooLate where something in front of a new call writes to one of its operands."""
    for operand in node.all_input_nodes:
        base = base_of(operand)
        if any(writes_to(user, base) and user < node for user in base.users):
            raise ReadTooLate(f"{base.name} is written to in between")


def why_separate(root: fx.Node, x: fx.Node) -> str | None:
    """Why `root` cannot be `x`, whose value it has: a write to one would change the other. None if it can."""
    base = base_of(x)
    if any(writes_to(user, base) for user in base.users):
        return f"{base.name}, of which it is a copy, is written to"
    if reaches_caller(root) and (base.op == "placeholder" or writes(base) or reaches_caller(base, root)):
        return f"the caller gets it, and has or gets {base.name} too"
    return None


def writes_to(user: fx.Node, node: fx.Node) -> bool:
    return writes(user) and user.args[0] is node


def base_of(node: fx.Node) -> fx.Node:
    """The node of which a value is a view."""
    while is_view(node):
        node = node.args[0]
    return node


def reaches_caller(node: fx.Node, but: fx.Node | None = None) -> bool:
    """Whether the caller gets the value of a node, or a view of it (other than by `but`)."""
    views = (user for user in node.users if user is not but and is_view(user))
    return is_output(node) or any(reaches_caller(user, but) for user in views)
