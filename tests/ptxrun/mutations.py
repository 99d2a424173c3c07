"""How much of what is broken in compiled kernels the emulator notices: `python -m tests.ptxrun.mutations`.

Each kernel of tests/ptxrun/mutated.py is launched as it is, and its memory is kept from before and after. Then each
mutant of tests/ptxrun/mutants.py is launched on the memory from before. It is caught if the emulator reports an error,
or if what it writes takes the operator out of the rule of accuracy (tests/compare.py). A mutant that one schedule does
not catch is launched under the others.
"""
import argparse
import datetime
import functools
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import triton

import ptxrun
from ptxrun import launch as launching
from ptxrun.driver import architecture_number
from ptxrun.instructions import decode
from ptxrun.instructions.operands import Operands
from ptxrun.launch import Emulation
from ptxrun.memory import GlobalMemory
from ptxrun.schedule import Schedule
from ptxrun.traffic import Traffic
from tests.ptxrun.mutants import Mutation, mutations
from tfkernels._library import _made

SCHEDULES = (Schedule("late"), Schedule("early"), Schedule("random", 0), Schedule("random", 1))


class Traced(GlobalMemory):
    """Global memory that keeps which addresses were read, and what was written where."""

    def __init__(self):
        super().__init__()
        self.read, self.written = set(), set()

    def load(self, addresses, size, count, what="a load"):
        self.read |= set(addresses.tolist())
        return super().load(addresses, size, count, what)

    def store(self, addresses, size, values, what="a store"):
        for i, value in enumerate(values):
            self.written |= set(zip((addresses + i * size).tolist(), value.tolist()))
        super().store(addresses, size, values, what)


class Launch(NamedTuple):
    """A launch as it was: what it was given, and its memory before and after."""

    check: Callable  # that launched it
    ptx: str
    grid: tuple[int, int, int]
    parameters: list[bytes]
    before: list[tuple[int, np.ndarray, str]]
    after: list[np.ndarray]
    shared: int
    reached: set[int]  # lines of the PTX that a mutation of them would change something in

    def run(self, ptx: str, architecture: str, schedule: Schedule, kind: type = GlobalMemory) -> GlobalMemory:
        """Launch `ptx` in place of the kernel; the memory, of a kind, afterwards."""
        memory = kind()
        for start, data, name in self.before:
            memory.add(start, data.copy(), name)
        Emulation(architecture_number(architecture), schedule, races=True).launch(
            ptx, self.grid, self.parameters, memory, self.shared)
        return memory


class Reached(Traffic):
    """The lines that threads come to, and of these the ones where a mutation would make no difference.

    No difference: a bound that no thread meets, a predicate that holds in every thread, a shuffle of equal values.
    """

    def __init__(self):
        super().__init__()
        self.lines, self.watched, self.different = set(), set(), set()

    def of_instructions(self, run, at):
        self.lines |= {one.line for one, _ in run.steps} | ({run.ender.line} if run.ender else set())

    def decode(self, machine, instruction):
        """ptxrun's decoder, which looks at what an instruction is given on top."""
        execute, differs = decode(machine, instruction), difference(machine, instruction)
        if differs is None:
            return execute
        self.watched.add(instruction.line)

        def run(at):
            if instruction.line not in self.different and np.any(differs(at)):
                self.different.add(instruction.line)
            execute(at)
        return run

    def lines_that_matter(self) -> set[int]:
        return self.lines & self.different | self.lines - self.watched


def difference(machine, instruction):
    """A function that tells for which threads a mutation of an instruction would do something else; None: for all."""
    o, base = Operands(machine, instruction), instruction.parts[0]
    if base == "setp" and instruction.parts[-1][0] in "us":
        a, b = o.read(1), o.read(2)
        return lambda at: (a(at) == b(at)) & o.active(at)
    if base in ("ld", "st", "atom", "red") and o.guarded:
        return lambda at: ~o.active(at)
    if instruction.opcode.startswith("cp.async.c") and len(o.texts) == 4:
        size, whole = o.read(3, "u32"), o.constant(2)
        return lambda at: size(at) != whole
    if base == "shfl":
        value = o.read(1, "b32")
        return lambda at: np.diff(np.broadcast_to(value(at), (at.stop - at.start,)).reshape(-1, 32)) != 0
    return None


def operators(architecture: str, launch: Callable, check: Callable):
    """Run a check of operators; each launch goes to `launch(emulation, do, ptx, grid, parameters, memory, shared)`."""
    _made.clear()  # what operators remember of the inputs, such as an index, would keep a kernel from being launched
    with ptxrun.emulate(architecture) as emulation:
        do = emulation.launch
        emulation.launch = functools.partial(launch, emulation, do)
        check()


