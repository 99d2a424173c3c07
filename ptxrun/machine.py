"""The machine that runs some blocks of a kernel at once: it decodes the kernel, and moves groups of threads through it.

A straight run of instructions ends where threads may part or wait: at branches, barriers and the ends of asynchronous
work. Within a run each instruction is executed by all threads of a group before the next one.
"""
from dataclasses import dataclass, field

import numpy as np

from ptxrun.barriers import MBarriers, NamedBarrier, RegisterPool
from ptxrun.errors import Deadlock, EmulationError, Hazard, Misuse, UnknownInstruction
from ptxrun.flow import flow_order
from ptxrun.instructions import decode, parts_or_waits
from ptxrun.instructions.barrier import barrier_key, note_use
from ptxrun.instructions.copy import Copies
from ptxrun.instructions.operands import Operands
from ptxrun.instructions.wgmma import WARPGROUP, Products
from ptxrun.memory import GlobalMemory, SharedMemory
from ptxrun.ptx import NAME, Instruction, Kernel
from ptxrun.races import Races
from ptxrun.registers import Registers
from ptxrun.schedule import Coin, Schedule
from ptxrun.thread_races import ThreadRaces
from ptxrun.threads import EXIT, WARP, Group, Threads

PARAMETERS_AT = 0x7000_0000  # where kernels see the addresses of their parameters; 4 KiB for each
AXES = ("x", "y", "z")


@dataclass
class Run:
    """Straight instructions, or one at which threads may part or wait, which is a run of its own."""

    steps: list[tuple[Instruction, object]]
    ender: Instruction | None
    end: int  # index of the instruction behind
    touched: list[tuple[Instruction, frozenset]] = field(default_factory=list)  # registers, for hazards
    names: frozenset = frozenset()  # of all that are touched
    rank: int = 0  # its place in the order in which control flows


def ends_run_after(instruction: Instruction) -> bool:
    """Whether another warp or the copy engine may be quicker behind an instruction."""
    return instruction.opcode.startswith(("mbarrier.arrive", "wgmma", "cp.async.bulk", "cp.async.wait"))


