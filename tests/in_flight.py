"""Registers that machine code of sm_90 writes while a product that is under way may still read them.

A `HGMMA` whose left operand is in registers reads them until `WARPGROUP.DEPBAR` has waited for it; PTX leaves it
undefined what happens to a product whose registers are written before. Triton 3.6 and 3.7 let a loop do so where nobody
reads the product's sums within it (triton-lang/triton#9433), and ptxas before 13.3 may do so where the PTX does not.
"""
import re

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)
LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)
BRANCH = re.compile(r"\(?(\.L\w+)")
LEFT_IN_REGISTERS = re.compile(r"R\d+, R(\d+)")
RESULT = re.compile(r"(?:U?P\w+, )?R(\d+)\b")  # comparisons have two predicates
NO_RESULT = ("ST", "RED", "BAR", "LDGSTS")  # what begins so names registers first that it reads
LEFT = 4  # registers of a thread that hold a left operand of 64 x 16 elements of 2 bytes, or 64 x 8 of 4


def overwritten(code: str) -> list[str]:
    """Return the instructions that write what a product in flight may read, of what nvdisasm prints.

    Every loop is walked twice, so that its second round meets the first one's products; branches forward are not
    taken.
    """
    labels = {m[1]: m.start() for m in LABEL.finditer(code)}
    places, walked = zip(*((m.start(), (m[1], m[2])) for m in INSTRUCTION.finditer(code)))
    found = _met(walked)
    for end, (name, operands) in enumerate(walked):
        target = BRANCH.search(operands) if name.startswith("BRA") else None
        if target and labels[target[1]] < places[end]:
            start = next(i for i, place in enumerate(places) if place > labels[target[1]])
            found += _met(walked[start:end + 1] * 2)
    return list(dict.fromkeys(found))


def _met(walked: tuple[tuple[str, str], ...]) -> list[str]:
    """The same of instructions in a row, each a name and operands."""
    groups, opened, found = [], set(), []
    for name, operands in walked:
        if name.startswith("HGMMA"):
            left = LEFT_IN_REGISTERS.match(operands)
            opened |= set(range(int(left[1]), int(left[1]) + LEFT)) if left else set()
            if "gsb0" in operands:  # the last of a group
                groups, opened = [*groups, opened], set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            pending = int(operands.rpartition(" ")[2], 16)
            groups = groups[-pending:] if pending else []
        elif _results(name, operands) & opened.union(*groups):
            found.append(f"{name} {operands}")
    return found


def _results(name: str, operands: str) -> set[int]:
    """The numbers of the registers that an instruction writes."""
    first = RESULT.match(operands)
    if not first or name.startswith(NO_RESULT):
        return set()
    parts = name.split(".")
    if parts[0] == "LDSM":
        count = int(parts[-1]) if parts[-1].isdigit() else 1
    else:
        count = 4 if "128" in parts or parts[0] in ("HMMA", "IMMA") else 2 if {"64", "WIDE"} & {*parts} else 1
    return set(range(int(first[1]), int(first[1]) + count))