def recorded(architecture: str, checks: list[Callable]) -> dict[str, list[Launch]]:
    """The first launch of each kernel by each check, by the kernel's PTX."""
    found = {}

    def record(check, emulation, do, ptx, grid, parameters, memory, shared):
        before = [(start, data.copy(), name) for start, data, name in zip(memory.starts, memory.blocks, memory.names)]
        reached = Reached()
        emulation.count, emulation.kernels = True, {name_of(ptx): reached}
        launching.machine.cache_clear()
        with mock.patch("ptxrun.machine.decode", reached.decode):
            do(ptx, grid, parameters, memory, shared)
        launching.machine.cache_clear()
        if all(one.check is not check for one in found.setdefault(ptx, [])):
            found[ptx].append(Launch(check, ptx, grid, parameters, before, [data.copy() for data in memory.blocks],
                                     shared, reached.lines_that_matter()))
    for check in checks:
        operators(architecture, functools.partial(record, check), check)
    return found


def name_of(ptx: str) -> str:
    """The kernel's name."""
    return ptx.split(".entry")[1].split("(")[0].strip()


class Outcome(NamedTuple):
    """What became of a mutant."""

    architecture: str
    kernel: str
    mutation: Mutation
    how: str    # by which error, or by its numbers, it is caught; empty where it is not
    where: str  # the line of the PTX that the error names
    why: str    # it is not caught

    def __str__(self):
        return f"{self.how or 'MISSED':13}{self.where:10} {self.architecture} {self.kernel}: {self.mutation} {self.why}"


def outcome(architecture: str, launches: list[Launch], mutation: Mutation) -> Outcome:
    """Launch a mutant until it is caught."""
    mutant = mutation.apply(launches[0].ptx)
    mutated = functools.partial(Outcome, architecture, name_of(mutant), mutation)
    for schedule in SCHEDULES:
        for launch in launches:
            if mutation.line in launch.reached:
                how, where = caught(architecture, launch, mutant, schedule)
                if how:
                    return mutated(how, where, "")
    reasons = [reason(architecture, launch, mutant) for launch in launches if mutation.line in launch.reached]
    return mutated("", "", max(reasons, key=REASONS.index))


SAME = 3  # reasons that make a mutant do what the kernel does, as far as anybody can tell
REASONS = (  # why a mutant is not caught, from the most to the least that is known
    "does what the kernel does: it reads and writes the same, without a race",
    "reads more of its tensors and uses none of it: it writes the same, without a race",
    "stores what a later store replaces, in an order that barriers make: it leaves the same memory, without a race",
    "writes other numbers, within the rule of accuracy",
)


def reason(architecture: str, launch: Launch, mutant: str) -> str:
    """What a mutant that is not caught does otherwise than the kernel, seen at its accesses of global memory."""
    theirs, ours = (launch.run(ptx, architecture, SCHEDULES[0], Traced) for ptx in (launch.ptx, mutant))
    if ours.written == theirs.written:
        return REASONS[0] if ours.read == theirs.read else REASONS[1]
    left = all(np.array_equal(a, b) for a, b in zip(ours.blocks, theirs.blocks))
    return REASONS[2] if left else REASONS[3]


def caught(architecture: str, launch: Launch, mutant: str, schedule: Schedule) -> tuple[str, str]:
    """By which error at which line, or by its numbers, one launch under one schedule shows a mutant."""
    try:
        after = launch.run(mutant, architecture, schedule).blocks
    except ptxrun.EmulationError as error:
        line = re.search(r"line (\d+) of the PTX", str(error))
        return type(error).__name__, f"line {line[1]}" if line else ""
    same = all(np.array_equal(ours, theirs) for ours, theirs in zip(after, launch.after))
    return ("", "") if same or accurate(architecture, launch, mutant) else ("numbers", "")


def accurate(architecture: str, launch: Launch, mutant: str) -> bool:
    """Whether an operator fits the rule of accuracy with a mutant in place of a kernel."""
    def replace(emulation, do, ptx, *rest):
        do(mutant if ptx == launch.ptx else ptx, *rest)
    try:
        operators(architecture, replace, launch.check)
    except (AssertionError, ptxrun.EmulationError):
        return False
    return True


