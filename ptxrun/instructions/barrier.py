"""mbarriers, fences, and the ends of asynchronous groups. Where threads wait, the machine makes them wait."""
import numpy as np

from ptxrun.numbers import UNSIGNED


def mbarrier(o):
    """mbarrier.init, inval, arrive, arrive.expect_tx, expect_tx."""
    action = o.parts[1]
    if action in ("init", "inval"):
        return _init(o) if action == "init" else _inval(o)
    if action in ("arrive", "expect_tx"):
        return _arrive(o)
    raise o.unknown()


def barrier_key(machine, thread: int, address: int) -> tuple[int, int]:
    """(block, address): the name of an mbarrier."""
    return thread // machine.kernel.threads, address


def note_use(machine, threads, address: int, *, write: bool):
    """For the search for races: threads use an mbarrier, or (write) make or unmake it."""
    if machine.races:
        places = machine.shared.base[threads] + address
        machine.races.access(threads, places, 8, write=write)


def _init(o):
    address, count, machine = o.address(0), o.read(1, "u32"), o.machine

    def run(at):
        for thread, where, n in zip(o.lanes(at), *o.selected(at, address, count)):
            key = barrier_key(machine, int(thread), int(where))
            machine.shared.places(np.array([where]), 0, 8, "an mbarrier")
            machine.mbarriers.init(key, int(n))
            note_use(machine, np.array([thread]), int(where), write=True)
            if machine.races:
                machine.races.init_mbarrier(key)
    return run


def _inval(o):
    address, machine = o.address(0), o.machine

    def run(at):
        for thread, where in zip(o.lanes(at), *o.selected(at, address)):
            machine.mbarriers.invalidate(barrier_key(machine, int(thread), int(where)))
            note_use(machine, np.array([thread]), int(where), write=True)
    return run


def _arrive(o):
    """The state that arrive returns is the phase; Triton waits by parity and throws it away."""
    machine, expects = o.machine, o.has("expect_tx")
    first = 0 if o.texts[0].startswith("[") else 1
    address = o.address(first)
    amount = o.read(first + 1, "u32") if len(o.texts) > first + 1 else lambda at: np.uint32(1)
    arrives = o.parts[1] == "arrive"
    write = o.write_text(o.texts[0], "b64") if first else None

    def run(at):
        for thread, where, n in zip(o.lanes(at), *o.selected(at, address, amount)):
            key = barrier_key(machine, int(thread), int(where))
            note_use(machine, np.array([thread]), int(where), write=False)
            if machine.races and arrives:
                machine.races.release(int(thread) // 32, key)
            change_mbarrier(machine, key, (1 if expects else int(n)) if arrives else 0, int(n) if expects else 0)
        if write is not None:
            write(at, UNSIGNED[8](0))
    return run


def change_mbarrier(machine, key, arrivals: int, transactions: int):
    """Count at an mbarrier, and let everyone know if its phase completes."""
    barrier = machine.mbarriers.find(key)
    if barrier.change(arrivals, transactions) and machine.races:
        machine.races.close_phase(key, barrier.phase)


def fence(o):
    """fence and membar: only the one between proxies does something here, where memory is never late."""
    machine = o.machine
    if not ("proxy" in o.parts and any(part.startswith("async") for part in o.parts)):
        return lambda at: None

    def run(at):
        if machine.races:
            machine.races.fence(range(at.start // 32, -(-at.stop // 32)))
    return run


def warp_barrier(o):
    """bar.warp.sync: lanes of a warp meet, which are never apart here but for the search for races."""
    machine = o.machine

    def run(at):
        if machine.races:
            machine.races.warp_barrier(range(at.start // 32, -(-at.stop // 32)))
    return run


def nothing(o):
    """A hint, or an order that this emulator keeps anyway."""
    return lambda at: None
