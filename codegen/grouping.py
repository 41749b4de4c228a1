"""Which units become one kernel: near-linear, and free of cycles by construction.

    exp [B, S];  sum over the same rows;  cos of the same input   -->  one kernel with the results that others read

Groups stand in a sequence. A unit, taken in the graph's order, may join any group over its own domain that stands
behind everything it reads; the group that makes what it reads is one of them if each value is needed only at the
index at which it is made. Of those that are estimated to pay, it joins the one that saves the most memory traffic.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from ..compiler.graph import writes
from .domain import Domain, Misaligned, NoKernel
from .fusion_cost import Decision, Work, weigh
from .probe import work_of
from .scope import Scope
from .target import Target
from .units import Plan, Unit, is_empty

NEAREST = 8
"""How many groups over its domain a unit looks at, the last ones first."""


@dataclass
class Group:
    """Units that share a kernel; `position` is its place in the sequence."""

    position: int
    units: list[Unit]
    work: Work | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        return [unit.node for unit in self.units]


@dataclass
class Grouping:
    """The groups so far, and what was decided."""

    plan: Plan
    target: Target
    groups: list[Group] = field(default_factory=list)
    group_of: dict[fx.Node, Group] = field(default_factory=dict)
    over: dict[Domain, list[Group]] = field(default_factory=lambda: defaultdict(list))
    changed_at: dict[fx.Node, int] = field(default_factory=dict)  # input -> position of the last write to it
    decisions: list[Decision] = field(default_factory=list)

    def place(self, unit: Unit) -> None:
        """Put a unit into the group that saves most, or into a new one."""
        sources = self.plan.sources(unit.node)
        read = [self.group_of[source] for source in sources if source in self.group_of]
        floor = max([-1, *(group.position for group in read), *(self.changed_at.get(s, -2) + 1 for s in sources)])
        best: tuple[int, Group, Decision] | None = None
        work = self.work(unit) if unit.stores and not is_empty(unit.node) else None
        for group in self.candidates(unit, floor) if work is not None else ():
            decision = self.consider(unit, work, group, makes=group in read)
            if decision.fused and (best is None or decision.bytes_saved > best[0]):
                best = (decision.bytes_saved, group, decision)
            elif not decision.fused and (decision.bytes_saved or group in read):
                self.decisions.append(decision)
        if best is None:
            self.open(unit, work)
            self.explain_other_domains(unit, read)
            return
        self.decisions.append(best[2])
        self.join(unit, best[1])

    def work(self, unit: Unit, made: Iterable[fx.Node] = ()) -> Work | None:
        try:
            return work_of(unit.node, unit.domain, self.plan, made)
        except Misaligned:
            raise
        except NoKernel:  # said when it is lowered
            return None

    def candidates(self, unit: Unit, floor: int) -> list[Group]:
        """Groups over the same domain that stand behind all that a unit reads, or make what it reads last."""
        return [group for group in self.over[unit.domain][-NEAREST:][::-1] if group.position >= floor]

    def consider(self, unit: Unit, work: Work, group: Group, makes: bool) -> Decision:
        names = (unit.node.name, ", ".join(node.name for node in group.nodes[-3:]))
        if makes:
            try:
                self.work(unit, group.nodes)
            except Misaligned as problem:
                return Decision(*names, False, f"at other indices: {problem}", shared(work, group.work))
        unstored = frozenset(self.unread_outside([*group.units, unit]))
        fused, reason, saved = weigh(group.work, work, unstored, self.target)
        return Decision(*names, fused, reason, saved)

    def unread_outside(self, units: list[Unit]) -> list[fx.Node]:
        """The values that no unit but these reads: a kernel that makes them need not store them."""
        inside = {unit.node for unit in units}
        return [unit.node for unit in units if unit.stores and self.plan.readers_of[unit.node] <= inside]

    def open(self, unit: Unit, work: Work | None) -> None:
        group = Group(len(self.groups), [unit], work)
        self.groups.append(group)
        self.group_of[unit.node] = group
        if work is not None:
            self.over[unit.domain].append(group)
        if writes(unit.node):
            self.changed_at[Scope.base(unit.node.args[0])] = group.position

    def join(self, unit: Unit, group: Group) -> None:
        unstored = frozenset(self.unread_outside([*group.units, unit]))
        group.work = group.work.joined(self.work(unit, group.nodes), unstored)
        group.units.append(unit)
        self.group_of[unit.node] = group

    def explain_other_domains(self, unit: Unit, read: list[Group]) -> None:
        for group in read:
            if unit.stores and group.units[0].stores and group.units[0].domain != unit.domain:
                reason = f"one runs over {sizes_text(group.units[0].domain)}, the other over {sizes_text(unit.domain)}"
                self.decisions.append(Decision(unit.node.name, group.nodes[-1].name, False, reason))


def sizes_text(domain: Domain) -> str:
    return f"[{', '.join(map(str, (*domain.rows, domain.cols)))}]"


def shared(first: Work, second: Work) -> int:
    """Bytes that both touch."""
    return sum(size for node, size in first.reads.items() if node in second.reads or node in second.writes)


def group_units(plan: Plan, target: Target) -> tuple[list[Unit], list[Decision]]:
    """The units after merging, in topological order, and why each was merged or not."""
    grouping = Grouping(plan, target)
    for unit in plan.units:
        grouping.place(unit)
    merged = []
    for group in grouping.groups:
        first = group.units[0]
        if first.stores:
            unread = set(grouping.unread_outside(group.units))
            first.stores = group.nodes
            first.unstored = {node for node in group.nodes if node in unread}
        merged.append(first)
    return merged, [*plan.decisions, *grouping.decisions]
