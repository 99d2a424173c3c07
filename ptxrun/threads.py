"""Which threads stand where: groups of neighbouring threads at one instruction, split by branches, joined again.

Threads of a warp diverge one by one. Among the groups of a warp the one that is furthest behind (`ptxrun.flow`) runs
first, so that threads that took different ways meet again where the ways do, as ptxas lets them; that is what lets a
collective find its whole warp.
"""
import numpy as np

WARP = 32
EXIT = -1


class Group:
    """Threads [low, high) at the instruction `at`; `waits` says for what, None where they can go on."""

    __slots__ = ("low", "high", "at", "waits")

    def __init__(self, low: int, high: int, at: int, waits: tuple | None = None):
        self.low, self.high, self.at, self.waits = low, high, at, waits

    def __str__(self):
        return f"threads {self.low} to {self.high - 1}"

    @property
    def slice(self) -> slice:
        """The threads, as an index into a row of registers."""
        return slice(self.low, self.high)

    @property
    def warps(self) -> range:
        """The warps that have a thread in this group."""
        return range(self.low // WARP, -(-self.high // WARP))


class Threads:
    """All groups of a machine, in the order of their threads."""

    def __init__(self, count: int, *, joined: bool):
        """`joined`: threads of different warps may stand in one group, which is quicker; else each warp goes alone."""
        self.joined = joined
        step = count if joined else WARP
        self.groups = [Group(low, low + step, 0) for low in range(0, count, step)]

    def split(self, group: Group, destinations) -> None:
        """Send each thread of a group to its own destination; those at EXIT are done."""
        cuts = np.flatnonzero(np.diff(destinations)) + 1
        edges = [0, *cuts.tolist(), len(destinations)]
        parts = [Group(group.low + a, group.low + b, int(destinations[a])) for a, b in zip(edges, edges[1:])]
        at = self.groups.index(group)
        self.groups[at:at + 1] = [part for part in parts if part.at != EXIT]

    def cut(self, group: Group, places) -> list[Group]:
        """Cut a group before the threads `places`; the parts stand and wait like it."""
        edges = [group.low, *places, group.high]
        parts = [Group(a, b, group.at, group.waits) for a, b in zip(edges, edges[1:])]
        at = self.groups.index(group)
        self.groups[at:at + 1] = parts
        return parts

    def join(self):
        """Join neighbours that stand at one instruction and wait for nothing."""
        joined = self.groups[:1]
        for group in self.groups[1:]:
            before = joined[-1]
            meet = before.high == group.low and before.at == group.at and before.waits is None and group.waits is None
            if meet and (self.joined or group.low % WARP):
                before.high = group.high
            else:
                joined.append(group)
        self.groups = joined
