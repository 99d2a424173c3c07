"""Races in shared memory: of two accesses to a byte, one of them a write, one must happen before the other.

Each warp keeps a vector clock: how far it has seen every other warp, every warp's asynchronous copies (cp.async) and
asynchronous products (wgmma), and every mbarrier's phases. Barriers join clocks; waiting for copies, products or a
phase lets a warp see them. A byte remembers who wrote it last and who read it since, and when. So a race is found in
whatever order the emulator happens to run the warps, as long as both accesses happen in the run.

Threads of one warp are ordered by barriers, `bar.warp.sync` among them, and by nothing else. For them a byte remembers
which lane wrote and read it last, and after how many barriers of its warp.

Two proxies see shared memory: wgmma and TMA do not see ordinary stores, and what cp.async wrote, unless a
`fence.proxy.async` lies between, of whichever thread: the one that stored, or one that the store comes before. So each
warp's clock is kept a second time, of what it had seen before a fence, and is joined like the first.
"""
import numpy as np

from ptxrun.errors import Race
from ptxrun.threads import WARP

SEVERAL = -1  # in place of a lane


class Races:
    """Happens-before over the shared memory of one block.

    copies_fenced: what cp.async wrote needs no proxy fence, see `ptxrun.emulate`.
    """

    def __init__(self, size: int, warps: int, copies_fenced: bool = False):
        self.warps, self.copies_fenced = warps, copies_fenced
        self.copies, self.products, self.mbarriers = warps, 2 * warps, 3 * warps  # where each kind's entries begin
        entries = 3 * warps + 64
        self.clocks = np.zeros((2, warps, entries), np.int64)  # what each warp has seen of each entry, fenced or not
        self.clock[np.arange(warps), np.arange(warps)] = 1
        self.writer, self.written = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.read = np.zeros((3 * warps, size), np.int64)   # when each warp, copy or product last read a byte
        self.meetings = np.zeros(warps, np.int64)           # of each warp's lanes at a barrier, so far
        self.writing_lane, self.written_at = np.zeros(size, np.int16), np.full(size, -1, np.int64)
        self.reading_lane, self.read_at = np.zeros((warps, size), np.int16), np.full((warps, size), -1, np.int64)
        self.copy_groups = np.zeros(warps, np.int64)        # of cp.async, closed so far
        self.product_groups = np.zeros(warps, np.int64)     # of wgmma, closed so far
        self.entry_of, self.arriving, self.complete = {}, {}, {}  # by the mbarrier's address

    @property
    def clock(self):
        """What each warp has seen."""
        return self.clocks[0]

    @property
    def fenced(self):
        """What each warp has seen that a proxy fence follows."""
        return self.clocks[1]

    # what reads and writes

    def access(self, threads, places, size: int, *, write: bool, copy: bool = False, same=None, whole: bool = False):
        """Threads read or write `size` bytes at `places`, as themselves or by cp.async.

        same: where the value that is written stands there already; such a write does not hurt one before it.
        whole: the warp does it as one, so that what a thread names is every lane's.
        """
        touched = places[:, None] + np.arange(size)
        lanes = np.full(len(threads), SEVERAL) if whole else threads % WARP
        by_warp = [(warp, threads // WARP == warp) for warp in np.unique(threads // WARP)]
        for warp, mine in by_warp:
            if write:
                changed = mine & ~same if same is not None else mine
                self._after_writes(warp, touched[changed].reshape(-1), "a write")
                self._after_reads(warp, touched[mine].reshape(-1), "a write")
                self._after_lanes(warp, lanes[changed], touched[changed], "a write")
                self._before_lanes(warp, lanes[changed], touched[changed])
            else:
                self._after_writes(warp, touched[mine].reshape(-1), "a read")
                self._after_lanes(warp, lanes[mine], touched[mine], "a read")
        for warp, mine in by_warp:
            bytes_, lane = touched[mine], lanes[mine][:, None]
            if not write:
                self._note_lanes(warp, lane, bytes_)
                self.read[warp, bytes_] = self.clock[warp, warp]
                continue
            self.writer[bytes_] = self.copies + warp if copy else warp
            self.written[bytes_] = self.copy_groups[warp] + 1 if copy else self.clock[warp, warp]
            self.writing_lane[bytes_], self.written_at[bytes_] = lane, self.meetings[warp]

    def _note_lanes(self, warp: int, lane, bytes_):
        """Which lane read a byte since the lanes last met; SEVERAL where another one did too."""
        again = self.read_at[warp, bytes_] == self.meetings[warp]
        other = again & (self.reading_lane[warp, bytes_] != lane)
        self.reading_lane[warp, bytes_] = lane  # where lanes read one byte together, one of them stays
        together = self.reading_lane[warp, bytes_] != lane
        self.reading_lane[warp, bytes_[other | together]] = SEVERAL
        self.read_at[warp, bytes_] = self.meetings[warp]

    def product_reads(self, warps: range, bytes_):
        """An asynchronous product of a warpgroup (or of a warp of it) reads shared memory."""
        seen = self.clock[warps.start:warps.stop].min(0)
        self._after_writes(warps.start, bytes_, "an asynchronous product's read", seen)
        self._after_fences(warps.start, bytes_, "an asynchronous product", self.fenced[warps.start:warps.stop].min(0))
        for warp in warps:
            self.read[self.products + warp, bytes_] = self.product_groups[warp] + 1

    def bulk_write(self, warp: int, bytes_, key, phase: int):
        """The copy engine writes, and completes phase `phase` of an mbarrier with it."""
        self._after_writes(warp, bytes_, "the copy engine's write")
        self._after_reads(warp, bytes_, "the copy engine's write")
        self.writer[bytes_], self.written[bytes_] = self.entry_of[key], phase

    def bulk_read(self, warp: int, bytes_):
        """The copy engine reads shared memory to store it; done by the wait for it, like a copy's group."""
        self._after_writes(warp, bytes_, "the copy engine's read")
        self._after_fences(warp, bytes_, "the copy engine", self.fenced[warp])
        self.read[self.copies + warp, bytes_] = self.copy_groups[warp] + 1

    # what orders

    def barrier(self, warps):
        """Warps meet: each has seen what any of them had."""
        warps = sorted(set(warps))
        self.clocks[:, warps] = self.clocks[:, warps].max(1, keepdims=True)
        self.clock[warps, warps] += 1
        self.meetings[warps] += 1

    def warp_barrier(self, warps):
        """bar.warp.sync: the lanes of each warp meet."""
        self.meetings[list(warps)] += 1

    def fence(self, warps):
        """fence.proxy.async: what these warps have seen, and stored, may be read by products and the copy engine."""
        warps = list(warps)
        self.fenced[warps] = self.clock[warps]  # which never goes back
        self.clock[warps, warps] += 1           # what they store from here on is not fenced

    def close_copies(self, warps):
        """cp.async.commit_group"""
        self.copy_groups[list(warps)] += 1

    def wait_copies(self, warps, pending: int):
        """cp.async.wait_group: all groups but the last `pending` are seen."""
        for warp in warps:
            entry = self.copies + warp
            self.clock[warp, entry] = max(self.clock[warp, entry], self.copy_groups[warp] - pending)

    def close_products(self, warps: range):
        """wgmma.commit_group"""
        self.product_groups[list(warps)] += 1

    def wait_products(self, warps: range, pending: int):
        """wgmma.wait_group: each warp has seen its own part of the products, not that of its warpgroup's others."""
        for warp in warps:
            entry = self.products + warp
            self.clock[warp, entry] = max(self.clock[warp, entry], self.product_groups[warp] - pending)

    def init_mbarrier(self, key):
        """An mbarrier is there, and nobody has arrived."""
        entry = self.entry_of.setdefault(key, self.mbarriers + len(self.entry_of))
        if entry >= self.clocks.shape[2]:
            self.clocks = np.pad(self.clocks, ((0, 0), (0, 0), (0, 64)))
        self.arriving[key], self.complete[key] = (np.zeros_like(self.clocks[:, 0]) for _ in range(2))

    def release(self, warp: int, key):
        """A thread arrives: whoever waits for this phase will have seen what it has."""
        self.arriving[key] = self._joined(self.arriving[key], self.clocks[:, warp])
        self.clock[warp, warp] += 1

    def close_phase(self, key, phase: int):
        """A phase completes."""
        self.complete[key] = self.arriving[key].copy()
        self.arriving[key] = np.zeros_like(self.arriving[key])
        self.complete[key][0, self.entry_of[key]] = phase

    def acquire(self, warps, key):
        """Warps have waited for a phase."""
        for warp in warps:
            self.clocks[:, warp] = self._joined(self.clocks[:, warp], self.complete[key])

    # what that says of accesses elsewhere

    def now(self, threads) -> tuple[np.ndarray, np.ndarray]:
        """When it is for threads: the clock of their warp, and how often its lanes have met."""
        warps = threads // WARP
        return self.clock[warps, warps], self.meetings[warps]

    def before(self, threads, clock, meetings, others) -> np.ndarray:
        """Whether what `threads` did when it was `clock` and `meetings` comes before what `others` do now."""
        warps, at = threads // WARP, others // WARP
        met = np.where(warps == at, self.meetings[at] > meetings, self.clock[at, warps] >= clock)
        return (threads == others) | met

    # what must hold

    def _joined(self, a, b):
        """The later of two pairs of clocks; the older may be shorter, if mbarriers came since."""
        a, b = (np.pad(x, ((0, 0), (0, self.clocks.shape[2] - x.shape[1]))) for x in (a, b))
        return np.maximum(a, b)

    def _after_writes(self, warp: int, bytes_, what: str, seen=None):
        seen = self.clock[warp] if seen is None else seen
        bad = seen[self.writer[bytes_]] < self.written[bytes_]
        if bad.any():
            byte = bytes_[np.argmax(bad)]
            self._fail(warp, byte, what, f"the write of {self._name(int(self.writer[byte]))}")

    def _after_reads(self, warp: int, bytes_, what: str):
        bad = self.read[:, bytes_] > self.clock[warp, :self.mbarriers, None]
        if bad.any():
            entry, at = np.argwhere(bad)[0]
            self._fail(warp, bytes_[at], what, f"the read of {self._name(int(entry))}")

    def _after_lanes(self, warp: int, lanes, bytes_, what: str):
        """Another lane's write since the lanes last met is not ordered before this access."""
        writer = self.writer[bytes_]
        ours = ((writer == warp) | (writer == self.copies + warp)) & (self.written_at[bytes_] == self.meetings[warp])
        self._lanes_differ(ours & self._others(self.writing_lane[bytes_], lanes), warp, bytes_, what, "write")

    def _before_lanes(self, warp: int, lanes, bytes_):
        """Nor is another lane's read since then before a write."""
        ours = self.read_at[warp, bytes_] == self.meetings[warp]
        self._lanes_differ(ours & self._others(self.reading_lane[warp, bytes_], lanes), warp, bytes_, "a write", "read")

    @staticmethod
    def _others(before, lanes):
        return (before != lanes[:, None]) | (before == SEVERAL)

    def _lanes_differ(self, bad, warp: int, bytes_, what: str, other: str):
        if bad.any():
            raise Race(f"{what} of byte {int(bytes_[bad][0])} of shared memory by a lane of warp {warp} is not ordered "
                       f"after another lane's {other}: no barrier is between them")

    def _after_fences(self, warp: int, bytes_, who: str, fenced):
        """What was stored through the other proxy lies before a fence that the reader has seen."""
        writer = self.writer[bytes_]
        ordinary = writer < (self.copies if self.copies_fenced else self.products)
        bad = ordinary & (fenced[writer] < self.written[bytes_])
        if bad.any():
            byte = int(bytes_[np.argmax(bad)])
            raise Race(f"{who} of warp {warp} reads byte {byte} of shared memory, and no fence.proxy.async follows the "
                       f"store of {self._name(int(self.writer[byte]))}")

    def _fail(self, warp: int, byte, what: str, other: str):
        raise Race(f"{what} of byte {int(byte)} of shared memory by warp {warp} is not ordered after {other}")

    def _name(self, entry: int) -> str:
        if entry < self.copies:
            return f"warp {entry}"
        if entry < self.products:
            return f"an asynchronous copy of warp {entry - self.copies}"
        if entry < self.mbarriers:
            return f"an asynchronous product of warp {entry - self.products}"
        return f"the copy engine for the mbarrier at {[key[1] for key, e in self.entry_of.items() if e == entry][0]}"