class Machine:
    """Runs `blocks` blocks of a kernel at a time."""

    def __init__(self, kernel: Kernel, blocks: int, shared_size: int, schedule: Schedule, *, races: bool = False,
                 copies_fenced: bool = False):
        self.kernel, self.blocks, self.schedule = kernel, blocks, schedule
        self.check_races, self.copies_fenced = races, copies_fenced
        count = kernel.threads * blocks
        self.registers = Registers(kernel.registers, count)
        self.shared = SharedMemory(shared_size, blocks, kernel.threads)
        self.block_number = np.zeros(count, np.int64)
        self.special = self._special_registers(count)
        self.parameter_addresses = {name: PARAMETERS_AT + 4096 * i for i, (name, *_) in enumerate(kernel.parameters)}
        self.parameter_sizes = {name: max(1, n) * int(kind[1:]) // 8 for name, kind, n in kernel.parameters}
        self.parameters, self.global_memory = {}, GlobalMemory()
        self.races, self.traffic, self.block_races, self.thread_races = (None,) * 4
        self.unknown = []  # what is wrong with each instruction that is not emulated
        self.runs = self._decode()

    # decoding

    def _special_registers(self, count: int):
        thread = np.arange(count, dtype=np.uint32) % np.uint32(self.kernel.threads)
        special = {"%tid.x": thread, "%laneid": thread % np.uint32(32), "%warpid": thread // np.uint32(32),
                   "%ntid.x": np.full(count, self.kernel.threads, np.uint32)}
        for axis in AXES:
            special |= {f"%{name}.{axis}": np.zeros(count, np.uint32) for name in ("ctaid", "nctaid")}
        special |= {f"%tid.{axis}": np.zeros(count, np.uint32) for axis in "yz"}
        special |= {f"%ntid.{axis}": np.ones(count, np.uint32) for axis in "yz"}
        special |= {name: np.zeros(count, np.uint32) for name in ("%cluster_ctarank", "%cluster_ctaid.x")}
        return special

    def _decode(self) -> dict[int, Run]:
        code = self.kernel.instructions
        starts = {0, *self.kernel.labels.values()}
        for i, instruction in enumerate(code):
            if parts_or_waits(instruction):
                starts |= {i, i + 1}
            elif ends_run_after(instruction):
                starts.add(i + 1)
        edges = sorted(start for start in starts if start < len(code)) + [len(code)]
        hazards = any(instruction.parts[0] == "wgmma" for instruction in code)
        runs = {}
        for start, end in zip(edges, edges[1:]):
            steps = [(one, self._executable(one)) for one in code[start:end]]
            ender = steps.pop()[0] if steps[-1][1] is None else None
            runs[start] = Run(steps, ender, end)
            if hazards:
                runs[start].touched = [(one, self._named(one)) for one in code[start:end] if one.parts[0] != "wgmma"]
                runs[start].names = frozenset().union(*(names for _, names in runs[start].touched))
        for start, rank in flow_order({start: self._ways(run, len(code)) for start, run in runs.items()}).items():
            runs[start].rank = rank
        return runs

    def _ways(self, run: Run, end: int) -> list[int]:
        """Where threads may stand behind a run, of those before `end`."""
        one, ways = run.ender, [run.end]
        if one is not None and one.parts[0] == "brx":
            ways = [self.kernel.labels[label] for label in self.kernel.branch_targets[one.operands[1]]]
        elif one is not None and one.parts[0] in ("bra", "ret", "exit"):
            ways = [run.end] if one.predicate else []
            ways += [self.kernel.labels[one.operands[0]]] if one.parts[0] == "bra" else []
        return [way for way in ways if way < end]

    def _executable(self, instruction: Instruction):
        """What executes an instruction; an unknown one is an error when a thread comes to it."""
        try:
            return decode(self, instruction)
        except UnknownInstruction as error:
            message = str(error)
            self.unknown.append(message)

            def unknown(at):
                raise UnknownInstruction(message)
            return unknown

    def _named(self, instruction: Instruction) -> frozenset:
        names = {name for text in instruction.operands for name in NAME.findall(text)} | {instruction.predicate}
        return frozenset(names & self.registers.kinds.keys())

    # running

    def start(self, numbers: range, grid: tuple[int, int, int]):
        """Set up the blocks `numbers` of a grid, at most as many as the machine holds."""
        threads, count = self.kernel.threads, len(numbers) * self.kernel.threads
        self.block_number[:count] = np.repeat(np.asarray(numbers), threads)
        number = self.block_number.astype(np.uint32)
        for axis, size in zip(AXES, grid):
            self.special[f"%ctaid.{axis}"][:] = number % np.uint32(size)
            self.special[f"%nctaid.{axis}"][:] = size
            number //= np.uint32(size)
        self.registers.poison()
        self.shared.poison()
        self.threads = Threads(count, joined=not self.schedule.apart)
        self.coin = Coin(self.schedule.seed, -(-count // 32))
        self.copies, self.products, self.mbarriers = Copies(count), Products(), MBarriers()
        self.named_barriers, self.deliveries, self.bulk_stores = {}, [], {}
        self.pools = [RegisterPool(threads // 32, self.kernel.registers_per_thread) for _ in numbers]
        if self.check_races:  # of one block at a time
            self.races = Races(self.shared.size, threads // 32, self.copies_fenced)
            self.thread_races = ThreadRaces(self.global_memory, self.races)

    def run(self):
        """Run until no thread is left."""
        with np.errstate(all="ignore"):
            while self.threads.groups:
                group = self._next()
                if group is not None:
                    self._step(group)
        for thread, groups in self.bulk_stores.items():
            if any(groups):
                raise Hazard(f"thread {thread} ends, and its block's shared memory with it, before it has waited for "
                             "the copy engine to read what it stores")

    def _next(self) -> Group | None:
        """The group that goes on; None where the copy engine did something instead."""
        ready = [group for group in self.threads.groups if group.waits is None or self._may_go_on(group)]
        random = self.schedule.apart
        if self.deliveries and (not ready or random and self.coin.throw(self.coin.delivery)):
            self.deliveries.pop(self.coin.pick(len(self.deliveries)) if random else 0)()
            return None
        if not ready:
            at_a_barrier = lambda group: group.waits[0] == "a barrier"  # noqa: E731  (they stand behind it)
            raise Deadlock("no thread can go on: " + "; ".join(
                f"{group} wait for {group.waits[0]} at "
                f"{self.kernel.instructions[group.at - at_a_barrier(group)].where}" for group in self.threads.groups))
        if not random:
            return min(ready, key=lambda group: self.runs[group.at].rank)
        self.coin.shuffle()
        return min(ready, key=lambda group: (self.coin.priority[group.low // 32], self.runs[group.at].rank))

    def _may_go_on(self, group: Group) -> bool:
        kind, *key = group.waits
        if kind == "registers":
            block, warps, count = key
            return self.pools[block].enough(warps, count)
        return kind == "an mbarrier" and self.mbarriers.passed(*key)

    def _step(self, group: Group):
        """One straight run of one group."""
        run, at = self.runs[group.at], group.slice
        if self.products.in_flight:
            self._check_hazards(group, run)
        if run.touched:
            self.products.touch(group.warps, run.end, run.names)
        here = run.ender
        try:
            for instruction, execute in run.steps:
                here = instruction
                execute(at)
            if self.traffic:
                self.traffic.of_instructions(run, at)
            if run.ender is None:
                group.at = run.end
            else:
                self._end(group, run.ender, run.end)
        except EmulationError as error:
            raise error.at(here) from None
        if len(self.threads.groups) > 1:
            self.threads.join()

    def _check_hazards(self, group: Group, run: Run):
        """No instruction may touch a register that an asynchronous product still uses; reading inputs is harmless."""
        size = WARPGROUP if self.threads.joined else WARP
        for unit, held in self.products.in_flight.items():
            for instruction, names in run.touched if unit < group.high and group.low < unit + size else ():
                for name in sorted(names & held.keys()):
                    if held[name] is not None or name in instruction.operands[0]:
                        raise Hazard(f"{name} is used while an asynchronous product of {group} has not been waited "
                                     "for").at(instruction)

    # instructions at which threads part or wait

    def _end(self, group: Group, instruction: Instruction, end: int):
        base = instruction.parts[0]
        if base == "bra":
            self._branch(group, instruction, self.kernel.labels[instruction.operands[0]], end)
        elif base in ("ret", "exit"):
            self._branch(group, instruction, EXIT, end)
        elif base == "brx":
            index = Operands(self, instruction).read(0, "u32")(group.slice)
            table = self.kernel.branch_targets[instruction.operands[1]]
            self.threads.split(group, np.array([self.kernel.labels[label] for label in table])[index])
        elif base == "trap":
            if Operands(self, instruction).active(group.slice).any():
                raise Misuse("trap, which a failed assertion ends in")
            group.at = end
        elif base == "setmaxnreg":
            self._move_registers(group, instruction, end)
        elif base == "mbarrier":
            self._wait(group, instruction, end)
        else:
            self._barrier(group, instruction, end)

    def _branch(self, group: Group, instruction: Instruction, target: int, end: int):
        taken = Operands(self, instruction).active(group.slice)
        if target != EXIT and taken.all():
            group.at = target
        elif not taken.any():
            group.at = end
        else:
            self.threads.split(group, np.where(taken, target, end))

    def _barrier(self, group: Group, instruction: Instruction, end: int):
        """bar and barrier, .sync and .arrive."""
        action = "arrive" if "arrive" in instruction.parts else "sync"
        if group.low % 32 or group.high % 32:
            raise Misuse(f"{group}, part of a warp, come to a barrier for whole warps")
        operands, threads = Operands(self, instruction), self.kernel.threads
        number, *counts = (int(np.ravel(operands.read(i, "u32")(group.slice))[0])
                           for i in range(len(instruction.operands)))
        count = counts[0] if counts else threads
        if count == threads and group.low % threads == group.high % threads == 0 and not self.named_barriers:
            group.at = end  # whole blocks at once: nobody has to wait
            if self.races and action == "sync":
                self.races.barrier(group.warps)
            return
        for part in self.threads.cut(group, self._block_edges(group)):
            part.at = end
            key = part.low // threads, number
            barrier = self.named_barriers.setdefault(key, NamedBarrier(count))
            opens = barrier.arrive(part, count)
            part.waits = ("a barrier", *key) if action == "sync" else None
            if opens:
                self._open(key, barrier)

    def _open(self, key, barrier: NamedBarrier):
        del self.named_barriers[key]
        if self.races:
            self.races.barrier(barrier.warps)
        for group in self.threads.groups:
            if group.waits == ("a barrier", *key):
                group.waits = None

    def _wait(self, group: Group, instruction: Instruction, end: int):
        """mbarrier.try_wait and test_wait: come back when the phase is complete, with true."""
        operands, at = Operands(self, instruction), group.slice
        if "parity" not in instruction.parts:
            raise UnknownInstruction(f"not emulated (a wait for a state): {instruction}")
        addresses, parity = operands.address(1)(at), np.broadcast_to(operands.read(2, "u32")(at), at.stop - at.start)
        blocks = np.arange(at.start, at.stop) // self.kernel.threads
        keys = np.stack([blocks, addresses, parity & 1])
        different = np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(0)) + 1
        for part in self.threads.cut(group, [at.start + int(i) for i in different]):
            first = part.low - at.start
            self._wait_for(part, instruction, end, int(addresses[first]), int(parity[first]) & 1)

    def _wait_for(self, group: Group, instruction: Instruction, end: int, address: int, parity: int):
        """Threads of one block that wait for one phase."""
        key = barrier_key(self, group.low, address)
        if not self.mbarriers.passed(key, parity):
            group.waits = ("an mbarrier", key, parity)
            return
        group.waits = None
        if self.races:
            self.races.acquire(group.warps, key)
            note_use(self, np.arange(group.low, group.high), address, write=False)
        Operands(self, instruction).write(0, "pred")(group.slice, np.ones(group.high - group.low, bool))
        group.at = end

    def _block_edges(self, group: Group) -> range:
        """Where a block of threads begins inside of a group."""
        threads = self.kernel.threads
        return range((group.low // threads + 1) * threads, group.high, threads)

    def _move_registers(self, group: Group, instruction: Instruction, end: int):
        """setmaxnreg.dec gives registers back, .inc waits for them."""
        count = int(instruction.operands[0], 0)
        for part in self.threads.cut(group, self._block_edges(group)):
            block, first = divmod(part.low, self.kernel.threads)
            pool, warps = self.pools[block], range(first // 32, (first + part.high - part.low) // 32)
            pool.check(count)
            if "dec" in instruction.parts:
                pool.release(warps, count)
            elif not pool.take(warps, count):
                part.waits = "registers", block, warps, count
                continue
            part.waits, part.at = None, end
