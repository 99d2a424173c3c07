"""cp.async: copies from global to shared memory that are done some time between their issue and the wait for them."""
import numpy as np

from ptxrun.instructions.memory import read_global
from ptxrun.numbers import UNSIGNED


class Copies:
    """The copies that threads have issued and not waited for."""

    def __init__(self, threads: int):
        self.groups = np.zeros(threads, np.int64)  # closed so far, by thread
        self.pending = []                          # (threads, their group, places, part, values)

    def finish(self, shared, at, still_pending: int):
        """Do the copies of threads `at`, all but those of the last `still_pending` groups."""
        kept = []
        for threads, group, places, part, values in self.pending:
            due = (threads >= at.start) & (threads < at.stop) & (group < self.groups[threads] - still_pending)
            if due.any():
                shared.store(places[due], part, [value[due] for value in values])
            if not due.all():
                kept.append((threads[~due], group[~due], places[~due], part, [value[~due] for value in values]))
        self.pending = kept


def copy(o):
    """cp.async, its commit_group, wait_group and wait_all."""
    if o.parts[2] == "commit_group":
        return _close(o)
    if o.parts[2] in ("wait_group", "wait_all"):
        return _wait(o)
    return _issue(o)


def _issue(o):
    """Copy `size` bytes, of which the last operand may say how many are read; the others become zeros."""
    target, source, size = o.address(0), o.address(1), o.constant(2)
    sizes = o.texts[3:-1] if o.has("L2::cache_hint") else o.texts[3:]
    read_size = o.read_text(sizes[0], "u32") if sizes else lambda at: np.uint32(size)
    part = min(size, 8)
    machine = o.machine

    def run(at):
        threads = o.lanes(at)
        targets, sources, taken = o.selected(at, target, source, read_size)
        if not len(threads):
            return
        places = machine.shared.places(targets, machine.shared.base[threads], size, "cp.async")
        values = _read(machine, threads, sources, taken, size, part)
        if machine.races:
            machine.races.access(threads, places, size, write=True, copy=True)
        if machine.traffic:
            machine.traffic.of_shared(threads, targets, size)
        if machine.schedule.at_once(machine.coin):
            machine.shared.store(places, part, values)
        else:
            machine.copies.pending.append((threads, machine.copies.groups[threads].copy(), places, part, values))
    return run


def _read(machine, threads, sources, taken, size: int, part: int):
    """What a copy reads, in `part` bytes each; nothing behind what it takes is touched."""
    count = size // part
    values = [np.zeros(len(sources), UNSIGNED[part]) for _ in range(count)]
    whole = taken == size
    if whole.any():
        found = read_global(machine, threads[whole], sources[whole], part, count, "cp.async")
        for value, word in zip(values, found):
            value[whole] = word
    for i in np.flatnonzero(~whole & (taken > 0)):
        bytes_ = sources[i] + np.arange(int(taken[i]))
        some = read_global(machine, np.full(len(bytes_), threads[i]), bytes_, 1, 1, "cp.async")[0]
        padded = np.zeros(size, np.uint8)
        padded[:len(some)] = some
        for value, word in zip(values, padded.view(UNSIGNED[part])):
            value[i] = word
    return values


def _close(o):
    machine = o.machine

    def run(at):
        machine.copies.groups[at] += 1
        if machine.races:
            machine.races.close_copies(range(at.start // 32, -(-at.stop // 32)))
    return run


def _wait(o):
    machine = o.machine
    everything = o.parts[2] == "wait_all"
    still_pending = 0 if everything else o.constant(0)
    close = _close(o)

    def run(at):
        if everything:
            close(at)
        machine.copies.finish(machine.shared, at, still_pending)
        if machine.races:
            machine.races.wait_copies(range(at.start // 32, -(-at.stop // 32)), still_pending)
    return run