def sample(found: list[Mutation], most: int, seed: str) -> list[Mutation]:
    """At most `most` mutations of each kind, the same ones each time, in their order."""
    draw, chosen = random.Random(seed), set()
    for kind in sorted({one.kind for one in found}):
        some = [one for one in found if one.kind == kind]
        chosen |= set(draw.sample(some, min(most, len(some))))
    return [one for one in found if one in chosen]


class Kernel(NamedTuple):
    """The sites of one compiled kernel, and what became of those that were chosen."""

    architecture: str
    name: str
    sites: list[Mutation]
    reached: list[Mutation]  # where a mutation makes a difference with one of the inputs
    outcomes: list[Outcome]


def mutated(architecture: str, checks: list[Callable], most: int) -> list[Kernel]:
    """Mutate each kernel that checks launch, at most at `most` sites of each kind."""
    kernels = []
    for ptx, launches in recorded(architecture, checks).items():
        lines, sites = set().union(*(launch.reached for launch in launches)), mutations(ptx)
        reached, outcomes = [one for one in sites if one.line in lines], []
        for one in sample(reached, most, name_of(ptx)):
            outcomes.append(outcome(architecture, launches, one))
            print(outcomes[-1], flush=True)
        kernels.append(Kernel(architecture, name_of(ptx), sites, reached, outcomes))
    return kernels


def table(kernels: list[Kernel]) -> str:
    """The table by kind of mutation, in Markdown."""
    everything = [(kind, kernel) for kernel in kernels for kind in {one.kind for one in kernel.sites}]
    lines = ["| change | sites | of them that an input reaches | tried | caught | by | not caught, does the same | "
             "not caught, otherwise |", "|---|---|---|---|---|---|---|---|"]
    for kind in [*sorted({kind for kind, _ in everything}), "all"]:
        fits = lambda one, kind=kind: kind in (one.kind, "all")  # noqa: E731
        sites, reached = (sum(fits(one) for kernel in kernels for one in getattr(kernel, name))
                          for name in ("sites", "reached"))
        tried = [one for kernel in kernels for one in kernel.outcomes if fits(one.mutation)]
        by = Counter(one.how for one in tried if one.how)
        same = sum(one.why in REASONS[:SAME] for one in tried)
        lines.append(f"| {kind} | {sites} | {reached} | {len(tried)} | {by.total()} | "
                     f"{', '.join(f'{how} {n}' for how, n in by.most_common())} | {same} | "
                     f"{len(tried) - by.total() - same} |")
    return "\n".join(lines)


def page(kernels: list[Kernel], most: int, commit: str, seconds: float) -> str:
    """The result as a page."""
    tried = [one for kernel in kernels for one in kernel.outcomes]
    caught, same = sum(bool(one.how) for one in tried), sum(one.why in REASONS[:SAME] for one in tried)
    missed = [f"| `{one.kernel}` | {one.architecture} | {one.mutation.kind} | {one.mutation.line} | "
              f"`{' '.join(one.mutation.before.split()).replace('|', ',')}` | {one.why} |"
              for one in tried if not one.how]
    return f"""# What the emulator notices of broken kernels

Written by `python -m tests.ptxrun.mutations --most {most}` on {datetime.date.today()} at {commit}, with Triton
{triton.__version__}, in {seconds:.0f} s of one core. [testing.md](testing.md#how-well-it-catches) says what it means.

{len(tried)} mutants of {len(kernels)} compiled kernels; {caught} are caught: {100 * caught / len(tried):.1f} %.
Without the {same} that are shown to do the same as the kernel: {100 * caught / (len(tried) - same):.1f} %.

{table(kernels)}

## Not caught

| kernel | architecture | change | line | instruction | why |
|---|---|---|---|---|---|
{chr(10).join(missed)}
"""


def main():
    """Mutate every kernel, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--cases", nargs="+", default=[],
                        help="names of tests/ptxrun/mutated.py; all where none is given")
    parser.add_argument("--most", type=int, default=3, help="mutants of each kind and kernel")
    parser.add_argument("--out", type=Path, help="the page to write, docs/mutations.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
    from tests.ptxrun.mutated import CASES, SM_90_ALONE  # imports the operators, which are then registered
    ptxrun.operators_on_cpu()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    began, kernels = time.process_time(), []
    for name in arguments.cases or CASES:
        for architecture in arguments.architectures:
            if architecture == "sm_90" or name not in SM_90_ALONE:
                kernels += mutated(architecture, CASES[name], arguments.most)
        if arguments.out:
            arguments.out.write_text(page(kernels, arguments.most, commit, time.process_time() - began))
    print(table(kernels))


if __name__ == "__main__":
    main()
