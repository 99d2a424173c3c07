"""Mutations of compiled PTX: one change each of the kind that a GPU would punish now and then, or in silence.

A site is an instruction of a compiled kernel that a kind of mutation fits. Which instructions bound an access to
memory follows from the registers: from the predicate of a load or a store, or the size of a cp.async, back to the
comparisons that it is made of.
"""
import re
from typing import NamedTuple

from ptxrun.ptx import Instruction, Kernel, parse

ORDERS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi"}
PASSES_ON = ("and", "or", "not", "mov", "selp", "xor")  # what a predicate goes through on its way
OTHER_LANE = {16: 8, 8: 4, 4: 2, 2: 1, 1: 2, 0: 1}      # what a butterfly does elsewhere, so that it leaves lanes out
SWIZZLE_BIT = 1 << 62                                   # of a wgmma descriptor


class Mutation(NamedTuple):
    """One change of one line of PTX."""

    kind: str
    line: int    # the first one is 1
    before: str
    after: str

    def __str__(self):
        return f"{self.kind}, line {self.line}: {self.before} -> {self.after or 'nothing'}"

    def apply(self, ptx: str) -> str:
        """The PTX with this change."""
        lines = ptx.split("\n")
        assert self.before in lines[self.line - 1], (self, lines[self.line - 1])
        lines[self.line - 1] = lines[self.line - 1].replace(self.before, self.after, 1)
        return "\n".join(lines)


def mutations(ptx: str) -> list[Mutation]:
    """Every mutation of every site, in the order of the lines."""
    kernel, lines, found = parse(ptx), ptx.split("\n"), []
    bounds = bounds_of_memory(kernel)
    for one in kernel.instructions:
        statement = re.search(rf"(@!?[%\w]+\s+)?{re.escape(one.opcode)}\b[^;]*;", lines[one.line - 1])
        if statement is None:
            continue  # an instruction of several lines; those that are mutated take one
        for kind, after in changes(one, statement[0], bounds):
            found.append(Mutation(kind, one.line, statement[0], after))
    return found


def changes(one: Instruction, text: str, bounds: set[int]):
    """Yield (kind, new text) for each mutation of one instruction; `bounds`: lines of comparisons that bound memory."""
    base, opcode = one.parts[0], one.opcode
    if re.match(r"(cp\.async|cp\.async\.bulk|wgmma)\.wait_(group|all)", opcode):
        yield "wait removed", ""
        if "wait_group" in opcode:
            yield "wait for one group less", re.sub(r"(\d+)\s*;$", lambda m: f"{int(m[1]) + 1};", text)
    elif opcode.startswith("mbarrier.try_wait"):
        yield "wait removed", f"setp.eq.u32 {one.operands[0].split('__')[0]}, 0, 0;"
    elif opcode.startswith("bar.sync") or opcode.startswith("barrier.sync"):
        yield "barrier removed", ""
    elif opcode.startswith(("fence.proxy", "wgmma.fence")):
        yield "fence removed", ""
    elif "commit_group" in one.parts:
        yield "commit removed", ""
    elif base in ("ld", "st", "red", "atom") and one.predicate and "param" not in one.parts:
        yield "bound removed", re.sub(r"^@!?\S+\s+", "", text)
    elif opcode.startswith("cp.async.c") and len(one.operands) == 4:
        yield "bound removed", re.sub(r",\s*%\w+\s*;$", ";", text)
    elif base == "setp" and one.line in bounds:
        yield "bound moved by one", text.replace(f".{one.parts[1]}.", f".{ORDERS[one.parts[1]]}.", 1)
    elif base == "xor" and re.fullmatch(r"-?\d+", one.operands[-1]) and one.parts[1] == "b32":
        yield "swizzle changed", re.sub(r"(-?\d+)\s*;$", lambda m: f"{int(m[1]) ^ 16};", text)
    elif opcode == "or.b64" and re.fullmatch(r"-?\d{16,}", one.operands[-1]):
        yield "swizzle changed", re.sub(r"(-?\d+)\s*;$", lambda m: f"{signed(int(m[1]) ^ SWIZZLE_BIT)};", text)
    elif "expect_tx" in one.parts:
        yield "expected bytes changed", re.sub(r"(\d+)\s*;$", lambda m: f"{int(m[1]) // 2};", text)
    elif base == "shfl" and one.operands[2].isdigit():
        yield "shuffle's lane changed", text.replace(f", {one.operands[2]}, ",
                                                     f", {OTHER_LANE.get(int(one.operands[2]), 0)}, ", 1)


def signed(bits: int) -> int:
    """64 bits as PTX writes them, with a sign."""
    bits &= (1 << 64) - 1
    return bits - (1 << 64) * (bits >> 63)


def bounds_of_memory(kernel: Kernel) -> set[int]:
    """The lines of integer comparisons that a load or a store depends on."""
    writers = {}
    for one in kernel.instructions:
        for name in one.operands[0].split("|") if one.operands else ():
            writers.setdefault(name, []).append(one)
    asked = [name for one in kernel.instructions for name in bounding(one)]
    seen, lines = set(), set()
    while asked:
        name = asked.pop()
        for one in writers.get(name, ()) if name not in seen else ():
            if one.parts[0] == "setp" and one.parts[1] in ORDERS and one.parts[-1][0] in "us":
                lines.add(one.line)
            elif one.parts[0] in PASSES_ON:
                asked += one.operands[1:]
        seen.add(name)
    return lines


def bounding(one: Instruction) -> list[str]:
    """The registers that say whether an access to memory happens, or how much it reads."""
    if one.parts[0] in ("ld", "st", "red", "atom") and one.predicate:
        return [one.predicate]
    return one.operands[3:] if one.opcode.startswith("cp.async.c") else []
